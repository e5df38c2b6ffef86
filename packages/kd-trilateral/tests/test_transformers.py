"""TrilateralTrainer on a tiny BERT, built from a config."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from fusion_core.errors import CheckpointError, ConfigError, DataError, FusionWarning, MissingExtraError
from kd_trilateral.integrations.transformers import TrilateralTrainer

CLASSES, LENGTH, WORDS = 3, 6, 20


class Recorder:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.alphas: list[torch.Tensor] = []

    def record(self, step: int, out: Any) -> None:
        self.steps.append(step)
        self.alphas.append(out.alpha.detach().clone())


def bert(seed: int, hidden: int = 16) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=LENGTH,
        num_labels=CLASSES,
        hidden_dropout_prob=0.1,
    )
    return BertForSequenceClassification(config)


def rows(count: int, seed: int, *, column: bool = True, labels: bool = True) -> list[dict[str, Any]]:
    """The label is the first word modulo the classes; the column's teacher mostly knows it."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (count, LENGTH), generator=draw)
    y = words[:, 0] % CLASSES
    logits = 3.0 * torch.nn.functional.one_hot(y, CLASSES) + torch.randn(count, CLASSES, generator=draw)
    return [
        {"input_ids": words[i].tolist(), "unused": 1.0}
        | ({"label": int(y[i])} if labels else {})
        | ({"teacher_logits": logits[i].tolist(), "sample_id": i} if column else {})
        for i in range(count)
    ]


def trainer(out: Path, **given: Any) -> TrilateralTrainer:
    options: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    } | given.pop("options", {})
    loss = {"seed": 0, "temperature": 2.0, "geometry": "compact"} | given.pop("loss", {})
    bilevel = {"every": 2} | given.pop("bilevel", {})
    given.setdefault("train_dataset", rows(64, 1))
    given.setdefault("hyper_dataset", rows(24, 2))
    return TrilateralTrainer(
        model=given.pop("model", None) or bert(0),
        args=TrainingArguments(output_dir=str(out), **options),
        kd=given.pop("kd", {"loss": loss, "bilevel": bilevel}),
        alpha_trace=given.pop("alpha_trace", None) or Recorder(),
        **given,
    )


def omega(t: TrilateralTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in t.loss.parameters()])


def test_trains_and_moves_the_ratio_network(tmp_path: Path) -> None:
    t = trainer(tmp_path, eval_dataset=rows(32, 4), options={"max_steps": 40})
    before, start = omega(t), t.evaluate()["eval_loss"]
    t.train()
    assert t.evaluate()["eval_loss"] < 0.8 * start
    assert not torch.equal(before, omega(t))
    assert t.engine is not None
    assert (t.engine.engine, t.engine.outer_steps) == ("jvp", 20)
    assert t.alpha_trace.steps == list(range(40))
    assert torch.cat(t.alpha_trace.alphas[-4:]).std() > 0


def test_class_mean_is_that_of_the_training_rows(tmp_path: Path) -> None:
    data = rows(50, 1)
    t = trainer(tmp_path, train_dataset=data, options={"max_steps": 1, "per_device_eval_batch_size": 7})
    t.train()
    probs = torch.tensor([r["teacher_logits"] for r in data]).softmax(-1)
    y = torch.tensor([r["label"] for r in data])
    for label in range(CLASSES):
        torch.testing.assert_close(t.loss.tbar[label], probs[y == label].mean(0))


@pytest.mark.parametrize("bilevel", [{"hypergradient": "frozen"}, {"every": 0}])
def test_frozen_leaves_omega(tmp_path: Path, bilevel: dict[str, Any]) -> None:
    t = trainer(tmp_path, bilevel=bilevel, hyper_dataset=None, options={"max_steps": 3})
    before = omega(t)
    t.train()
    assert torch.equal(before, omega(t))


@pytest.mark.parametrize("engine", ["fd", "fd1", "head", "joint", "val_mix"])
def test_engines_move_omega(tmp_path: Path, engine: str) -> None:
    t = trainer(tmp_path, bilevel={"hypergradient": engine, "subsample": 0.5}, options={"max_steps": 4})
    before = omega(t)
    t.train()
    assert not torch.equal(before, omega(t))


def test_teacher_model_is_frozen_and_warned_about_once(tmp_path: Path) -> None:
    teacher = bert(9, 32).train()
    data = {"train_dataset": rows(32, 1, column=False), "hyper_dataset": rows(16, 2, column=False)}
    with pytest.warns(FusionWarning, match="training mode and required gradients"):
        t = trainer(tmp_path, teacher=teacher, options={"max_steps": 3}, **data)
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FusionWarning)
        t.train()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())


def test_accumulated_micro_batches(tmp_path: Path) -> None:
    options = {"max_steps": 6, "gradient_accumulation_steps": 3}
    t = trainer(tmp_path, train_dataset=rows(72, 1), options=options)
    before = omega(t)
    t.train()
    assert t.engine is not None
    assert (t.engine.steps, t.engine.outer_steps, len(t.alpha_trace.steps)) == (6, 3, 18)
    assert t.engine.last_c is not None
    assert t.engine.last_c.shape == (8,)
    assert not torch.equal(before, omega(t))


def test_accumulation_takes_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    ended: list[torch.Tensor] = []
    for batch, parts in ((16, 1), (8, 2)):
        model = bert(0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        options = {"max_steps": 2, "per_device_train_batch_size": batch, "gradient_accumulation_steps": parts}
        t = trainer(tmp_path, model=model, options=options | {"optim": "sgd"}, bilevel={"every": 0})
        t.train()
        ended.append(torch.cat([p.detach().flatten() for p in t.model.parameters()]))
    torch.testing.assert_close(ended[0], ended[1], rtol=1e-4, atol=1e-6)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path / "a", options=options)
    whole.train()
    again = trainer(tmp_path / "b", options=options, model=bert(7), loss={"seed": 8})
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert again.engine is not None
    assert again.engine.steps == 10
    assert torch.equal(omega(whole), omega(again))
    assert torch.equal(whole.loss.tbar, again.loss.tbar)
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    from kd_trilateral.integrations.transformers import STATE_FILE

    torch.save(torch.ones(2, 2), tmp_path / "a" / "checkpoint-5" / STATE_FILE)
    with pytest.raises(CheckpointError, match=f"{STATE_FILE} is damaged"):
        trainer(tmp_path / "d", options=options).train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5")
        )
    (tmp_path / "a" / "checkpoint-5" / "ratio.safetensors").unlink()
    broken = trainer(tmp_path / "c", options=options)
    with pytest.raises(CheckpointError, match=r"ratio\.safetensors"):
        broken.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))


def test_evaluation_is_plain_cross_entropy_and_predicts(tmp_path: Path) -> None:
    data = rows(20, 5)
    t = trainer(tmp_path, options={"per_device_eval_batch_size": 20})
    found = t.predict(data)
    logits = torch.tensor(found.predictions)
    y = torch.tensor([r["label"] for r in data])
    assert found.metrics["test_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)))
    assert logits.shape == (20, CLASSES)


def test_unused_columns_may_stay(tmp_path: Path) -> None:
    t = trainer(tmp_path, options={"max_steps": 2, "remove_unused_columns": False})
    t.train()
    assert t.state.global_step == 2


def test_annealing_runs_over_the_training(tmp_path: Path) -> None:
    t = trainer(tmp_path, loss={"ratio": "anl"}, hyper_dataset=None, options={"max_steps": 4})
    t.train()
    assert [float(a[0]) for a in t.alpha_trace.alphas] == [1.0, 0.75, 0.5, 0.25]


def test_bad_input(tmp_path: Path) -> None:
    bare = rows(16, 1, column=False)
    with pytest.raises(DataError, match=r"pass teacher=.*teacher_logits"):
        trainer(tmp_path, train_dataset=bare).train()
    with pytest.raises(DataError, match="no 'labels'"):
        trainer(tmp_path, train_dataset=rows(16, 1, labels=False)).train()
    with pytest.raises(DataError, match="hyper_dataset is missing"):
        trainer(tmp_path, hyper_dataset=None)
    with pytest.raises(ConfigError, match="outer_first"):
        trainer(tmp_path, bilevel={"order": "outer_first"})
    with pytest.raises(ConfigError, match=r"kd has \['los'\]"):
        trainer(tmp_path, kd={"los": {}})
    student = bert(0)
    with pytest.raises(ConfigError, match="student itself"):
        trainer(tmp_path, model=student, teacher=student)
    data = rows(16, 1)
    with pytest.warns(FusionWarning, match="hyper_dataset is train_dataset"):
        trainer(tmp_path, train_dataset=data, hyper_dataset=data)


def test_missing_extra_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "kd_trilateral.integrations.transformers")
    with pytest.raises(MissingExtraError, match=r'pip install "kd-trilateral\[hf\]"'):
        importlib.import_module("kd_trilateral.integrations.transformers")


def test_package_import_stays_light() -> None:
    code = "import sys, kd_trilateral, kd_trilateral.bilevel; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

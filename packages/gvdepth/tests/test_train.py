"""Training: the step, several processes, exact resume, the recipe."""

from __future__ import annotations

import json
import math

import gvdepth_train_ranks as ranks
import numpy as np
import pytest
import torch

from fusion_core.checkpoint import load_tensors
from fusion_core.errors import ConfigError, DataError, InputError
from fusion_core.testing import kill_when, spawn
from gvdepth import GVDepth, GVDepthConfig, TrainConfig, Trainer
from gvdepth.data import Simulated
from gvdepth.losses import consistency_loss
from gvdepth.train import StepSampler, Views, build_model, collate_views, make_scheduler, train_step
from gvdepth.train_checkpoints import fit


def test_the_step_is_the_sum_of_its_losses():
    model, batch = ranks.small_model().double(), ranks.views()
    found = train_step(model, batch, consistency_weight=0.3)
    outputs = [model(view["pixel_values"], view["camera"], view["labels"]) for view in batch]
    apart = consistency_loss(outputs[0].depth, outputs[1].depth, batch[0]["view"], batch[1]["view"])
    whole = (outputs[0].loss + outputs[1].loss) / 2 + 0.3 * apart
    torch.testing.assert_close(found["loss"], whole)
    torch.testing.assert_close(found["consistency"], apart)
    assert set(train_step(model, batch[:1])) == {"loss", "silog", "uncertainty"}


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one():
    """Means are over the valid pixels of all ranks, though one rank has far fewer."""
    alone, wanted = ranks.gradients()
    for loss, found in spawn(ranks.gradients, 2):
        assert loss == pytest.approx(alone, rel=1e-9)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-9, err_msg=name)


def test_ranks_draw_one_size_and_share_the_samples():
    samples = Simulated("train", 10, keep=True)
    sampler = StepSampler(10, 2, 2, seed=0)
    data = Views(samples, ranks.recipe(), sampler)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 4
    places = [key[1] for batch in batches for key in batch]
    assert places == list(range(8))
    assert len({key[2] for batch in batches for key in batch}) == 8
    sizes = [data[batch[0]][0].pixel_values.shape for batch in batches]
    assert sizes[0] == sizes[1]  # one step of two ranks
    assert sizes[2] == sizes[3]
    first, second = data[batches[0][0]]
    assert first.pixel_values.shape != second.pixel_values.shape or (first.view != second.view).any()
    data.set_epoch(1)
    assert [k[2] for b in sampler for k in b] != [k[2] for b in batches for k in b]
    again = StepSampler(10, 4, 1, seed=0)  # the same samples whatever the number of ranks
    assert [k[:3] for b in again for k in b] == [k[:3] for b in batches for k in b]
    assert len(next(iter(StepSampler(1, 4, 1, 0)))) == 4
    with pytest.raises(DataError, match="empty"):
        StepSampler(0, 4, 1, 0)
    batch = collate_views([data[key] for key in batches[0]])
    assert [set(view) for view in batch] == [{"pixel_values", "camera", "labels", "view"}] * 2


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    place = tmp_path / "killed"
    assert kill_when([ranks.train, place, False, False, 0.05], place / "last.pt") != 0
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    torch.manual_seed(123)  # no draw comes from the global state
    result = ranks.train(tmp_path / "killed", resume=True)
    assert result.steps == 6
    ranks.train(tmp_path / "whole")
    killed, whole = (load_tensors(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    for name, value in whole.items():
        torch.testing.assert_close(killed[name], value, rtol=0, atol=0)
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in path.read_text().splitlines()
        ]
        for path in (tmp_path / "killed" / "metrics.jsonl", tmp_path / "whole" / "metrics.jsonl")
    ]
    assert lines[0][-1]["step"] == lines[1][-1]["step"] == 6
    model = GVDepth.from_pretrained(tmp_path / "whole")
    assert model.config.cue == "fusion"
    with pytest.raises(InputError, match="pass resume or overwrite"):
        ranks.train(tmp_path / "whole")


def test_training_learns():
    samples = Simulated("train", 8, seed=1, keep=True)
    losses = []
    model = fit("fusion", samples, steps=25, told=lambda step, loss: losses.append(loss))
    assert len(losses) == 25
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert not model.training
    before = torch.get_rng_state()
    fit("direct", samples, steps=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_schedules():
    def rates(config):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([weight], lr=config.lr)
        scheduler = make_scheduler(optimizer, config)
        found = []
        for _ in range(config.steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return [*found, optimizer.param_groups[0]["lr"]]

    cosine = rates(TrainConfig(steps=100, warmup_steps=10))
    assert cosine[0] == pytest.approx(1e-5)
    assert max(cosine) == pytest.approx(1e-4)
    assert cosine[10] == pytest.approx(1e-4)
    assert cosine[55] == pytest.approx(1e-5 + 0.9e-4 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert cosine[-1] == pytest.approx(1e-5)
    cycle = rates(TrainConfig(steps=50, schedule="onecycle", lr=3e-3))
    assert max(cycle) == pytest.approx(3e-3, rel=1e-2)
    assert cycle[-1] < 1e-5


def test_config(tmp_path):
    found = TrainConfig().override(["model.cue=focal", "augment.size=[48, 120]", "lr=3e-4"])
    assert (found.model.cue, found.augment.size, found.lr) == ("focal", (48, 120), 3e-4)
    found.save(tmp_path / "recipe.toml")
    assert TrainConfig.load(tmp_path / "recipe.toml") == found
    for changes, words in (
        (["steps=0"], "steps is 0"), (["lr=1e300"], r"lr is 1e\+300"),
        (["final_lr=1.0"], "final_lr is 1"), (["model.cue=both"], "cue"),
        (["augment.flip=2.0"], "flip is 2"), (["stepz=3"], "did you mean steps"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            TrainConfig().override(changes)
    torch.manual_seed(5)
    one = build_model(TrainConfig(model=GVDepthConfig.tiny(encoder_widths=(8, 8))))
    two = build_model(TrainConfig(model=GVDepthConfig.tiny(encoder_widths=(8, 8))))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_views_smaller_than_the_model_takes_are_refused(tmp_path):
    model = GVDepth(GVDepthConfig.tiny(encoder_widths=(8, 8, 8, 8, 8)))
    with pytest.raises(InputError, match="wanted at least 64: the model's least size"):
        Trainer(model, Simulated("train", 1), ranks.recipe(), out=tmp_path)


def test_the_encoder_learns_at_its_own_rate():
    model = ranks.small_model()
    head, encoder = model.parameter_groups(1e-3, 0.1)
    assert (head["lr"], encoder["lr"]) == (1e-3, pytest.approx(1e-4))
    assert {id(p) for p in encoder["params"]} == {id(p) for p in model.encoder.parameters()}


@pytest.mark.parametrize(
    "changes", [{"mixed_precision": "bf16"}, {"consistency_weight": 0.0, "accumulate": 1}]
)
def test_variants_of_the_recipe_train(tmp_path, changes):
    found = ranks.train(tmp_path, steps=2, **changes)
    assert found.steps == 2
    assert math.isfinite(found.metrics["loss"])
    assert ("consistency" in found.metrics) == (changes.get("consistency_weight") != 0.0)

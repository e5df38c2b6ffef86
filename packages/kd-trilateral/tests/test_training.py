"""fit, run directories, trace, reports and comparisons."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kd_trilateral as kdt
from fusion_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FusionWarning,
    InputError,
    ShapeError,
    StoreError,
)
from kd_trilateral import report
from kd_trilateral.comparing import compare, method
from kd_trilateral.evaluation import auc, evaluate
from kd_trilateral.rowsource import Rows, stratified
from kd_trilateral.runstate import load_run
from kd_trilateral.tasks import LABEL_WRONG, TASKS, TEACHER_WRONG, digits, make_task, mlp
from kd_trilateral.trace import AlphaTrace
from kd_trilateral.training import Splits, fit

FAST = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(96, 6, generator=draw)
    y = (x[:, :3].argmax(-1)).long()
    return x, y, nn.functional.one_hot(y, 3) * 4.0 + torch.randn(96, 3, generator=draw)


def student(dropout=0.3):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
        )


def same_state(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "options", [{}, {"ratio": "rw"}, {"refit": True}, {"optimizer": "sgd", "order": "outer_first"}]
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, data, options):
    x, y, zt = data
    settings = {"epochs": 4, "batch_size": 16, "every": 2, "lr": 1e-2, "test": (x, y), **FAST, **options}
    whole = fit(student(), (x, y), teacher=zt, out=tmp_path / "a", **settings)

    class Stop(Exception):
        pass

    from kd_trilateral import training

    real, calls = training.RunDirectory.save, []

    def save(self, *args):
        real(self, *args)
        calls.append(1)
        if len(calls) == 2 + 4 * bool(options.get("refit")):
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.RunDirectory, "save", save)
        with pytest.raises(Stop):
            fit(student(), (x, y), teacher=zt, out=tmp_path / "b", **settings)
    torch.rand(7)  # the caller's own draws must not matter
    resumed = fit(student(), (x, y), teacher=zt, out=tmp_path / "b", resume=True, **settings)
    assert same_state(whole.student, resumed.student)
    assert same_state(whole.ratio, resumed.ratio)
    assert whole.metrics == resumed.metrics
    np.testing.assert_array_equal(whole.audit.alpha, resumed.audit.alpha)
    np.testing.assert_array_equal(whole.trace.rows().alpha, resumed.trace.rows().alpha)


def test_stopped_at_any_file_a_run_ends_with_the_same_files(tmp_path, data, monkeypatch):
    x, y, zt = data
    settings = {"epochs": 2, "batch_size": 32, "every": 2, "test": (x, y), "teacher": zt, **FAST}
    real, calls, stop_at = Path.replace, [], []

    def replace(self, target):
        calls.append(target)
        if stop_at and len(calls) == stop_at[0]:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    fit(student(), (x, y), out=tmp_path / "whole", **settings)
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    count = len(calls)
    assert count == 12  # settings, five files after each of two epochs, the final ratios
    for number in range(1, count + 1):
        out = tmp_path / f"{number}"
        calls.clear()
        stop_at[:] = [number]
        with pytest.raises(KeyboardInterrupt):
            fit(student(), (x, y), out=out, **settings)
        stop_at.clear()
        (out / ".metrics.jsonl.0.tmp").write_text("what a kill leaves")
        fit(student(), (x, y), out=out, resume=True, **settings)
        found = {file.name: file.read_bytes() for file in out.iterdir()}
        state = torch.load(out / "optimizer.pt", weights_only=True)  # pickled in another order perhaps
        assert (state["step"], state["phase"]) == (6, 0)
        found["optimizer.pt"] = wanted["optimizer.pt"]
        changed = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        assert not changed, f"stopped at file {number}"


def test_run_directory_is_guarded(tmp_path, data):
    x, y, zt = data
    settings = {"epochs": 1, "batch_size": 32, **FAST}
    fit(student(), (x, y), teacher=zt, out=tmp_path / "r", **settings)
    with pytest.raises(InputError, match="not empty; pass resume, overwrite"):
        fit(student(), (x, y), teacher=zt, out=tmp_path / "r", **settings)
    with pytest.raises(StoreError, match=r"lr = 0\.001, this run has 0\.5"):
        fit(student(), (x, y), teacher=zt, out=tmp_path / "r", resume=True, lr=0.5, **settings)
    with pytest.raises(StoreError, match="with rows ="):
        fit(student(), (x + 1, y), teacher=zt, out=tmp_path / "r", resume=True, **settings)
    again = fit(student(), (x, y), teacher=zt, out=tmp_path / "r", overwrite=True, lr=0.01, **settings)
    assert load_run(tmp_path / "r")[0].lr == 0.01
    names = "config.json model.safetensors ratio.safetensors optimizer.pt trace.npz metrics.jsonl audit.npz"
    assert {p.name for p in (tmp_path / "r").iterdir()} >= set(names.split())
    torch.load(tmp_path / "r" / "optimizer.pt", weights_only=True)
    _, trace, audit, metrics = load_run(tmp_path / "r")
    assert len(trace) == len(again.trace.rows())
    np.testing.assert_array_equal(audit.alpha, again.audit.alpha)
    assert metrics == json.loads(json.dumps(again.metrics))
    with pytest.raises(DataError, match="no run directory"):
        load_run(tmp_path)


def test_a_bare_tensor_in_place_of_the_state_is_damage(tmp_path, data, recwarn):
    x, y, zt = data
    settings = {"epochs": 1, "batch_size": 32, **FAST}
    fit(student(), (x, y), teacher=zt, out=tmp_path / "r", **settings)
    torch.save(torch.ones(2, 2), tmp_path / "r" / "optimizer.pt")
    recwarn.clear()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read"):
        fit(student(), (x, y), teacher=zt, out=tmp_path / "r", resume=True, **settings)
    assert not recwarn.list  # PyTorch warns where a tensor is asked for a name


def test_teacher_as_module_tensor_and_cache_agree(tmp_path, data):
    x, y, _ = data
    teacher = nn.Linear(6, 3).eval()
    logits = teacher(x).detach()
    cache = kdt.TeacherCache.build(teacher, (x, y), tmp_path / "t.kdc", dtype="float32")
    held = (torch.randn(16, 6), torch.arange(16) % 3)
    results = [
        fit(mlp([6, 3], 0), (x, y), held, teacher=t, epochs=1, batch_size=32, **FAST)
        for t in (teacher, logits, cache)
    ]
    for other in results[1:]:
        for a, b in zip(results[0].student.parameters(), other.student.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0].ratio.tbar, kdt.class_mean(logits.softmax(-1), y, 3)[0])


def test_callers_generator_is_left_alone(data):
    x, y, zt = data
    before = torch.get_rng_state()
    fit(student(), (x, y), teacher=zt, epochs=1, **FAST)
    assert torch.equal(before, torch.get_rng_state())


def test_datasets_and_tensors_agree(data):
    x, y, zt = data

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(y)

        def __getitem__(self, i):
            return {"features": x[i], "labels": y[i]}

    class ByName(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, features):
            return {"logits": self.inner(features)}

    plain = fit(student(), (x, y), teacher=zt, epochs=1, batch_size=32, **FAST)
    named = fit(ByName(student()), Pairs(), teacher=zt, epochs=1, batch_size=32, **FAST)
    assert same_state(plain.student, named.student.inner)


def test_oversampling_draws_classes_evenly():
    x = torch.arange(200.0).unsqueeze(-1) / 200
    y = (torch.arange(200) >= 180).long()
    result = fit(nn.Linear(1, 2), (x, y), teacher=torch.zeros(200, 2), epochs=3,
                 balance="oversample", tbar="train", **FAST)  # fmt: skip
    rare = (result.trace.rows().label == 1).mean()
    assert 0.4 < rare < 0.6


def test_overlap_is_warned_of(data):
    x, y, zt = data
    with pytest.warns(FusionWarning, match="10 of 10 held-out rows are training rows too"):
        fit(student(), (x, y), (x[:10], y[:10]), teacher=zt, epochs=1, **FAST)


def test_a_refit_goes_on_from_what_was_learned(data):
    x, y, zt = data
    settings = {"teacher": zt, "epochs": 3, "batch_size": 16, "every": 2, "test": (x, y), **FAST}
    whole = fit(student(), (x, y), refit=True, **settings)
    first = fit(student(), (x, y), **settings)
    before = list(first.metrics)
    second = fit(student(), (x, y), refit=True, learned=first, **settings)
    assert same_state(whole.student, second.student)
    assert same_state(whole.ratio, second.ratio)
    assert whole.metrics == second.metrics
    np.testing.assert_array_equal(whole.audit.alpha, second.audit.alpha)
    np.testing.assert_array_equal(whole.trace.rows().alpha, second.trace.rows().alpha)
    assert first.metrics == before
    with pytest.raises(ConfigError, match="learned comes of other settings"):
        fit(student(), (x, y), refit=True, learned=first, **{**settings, "epochs": 4})


def test_bad_input(data):
    x, y, zt = data
    for error, words, change in (
        (ShapeError, "96", {"teacher": zt[:50]}),
        (DataError, "val_teacher", {"refit": True, "val": (x[:8] + 9, y[:8])}),
        (ConfigError, "did you mean epochs", {"epoch": 3}),
        (ConfigError, "epochs", {"epochs": 0}),
        (DataError, "no rows", {"val": (x[:0], y[:0])}),
        (InputError, "cuda:7", {"device": "cuda:7"}),
    ):
        options = {"teacher": zt, "epochs": 1, **FAST, **change}
        with pytest.raises(error, match=words):
            fit(student(), (x, y), **options)
    with pytest.raises(ShapeError, match="as many of each"):
        Rows((x, y[:5]))
    with pytest.raises(DataError, match=r"wanted \(x, y\)"):
        Rows(3)


def test_stratified_takes_a_share_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 2 + [3])
    rest, drawn = stratified(labels, 0.1, 0)
    assert sorted(torch.cat([rest, drawn]).tolist()) == list(range(73))
    assert torch.bincount(labels[drawn], minlength=4).tolist() == [5, 2, 1, 0]
    assert not torch.equal(drawn, stratified(labels, 0.1, 1)[1])


def test_evaluate_and_auc_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    score, positive = draw.integers(0, 20, 300).astype(float), draw.random(300) < 0.3
    assert auc(score, positive) == pytest.approx(metrics.roc_auc_score(positive, score), abs=1e-12)
    net, x = nn.Linear(3, 1), torch.randn(64, 3)
    y = (torch.rand(64) < 0.5).long()
    found = evaluate(net, (x, y), task="binary")
    p = net(x).detach().sigmoid()[:, 0].double().numpy()
    assert found["nll"] == pytest.approx(metrics.log_loss(y.numpy(), p), rel=1e-5)
    assert found["accuracy"] == metrics.accuracy_score(y.numpy(), p > 0.5)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(y.numpy(), p))


def test_trace_is_a_ring(tmp_path):
    loss = kdt.TrilateralKD(3, tbar="none", seed=0, init_alpha=None)
    trace = AlphaTrace(capacity=25)
    for step in range(100):
        ids = torch.arange(4) + 4 * (step % 2)
        trace.record(step, loss(torch.randn(4, 3), torch.randn(4, 3), torch.arange(4) % 3, ids))
    rows = trace.rows()
    assert len(rows) == len(trace) == 25
    assert rows.step.tolist() == [93] + [s for s in range(94, 100) for _ in range(4)]
    last = rows.last_of_each()
    assert last.sample.tolist() == list(range(8))
    assert last.step.tolist() == [98] * 4 + [99] * 4
    drift = rows.drift()
    mine = rows.alpha[rows.sample == 5].astype(float)
    assert drift[5] == pytest.approx(
        mine[-len(mine) // 2 :][-(len(mine) // 2) :].mean() - mine[: len(mine) // 2].mean()
    )
    trace.save(tmp_path / "t.npz")
    np.testing.assert_array_equal(AlphaTrace.load(tmp_path / "t.npz").rows().alpha, rows.alpha)
    trace.save(tmp_path / "t.jsonl")
    first = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    assert first["step"] == 93
    assert len(trace.to_dataframe()) == 25
    with pytest.raises(InputError, match=r"\.npz or \.jsonl"):
        trace.save(tmp_path / "t.csv")
    with pytest.raises(DataError, match="no trace"):
        AlphaTrace.load(tmp_path / "nothing.npz")


@pytest.fixture(scope="module")
def noisy_run():
    task = digits(3, rows=300, held=100)
    parts = task.splits
    settings = {**task.settings, **FAST, "steps": 200, "seed": 3, "every": 1, "precondition": False}
    student_ = task.student()
    result = fit(student_, parts.train, parts.val, teacher=parts.teacher, test=parts.test, **settings)
    return task, result


def test_suspects_point_at_the_spoilt_rows(noisy_run):
    task, result = noisy_run
    found = report.suspects(result.audit, 60, result.trace)
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    truth = {report.TEACHER: TEACHER_WRONG, report.LABEL: LABEL_WRONG}
    right = [bool(int(task.kind[row["sample"]]) & truth[row["suspicion"]]) for row in found]
    base = max((task.kind == TEACHER_WRONG).double().mean(), (task.kind == LABEL_WRONG).double().mean())
    assert np.mean(right) > 0.9 > 2 * float(base)
    assert {row["suspicion"] for row in found} == set(truth)


def test_report_pages_and_files(tmp_path, noisy_run):
    _, result = noisy_run
    page = result.report()
    assert page.suspects(5) == report.suspects(result.audit, 5, result.trace)
    page.save(tmp_path / "r")
    assert {"report.html", "report.json", "table.csv", "alpha.png", "lengths.png", "suspects.csv"} <= {
        p.name for p in (tmp_path / "r").iterdir()
    }
    html = (tmp_path / "r" / "report.html").read_text()
    assert html.count("data:image/png;base64") == 2
    assert "teacher wrong?" in html
    document = json.loads((tmp_path / "r" / "report.json").read_text())
    assert document["statistics"]["rows"] == 300
    lines = (tmp_path / "r" / "suspects.csv").read_text().splitlines()
    assert lines[0].startswith("sample,suspicion,score,alpha")
    axes = report.plot(result.trace, tmp_path / "a.png")
    assert axes.get_ylabel() == "alpha"
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_group_means_are_the_means(noisy_run):
    task, result = noisy_run
    rows = result.trace.rows()
    wrong = task.kind.numpy() == LABEL_WRONG
    steps, curves = report.group_means(rows, {"label wrong": wrong}, bins=4)
    edges = np.linspace(rows.step.min(), rows.step.max() + 1, 5)
    for i in range(4):
        keep = wrong[rows.sample] & (rows.step >= edges[i]) & (rows.step < edges[i + 1])
        assert curves["label wrong"][i] == pytest.approx(rows.alpha[keep].mean(), rel=1e-5)
        assert edges[i] < steps[i] < edges[i + 1]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tasks_are_fixed_by_their_seed(name):
    one, two, other = make_task(name, 5), make_task(name, 5), make_task(name, 6)
    assert torch.equal(one.splits.teacher, two.splits.teacher)
    assert torch.equal(one.splits.train[0], two.splits.train[0])
    assert not torch.equal(one.splits.train[1], other.splits.train[1])
    assert same_state(one.student(), two.student())
    if name != "ctr":  # few fields with few values: some rows coincide
        assert Rows(one.splits.train).overlap(Rows(one.splits.test)) == 0
        assert one.teacher_accuracy > 0.9
        agree = one.splits.teacher.argmax(-1) == one.splits.train[1]
        assert agree[one.kind == 0].double().mean() > 0.9
        assert agree[one.kind == LABEL_WRONG].double().mean() < 0.1
    with pytest.raises(ConfigError, match="cancer"):
        make_task("imagenet", 0)


def test_compare_runs_every_method_on_the_same_draws(tmp_path):
    seen = []

    def splits(seed):
        task = digits(seed, rows=120, held=40)
        seen.append(seed)
        return task.splits

    config = kdt.Config(device="cpu", steps=40, batch_size=32, lr=1e-2)
    methods = dict(method(word) for word in ("const:0.5", "wls", "tgeo"))
    found = compare(
        splits, lambda seed: mlp([64, 16, 10], seed), methods, [0, 1], config=config, progress=False
    )
    assert seen == [0, 1]
    assert found.comparison.methods == ["KD 0.5", "WLS", "TGeo robust"]
    assert found.comparison.baseline == "KD 0.5"
    assert len(found.verdict) == 2
    assert all("p = " in sentence for sentence in found.verdict)
    found.save(tmp_path / "c")
    assert found.verdict[0] in (tmp_path / "c" / "report.html").read_text()
    with pytest.raises(ConfigError, match="tgeo:refit"):
        method("tgeo:nonsense")
    with pytest.raises(InputError, match="test rows"):
        compare(
            lambda s: dataclasses.replace(digits(s).splits, test=None),
            lambda s: mlp([64, 10], s),
            methods,
            [0],
        )


def test_config_round_trip(tmp_path):
    config = kdt.Config(geometry=("s", "len:st"), init_alpha=0.3, subsample=0.5, head=None)
    for suffix in (".toml", ".json"):
        config.save(tmp_path / f"c{suffix}")
        assert kdt.Config.load(tmp_path / f"c{suffix}") == config
    loss = kdt.TrilateralKD(**config.loss_kwargs(4))
    assert loss.geometry.blocks == ("s", "len:st")
    assert Splits(train=1).val is None
    for bad in ({"ratio": "nonsense"}, {"temperature": -1.0}, {"init_alpha": "soon"}, {"alpha": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            kdt.Config.from_dict(bad)

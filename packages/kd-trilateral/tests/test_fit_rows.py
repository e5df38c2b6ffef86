"""fit keeps the caller's row numbers, reads data once, and refuses what it cannot use by name."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kd_trilateral as kdt
from fusion_core.errors import ConfigError, DataError, InputError, ShapeError
from fusion_core.testing import heed_ctrl_c, run_cli
from kd_trilateral.cli import main
from kd_trilateral.comparing import compare, method
from kd_trilateral.rowsource import Rows
from kd_trilateral.runstate import check_out, load_run
from kd_trilateral.training import Splits, fit

FAST = {"device": "cpu", "progress": False, "batch_size": 16}


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(100, 5, generator=draw)
    y = torch.randint(0, 4, (100,), generator=draw)
    return x, y, torch.randn(100, 4, generator=draw)


class Counted(torch.utils.data.Dataset):
    """Counts how often a row is read."""

    def __init__(self, x, y):
        self.x, self.y, self.reads = x, y, 0

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        self.reads += 1
        return self.x[i], self.y[i]


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("as_dataset", [False, True])
def test_rows_keep_the_callers_numbers_when_some_are_held_out(data, refit, as_dataset):
    x, y, zt = data
    train = Counted(x, y) if as_dataset else (x, y)
    run = fit(nn.Linear(5, 4), train, teacher=zt, epochs=2, refit=refit, **FAST)
    for rows in (run.audit, run.trace.rows().last_of_each()):
        np.testing.assert_array_equal(y.numpy()[rows.sample], rows.label)
        np.testing.assert_array_equal(zt.argmax(-1).numpy()[rows.sample], rows.teacher_class)
    assert len(run.audit) == len(set(run.audit.sample.tolist())) < 100
    assert run.audit.sample.max() > len(run.audit) - 1


def test_a_bad_teacher_row_is_named_by_the_callers_number(data):
    x, y, zt = data
    for row in (3, 7, 42):
        bad = zt.clone()
        bad[row] = torch.nan
        with pytest.raises(DataError, match=rf"teacher holds NaN or infinity in rows \[{row}\]"):
            fit(nn.Linear(5, 4), (x, y), teacher=bad, epochs=1, **FAST)
        done = fit(nn.Linear(5, 4), (x, y), teacher=bad, epochs=1, on_bad_teacher="zero_alpha", **FAST)
        assert (done.audit.alpha[done.audit.sample == row] == 0).all()


@pytest.mark.parametrize("shape", ["flat", "column", "pair"])
def test_binary_logits_of_any_shape_can_refit(data, shape):
    x, y, zt = data
    u = zt[:, 0]
    teacher = {"flat": u, "column": u.unsqueeze(-1), "pair": torch.stack([0 * u, u], -1)}[shape]
    settings = {"teacher": teacher[:80], "epochs": 1, "task": "binary", "refit": True, "seed": 1, **FAST}
    train, held = (x[:80], y[:80] % 2), (x[80:], y[80:] % 2)
    runs = [
        fit(nn.Linear(5, 1), train, **settings),
        fit(nn.Linear(5, 1), train, held, val_teacher=u[80:], **settings),
    ]
    assert all(np.isfinite(run.metrics[-1]["loss"]) and run.metrics[-1]["refit"] for run in runs)


@pytest.mark.parametrize("refit", [False, True])
def test_resuming_a_finished_run_changes_nothing(tmp_path, data, refit):
    x, y, zt = data
    settings = {"teacher": zt, "steps": 10, "refit": refit, "out": tmp_path / "r", **FAST}
    first = fit(nn.Linear(5, 4), (x, y), **settings)
    again = fit(nn.Linear(5, 4), (x, y), resume=True, **settings)
    assert first.metrics == again.metrics == load_run(tmp_path / "r")[3]
    assert [row["step"] for row in first.metrics] == [6, 10, 7, 10][: 2 + 2 * refit]
    assert all(
        torch.equal(a, b) for a, b in zip(first.student.parameters(), again.student.parameters(), strict=True)
    )


def test_annealing_starts_over_in_the_refit(data):
    x, y, zt = data
    run = fit(nn.Linear(5, 4), (x, y), teacher=zt, ratio="anl", epochs=2, refit=True, **FAST)
    alphas = [row["alpha"] for row in run.metrics]
    assert alphas[:2] == pytest.approx(alphas[2:], abs=0.06)
    assert alphas[2] > 0.6 > alphas[3]


def test_a_module_runs_once_over_the_rows(data):
    x, y, _ = data
    seen = []

    class Teacher(nn.Linear):
        def forward(self, input):  # noqa: A002 - torch's name
            seen.append(len(input))
            return super().forward(input)

    teacher = Teacher(5, 4).eval()
    fit(nn.Linear(5, 4), (x, y), teacher=teacher, epochs=1, refit=True, **FAST)
    assert sum(seen) == 100
    seen.clear()
    parts = Splits((x[:80], y[:80]), (x[80:], y[80:]), (x, y), teacher)
    config = kdt.Config(device="cpu", epochs=1)
    methods = dict(method(word) for word in ("const:0.5", "wls", "tgeo", "tgeo:refit"))
    compare(
        lambda _: dataclasses.replace(parts),
        lambda _: nn.Linear(5, 4),
        methods,
        [0],
        config=config,
        progress=False,
    )
    assert sum(seen) == 100


def test_the_cache_reads_each_row_once_and_keeps_the_batch_size(tmp_path, data):
    x, y, _ = data
    sizes = []

    class Teacher(nn.Linear):
        def forward(self, input):  # noqa: A002 - torch's name
            sizes.append(len(input))
            return super().forward(input)

    rows = Counted(x, y)
    rows.fingerprint = "fixed"
    kdt.TeacherCache.build(Teacher(5, 4).eval(), rows, tmp_path / "t.kdc", batch_size=64)
    assert rows.reads == 101  # one probe for the number of classes
    assert sizes == [1, 64, 36]


def test_views_of_random_data_are_trained_on_in_turn(tmp_path, data):
    x, y, _ = data

    class Shifted(torch.utils.data.Dataset):
        random, fingerprint = True, "shifted"

        def __init__(self, by=0.0):
            self.by = by

        def view(self, v):
            return Shifted(float(v))

        def __len__(self):
            return len(y)

        def __getitem__(self, i):
            return x[i] + self.by, y[i]

    teacher = nn.Linear(5, 4).eval()
    cache = kdt.TeacherCache.build(teacher, Shifted(), tmp_path / "t.kdc", views=2, dtype="float32")
    seen = []

    class Student(nn.Linear):
        def forward(self, input):  # noqa: A002 - torch's name
            if torch.is_grad_enabled() and self.training:
                seen.append(input.detach().mean().item())
            return super().forward(input)

    held = (x[:20] + 9, y[:20])
    fit(Student(5, 4), Shifted(), held, teacher=cache, epochs=4, every=0, **FAST)
    means = np.array(seen).reshape(4, -1).mean(1)
    np.testing.assert_allclose(means[1::2] - means[::2], 1.0, atol=0.1)


def test_numpy_rows_and_lists_of_pairs_work(data):
    x, y, zt = data
    a = fit(nn.Linear(5, 4), (x.double().numpy(), y.numpy()), teacher=zt.numpy(), epochs=1, **FAST)
    assert a.student.weight.dtype == torch.float32
    pairs = [(x[i], int(y[i])) for i in range(100)]
    assert len(fit(nn.Linear(5, 4), pairs, teacher=zt, epochs=1, **FAST).audit) == 91


def test_refusals_come_before_any_work_and_name_the_argument(tmp_path, data):
    x, y, zt = data
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model": 1}')

    class Never(nn.Linear):
        def forward(self, input):  # noqa: A002 - torch's name
            raise AssertionError("the teacher ran")

    with pytest.raises(InputError, match="something else than a run"):
        fit(nn.Linear(5, 4), (x, y), teacher=Never(5, 4), out=tmp_path / "other", resume=True, **FAST)
    assert (tmp_path / "other" / "config.json").read_text() == '{"model": 1}'
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_out(tmp_path / "file", resume=True, overwrite=True)
    for error, words, change in (
        (InputError, "teacher is a NoneType", {"teacher": None}),
        (ShapeError, r"labels have shape \(100, 1\)", {"y": y.unsqueeze(-1)}),
        (DataError, "labels are no numbers", {"y": ["cat"] * 100}),
        (DataError, "float", {"y": y.float()}),
        (DataError, r"wanted 0\.\.3", {"test": (x, y + 5)}),
        (DataError, "ignore_index -100", {"test": (x, torch.full_like(y, -100))}),
        (ShapeError, r"teacher has shape \(100, 2, 2\)", {"teacher": zt.reshape(100, 2, 2)}),
    ):
        options = {"teacher": zt, **{k: v for k, v in change.items() if k != "y"}}
        with pytest.raises(error, match=words):
            fit(nn.Linear(5, 4), (x, change.get("y", y)), epochs=1, **options, **FAST)
    with pytest.raises(DataError, match="a dict"):
        Rows({"train": 1})
    with pytest.raises(ConfigError, match=r"num_classes is 3\.5"):
        kdt.TrilateralKD(3.5)
    with pytest.raises(ConfigError, match="alpha_range"):
        kdt.Config(alpha_range=(0.9, 0.1))


def bilevel(data, val_batches):
    x, y, zt = data
    student, loss = nn.Linear(5, 4), kdt.TrilateralKD(4, tbar="none")
    engine = kdt.Bilevel(student, loss, torch.optim.SGD(student.parameters(), lr=0.1), val_batches, every=1)
    for _ in range(2):
        out = loss(student(x), zt, y)
        out.loss.backward()
        engine.step(x, out)


def test_held_out_batches_of_the_wrong_kind_are_refused(data):
    x, y, _ = data
    with pytest.raises(ShapeError, match="through a DataLoader"):
        bilevel(data, TensorDataset(x, y))
    with pytest.raises(DataError, match="iterator that is used up"):
        bilevel(data, iter([(x, y)]))
    bilevel(data, [(x, y.tolist())])
    bilevel(data, DataLoader(TensorDataset(x, y), batch_size=50))


def test_oversampling_and_holding_out_leave_ignored_rows_alone(data):
    x, y, zt = data
    y = y.clone()
    y[:30] = -100
    run = fit(nn.Linear(5, 4), (x, y), teacher=zt, epochs=1, balance="oversample", **FAST)
    assert (run.trace.rows().label != -100).all()


SCRIPT = """
import torch
from torch import nn
from kd_trilateral.training import Splits

def data(width=5):
    x = torch.arange(200.0).reshape(40, 5) / 200
    return {"train": (x, torch.arange(40) % 4), "test": (x, torch.arange(40) % 4), "teacher": torch.randn(40,
    4)}

def student(width=5):
    return nn.Linear(width, 4)

def keyword(*, width=5):
    return nn.Linear(width, 4)

def by_seed(seed):
    return nn.Linear(5, 4)
"""


def test_callables_get_the_seed_only_where_they_ask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ours.py").write_text(SCRIPT)
    for name in ("student", "keyword", "by_seed"):
        (tmp_path / "run.toml").write_text(
            f'data = "ours:data"\nstudent = "ours:{name}"\nepochs = 1\ndevice = "cpu"\n'
        )
        done = run_cli(main, "train", "run.toml", "--out", name, "--json", "-q")
        assert done.code == 0, done.stderr
    done = run_cli(
        main, "cache", "build", "--teacher", "ours:student", "--data", "ours:data", "--out", "t.kdc", "-q"
    )
    assert done.code == 0, done.stderr
    assert len(kdt.TeacherCache.open("t.kdc")) == 40


@pytest.mark.skipif(os.name == "nt", reason="no process groups on Windows")
def test_the_demos_second_process_goes_with_the_first(tmp_path):
    # Libraries that are still being imported swallow Ctrl-C, or end Python by the signal.
    code = "import sklearn.datasets, matplotlib.figure; from kd_trilateral.cli import main; main()"
    command = [sys.executable, "-c", code, "demo", "--full", "--out", str(tmp_path / "d")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    demo = subprocess.Popen(command, start_new_session=True, preexec_fn=heed_ctrl_c, **quiet)

    def left():
        found = subprocess.run(
            ["ps", "-o", "pid=", "-g", str(demo.pid)], capture_output=True, text=True, check=False
        )
        return [pid for pid in found.stdout.split() if int(pid) != demo.pid]

    try:
        until = time.monotonic() + 60
        while len(left()) < 2 and time.monotonic() < until:  # the worker and multiprocessing's tracker
            time.sleep(0.2)
        assert left()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(15) == 130
        until = time.monotonic() + 15
        while left() and time.monotonic() < until:
            time.sleep(0.2)
        assert not left()
        assert not (tmp_path / "d").exists()
    finally:
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGKILL)

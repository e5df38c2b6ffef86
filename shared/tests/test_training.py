import json
import signal
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fusion_core.checkpoint import load_tensors
from fusion_core.errors import CheckpointError, ConfigError, FusionError, InputError
from fusion_core.testing import spawn
from fusion_core.training import Loop


class Points(Dataset):
    """Noisy points of a line, the noise drawn from the global generator as augmentations do."""

    def __init__(self, n=23, noise=0.1):
        self.x, self.noise = torch.linspace(-1, 1, n)[:, None], noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + self.noise * torch.randn(1), 3 * self.x[i] + 1


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 1))


def step(net, batch):
    x, y = batch
    error = (net(x) - y).square().mean()
    return {"loss": error, "root": error.sqrt()}


def score(net):
    x = torch.linspace(-1, 1, 11)[:, None]
    return {"score": -(net(x) - 3 * x - 1).square().mean().item()}


def loop(out, net, **options):
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    base = {"steps": 12, "accumulate": 2, "max_grad_norm": 1.0, "ema": 0.9, "log_every": 3, "save_every": 4}
    return Loop(net, optimizer, scheduler=scheduler, out=out, device="cpu", **{**base, **options})


def data(**options):
    return DataLoader(Points(), 4, shuffle=True, **options)


def lines(out):
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in kept]


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stop_at):
    whole = model()
    torch.manual_seed(5)
    result = loop(tmp_path / "whole", whole).run(data(), step, score)
    assert result.steps == 12

    class Stop(Exception):
        pass

    def stopping(net, batch):
        if half.at.step == stop_at:
            raise Stop
        return step(net, batch)

    half = loop(tmp_path / "half", model(), save_every=1)
    torch.manual_seed(5)
    with pytest.raises(Stop):
        half.run(data(), stopping, score)
    torch.manual_seed(99)
    resumed = model()
    again = loop(tmp_path / "half", resumed, save_every=4, resume=True)
    assert again.at.step == stop_at
    assert again.run(data(), step, score).best == result.best
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert lines(tmp_path / "half") == lines(tmp_path / "whole")
    first, second = (load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda weight: weight.to(torch.complex64)])
def test_a_state_of_other_tensors_is_damaged(tmp_path, change):
    loop(tmp_path, model()).run(data(), step, score)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    name = next(iter(state["model"]))
    state["model"][name] = change(state["model"][name])
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt (is damaged|cannot be read): .*(complex|sparse)"):
        loop(tmp_path, model(), resume=True)


def test_it_learns_and_keeps_the_best_average(tmp_path):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    made = Loop(net, optimizer, out=tmp_path, epochs=60, ema=0.9, log_every=3, device="cpu")
    result = made.run(data(), step, score)
    assert result.epochs == 60
    assert result.steps == 60 * 6
    assert result.metrics["loss"] < 1
    best = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 1)).eval()
    best.load_state_dict(load_tensors(tmp_path / "model.safetensors"))
    assert score(best)["score"] == pytest.approx(result.best["score"], rel=1e-6)
    scores = [line["validation_score"] for line in lines(tmp_path) if "validation_score" in line]
    assert len(scores) == 60
    assert max(scores) == result.best["score"]


def test_accumulation_equals_one_large_batch(tmp_path):
    def trained(out, size, accumulate):
        net = nn.Linear(1, 1)
        nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        loader = DataLoader(Points(24, 0.0), size)
        Loop(net, optimizer, out=out, epochs=2, accumulate=accumulate, device="cpu").run(loader, step)
        return net.weight

    torch.testing.assert_close(trained(tmp_path / "a", 8, 1), trained(tmp_path / "b", 4, 2))


def test_scheduler_by_epoch_and_bfloat16(tmp_path):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1**epoch)
    seen = []

    def inner(module, batch):
        seen.append((optimizer.param_groups[0]["lr"], module(batch[0]).dtype))
        return step(module, batch)

    made = Loop(
        net, optimizer, scheduler=scheduler, interval="epoch", out=tmp_path, epochs=2, device="cpu",
        mixed_precision="bf16",
    )  # fmt: skip
    made.run(DataLoader(Points(8), 4), inner)
    assert [lr for lr, _ in seen] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    assert all(p.dtype is torch.float32 for p in net.parameters())


class Stops(torch.optim.lr_scheduler.LambdaLR):
    """A scheduler during whose step the run is cut off, where it is told so."""

    stop = False

    def step(self, *words):
        if Stops.stop:
            raise KeyboardInterrupt
        super().step(*words)


def test_resuming_between_the_last_step_and_the_end_of_its_epoch_says_nothing(tmp_path, monkeypatch):
    def loop(**more):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), 1.0)
        made = Stops(optimizer, lambda epoch: 0.1**epoch)
        options = {"interval": "epoch", "out": tmp_path, "epochs": 1, "device": "cpu", "save_every": 1}
        return Loop(net, optimizer, scheduler=made, **options, **more), optimizer

    first, _ = loop()
    monkeypatch.setattr(Stops, "stop", True)
    with pytest.raises(KeyboardInterrupt):
        first.run(DataLoader(Points(8), 4), step)
    monkeypatch.setattr(Stops, "stop", False)
    second, optimizer = loop(resume=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Detected call of")
        found = second.run(DataLoader(Points(8), 4), step)
    assert (found.steps, found.epochs) == (2, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_bad_settings(tmp_path):
    for options, words in (
        ({"steps": 3, "epochs": 3}, "exactly one"),
        ({"steps": None}, "exactly one"),
        ({"steps": 0}, "steps is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"mixed_precision": "fp8"}, "'fp8'"),
        ({"mixed_precision": "fp16"}, "needs CUDA"),
    ):
        with pytest.raises(ConfigError, match=words):
            loop(tmp_path, model(), **options)
    with pytest.raises(InputError, match="no batch"):
        loop(tmp_path, model()).run([], step)
    with pytest.raises(FusionError, match="diverged"):
        loop(tmp_path, model()).run(data(), lambda net, batch: {"loss": step(net, batch)["loss"] * torch.nan})


def test_another_run_is_not_overwritten_and_not_continued(tmp_path):
    loop(tmp_path, model(), steps=2).run(data(), step)
    with pytest.raises(InputError, match="holds a run"):
        loop(tmp_path, model())
    with pytest.raises(InputError, match="another run"):
        loop(tmp_path, nn.Linear(1, 1), resume=True)
    (tmp_path / "last.pt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        loop(tmp_path, model(), resume=True)
    loop(tmp_path, model(), overwrite=True, steps=2).run(data(), step)


@pytest.fixture
def heeded():
    """Ctrl-C raises, although background jobs inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_finishes_the_step_and_saves(heeded, tmp_path):
    finished = []

    def interrupted(net, batch):
        if not finished:
            signal.raise_signal(signal.SIGINT)
        finished.append(step(net, batch))
        return finished[-1]

    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path, model(), steps=10_000, save_every=10_000).run(data(), interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = loop(tmp_path, model(), resume=True, steps=10_000)
    assert resumed.at.step == 1
    assert len(finished) == 2  # the step takes two batches
    assert lines(tmp_path)[-1]["step"] == 1


def _distributed(rank, out):
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    seen = []

    def inner(module, batch):
        seen.extend(batch[0].flatten().tolist())
        return step(module, batch)

    loader = DataLoader(Points(16, 0.0), 4, shuffle=True)
    Loop(net, optimizer, out=out, epochs=2, device="cpu").run(loader, inner)
    return net.weight.detach(), seen


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    (first, seen_first), (second, seen_second) = spawn(_distributed, 2, str(tmp_path / "two"))
    assert torch.equal(first, second)
    half = Points(16, 0.0).x.flatten().tolist()
    for epoch in range(2):
        part = slice(8 * epoch, 8 * epoch + 8)
        assert sorted(seen_first[part] + seen_second[part]) == pytest.approx(half)
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    rows = {round(v, 5): i for i, v in enumerate(half)}
    batches = [seen_first[i : i + 4] + seen_second[i : i + 4] for i in range(0, 16, 4)]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    points = Points(16, 0.0)
    for batch in batches:
        x = torch.stack([points[rows[round(v, 5)]][0] for v in batch])
        step(net, (x, 3 * x + 1))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(first, net.weight.detach())


def _fails(rank):
    if rank == 1:
        raise ValueError("rank one is ill")
    torch.distributed.barrier()


@pytest.mark.slow
def test_a_failing_process_is_told():
    with pytest.raises(RuntimeError, match="rank one is ill"):
        spawn(_fails, 2)


def test_iterables_and_nested_batches(tmp_path):
    net = model()
    batches = [{"points": (x, y), "name": "kept"} for x, y in DataLoader(Points(8), 4)]
    names = []

    def inner(module, batch):
        names.append(batch["name"])
        return step(module, batch["points"])

    result = loop(tmp_path, net, steps=3, accumulate=1).run(batches, inner)
    assert (result.steps, names) == (3, ["kept"] * 3)
    assert np.isfinite(result.metrics["loss"])

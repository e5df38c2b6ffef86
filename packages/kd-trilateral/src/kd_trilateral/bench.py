"""Paired benchmarks: whole cycles of bilevel steps against as many plain distillation steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.bench import Bench, Row, memory_row, paired
from fusion_core.device import resolve_device
from fusion_core.errors import ConfigError
from kd_trilateral.bilevel import Bilevel
from kd_trilateral.engines import ENGINES, Engine
from kd_trilateral.module import TrilateralKD

CLASSES = 100
TEMPERATURE = 4.0


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.grown = stride, width - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        # The shortcut without parameters of the CIFAR networks: every other pixel, zeros for new channels.
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + (F.pad(x, (0, 0, 0, 0, 0, self.grown)) if self.grown else x))


class ResNet20(nn.Module):
    """The CIFAR network of 20 layers (He et al. 2016, section 4.2): 0.27 million parameters.

    Example:
        >>> ResNet20()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        widths = [(16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)]
        widths += [(32, 64, 2), (64, 64, 1), (64, 64, 1)]
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*(_Block(*sizes) for sizes in widths))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of images ``(batch, 3, height, width)``."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def mlp() -> nn.Module:
    """The perceptron 512-1024-1024-100."""
    return nn.Sequential(
        nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, CLASSES)
    )


@dataclass(frozen=True)
class Case:
    """A student, the shape of one of its inputs, and the batch size (also of the held-out batches)."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


CASES = {
    "resnet": Case("ResNet-20", ResNet20, (3, 32, 32), 64),
    "mlp": Case("MLP", mlp, (512,), 256),
}


@dataclass(frozen=True)
class Setting:
    """One row: the engine and its options, the cost that the target allows, and what it is measured against.

    ``held_out`` is the share of the batch size that a held-out batch has.
    """

    engine: Engine
    every: int = 1
    subsample: float = 1.0
    held_out: float = 1.0
    target: str | None = None
    words: str = ""
    against: str = "kd"

    @property
    def label(self) -> str:
        """Engine, cadence and shares."""
        parts = [self.engine, f"every={self.every}"]
        parts += [f"subsample={self.subsample}"] if self.subsample < 1.0 else []
        parts += [f"held-out batch B*{self.held_out}"] if self.held_out < 1.0 else []
        return " ".join(parts)


SETTINGS = (
    Setting("frozen", 0),
    Setting("jvp", 8, target=">= 0.74", words="at most 1.35x a plain step"),
    Setting(
        "fd1",
        4,
        0.5,
        0.5,
        target=">= 0.77",
        words="at most 1.3x a plain step; the economical setting, with held-out batches of B/2",
    ),
    Setting("fd1", 4, 0.5),
    Setting("head", 4, target=">= 0.87", words="at most 1.15x a plain step"),
    Setting("fd1", target=">= 1.82", words="at most 0.55x the time of unrolled", against="unrolled"),
    Setting("jvp", 4, words="the default"),
    *(Setting(engine) for engine in ("jvp", "fd", "fd1", "head", "unrolled")),
)


@dataclass
class _Parts:
    student: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[tuple[Tensor, Tensor, Tensor]]


def _parts(case: Case, device: str) -> _Parts:
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = case.build().to(device)
    batches: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(2):
        x = torch.randn(case.batch, *case.shape, generator=draw)
        y = torch.randint(CLASSES, (case.batch,), generator=draw)
        zt = 3.0 * torch.randn(case.batch, CLASSES, generator=draw)
        batches.append((x.to(device), zt.to(device), y.to(device)))
    return _Parts(student, torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9), batches)


def plain(case: Case, steps: int, device: str = "cpu") -> Callable[[], None]:
    """``steps`` steps of distillation as one would write it: a fixed ratio of 0.5, cached teacher logits."""
    parts = _parts(case, device)

    def run() -> None:
        for i in range(steps):
            x, zt, y = parts.batches[i % 2]
            z = parts.student(x)
            q = F.softmax(zt / TEMPERATURE, dim=-1)
            kl = F.kl_div(F.log_softmax(z / TEMPERATURE, dim=-1), q, reduction="batchmean") * TEMPERATURE**2
            loss = 0.5 * kl + 0.5 * F.cross_entropy(z, y)
            parts.optimizer.zero_grad()
            loss.backward()
            parts.optimizer.step()

    return run


def bilevel(case: Case, setting: Setting, device: str = "cpu") -> Callable[[], None]:
    """One cycle: ``every`` student steps, one of which is followed by an outer step."""
    parts = _parts(case, device)
    ratio: dict[str, Any] = {"ratio": "const"} if setting.engine == "frozen" else {}
    loss = TrilateralKD(CLASSES, temperature=TEMPERATURE, seed=0, **ratio).to(device)
    rows = round(case.batch * setting.held_out)
    held_out = [(x[:rows].clone(), y[:rows]) for x, _, y in parts.batches]
    for _, zt, y in parts.batches[:1]:
        loss.fit_class_mean(zt, y)
    engine = Bilevel(
        parts.student,
        loss,
        parts.optimizer,
        held_out,
        hypergradient=setting.engine,
        every=setting.every,
        subsample=setting.subsample,
    )

    def run() -> None:
        for i in range(max(setting.every, 1)):
            x, zt, y = parts.batches[i % 2]
            out = loss(parts.student(x), zt, y)
            parts.optimizer.zero_grad()
            out.loss.backward()
            engine.step(x, out)

    return run


def _timed(case: Case, setting: Setting, repeats: int, device: str) -> Row:
    with_target = case is CASES["resnet"]
    steps = max(setting.every, 1)
    name = f"{case.name} {setting.label}"
    if setting.against == "kd":
        reference, against = plain(case, steps, device), f"{steps} plain KD steps"
    else:
        reference = bilevel(case, Setting(cast(Engine, setting.against)), device)
        against = f"{setting.against} every=1"
        name += f" against {setting.against}"
    return paired(
        name,
        bilevel(case, setting, device),
        reference,
        repeats=repeats,
        target=setting.target if with_target else None,
        device=device,
        dtype="float32",
        against=against,
        note=setting.words if with_target or not setting.target else "",
    )


def live_peak(make: Callable[[], Callable[[], None]], device: str = "cpu") -> int:
    """The most bytes of tensors alive at once while a cycle is built and run twice.

    On the CPU every allocation and release that torch's profiler records is added up, on CUDA the allocator
    keeps count; both are exact and leave out what is no tensor (code, threads' stacks, caches of kernels).
    """
    if device.startswith("cuda"):
        from fusion_core.bench import peak_memory

        return peak_memory(partial(_twice, make), device)
    profiler = torch.profiler
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        _twice(make)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = [e for e in trace["traceEvents"] if e.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += int(event["args"]["Bytes"])
        peak = max(peak, live)
    return peak


def _twice(make: Callable[[], Callable[[], None]]) -> None:
    cycle = make()
    cycle()
    cycle()


def _memory(case: Case, engine: Engine, target: str | None, device: str) -> Row:
    kd = live_peak(partial(plain, case, 1, device), device)
    ours = live_peak(partial(bilevel, case, Setting(engine), device), device)
    theta = sum(p.numel() * p.element_size() for p in case.build().parameters())
    how = "CUDA allocator" if device.startswith("cuda") else "torch profiler"
    return memory_row(
        f"{case.name} {engine} every=1 peak memory",
        ours,
        round(1.1 * kd + 2 * theta),
        target=target,
        device=device,
        against="1.1x plain KD + 2 copies of theta",
        note=f"live tensors ({how}) from building to the second cycle; plain KD alone {kd / 2**20:.1f} MiB, "
        f"theta {theta / 2**20:.1f} MiB",
    )


def run(student: str = "all", engines: str | None = None, *, repeats: int = 5, device: str = "cpu") -> Bench:
    """Time whole cycles of ours and of plain distillation in turn.

    Args:
        student: ``"resnet"`` (ResNet-20, batches of 64), ``"mlp"`` (512-1024-1024-100, batches of 256) or
            ``"all"``.
        engines: hypergradients to measure, by commas; None = all that have a row.
        repeats: pairs per row.
        device: where to run.

    Returns:
        The rows; a ratio is the plain steps' time over ours, so 0.74 means 1.35x a plain step.

    Raises:
        ConfigError: unknown student or engine.
    """
    if student not in (*CASES, "all"):
        raise ConfigError(f"student is {student!r}, wanted one of {(*CASES, 'all')}")
    chosen = ENGINES if engines is None else [word.strip() for word in engines.split(",") if word.strip()]
    unknown = sorted(set(chosen) - set(ENGINES))
    if unknown:
        raise ConfigError(f"engines holds {unknown}, wanted some of {ENGINES}")
    place = str(resolve_device(device))
    bench = Bench("kd-trilateral")
    for name, case in CASES.items():
        if student not in (name, "all"):
            continue
        for setting in SETTINGS:
            if setting.engine in chosen:
                bench.add(_timed(case, setting, repeats, place))
        for engine in cast("tuple[Engine, ...]", ("jvp", "fd1", "unrolled")):
            if engine in chosen:
                wanted = ">= 1" if name == "resnet" and engine != "unrolled" else None
                bench.add(_memory(case, engine, wanted, place))
    return bench

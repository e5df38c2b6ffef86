"""Paired benchmarks: ours and a reference in turn, in one process, so that a busy machine slows both."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib
import multiprocessing
import os
import pickle
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion_core.atomic import atomic_write
from fusion_core.demo import package_version
from fusion_core.errors import ConfigError, FusionError, InputError
from fusion_core.results import dump_json

_LEAST_SECONDS = 2e-3  # short calls are repeated until one measurement takes this long
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a benchmark; ``ratio`` is the reference's cost over ours, so more than 1 is a win."""

    name: str
    ratio: float
    device: str = "cpu"
    threads: int = 1
    dtype: str = ""
    ours_s: float | None = None
    reference_s: float | None = None
    reference: str = ""
    ratio_low: float | None = None
    ratio_high: float | None = None
    repeats: int = 1
    ours_peak_bytes: int | None = None
    reference_peak_bytes: int | None = None
    target: str | None = None
    met: bool | None = None
    note: str = ""


def paired(
    name: str,
    ours: Callable[[], object],
    reference: Callable[[], object],
    *,
    repeats: int = 7,
    warmup: int = 1,
    target: str | None = None,
    device: str = "cpu",
    dtype: str = "",
    against: str = "",
    note: str = "",
) -> Row:
    """Time two functions in turn, in alternating order, on the same number of threads.

    Args:
        name: of the row.
        ours: no arguments.
        reference: what ours is compared with.
        repeats: pairs that are timed.
        warmup: calls of each before.
        target: such as ``">= 3"``, compared with the ratio.
        device: waited for before the clock is read.
        dtype: for the record.
        against: what the reference is, for the record; its function's name by default.
        note: for the record.

    Returns:
        Medians in seconds per call, their ratio and its 95 % bootstrap interval over the pairs.

    Raises:
        ConfigError: fewer than one repeat, or a target that is no comparison with a number.

    Example:
        >>> row = paired("sum", lambda: sum(range(10)), lambda: sum(range(1000)), repeats=3, target="> 1")
        >>> row.met
        True
    """
    import torch

    from fusion_core.device import resolve_device, synchronize

    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, wanted at least 1")
    check_target(1.0, target)
    place = resolve_device(device)

    def clock(function: Callable[[], object], calls: int) -> float:
        synchronize(place)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(place)
        return (time.perf_counter() - start) / calls

    both = (ours, reference)
    for _ in range(warmup):
        for function in both:
            function()
    calls = [max(1, round(_LEAST_SECONDS / max(clock(function, 1), 1e-9))) for function in both]
    pairs: list[tuple[float, float]] = []
    for turn in range(repeats):
        took = [0.0, 0.0]
        for which in ((0, 1), (1, 0))[turn % 2]:
            took[which] = clock(both[which], calls[which])
        pairs.append((took[0], took[1]))
    ratio, low, high = _ratio(pairs)
    return Row(
        name=name,
        ratio=ratio,
        device=str(place),
        threads=torch.get_num_threads(),
        dtype=dtype,
        ours_s=statistics.median(pair[0] for pair in pairs),
        reference_s=statistics.median(pair[1] for pair in pairs),
        reference=against or getattr(reference, "__name__", "reference"),
        ratio_low=low,
        ratio_high=high,
        repeats=repeats,
        target=target,
        met=check_target(ratio, target),
        note=note,
    )


def _ratio(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    def ratio(sample: list[tuple[float, float]]) -> float:
        return statistics.median(b for _, b in sample) / statistics.median(a for a, _ in sample)

    draw = random.Random(0)  # noqa: S311 - resampling, no secret
    drawn = sorted(ratio(draw.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    return ratio(pairs), drawn[round(0.025 * _RESAMPLES)], drawn[round(0.975 * _RESAMPLES) - 1]


def memory_row(
    name: str,
    ours_peak_bytes: int,
    reference_peak_bytes: int,
    *,
    target: str | None = None,
    device: str = "cpu",
    against: str = "reference",
    note: str = "",
) -> Row:
    """A row of two :func:`peak_memory` results in bytes; its ratio is the reference's over ours.

    Example:
        >>> memory_row("stream", 100, 400, target=">= 3").ratio
        4.0
    """
    ratio = reference_peak_bytes / max(ours_peak_bytes, 1)
    return Row(
        name=name,
        ratio=ratio,
        device=device,
        reference=against,
        ours_peak_bytes=ours_peak_bytes,
        reference_peak_bytes=reference_peak_bytes,
        target=target,
        met=check_target(ratio, target),
        note=note,
    )


def check_target(ratio: float, target: str | None) -> bool | None:
    """Whether a ratio meets a target such as ``">= 3"``; None without one.

    Raises:
        ConfigError: the target is no comparison with a number.

    Example:
        >>> check_target(0.8, ">= 0.77")
        True
    """
    if target is None:
        return None
    parts = re.fullmatch(r"\s*(>=|<=|>|<)\s*(\d+(?:\.\d+)?)\s*", target)
    if parts is None:
        raise ConfigError(f"target is {target!r}, wanted a comparison such as '>= 3'")
    bound = float(parts[2])
    return {">=": ratio >= bound, "<=": ratio <= bound, ">": ratio > bound, "<": ratio < bound}[parts[1]]


def peak_memory(fn: Callable[[], object] | str, device: str = "cpu") -> int:
    """The most memory that a call takes on top of what was there before it, in bytes.

    Args:
        fn: takes no arguments. On the CPU it runs in a fresh process, so it is a function of a module (or
            ``"module:function"``), and what it imports counts too.
        device: a CUDA device measures the allocator of this process instead.

    Raises:
        InputError: ``fn`` cannot be sent to another process, or this system (Windows) does not tell.
        FusionError: the process died.
    """
    if device.startswith("cuda"):
        return _cuda_peak(_function(fn), device)
    if sys.platform == "win32":
        raise InputError("peak_memory on the CPU needs Linux or macOS")
    try:
        pickle.dumps(fn)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(f"fn is {fn!r}, wanted a function of a module, or 'module:function'") from error
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_cpu_peak, fn).result()
        except BrokenProcessPool as error:
            raise FusionError(f"the process that measured {fn!r} died") from error


def _function(fn: Callable[[], object] | str) -> Callable[[], object]:
    if not isinstance(fn, str):
        return fn
    module, _, name = fn.partition(":")
    return getattr(importlib.import_module(module), name)


def _cpu_peak(fn: Callable[[], object] | str) -> int:
    function = _function(fn)
    before = _high_water(reset=True)
    function()
    return max(_high_water() - before, 0)


def _high_water(*, reset: bool = False) -> int:
    """The process's highest resident memory in bytes, since the last reset where the system can do that."""
    if sys.platform.startswith("linux"):
        if reset:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cuda_peak(function: Callable[[], object], device: str) -> int:
    import torch

    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Bench:
    """The rows of one package's benchmarks.

    Args:
        package: the distribution.

    Example:
        >>> bench = Bench("fusion-core")
        >>> bench.add(memory_row("stream", 100, 400))
        >>> bench.to_dict()["rows"][0]["ratio"]
        4.0
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Add a row."""
        self.rows.append(row)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, schema ``fusion.bench/1``."""
        from fusion_core.device import environment

        return {
            "schema": "fusion.bench/1",
            "package": self.package,
            "version": package_version(self.package),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "rows": [asdict(row) for row in self.rows],
        }

    def print(self) -> None:
        """Print the table: cost of both, ratio with its interval, target and whether it was met."""
        from fusion_core.report import print_rows

        print_rows([_printed(row) for row in self.rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON document; it appears whole or not at all."""
        with atomic_write(path, "w") as file:
            file.write(dump_json(self))


def _printed(row: Row) -> dict[str, str]:
    timed = row.ours_s is not None
    ours, theirs = (row.ours_s, row.reference_s) if timed else (row.ours_peak_bytes, row.reference_peak_bytes)
    spread = (
        ""
        if row.ratio_low is None or row.ratio_high is None
        else f" [{row.ratio_low:.2f}, {row.ratio_high:.2f}]"
    )
    return {
        "name": row.name,
        "device": row.device,
        "ours": _cost(ours, timed),
        "reference": f"{_cost(theirs, timed)} ({row.reference})",
        "ratio": f"{row.ratio:.2f}{spread}",
        "target": row.target or "-",
        "met": {True: "met", False: "missed", None: "-"}[row.met],
        "note": row.note,
    }


def _cost(value: float | None, timed: bool) -> str:
    if value is None:
        return "-"
    if not timed:
        return f"{value / 2**20:.1f} MiB"
    return (
        f"{value:.3g} s"
        if value >= 1
        else f"{value * 1e3:.3g} ms"
        if value >= 1e-3
        else f"{value * 1e6:.3g} µs"
    )

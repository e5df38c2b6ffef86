"""The parts of ``estimate`` that need no network: options, clock, columns of batches, provenance."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import ConfigError, InputError
from mantis_photoz.corrections import parts_of
from mantis_photoz.cutouts import CutoutBatch, FitsDirectory
from mantis_photoz.flags import Flag
from mantis_photoz.nans import NanPolicy

Tta = Literal["none", "d4", "official"] | int
Grid = Literal["training", "official-infer"]
KEPT = ("pmf", "present", "nan_fraction", "flags", "notes", "ood", "z_spread")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to estimate; see :meth:`PhotoZ.estimate`. ``features`` asks for those of one source, for a fit."""

    tta: Tta = "none"
    batch_size: int = 64
    nan: NanPolicy = "inpaint"
    official: bool = False
    seed: int = 0
    features: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}, wanted at least 1")
        given: Any = self.tta
        many = isinstance(given, int) and not isinstance(given, bool) and given > 0
        if not many and given not in ("none", "d4", "official"):
            raise ConfigError(f"tta is {self.tta!r}, wanted 'none', 'd4', 'official' or a number of views")


@dataclass(slots=True)
class Clock:
    """Seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, stage: str, start: float) -> float:
        """Count the time since ``start`` for a stage; the time now."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - start
        return now

    def merge(self, other: Clock) -> None:
        """Count another clock's seconds too."""
        for stage, seconds in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch after steps 5 to 7.

    Args:
        planes: survey -> flux without gaps, on the CPU.
        images: survey -> the view, or the scaled planes where views are still to be drawn.
    """

    planes: dict[str, Tensor]
    images: dict[str, Tensor]


def maps_of(recalibration: Any) -> list[Any]:
    """The maps of a recalibration; none where it is None."""
    return [] if recalibration is None else parts_of(recalibration)


def plain_maps(recalibration: Any) -> Any:
    """The maps of a recalibration as plain values, for a fingerprint."""
    return [{"kind": part.kind, **part.to_dict()} for part in maps_of(recalibration)]


def take_checksums(source: Any) -> dict[str, str]:
    """The checksums of files read since the last call."""
    if not isinstance(source, FitsDirectory):
        path = getattr(source, "path", None)
        return {} if path is None or not hasattr(source, "checksum") else {Path(path).name: source.checksum}
    found: dict[str, str] = {}
    while source.checksums:
        found.update([source.checksums.popitem()])
    return found


def restricted(batch: CutoutBatch, only: NDArray[np.bool_]) -> CutoutBatch:
    """The batch with some surveys taken away."""
    if only.all():
        return batch
    present = batch.present & torch.from_numpy(only)
    planes = {
        name: images if keep else torch.zeros_like(images)
        for (name, images), keep in zip(batch.planes.items(), only, strict=True)
    }
    gone = ~present.any(-1).numpy()
    flags = batch.flags | int(Flag.MISSING_SURVEY) | np.where(gone, int(Flag.NO_IMAGES), 0)
    return replace(batch, planes=planes, present=present, flags=flags)


def joined(parts: list[dict[str, NDArray[Any]]], bins: int, surveys: int) -> dict[str, NDArray[Any]]:
    """The columns of all batches one after the other; empty ones where there is no batch."""
    if parts:
        return {name: np.concatenate([part[name] for part in parts]) for name in KEPT if name in parts[0]}
    return {
        "pmf": np.zeros((0, bins)),
        "present": np.zeros((0, surveys), bool),
        "nan_fraction": np.zeros((0, surveys), np.float32),
        "flags": np.zeros(0, np.int64),
        "notes": np.zeros(0, "U1"),
        "ood": np.zeros(0),
    }


def chosen(names: Sequence[str], surveys: Iterable[str] | None) -> NDArray[np.bool_]:
    """Which of a model's surveys take part.

    Raises:
        InputError: none, or one that the model does not have.
    """
    wanted = list(names) if surveys is None else list(surveys)
    if unknown := [name for name in wanted if name not in names]:
        raise InputError(f"surveys {unknown} are not of the model, which has {', '.join(names)}")
    if not wanted:
        raise InputError(f"surveys is empty, wanted some of {', '.join(names)}")
    return np.array([name in wanted for name in names])

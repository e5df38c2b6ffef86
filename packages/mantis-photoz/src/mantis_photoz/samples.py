"""Cutouts in memory, and the one form of a batch that training and evaluation take from any source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import DataError, ShapeError, check_range
from mantis_photoz.config import FusionConfig

Rows = Sequence[int] | NDArray[Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Objects on one device, before scaling.

    Args:
        images: survey -> (batch, bands, pixels, pixels) flux; NaN where there is no pixel.
        ebv: (batch, 2) E(B-V) of CSFD and Planck.
        present: (batch, surveys) which surveys an object has.
        wcs: survey -> (batch, 8) coordinates (:meth:`mantis_photoz.wcs.Tan.row`); empty where none are known.
        z: (batch,) redshifts, NaN where unknown.
    """

    images: dict[str, Tensor]
    ebv: Tensor
    present: Tensor
    wcs: dict[str, Tensor]
    z: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        move = lambda parts: {name: value.to(device, non_blocking=True) for name, value in parts.items()}
        ebv, present, z = (value.to(device, non_blocking=True) for value in (self.ebv, self.present, self.z))
        return Batch(move(self.images), ebv, present, move(self.wcs), z)


@dataclass(frozen=True, slots=True)
class CutoutArrays:
    """Cutouts with redshifts, all in memory.

    Args:
        images: survey -> (n, bands, pixels, pixels) float32 flux.
        ebv: (n, 2) E(B-V) of CSFD and Planck.
        z: (n,) redshifts.
        present: (n, surveys) bool in the order of ``images``; None = all.
        ids: of the objects; their numbers by default.
        wcs: survey -> (n, 8) coordinates, or empty.

    Raises:
        ShapeError: another number of objects.

    Example:
        >>> arrays = CutoutArrays({"ps1": torch.zeros(2, 5, 8, 8)}, torch.zeros(2, 2), torch.ones(2))
        >>> len(arrays), arrays.batch([1]).images["ps1"].shape
        (2, torch.Size([1, 5, 8, 8]))
    """

    images: dict[str, Tensor]
    ebv: Tensor
    z: Tensor
    present: Any = None
    ids: tuple[str, ...] = ()
    wcs: Any = None

    def __post_init__(self) -> None:
        count = len(self.z)
        shapes = {name: tuple(planes.shape) for name, planes in self.images.items()}
        if not shapes or any(len(s) != 4 or s[0] != count for s in shapes.values()):
            raise ShapeError(
                f"images have shapes {shapes}, wanted ({count}, bands, height, width) of each survey"
            )
        present: Any = self.present
        if present is None:
            present = torch.ones(count, len(shapes), dtype=torch.bool)
            object.__setattr__(self, "present", present)
        if tuple(self.ebv.shape) != (count, 2) or tuple(present.shape) != (count, len(shapes)):
            raise ShapeError(
                f"ebv has shape {tuple(self.ebv.shape)} and present {tuple(present.shape)}, wanted "
                f"({count}, 2) and ({count}, {len(shapes)})"
            )
        if not self.ids:
            object.__setattr__(self, "ids", tuple(map(str, range(count))))
        if self.wcs is None:
            object.__setattr__(self, "wcs", dict[str, Tensor]())

    def __len__(self) -> int:
        return len(self.z)

    @property
    def surveys(self) -> tuple[str, ...]:
        """The surveys in the order of ``present``."""
        return tuple(self.images)

    def take(self, rows: Rows | slice) -> CutoutArrays:
        """Some of the objects."""
        index = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64)
        at = torch.from_numpy(index)
        images = {name: planes[at] for name, planes in self.images.items()}
        ids = tuple(self.ids[i] for i in index)
        wcs = {name: system[at] for name, system in self.wcs.items()}
        return CutoutArrays(images, self.ebv[at], self.z[at], self.present[at], ids, wcs)

    def batch(self, rows: Rows) -> Batch:
        """Some objects as a batch."""
        at = torch.as_tensor(np.asarray(rows, np.int64))
        return Batch(
            {name: planes[at] for name, planes in self.images.items()},
            self.ebv[at],
            self.present[at],
            {name: system[at] for name, system in self.wcs.items()},
            self.z[at],
        )


def redshifts(samples: Any) -> NDArray[np.float64]:
    """The true redshifts of cutouts, in memory or in files.

    Raises:
        DataError: none are known, or one is not finite.
    """
    found = getattr(samples, "z", None)
    if found is None:
        raise DataError("the cutouts have no redshifts; give the catalogue a column z_spec, or truth=NAME")
    values = np.asarray(found, np.float64)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise DataError(f"redshift {row} is {values[row]}, wanted finite numbers")
    return values


def batch_of(samples: Any, rows: Rows, config: FusionConfig) -> Batch:
    """Some objects of any source, its surveys in the order of the network's.

    Args:
        samples: :class:`CutoutArrays`, :class:`mantis_photoz.cutouts.Cutouts` or anything with
            ``batch(rows)``.
        rows: which.
        config: of the network.

    Raises:
        DataError: the source lacks a survey of the network.
    """
    found: Any = samples.batch(rows)
    images: Mapping[str, Tensor] = getattr(found, "images", None) or found.planes
    names = list(images)
    if lacking := [name for name in config.surveys if name not in names]:
        raise DataError(f"the cutouts have surveys {names}, the network also wants {lacking}")
    order = [names.index(name) for name in config.surveys]
    z = getattr(found, "z", None)
    if z is None:
        known = getattr(samples, "z", None)
        z = (
            np.full(len(found.ebv), np.nan)
            if known is None
            else np.asarray(known)[np.asarray(rows, np.int64)]
        )
    return Batch(
        {name: images[name] for name in config.surveys},
        found.ebv,
        found.present[:, order],
        {name: found.wcs[name] for name in config.surveys if name in found.wcs},
        torch.as_tensor(np.asarray(z)),
    )


def blocks(count: int, size: int) -> list[list[int]]:
    """Row numbers in blocks of at most ``size``.

    Raises:
        ConfigError: ``size`` below 1.

    Example:
        >>> blocks(5, 2)
        [[0, 1], [2, 3], [4]]
    """
    check_range("batch_size", size, 1, float("inf"))
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]

"""How often an object is drawn in training (section 2.6): weights per object, and a sampler of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from fusion_core.errors import check_range
from fusion_core.seeding import generator as seeded
from mantis_photoz.arrays import Array, as_tensor, either_kind, wide
from mantis_photoz.errors import ConfigError, DataError

__all__ = ["SAMPLERS", "WeightedSampler", "cell_labels", "class_weights", "sampler_weights"]

SamplerName = Literal["balanced", "natural", "sqrt", "colour-z"]
SAMPLERS: tuple[str, ...] = ("balanced", "natural", "sqrt", "colour-z")


def class_weights(labels: Array, *, power: float = 1.0, floor: int = 1) -> Any:
    """``1 / max(objects in the class, floor) ** power``, normalised to sum 1.

    Args:
        labels: (n,) int64 classes.
        power: 1 makes every class as frequent as any other, 0 leaves the catalogue's frequencies.
        floor: classes with fewer objects count as if they had this many.

    Returns:
        (n,) float64 weights, the same kind.

    Raises:
        DataError: no objects, or labels that are no classes.

    Example:
        >>> class_weights(np.array([0, 0, 1]))
        array([0.25, 0.25, 0.5 ])
    """
    check_range("power", power, 0.0, 4.0)
    check_range("floor", floor, 1, 10**9)

    def found(y: Tensor) -> Tensor:
        if y.ndim != 1 or not len(y) or y.is_floating_point() or int(y.min()) < 0:
            raise DataError(
                f"labels have shape {tuple(y.shape)} and dtype {y.dtype}, wanted (n,) classes, n >= 1"
            )
        count = torch.bincount(y)[y].clamp(min=floor)
        weight = wide(count).pow(-power)
        return weight / weight.sum()

    return either_kind(found)(labels)


def cell_labels(*columns: Array, cells: int = 10) -> Tensor:
    """(n,) int64: the cell of each object in a grid of even quantiles of each column (redshift, colours).

    Raises:
        DataError: columns of different lengths, or not finite.
    """
    check_range("cells", cells, 1, 1000)
    values = [wide(as_tensor(column)) for column in columns]
    label = torch.zeros(len(values[0]), dtype=torch.int64)
    for column in values:
        if column.shape != label.shape or not bool(torch.isfinite(column).all()):
            raise DataError(f"columns have shape {tuple(column.shape)}, wanted finite ({len(label)},)")
        inner = torch.linspace(0, 1, cells + 1, dtype=column.dtype)[1:-1]
        limits = torch.from_numpy(np.quantile(column.cpu().numpy(), inner.numpy()))
        label = label * cells + torch.searchsorted(limits, column.cpu(), right=True)
    return label.unique(return_inverse=True)[1]


def sampler_weights(
    labels: Array, *, sampler: SamplerName = "balanced", colours: tuple[Array, ...] = (), floor: int = 5
) -> Any:
    """Weights of a named sampler.

    Args:
        labels: (n,) redshift classes.
        sampler: ``"balanced"`` (the paper: flat in redshift class), ``"natural"`` (the catalogue's),
            ``"sqrt"`` (half way), ``"colour-z"`` (flat over cells of redshift and colours).
        colours: of ``"colour-z"``: (n,) each, such as g - r and r - W1.
        floor: least count of a cell of ``"colour-z"``.

    Raises:
        ConfigError: unknown sampler, or ``"colour-z"`` without colours.
    """
    powers = {"balanced": 1.0, "natural": 0.0, "sqrt": 0.5}
    if sampler in powers:
        return class_weights(labels, power=powers[sampler])
    if sampler != "colour-z":
        raise ConfigError(f"sampler is {sampler!r}, wanted {', '.join(SAMPLERS)}")
    if not colours:
        raise ConfigError("sampler is 'colour-z' without colours, wanted colours=(g - r, r - w1)")
    cell = cell_labels(wide(as_tensor(labels)), *colours).to(as_tensor(labels).device)
    made = class_weights(cell, floor=floor)
    return made if isinstance(labels, Tensor) else made.cpu().numpy()


class WeightedSampler(Sampler[int]):
    """Rows drawn with replacement by weight; the epoch and the seed fix them, whatever was drawn before.

    Args:
        weights: (n,) >= 0.
        size: rows per epoch, n by default.
        seed: of the draws.
    """

    def __init__(self, weights: Array, size: int | None = None, *, seed: int = 0) -> None:
        self.weights = wide(as_tensor(weights, "weights")).cpu()
        if self.weights.ndim != 1 or not bool((self.weights >= 0).all()) or not bool(self.weights.sum() > 0):
            raise DataError(f"weights have shape {tuple(self.weights.shape)}, wanted (n,) numbers >= 0")
        self.size = len(self.weights) if size is None else size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        # By the inverse of the cumulative weight: multinomial stops at 2^24 categories.
        steps = self.weights.cumsum(0) / self.weights.sum()
        u = torch.rand(self.size, dtype=steps.dtype, generator=seeded(self.seed, "sampler", self.epoch))
        rows = torch.searchsorted(steps, u, right=True).clamp(max=len(steps) - 1)
        yield from rows.tolist()

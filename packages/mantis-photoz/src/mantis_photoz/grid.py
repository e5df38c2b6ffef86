"""Redshift grids (section 2.5): nodes, bin edges, and the class of a redshift."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fusion_core.errors import check_range
from mantis_photoz.arrays import Array, either_kind
from mantis_photoz.errors import ConfigError, DataError, DensityError

__all__ = ["bin_edges", "bin_widths", "grid_nodes", "nearest_node", "training_edges"]


def _check(classes: int, z_max: float) -> None:
    check_range("classes", classes, 2, 1_000_000)
    check_range("z_max", z_max, 0.0, float("inf"), open=True)


def grid_nodes(
    classes: int = 400, z_max: float = 1.6, *, grid: Literal["training", "official-infer"] = "training"
) -> Tensor:
    """The redshifts that the classes stand for.

    Args:
        classes: K.
        z_max: the first redshift above the grid.
        grid: ``"training"`` = k z_max / K; ``"official-infer"`` = the grid of the authors' inference code
            (bug B1): every estimate is K / (K - 1) times too large.

    Returns:
        (classes,) float32, as the authors store them.

    Example:
        >>> grid_nodes(400)[[0, 1, 399]].tolist() == torch.tensor([0.0, 0.004, 1.596]).tolist()
        True
    """
    _check(classes, z_max)
    if grid == "training":
        return torch.linspace(0.0, z_max, classes + 1, dtype=torch.float64)[:-1].float()
    if grid == "official-infer":
        return torch.linspace(0.0, z_max, classes, dtype=torch.float64).float()
    raise ConfigError(f"grid is {grid!r}, wanted 'training' or 'official-infer'")


def training_edges(classes: int = 400, z_max: float = 1.6) -> Tensor:
    """The edges of the bins whose centres are the training nodes: 0, w/2, 3w/2, ..., z_max - w/2.

    The first bin is half as wide; a redshift in [z_max - w/2, z_max) is of the last class and outside.

    Returns:
        (classes + 1,) float64.

    Example:
        >>> training_edges(4, 1.6).tolist()
        [0.0, 0.2, 0.6, 1.0, 1.4]
    """
    _check(classes, z_max)
    width = z_max / classes
    edges = (torch.arange(classes + 1, dtype=torch.float64) - 0.5) * width
    edges[0] = 0.0
    return edges.round(decimals=15)


def bin_edges(nodes: Array) -> Any:
    """Edges halfway between nodes; the first is the first node itself if that is 0.

    Args:
        nodes: (classes,) increasing.

    Returns:
        (classes + 1,) float64, the same kind.

    Raises:
        DensityError: fewer than two nodes, or they do not increase.
    """

    def found(g: Tensor) -> Tensor:
        g = g.double()
        if g.ndim != 1 or len(g) < 2 or not bool((g.diff() > 0).all()):
            raise DensityError(f"nodes have shape {tuple(g.shape)}, wanted two or more that increase")
        middle = (g[1:] + g[:-1]) / 2
        first = g[:1] if g[0] == 0 else 2 * g[:1] - middle[:1]
        return torch.cat([first, middle, 2 * g[-1:] - middle[-1:]])

    return either_kind(found)(nodes)


def bin_widths(edges: Tensor) -> Tensor:
    """(classes,) widths of bins."""
    return edges[1:] - edges[:-1]


def nearest_node(z: Array, nodes: Array) -> Any:
    """The class of a redshift: argmin_k |g_k - z|, the lower one on ties; no table of all differences.

    Args:
        z: (...) redshifts.
        nodes: (classes,) increasing.

    Returns:
        (...) int64, the same kind.

    Raises:
        DataError: a redshift is not finite.

    Example:
        >>> nearest_node(torch.tensor([0.0, 0.0019, 0.0021, 9.0]), grid_nodes(400)).tolist()
        [0, 0, 1, 399]
    """

    def found(value: Tensor, g: Tensor) -> Tensor:
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise DataError(f"z holds {bad} non-finite values of {value.numel()}, wanted redshifts")
        dtype = torch.promote_types(value.dtype, g.dtype)
        value, g = value.to(dtype), g.to(device=value.device, dtype=dtype)
        right = torch.searchsorted(g, value.contiguous()).clamp(1, len(g) - 1)
        left = right - 1
        return torch.where((g[left] - value).abs() <= (g[right] - value).abs(), left, right)

    return either_kind(found)(z, nodes)

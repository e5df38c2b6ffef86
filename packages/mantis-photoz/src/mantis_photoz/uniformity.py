"""Is the PIT uniform? Test statistics, quantiles and coverage of central intervals (section 2.8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mantis_photoz.arrays import Array, as_tensor, either_kind, quantile, wide
from mantis_photoz.errors import DataError

__all__ = [
    "COVERAGE_LEVELS",
    "anderson_darling",
    "coverage",
    "cramer_von_mises",
    "kolmogorov_smirnov",
    "kolmogorov_smirnov_p",
    "pit_outlier_rate",
    "qq",
]

COVERAGE_LEVELS = (0.5, 0.68, 0.9, 0.95)


def _sorted_pit(values: Array) -> Tensor:
    x = wide(as_tensor(values, "pit"))
    if x.ndim != 1 or not len(x) or not bool(((x >= 0) & (x <= 1)).all()):
        raise DataError(f"pit has shape {tuple(x.shape)}, wanted (n,) numbers in [0, 1], n >= 1")
    return x.sort().values


def _ranks(x: Tensor) -> Tensor:
    return torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)


@either_kind
def kolmogorov_smirnov(values: Array) -> Any:
    """Largest distance of the PIT's distribution from the uniform one.

    Example:
        >>> kolmogorov_smirnov(torch.tensor([0.25, 0.75])).item()
        0.25
    """
    x = _sorted_pit(values)
    n = len(x)
    return torch.maximum((_ranks(x) / n - x).max(), (x - (_ranks(x) - 1) / n).max())


def kolmogorov_smirnov_p(values: Array) -> float:
    """The p-value of :func:`kolmogorov_smirnov` (two-sided, exact for small n)."""
    from scipy import stats

    return float(stats.kstwo.sf(float(kolmogorov_smirnov(values)), len(as_tensor(values))))


@either_kind
def cramer_von_mises(values: Array) -> Any:
    """``1/(12 n) + sum_j (s_(j) - (2 j - 1)/(2 n))^2``."""
    x = _sorted_pit(values)
    n = len(x)
    return 1 / (12 * n) + (x - (2 * _ranks(x) - 1) / (2 * n)).square().sum()


@either_kind
def anderson_darling(values: Array, *, clip: float = 1e-12) -> Any:
    """``-n - mean_j (2 j - 1)(ln s_(j) + ln(1 - s_(n+1-j)))``, PITs clipped to [clip, 1 - clip]."""
    x = _sorted_pit(values).clamp(clip, 1 - clip)
    return -len(x) - ((2 * _ranks(x) - 1) * (x.log() + (1 - x.flip(0)).log())).mean()


@either_kind
def pit_outlier_rate(values: Array, *, edge: float = 1e-4) -> Any:
    """Share of PITs outside ``[edge, 1 - edge]``: truths in the far tails."""
    x = _sorted_pit(values)
    return ((x < edge) | (x > 1 - edge)).to(x.dtype).mean()


def qq(values: Array, points: int = 101) -> tuple[Any, Any]:
    """Even levels and the PIT's quantiles at them; a calibrated model lies on the diagonal."""

    def found(v: Tensor) -> tuple[Tensor, Tensor]:
        x = _sorted_pit(v)
        levels = torch.linspace(0, 1, points, dtype=x.dtype, device=x.device)
        return levels, quantile(x, levels)

    return either_kind(found)(values)


@either_kind
def coverage(values: Array, *, levels: Sequence[float] = COVERAGE_LEVELS) -> Any:
    """Share of PITs inside the central interval of each level.

    Args:
        values: (n,) PITs.
        levels: in (0, 1).

    Returns:
        (levels,) shares; equal to the levels for a calibrated model.
    """
    x = _sorted_pit(values)
    half = torch.tensor(list(levels), dtype=x.dtype, device=x.device)[:, None] / 2
    return ((x >= 0.5 - half) & (x <= 0.5 + half)).to(x.dtype).mean(-1)

"""Bootstrap intervals over images, all resamples at once."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import InputError, ShapeError
from fusion_core.seeding import rng
from fusion_core.stats import Interval, Paired

__all__ = ["bootstrap", "paired_bootstrap"]

Statistic = Literal["mean", "median"]


def _draws(
    values: NDArray[np.float64], statistic: Statistic, resamples: int, seed: int
) -> NDArray[np.float64]:
    chosen = rng(seed, "bootstrap").integers(0, len(values), (resamples, len(values)))
    drawn = values[chosen]
    return drawn.mean(1) if statistic == "mean" else np.median(drawn, axis=1)


def bootstrap(
    values: NDArray[np.float64], *, statistic: Statistic = "mean", resamples: int = 1000, seed: int = 0
) -> Interval:
    """A statistic of values with its 95 % percentile interval; NaN values are left out.

    Raises:
        InputError: no values.

    Example:
        >>> found = bootstrap(np.arange(10.0))
        >>> found.value, found.low < 4.5 < found.high
        (4.5, True)
    """
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    if not kept.size:
        raise InputError("values is empty, wanted at least one number")
    value = kept.mean() if statistic == "mean" else np.median(kept)
    low, high = np.quantile(_draws(kept, statistic, resamples, seed), (0.025, 0.975))
    return Interval(float(value), float(low), float(high))


def paired_bootstrap(
    a: NDArray[np.float64], b: NDArray[np.float64], *, resamples: int = 1000, seed: int = 0
) -> Paired:
    """Mean of ``a - b`` over the same images, its 95 % interval and a two-sided p; NaN pairs are left out.

    Raises:
        ShapeError: different lengths.
        InputError: no pairs.
    """
    if len(a) != len(b):
        raise ShapeError(f"a has {len(a)} values and b {len(b)}, wanted pairs")
    gap = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    gap = gap[~np.isnan(gap)]
    found = bootstrap(gap, resamples=resamples, seed=seed)
    drawn = _draws(gap, "mean", resamples, seed)
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    p = min(1.0, 2.0 * (min(below, above) + 1) / (resamples + 1))
    return Paired(found.value, found.low, found.high, p)

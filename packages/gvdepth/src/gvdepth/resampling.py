"""Bootstrap over images or frames, all resamples at once."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import ConfigError, InputError
from fusion_core.seeding import rng
from fusion_core.stats import Interval

__all__ = ["bootstrap", "resample_counts"]


def _indices(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}, wanted at least 1")
    return rng(seed, "bootstrap").integers(0, count, (resamples, count))


def resample_counts(count: int, resamples: int, seed: int = 0) -> NDArray[np.float64]:
    """How often each of ``count`` items is drawn in each resample, (resamples, count); rows sum to ``count``.

    Methods that share the counts are compared as pairs.

    Example:
        >>> resample_counts(5, 3).sum(1).tolist()
        [5.0, 5.0, 5.0]
    """
    drawn = _indices(count, resamples, seed) + count * np.arange(resamples)[:, None]
    found = np.bincount(drawn.ravel(), minlength=resamples * count)
    return found.reshape(resamples, count).astype(np.float64)


def bootstrap(
    values: NDArray[np.float64],
    *,
    statistic: Literal["mean", "median"] = "mean",
    resamples: int = 1000,
    seed: int = 0,
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
    drawn = kept[_indices(len(kept), resamples, seed)]
    if statistic == "mean":
        value, spread = kept.mean(), drawn.mean(1)
    else:
        value, spread = np.median(kept), np.median(drawn, axis=1)
    low, high = np.quantile(spread, (0.025, 0.975))
    return Interval(float(value), float(low), float(high))

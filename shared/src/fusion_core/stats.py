"""Means, spreads and paired tests in plain Python; the tests compare them with scipy.

A comparison over seeds is paired: both methods saw the same seeds, so the test looks at their differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from fusion_core.errors import InputError, ShapeError


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Paired:
    """A mean difference, its 95 % interval and the two-sided p; None where one pair allows neither."""

    difference: float
    low: float | None
    high: float | None
    p: float | None


def summary(values: Iterable[float]) -> tuple[float, float | None, Interval | None]:
    """Mean, sample standard deviation and the 95 % t interval of the mean.

    Args:
        values: one number per seed, at least one.

    Returns:
        ``(mean, std, interval)``; std (n - 1 in the denominator) and interval are None for a single value and
        for values that are not all finite, whose mean is NaN.

    Raises:
        InputError: no values.

    Example:
        >>> mean, std, interval = summary([0.90, 0.92, 0.94])
        >>> round(mean, 4), round(std, 4), round(interval.low, 4), round(interval.high, 4)
        (0.92, 0.02, 0.8703, 0.9697)
    """
    numbers = [float(value) for value in values]
    count = len(numbers)
    if not count:
        raise InputError("values is empty, wanted at least one number")
    if not all(map(math.isfinite, numbers)):
        return math.nan, None, None
    mean = math.fsum(numbers) / count
    if count == 1:
        return mean, None, None
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (count - 1))
    reach = _t_quantile(0.975, count - 1) * std / math.sqrt(count)
    return mean, std, Interval(mean, mean - reach, mean + reach)


def paired_t(a: Iterable[float], b: Iterable[float]) -> Paired:
    """Student's paired t test of ``a`` against ``b``.

    Args:
        a: one number per seed.
        b: the other method's numbers, same seeds, same order.

    Returns:
        The mean of ``a - b``, its 95 % interval and the two-sided p. Differences that are all equal give p 1
        if they are 0, else 0.

    Raises:
        ShapeError: different lengths.
        InputError: no pairs.

    Example:
        >>> result = paired_t([0.91, 0.93, 0.95], [0.90, 0.91, 0.92])
        >>> round(result.difference, 4), round(result.p, 4)
        (0.02, 0.0742)
    """
    left, right = list(a), list(b)
    if len(left) != len(right):
        raise ShapeError(f"a has {len(left)} values and b {len(right)}, wanted pairs")
    mean, std, interval = summary(x - y for x, y in zip(left, right, strict=True))
    if std is None or interval is None:
        return Paired(mean, None, None, None)
    if std == 0:
        return Paired(mean, mean, mean, float(mean == 0))
    df = len(left) - 1
    t = abs(mean) / (std / math.sqrt(df + 1))
    return Paired(mean, interval.low, interval.high, 1.0 - _t_inside(math.atan(t / math.sqrt(df)), df))


def _t_inside(angle: float, df: int) -> float:
    """P(|T| <= t) for integer ``df`` and ``angle`` = atan(t / sqrt(df)): Abramowitz and Stegun 26.7.3-4."""
    cosine_squared, odd = math.cos(angle) ** 2, df % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= cosine_squared * (k - 1) / k
    return min(2.0 / math.pi * (angle + total) if odd else total, 1.0)


@lru_cache(maxsize=256)
def _t_quantile(probability: float, df: int) -> float:
    """The t with P(T <= t) = probability >= 0.5, by bisection on the angle."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _t_inside(middle, df) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan((low + high) / 2)

"""Means, spreads and paired tests in plain Python; the tests compare them with scipy.

A comparison over seeds is paired: both methods saw the same seeds, so the test looks at their differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from fusion_core.errors import InputError, ShapeError, check_range


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


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Share ``k / n`` with Wilson's score interval (E. B. Wilson, 1927).

    Args:
        k: successes, in [0, n].
        n: trials, at least 0.
        level: of confidence, in (0, 1).

    Returns:
        The share and the interval, both in [0, 1]; without trials NaN and [0, 1].

    Raises:
        InputError: counts or level out of range.

    Example:
        >>> found = wilson(23, 33)
        >>> round(found.value, 4), round(found.low, 4), round(found.high, 4)
        (0.697, 0.5266, 0.8262)
    """
    if k != int(k) or n != int(n) or not 0 <= k <= n:
        raise InputError(f"k is {k!r} and n {n!r}, wanted whole numbers with 0 <= k <= n")
    check_range("level", level, 0.0, 1.0, open=True)
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, square = k / n, z * z / n
    middle = (share + square / 2) / (1 + square)
    reach = z / (1 + square) * math.sqrt(share * (1 - share) / n + square / (4 * n))
    return Interval(share, 0.0 if k == 0 else middle - reach, 1.0 if k == n else middle + reach)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: is one of two methods better on the same items?

    Args:
        only_a: items where only the first succeeds, at least 0.
        only_b: items where only the second succeeds.

    Returns:
        min(1, 2 P(X <= min(only_a, only_b))) for X binomial with share 1/2, without correction; 1 where they
        never differ.

    Raises:
        InputError: a count is negative or no whole number.

    Example:
        >>> mcnemar(8, 6), mcnemar(0, 4)
        (0.79052734375, 0.125)
    """
    if only_a != int(only_a) or only_b != int(only_b) or min(only_a, only_b) < 0:
        raise InputError(f"only_a is {only_a!r} and only_b {only_b!r}, wanted whole numbers >= 0")
    count, fewer = int(only_a) + int(only_b), int(min(only_a, only_b))
    term = total = 1
    for i in range(fewer):
        term = term * (count - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**count)


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

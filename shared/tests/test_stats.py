import math

import numpy as np
import pytest
from scipy import stats

from fusion_core.errors import InputError, ShapeError
from fusion_core.stats import Interval, mcnemar, paired_t, summary, wilson

SIZES = [2, 3, 4, 5, 8, 9, 31, 200, 5001]


@pytest.mark.parametrize("count", SIZES)
def test_summary_agrees_with_scipy(count):
    values = np.random.default_rng(count).normal(0.9, 0.02, count)
    mean, std, interval = summary(values)
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert std == pytest.approx(values.std(ddof=1), rel=1e-12)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9)
    assert interval.value == mean


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("shift", [0.0, 0.01, -0.3, 5.0])
def test_paired_t_agrees_with_scipy(count, shift):
    draw = np.random.default_rng(count)
    a, b = draw.normal(shift, 1, count), draw.normal(0, 1, count)
    ours, wanted = paired_t(a, b), stats.ttest_rel(a, b)
    assert ours.p == pytest.approx(wanted.pvalue, abs=1e-9)
    assert 0 <= ours.p <= 1
    assert ours.difference == pytest.approx((a - b).mean(), rel=1e-9, abs=1e-12)
    ends = wanted.confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((ends.low, ends.high), rel=1e-9, abs=1e-12)


def test_one_value_has_no_spread():
    assert summary([0.5]) == (0.5, None, None)
    single = paired_t([0.5], [0.25])
    assert (single.difference, single.low, single.high, single.p) == (0.25, None, None, None)


def test_equal_differences():
    assert summary([1.0, 1.0])[1:] == (0.0, Interval(1.0, 1.0, 1.0))
    assert paired_t([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired_t([2.0, 3.0], [1.0, 2.0]).p == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_run_gives_nan_and_no_interval(bad):
    mean, std, interval = summary([bad, 1.0, math.inf])
    assert math.isnan(mean)
    assert (std, interval) == (None, None)
    assert paired_t([bad, 1.0], [1.0, 1.0]).p is None


def test_bad_input_names_the_argument():
    with pytest.raises(InputError, match="values is empty"):
        summary([])
    with pytest.raises(ShapeError, match="a has 2 values and b 1"):
        paired_t([1, 2], [1])


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (3, 7), (23, 33), (0, 12), (500, 1000), (99_999, 100_000)]
)
def test_wilson_agrees_with_scipy(k, n, level):
    ours = wilson(k, n, level)
    wanted = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert ours.value == k / n
    assert (ours.low, ours.high) == pytest.approx((wanted.low, wanted.high), rel=1e-12, abs=1e-15)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_wilson_without_trials_knows_nothing():
    found = wilson(0, 0)
    assert math.isnan(found.value)
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (1, 0), (8, 6), (0, 4), (34, 34), (20, 61), (3, 2), (400, 480), (0, 60)]
)
def test_mcnemar_agrees_with_scipy(a, b):
    wanted = stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(wanted, rel=1e-9, abs=1e-300)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_mcnemar_takes_large_counts():
    wanted = stats.binomtest(10_000, 20_400).pvalue
    assert mcnemar(10_000, 10_400) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (1.5, 3), (0, -1)])
def test_wilson_refuses_what_no_count_can_be(k, n):
    with pytest.raises(InputError, match="0 <= k <= n"):
        wilson(k, n)


def test_levels_and_counts_are_checked():
    with pytest.raises(InputError, match="level is 1"):
        wilson(1, 2, 1.0)
    with pytest.raises(InputError, match="whole numbers"):
        mcnemar(-1, 2)
    with pytest.raises(InputError, match="whole numbers"):
        mcnemar(1, 0.5)

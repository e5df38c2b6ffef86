import math

import numpy as np
import pytest
from scipy import stats

from fusion_core.errors import InputError, ShapeError
from fusion_core.stats import Interval, paired_t, summary

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

"""Scores: invariant 6 of the specification, comparisons with scipy, conventions, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fusion_core.errors import ConfigError, FusionWarning, ShapeError
from mantis_photoz import metrics
from mantis_photoz.errors import DataError
from mantis_photoz.pdf import BinnedPDF

fast = settings(max_examples=25, deadline=None)
numbers = hnp.arrays(np.float64, st.integers(2, 40), elements=st.floats(-3, 3))
uniform = hnp.arrays(np.float64, st.integers(2, 60), elements=st.floats(0.001, 0.999), unique=True)


@given(numbers, st.floats(-2, 2), st.floats(-4, 4), st.floats(0.01, 1), st.floats(0, 1))
@fast
def test_residual_metrics(r, shift, scale, threshold, more):
    found = metrics.nmad(r)
    assert metrics.nmad(r + shift) == pytest.approx(found, abs=1e-9)
    assert metrics.nmad(scale * r) == pytest.approx(abs(scale) * found, abs=1e-9)
    eta = metrics.eta(r, threshold=threshold)
    assert 0 <= metrics.eta(r, threshold=threshold + more) <= eta <= 1
    assert metrics.std(r) == pytest.approx(np.std(r), abs=1e-12)
    assert metrics.sigma68(r) == pytest.approx(np.diff(np.percentile(r, [15.87, 84.13]))[0] / 2, abs=1e-12)
    assert metrics.bias(r, center="median") == pytest.approx(np.median(r), abs=1e-12)


@given(uniform)
@fast
def test_uniformity_against_scipy(pits):
    ks = stats.kstest(pits, "uniform")
    assert metrics.kolmogorov_smirnov(pits) == pytest.approx(ks.statistic, abs=1e-12)
    assert metrics.kolmogorov_smirnov_p(pits) == pytest.approx(ks.pvalue, rel=1e-6, abs=1e-9)
    assert metrics.cramer_von_mises(pits) == pytest.approx(
        stats.cramervonmises(pits, "uniform").statistic, rel=1e-9
    )
    x, n = np.sort(pits), len(pits)
    j = np.arange(1, n + 1)
    expected = -n - np.mean((2 * j - 1) * (np.log(x) + np.log(1 - x[::-1])))
    assert metrics.anderson_darling(pits) == pytest.approx(expected, rel=1e-9)


def test_point_metrics_have_their_names():
    found = metrics.point_metrics(
        np.array([0.1, 0.3, 0.5]), np.array([0.1, 0.2, 0.5]), thresholds=(0.05, 0.15)
    )
    assert found["eta_0.05"] == pytest.approx(1 / 3)
    assert found["eta_0.15"] == 0
    assert {"bias", "bias_median", "nmad", "sigma68", "outlier_rail", "outlier_3sigma"} <= set(found)
    tensors = metrics.point_metrics(torch.tensor([0.1, 0.3]), torch.tensor([0.1, 0.2]))
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())


def test_many_sets_at_once():
    r = torch.randn(4, 100, dtype=torch.float64)
    for metric in (metrics.nmad, metrics.bias, metrics.sigma68, metrics.rail_outlier_rate, metrics.std):
        torch.testing.assert_close(metric(r), torch.stack([metric(row) for row in r]))


def test_the_empty_set_is_nan_with_a_warning():
    with pytest.warns(FusionWarning, match="nmad of an empty set"):
        assert np.isnan(metrics.nmad(np.array([])))


def test_bootstrap_brackets_the_metric():
    r = np.random.default_rng(0).normal(0, 0.02, 2000)
    low, middle, high = metrics.bootstrap(r, resamples=300)
    assert low < middle < high
    assert middle == pytest.approx(metrics.nmad(r), rel=0.05)
    np.testing.assert_array_equal(metrics.bootstrap(r, resamples=300), [low, middle, high])
    # blocks do not change the draws' distribution: the mean's error is std / sqrt(n)
    spread = metrics.bootstrap(r, metrics.bias, resamples=500)
    assert (spread[2] - spread[0]) / 2 == pytest.approx(r.std() / np.sqrt(len(r)), rel=0.2)


def test_binned_metrics():
    z = np.linspace(0, 1, 101)
    rows = metrics.binned_metrics(z + 0.1, z, z, [0.0, 0.5, 1.0, 2.0])
    assert [row["n"] for row in rows] == [50, 50, 1]
    rows = metrics.binned_metrics(z + 0.1, z, z, [0.0, 0.5, 1.0])
    assert [row["n"] for row in rows] == [50, 51]  # the last bin holds its upper edge
    assert rows[0]["z_low"] == 0


def test_density_loss_grid_is_the_bin_sum():
    """B11: the authors' torch version compares the wrong axes; both of ours give the same on even bins."""
    pdf = BinnedPDF.from_nodes(
        np.linspace(0.05, 1.95, 20), np.random.default_rng(0).dirichlet(np.ones(20), 30)
    )
    z = np.random.default_rng(1).uniform(0.0, 2.0, 30)
    value, error = metrics.cde_loss(pdf, z)
    grid, grid_error = metrics.cde_loss_grid(pdf.density, pdf.nodes, z)
    assert grid == pytest.approx(value, rel=1e-9)
    assert grid_error == pytest.approx(error, rel=1e-9)


def test_wasserstein_is_the_p_norm():
    """B12: the authors' p is without effect; two point-like densities at distance 1 and 2."""
    edges = np.linspace(0, 10, 1001)
    pmf = np.zeros((2, 1000))
    pmf[0, 100], pmf[1, 300] = 1, 1
    first, second = BinnedPDF(edges, pmf[[0]]), BinnedPDF(edges, pmf[[1]])
    assert metrics.wasserstein(first, second, p=1)[0] == pytest.approx(2.0, rel=1e-9)
    assert metrics.wasserstein(first, second, p=2)[0] == pytest.approx(np.sqrt(2.0), rel=1e-2)


def test_scores_of_a_calibrated_model():
    rng = np.random.default_rng(0)
    pdf = BinnedPDF(np.linspace(0, 1, 21), rng.dirichlet(np.ones(20), 4000))
    z = pdf.sample(1, generator=torch.Generator().manual_seed(0))[:, 0]
    found = metrics.density_metrics(pdf, z)
    assert found["pit_ks"] < 0.03
    for level in (0.5, 0.68, 0.9, 0.95):
        assert found[f"coverage_{level:g}"] == pytest.approx(level, abs=0.03)
        assert found[f"hpd_coverage_{level:g}"] == pytest.approx(level, abs=0.04)
    assert all(np.isfinite(value) for value in found.values())
    levels, quantiles = metrics.qq(pdf.pit(z))
    np.testing.assert_allclose(quantiles, levels, atol=0.03)
    assert metrics.pit_outlier_rate(np.array([0.0, 0.5, 1.0, 0.2])) == 0.5


def test_devices(device):
    r = torch.randn(50, device=device)
    assert metrics.nmad(r).device.type == torch.device(device).type


BAD = [
    (lambda: metrics.residuals(np.zeros(3), np.zeros(2)), ShapeError, r"z_hat has shape \(3,\)"),
    (lambda: metrics.residuals(np.zeros(1), np.array([np.nan])), DataError, "not finite"),
    (lambda: metrics.residuals(np.array(["a"]), np.zeros(1)), DataError, "wanted an array of numbers"),
    (lambda: metrics.eta(np.zeros(2), threshold=0.0), ConfigError, "threshold is 0.0"),
    (lambda: metrics.bias(np.zeros(2), center="mode"), ConfigError, "'mean' or 'median'"),
    (lambda: metrics.kolmogorov_smirnov(np.array([1.5])), DataError, r"numbers in \[0, 1\]"),
    (lambda: metrics.coverage(np.array([])), DataError, "n >= 1"),
    (lambda: metrics.bootstrap(np.array([])), DataError, "n >= 1"),
    (
        lambda: metrics.binned_metrics(np.zeros(2), np.zeros(2), np.zeros(2), [1.0, 1.0]),
        ConfigError,
        "increase",
    ),
    (
        lambda: metrics.binned_metrics(np.zeros(2), np.zeros(2), np.zeros(3), [0, 1]),
        ShapeError,
        "by has shape",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()

"""Recalibration, priors and Cal-PIT: invariants 15 and 17, what each map mends, files, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from scipy.interpolate import PchipInterpolator

from fusion_core.errors import CheckpointError, ConfigError, ShapeError
from fusion_core.testing import detfill
from mantis_photoz import calibrate, metrics, prior
from mantis_photoz.calibrate import Beta, Chain, Conformal, NearestPIT, PITMap, Temperature
from mantis_photoz.calpit import CalPIT, MonotoneNetwork, clenshaw_curtis, official_transform, smooth_masses
from mantis_photoz.errors import DataError, DensityError
from mantis_photoz.pchip import pchip, pchip_slopes
from mantis_photoz.pdf import BinnedPDF

fast = settings(max_examples=20, deadline=None)


def skewed(n=1500, sharper=1.0, seed=0, moved=0.02):
    """Gaussian densities on bins; the truths are drawn from wider or narrower ones, and moved."""
    rng = np.random.default_rng(seed)
    center = rng.uniform(0.3, 1.2, n)
    edges = np.linspace(0, 1.6, 161)
    from scipy.special import ndtr

    pmf = np.diff(ndtr((edges - center[:, None]) / 0.06), axis=1) + 1e-9
    z = np.clip(center + 0.06 * sharper * rng.normal(size=n) + moved * (sharper != 1), 0, 1.6)
    return BinnedPDF(edges, pmf / pmf.sum(1, keepdims=True)), z, center


@pytest.mark.parametrize("sharper", [0.5, 1.8])
@pytest.mark.parametrize("kind", ["temperature", "pit", "beta"])
def test_maps_bring_the_pit_nearer_to_uniform(kind, sharper):
    # a temperature changes the width only
    pdf, z, _ = skewed(sharper=sharper, moved=0.0 if kind == "temperature" else 0.02)
    fitted = calibrate.fit(pdf[:700], z[:700], (kind,))
    before = metrics.density_metrics(pdf[700:], z[700:])
    after = metrics.density_metrics(fitted(pdf[700:]), z[700:])
    assert after["pit_ks"] < 0.75 * before["pit_ks"]
    assert after["cde_loss"] < before["cde_loss"]


def test_a_chain_and_files(tmp_path):
    pdf, z, x = skewed(600)
    fitted = calibrate.fit(
        pdf, z, ("temperature", "pit", "nearest"), nearest={"features": x[:, None], "neighbours": 50}
    )
    calibrate.save(fitted, tmp_path / "r.json", objects=600)
    again = calibrate.load(tmp_path / "r.json")
    np.testing.assert_allclose(again(pdf, x[:, None]).pmf, fitted(pdf, x[:, None]).pmf, atol=1e-12)
    assert isinstance(again, Chain)
    for made in (Beta.fit(pdf, z), PITMap.fit(pdf, z, smooth=True), Conformal.fit(pdf, z)):
        calibrate.save(made, tmp_path / "one.json")
        assert calibrate.load(tmp_path / "one.json") == made


def test_local_recalibration_sees_what_the_global_map_averages():
    rng = np.random.default_rng(0)
    edges, n = np.linspace(0, 1, 101), 1200
    side = rng.integers(0, 2, n)
    pdf = BinnedPDF(edges, np.full((n, 100), 0.01))
    z = np.where(side, rng.beta(5, 1, n), rng.beta(1, 5, n))  # uniform p(z) is wrong, each side its own way
    local = NearestPIT.fit(pdf[:800], z[:800], side[:800, None], neighbours=100)
    one = PITMap.fit(pdf[:800], z[:800])
    tested = slice(800, None)
    loss = {
        name: pdf_.cde_loss(z[tested]).mean()
        for name, pdf_ in (
            ("local", local(pdf[tested], side[tested, None])),
            ("global", one(pdf[tested])),
        )
    }
    assert loss["local"] < loss["global"] - 0.3


def test_conformal_intervals_cover():
    pdf, z, _ = skewed(1500, sharper=1.8)
    fitted = Conformal.fit(pdf[:700], z[:700])
    for level in (0.5, 0.9):
        low, high = fitted.intervals(pdf[700:], level).T
        assert ((z[700:] >= low) & (z[700:] <= high)).mean() == pytest.approx(level, abs=0.05)
    assert Conformal((0.5,)).level(0.9) == 1.0  # too few objects: the whole support


masses = hnp.arrays(np.float64, (4, 9), elements=st.floats(0.0, 1)).filter(lambda m: (m.sum(1) > 1e-2).all())


@given(masses, st.integers(0, 10**6))
@fast
def test_maps_keep_the_cdf(mass, seed):
    rng = np.random.default_rng(seed)
    edges = np.concatenate([[0], np.cumsum(rng.uniform(0.05, 0.4, 9))])
    pdf = BinnedPDF(edges, mass / mass.sum(1, keepdims=True))
    z = rng.uniform(0, edges[-1], 4)
    network = MonotoneNetwork(2, (8, 8))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    x = rng.normal(size=(4, 2))
    calpit = CalPIT(network, torch.zeros(2), torch.ones(2))
    maps = [Temperature(1.7), Temperature.fit(pdf, z), PITMap.fit(pdf, z), PITMap.fit(pdf, z, smooth=True)]
    maps += [Beta(0.6, 1.3, 0.4), NearestPIT.fit(pdf, z, x, neighbours=3), calpit]
    for made in maps:
        found = made(pdf, x)
        steps = found.cdf(np.broadcast_to(edges, (4, 10)))
        assert (np.diff(steps, axis=1) >= -1e-12).all(), made
        np.testing.assert_allclose(steps[:, [0, -1]], np.tile([0.0, 1.0], (4, 1)), atol=1e-12)
        np.testing.assert_allclose(found.pmf.sum(1), 1, atol=1e-12)


def test_the_identity_maps():
    pdf, _, _ = skewed(20)
    for made in (Temperature(1.0), PITMap((0.0, 1.0), (0.0, 1.0)), Beta(1.0, 1.0, 0.0)):
        np.testing.assert_allclose(made(pdf).pmf, pdf.pmf, atol=1e-10)


# ---- priors ----


positive = hnp.arrays(np.float64, (9,), elements=st.floats(0.05, 1))


@given(masses, positive, positive, positive)
@fast
def test_reweighting(mass, first, second, third):
    pdf = BinnedPDF(np.arange(10.0), mass / mass.sum(1, keepdims=True))
    np.testing.assert_allclose(pdf.reweight(first, first).pmf, pdf.pmf, atol=1e-12)
    twice = pdf.reweight(second, first).reweight(third, second)
    np.testing.assert_allclose(twice.pmf, pdf.reweight(third, first).pmf, atol=1e-9)
    product = pdf.reweight(first, np.ones(9)).reweight(second, np.ones(9))
    np.testing.assert_allclose(product.pmf, pdf.reweight(first * second, np.ones(9)).pmf, atol=1e-9)


def test_em_finds_the_prior_that_the_sample_has():
    rng = np.random.default_rng(0)
    edges, truth = np.linspace(0, 1, 11), np.array([0.0, 1, 4, 8, 6, 3, 2, 1, 0.5, 0.2])
    truth = truth / truth.sum()
    bins = rng.choice(10, 4000, p=truth)
    z = (bins + rng.random(4000)) / 10
    noisy = z + 0.05 * rng.normal(size=4000)
    from scipy.special import ndtr

    pmf = np.diff(ndtr((edges - noisy[:, None]) / 0.05), axis=1) + 1e-12  # flat prior
    pdf = BinnedPDF(edges, pmf / pmf.sum(1, keepdims=True))
    found = prior.estimate_prior(pdf)
    assert abs(found - truth).sum() < abs(pdf.stack().pmf[0] - truth).sum()
    assert abs(found - truth).max() < 0.04
    np.testing.assert_allclose(prior.counts_prior(z, edges, smoothing=0.0), truth, atol=0.03)


def test_stack():
    pdf, _, center = skewed(300)
    found = prior.stack(pdf, resamples=100)
    np.testing.assert_allclose((found.density * np.diff(found.edges)).sum(), 1, atol=1e-9)
    assert (found.low <= found.high).all()
    assert found.mean_redshift == pytest.approx(center.mean(), abs=0.02)
    assert found.mean_error == pytest.approx(center.std() / np.sqrt(300), rel=0.4)


# ---- Cal-PIT ----


def test_pchip_is_scipys():
    rng = np.random.default_rng(0)
    x = np.sort(rng.random(9))
    for y in (np.cumsum(rng.random((3, 9)), 1), rng.normal(size=(3, 9))):
        reference = PchipInterpolator(x, y, axis=1)
        slopes = pchip_slopes(torch.from_numpy(x), torch.from_numpy(y))
        np.testing.assert_allclose(slopes, reference.derivative()(x), rtol=1e-9, atol=1e-9)
        at = np.linspace(x[0], x[-1], 50)
        values = pchip(torch.from_numpy(at).expand(3, -1), torch.from_numpy(x), torch.from_numpy(y))
        np.testing.assert_allclose(values, reference(at), rtol=1e-9, atol=1e-9)


def test_quadrature_weights():
    nodes, weights = clenshaw_curtis(50)
    for power in (0, 2, 8, 40):
        assert float((weights * nodes**power).sum()) == pytest.approx(2 / (power + 1), abs=1e-12)


def test_the_fast_integrator_is_monotone_and_the_same():
    torch.manual_seed(0)
    network = MonotoneNetwork(5, (64, 64))
    x, alpha = torch.randn(6, 5), torch.linspace(0, 1, 201).expand(6, -1)
    with torch.no_grad():
        fast, exact = network(alpha, x), network.exact(alpha, x)
    assert bool((fast.diff(dim=-1) >= -1e-6).all())
    torch.testing.assert_close(fast, exact, atol=1e-5, rtol=0)
    # the integral of a constant is exact
    with torch.no_grad():
        for parameter in network.integrand.parameters():
            parameter.zero_()
        offset, scale = network.net(x).unbind(-1)
        torch.testing.assert_close(
            network(alpha, x, 7), torch.sigmoid(scale.exp()[:, None] * alpha + offset[:, None])
        )
    assert network.choose_cells(x) == 32


def test_the_fast_integrator_converges_to_the_integral():
    """It agrees with itself at four times as many cells, and with the quadrature to its own error."""
    network = MonotoneNetwork(6, (16, 16)).double()
    detfill.fill_state_dict(network)
    x = torch.from_numpy(detfill.array("fast", (4, 6), 0.5))
    alpha = torch.linspace(0, 1, 33, dtype=torch.float64).expand(4, -1)
    with torch.no_grad():
        fast = network(alpha, x, 256)
        torch.testing.assert_close(fast, network(alpha, x, 1024), atol=1e-6, rtol=0)
        torch.testing.assert_close(fast, network.exact(alpha, x), atol=5e-6, rtol=0)


def test_the_integrator_has_gradients():
    network = MonotoneNetwork(2, (5, 5)).double()
    alpha = torch.tensor([[0.13, 0.71]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, f: network(a, f, 16), (alpha, x), atol=1e-3)


def test_training_mends_a_model_that_is_too_wide(tmp_path):
    pdf, z, x = skewed(900, sharper=0.4)
    features = np.stack([x, x**2], 1)
    options = {"hidden": (24, 24), "epochs": 20, "batch_size": 64, "lr": 1e-2, "cells": 16, "progress": False}
    fitted = CalPIT.fit(pdf[:600], z[:600], features[:600], **options)
    assert len(fitted.history) <= 20
    assert min(fitted.history) < fitted.history[0]
    found = fitted(pdf[600:], features[600:])
    before, after = (metrics.density_metrics(p, z[600:]) for p in (pdf[600:], found))
    assert after["pit_ks"] < 0.6 * before["pit_ks"]
    assert after["cde_loss"] < before["cde_loss"]
    fitted.save(tmp_path / "c.safetensors", objects=600)
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert json.loads(file.metadata()["facts"]) == {"objects": 600}
    again = calibrate.load(tmp_path / "c.safetensors")
    np.testing.assert_allclose(again(pdf[600:], features[600:]).pmf, found.pmf, atol=1e-12)
    assert again.to_dict() == fitted.to_dict()
    other = CalPIT(fitted.network, fitted.mean + 1, fitted.std)
    assert other.to_dict()["weights"] != fitted.to_dict()["weights"]  # a resumed run sees other weights
    state = torch.random.get_rng_state()
    CalPIT.fit(pdf[:20], z[:20], features[:20], hidden=(4,), epochs=1, progress=False)
    assert torch.equal(state, torch.random.get_rng_state())  # the global stream is untouched


def test_the_authors_floor_and_norm():
    """B14 and B3: both sides of each switch."""
    pmf = torch.eye(400, dtype=torch.float64)[:1]
    assert float(smooth_masses(pmf, 1e-2)[0, 1:].sum()) == pytest.approx(0.8, abs=0.003)
    assert float(smooth_masses(pmf, 1e-6)[0, 1:].sum()) < 1e-3
    state = MonotoneNetwork(3, (8,)).state_dict()
    mean, std, x = torch.tensor([1.0, 2, 4]), torch.tensor([0.5, 1, 2]), torch.tensor([[2.0, 3, 6]])
    ours = CalPIT.from_official(state, mean, std)
    theirs = CalPIT.from_official({f"module.{k}": v for k, v in state.items()}, mean, std, norm="official")
    torch.testing.assert_close(ours.standardize(x), torch.tensor([[2.0, 1, 1]]) / 3)
    torch.testing.assert_close(theirs.standardize(x), torch.tensor([[1.0, 0.5, 0.5]]) / 3)


def test_no_density_is_all_zero():
    """B14: the authors patch all-zero outputs by hand; here a network that is stuck at 0 gives a density."""
    network = MonotoneNetwork(2, (4,))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.net[-1].bias.copy_(torch.tensor([-400.0, -50.0]))  # r = 0 everywhere in float32
    pdf, _, _ = skewed(3)
    found = CalPIT(network, torch.zeros(2), torch.ones(2))(pdf, np.zeros((3, 2)))
    np.testing.assert_allclose(found.pmf.sum(1), 1)


def test_official_chain_names():
    network = MonotoneNetwork(2, (8,))
    pmf = torch.rand(2, 21, dtype=torch.float64).softmax(-1)
    with torch.no_grad():
        found = official_transform(network, pmf, torch.linspace(0, 1, 21), torch.zeros(2, 2))
    assert list(found) == ["smoothed", "cdf", "new_cdf", "new_density", "new_pmf"]


PDF = BinnedPDF(np.arange(4.0), np.ones((12, 3)) / 3)
Z = np.linspace(0.1, 2.9, 12)
CALPIT = CalPIT(MonotoneNetwork(2, (4,)), torch.zeros(2), torch.ones(2))
BAD = [
    (lambda: Temperature(0.0), ConfigError, "temperature is 0.0"),
    (lambda: Temperature(1e-320), ConfigError, "temperature is 1e-320"),
    (lambda: Temperature.fit(PDF[:0], Z[:0]), DataError, "0 objects, wanted at least 1"),
    (lambda: PITMap((0.0, 0.5), (0.0, 1.0)), ConfigError, "0 to 0.5, wanted 0 to 1"),
    (lambda: PITMap((0.0, 1.0), (0.0, 0.5, 1.0)), ConfigError, "2 and 3 knots"),
    (lambda: PITMap.fit(PDF, Z, knots=1), ConfigError, "knots is 1"),
    (lambda: Beta(0.0, 1.0, 0.0), ConfigError, "a is 0.0"),
    (
        lambda: NearestPIT.fit(PDF, Z, np.zeros((12, 2)), neighbours=20),
        DataError,
        "12 objects, wanted at least 20",
    ),
    (
        lambda: NearestPIT.fit(PDF, Z, np.zeros((3, 2)), neighbours=5),
        DataError,
        r"features have shape \(3, 2\)",
    ),
    (
        lambda: NearestPIT.fit(PDF, Z, np.eye(12), neighbours=5)(PDF),
        DataError,
        r"features are None, wanted \(12, 12\)",
    ),
    (lambda: calibrate.fit(PDF, Z, ("platt",)), ConfigError, "kind is 'platt'"),
    (lambda: calibrate.load("nowhere.json"), CheckpointError, "nowhere.json cannot be read"),
    (
        lambda: CalPIT(CALPIT.network, torch.zeros(2), torch.ones(2), norm="mean"),
        ConfigError,
        "norm is 'mean'",
    ),
    (lambda: CalPIT(CALPIT.network, torch.zeros(2), torch.ones(2), source="x"), ConfigError, "source is 'x'"),
    (lambda: CalPIT(CALPIT.network, torch.zeros(2), torch.ones(2), floor=-1.0), ConfigError, "floor is -1"),
    (lambda: CalPIT(CALPIT.network, torch.zeros(3), torch.ones(2)), DataError, r"wanted \(2,\)"),
    (lambda: CALPIT(PDF), DataError, r"needs features, wanted \(12, 2\)"),
    (lambda: CALPIT(PDF, np.zeros((12, 3))), DataError, r"wanted finite \(batch, 2\)"),
    (lambda: CALPIT(PDF, np.zeros((3, 2))), DataError, "3 rows, wanted one for each of 12"),
    (lambda: CalPIT.fit(PDF, Z, np.zeros((12, 2)) * np.nan), DataError, "finite rows"),
    (lambda: CalPIT.from_official({"a": torch.zeros(1)}, Z, Z), CheckpointError, "wanted net.0.weight"),
    (lambda: CALPIT.network(torch.zeros(2, 3), torch.zeros(1, 2)), ShapeError, "x has shape"),
    (lambda: prior.reweight(PDF, np.ones(2), np.ones(3)), DensityError, r"target has shape \(2,\)"),
    (
        lambda: prior.reweight(PDF, np.ones(3), np.array([0, 1, 1])),
        DensityError,
        "train is 0 where target is not",
    ),
    (lambda: prior.stack(PDF[:0]), DensityError, "no densities"),
    (lambda: clenshaw_curtis(1), ConfigError, "steps is 1"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_damaged_recalibration_file(tmp_path):
    file = tmp_path / "r.json"
    file.write_text('{"schema": "other/1"}')
    with pytest.raises(CheckpointError, match="schema is 'other/1'"):
        calibrate.load(file)
    file.write_text('{"schema": "mantis.recalibration/1", "kind": "what"}')
    with pytest.raises(CheckpointError, match="kind is 'what', wanted temperature"):
        calibrate.load(file)

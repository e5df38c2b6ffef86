"""Losses, samplers, Shapley values (invariant 9), attribution, photometry, out-of-distribution scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusion_core.errors import ConfigError, MissingExtraError, ShapeError
from fusion_core.seeding import generator
from mantis_photoz import attribution, losses, photometry, shapley
from mantis_photoz.errors import CheckpointError, DataError
from mantis_photoz.grid import grid_nodes, training_edges
from mantis_photoz.ood import (
    OutOfDistribution,
    energy_score,
    neighbour_distance,
    neighbour_rank,
    view_disagreement,
)
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.samplers import WeightedSampler, cell_labels, class_weights, sampler_weights

fast = settings(max_examples=25, deadline=None)

# ---- losses ----


def setting(n=5, bins=20, dtype=torch.float64):
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(n, bins, generator=made, dtype=dtype)
    z = torch.rand(n, generator=made, dtype=dtype) * 1.5
    return logits, z, training_edges(bins).to(dtype), grid_nodes(bins).to(dtype)


@pytest.mark.parametrize(("loss", "spread"), [("ce", 0), ("crps", 0), ("cde", 0), ("ordinal-soft", 0.05)])
def test_classifier_losses(loss, spread):
    logits, z, edges, nodes = setting()
    logits.requires_grad_(True)
    function = lambda x: losses.classifier_loss(x, z, edges, nodes, loss=loss, spread=spread)
    assert torch.autograd.gradcheck(function, (logits,))
    # a step along the gradient helps
    value = function(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    assert bool(function(logits - 0.1 * gradient) < value)
    assert (
        losses.classifier_loss(logits.bfloat16(), z, edges, nodes, loss=loss, spread=spread).dtype
        == torch.float32
    )


def test_soft_targets_become_the_class():
    _, z, edges, _ = setting()
    soft = losses.ordinal_targets(z, edges, 0.05)
    torch.testing.assert_close(soft.sum(-1), torch.ones(5, dtype=torch.float64))
    narrow = losses.ordinal_targets(z, edges, 1e-4)
    holds = torch.searchsorted(edges, z, right=True) - 1
    assert (narrow.argmax(-1) == holds.clamp(max=19)).all()
    logits, z, edges, nodes = setting()
    same = [losses.classifier_loss(logits, z, edges, nodes, loss=name) for name in ("ce", "ordinal-soft")]
    torch.testing.assert_close(*same)


def test_mixture_head():
    outputs = torch.tensor([[0.0, 0.0, 0.3, 0.9, -2.0, -2.0]], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: losses.mixture_loss(x, z), (outputs,))
    edges = torch.linspace(0, 1.6, 801, dtype=torch.float64)
    pmf = losses.mixture_pmf(outputs, edges)
    torch.testing.assert_close(pmf.sum(-1), torch.ones(1, dtype=torch.float64))
    inside = float(-torch.log(pmf[0, 200].detach() / 0.002))  # z = 0.4 is the left end of bin 200
    assert losses.mixture_loss(outputs, z).item() == pytest.approx(inside, abs=0.02)


def test_quantile_head():
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    outputs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    q = losses.quantiles_from(outputs)
    assert bool((q.diff(dim=-1) > 0).all())
    assert bool(((q > 0) & (q < 1.6)).all())
    z = torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: losses.pinball_loss(losses.quantiles_from(x), z, levels), (outputs,)
    )
    # the loss is least at the quantiles of the sample
    sample = torch.linspace(0, 1, 1001, dtype=torch.float64)
    at = lambda x: float(
        losses.pinball_loss(torch.full((1001, 1), x, dtype=torch.float64), sample, levels[2:])
    )
    assert at(0.9) < min(at(0.85), at(0.95))
    edges = torch.linspace(0, 1.6, 33, dtype=torch.float64)
    pdf = BinnedPDF(edges, losses.quantile_pmf(q, levels, edges).detach())
    torch.testing.assert_close(pdf.ppf(levels), q.detach(), atol=0.05, rtol=0)


# ---- samplers ----


@given(hnp.arrays(np.int64, st.integers(1, 50), elements=st.integers(0, 6)))
@fast
def test_balanced_weights(labels):
    weight = sampler_weights(labels)
    assert weight.sum() == pytest.approx(1)
    share = [weight[labels == c].sum() for c in np.unique(labels)]
    np.testing.assert_allclose(share, 1 / len(share), rtol=1e-9)
    np.testing.assert_allclose(sampler_weights(labels, sampler="natural"), 1 / len(labels))
    root = sampler_weights(labels, sampler="sqrt")
    counts = np.bincount(labels)[labels]
    np.testing.assert_allclose(root * np.sqrt(counts), (root * np.sqrt(counts))[0], rtol=1e-9)


def test_colour_cells_and_sampling():
    rng = np.random.default_rng(0)
    z, colour = rng.integers(0, 5, 2000), rng.exponential(size=2000)
    weight = sampler_weights(z, sampler="colour-z", colours=(colour,))
    assert weight.shape == (2000,)
    assert weight.sum() == pytest.approx(1)
    assert len(cell_labels(z.astype(float), colour, cells=4).unique()) >= 12
    assert class_weights(np.array([0, 1, 1, 1]), floor=3).tolist() == [0.25] * 4
    labels = np.array([0] * 900 + [1] * 100)
    sampler = WeightedSampler(sampler_weights(labels), seed=1)
    first = list(sampler)
    assert len(first) == len(sampler) == 1000
    assert labels[first].mean() == pytest.approx(0.5, abs=0.06)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


# ---- Shapley ----

games = hnp.arrays(np.float64, (16, 2), elements=st.floats(-5, 5))


@given(games, games, st.floats(-2, 2))
@fast
def test_shapley_axioms(v, w, factor):
    phi = shapley.shapley_values(v)
    np.testing.assert_allclose(phi.sum(0), v[-1] - v[0], atol=1e-9)  # efficiency
    np.testing.assert_allclose(
        shapley.shapley_values(v + factor * w), phi + factor * shapley.shapley_values(w), atol=1e-9
    )
    index = shapley.interactions(v)
    np.testing.assert_allclose(index.sum(1), phi, atol=1e-9)
    np.testing.assert_allclose(index, index.swapaxes(0, 1), atol=1e-12)
    np.testing.assert_allclose(index.sum((0, 1)), v[-1] - v[0], atol=1e-9)
    who = shapley.coalitions(4)
    null = v[(np.arange(16) & ~1)]  # player 0 changes nothing
    np.testing.assert_allclose(shapley.shapley_values(null)[0], 0, atol=1e-9)
    swapped = who[:, [1, 0, 2, 3]] @ (1 << np.arange(4))
    symmetric = v + v[swapped]
    found = shapley.shapley_values(symmetric)
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)
    share = shapley.shares(phi)
    np.testing.assert_allclose(share.sum(0), 1, atol=1e-9)


def test_games_are_played():
    table = shapley.play(lambda row: torch.tensor([float(sum(row))]), 3)
    np.testing.assert_allclose(shapley.shapley_values(table)[:, 0], 1.0)
    planes = torch.arange(2 * 3 * 4.0).reshape(2, 3, 2, 2) + 1
    zero = shapley.mask_channels(planes, [1])
    assert bool((zero[:, 1] == 0).all())
    torch.testing.assert_close(zero[:, [0, 2]], planes[:, [0, 2]])
    mean = shapley.mask_channels(planes, [0], baseline="mean", mean=planes.mean(0))
    torch.testing.assert_close(mean[:, 0], planes.mean(0)[None, 0].expand(2, -1, -1))
    other = shapley.mask_channels(planes, [0, 1], baseline="marginal", generator=generator(0))
    torch.testing.assert_close(other[:, :2], planes.flip(0)[:, :2])
    even = shapley.mm_shares(np.zeros((1, 2, 3, 3)), [[0], [1]])
    assert even.tolist() == [[0.5, 0.5]]


# ---- attribution ----


def test_attribution():
    torch.manual_seed(0)
    weight = torch.randn(9, 5, 5)
    linear = lambda x: (x * weight).flatten(1).sum(1)
    curved = lambda x: (x * weight).flatten(1).sum(1).tanh() + x.flatten(1).square().sum(1) * 0.01
    x = torch.randn(3, 9, 5, 5)
    torch.testing.assert_close(attribution.gradient_times_input(linear, x), x * weight)
    torch.testing.assert_close(attribution.integrated_gradients(linear, x, steps=3), x * weight)
    total = attribution.integrated_gradients(curved, x, steps=200).flatten(1).sum(1)
    torch.testing.assert_close(total, curved(x) - curved(torch.zeros_like(x)), atol=2e-2, rtol=1e-2)
    mean = attribution.expected_gradients(
        linear, x, torch.zeros(2, 9, 5, 5), samples=2, generator=generator(0)
    )
    torch.testing.assert_close(mean, x * weight)
    shares = shapley.mm_shares(mean, [[0, 1], [2, 3, 4, 5, 6], [7, 8]])
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, dtype=torch.float64))
    assert not x.requires_grad
    mixed = attribution.scramble_pixels(x, 2.0, generator=generator(0))
    torch.testing.assert_close(mixed.sum((-2, -1)), x.sum((-2, -1)))
    assert not torch.equal(mixed, x)
    assert attribution.observed_features(0.7)["Lyman break"] == "fuv"
    assert attribution.observed_features(1.1)["1.6 um bump"] == "w1"
    assert attribution.observed_features(0.5)["4000 A break"] == "r"


# ---- photometry ----


def test_photometry_of_planes():
    pytest.importorskip("sep")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] - 32.0
    plane = 50 * np.exp(-(x**2 + y**2) / (2 * 2.5**2)) + rng.normal(0, 0.5, (64, 64))
    flux, forced = photometry.measure_plane(plane)
    assert flux == pytest.approx(50 * 2 * np.pi * 2.5**2, rel=0.05)
    assert not forced
    # B15: the authors report the forced flux as not forced
    assert photometry.measure_plane(rng.normal(0, 0.5, (64, 64)))[1]
    surveys = {"a": np.stack([[plane, plane]]), "b": np.stack([[plane]])}
    found = photometry.measure_batch(surveys)
    assert found.flux.shape == (1, 3)
    features = photometry.magnitude_features(found.flux, np.array([[0.1, 0.2]]))
    assert features.shape == (1, 3 * 2 + 2 + 3)
    assert features[0, 6:8].tolist() == [0.1, 0.2]


def test_what_sep_cannot_measure_is_forced(monkeypatch):
    """B15: where a routine of SEP fails the authors return NaN, and call a forced flux none."""
    sep = pytest.importorskip("sep")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] - 16.0
    plane = 50 * np.exp(-(x**2 + y**2) / 8) + rng.normal(0, 0.5, (32, 32))
    assert not photometry.measure_plane(plane)[1]

    def fails(*_, **__):
        raise Exception("internal pixel buffer full")

    for name in ("extract", "kron_radius", "sum_ellipse"):
        with monkeypatch.context() as patch:
            patch.setattr(sep, name, fails)
            flux, forced = photometry.measure_plane(plane)
        assert forced, name
        within = 1 - np.exp(-(4**2) / 8)  # of a Gaussian of 2 px in a circle of 4
        assert flux == pytest.approx(50 * 2 * np.pi * 4 * within, rel=0.02)
    with monkeypatch.context() as patch:
        patch.setattr(sep, "sum_ellipse", lambda *_: (np.array([np.nan]), None, None))
        assert photometry.measure_plane(plane)[1]


def test_photometry_names_its_extra(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "sep":
            raise ModuleNotFoundError("No module named 'sep'", name="sep")
        return real(name, *args, **kwargs)

    import importlib

    monkeypatch.setattr(importlib, "import_module", lambda name, package=None: without(name))
    with pytest.raises(MissingExtraError, match=r'pip install "mantis-photoz\[phot\]"'):
        photometry.measure_plane(np.ones((8, 8)))


# ---- out of distribution ----


def test_out_of_distribution():
    made = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=made)
    features = torch.randn(3000, 6, generator=made) @ mix + 3
    fitted = OutOfDistribution.fit(features)
    score, flagged = fitted(features)
    assert float(flagged.float().mean()) == pytest.approx(0.01, abs=0.003)
    assert float(score.min()) >= 0
    assert float(score.max()) <= 1
    ranks = score.sort().values
    torch.testing.assert_close(ranks, torch.linspace(0, 1, 3000, dtype=ranks.dtype), atol=2e-3, rtol=0)
    far, strange = fitted(features[:5] + 100)
    assert far.tolist() == [1.0] * 5
    assert bool(strange.all())
    again = OutOfDistribution.from_state_dict(fitted.state_dict())
    torch.testing.assert_close(again(features[:9])[0], score[:9])
    array, _ = fitted(features[:4].numpy())
    assert isinstance(array, np.ndarray)
    one = OutOfDistribution.fit(
        features[:3]
    )  # fewer objects than features: the shrunk covariance can be inverted
    assert bool(one(features)[0].isfinite().all())
    logits = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    assert energy_score(logits)[0] > energy_score(logits)[1]
    assert neighbour_distance(features[:2], features, k=1).abs().max() < 1e-5
    ranks = neighbour_rank(
        features[:300] + 0.01, features[300:], k=5
    )  # as near to the others as those to each other
    assert float(ranks.mean()) == pytest.approx(0.5, abs=0.06)
    assert neighbour_rank(features[:5] + 100, features, k=5).tolist() == [1.0] * 5
    edges = np.linspace(0, 1, 3)
    pair = [BinnedPDF(edges, np.array([[1.0, 0.0]])), BinnedPDF(edges, np.array([[0.0, 1.0]]))]
    assert view_disagreement(pair)[0] == pytest.approx(0.25)


LOGITS, Z, EDGES, NODES = setting()
BAD = [
    (lambda: losses.classifier_loss(LOGITS, Z, EDGES, NODES[:-1]), ShapeError, "logits has shape"),
    (lambda: losses.classifier_loss(LOGITS, Z, EDGES[:-1], NODES), ShapeError, "edges has shape"),
    (lambda: losses.classifier_loss(LOGITS, Z, EDGES, NODES, loss="mse"), ConfigError, "loss is 'mse'"),
    (lambda: losses.ordinal_targets(Z, EDGES, 0.0), ConfigError, "spread is 0.0"),
    (lambda: losses.mixture_loss(torch.zeros(1, 4), Z[:1]), ConfigError, "4 numbers per object, wanted 3"),
    (lambda: class_weights(np.array([], dtype=np.int64)), DataError, "n >= 1"),
    (lambda: class_weights(np.array([0.5])), DataError, "wanted .n,. classes"),
    (lambda: sampler_weights(np.array([0]), sampler="x"), ConfigError, "balanced, natural, sqrt, colour-z"),
    (lambda: sampler_weights(np.array([0]), sampler="colour-z"), ConfigError, "without colours"),
    (lambda: cell_labels(np.zeros(2), np.zeros(3)), DataError, r"wanted finite \(2,\)"),
    (lambda: WeightedSampler(np.array([0.0, 0.0])), DataError, "numbers >= 0"),
    (lambda: shapley.shapley_values(np.zeros(6)), ShapeError, r"6 rows, wanted 2\^players"),
    (lambda: shapley.coalitions(0), ConfigError, "players is 0"),
    (lambda: shapley.mm_shares(np.zeros((1, 2, 3, 3)), [[2]]), ConfigError, r"groups are \[\[2\]\]"),
    (
        lambda: shapley.mask_channels(torch.zeros(1, 2, 3, 3), [0], baseline="mean"),
        ConfigError,
        "without mean",
    ),
    (lambda: shapley.mask_channels(torch.zeros(1, 2, 3, 3), [0], baseline="x"), ConfigError, "'marginal'"),
    (
        lambda: attribution.gradient_times_input(lambda x: x, torch.zeros(1, 2, 3, 3)),
        ShapeError,
        "one number",
    ),
    (
        lambda: attribution.expected_gradients(lambda x: x, torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3)),
        ShapeError,
        "background",
    ),
    (lambda: photometry.color_features(np.zeros((2, 9)), np.zeros((3, 2))), ShapeError, "ebv has shape"),
    (
        lambda: photometry.measure_plane(np.full((8, 8), np.nan)),
        DataError,
        r"wanted a finite \(height, width\)",
    ),
    (lambda: photometry.measure_batch({}), ShapeError, "of one batch"),
    (lambda: OutOfDistribution.fit(np.zeros((1, 3))), DataError, "n >= 2"),
    (lambda: OutOfDistribution.fit(np.eye(3))(np.zeros((1, 2))), DataError, r"wanted \(batch, 3\)"),
    (lambda: OutOfDistribution.from_state_dict({}), CheckpointError, "lack"),
    (lambda: view_disagreement([]), DataError, "two or more"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()

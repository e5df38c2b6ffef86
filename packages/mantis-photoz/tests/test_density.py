"""Densities on bins: invariants 1 to 5, 7 and 19 of the specification, gradients, bad input."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusion_core.errors import ConfigError, ShapeError
from mantis_photoz import density
from mantis_photoz.errors import DensityError
from mantis_photoz.grid import bin_edges, grid_nodes, nearest_node, training_edges
from mantis_photoz.metrics import kolmogorov_smirnov_p
from mantis_photoz.pdf import LEVELS, BinnedPDF

BINS = 12
fast = settings(max_examples=25, deadline=None)
masses = hnp.arrays(
    np.float64, (3, BINS), elements=st.floats(0, 1, allow_subnormal=False).map(lambda x: x**3)
).filter(lambda m: (m.sum(1) > 1e-3).all())
widths = hnp.arrays(np.float64, (BINS,), elements=st.floats(0.01, 1.0))
levels = hnp.arrays(np.float64, (5,), elements=st.floats(0, 1))


def make(mass, width, start=0.0):
    edges = start + np.concatenate([[0.0], np.cumsum(width)])
    return BinnedPDF(edges, mass / mass.sum(1, keepdims=True))


@given(hnp.arrays(np.float32, (2, 7), elements=st.floats(-80, 80, width=32)), st.floats(-100, 100))
@fast
def test_masses_of_logits(logits, shift):
    pmf, failed = density.pmf_from_logits(torch.from_numpy(logits).double())
    moved, _ = density.pmf_from_logits(torch.from_numpy(logits).double() + shift)
    assert not failed.any()
    assert bool((pmf >= 0).all())
    torch.testing.assert_close(pmf.sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(moved, pmf, atol=1e-12, rtol=0)


@given(masses, widths, levels)
@fast
def test_cdf_and_quantiles(mass, width, q):
    pdf = make(mass, width)
    z = np.sort(np.random.default_rng(0).uniform(-0.2, pdf.edges[-1] + 0.2, (3, 40)), axis=1)
    cdf = pdf.cdf(z)
    assert (np.diff(cdf, axis=1) >= -1e-12).all()
    assert ((cdf >= 0) & (cdf <= 1)).all()
    np.testing.assert_allclose(pdf.cdf(pdf.ppf(q)), np.broadcast_to(q, (3, 5)), atol=1e-9)
    assert (pdf.ppf(0.0) == pdf.edges[0]).all()


def test_quantile_on_a_flat_piece_is_its_left_end():
    pdf = BinnedPDF(np.arange(5.0), np.array([[0.5, 0.0, 0.0, 0.5]]))
    assert pdf.ppf(0.5)[0] == 1.0
    assert pdf.ppf([0.5, 1.0]).tolist() == [[1.0, 4.0]]


@given(masses, widths, st.integers(1, 4))
@fast
def test_rebinning_conserves_mass(mass, width, parts):
    pdf = make(mass, width)
    fine = np.unique(np.concatenate([np.linspace(a, b, parts + 1) for a, b in pairwise(pdf.edges)]))
    coarse = pdf.edges[::3]
    np.testing.assert_allclose(pdf.rebin(fine).rebin(coarse).pmf, pdf.rebin(coarse).pmf, atol=1e-12)
    np.testing.assert_allclose(pdf.rebin(fine).pmf.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(pdf.rebin(pdf.edges).pmf, pdf.pmf, atol=1e-12)


@given(masses, widths, st.floats(-0.5, 0.5), st.floats(-1, 1))
@fast
def test_crps(mass, width, place, shift):
    pdf = make(mass, width)
    z = np.full(3, place * pdf.edges[-1] + pdf.edges[-1] / 2)
    found = pdf.crps(z)
    assert (found > 0).all()
    moved = make(mass, width, start=shift)
    np.testing.assert_allclose(moved.crps(z + shift), found, rtol=1e-9, atol=1e-12)
    # E|X - z| - E|X - X'| / 2, both exact: E|X - X'| = 2 int F (1 - F) dx, by Simpson, exact for parabolas
    f = np.concatenate([np.zeros((3, 1)), np.cumsum(pdf.pmf, 1)], 1)
    a, b = f[:, :-1], f[:, 1:]
    mid = (a + b) / 2
    spread = 2 * (pdf.widths * (a * (1 - a) + 4 * mid * (1 - mid) + b * (1 - b)) / 6).sum(1)
    low, high = pdf.edges[:-1], pdf.edges[1:]
    inside = (np.clip(z[:, None], low, high) - low) ** 2 + (high - np.clip(z[:, None], low, high)) ** 2
    outside = np.where(z[:, None] < low, (low + high) / 2 - z[:, None], z[:, None] - (low + high) / 2)
    away = np.where((z[:, None] >= low) & (z[:, None] <= high), inside / 2 / (high - low), outside)
    np.testing.assert_allclose(found, (pdf.pmf * away).sum(1) - spread / 2, rtol=1e-9, atol=1e-12)


def test_crps_shrinks_with_the_bin_that_holds_everything():
    scores = [
        float(BinnedPDF(np.array([0.5 - w / 2, 0.5 + w / 2]), np.ones((1, 1))).crps(np.array([0.5]))[0])
        for w in (1.0, 0.1, 0.01)
    ]
    np.testing.assert_allclose(scores, [1 / 12, 0.1 / 12, 0.01 / 12], rtol=1e-9)


def test_truth_outside_the_support():
    pdf = BinnedPDF(np.array([0.0, 1.0]), np.ones((2, 1)))
    z = np.array([-0.5, 1.25])
    assert pdf.pit(z).tolist() == [0.0, 1.0]
    np.testing.assert_allclose(pdf.crps(z), [1 / 3 + 0.5, 1 / 3 + 0.25])
    assert pdf.pdf(z).tolist() == [0.0, 0.0]
    assert pdf.hpd_level(z).tolist() == [1.0, 1.0]


@given(masses, widths, st.floats(-2, 2))
@fast
def test_estimates_move_with_the_edges(mass, width, shift):
    pdf, moved = make(mass, width), make(mass, width, start=shift)
    for name in ("mean", "median", "quantiles"):
        np.testing.assert_allclose(getattr(moved, name)(), getattr(pdf, name)() + shift, atol=1e-9)
    np.testing.assert_allclose(moved.std(), pdf.std(), atol=1e-9)
    np.testing.assert_allclose(moved.entropy(), pdf.entropy(), atol=1e-12)


@given(masses, widths, st.floats(0.05, 0.95))
@fast
def test_shortest_interval(mass, width, level):
    pdf = make(mass, width)
    low, high = pdf.hpd(level).T
    np.testing.assert_allclose(pdf.cdf(high) - pdf.cdf(low), level, atol=1e-9)
    central = pdf.ppf([(1 - level) / 2, (1 + level) / 2])
    assert (high - low <= np.diff(central, axis=1)[:, 0] + 1e-9).all()
    tried = np.linspace(0, 1 - level, 50)
    rest = pdf.ppf(tried + level) - pdf.ppf(tried)
    assert (high - low <= rest.min(1) + 1e-9).all()


@given(masses, widths, st.integers(1, 5))
@fast
def test_order_and_batch_do_not_matter(mass, width, count):
    """Invariant 12 of the summaries."""
    pdf = make(mass, width)
    whole = pdf.summaries()
    for name, value in pdf[[2, 0]].summaries().items():
        np.testing.assert_allclose(value, whole[name][[2, 0]], atol=1e-12)
    for name, value in pdf[1].summaries().items():
        np.testing.assert_allclose(value, whole[name][1:2], atol=1e-12)


def test_pits_of_own_samples_are_uniform():
    rng = np.random.default_rng(3)
    pdf = make(rng.random((5000, BINS)) ** 4, rng.uniform(0.05, 1, BINS))
    z = pdf.sample(1, generator=torch.Generator().manual_seed(1))[:, 0]
    assert kolmogorov_smirnov_p(pdf.pit(z)) > 1e-4


@given(st.integers(2, 500), st.floats(0.1, 10), hnp.arrays(np.float64, (8,), elements=st.floats(0, 1)))
@fast
def test_training_bins(classes, z_max, share):
    edges, nodes = training_edges(classes, z_max), grid_nodes(classes, z_max)
    assert edges[0] == 0
    assert float(edges[-1]) == pytest.approx(z_max - z_max / classes / 2)
    assert bool((edges.diff() > 0).all())
    z = torch.from_numpy(share * float(edges[-1]))
    found = nearest_node(z, nodes)
    np.testing.assert_array_equal(found, (nodes.double()[None] - z[:, None]).abs().argmin(1))
    # away from the edges the class is the bin that holds z
    inside = (edges[None] - z[:, None]).abs().min(1).values > 1e-6 * z_max
    holds = torch.searchsorted(edges, z, right=True) - 1
    np.testing.assert_array_equal(found[inside], holds[inside])
    np.testing.assert_allclose(bin_edges(nodes)[1:], edges[1:], atol=1e-6 * z_max)


def test_the_last_class_reaches_past_the_support():
    pdf = BinnedPDF.from_logits(np.zeros((1, 400), dtype=np.float32))
    assert nearest_node(np.array([1.599]), grid_nodes(400))[0] == 399
    assert pdf.pit(np.array([1.599]))[0] == 1.0
    assert pdf.nodes[0] == 0
    assert pdf.midpoints[0] == pytest.approx(0.001)


def test_official_grid_stretches_every_estimate():
    """B1: the authors' inference grid against the training grid."""
    train, infer = grid_nodes(400).double(), grid_nodes(400, grid="official-infer").double()
    pmf = torch.rand(5, 400, dtype=torch.float64)
    pmf /= pmf.sum(1, keepdim=True)
    np.testing.assert_allclose((pmf @ infer) / (pmf @ train), 400 / 399, rtol=1e-6)


def test_failed_logits_become_the_uniform_density():
    logits = torch.zeros(2, 4)
    logits[0, 1] = torch.nan
    pmf, failed = density.pmf_from_logits(logits, torch.tensor([1.0, 1.0, 1.0, 2.0]))
    assert failed.tolist() == [True, False]
    torch.testing.assert_close(pmf[0], torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64))
    assert BinnedPDF.from_logits(logits).pmf.sum().item() == pytest.approx(2)


def test_peaks_ties_and_best():
    pdf = BinnedPDF(np.arange(6.0), np.array([[0.4, 0.1, 0.0, 0.1, 0.4], [0.0, 0.5, 0.5, 0.0, 0.0]]))
    assert pdf.peaks().tolist() == [2, 1]
    assert pdf.mode().tolist() == [0.5, 1.5]  # ties: the lowest
    assert pdf.best()[1] in (1.5, 2.5)
    assert 0 <= pdf.outlier_probability()[0] <= 1
    assert pdf.odds()[1] < 1


def test_widths_of_one_bin():
    pdf = BinnedPDF(np.array([0.0, 0.6]), np.ones((1, 1)))
    assert pdf.std()[0] == pytest.approx(0.6 / np.sqrt(12))
    assert pdf.std(official=True)[0] == 0


def test_summaries_have_all_columns():
    found = BinnedPDF.from_logits(torch.randn(4, 50)).summaries()
    assert {"z_mean", "z_mode", "z_median", "z_q16", "z_q84", "z_std", "odds", "n_peaks", "entropy"} <= set(
        found
    )
    assert all(value.shape == (4,) for value in found.values())
    assert len(LEVELS) == 5


def test_gradients():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    edges = torch.tensor([0.0, 0.1, 0.3, 0.4, 0.9, 1.0, 1.3], dtype=torch.float64)
    z = torch.tensor([0.05, 0.35, 1.1], dtype=torch.float64)
    for function in (density.crps, density.cde_loss, density.cdf, density.log_density):
        assert torch.autograd.gradcheck(lambda x, f=function: f(edges, x.softmax(-1), z), (logits,))
    level = torch.tensor([0.2, 0.7], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: density.ppf(edges, x.softmax(-1), level), (logits,))


def test_gradient_survives_the_class():
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    pdf = BinnedPDF(torch.linspace(0, 1, 7), logits.softmax(-1))
    pdf.crps(torch.tensor([0.3, 0.4])).sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) > 0


def test_container(device):
    pdf = BinnedPDF.from_logits(torch.randn(3, 20, device=device))
    assert pdf.is_torch
    assert pdf.pmf.dtype == torch.float64
    assert pdf.pmf.device.type == torch.device(device).type
    back = pdf.numpy()
    assert isinstance(back.pmf, np.ndarray)
    joined = BinnedPDF.concatenate([back, back[0]])
    assert len(joined) == 4
    assert "4 objects, 20 bins" in repr(joined)
    mixed = back.mix([back, back])
    np.testing.assert_allclose(mixed.pmf, back.pmf, atol=1e-15)
    assert len(BinnedPDF(back.edges, back.pmf[:0])) == 0


def test_bfloat16_logits():
    pdf = BinnedPDF.from_logits(torch.randn(3, 20).bfloat16())
    assert pdf.pmf.dtype == torch.float64


def test_wide_masses_of_half_precision_are_taken():
    pmf = torch.rand(4, 300).softmax(-1)
    pdf = BinnedPDF(torch.linspace(0, 1, 301), pmf.half())
    torch.testing.assert_close(pdf.pmf.sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-12, rtol=0)


BAD = [
    (lambda: BinnedPDF(np.arange(3.0), np.ones((1, 3)) / 3), ShapeError, r"pmf has shape \(1, 3\).*edges"),
    (
        lambda: BinnedPDF(np.array([0.0, 2.0, 1.0]), np.ones((1, 2)) / 2),
        DensityError,
        "edges do not increase",
    ),
    (lambda: BinnedPDF(np.arange(3.0), np.array([[2.0, -1.0]])), DensityError, "row 0.*from_logits"),
    (
        lambda: BinnedPDF(np.arange(3.0), np.array([[0.5, 0.5], [0, 0]])),
        DensityError,
        "first is row 1 with sum 0",
    ),
    (lambda: BinnedPDF(np.arange(3.0), np.array([[np.nan, 0.5]])), DensityError, "sum nan"),
    (lambda: BinnedPDF(np.arange(3.0), np.ones((1, 2)) / 2, np.arange(3.0)), ShapeError, r"nodes.*\(2,\)"),
    (
        lambda: BinnedPDF.from_logits(np.zeros((1, 4)), edges=np.arange(4.0)),
        ShapeError,
        r"\(5,\) for 4 logits",
    ),
    (lambda: BinnedPDF.from_logits(np.zeros(4)), ShapeError, r"wanted \(batch, bins\)"),
    (lambda: BinnedPDF(np.arange(3.0), np.ones((1, 2)) / 2).ppf(1.2), ConfigError, r"\[0, 1\]"),
    (lambda: BinnedPDF(np.arange(3.0), np.ones((1, 2)) / 2).hpd(1.0), ConfigError, "level is 1.0"),
    (lambda: BinnedPDF(np.arange(3.0), np.ones((1, 2)) / 2).pit(np.array([np.nan])), DensityError, "z_true"),
    (
        lambda: BinnedPDF(np.arange(3.0), np.ones((1, 2)) / 2).cdf(np.zeros(3)),
        ShapeError,
        r"z has shape \(3,\)",
    ),
    (lambda: BinnedPDF(np.arange(3.0), np.ones((1, 2)) / 2).rebin(np.array([0.5, 2])), DensityError, "cover"),
    (lambda: BinnedPDF(np.arange(3.0), np.ones((0, 2))).stack(), DensityError, "no densities"),
    (lambda: BinnedPDF.concatenate([]), DensityError, "parts is empty"),
    (lambda: grid_nodes(400, grid="other"), ConfigError, "'training' or 'official-infer'"),
    (lambda: grid_nodes(1), ConfigError, "classes is 1"),
    (lambda: bin_edges(np.array([1.0, 0.0])), DensityError, "increase"),
    (lambda: nearest_node(np.array([np.nan]), np.arange(3.0)), DensityError.__mro__[1], "non-finite"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()

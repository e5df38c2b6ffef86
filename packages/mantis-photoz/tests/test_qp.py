"""qp: the exchange format gives back what went in."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.errors import ConfigError, InputError
from fusion_core.seeding import rng
from mantis_photoz import BinnedPDF
from mantis_photoz.grid import grid_nodes, training_edges
from mantis_photoz.qpio import from_qp, read_qp, to_qp, write_qp

qp = pytest.importorskip("qp")


def densities(n=3, bins=12, seed=0, training=True):
    edges = training_edges(bins, 1.2).numpy() if training else np.linspace(0.1, 2, bins + 1)
    nodes = grid_nodes(bins, 1.2).double().numpy() if training else None
    return BinnedPDF(edges, rng(seed).dirichlet(np.ones(bins), n), nodes)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(2, 20), st.integers(0, 99), st.booleans())
def test_invariant_14_qp_files_come_back(tmp_path_factory, n, bins, seed, training):
    pdf = densities(n, bins, seed, training)
    path = tmp_path_factory.mktemp("qp") / "pdf.hdf5"
    write_qp(pdf, path, {"id": np.array([f"g{k}" for k in range(n)]), "flags": np.arange(n)})
    back, ancil = read_qp(path)
    np.testing.assert_allclose(back.edges, pdf.edges, atol=1e-15)
    np.testing.assert_allclose(back.pmf, pdf.pmf, atol=1e-12)
    np.testing.assert_allclose(back.nodes, pdf.nodes, atol=1e-7)
    assert list(ancil["id"]) == [f"g{k}" for k in range(n)]
    assert list(ancil["flags"]) == list(range(n))
    ensemble = qp.read(str(path))
    if not training:  # qp 1.1 takes all bins for equally wide in the moments of a histogram, not in its CDF
        np.testing.assert_allclose(np.ravel(ensemble.mean()), pdf.mean(), atol=1e-9)
    inside = np.linspace(pdf.edges[0], pdf.edges[-1], 7)[1:-1]
    np.testing.assert_allclose(np.reshape(ensemble.cdf(inside), (n, -1)), cdf(pdf, inside), atol=1e-9)


def cdf(pdf, places):
    return np.stack([pdf.cdf(np.full(len(pdf), z)) for z in places], -1)


@pytest.mark.parametrize("kind", ["interp", "quant"])
def test_other_kinds_are_near(kind):
    smooth = np.exp(-0.5 * ((np.arange(40) - 18) / 4.0) ** 2)[None]
    pdf = BinnedPDF(np.linspace(0, 1.6, 41), smooth / smooth.sum())
    ensemble = to_qp(pdf, kind)
    assert np.ravel(ensemble.median())[0] == pytest.approx(pdf.median()[0], abs=5e-3)
    back = from_qp(ensemble, pdf.edges)
    np.testing.assert_allclose(back.pmf, pdf.pmf, atol=8e-3)
    with pytest.raises(InputError, match="no bins of its own; pass edges"):
        from_qp(ensemble)


def test_methods_of_the_class():
    pdf = densities()
    back = BinnedPDF.from_qp(pdf.to_qp())
    np.testing.assert_allclose(back.pmf, pdf.pmf, atol=1e-12)
    coarse = BinnedPDF.from_qp(pdf.to_qp(), pdf.edges[[0, 4, 12]])
    np.testing.assert_allclose(coarse.pmf[:, 0], np.asarray(pdf.pmf)[:, :4].sum(-1), atol=1e-12)


def test_bad_input(tmp_path):
    pdf = densities()
    with pytest.raises(ConfigError, match="kind is 'mixture'"):
        to_qp(pdf, "mixture")
    with pytest.raises(InputError, match=r"wanted a qp\.Ensemble"):
        from_qp(3)
    with pytest.raises(InputError, match=r"wanted a file in \.hdf5"):
        write_qp(pdf, tmp_path / "a.fits")
    with pytest.raises(InputError, match="is no qp file"):
        read_qp(tmp_path / "none.hdf5")
    (tmp_path / "x.hdf5").write_text("x")
    with pytest.raises(InputError, match="is no qp file"):
        read_qp(tmp_path / "x.hdf5")
    write_qp(pdf, tmp_path / "y.hdf5")
    with h5py.File(tmp_path / "y.hdf5", "r+") as file:
        file["meta/bins"][:] = 0.0
    with pytest.raises(InputError, match=r"y\.hdf5: edges do not increase"):
        read_qp(tmp_path / "y.hdf5")

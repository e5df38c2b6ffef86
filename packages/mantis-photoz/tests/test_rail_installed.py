"""The RAIL stages on RAIL itself (extra ``rail``); skipped where it is not installed."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from mantis_files import folder_of, table
from test_estimate import network

from fusion_core.errors import InputError
from mantis_photoz import PhotoZ, rail
from mantis_photoz.qpio import from_qp, read_qp

estimators = pytest.importorskip("rail.estimation.estimator", reason="pip install 'mantis-photoz[rail]'")
LIMITS = {"zmin": 0.0, "zmax": 3.0, "nzbins": 60}


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    place = tmp_path_factory.mktemp("rail")
    catalog = table(5)
    folder_of(place / "cutouts", catalog)
    network().save_pretrained(place / "model")
    columns = {name: np.asarray(catalog[name]) for name in ("ra", "dec", "ebv_csfd", "ebv_planck")}
    columns["object_id"] = np.asarray(catalog["id"]).astype("S")
    columns["redshift"] = np.linspace(0.1, 0.5, 5)
    (place / "nz.json").write_text('{"z": [0, 0.4, 1.6], "n": [1, 1, 0]}')
    return place, catalog, columns


@pytest.fixture
def stages(sky, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # RAIL writes its outputs where it runs
    place, _, columns = sky
    informer = rail.MantisInformer.make_stage(
        name="inform", model_folder=str(place / "model"), hdf5_groupname=""
    )
    model = informer.inform(columns)

    def make(name, **options):
        settings = {"cutout_root": str(place / "cutouts"), "device": "cpu", **LIMITS, **options}
        return rail.MantisEstimator.make_stage(name=name, model=model, **settings)

    return make


def whole(sky, **options):
    place, catalog, _ = sky
    return PhotoZ(network(), device="cpu").estimate(catalog, place / "cutouts", num_workers=0, **options)


def test_they_are_stages_of_rail():
    assert issubclass(rail.MantisEstimator, estimators.CatEstimator)
    assert issubclass(rail.MantisInformer, estimators.CatInformer)
    assert set(rail.OPTIONS) < set(rail.MantisEstimator.config_options)
    theirs = estimators.CatEstimator.config_options
    kept = ("zmin", "zmax", "nzbins", "chunk_size", "hdf5_groupname", "calc_summary_stats", "id_col")
    assert all(rail.MantisEstimator.config_options[name] is theirs[name] for name in kept)


def test_in_memory(sky, stages):
    found = stages("memory", hdf5_groupname="").estimate(sky[2]).data
    expected = whole(sky)
    np.testing.assert_allclose(from_qp(found).pmf, expected.pdf.rebin(np.linspace(0, 3, 61)).pmf, atol=1e-9)
    np.testing.assert_allclose(np.ravel(found.ancil["zmean"]), expected.table["z_mean"], atol=1e-9)
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in found.ancil["id"]]
    assert names == list(sky[1]["id"])
    np.testing.assert_array_equal(found.ancil["redshift"], sky[2]["redshift"])
    assert set(np.ravel(found.ancil["distribution_type"])) == {0}  # ad hoc


def test_chunks_of_a_file(sky, stages, tmp_path):
    with h5py.File(tmp_path / "input.hdf5", "w") as file:
        group = file.create_group("photometry")
        for name, values in sky[2].items():
            group[name] = values
    from rail.core.data import TableHandle

    stage = stages("chunks", hdf5_groupname="photometry", chunk_size=2, calc_summary_stats=True, tta="d4")
    stage.estimate(TableHandle("input", path=str(tmp_path / "input.hdf5")))
    pdf, ancil = read_qp(tmp_path / "output_chunks.hdf5")
    expected = whole(sky, tta="d4").pdf.rebin(np.linspace(0, 3, 61))
    np.testing.assert_allclose(pdf.pmf, expected.pmf, atol=1e-9)
    levels = {"z_q16": 0.16, "z_q84": 0.84, "z_median": 0.5}  # RAIL's own z_q84 is at 0.85
    for name, level in levels.items():
        np.testing.assert_allclose(np.ravel(ancil[name]), expected.ppf(level), atol=1e-6)


def test_a_prior_makes_it_a_posterior(sky, stages):
    found = stages("prior", hdf5_groupname="", prior=str(sky[0] / "nz.json")).estimate(sky[2]).data
    assert set(np.ravel(found.ancil["distribution_type"])) == {1}
    plain = stages("plain", hdf5_groupname="").estimate(sky[2]).data
    assert np.abs(from_qp(found).pmf - from_qp(plain).pmf).max() > 1e-3


def test_bad_input(sky, stages):
    with pytest.raises(InputError, match="model_folder is empty"):
        rail.MantisInformer.make_stage(name="empty", hdf5_groupname="").inform(sky[2])
    with pytest.raises(InputError, match="has no columns"):
        stages("lacking", hdf5_groupname="").estimate({"ra": np.ones(2), "dec": np.ones(2)})
    other = rail.MantisEstimator.make_stage(name="other", model={"sklearn": 1}, hdf5_groupname="")
    with pytest.raises(InputError, match="is none of MantisInformer"):
        other.estimate(sky[2])

"""The RAIL stages on stand-ins for RAIL's base classes, which have the same interface."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from mantis_files import folder_of, table
from test_estimate import network

from fusion_core.errors import InputError, MissingExtraError
from mantis_photoz import PhotoZ, rail
from mantis_photoz.qpio import from_qp

pytest.importorskip("qp")


def parameter(kind, default, msg=""):
    return SimpleNamespace(kind=kind, default=default, msg=msg)


KINDS = SimpleNamespace(ad_hoc="ad_hoc", posterior="posterior")


class Stage:
    config_options: ClassVar = {"hdf5_groupname": parameter(str, ""), "chunk_size": parameter(int, 10000)}

    def __init__(self, **settings):
        values = {name: entry.default for name, entry in self.config_options.items()}
        self.config = SimpleNamespace(**{**values, **settings})
        self.data, self.model = {}, None

    def add_data(self, tag, value):
        self.data[tag] = value


class Informer(Stage):
    pass


class Estimator(Stage):
    config_options: ClassVar = {
        **Stage.config_options,
        "zmin": parameter(float, 0.0),
        "zmax": parameter(float, 3.0),
        "nzbins": parameter(int, 60),
    }

    def open_model(self, model=None, **options):
        self.model = model
        return model

    def _do_chunk_output(self, ensemble, start, end, first, data=None):
        self.data.setdefault("output", []).append((ensemble, start, end, first))


def test_the_stages(tmp_path):
    catalog = table(4)
    cutouts = folder_of(tmp_path / "c", catalog)
    model = network()
    model.save_pretrained(tmp_path / "m")
    informer, estimator = rail.make_stages(Informer, Estimator, parameter, KINDS)
    assert (informer.name, estimator.name) == ("MantisInformer", "MantisEstimator")
    assert set(rail.OPTIONS) < set(estimator.config_options)
    inform = informer(model_folder=str(tmp_path / "m"))
    inform.run()
    stage = estimator(cutout_root=str(cutouts), device="cpu", hdf5_groupname="photometry", tta="2")
    stage.open_model(model=inform.data["model"])
    assert stage.default_distribution_type() == "ad_hoc"
    columns = {name: np.asarray(catalog[name]) for name in ("ra", "dec", "ebv_csfd", "ebv_planck")}
    ids = np.asarray(catalog["id"]).astype("S")
    for start in (0, 2):
        chunk = {name: values[start : start + 2] for name, values in {**columns, "object_id": ids}.items()}
        stage._process_chunk(start, start + 2, {"photometry": chunk}, start == 0)
    (first, *span), (second, *_) = stage.data["output"]
    assert span == [0, 2, True]
    whole = PhotoZ(model, device="cpu").estimate(catalog, cutouts, tta=2)
    got = np.concatenate([np.asarray(from_qp(one).pmf) for one in (first, second)])
    np.testing.assert_allclose(got, whole.pdf.rebin(np.linspace(0, 3, 61)).pmf, atol=1e-9)
    np.testing.assert_allclose(first.ancil["zmode"], whole.table["z_mode"][:2], atol=1e-12)
    own = estimator(cutout_root=str(cutouts), device="cpu", zmax=1.0)
    own.open_model(model=inform.data["model"])
    own._process_chunk(0, 2, {**{k: v[:2] for k, v in columns.items()}, "object_id": ids[:2]}, True)
    assert len(own.data["output"][0][0].metadata["bins"]) == 21  # RAIL's range would lose mass: ours is kept


def test_bad_input():
    informer, estimator = rail.make_stages(Informer, Estimator, parameter, KINDS)
    with pytest.raises(InputError, match="model_folder is empty"):
        informer().run()
    with pytest.raises(InputError, match="is none of MantisInformer"):
        estimator().open_model(model={"sklearn": 1})
    with pytest.raises(InputError, match=r"has no columns \['object_id'\]; it has ra, dec"):
        rail.chunk_table({"ra": [1.0], "dec": [2.0]}, estimator().config)


def test_without_rail():
    try:
        import rail as _  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(MissingExtraError, match=r'pip install "mantis-photoz\[rail\]"'):
            getattr(rail, "MantisEstimator")  # noqa: B009
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        getattr(rail, "Other")  # noqa: B009

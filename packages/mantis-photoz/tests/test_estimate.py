"""``estimate``: every object comes back, whatever is missing, in any order, after any interruption."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from astropy.table import QTable, Table
from hypothesis import given, settings
from hypothesis import strategies as st
from mantis_files import SMALL, folder_of, table, write

from fusion_core.errors import CheckpointError, ConfigError, InputError, StoreError
from fusion_core.seeding import deterministic
from mantis_photoz import PhotoZ, calibrate, citations
from mantis_photoz.calibrate import PITMap, Temperature
from mantis_photoz.config import FusionConfig, SurveyInput
from mantis_photoz.cutouts import Cutouts, FitsDirectory
from mantis_photoz.errors import DataError
from mantis_photoz.flags import Flag
from mantis_photoz.fusion import FusionModel
from mantis_photoz.ood import OutOfDistribution
from mantis_photoz.output import read_pdf
from mantis_photoz.references import bibtex
from mantis_photoz.steps import Options
from mantis_photoz.wcs import Tan

INPUTS = {
    name: SurveyInput(len(s.bands), s.pixels, s.pixel_scale, noise=(1.0,) * len(s.bands), fwhm=s.psf_fwhm)
    for name, s in SMALL.items()
}


def config(fusion="early", align="stretch", **changes):
    encoders = {"early": "small-4"} if fusion == "early" else dict.fromkeys(INPUTS, "small-4")
    given = {"inputs": INPUTS, "bins": 20, "hidden": 16, "size": 12, "scaling": "noise"} | changes
    return FusionConfig(fusion=fusion, align=align, encoders=encoders, **given)


def network(seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FusionModel(config(**changes)).eval()


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimate")
    catalog = table(7, mag=np.arange(7.0))
    return catalog, folder_of(folder / "cutouts", catalog)


def estimate(model, sky, **options):
    photoz = options.pop("photoz", None) or PhotoZ(model, name="small", device="cpu")
    return photoz.estimate(*sky, **({"num_workers": 0} | options))


def test_columns_units_and_words(model, sky):
    found = estimate(model, sky)
    assert isinstance(found.table, Table)
    names = found.table.colnames
    assert names[:7] == ["id", "ra", "dec", "z_mean", "z_mode", "z_median", "z_best"]
    assert {
        "z_q025",
        "z_q16",
        "z_q84",
        "z_q975",
        "z_std",
        "odds",
        "n_peaks",
        "entropy",
        "p_outlier",
        "ood",
    } < set(names)
    assert {"survey_mask", "nan_frac_galex", "nan_frac_ps1", "nan_frac_unwise", "flags", "flags_text"} < set(
        names
    )
    assert names[-3:] == ["ebv_csfd", "ebv_planck", "mag"]
    assert all(found.table[name].info.description for name in names[:-3])
    assert str(found.table["ra"].unit) == "deg"
    assert list(found.table["id"]) == [f"g{k}" for k in range(7)]
    assert (found.table["flags"] == 0).all()
    assert (found.table["survey_mask"] == 7).all()
    assert set(found.table["model"]) == {"small"}
    np.testing.assert_allclose(np.asarray(found.pdf.pmf).sum(-1), 1, atol=1e-12)
    assert repr(found) == "PhotoZResult(7 objects, 20 bins, 0 flagged)"
    assert set(found.throughput()["objects_per_s"]) >= {"read", "prepare", "network", "summarize"}
    assert 0 < found.throughput()["network_share"] <= 1
    record = found.provenance
    assert len(record["files"]) == 21
    assert record["uses"] == ["galex", "ps1", "unwise", "csfd", "planck"]
    assert citations(found)[-2:] == ["chiang2023csfd", "planck2014dust"]
    assert bibtex(citations(found)).count("@article") == 7
    json.dumps(found.to_dict()["provenance"])


@pytest.mark.parametrize(
    ("fusion", "align"), [("early", "wcs"), ("early", "psf"), ("late", "native"), ("hybrid", "native")]
)
def test_other_networks_and_views(sky, fusion, align):
    found = estimate(network(fusion=fusion, align=align), sky)
    assert np.isfinite(found.table["z_mean"]).all()
    assert (found.table["flags"] == 0).all()


def test_no_object_is_lost(model, sky, tmp_path):
    catalog, folder = sky
    more = table(9)
    more["ra"][:7], more["dec"][:7] = catalog["ra"], catalog["dec"]
    more["dec"][8] = -40.0
    own = tmp_path / "c"
    own.mkdir()
    for path in folder.iterdir():
        own.joinpath(path.name).write_bytes(path.read_bytes())
    (own / "g0.galex.fits").unlink()
    (own / "g1.ps1.fits").write_bytes(b"<html>429 Too Many Requests</html>")
    (own / "g2.unwise.fits").write_bytes((own / "g2.unwise.fits").read_bytes()[:3000])
    ps1 = SMALL["ps1"]
    tan = Tan.centered(more["ra"][3], more["dec"][3], pixels=12, scale=0.5)
    write(own / "g3.ps1.fits", np.full((5, 12, 12), np.nan), tan, bands=ps1.bands, EXPTIME=1.0)
    found = estimate(model, (more, own), batch_size=4)
    rows = found.table
    assert list(rows["id"]) == list(more["id"])
    assert rows["flags_text"][0] == "MISSING_GALEX"
    assert rows["flags_text"][1] == "MISSING_PS1|BAD_CUTOUT"
    assert "web page" in rows["notes"][1]
    assert rows["flags_text"][2] == "MISSING_UNWISE|BAD_CUTOUT"
    assert "cut off" in rows["notes"][2]
    assert rows["flags_text"][3] == "MISSING_PS1|NAN_PIXELS"
    assert rows["nan_frac_ps1"][3] == 1
    assert rows["flags_text"][7] == "MISSING_GALEX|MISSING_PS1|MISSING_UNWISE|NO_IMAGES"
    assert "OUTSIDE_PS1" in rows["flags_text"][8]
    assert rows["survey_mask"].tolist() == [6, 5, 3, 5, 7, 7, 7, 0, 0]
    width = np.diff(found.pdf.edges)
    np.testing.assert_allclose(found.pdf.pmf[7], width / width.sum(), atol=1e-12)
    assert found.flagged == 6
    assert found.failed == 2


def test_empty_catalogue(model, sky, tmp_path):
    found = estimate(model, (sky[0][:0], sky[1]))
    assert len(found) == 0
    assert found.table.colnames == estimate(model, sky).table.colnames
    for suffix in (".ecsv", ".fits", ".parquet"):
        found.save(tmp_path / f"e{suffix}")
        assert (
            len(
                Table.read(tmp_path / f"e{suffix}")
                if suffix != ".parquet"
                else read_pdf(tmp_path / "e.parquet")
            )
            == 0
        )


class Broken(FusionModel):
    def classify(self, hidden):
        logits = super().classify(hidden)
        logits[0, 0] = torch.nan
        return logits


def test_non_finite_logits_are_flagged(sky):
    found = estimate(Broken(config()).eval(), sky, batch_size=7)
    assert (found.table["flags"] == [int(Flag.FAILED), *[0] * 6]).all()
    assert found.table["flags_text"][0] == "FAILED"
    assert np.ptp(found.pdf.density[0]) < 1e-12


def test_bins_and_logits_that_differ(sky):
    model = network()
    model.head[2] = torch.nn.Linear(16, 21)
    with pytest.raises(ConfigError, match=r"logits of shape \(7, 21\), its configuration says \(7, 20\)"):
        estimate(model, sky)


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(7)), size=st.integers(1, 8), workers=st.integers(0, 2))
def test_invariant_12_order_and_batch_size(model, sky, order, size, workers):
    whole = estimate(model, sky)
    other = estimate(model, (sky[0][list(order)], sky[1]), batch_size=size, num_workers=workers)
    np.testing.assert_allclose(other.pdf.pmf, np.asarray(whole.pdf.pmf)[list(order)], atol=1e-5)
    assert list(other.table["id"]) == list(sky[0]["id"][list(order)])


@settings(max_examples=8, deadline=None)
@given(turns=st.integers(0, 3), flip=st.booleans())
@pytest.mark.parametrize(("fusion", "align"), [("early", "stretch"), ("late", "native")])
def test_invariant_8_d4_average(sky, fusion, align, turns, flip):
    photoz = PhotoZ(network(fusion=fusion, align=align), device="cpu")
    batch = Cutouts.from_directory(sky[1], sky[0], SMALL).batch(range(4))
    options = Options(tta="d4")
    plain = photoz.predict(batch, options)
    for name in batch.planes:
        turned = torch.rot90(batch.planes[name], turns, (-2, -1))
        batch.planes[name] = turned.flip(-1) if flip else turned
    found = photoz.predict(batch, options)
    np.testing.assert_allclose(found["pmf"], plain["pmf"], atol=1e-6)
    assert found["z_spread"].min() > 0


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["galex", "ps1", "unwise"]))
@pytest.mark.parametrize("missing", ["zeros", "mask"])
def test_invariant_13_masking_what_is_missing(sky, tmp_path_factory, missing, survey):
    folder = tmp_path_factory.mktemp("c")
    for path in sky[1].iterdir():
        if survey not in path.name:
            folder.joinpath(path.name).write_bytes(path.read_bytes())
    photoz = PhotoZ(network(missing=missing), device="cpu")
    kept = [name for name in SMALL if name != survey]
    gone = photoz.estimate(sky[0], folder)
    again = photoz.estimate(sky[0], folder, surveys=kept)
    np.testing.assert_array_equal(gone.pdf.pmf, again.pdf.pmf)
    assert gone.table["flags_text"][0] == again.table["flags_text"][0] == f"MISSING_{survey.upper()}"
    masked = photoz.estimate(*sky, surveys=kept)
    np.testing.assert_array_equal(masked.pdf.pmf, gone.pdf.pmf)


def test_random_views_follow_the_seed(model, sky):
    for tta in ("official", 2):
        first, again, other = (estimate(model, sky, tta=tta, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first.pdf.pmf, again.pdf.pmf)
        assert np.abs(np.asarray(first.pdf.pmf) - other.pdf.pmf).max() > 1e-6
    assert "z_spread" in estimate(model, sky, tta=2).table.colnames
    np.testing.assert_array_equal(estimate(model, sky).pdf.pmf, estimate(model, sky, seed=9).pdf.pmf)


def test_the_official_grid_is_400_over_399(sky):
    model = network()
    ours = estimate(model, sky, official=True)
    photoz = PhotoZ(model, device="cpu", grid="official-infer")
    theirs = estimate(model, sky, photoz=photoz, official=True)
    np.testing.assert_allclose(theirs.table["z_mean"], ours.table["z_mean"] * 20 / 19, rtol=1e-6)


def test_a_model_is_evaluated_and_explained(model, sky):
    """``evaluate`` and ``band_use`` of the object that estimates are the reports of the functions."""
    from mantis_photoz.report import evaluate

    catalog = sky[0].copy()
    catalog["z_spec"] = np.linspace(0.1, 1.2, 7)
    data = Cutouts.from_directory(sky[1], catalog, SMALL)
    photoz = PhotoZ(model, name="small", device="cpu", recalibration=Temperature(0.5))
    found = photoz.evaluate(data, batch_size=3, resamples=5)
    mended = estimate(model, sky, photoz=photoz)
    assert list(found.density) == ["small"]
    wanted = evaluate({"small": mended.pdf}, catalog["z_spec"], resamples=5)
    assert found.metrics["crps"] == pytest.approx(wanted.metrics["crps"], abs=1e-7)
    use = photoz.band_use(data, progress=False)
    assert use.phi.shape == (3, 7)
    with pytest.raises(DataError, match="0 finite redshifts of 7"):
        photoz.evaluate(Cutouts.from_directory(sky[1], sky[0], SMALL))


def test_recalibration_and_prior(model, sky):
    raw = estimate(model, sky)
    photoz = PhotoZ(model, device="cpu", recalibration=Temperature(0.5))
    sharp = estimate(model, sky, photoz=photoz)
    np.testing.assert_allclose(sharp.pdf.pmf, Temperature(0.5)(raw.pdf).pmf, atol=1e-12)
    assert sharp.provenance["settings"]["recalibration"] == ["temperature"]
    width = np.diff(raw.pdf.edges)
    same = estimate(model, sky, prior=width / width.sum())
    np.testing.assert_allclose(same.pdf.pmf, raw.pdf.pmf, atol=1e-12)
    new = np.where(np.arange(20) < 10, 2.0, 0.0) * width
    cut = estimate(model, sky, prior=new)
    assert np.abs(np.asarray(cut.pdf.pmf)[:, 10:]).max() == 0
    assert citations(cut)[-1] == "saerens2002adjusting"


def test_strange_objects_are_flagged(model, sky):
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * 1e-3 + 50
    photoz = PhotoZ(model, device="cpu", ood=OutOfDistribution.fit(features))
    found = estimate(model, sky, photoz=photoz)
    assert (found.table["ood"] == 1).all()
    assert set(found.table["flags_text"]) == {"OUT_OF_DISTRIBUTION"}


def test_a_folder_brings_its_parts(model, sky, tmp_path):
    model.save_pretrained(tmp_path / "m")
    calibrate.save(PITMap((0.0, 0.3, 1.0), (0.0, 0.5, 1.0)), tmp_path / "m" / "recalibration.json")
    (tmp_path / "m" / "prior.json").write_text(json.dumps({"n_train": [1.0] * 20}))
    photoz = PhotoZ.from_pretrained(tmp_path / "m", device="cpu")
    assert photoz.name == "m"
    assert photoz.train_prior.tolist() == [1.0] * 20
    raw = estimate(model, sky)
    np.testing.assert_allclose(
        estimate(model, sky, photoz=photoz).pdf.pmf, photoz.recalibration(raw.pdf).pmf, atol=1e-9
    )
    plain = PhotoZ.from_pretrained(tmp_path / "m", device="cpu", recalibration=False)
    np.testing.assert_allclose(estimate(model, sky, photoz=plain).pdf.pmf, raw.pdf.pmf, atol=1e-9)
    path = tmp_path / "m" / "prior.json"
    for masses, words in (
        ("[1, 1, 1]", r"n_train is of \(3,\), the model has 20 bins"),
        (str(["x"] * 20).replace("'", '"'), "holds no n_train: could not convert"),
        (str([0] * 20), "n_train holds no masses"),
        (str([-1] + [1] * 19), "n_train holds no masses"),
        ("[" * 20_000, "holds no n_train: RecursionError"),
    ):
        path.write_text(f'{{"n_train": {masses}}}' if masses.endswith("]") else masses)
        with pytest.raises(CheckpointError, match=rf"prior\.json.*{words}"):
            PhotoZ.from_pretrained(tmp_path / "m")
    path.write_text(json.dumps({"n_train": [1.0] * 3}))
    with pytest.raises(CheckpointError, match="the model has 20 bins"):
        PhotoZ.from_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="neither a folder"):
        PhotoZ.from_pretrained(str(tmp_path / "none"))


class Interrupted(FitsDirectory):
    def __init__(self, path, after):
        super().__init__(path)
        self.left, self.seen = after, []

    def read(self, identifier, survey, ra, dec):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen.append(identifier)
        return super().read(identifier, survey, ra, dec)


def test_an_interrupted_run_goes_on(model, sky, tmp_path):
    whole = estimate(model, sky, batch_size=2)
    out = tmp_path / "z.ecsv"
    with pytest.raises(KeyboardInterrupt):
        estimate(model, (sky[0], Interrupted(sky[1], 14)), batch_size=2, out=out)
    assert (tmp_path / "z.ecsv.run" / "manifest.jsonl").is_file()
    with pytest.raises(InputError, match="holds an unfinished run; pass --resume"):
        estimate(model, sky, batch_size=2, out=out)
    with pytest.raises(StoreError, match="made with other settings"):
        estimate(model, sky, batch_size=3, out=out, resume=True)
    source = Interrupted(sky[1], -1)
    found = estimate(model, (sky[0], source), batch_size=2, out=out, resume=True)
    assert set(source.seen) == {"g4", "g5", "g6"}
    np.testing.assert_array_equal(found.pdf.pmf, whole.pdf.pmf)
    assert found.provenance["files"] == whole.provenance["files"]
    for name in whole.table.colnames:
        assert (found.table[name] == whole.table[name]).all() or name == "ood", name


@pytest.mark.parametrize("suffix", [".ecsv", ".fits", ".parquet"])
def test_invariant_14_tables_come_back(model, sky, tmp_path, suffix):
    found = estimate(model, sky)
    files = found.save(tmp_path / f"z{suffix}")
    assert [path.name for path in files] == [f"z{suffix}", "z.provenance.json"]
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        raw = pq.read_table(files[0])
        back = {name: np.asarray(raw.column(name).to_pylist()) for name in found.table.colnames}
        assert raw.schema.field("ra").metadata == {b"description": b"right ascension, ICRS", b"unit": b"deg"}
        pdf = read_pdf(files[0])
        np.testing.assert_allclose(pdf.pmf, found.pdf.pmf, atol=1e-7)
        np.testing.assert_array_equal(pdf.edges, found.pdf.edges)
        np.testing.assert_array_equal(pdf.nodes, found.pdf.nodes)
        found.save(tmp_path / "half.parquet", pmf_dtype="float16")
        np.testing.assert_allclose(read_pdf(tmp_path / "half.parquet").pmf, found.pdf.pmf, atol=1e-3)
    else:
        # An empty text is a missing one in ECSV.
        back = (
            QTable.read(files[0]).filled("")
            if suffix == ".ecsv"
            else Table.read(files[0], character_as_bytes=False)
        )
        assert str(back["ra"].unit) == "deg"
        if suffix == ".ecsv":
            assert back["z_mean"].info.description == "mean of p(z)"
        assert back.colnames == found.table.colnames
    for name in found.table.colnames:
        ours, theirs = np.asarray(found.table[name]), np.asarray(getattr(back[name], "value", back[name]))
        if ours.dtype.kind == "f":
            np.testing.assert_array_equal(theirs.astype(ours.dtype), ours)
        else:
            assert list(map(str, theirs)) == list(map(str, ours)), name
    assert json.loads(files[1].read_text())["schema"] == "mantis.provenance/1"


def test_rail_names_and_bad_places(model, sky, tmp_path):
    found = estimate(model, sky)
    found.save(tmp_path / "r.ecsv", columns="rail")
    names = Table.read(tmp_path / "r.ecsv").colnames
    assert {"object_id", "zmode", "zmean", "zmedian", "zstd", "z_q84"} < set(names)
    with pytest.raises(InputError, match=r"wanted a file in .ecsv, .fits, .parquet"):
        found.save(tmp_path / "r.txt")
    with pytest.raises(InputError, match="cannot write"):
        found.save("/proc/none/r.ecsv")
    with pytest.raises(ConfigError, match="columns is 'desc'"):
        found.save(tmp_path / "r.ecsv", columns="desc")
    with pytest.raises(InputError, match="holds no densities"):
        read_pdf(tmp_path / "r.ecsv")
    with pytest.raises(InputError, match="is there already"):
        estimate(model, sky, out=tmp_path / "r.ecsv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tta": "twice"}, "tta is 'twice', wanted 'none', 'd4', 'official' or a number"),
        ({"tta": 0}, "tta is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"surveys": ["sdss"]}, "surveys \\['sdss'\\] are not of the model"),
        ({"surveys": []}, "surveys is empty"),
    ],
)
def test_bad_options(model, sky, options, words):
    with pytest.raises(InputError, match=words):
        estimate(model, sky, **options)


def test_gaps_are_filled_and_said(model, sky, tmp_path):
    catalog = sky[0][:1]
    folder_of(tmp_path / "c", catalog)
    data = np.ones((5, 12, 12), np.float32)
    data[2, 5, 5:8] = np.nan
    tan = Tan.centered(catalog["ra"][0], catalog["dec"][0], pixels=12, scale=0.5)
    write(tmp_path / "c" / "g0.ps1.fits", data, tan, bands=SMALL["ps1"].bands, EXPTIME=1.0)
    with deterministic():
        found = {nan: estimate(model, (catalog, tmp_path / "c"), nan=nan) for nan in ("inpaint", "zero")}
    assert all(one.table["flags_text"][0] == "NAN_PIXELS" for one in found.values())
    assert np.abs(np.asarray(found["zero"].pdf.pmf) - found["inpaint"].pdf.pmf).max() > 1e-6
    assert estimate(model, (catalog, tmp_path / "c"), nan_limit=0.5).table["flags"][0] == 0


def test_lower_precision_and_devices(sky, device):
    reference = estimate(network(), sky)
    photoz = PhotoZ(network(), device=device, dtype="bfloat16")
    half = estimate(None, sky, photoz=photoz)
    np.testing.assert_allclose(half.pdf.pmf, reference.pdf.pmf, atol=0.02)
    assert half.pdf.pmf.dtype == np.float64

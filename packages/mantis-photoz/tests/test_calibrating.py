"""``calibrate`` end to end: cutouts with redshifts to a recalibration file, and that file in ``estimate``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from astropy.table import Table
from mantis_files import SMALL, planes, table, write
from test_estimate import network

from fusion_core.errors import CheckpointError, ConfigError, InputError
from fusion_core.seeding import rng
from fusion_core.testing import run_cli
from mantis_photoz import PhotoZ, calibrate, calibrating
from mantis_photoz.calpit import CalPIT, MonotoneNetwork
from mantis_photoz.cli import main
from mantis_photoz.corrections import choose_features, features_from
from mantis_photoz.cutouts import Cutouts
from mantis_photoz.errors import DataError
from mantis_photoz.metrics import kolmogorov_smirnov
from mantis_photoz.photometry import magnitude_features, measure_batch
from mantis_photoz.wcs import Tan

COUNT = 40


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    """Bright galaxies are near and faint ones far, which a network with random weights does not know."""
    place = tmp_path_factory.mktemp("calibrating")
    (place / "cutouts").mkdir()
    draw = rng(0, "calibrating")
    bright = np.arange(COUNT) % 2 == 0
    z = 1.5 * np.where(bright, draw.beta(2, 9, COUNT), draw.beta(9, 2, COUNT))
    catalog = table(COUNT, z_spec=z)
    for row, near in zip(catalog, bright, strict=True):
        for name, survey in SMALL.items():
            tan = Tan.centered(row["ra"], row["dec"], pixels=survey.pixels, scale=survey.pixel_scale)
            data = planes(survey, row["id"]) + 300 * near * np.abs(planes(survey, row["id"], 1))
            write(place / "cutouts" / f"{row['id']}.{name}.fits", data, tan, bands=survey.bands, EXPTIME=1.0)
    catalog.write(place / "hosts.ecsv")
    network().save_pretrained(place / "model")
    return place


def call(sky, verb, *words):
    common = ("--cutouts", sky / "cutouts", "--model", sky / "model", "--quiet", "--device", "cpu")
    return run_cli(main, verb, sky / "hosts.ecsv", *common, *words)


def load(sky):
    catalog = Table.read(sky / "hosts.ecsv")
    photoz = PhotoZ.from_pretrained(sky / "model", device="cpu", recalibration=False)
    return photoz, Cutouts.from_directory(sky / "cutouts", catalog, photoz.surveys)


def test_calpit_is_conditioned_on_photometry(sky, tmp_path):
    """Section 2.8: x are the 83 features; in estimate the file of calibrate does what it did at the fit."""
    pytest.importorskip("sep")
    out = tmp_path / "mend.safetensors"
    done = call(
        sky, "calibrate", "--kind", "calpit", "--epochs", 80, "--hidden", "24,24", "--out", out, "--json"
    )
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["features"] == "photometric"
    assert [row["objects"] for row in told["rows"]] == [COUNT, COUNT]
    fitted = calibrate.load(out)
    assert isinstance(fitted, CalPIT)
    assert (fitted.network.features, fitted.source, fitted.norm, fitted.floor) == (
        83,
        "photometric",
        "std",
        1e-6,
    )
    # by hand, from the images
    photoz, data = load(sky)
    batch = data.batch(range(COUNT))
    fluxes = measure_batch({name: x.double().numpy() for name, x in batch.planes.items()}).flux
    features = magnitude_features(fluxes, batch.ebv.double().numpy())
    np.testing.assert_allclose(fitted.mean, features.mean(0), rtol=1e-9, atol=1e-12)
    before = photoz.estimate(data.catalog, data.source, num_workers=0).pdf
    by_hand = fitted(before, features)
    after = PhotoZ.from_pretrained(sky / "model", device="cpu", recalibration=out)
    found = after.estimate(data.catalog, data.source, batch_size=7, num_workers=0)
    np.testing.assert_allclose(found.pdf.pmf, by_hand.pmf, atol=1e-6)
    assert found.provenance["uses"][-1] == "calpit"
    assert told["rows"][1]["pit_ks"] == pytest.approx(kolmogorov_smirnov(by_hand.pit(data.z)), abs=1e-6)
    # what one map for all objects cannot know: bright is near
    one = calibrate.PITMap.fit(before, data.z)(before)
    raw, global_, local = (pdf.mean()[1::2].mean() - pdf.mean()[::2].mean() for pdf in (before, one, by_hand))
    assert max(abs(raw), abs(global_)) < 0.05
    assert local > 0.3  # the truth: 0.92


def test_the_features_can_be_chosen(sky, tmp_path):
    pytest.importorskip("sep")
    sizes = {"photometric": 83, "hidden": 16}
    for source, size in sizes.items():
        out = tmp_path / f"{source}.safetensors"
        words = ("--kind", "calpit", "--features", source, "--epochs", 1, "--limit", 12)
        done = call(sky, "calibrate", *words, "--out", out)
        assert done.code == 0, done.stderr
        assert calibrate.load(out).network.features == size
        near = tmp_path / f"{source}.json"
        words = ("--kind", "pit,nearest", "--features", source, "--limit", 12)
        assert call(sky, "calibrate", *words, "--out", near).code == 0
        assert calibrate.load(near).maps[1].features.shape == (12, size)
        assert json.loads(near.read_text())["facts"]["features"] == source
        photoz = PhotoZ.from_pretrained(sky / "model", device="cpu", recalibration=near)
        _, data = load(sky)
        found = photoz.estimate(data.catalog.take(range(3)), data.source, num_workers=0)
        assert found.provenance["settings"]["recalibration"] == ["pit", "nearest"]


def test_without_sep_calpit_takes_the_hidden_layer(monkeypatch):
    assert calibrating.feature_source(["temperature", "pit"]) is None
    assert calibrating.feature_source(["nearest"]) == "hidden"
    assert calibrating.feature_source(["nearest"], "photometric") == "photometric"
    monkeypatch.setattr(calibrating, "find_spec", lambda name: None)
    assert calibrating.feature_source(["calpit"]) == "hidden"
    monkeypatch.setattr(calibrating, "find_spec", lambda name: name)
    assert calibrating.feature_source(["calpit"]) == "photometric"


def test_objects_without_truth_or_images_are_left_out(sky):
    photoz, data = load(sky)
    some = data.take(range(6))
    some.z[2] = np.nan
    whole = calibrating.calibration_set(photoz, some, source="hidden", batch_size=4)
    assert (len(whole.z), whole.left_out, whole.features.shape) == (5, 1, (5, 16))
    np.testing.assert_array_equal(whole.z, data.z[[0, 1, 3, 4, 5]])
    more = table(COUNT, z_spec=np.full(COUNT, 0.4))[:7]
    more["id"] = [*more["id"][:6], "nowhere"]
    lost = Cutouts.from_directory(sky / "cutouts", more, photoz.surveys)
    assert calibrating.calibration_set(photoz, lost).left_out == 1
    with pytest.raises(DataError, match="none of 1 objects has a redshift"):
        calibrating.calibration_set(photoz, lost.take([6]))
    mended = PhotoZ(network(), device="cpu", recalibration=calibrate.Temperature(2.0))
    with pytest.raises(ConfigError, match="has a recalibration already"):
        calibrating.calibration_set(mended, some)


def official_files(folder, features=83, hidden=(8, 8)):
    torch.manual_seed(0)
    made = MonotoneNetwork(features, hidden)
    state = {f"module.{name}": value for name, value in made.state_dict().items()}
    torch.save(state, folder / "calpit_checkpoint.pt")
    draw = rng(0, "statistics")
    np.save(folder / "calpit_mean.npy", draw.normal(size=features))
    np.save(folder / "calpit_std.npy", draw.uniform(0.5, 2, features))
    return made


def test_the_authors_calpit_is_converted(sky, tmp_path):
    """Section 5.4, B3 and B14: their file and statistics, both sides of each switch."""
    pytest.importorskip("sep")
    made = official_files(tmp_path)
    found = {}
    for norm, floor in (("std", 1e-6), ("official", 1e-2)):
        out = tmp_path / f"{norm}.safetensors"
        words = (
            "--statistics",
            tmp_path,
            "--calpit-norm",
            norm,
            "--calpit-floor",
            floor,
            "--out",
            out,
            "--json",
        )
        done = run_cli(main, "convert", tmp_path / "calpit_checkpoint.pt", *words)
        assert done.code == 0, done.stderr
        assert json.loads(done.stdout)["features"] == 83
        found[norm] = calibrate.load(out)
        assert (found[norm].norm, found[norm].floor, found[norm].source) == (norm, floor, "photometric")
        for name, value in made.state_dict().items():
            torch.testing.assert_close(found[norm].network.state_dict()[name], value)
        assert call(sky, "estimate", "--recalibrate", out, "--limit", 3).code == 0
    x = rng(0, "x").normal(size=(2, 83))
    mean, std = (np.load(tmp_path / f"calpit_{name}.npy") for name in ("mean", "std"))
    np.testing.assert_allclose(found["std"].standardize(x), (x - mean) / std / 3, rtol=1e-5)
    np.testing.assert_allclose(found["official"].standardize(x), (x - mean) / mean / 3, rtol=1e-5)
    default = CalPIT.load_official(tmp_path / "calpit_checkpoint.pt", tmp_path)
    assert (default.norm, default.floor) == ("std", 1e-6)
    again = run_cli(main, "convert", tmp_path / "calpit_checkpoint.pt", "--statistics", tmp_path,
                    "--out", tmp_path / "std.safetensors")  # fmt: skip
    assert again.code == 2
    assert "is there already" in again.stderr


def test_bad_official_files(tmp_path):
    official_files(tmp_path)
    file = tmp_path / "calpit_checkpoint.pt"
    np.save(tmp_path / "calpit_std.npy", np.ones(5))
    with pytest.raises(DataError, match=r"shapes \(83,\) and \(5,\), wanted \(83,\)"):
        CalPIT.load_official(file, tmp_path)
    (tmp_path / "calpit_std.npy").unlink()
    with pytest.raises(CheckpointError, match=r"calpit_std\.npy cannot be read"):
        CalPIT.load_official(file, tmp_path)
    with pytest.raises(CheckpointError):
        CalPIT.load_official(tmp_path / "none.pt", tmp_path)
    done = run_cli(main, "convert", file, "--statistics", tmp_path, "--out", tmp_path / "x")
    assert (done.code, "wanted a .safetensors file for Cal-PIT" in done.stderr) == (2, True)


PLANES = {"a": torch.ones(2, 2, 8, 8)}
BAD = [
    (lambda: calibrating.check_kinds([]), ConfigError, "--kind is ''"),
    (lambda: calibrating.check_kinds(["calpit", "pit"]), ConfigError, "or calpit alone"),
    (
        lambda: calibrating.check_kinds(["platt"]),
        ConfigError,
        "--kind is 'platt', wanted some of temperature",
    ),
    (lambda: calibrating.parse_widths("64,0"), ConfigError, "--hidden is '64,0'"),
    (lambda: calibrating.check_place("a.json", ["calpit"]), InputError, "wanted a .safetensors file"),
    (lambda: calibrating.check_place("a.txt", ["pit"]), InputError, "wanted a .json file for pit"),
    (lambda: calibrating.feature_source(["pit"], "hidden"), ConfigError, "--features is 'hidden' for pit"),
    (lambda: calibrating.feature_source(["nearest"], "colors"), ConfigError, "wanted photometric or hidden"),
    (lambda: features_from("colors", None, PLANES, torch.zeros(2, 2)), ConfigError, "features are 'colors'"),
    (lambda: features_from("hidden", None, PLANES, torch.zeros(2, 2)), DataError, "has no hidden layer"),
    (
        lambda: choose_features((5, "hidden"), torch.zeros(2, 4), PLANES, torch.zeros(2, 2)),
        DataError,
        "wants 5 features; 4 are hidden",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()

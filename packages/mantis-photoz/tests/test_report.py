"""Evaluation reports, pictures, band use, and the verbs evaluate, calibrate and explain."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mantis_files import SMALL, folder_of, table
from PIL import Image

from fusion_core.errors import ConfigError, MissingExtraError, ShapeError
from fusion_core.seeding import generator
from fusion_core.testing import run_cli
from mantis_photoz import metrics, plots
from mantis_photoz.band_use import band_use, neg_nmad
from mantis_photoz.cli import main
from mantis_photoz.config import FusionConfig, SurveyInput
from mantis_photoz.cutouts import Cutouts
from mantis_photoz.errors import DataError
from mantis_photoz.fusion import FusionModel
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.report import ESTIMATES, evaluate
from mantis_photoz.samples import CutoutArrays


def densities(n=120, seed=0):
    rng = np.random.default_rng(seed)
    center = rng.uniform(0.2, 1.0, n)
    edges = np.linspace(0, 1.4, 71)
    pmf = np.exp(-0.5 * ((edges[:-1] + 0.01 - center[:, None]) / 0.05) ** 2) + 1e-9
    return BinnedPDF(edges, pmf / pmf.sum(1, keepdims=True)), np.clip(rng.normal(center, 0.08), 0, 1.39)


def test_report_numbers_and_files(tmp_path):
    pytest.importorskip("matplotlib")
    pdf, z = densities()
    z[3] = np.nan  # no spectrum: left out
    magnitude = np.linspace(15, 21, len(z))
    found = evaluate(
        {"raw": pdf, "again": pdf}, z, by={"r_mag": (magnitude, [15, 18, 21])}, resamples=50, title="Test"
    )
    assert [row["estimate"] for row in found.rows] == [*ESTIMATES, *ESTIMATES]
    good = np.isfinite(z)
    expected = metrics.point_metrics(pdf[good].mean(), z[good])
    assert found.metrics["nmad"] == pytest.approx(expected["nmad"])
    assert found.metrics["crps"] == pytest.approx(pdf[good].crps(z[good]).mean())
    for row in found.rows:
        assert row["nmad_low"] <= row["nmad"] * 1.2
        assert row["n"] == good.sum()
    assert {"z_low", "r_mag_low"} == {next(k for k in row if k.endswith("_low")) for row in found.binned}
    found.save(tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.html", "report.json", "table.csv", "zz.png", "pit.png", "qq.png", "nz.png"}
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    assert document["density"]["raw"]["pit_ks"] == pytest.approx(
        metrics.kolmogorov_smirnov(pdf[good].pit(z[good]))
    )
    assert document["n"] == good.sum()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "eta_0.05" in page
    assert "data:image/png" in page
    found.print()


def test_pictures_are_not_blank(tmp_path):
    pytest.importorskip("matplotlib")
    pdf, z = densities()
    draw = np.random.default_rng(0)
    made = {
        "zz": plots.zz(z, pdf.mean()),
        "many": plots.zz(draw.random(3000), draw.random(3000)),
        "pit": plots.pit({"raw": pdf.pit(z), "other": draw.random(50)}),
        "qq": plots.qq(pdf.pit(z)),
        "nz": plots.nz(pdf, z),
        "bars": plots.shares_of({"ps1": (0.3, 0.1), "galex": (-0.1, 0.05)}),
        "shares": plots.shares_by_redshift(z, draw.random((3, len(z))), ["galex", "ps1", "unwise"]),
        "grid": plots.cutout_grid(
            {name: draw.normal(size=(len(s.bands), 12, 12)) for name, s in SMALL.items()}, title="one"
        ),
    }
    for name, picture in made.items():
        path = plots.save(picture, tmp_path / f"{name}.png")
        assert np.asarray(Image.open(path).convert("L")).std() > 5, name
    assert len(made["grid"].axes) == 9
    assert made["grid"].axes[0].get_title() == "FUV"
    with pytest.raises(ShapeError, match="z_hat has shape"):
        plots.zz(z, z[:-1])
    with pytest.raises(ShapeError, match=r"wanted \(1, 120\)"):
        plots.shares_by_redshift(z, np.zeros((2, 120)), ["ps1"])


def test_without_matplotlib_the_report_has_no_pictures(tmp_path, monkeypatch):
    def missing(*_):
        raise MissingExtraError(
            'matplotlib is not installed; it comes with: pip install "mantis-photoz[plot]"'
        )

    monkeypatch.setattr(plots, "require_extra", missing)
    pdf, z = densities(30)
    evaluate(pdf, z, resamples=10).save(tmp_path / "r")
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"report.html", "report.json", "table.csv"}


def test_bad_truth():
    pdf, z = densities(10)
    with pytest.raises(DataError, match="0 finite redshifts of 10"):
        evaluate(pdf, z * np.nan)
    with pytest.raises(DataError, match="wanted one per object"):
        evaluate(pdf, z[:-1])


# ---- band use ----

INPUTS = {
    name: SurveyInput(len(s.bands), s.pixels, s.pixel_scale, noise=(1.0,) * len(s.bands), fwhm=s.psf_fwhm)
    for name, s in SMALL.items()
}


def network(fusion="early", missing="zeros"):
    encoders = {"early": "small-4"} if fusion == "early" else dict.fromkeys(INPUTS, "small-4")
    align = "stretch" if fusion == "early" else "native"
    config = FusionConfig(
        fusion=fusion, inputs=INPUTS, encoders=encoders, align=align, bins=20, hidden=16, size=12,
        scaling="noise", missing=missing,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FusionModel(config).eval()


def samples(n=6):
    made = generator(0, "samples")
    images = {s.name: torch.randn(n, len(s.bands), 12, 12, generator=made) for s in SMALL.values()}
    present = torch.ones(n, 3, dtype=torch.bool)
    present[0, 0] = False
    images["galex"][0] = 0.0
    return CutoutArrays(images, torch.full((n, 2), 0.03), torch.linspace(0.1, 1.2, n), present)


@pytest.mark.parametrize("baseline", ["absent", "zero", "mean", "marginal"])
@pytest.mark.parametrize(("fusion", "missing"), [("early", "zeros"), ("late", "mask")])
def test_band_use_of_surveys(fusion, missing, baseline):
    model, data = network(fusion, missing), samples()
    found = band_use(model, data, baseline=baseline, batch_size=4)
    assert found.players == ["galex", "ps1", "unwise"]
    np.testing.assert_allclose(found.phi.sum(0), found.table[-1] - found.table[0], atol=1e-12)
    from mantis_photoz.predicting import predict

    whole = predict(model, data).pdf.crps(data.z)
    np.testing.assert_allclose(found.table[-1], -np.asarray(whole), atol=1e-6)
    if baseline in ("absent", "zero"):
        # invariant 13: what an object lacks already is a null player
        np.testing.assert_allclose(found.phi[0, 0], 0.0, atol=1e-9)
    again = band_use(model, data, baseline=baseline, batch_size=4)
    np.testing.assert_array_equal(again.table, found.table)
    if baseline != "marginal":  # another object of the batch
        other = band_use(model, data, baseline=baseline, batch_size=5)
        np.testing.assert_allclose(other.table, found.table, atol=1e-6)
    rows = {row["player"]: row for row in found.rows}
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    np.testing.assert_allclose(found.interactions().sum(1), found.phi.mean(1), atol=1e-12)


def test_the_mean_planes_may_be_those_of_the_training_set():
    model, data = network(), samples()
    own = band_use(model, data, baseline="mean", progress=False)
    same = band_use(model, data, baseline="mean", reference=data, progress=False)
    np.testing.assert_array_equal(own.table, same.table)
    dark = CutoutArrays({n: 0 * x for n, x in data.images.items()}, data.ebv, data.z, data.present)
    zero = band_use(model, data, baseline="mean", reference=dark, progress=False)
    wanted = band_use(model, data, baseline="zero", progress=False)
    np.testing.assert_allclose(zero.table, wanted.table, atol=1e-7)
    assert abs(own.table - zero.table).max() > 1e-6


def test_band_use_of_bands_and_files(tmp_path):
    pytest.importorskip("matplotlib")
    model, data = network(), samples(4)
    found = band_use(
        model, data, players="bands", value="z_mean", baseline="zero", batch_size=4, progress=False
    )
    assert found.players == ["nuv", "fuv", "g", "r", "i", "z", "y", "w1", "w2"]
    assert found.table.shape == (512, 4)
    np.testing.assert_allclose(found.phi.sum(0), found.table[-1] - found.table[0], atol=1e-9)
    total = neg_nmad(found)
    assert set(total) == set(found.players)
    found.save(tmp_path / "use")
    assert {"shapley.png", "shapley_redshift.png", "report.json"} <= {
        p.name for p in (tmp_path / "use").iterdir()
    }
    assert len(json.loads((tmp_path / "use" / "report.json").read_text())["game"]) == 512


BAD = [
    ({"players": "pixels"}, ConfigError, "'surveys' or 'bands'"),
    ({"value": "nmad"}, ConfigError, "neg_crps, log_density, z_mean"),
    ({"baseline": "x"}, ConfigError, "'absent', 'zero', 'mean' or 'marginal'"),
    ({"players": "bands"}, ConfigError, "'absent' for bands"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_band_use_refuses(options, error, words):
    with pytest.raises(error, match=words):
        band_use(network(), samples(), **options)


# ---- the command line ----


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    catalog = table(16, z_spec=np.linspace(0.05, 1.3, 16))
    folder_of(folder / "cutouts", catalog)
    catalog.write(folder / "hosts.ecsv")
    network().save_pretrained(folder / "model")
    return folder


def call(place, verb, *words):
    common = (
        "--cutouts",
        str(place / "cutouts"),
        "--model",
        str(place / "model"),
        "--quiet",
        "--device",
        "cpu",
    )
    return run_cli(main, verb, str(place / "hosts.ecsv"), *common, *words)


@pytest.mark.slow
def test_verbs(place, tmp_path):
    mend = tmp_path / "mend.json"
    found = call(place, "calibrate", "--kind", "pit", "--out", str(tmp_path / "pit.json"), "--json")
    assert found.code == 0, found.stderr
    raw, mended = json.loads(found.stdout)["rows"]
    assert mended["pit_ks"] < raw["pit_ks"]
    found = call(place, "calibrate", "--kind", "temperature,nearest", "--out", str(mend), "--json")
    assert found.code == 0, found.stderr
    told = json.loads(found.stdout)
    assert json.loads(mend.read_text())["facts"]["objects"] == 16
    again = call(place, "calibrate", "--out", str(mend))
    assert again.code == 2
    assert "is there already; pass --overwrite" in again.stderr
    out = tmp_path / "report"
    found = call(place, "evaluate", "--recalibrate", str(mend), "--out", str(out), "--json")
    assert found.code == 0, found.stderr
    document = json.loads(found.stdout)
    assert list(document["density"])[1] == "recalibrated"
    raw, better = document["density"].values()
    # the file keeps what calibrate measured on the same objects
    assert raw["pit_ks"] == pytest.approx(told["rows"][0]["pit_ks"], abs=1e-6)
    assert better["pit_ks"] == pytest.approx(told["rows"][1]["pit_ks"], abs=1e-3)
    assert (out / "report.html").is_file()
    found = call(place, "explain", "--out", str(tmp_path / "use"), "--json", "--limit", "5")
    assert found.code == 0, found.stderr
    assert {row["player"] for row in json.loads(found.stdout)["rows"]} == {"galex", "ps1", "unwise"}
    for method in ("gradient", "ablation"):
        found = call(place, "explain", "--method", method, "--json", "--limit", "4")
        assert found.code == 0, found.stderr
    assert json.loads(found.stdout)["rows"][-1]["images"] == "without unwise"


def test_densities_of_an_earlier_run(place, tmp_path):
    pytest.importorskip("qp")
    pdf = tmp_path / "z.hdf5"
    found = call(place, "estimate", "--out", str(tmp_path / "z.ecsv"), "--pdf", str(pdf))
    assert found.code == 0, found.stderr
    first = run_cli(main, "evaluate", str(place / "hosts.ecsv"), "--pdf", str(pdf), "--json")
    second = call(place, "evaluate", "--json")
    assert first.code == second.code == 0
    a, b = (next(iter(json.loads(x.stdout)["density"].values())) for x in (first, second))
    assert a["crps"] == pytest.approx(b["crps"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["calibrate", "--out", "x.json", "--kind", "platt"], "--kind is 'platt'"),
        (["calibrate", "--out", "x.json", "--kind", "calpit"], "wanted a .safetensors file"),
        (["evaluate", "--truth", "redshift"], "redshift"),
        (["explain", "--players", "bands", "--baseline", "absent"], "'absent' for bands"),
        (["explain", "--method", "gradient", "--baseline", "zero"], "--baseline is of --method shapley"),
    ],
)
def test_verbs_refuse(place, words, said):
    found = call(place, words[0], *words[1:])
    assert found.code == 2
    assert said in found.stderr
    assert "Traceback" not in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_cutouts_or_densities_are_needed(place):
    found = run_cli(main, "evaluate", str(place / "hosts.ecsv"))
    assert found.code == 2
    assert "--cutouts is missing" in found.stderr


def test_truth_stays_outside_of_the_mean_redshift(place):
    catalog = table(3)
    data = Cutouts.from_directory(place / "cutouts", catalog, SMALL)
    found = band_use(network(), data, value="z_mean", progress=False)
    assert np.isnan(found.z).all()
    with pytest.raises(DataError, match="no redshifts"):
        band_use(network(), data)

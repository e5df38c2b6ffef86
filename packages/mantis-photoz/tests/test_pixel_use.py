"""Shares of pixel attributions, ablation, and dust as a correction of pixels (sections 2.10 and 2.11)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_report import network, samples

from fusion_core.errors import ConfigError
from mantis_photoz import attribution, metrics
from mantis_photoz.ablation import ablation
from mantis_photoz.config import FusionConfig
from mantis_photoz.dust import deredden
from mantis_photoz.errors import DataError
from mantis_photoz.inputs import prepare, scale, view_scales
from mantis_photoz.pixel_use import METHODS, pixel_use
from mantis_photoz.predicting import predict
from mantis_photoz.samples import CutoutArrays
from mantis_photoz.surveys import SURVEYS

quiet = {"progress": False}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("fusion", "missing"), [("early", "zeros"), ("late", "mask")])
def test_shares(fusion, missing, method):
    model, data = network(fusion, missing), samples()
    found = pixel_use(model, data, method=method, steps=4, batch_size=4, **quiet)
    assert found.players == ["galex", "ps1", "unwise"]
    assert found.shares.shape == (3, 6)
    np.testing.assert_allclose(found.shares.sum(0), 1, atol=1e-9)
    assert found.shares[0, 0] == 0  # the first object has no GALEX
    assert (found.shares[:, 1:] > 0).all()
    np.testing.assert_array_equal(found.z, data.z.numpy())
    bands = pixel_use(model, data, method=method, players="bands", steps=4, batch_size=4, **quiet)
    parts = [bands.shares[:2].sum(0), bands.shares[2:7].sum(0), bands.shares[7:].sum(0)]
    np.testing.assert_allclose(np.stack(parts), found.shares, atol=1e-9)
    if method != "expected":  # whose baselines are drawn batch by batch
        other = pixel_use(model, data, method=method, steps=4, batch_size=1, **quiet)
        np.testing.assert_allclose(other.shares, found.shares, atol=1e-5)
    again = pixel_use(model, data, method=method, steps=4, batch_size=4, **quiet)
    np.testing.assert_array_equal(again.shares, found.shares)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_survey_that_the_network_does_not_see_has_no_share(method):
    model, data = network(), samples()
    with torch.no_grad():
        model.encoder["early"].stem[0].weight[:, :2] = 0
    found = pixel_use(model, data, method=method, steps=8, value="neg_crps", **quiet)
    np.testing.assert_array_equal(found.shares[0], 0)


def test_shares_of_a_known_map():
    """Gradient x input of the packed planes is that of each survey's planes."""
    model, data = network("late"), samples()
    found = pixel_use(model, data, method="gradient", **quiet)
    images = {name: x.requires_grad_(True) for name, x in prepare(data.images, model.config).items()}
    predicted = model(images, data.ebv, data.present)
    from mantis_photoz.band_use import scorer

    scorer(model.config, "z_mean")(predicted, data.z).sum().backward()
    sizes = torch.stack([(x * x.grad).abs().double().sum((1, 2, 3)) for x in images.values()]).detach()
    np.testing.assert_allclose(found.shares, (sizes / sizes.sum(0)).numpy(), rtol=1e-4, atol=1e-9)


def test_redshifts_of_the_model_stand_in(tmp_path):
    pytest.importorskip("matplotlib")
    model, data = network(), samples()
    blind = CutoutArrays(data.images, data.ebv, torch.full((6,), torch.nan), data.present)
    found = pixel_use(model, blind, method="gradient", **quiet)
    np.testing.assert_allclose(found.z, predict(model, data).pdf.mean(official=True), atol=1e-5)
    assert len(found.binned) == 6
    assert {"z_low", "z_high", "galex", "ps1", "unwise", "Lyman break", "4000 A break"} < set(found.binned[0])
    found.save(tmp_path / "r")
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        *("report.html", "report.json", "table.csv", "shares_redshift.png")
    }
    document = json.loads((tmp_path / "r" / "report.json").read_text())
    assert (document["method"], document["objects"], len(document["binned"])) == ("gradient", 6, 6)
    assert "Rest-frame features" in found.to_html()
    with pytest.raises(DataError, match="redshift 0 is nan"):
        pixel_use(model, blind, value="log_density", **quiet)


BAD = [
    ({"method": "shap"}, "method is 'shap', wanted expected, integrated, gradient"),
    ({"players": "pixels"}, "'surveys' or 'bands'"),
    ({"value": "nmad"}, "neg_crps, log_density, z_mean"),
    ({"steps": 0}, "steps is 0"),
    ({"batch_size": 0}, "batch_size is 0"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_input(options, words):
    with pytest.raises(ConfigError, match=words):
        pixel_use(network(), samples(), **options)


# ---- ablation ----


@pytest.mark.parametrize("fusion", ["early", "late"])
def test_ablation(fusion):
    model, data = network(fusion), samples()
    found = {row["images"]: row for row in ablation(model, data, radius=2.0, batch_size=4, **quiet).rows}
    assert list(found)[:3] == ["whole", "aperture only", "aperture, shuffled"]
    assert list(found)[3:] == ["without galex", "without ps1", "without unwise"]
    whole = predict(model, data)
    expected = metrics.point_metrics(whole.pdf.mean().numpy(), data.z.numpy())
    assert found["whole"]["nmad"] == pytest.approx(expected["nmad"], abs=1e-6)
    assert found["whole"]["crps_lost"] == 0
    blind = data.present.clone()
    blind[:, 1] = False
    without = predict(model, data, present=blind)
    crps = float(without.pdf.crps(data.z.double()).mean())
    assert found["without ps1"]["crps"] == pytest.approx(crps, abs=1e-6)
    assert abs(found["aperture only"]["crps_lost"]) > 1e-7
    huge = {row["images"]: row for row in ablation(model, data, radius=1e3, **quiet).rows}
    assert huge["aperture only"] | {"images": ""} == huge["whole"] | {"images": ""}
    with pytest.raises(ConfigError, match="radius is 0"):
        ablation(model, data, radius=0.0)


def test_apertures():
    planes = torch.ones(1, 2, 9, 9)
    found = attribution.aperture_pixels(planes, 2.0)
    assert found[0, 0].sum() == 13
    assert found[0, 0, 4, 4] == 1
    assert found[0, 0, 0, 0] == 0


def test_scales_of_views():
    late = FusionConfig.official("late")
    assert view_scales(late) == {"galex": 1.5, "ps1": 0.25, "unwise": 2.75}
    early = view_scales(FusionConfig.official("early"))
    assert early == pytest.approx({"galex": 1.5 * 22 / 120, "ps1": 0.25, "unwise": 2.75 * 22 / 120})
    true = view_scales(FusionConfig.official("early", align="wcs"))
    assert set(true.values()) == {0.25}


# ---- dust (2.11) ----


def test_pixels_are_dereddened_on_request():
    data = samples()
    plain, clean = network().config, network().config.replace(deredden=True)
    ebv = torch.linspace(0.0, 0.5, 6)[:, None].repeat(1, 2)
    ebv[:, 1] = 9.0  # the coefficients are those of CSFD
    found = scale(data.images, clean, SURVEYS, ebv)
    for name, planes in data.images.items():
        brighter = deredden(planes, ebv[:, 0], coefficients=SURVEYS[name].dust, plane=True)
        torch.testing.assert_close(found[name], scale({**data.images, name: brighter}, plain)[name])
        torch.testing.assert_close(found[name][0], scale(data.images, plain)[name][0])  # E(B-V) = 0
    model = network()
    off = predict(model, data, config=plain)
    on = predict(model, data, config=clean)
    assert (off.logits - on.logits).abs().max() > 1e-4
    dustless = CutoutArrays(data.images, torch.zeros(6, 2), data.z, data.present)
    same = [predict(model, dustless, config=one).logits for one in (plain, clean)]
    torch.testing.assert_close(*same)
    with pytest.raises(ConfigError, match="deredden needs ebv"):
        prepare(data.images, clean)
    bare = {name: survey.replace(dust=()) for name, survey in SURVEYS.items()}
    with pytest.raises(ConfigError, match="R_b of 2 bands of 'galex'"):
        scale(data.images, clean, bare, ebv)

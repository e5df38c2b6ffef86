"""Every recorded number of tests/golden (or of ``--golden DIR``), in float64 and, looser, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import test_golden_models
import test_golden_resample
import torch
from golden_cases import SETTINGS, Case, both_dtypes, unread

from fusion_core.testing import detfill
from mantis_photoz import density, points, views
from mantis_photoz.calibrate import PITMap
from mantis_photoz.calpit import MonotoneNetwork, official_transform
from mantis_photoz.dust import deredden, dust_coefficients, extinction
from mantis_photoz.grid import grid_nodes, nearest_node, training_edges
from mantis_photoz.losses import classifier_loss, cross_entropy
from mantis_photoz.metrics import (
    anderson_darling,
    cde_loss_grid,
    coverage,
    cramer_von_mises,
    eta,
    kolmogorov_smirnov,
    point_metrics,
    residuals,
)
from mantis_photoz.nans import clean_planes, inpaint, nan_fraction
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.photometry import color_features, luptitudes, measure_plane, measure_planes
from mantis_photoz.samplers import sampler_weights
from mantis_photoz.scaling import (
    asinh_inverse,
    asinh_magnitude,
    asinh_magnitude_error,
    asinh_scale,
    clip_scale,
    scale_pixels,
)
from mantis_photoz.shapley import interactions, leave_one_out, mm_shares, shapley_values, shares
from mantis_photoz.surveys import SURVEYS
from mantis_photoz.views import center_crop, official_draw, official_view, resize

POINT_NAMES = (
    "bias",
    "bias_median",
    "nmad",
    "nmad_uncentered",
    "std",
    "sigma68",
    "sigma_iqr",
    "eta_0.05",
    "eta_0.15",
    "outlier_rail",
    "outlier_3sigma",
)


@both_dtypes
def test_transforms(golden, dtype):
    case = Case(golden, "transforms", dtype)
    galex, ps, unwise = (case.tensor(name) for name in ("galex", "ps", "unwise"))
    case.assert_close(scale_pixels(galex, SURVEYS["galex"].scaling), "galex")
    case.assert_close(scale_pixels(ps, SURVEYS["ps1"].scaling), "ps")
    case.assert_close(scale_pixels(unwise, SURVEYS["unwise"].scaling), "unwise")
    case.assert_close(scale_pixels(ps, SURVEYS["ps1"].scaling, signed=True), "ps_signed")
    case.assert_close(scale_pixels(unwise, SURVEYS["unwise"].scaling, signed=True), "unwise_signed")
    told = case.settings["default"]
    scaled = asinh_scale(ps, alpha=told["alpha"], q=told["q"])
    case.assert_close(scaled, "default")
    case.assert_close(asinh_inverse(scaled, alpha=told["alpha"], q=told["q"]), "default_inverse")
    extremes = torch.tensor(case.settings["extremes"], dtype=dtype)
    case.assert_close(extremes, "extremes_in")
    case.assert_close(asinh_scale(extremes, alpha=0.01, q=8.0), "extremes_ps")
    case.assert_close(clip_scale(extremes), "extremes_galex")
    case.assert_all_seen()
    # arrays give arrays, of the same numbers
    assert isinstance(asinh_scale(case.input("ps")), np.ndarray)


@both_dtypes
def test_views(golden, dtype):
    case = Case(golden, "views", dtype)
    surveys = {"galex": case.tensor("galex"), "ps1": case.tensor("ps"), "unwise": case.tensor("unwise")}
    crops, size, step = case.settings["crop"], case.settings["size"], case.settings["step"]
    named = {"ps1" if name == "ps" else name: pixels for name, pixels in crops.items()}
    if not golden.borrowed:
        assert named == views.CROPS  # what the paper's view takes by itself
    every = step["crop_ps"]
    case.assert_close(center_crop(surveys["ps1"], crops["ps"])[..., ::every, ::every], "crop_ps")
    small = center_crop(surveys["galex"], crops["galex"])
    case.assert_close(small, "crop_galex")
    every = step["up"]
    grown = resize(small, size)
    case.assert_close(grown[..., ::every, ::every], "up_galex")
    case.assert_close(grown.sum((-2, -1)), "up_galex_sum")
    grown = resize(center_crop(surveys["unwise"], crops["unwise"]), size)
    case.assert_close(grown[..., ::every, ::every], "up_unwise")
    parts = {"galex": slice(0, 2), "ps": slice(2, 7), "unwise": slice(7, 9)}
    for seed in case.settings["seeds"]:
        draw = official_draw(seed)
        case.assert_close(
            np.array([draw.angle_deg, draw.horizontal, draw.vertical], dtype=float), f"early_{seed}_draw"
        )
        stack = official_view(surveys, draw, fusion="early", size=size, crops=named)
        late = official_view(surveys, draw, fusion="late", crops=named)
        for name, channels in parts.items():
            every = step["early"][name]
            case.assert_close(stack[:, channels, ::every, ::every], f"early_{seed}_{name}")
            every = step["late"][name]
            view = late["ps1" if name == "ps" else name]
            case.assert_close(view[..., ::every, ::every], f"late_{seed}_{name}")
    case.assert_all_seen()


@both_dtypes
def test_training(golden, dtype):
    case = Case(golden, "training", dtype)
    classes, z_max = case.settings["classes"], case.settings["z_max"]
    z, logits = case.tensor("z"), case.tensor("logits")
    nodes = grid_nodes(classes, z_max)
    case.assert_close(nodes, "grid_train")
    infer = grid_nodes(classes, z_max, grid="official-infer")
    case.assert_close(infer, "grid_infer")
    target = nearest_node(z, nodes)
    case.assert_close(target, "target")
    case.assert_close(sampler_weights(target), "sampler_weight")
    case.assert_close(cross_entropy(logits, z, nodes), "loss")
    edges = training_edges(classes, z_max)
    case.assert_close(classifier_loss(logits, z, edges, nodes), "loss")
    pmf, failed = density.pmf_from_logits(logits)
    assert not failed.any()
    point = points.mean(nodes.double(), pmf)
    case.assert_close(point, "point_train_grid")
    case.assert_close(points.mean(infer.double(), pmf), "point_infer_grid")
    found = point_metrics(point, z.double(), thresholds=(0.05, 0.15))
    for name, key in (("nmad", "nmad"), ("bias", "bias"), ("eta_0.05", "eta05"), ("eta_0.15", "eta15")):
        case.assert_close(found[name], key)
    step = float(nodes[1] - nodes[0])
    loss, error = cde_loss_grid(pmf / step, nodes.double(), z.double())
    case.assert_close(torch.stack([loss, error]), "cde_loss")
    case.assert_all_seen()


def scene(case, survey):
    planes = case.input(survey)
    size = planes.shape[-1]
    y, x = np.mgrid[:size, :size].astype(float)
    center, amplitude, s = size // 2, case.settings["amplitude"], case.settings["sigma"][survey]
    r2 = (x - center) ** 2 + (y - center) ** 2
    other = (x - (center + 0.3 * size)) ** 2 + (y - (center - 0.2 * size)) ** 2
    for band, plane in enumerate(planes):
        plane += amplitude * (band + 1) * np.exp(-r2 / (2 * s**2))
        plane += 0.5 * amplitude * np.exp(-other / (2 * s**2))
    return planes


FLUXES = ("flux", "forced", "blank_flux", "blank_forced", "noise_flux", "noise_forced")
FROM_FLUXES = ("luptitude", "features_raw")


def test_photometry(golden):
    case = Case(golden, "photometry")
    pytest.importorskip("sep", reason="sep is not installed: pip install 'mantis-photoz[phot]'")
    found = [measure_planes(scene(case, survey)) for survey in ("galex", "ps", "unwise")]
    flux = np.concatenate([part.flux for part in found])
    case.assert_close(flux, "flux")
    case.assert_close(np.concatenate([part.forced for part in found]), "forced")
    blank_flux, blank_forced = measure_plane(np.zeros((32, 32)))
    case.assert_close(np.float64(blank_flux), "blank_flux")
    case.assert_close(np.bool_(blank_forced), "blank_forced")
    noise_flux, noise_forced = measure_plane(case.input("noise")[case.settings["noise_band"]])
    case.assert_close(np.float64(noise_flux), "noise_flux")
    case.assert_close(np.bool_(noise_forced), "noise_forced")
    case.assert_all_seen(elsewhere=FROM_FLUXES)


@both_dtypes
def test_photometric_features(golden, dtype):
    """From the recorded fluxes and luptitudes, so that no flux routine is needed."""
    case = Case(golden, "photometry", dtype)
    case.assert_close(luptitudes(case.stored("flux")), "luptitude")
    ebv = torch.tensor(case.settings["ebv"], dtype=dtype)
    case.assert_close(color_features(case.stored("luptitude"), ebv), "features_raw")
    case.assert_all_seen(elsewhere=FLUXES)


def test_inpaint(golden):
    case = Case(golden, "inpaint")
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'mantis-photoz[inpaint]'")
    planes = case.input("ps").astype(np.float32)
    bad = case.input("mask") > case.settings["threshold"]
    (top, bottom), (left, right) = case.settings["hole"]
    bad[:, top:bottom, left:right] = True
    planes[bad] = np.nan
    case.assert_close(nan_fraction(planes), "nan_fraction")
    filled = inpaint(planes)
    case.assert_close(filled, "out_zero_filled")
    assert np.isfinite(filled).all()
    np.testing.assert_array_equal(filled[~bad], planes[~bad])  # known pixels are unchanged
    official = inpaint(planes, official=True)
    expected = case["out"]
    finite = np.isfinite(expected)
    np.testing.assert_allclose(official[finite], expected[finite], atol=case.tolerance("out")["atol"])
    np.testing.assert_array_equal(official[~bad], planes[~bad])
    # most of the authors' NaN survive (B21); ours are filled, and equal where theirs are finite
    assert (~np.isfinite(official)).sum() >= (~np.isfinite(expected)).sum() / 2
    np.testing.assert_allclose(filled[finite], expected[finite], atol=case.tolerance("out")["atol"])
    cleaned, share, flagged = clean_planes(planes, nan="official")
    assert np.isfinite(cleaned).all()
    assert flagged.tolist() == (share > 0.01).tolist()
    case.assert_all_seen()


@pytest.mark.parametrize("integrator", ["official", "fast"])
def test_recalibration(golden, integrator):
    case = Case(golden, "recalibration")
    told = case.settings
    logits, x = case.tensor("logits"), case.tensor("features").float()
    network = MonotoneNetwork(x.shape[1], told["hidden"], told["steps"])
    detfill.fill_state_dict(network)
    nodes = torch.linspace(0, told["z_max"], told["nodes"], dtype=torch.float64)
    with torch.no_grad():
        found = official_transform(
            network,
            logits.softmax(-1),
            nodes,
            x,
            floor=told["floor"],
            cells=told["cells"] if integrator == "fast" else None,
        )
    assert found["new_cdf"].dtype == torch.float32
    for name, value in found.items():
        case.assert_close(value, name, variant="fast" if integrator == "fast" else "")
    case.assert_all_seen()


@both_dtypes
def test_pdf_metrics(golden, dtype):
    case = Case(golden, "pdf_metrics", dtype)
    edges, nodes, pmf, z = (case.stored(name) for name in ("edges", "centers", "pmf", "z_true"))
    if case.settings["half_first_bin"]:
        case.assert_close(training_edges(pmf.shape[1], case.settings["z_max"]), "edges")
        torch.testing.assert_close(
            nodes.float(), grid_nodes(pmf.shape[1], case.settings["z_max"]), atol=1e-6, rtol=0
        )
    pdf = BinnedPDF(edges, pmf, nodes)
    levels = case.settings["quantile_levels"]
    case.assert_close(torch.tensor(levels, dtype=dtype), "quantile_levels")
    case.assert_close(pdf.mean(official=True), "mean")
    mode = pdf.mode(official=True)
    case.assert_close(mode, "mode")
    case.assert_close(pdf.mode(), "mode_density")
    quantiles = pdf.quantiles(levels)
    case.assert_close(quantiles, "quantiles")
    case.assert_close(pdf.std(official=True) ** 2, "var_nodes")
    case.assert_close(pdf.std() ** 2, "var_piecewise")
    case.assert_close(pdf.odds(case.settings["odds_width"], official=True), "odds")
    pits = pdf.pit(z)
    case.assert_close(pits, "pit")
    case.assert_close(pdf.crps(z), "crps")
    case.assert_close(pdf.cde_loss(z), "cde_loss", loose={"atol": 1e-3, "rtol": 1e-3})
    case.assert_close(-pdf.log_density(z), "neg_log_density", loose={"atol": 1e-3, "rtol": 1e-3})
    case.assert_close(kolmogorov_smirnov(pits), "ks")
    case.assert_close(cramer_von_mises(pits), "cvm")
    case.assert_close(anderson_darling(pits), "ad")
    case.assert_close(torch.tensor(case.settings["coverage_levels"], dtype=dtype), "coverage_levels")
    case.assert_close(coverage(pits, levels=case.settings["coverage_levels"]), "coverage")
    case.assert_close(pdf.stack().density[0], "nz", loose={"atol": 1e-4, "rtol": 1e-4})
    for name, estimate in (
        ("mean", pdf.mean(official=True)),
        ("mode", mode),
        ("median", pdf.median()),
    ):
        found = point_metrics(estimate, z)
        case.assert_close(torch.stack([found[key] for key in POINT_NAMES]), f"point_{name}")
    fitted = PITMap.fit(pdf, z, knots=case.settings["pit_map_points"])
    case.assert_close(torch.tensor(fitted.x, dtype=torch.float64), "recal_map_x")
    case.assert_close(torch.tensor(fitted.y, dtype=torch.float64), "recal_map_y")
    case.assert_close(fitted(pdf).pmf, "recal_pmf")
    case.assert_all_seen()


def test_pdf_metrics_of_arrays(golden):
    """Arrays in, arrays out, the same numbers."""
    case = Case(golden, "pdf_metrics")
    pdf = BinnedPDF(case["edges"], case["pmf"], case["centers"])
    pits = pdf.pit(case["z_true"])
    assert isinstance(pits, np.ndarray)
    case.assert_close(pits, "pit")
    case.assert_close(pdf.crps(case["z_true"]), "crps")
    assert isinstance(kolmogorov_smirnov(pits), float)
    case.assert_close(np.float64(kolmogorov_smirnov(pits)), "ks")
    assert eta(residuals(pdf.median(), case["z_true"]), threshold=0.05) == case["point_median"][7]


@both_dtypes
def test_magnitudes_and_dust(golden, dtype):
    case = Case(golden, "magnitudes_dust", dtype)
    flux, ebv = case.tensor("flux"), case.tensor("ebv")
    told = case.settings["softening"]
    softening = told["factor"] * (case.tensor("softening") + told["shift"])
    case.assert_close(softening, "softening")
    error = case.tensor("error") + case.settings["error_shift"]
    zero = case.settings["zero_flux"]
    case.assert_close(asinh_magnitude(flux, softening=softening, zero_flux=zero), "asinh_mag")
    case.assert_close(asinh_magnitude_error(flux, error, softening=softening, zero_flux=zero), "asinh_err")
    coefficients = dust_coefficients(case.settings["bands"])
    case.assert_close(torch.tensor(coefficients, dtype=dtype), "R")
    case.assert_close(ebv, "ebv")
    case.assert_close(deredden(flux, ebv, coefficients=coefficients), "dereddened")
    case.assert_close(-extinction(ebv, coefficients=coefficients), "mag_correction")
    case.assert_all_seen()


@both_dtypes
def test_shapley(golden, dtype):
    case = Case(golden, "shapley", dtype)
    for game in ("surveys", "bands"):
        values = case.tensor(game)
        phi = shapley_values(values)
        case.assert_close(phi, f"{game}_phi")
        case.assert_close(interactions(values), f"{game}_interaction")
        case.assert_close(shares(phi), f"{game}_share")
        case.assert_close(leave_one_out(values), f"{game}_leave_one_out")
        case.assert_close(phi.sum(0) - (values[-1] - values[0]), f"{game}_sum_check")
    for name, groups in case.settings["groups"].items():
        case.assert_close(mm_shares(case.tensor("attribution"), groups), f"mm_share_{name}")
    case.assert_all_seen()


READERS = {
    "transforms": [test_transforms],
    "views": [test_views],
    "models": [test_golden_models],
    "training": [test_training],
    "photometry": [test_photometry, test_photometric_features],
    "inpaint": [test_inpaint],
    "recalibration": [test_recalibration],
    "pdf_metrics": [test_pdf_metrics, test_pdf_metrics_of_arrays],
    "magnitudes_dust": [test_magnitudes_and_dust],
    "shapley": [test_shapley],
    "resample": [test_golden_resample],
}


def test_every_file_is_read(golden):
    """A file, or a setting of ``cases.json``, that no test reads is an error, not a silence."""
    assert set(READERS) == set(SETTINGS)
    assert unread(golden.directory, golden.settings) == []


def test_what_nobody_reads_is_an_error(golden, tmp_path):
    for path in golden.directory.iterdir():
        (tmp_path / path.name).write_bytes(b"")
    told = {"prefix": "x/", "files": {name: dict.fromkeys(SETTINGS[name]) for name in SETTINGS}}
    there = {path.stem for path in tmp_path.glob("*.npz")}
    lacking = [f"{name}.npz: in cases.json, but not there" for name in SETTINGS if name not in there]
    assert unread(tmp_path, told) == lacking
    (tmp_path / "more.npz").write_bytes(b"")
    (tmp_path / "views.json").write_text("{}")
    told["files"]["views"]["mirror"] = True
    told["files"].pop("shapley", None)
    (tmp_path / "shapley.npz").write_bytes(b"")
    told["dtype"] = "float64"
    assert set(unread(tmp_path, told)) - set(lacking) == {
        "more.npz: no test reads it",
        "views.json: no test reads it",
        "shapley.npz: no settings in cases.json",
        "views: setting 'mirror' is read by no test",
        "cases.json: 'dtype' is read by no test",
    }


# The tests of the two other files, so that ``--golden DIR`` runs them from here.
for _module in (test_golden_models, test_golden_resample):
    globals().update({name: test for name, test in vars(_module).items() if name.startswith("test_")})

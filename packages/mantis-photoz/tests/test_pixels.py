"""Pixels before the network: scaling, dust, NaN policies, views, augmentation; invariants 8, 10, 16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fusion_core.errors import ConfigError, ShapeError
from fusion_core.seeding import generator
from mantis_photoz import views
from mantis_photoz.dust import deredden, dust_coefficients, extinction
from mantis_photoz.errors import CutoutError, SurveyError
from mantis_photoz.nans import clean_planes, inpaint, nan_fraction
from mantis_photoz.scaling import (
    asinh_inverse,
    asinh_magnitude,
    asinh_magnitude_error,
    asinh_scale,
    clip_scale,
    linear_stack,
)
from mantis_photoz.surveys import BANDS, PLAYERS, SURVEYS, Scaling, Survey, load_surveys, select_surveys

fast = settings(max_examples=25, deadline=None)
pixels = hnp.arrays(np.float64, (30,), elements=st.floats(-1e4, 1e4))


@given(pixels, st.floats(1e-3, 1.0), st.floats(0.5, 20), st.floats(-2, 2))
@fast
def test_scaling_is_monotone_with_a_bounded_slope(a, alpha, q, m):
    x = np.sort(a)
    for signed in (False, True):
        t = asinh_scale(x, alpha=alpha, q=q, m=m, signed=signed)
        assert (np.diff(t) >= -1e-12).all()
        assert (np.diff(t) <= alpha * np.diff(x) + 1e-9).all()  # dT/da <= alpha
        assert signed or (t >= m).all()
    t = asinh_scale(x, alpha=alpha, q=q, m=m, signed=True)
    np.testing.assert_allclose(
        asinh_inverse(t, alpha=alpha, q=q, m=m), x, rtol=1e-9, atol=1e-9 * abs(x).max() + 1e-9
    )
    c = clip_scale(x)
    assert (np.diff(c) >= 0).all()
    assert ((c >= 0) & (c <= 1)).all()


def test_extreme_fluxes_stay_finite(device):
    x = torch.tensor([-1e30, -1e19, 1e19, 1e30], device=device)
    found = asinh_scale(x, signed=True)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, -found.flip(0))
    assert bool(asinh_magnitude(x, softening=1e-10).isfinite().all())


def test_scaling_has_gradients():
    x = torch.tensor([-2.0, 0.5, 30.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: asinh_scale(v, signed=True), (x,))
    assert torch.autograd.gradcheck(lambda v: asinh_magnitude(v, softening=1e-9), (x,))


def test_half_precision_scales():
    assert asinh_scale(torch.tensor([1.0, 2.0]).bfloat16()).dtype == torch.bfloat16


def test_magnitudes():
    flux = np.array([3.631, 363.1, 0.0])  # nanomaggy-like with zero flux 3.631e9
    bright = asinh_magnitude(flux, softening=1e-12)
    np.testing.assert_allclose(bright[:2], [22.5, 17.5], atol=1e-3)
    error = asinh_magnitude_error(flux, np.full(3, 0.3631), softening=1e-12)
    np.testing.assert_allclose(error[0], 2.5 / np.log(10) * 0.1, rtol=1e-3)
    assert np.isfinite(bright).all()
    np.testing.assert_allclose(linear_stack(np.zeros(2), softening=3.0, offset=7.0), 7.0)
    v = 2.5 / np.log(10) * np.arcsinh((100.0 - 7.0) / 6.0)
    np.testing.assert_allclose(linear_stack(np.array([v]), softening=3.0, offset=7.0), 100.0)


@given(hnp.arrays(np.float64, (4, 9), elements=st.floats(-5, 100)), st.floats(0, 2), st.floats(0, 2))
@fast
def test_dust_adds_up(flux, first, second):
    e1, e2 = np.full(4, first), np.full(4, second)
    twice = deredden(deredden(flux, e1), e2)
    np.testing.assert_allclose(twice, deredden(flux, e1 + e2), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(extinction(e1), first * np.array(dust_coefficients())[None].repeat(4, 0))


def test_dust_on_planes():
    planes, ebv = torch.ones(2, 9, 3, 3), torch.tensor([0.0, 0.1])
    found = deredden(planes, ebv, plane=True)
    torch.testing.assert_close(found[:, :, 0, 0], deredden(torch.ones(2, 9), ebv))


def test_surveys(tmp_path):
    assert BANDS == ("nuv", "fuv", "g", "r", "i", "z", "y", "w1", "w2")
    assert PLAYERS == {"galex": (0, 1), "ps1": (2, 3, 4, 5, 6), "unwise": (7, 8)}
    assert {name: s.field_arcsec for name, s in SURVEYS.items()} == {
        "galex": 48.0,
        "ps1": 42.5,
        "unwise": 88.0,
    }
    text = (
        "lsdr10:\n  bands: [g, r, z]\n  pixel_scale: 0.262\n  pixels: 160\n  scaling: {kind: asinh, q: 8}\n"
    )
    (tmp_path / "more.yaml").write_text(text)
    found = load_surveys(tmp_path / "more.yaml")
    assert list(found) == ["galex", "ps1", "unwise", "lsdr10"]
    assert found["lsdr10"].bands == ("g", "r", "z")
    assert found["lsdr10"].crop == 160
    assert Survey.from_dict(found["lsdr10"].to_dict()) == found["lsdr10"]
    (tmp_path / "more.toml").write_text('[hsc]\nbands = ["i"]\npixel_scale = 0.168\npixels = 64\n')
    assert load_surveys(tmp_path / "more.toml")["hsc"].scaling == Scaling()
    assert SURVEYS["unwise"].replace(pixel_scale=1.5).pixel_scale == 1.5  # B4
    assert SURVEYS["unwise"].pixel_scale == 2.75


# ---- NaN ----


def test_policies():
    """B8 and B21: both sides."""
    rng = np.random.default_rng(0)
    planes = rng.normal(20, 1, (2, 16, 16)).astype(np.float32)
    whole = planes.copy()
    planes[0, 4:6, 4:6], planes[1, 3, 3] = np.nan, np.inf
    np.testing.assert_allclose(nan_fraction(planes), [4 / 256, 1 / 256])
    zero, share, flagged = clean_planes(planes, nan="zero")
    assert zero[0, 4, 4] == 0
    assert flagged.tolist() == [True, False]  # the authors' rule is never true
    assert share.tolist() == [4 / 256, 1 / 256]
    pytest.importorskip("cv2")
    filled, _, _ = clean_planes(planes)
    assert np.isfinite(filled).all()
    assert abs(filled[0, 4:6, 4:6] - 20).max() < 3  # near the neighbours
    known = np.isfinite(planes)
    np.testing.assert_array_equal(filled[known], whole[known])
    official, _, _ = clean_planes(planes, nan="official")
    assert np.isfinite(official).all()
    assert inpaint(np.full((1, 4, 4), np.nan)).tolist() == np.zeros((1, 4, 4)).tolist()
    planes[0][rng.random((16, 16)) < 0.3] = np.nan
    assert np.isnan(inpaint(planes, official=True)).sum() >= 1  # NaN survive there
    assert np.isfinite(inpaint(planes)).all()


# ---- views ----


def batch(n=3, seed=0):
    made = torch.Generator().manual_seed(seed)
    sizes = {"galex": (2, 32), "ps1": (5, 170), "unwise": (2, 32)}
    return {name: torch.rand(n, c, s, s, generator=made) for name, (c, s) in sizes.items()}


def test_official_views():
    planes = batch(1)
    stack = views.stretch_view(planes)
    assert stack.shape == (1, 9, 120, 120)
    torch.testing.assert_close(stack[:, 2:7], planes["ps1"][..., 25:145, 25:145])
    late = views.late_view(planes)
    assert {name: tuple(x.shape[-2:]) for name, x in late.items()} == {
        "galex": (32, 32),
        "ps1": (120, 120),
        "unwise": (32, 32),
    }
    # no turn, no flip: the random view is the fixed one (B2)
    torch.testing.assert_close(views.official_view(planes, views.Draw(0.0, False, False)), stack)
    first, second = views.official_draw(3), views.official_draw(3)
    assert first == second != views.official_draw(4)


def test_a_quarter_turn_is_exact():
    x = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(views.rotate_nearest(x, 90.0), torch.rot90(x, 1, (-2, -1)))
    torch.testing.assert_close(views.rotate_nearest(x, 180.0), torch.rot90(x, 2, (-2, -1)))
    assert bool((views.rotate_nearest(x, 45.0)[..., 0, 0] == 0).all())


def test_d4_is_a_group_and_its_mean_does_not_depend_on_the_pose():
    """Invariant 8, with a network that has no symmetry."""
    planes = batch(2)
    torch.manual_seed(0)
    weight = {name: torch.randn_like(x[0]) for name, x in planes.items()}

    def model(view):
        return torch.stack([(view[name] * weight[name]).flatten(1).sum(1) for name in view], 1).softmax(-1)

    def averaged(view):
        return torch.stack([model(v) for v in views.d4_views(view)]).mean(0)

    wanted = averaged(planes)
    seen = set()
    for element in range(views.ELEMENTS):
        turned = {name: views.d4(x, element) for name, x in planes.items()}
        torch.testing.assert_close(averaged(turned), wanted, atol=1e-6, rtol=1e-5)
        seen.add(tuple(turned["galex"].flatten().tolist()))
    assert len(seen) == views.ELEMENTS


def test_augmentation_per_object():
    planes = batch(4)
    found = views.augment(planes, generator=generator(0, "a"))
    for name, x in planes.items():
        for i in range(4):
            fits = [bool(torch.equal(found[name][i], views.d4(x[i], e))) for e in range(8)]
            assert sum(fits) == 1
    elements = {
        next(e for e in range(8) if torch.equal(found["ps1"][i], views.d4(planes["ps1"][i], e)))
        for i in range(4)
    }
    assert len(elements) > 1  # not one draw for the batch
    shared = views.augment(planes, generator=generator(0, "a"), kind="d4-batch")
    assert any(torch.equal(shared["ps1"], views.d4(planes["ps1"], e)) for e in range(8))
    same = views.augment(planes, generator=generator(0), kind="none")
    assert all(torch.equal(same[name], x) for name, x in planes.items())
    again = views.augment(planes, generator=generator(0, "a"))
    assert all(torch.equal(again[name], x) for name, x in found.items())


def test_any_angle_keeps_a_round_source_and_jitter_moves_it():
    y, x = torch.meshgrid(torch.arange(65.0) - 32, torch.arange(65.0) - 32, indexing="ij")
    source = torch.exp(-(x**2 + y**2) / 50)[None, None].repeat(3, 1, 1, 1)
    turned = views.augment({"a": source}, generator=generator(1), kind="rotate", pixel_scales={"a": 1.0})["a"]
    assert float((turned - source).abs().max()) < 0.02
    moved = views.augment(
        {"a": source}, generator=generator(1), kind="none", jitter=5.0, pixel_scales={"a": 1.0}
    )
    top = moved["a"].flatten(1).argmax(1)
    away = torch.stack([top // 65 - 32, top % 65 - 32], 1)
    assert 0 < int(away.abs().max()) <= 5
    # the same place on the sky for a survey with twice the scale
    both = views.augment(
        {"a": source, "b": source},
        generator=generator(1),
        kind="none",
        jitter=5.0,
        pixel_scales={"a": 1.0, "b": 2.0},
    )
    other = both["b"].flatten(1).argmax(1)
    half = torch.stack([other // 65 - 32, other % 65 - 32], 1)
    assert int((half * 2 - away).abs().max()) <= 1
    rough = views.augment({"a": source}, generator=generator(1), kind="none", noise=0.1)["a"]
    assert float((rough - source).std()) == pytest.approx(0.1, rel=0.1)


def test_surveys_are_dropped_but_never_all():
    present = torch.ones(4000, 3, dtype=torch.bool)
    present[0] = torch.tensor([False, False, True])
    kept = views.drop_surveys(present, torch.tensor([0.15, 0.05, 0.15]), generator=generator(0))
    assert bool(kept.any(1).all())
    assert bool((kept <= present).all())
    assert kept[0].tolist() == [False, False, True]
    np.testing.assert_allclose(1 - kept[1:].float().mean(0), [0.15, 0.05, 0.15], atol=0.02)


BAD = [
    (lambda: clip_scale(np.zeros(1), scale=0.0), ConfigError, "scale is 0.0"),
    (lambda: asinh_scale(np.zeros(1), alpha=-1.0), ConfigError, "alpha is -1.0"),
    (lambda: asinh_inverse(np.zeros(1), q=0.0), ConfigError, "q is 0.0"),
    (lambda: Scaling(kind="log"), SurveyError, "'clip' or 'asinh'"),
    (lambda: Survey(name="x", bands=(), pixel_scale=1, pixels=3), SurveyError, "wanted a name and a band"),
    (lambda: Survey(name="x", bands=("g", "g"), pixel_scale=1, pixels=3), SurveyError, "each once"),
    (
        lambda: Survey(name="x", bands=("g",), pixel_scale=1, pixels=3, dust=(1.0, 2.0)),
        SurveyError,
        "dust of x",
    ),
    (lambda: Survey(name="x", bands=("g",), pixel_scale=0, pixels=3), ConfigError, "pixel_scale of x"),
    (lambda: Survey(name="x", bands=("g",), pixel_scale=1, pixels=3, crop=4), ConfigError, "crop of x"),
    (lambda: Survey.from_dict({"name": "x", "band": ["g"]}), SurveyError, r"unknown entries \['band'\]"),
    (lambda: select_surveys("ps1,sdss"), SurveyError, "galex, ps1, unwise"),
    (lambda: load_surveys("nowhere.yaml"), SurveyError, "nowhere.yaml cannot be read"),
    (lambda: load_surveys(__file__), SurveyError, "wanted .yaml, .toml or .json"),
    (lambda: dust_coefficients(["u"]), SurveyError, r"\['u'\] have no R_b"),
    (lambda: clean_planes(np.full((1, 2, 2), np.nan), nan="error"), CutoutError, r"planes \[0\] hold NaN"),
    (lambda: clean_planes(np.zeros((1, 2, 2)), nan="mean"), ConfigError, "nan is 'mean'"),
    (lambda: inpaint(np.zeros((2, 2))), CutoutError, r"wanted \(bands, height, width\)"),
    (
        lambda: views.center_crop(torch.zeros(1, 8, 8), 9),
        ShapeError,
        "8 x 8 pixels, wanted at least the crop, 9",
    ),
    (lambda: views.stretch_view({"ps1": torch.zeros(5, 170, 170)}), ShapeError, "of one batch"),
    (lambda: views.d4(torch.zeros(2, 2), 8), ConfigError, "element is 8"),
    (
        lambda: views.augment({"a": torch.zeros(1, 1, 2, 2)}, generator=generator(0), kind="x"),
        ConfigError,
        "'d4'",
    ),
    (
        lambda: views.augment({"a": torch.zeros(1, 1, 2, 3)}, generator=generator(0)),
        ShapeError,
        "wanted squares",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()

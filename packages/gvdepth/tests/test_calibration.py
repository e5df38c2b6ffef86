"""Invariant 11 of section 8: calibration from depth, and the doctor."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gvdepth_strategies import CAMERA, floats
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.errors import ConfigError, DataError, InputError, ShapeError
from gvdepth import Calibration, CalibrationError, Camera, calibrate, doctor, ground_depth
from gvdepth.diagnosis import fit_inverse_plane
from gvdepth.plane import attitude_of_normal, fit_plane, ransac_plane
from gvdepth.resampling import bootstrap

few = settings(max_examples=25, deadline=None)
SMALL = {"fx": 60.0, "fy": 62.0, "cx": 39.5, "cy": 22.0, "width": 80, "height": 60}


@st.composite
def rigs(draw):
    return Camera.exact(
        **SMALL,
        camera_height=draw(floats(0.4, 3.0)),
        pitch_deg=draw(floats(-6.0, 6.0)),
        roll_deg=draw(floats(-6.0, 6.0)),
    )


def road(camera, far=20.0):
    depth = ground_depth(camera, backend="numpy", dtype=np.float64)
    return np.where(np.isfinite(depth), depth, 0.0), np.isfinite(depth) & (depth < far)


@few
@given(rigs())
def test_calibration_recovers_the_camera(camera):
    depth, mask = road(camera)
    for mount in (camera, camera.computed(camera_height=None, pitch_deg=0.0, roll_deg=0.0)):
        found = calibrate([depth], [mask], mount)
        height, pitch_deg, roll_deg = found
        assert height == pytest.approx(camera.camera_height, abs=1e-6)
        assert pitch_deg == pytest.approx(camera.pitch_deg, abs=1e-6)
        assert roll_deg == pytest.approx(camera.roll_deg, abs=1e-6)
    assert found.inliers == 1.0
    assert found.pitch == pytest.approx(camera.pitch, abs=1e-7)
    assert found.roll == pytest.approx(camera.roll, abs=1e-7)


@settings(max_examples=8, deadline=None)
@given(rigs(), st.integers(0, 2**20))
def test_calibration_survives_noise_and_outliers(camera, seed):
    """2 cm of noise along the plane's normal and 20 % outliers, over a handful of images."""
    draw = np.random.default_rng(seed)
    depth, mask = road(camera, 15.0)
    depths = []
    for _ in range(9):
        # A point moved along its ray by dz leaves the plane by dz (n . r) = dz h / depth.
        noisy = depth + draw.normal(0, 0.02, depth.shape) * depth / camera.camera_height
        wild = draw.random(depth.shape) < 0.2
        noisy[wild] *= draw.uniform(0.3, 1.3, np.count_nonzero(wild))
        depths.append(noisy)
    found = calibrate(depths, [mask] * 9, camera, seed=seed, max_depth=25.0)
    assert found.camera_height == pytest.approx(camera.camera_height, rel=0.01)
    assert found.pitch_deg == pytest.approx(camera.pitch_deg, abs=0.05)
    assert found.roll_deg == pytest.approx(camera.roll_deg, abs=0.05)
    assert 0.6 < found.inliers < 0.95
    assert found.per_image.shape == (9, 4)


def test_calibration_takes_tensors_several_cameras_and_skips_what_shows_no_road():
    cameras = [Camera.exact(**SMALL, camera_height=1.5, pitch_deg=p) for p in (1.0, 2.0, 3.0)]
    maps = [torch.from_numpy(road(camera)[0])[None].float() for camera in cameras]
    empty = torch.zeros(1, 60, 80)
    found = calibrate([*maps, empty], None, [*cameras, cameras[0]])
    assert found.pitch_deg == pytest.approx(2.0, abs=1e-3)
    assert np.isnan(found.per_image[3]).all()
    again = calibrate([*maps, empty], None, [*cameras, cameras[0]])
    np.testing.assert_array_equal(again.per_image, found.per_image)  # the draws follow from the seed
    mounted = found.apply(cameras[0])
    assert (mounted.camera_height, mounted.pitch_deg) == (found.camera_height, found.pitch_deg)
    assert isinstance(found, Calibration)
    assert "per_image=float64 (4, 4)" in repr(found)


@few
@given(rigs(), st.integers(3, 50), st.integers(0, 2**20))
def test_a_plane_through_points_on_it(camera, count, seed):
    draw = np.random.default_rng(seed)
    along = np.linalg.svd(camera.normal[None])[2][1:]
    points = camera.normal * camera.camera_height + draw.uniform(-10, 10, (count, 2)) @ along
    if np.linalg.svd(points - points.mean(0), compute_uv=False)[1] < 1e-3:
        return
    height, pitch_deg, roll_deg = fit_plane(points)
    assert height == pytest.approx(camera.camera_height, abs=1e-6)
    assert (pitch_deg, roll_deg) == pytest.approx((camera.pitch_deg, camera.roll_deg), abs=1e-6)
    assert attitude_of_normal(camera.normal) == pytest.approx((camera.pitch_deg, camera.roll_deg), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda d, m, c: calibrate([], None, c), DataError, "depths is empty"),
        (lambda d, m, c: calibrate([d], [m, m], c), ShapeError, "2 road_masks for 1 depth maps"),
        (lambda d, m, c: calibrate([d, d], None, [c]), ShapeError, "1 cameras for 2 depth maps"),
        (
            lambda d, m, c: calibrate([d], [m.astype(float)], c),
            DataError,
            r"road_masks\[0\] is float64, wanted bool",
        ),
        (lambda d, m, c: calibrate([d], [m[:-1]], c), ShapeError, r"road_masks\[0\] has shape \(59, 80\)"),
        (lambda d, m, c: calibrate([d[0]], None, c), ShapeError, r"depths\[0\] has shape \(80,\)"),
        (lambda d, m, c: calibrate([d[:40]], None, c), InputError, "another aspect"),
        (
            lambda d, m, c: calibrate([d * 0], None, c),
            CalibrationError,
            "none of 1 images has 100 road pixels nearer",
        ),
        (lambda d, m, c: calibrate([d], None, c, max_depth=0), ConfigError, "max_depth is 0"),
        (
            lambda d, m, c: fit_plane(np.zeros((2, 3))),
            ShapeError,
            r"points has shape \(2, 3\), wanted \(n, 3\)",
        ),
        (
            lambda d, m, c: ransac_plane(np.zeros((2, 3)), rng=np.random.default_rng(0)),
            CalibrationError,
            "2 road points",
        ),
        (
            lambda d, m, c: ransac_plane(np.ones((9, 3)), rng=np.random.default_rng(0)),
            CalibrationError,
            "on one line",
        ),
        (lambda d, m, c: doctor([d], c, band=0.0), ConfigError, "band is 0.0"),
        (lambda d, m, c: doctor([d], c, uncertainties=[]), ShapeError, "0 uncertainties for 1 maps"),
        (lambda d, m, c: doctor([d], c, model=d, uncertainties=[d]), ConfigError, "come from the model"),
        (lambda d, m, c: doctor([d * 0], c), CalibrationError, "none of 1 frames has 500 road pixels"),
        (lambda d, m, c: doctor([d], c, model=lambda image, camera: image), DataError, "no depth_focal"),
        (
            lambda d, m, c: doctor([d], [c, c], model=lambda image, camera: image),
            ShapeError,
            "2 cameras for 1 images",
        ),
        (lambda d, m, c: bootstrap(np.array([math.nan])), InputError, "values is empty"),
        (lambda d, m, c: bootstrap(np.ones(3), resamples=0), ConfigError, "resamples is 0"),
    ],
)
def test_bad_input(call, error, words):
    camera = Camera.exact(**SMALL, camera_height=1.5)
    with pytest.raises(error, match=words):
        call(*road(camera), camera)


# The doctor


@few
@given(rigs(), floats(-2.5, 2.5), floats(-1.5, 1.5), floats(0.85, 1.15))
def test_the_inverse_plane_is_exact(camera, pitch, roll, ratio):
    """The road's plane is linear in 1/D, so that a wrong prior does not matter."""
    depth, _ = road(camera, 100.0)
    prior = camera.rotate(pitch, roll).computed(camera_height=camera.camera_height * ratio)
    found = fit_inverse_plane(depth, prior, minimum_pixels=30, depth_range=(1.0, 25.0))
    if found is None:  # too little road near the prior plane
        return
    assert found.camera_height == pytest.approx(camera.camera_height, rel=1e-6)
    assert found.pitch_deg == pytest.approx(camera.pitch_deg, abs=1e-5)
    assert found.roll_deg == pytest.approx(camera.roll_deg, abs=1e-5)


def frames(camera, count=32, noise=0.02, seed=0):
    """A road with cars on it, of a noisy depth sensor, with the pitch swinging a little."""
    draw = np.random.default_rng(seed)
    made = []
    for swing in np.linspace(-0.2, 0.2, count):
        depth, _ = road(camera.rotate(swing), 60.0)
        depth = depth * (1 + draw.normal(0, noise, depth.shape))
        column = draw.integers(0, camera.width - 30)
        part = depth[20:, column : column + 30]
        part[(part == 0) | (part > 9.0)] = 9.0  # something upright that hides the road behind it
        made.append(depth)
    return made


@pytest.fixture(scope="module")
def truth():
    return Camera.exact(**CAMERA | {"roll_deg": 0.5}).resize(160, 100)


def test_the_doctor_finds_a_wrong_pitch(truth):
    given = truth.rotate(-0.8)
    found = doctor(frames(truth), given)
    assert found.healthy is False
    assert found.pitch_bias_deg.value == pytest.approx(0.8, abs=0.08)
    assert found.pitch_bias_deg.low <= found.pitch_bias_deg.value <= found.pitch_bias_deg.high
    assert found.roll_bias_deg.value == pytest.approx(0.0, abs=0.1)
    assert found.height_ratio.value == pytest.approx(1.0, abs=0.02)
    assert "looks 0." in found.verdict
    assert "further up than its pitch_deg says" in found.verdict
    assert (found.frames, found.used, len(found.rows)) == (32, 32, 32)


def test_the_doctor_leaves_a_right_camera_alone_and_wants_thirty_frames(truth, tmp_path):
    found = doctor(frames(truth), truth)
    assert found.healthy is True
    assert found.verdict.startswith("Your camera's numbers look right")
    few_frames = doctor(frames(truth, 5), truth)
    assert few_frames.healthy is None
    assert few_frames.verdict.startswith("No verdict: 5 frames show enough road, 30 are needed")
    found.save(tmp_path / "report")
    assert {p.name for p in (tmp_path / "report").iterdir()} >= {"report.html", "report.json", "table.csv"}
    assert found.to_dict()["healthy"] is True


def test_the_doctor_finds_a_wrong_height_and_a_wrong_scale(truth):
    wrong = truth.computed(camera_height=truth.camera_height * 0.9)
    found = doctor(frames(truth), wrong)
    assert found.healthy is False
    assert found.height_ratio.value == pytest.approx(1 / 0.9, rel=0.02)
    assert "times its camera_height (or the depth is off)" in found.verdict
    scaled = doctor([1.1 * depth for depth in frames(truth)], truth)
    assert scaled.height_ratio.value == pytest.approx(1.1, rel=0.02)
    assert scaled.pitch_bias_deg.value == pytest.approx(0.0, abs=0.1)  # a scale is no angle


def test_the_doctor_asks_a_model_for_its_focal_depth(truth):
    depths = frames(truth)
    model = SimpleNamespace(
        predict=lambda image, camera: SimpleNamespace(
            depth=image * 0,
            depth_focal=torch.from_numpy(image),
            uncertainty_focal=torch.from_numpy(0.02 * image),
        )
    )
    found = doctor(depths, truth, model=model)
    assert found.healthy is True
    plainly = doctor(depths, truth, uncertainties=[0.02 * depth for depth in depths])
    assert plainly.pitch_bias_deg == found.pitch_bias_deg
    # Pixels that are said to be unsure count for less.
    wild = [np.where(np.arange(100)[:, None] < 55, depth * 1.05, depth) for depth in depths]
    unsure = [np.where(np.arange(100)[:, None] < 55, 50.0, 0.02) * np.ones((100, 160)) for _ in depths]
    fooled, warned = doctor(wild, truth), doctor(wild, truth, uncertainties=unsure)
    assert abs(warned.pitch_bias_deg.value) < abs(fooled.pitch_bias_deg.value)

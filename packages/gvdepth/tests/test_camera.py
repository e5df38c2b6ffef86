"""The camera: its numbers, its algebra (invariant 12 of section 8), and what it refuses."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from gvdepth_strategies import CAMERA, cameras, double, floats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gvdepth
from fusion_core.errors import FusionWarning
from gvdepth import Camera, CameraError
from gvdepth.camera import rotation_homography
from gvdepth.cameras import KITTI_INTRINSICS, PRESETS, Preset
from gvdepth.geometry import down_component

few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = ("fx", "fy", "cx", "cy", "camera_height", "pitch_deg", "roll_deg")


def assert_same(one, two, rel=1e-12):
    assert one.size == two.size
    for name in NUMBERS:
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=rel, abs=1e-11), name


# Algebra


@few
@given(cameras(), st.data())
def test_crop_and_resize_compose(camera, data):
    """Any crop after a resize is a resize after a crop, and crops add up."""
    s = data.draw(st.integers(1, 4))
    x0, y0 = data.draw(st.integers(-5, camera.width - 2)), data.draw(st.integers(-5, camera.height - 2))
    w, h = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    large = camera.resize(camera.width * s, camera.height * s)
    assert_same(large.crop(x0 * s, y0 * s, w * s, h * s), camera.crop(x0, y0, w, h).resize(w * s, h * s))
    assert_same(camera.crop(x0, y0, 20, 20).crop(3, 4, w, h), camera.crop(x0 + 3, y0 + 4, w, h))
    assert_same(large.resize(camera.width, camera.height), camera)
    # (A B) C = A (B C) with three resizes, and the identity.
    assert_same(camera.resize(12, 34).resize(56, 78).resize(90, 12), camera.resize(90, 12), rel=1e-9)
    assert_same(camera.crop(0, 0, camera.width, camera.height), camera)
    assert_same(camera.crop(x0, y0, w, h).flip(), camera.flip().crop(camera.width - x0 - w, y0, w, h))


@few
@given(cameras(), floats(-5.0, 5.0), floats(-5.0, 5.0))
def test_a_turned_camera_sees_the_same_rays(camera, pitch_deg, roll_deg):
    turned = camera.rotate(pitch_deg, roll_deg)
    warp = rotation_homography(camera, turned)
    u, v, depth = 0.4 * camera.width, 0.6 * camera.height, 7.0
    at = warp @ [u, v, 1.0]
    # One point, seen by both: rotate it by hand.
    point = turned.rotation @ (np.linalg.inv(turned.matrix) @ [u, v, 1.0]) * depth
    seen = camera.matrix @ (camera.rotation.T @ point)
    np.testing.assert_allclose(at[:2] / at[2], seen[:2] / seen[2], rtol=1e-8)
    assert seen[2] / at[2] == pytest.approx(depth, rel=1e-9)
    np.testing.assert_allclose(rotation_homography(turned, camera) @ warp, np.eye(3), atol=1e-6)
    normal = camera.rotation @ camera.normal
    np.testing.assert_allclose(normal, [0, 1, 0], atol=1e-12)


@few
@given(cameras())
def test_tensors_hold_the_camera(camera):
    numbers = camera.tensor(torch.float64)
    assert numbers.tolist()[5:] == [math.radians(camera.pitch_deg), math.radians(camera.roll_deg)]
    assert_same(Camera.from_tensor(numbers, camera.size), camera)
    assert Camera.batch([camera, camera]).shape == (2, 7)


def test_a_field_of_view():
    camera = Camera.from_fov(60.0, 640, 480, camera_height=1.2, pitch_deg=-1.0)
    assert camera.hfov_deg == pytest.approx(60.0)
    assert (camera.cx, camera.cy, camera.fx) == (319.5, 239.5, camera.fy)
    with pytest.raises(CameraError, match=r"hfov_deg is 180, wanted degrees in \(0, 180\)"):
        Camera.from_fov(180, 640, 480)


def test_for_image():
    camera = Camera(**CAMERA)
    assert camera.for_image(200, 320) is camera
    assert_same(camera.for_image(100, 160), camera.resize(160, 100))
    assert_same(camera.for_image(101, 160), camera.resize(160, 101))  # within 1 %
    with pytest.raises(CameraError, match=r"the image is 160x110, the camera is of 320x200 .*camera.crop"):
        camera.for_image(110, 160)


def test_presets():
    camera = Camera(**CAMERA | {"camera_height": None})
    kitti = camera.with_preset("kitti")
    assert (kitti.camera_height, kitti.pitch_deg, kitti.roll_deg) == (1.659, -0.664, 0.0)
    assert {"argoverse", "ddad", "drivingstereo", "kitti", "waymo"} <= set(PRESETS)
    assert {f"kitti/{day}" for day in KITTI_INTRINSICS} <= set(PRESETS)
    assert gvdepth.cameras.PRESETS["waymo"] == Preset(2.145, -0.331)
    with pytest.raises(CameraError, match="preset is 'tesla', wanted one of argoverse, ddad"):
        camera.with_preset("tesla")


# Refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fx": 0.0}, "fx is 0, wanted a focal length in pixels, > 0"),
        ({"fy": math.nan}, "fy is nan, wanted"),
        ({"camera_height": -1.0}, "camera_height is -1, wanted metres above the road, > 0"),
        ({"camera_height": math.inf}, "camera_height is inf"),
        ({"pitch_deg": 60.0}, r"pitch_deg is 60, wanted degrees in \(-60, 60\)"),
        ({"roll_deg": -75.0}, "roll_deg is -75"),
        ({"cx": 1000.0}, "cx is 1000, wanted -640 to 960: at most two image sizes outside"),
        ({"cy": -401.0}, "cy is -401"),
        ({"cy": "mid"}, "cy is 'mid', wanted a pixel position"),
        ({"width": 0}, "width is 0, wanted a whole number of pixels"),
        ({"height": 1e300}, "wanted a whole number of pixels, 1 to 1000000"),
        ({"height": 2.5}, "height is 2.5"),
        ({"width": "wide"}, "width is 'wide'"),
        ({"height": None}, "height is None"),
    ],
)
def test_impossible_numbers_are_refused(changes, words):
    with pytest.raises(CameraError, match=words):
        Camera(**CAMERA | changes)
    with pytest.raises(CameraError, match=words):
        Camera(**CAMERA).replace(**changes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: c.replace(pitch=3.0), "a camera has no 'pitch'; it has fx, fy"),
        (lambda c: c.rotate(pitch_deg=70.0), "pitch_deg is 69.5"),
        (lambda c: c.crop(0, 0, 0, 5), "width is 0"),
        (lambda c: Camera.batch([]), "cameras is empty"),
        (
            lambda c: Camera.from_matrix(np.eye(2), 4, 4),
            r"matrix has shape \(2, 2\), wanted \(3, 3\) or \(3, 4\)",
        ),
        (lambda c: Camera.from_matrix([[5, 1, 2], [0, 5, 2], [0, 0, 1]], 4, 4), "wanted no skew"),
        (lambda c: Camera.from_matrix("K", 4, 4), "matrix is 'K'"),
        (lambda c: Camera.from_matrix(np.diag([1.0, 1, 0]), 4, 4), "1 at the lower right"),
        (
            lambda c: Camera.from_matrix(c.matrix, 320, 200, pitch_sign="low"),
            "pitch_sign is 'low', wanted 'up'",
        ),
        (lambda c: Camera.from_extrinsics(c.matrix, np.eye(2), 320, 200), r"transform has shape \(2, 2\)"),
        (lambda c: Camera.exact(fx=1.0), "fy is missing"),
    ],
)
def test_bad_calls(call, words):
    with pytest.raises(CameraError, match=words):
        call(Camera(**CAMERA))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"camera_height": 165.0}, "camera_height is 165: metres are expected"),
        ({"pitch_deg": -0.01158899}, "pitch_deg is -0.01158899, which looks like radians: degrees expected"),
        ({"roll_deg": 0.1234567}, "roll_deg is 0.1234567.*degrees expected"),
    ],
)
def test_suspicious_units_are_told(changes, words):
    with pytest.warns(FusionWarning, match=words):
        Camera(**CAMERA | changes)


def test_plain_and_computed_numbers_are_not_suspected():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        camera = Camera(**CAMERA | {"pitch_deg": 0.021, "roll_deg": 0.0})
        camera.rotate(0.00123456).flip().crop(0, 0, 5, 5).resize(3, 3).for_image(3, 3)
        Camera.from_tensor(torch.tensor([300.0, 300, 5, 5, 1.5, 0.001, 0.0]), (10, 10))
    assert told == []


def test_a_camera_is_a_value():
    camera = Camera(**CAMERA)
    assert camera == Camera(**CAMERA)
    assert hash(camera) == hash(Camera(**CAMERA))
    with pytest.raises(AttributeError):
        camera.fx = 3.0
    level = down_component(camera.replace(roll_deg=0.0, pitch_deg=0.0), double([60.0]))
    assert float(level) == 0.0

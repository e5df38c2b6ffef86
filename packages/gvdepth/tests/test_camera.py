"""The camera: its numbers, its algebra, its files (invariant 12 of section 8), and what it refuses."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from gvdepth_strategies import CAMERA, cameras, double, floats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gvdepth
from fusion_core.errors import FusionWarning, InputError, MissingExtraError
from gvdepth import CalibrationError, Camera, CameraError, ground_depth
from gvdepth.calib_io import (
    FORMATS,
    attitude,
    from_extrinsics,
    matrix_quaternion,
    quaternion_matrix,
    write_camera,
)
from gvdepth.camera import rotation_homography
from gvdepth.cameras import KITTI_INTRINSICS, PRESETS, Preset
from gvdepth.geometry import down_component

few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = ("fx", "fy", "cx", "cy", "camera_height", "pitch_deg", "roll_deg")


def same(one, two, rel=1e-12):
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
    same(large.crop(x0 * s, y0 * s, w * s, h * s), camera.crop(x0, y0, w, h).resize(w * s, h * s))
    same(camera.crop(x0, y0, 20, 20).crop(3, 4, w, h), camera.crop(x0 + 3, y0 + 4, w, h))
    same(large.resize(camera.width, camera.height), camera)
    # (A B) C = A (B C) with three resizes, and the identity.
    same(camera.resize(12, 34).resize(56, 78).resize(90, 12), camera.resize(90, 12), rel=1e-9)
    same(camera.crop(0, 0, camera.width, camera.height), camera)
    same(camera.crop(x0, y0, w, h).flip(), camera.flip().crop(camera.width - x0 - w, y0, w, h))


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
    same(Camera.from_tensor(numbers, camera.size), camera)
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
    same(camera.for_image(100, 160), camera.resize(160, 100))
    same(camera.for_image(101, 160), camera.resize(160, 101))  # within 1 %
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


# Files


@few
@given(cameras(), st.sampled_from(FORMATS))
def test_every_format_gives_the_camera_back(tmp_path, camera, form):
    suffix = {"json": ".json", "toml": ".toml", "kitti": ".txt", "nuscenes": ".json"}.get(form, ".yaml")
    path = tmp_path / f"camera{suffix}"
    write_camera(camera, path, format=form)
    options = {"width": camera.width, "height": camera.height} if form == "nuscenes" else {}
    found = Camera.load(path, **options)
    if form == "nuscenes":  # the attitude goes through a quaternion
        same(found, camera, rel=1e-9)
    else:
        assert found == camera
    assert Camera.load(path, camera_height=3.0, pitch_deg=2.0, pitch_sign="down", **options).pitch_deg == -2.0


def test_formats_without_a_height_ask_for_one(tmp_path):
    camera = Camera(**CAMERA | {"camera_height": None})
    for name in ("a.json", "a.toml", "a.txt", "a.yaml"):
        camera.save(tmp_path / name)
        found = Camera.load(tmp_path / name)
        assert found.camera_height is None
        with pytest.raises(CameraError, match="camera_height is not known; give it in metres .*with_preset"):
            ground_depth(found)
        with pytest.raises(CameraError, match="camera_height is not known"):
            found.tensor()
        assert Camera.load(tmp_path / name, camera_height=1.5).camera_height == 1.5
    with pytest.raises(CameraError, match="camera_height is not known"):
        camera.save(tmp_path / "b.json", format="nuscenes")


KITTI = """calib_time: 09-Jan-2012 13:57:47
corner_dist: 9.950000e-02
S_00: 1.392000e+03 5.120000e+02
S_rect_02: 1.242000e+03 3.750000e+02
R_rect_02: 9.998817e-01 1.511453e-02 -2.841595e-03 -1.511724e-02 9.998853e-01 -9.338510e-04 2.827154e-03 9.766976e-04 9.999955e-01
P_rect_02: 7.215377e+02 0.000000e+00 6.095593e+02 4.485728e+01 0.000000e+00 7.215377e+02 1.728540e+02 2.163791e-01 0.000000e+00 0.000000e+00 1.000000e+00 2.745884e-03
S_rect_03: 1.242000e+03 3.750000e+02
P_rect_03: 7.215377e+02 0.000000e+00 6.095593e+02 -3.395242e+02 0.000000e+00 7.215377e+02 1.728540e+02 2.199936e+00 0.000000e+00 0.000000e+00 1.000000e+00 2.729905e-03
"""  # noqa: E501


def test_kitti_raw_and_odometry(tmp_path):
    raw = tmp_path / "calib_cam_to_cam.txt"
    raw.write_text(KITTI)
    camera = Camera.from_kitti(raw).with_preset("kitti")
    assert (camera.fx, camera.cx, camera.cy, camera.size) == (721.5377, 609.5593, 172.854, (375, 1242))
    assert camera.camera_height == 1.659
    assert Camera.from_kitti(raw, index=3) == Camera.load(raw, camera_name="03")
    assert Camera.load(raw, camera_name="P_rect_02") == Camera.from_kitti(raw)
    odometry = tmp_path / "calib.txt"
    odometry.write_text(
        "P0: 1 0 0 0 0 1 0 0 0 0 1 0\nP2: 707.1 0 601.9 46.9 0 707.1 183.1 0.1 0 0 1 0.005\n\n"
    )
    assert Camera.from_kitti(odometry, width=1226, height=370).cy == 183.1
    with pytest.raises(CalibrationError, match=r"does not hold the image size; give width= and height="):
        Camera.from_kitti(odometry)
    with pytest.raises(CalibrationError, match=r"no P_rect_07 or P7; its projections are: P0, P2"):
        Camera.from_kitti(odometry, index=7)
    with pytest.raises(CalibrationError, match="camera_name is 'left'"):
        Camera.from_kitti(odometry, camera_name="left")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("P2 7 0 6", r"calib\.txt, line 2: 'P2 7 0 6': wanted 'name: numbers'"),
        ("P2: 7 0 6 x 0 7 1 0 0 0 1 0", r"line 2: 'P2: 7 0 6 x .*could not convert"),
        ("P2: 7 0 6", "line 2: 'P2: 7 0 6': 3 numbers, wanted 12"),
    ],
)
def test_an_unreadable_kitti_line_is_named(tmp_path, line, words):
    path = tmp_path / "calib.txt"
    path.write_text(f"P0: 1 0 0 0 0 1 0 0 0 0 1 0\n{line}\n")
    with pytest.raises(CalibrationError, match=words):
        Camera.load(path, width=100, height=100)


ROS = """image_width: 640
image_height: 480
camera_name: front
camera_matrix:
  rows: 3
  cols: 3
  data: [500, 0, 320, 0, 501, 240, 0, 0, 1]
distortion_model: plumb_bob
distortion_coefficients:
  rows: 1
  cols: 5
  data: [{k1}, 0, 0, 0, 0]
projection_matrix:
  rows: 3
  cols: 4
  data: [480, 0, 322, 0, 0, 481, 242, 0, 0, 0, 1, 0]
"""


def test_ros_takes_the_projection_of_rectified_images(tmp_path):
    path = tmp_path / "front.yaml"
    path.write_text(ROS.format(k1=0.0))
    assert Camera.from_ros(path).fx == 480
    assert (
        Camera.from_ros(path, rectified=False, camera_height=1.1, pitch_deg=4, pitch_sign="down").pitch_deg
        == -4
    )
    assert Camera.load(path, camera_name="front").size == (480, 640)
    with pytest.raises(CalibrationError, match="is of the camera 'front'; camera_name is 'rear'"):
        Camera.load(path, camera_name="rear")
    path.write_text(ROS.format(k1=-0.3))
    assert Camera.from_ros(path).fx == 480
    with pytest.warns(FusionWarning, match="lens distortion.*rectify the images first"):
        Camera.from_ros(path, rectified=False)
    path.write_text("camera_matrix: {data: [1, 2]}\nimage_width: 4\nimage_height: 3")
    with pytest.raises(CalibrationError, match=r"camera_matrix has 2 numbers, wanted 9 \(3x3\)"):
        Camera.load(path)
    path.write_text("image_width: 4\ncamera_matrix: [1,\n")
    with pytest.raises(CalibrationError, match=r"front\.yaml, line \d+: "):
        Camera.load(path)


def test_nuscenes(tmp_path):
    truth = Camera(fx=1266.4, fy=1266.4, cx=816.3, cy=491.5, width=1600, height=900, camera_height=1.51,
                   pitch_deg=-1.25, roll_deg=0.4)  # fmt: skip
    yaw = np.array([[math.cos(2), -math.sin(2), 0], [math.sin(2), math.cos(2), 0], [0, 0, 1]])
    level = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    rows = [
        {
            "token": "lidar",
            "sensor_token": "s0",
            "translation": [0, 0, 1.8],
            "rotation": [1, 0, 0, 0],
            "camera_intrinsic": [],
        }
    ]
    for i, turn in enumerate((np.eye(3), yaw)):
        rotation = 3.0 * matrix_quaternion(turn @ level @ truth.rotation)  # normalized when read
        rows.append({"token": f"t{i}", "sensor_token": f"s{i + 1}", "translation": [1.7, 0.0, 1.51],
                     "rotation": rotation.tolist(), "camera_intrinsic": truth.matrix.tolist()})  # fmt: skip
    path = tmp_path / "calibrated_sensor.json"
    path.write_text(json.dumps(rows))
    for name in ("t0", "s2"):
        same(Camera.from_nuscenes(path, camera_name=name), truth, rel=1e-9)  # yaw does not matter
    with pytest.raises(CalibrationError, match=r"holds the cameras t0, t1; camera_name is None"):
        Camera.load(path)
    sensors = [{"token": "s1", "channel": "CAM_FRONT"}, {"token": "s2", "channel": "CAM_BACK"}]
    (tmp_path / "sensor.json").write_text(json.dumps(sensors))
    same(Camera.load(path, camera_name="CAM_BACK"), truth, rel=1e-9)
    with pytest.raises(CalibrationError, match="holds the cameras CAM_FRONT, CAM_BACK; camera_name is 'CAM'"):
        Camera.load(path, camera_name="CAM")
    path.write_text(json.dumps([rows[1] | {"rotation": [0, 0, 0, 0]}]))
    with pytest.raises(InputError, match="wanted a quaternion"):
        Camera.load(path)


def test_waymo_axes_and_an_origin_above_the_ground():
    truth = Camera(**CAMERA)
    level = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    optical = np.eye(4)
    optical[:3, :3], optical[2, 3] = level @ truth.rotation, truth.camera_height - 0.33
    body = optical.copy()
    body[:3, :3] = optical[:3, :3] @ level.T  # x forward, y left, z up
    for matrix, axes in ((optical, "optical"), (body, "body")):
        found = attitude(matrix, camera_axes=axes, ground_z=-0.33)
        np.testing.assert_allclose(found, [truth.camera_height, truth.pitch_deg, truth.roll_deg], atol=1e-9)
        same(
            from_extrinsics(truth.matrix, matrix, 320, 200, camera_axes=axes, ground_z=-0.33), truth, rel=1e-9
        )
    with pytest.raises(CameraError, match="wanted an orthonormal matrix"):
        attitude(2 * np.eye(4))


@given(st.lists(floats(-1.0, 1.0), min_size=4, max_size=4).filter(lambda q: sum(x * x for x in q) > 1e-2))
def test_quaternions(q):
    turn = quaternion_matrix(q)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(turn) == pytest.approx(1.0)
    np.testing.assert_allclose(quaternion_matrix(matrix_quaternion(turn)), turn, atol=1e-12)


def test_opencv(tmp_path):
    path = tmp_path / "calib.yml"
    path.write_text(
        '%YAML:1.0\n---\ncalibration_time: "Mon"\nimage_width: 640\nimage_height: 480\n'
        "camera_matrix: !!opencv-matrix\n   rows: 3\n   cols: 3\n   dt: d\n"
        "   data: [ 5.1e+02, 0., 320., 0., 5.2e+02, 240., 0., 0., 1. ]\n"
        "distortion_coefficients: !!opencv-matrix\n   rows: 1\n   cols: 2\n   dt: d\n   data: [ 0.1, 0. ]\n"
    )
    with pytest.warns(FusionWarning, match="lens distortion"):
        assert Camera.from_opencv(path).fy == 520
    other = tmp_path / "calib.json"
    matrix = {
        "type_id": "opencv-matrix",
        "rows": 3,
        "cols": 3,
        "dt": "d",
        "data": [5, 0, 3, 0, 5, 2, 0, 0, 1],
    }
    other.write_text(json.dumps({"K": matrix, "image_width": 7, "image_height": 5}))
    assert Camera.load(other).fx == 5
    assert Camera.from_opencv(other, camera_name="K", width=9).width == 9
    with pytest.raises(CalibrationError, match="no matrix called M7; camera_name= names its key"):
        Camera.from_opencv(other, camera_name="M7")
    with pytest.raises(InputError, match="is XML; write it as YAML or JSON"):
        Camera.load(tmp_path / "calib.xml")


def test_opencv_itself_reads_what_is_written(tmp_path):
    cv2 = pytest.importorskip("cv2")
    camera = Camera(**CAMERA)
    write_camera(camera, tmp_path / "c.yaml", format="opencv")
    storage = cv2.FileStorage(str(tmp_path / "c.yaml"), cv2.FILE_STORAGE_READ)
    np.testing.assert_array_equal(storage.getNode("camera_matrix").mat(), camera.matrix)
    assert storage.getNode("pitch_deg").real() == camera.pitch_deg


def test_our_own_files(tmp_path):
    path = tmp_path / "rig.json"
    front = {
        "fx": 1,
        "fy": 1,
        "cx": 1,
        "cy": 1,
        "width": 3,
        "height": 3,
        "camera_height": 1.5,
        "remark": "ignored",
    }
    path.write_text(json.dumps({"cameras": {"front": front, "rear": front | {"fx": 2}}}))
    assert Camera.load(path, camera_name="rear").fx == 2
    with pytest.raises(CalibrationError, match="holds the cameras front, rear; camera_name is None"):
        Camera.load(path)
    for text, words in (
        ('{"fx": 1,', r"rig\.json, line 1: .*: "),
        ('{"fx": 1, "cy": 2}', "lacks fy, cx, width, height; it takes fx, fy"),
        ("[]", "cameras none"),
        ("3", "holds a int, wanted an object"),
        (json.dumps(front | {"schema": "gvdepth.camera/9"}), "schema 'gvdepth.camera/9', wanted"),
    ):
        path.write_text(text)
        with pytest.raises(CalibrationError, match=words):
            Camera.load(path)
    path.write_text(json.dumps(front | {"fx": "wide"}))
    with pytest.raises(CameraError, match="fx is 'wide', wanted a focal length"):
        Camera.load(path)
    with pytest.raises(CalibrationError, match="cannot be read: No such file"):
        Camera.load(tmp_path / "missing.json")
    with pytest.raises(InputError, match=r"suffix '.bin', wanted .json"):
        Camera.load(tmp_path / "camera.bin")
    with pytest.raises(InputError, match="format is 'xml', wanted json, toml"):
        Camera(**CAMERA).save(path, format="xml")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="it is no text"):
        Camera.load(tmp_path / "bytes.txt")


def test_yaml_without_pyyaml_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    path = tmp_path / "front.yaml"
    path.write_text(ROS.format(k1=0.0))
    with pytest.raises(MissingExtraError, match=r'pip install "gvdepth\[ros\]"'):
        Camera.load(path)


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        camera = Camera(**CAMERA | {"pitch_deg": 0.021, "roll_deg": 0.0})
        camera.rotate(0.00123456).flip().crop(0, 0, 5, 5).resize(3, 3).for_image(3, 3)
        Camera.from_tensor(torch.tensor([300.0, 300, 5, 5, 1.5, 0.001, 0.0]), (10, 10))


def test_a_camera_is_a_value():
    camera = Camera(**CAMERA)
    assert camera == Camera(**CAMERA)
    assert hash(camera) == hash(Camera(**CAMERA))
    with pytest.raises(AttributeError):
        camera.fx = 3.0
    level = down_component(camera.replace(roll_deg=0.0, pitch_deg=0.0), double([60.0]))
    assert float(level) == 0.0

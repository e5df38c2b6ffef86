"""Invariant 12 of section 8: calibration files of every format, and what cannot be read."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from gvdepth_strategies import CAMERA, cameras, floats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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

few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = ("fx", "fy", "cx", "cy", "camera_height", "pitch_deg", "roll_deg")


def assert_same(one, two, rel=1e-12):
    assert one.size == two.size
    for name in NUMBERS:
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=rel, abs=1e-11), name


@few
@given(cameras(), st.sampled_from(FORMATS))
def test_every_format_gives_the_camera_back(tmp_path, camera, form):
    suffix = {"json": ".json", "toml": ".toml", "kitti": ".txt", "nuscenes": ".json"}.get(form, ".yaml")
    path = tmp_path / f"camera{suffix}"
    write_camera(camera, path, format=form)
    options = {"width": camera.width, "height": camera.height} if form == "nuscenes" else {}
    found = Camera.load(path, **options)
    if form == "nuscenes":  # the attitude goes through a quaternion
        assert_same(found, camera, rel=1e-9)
    else:
        assert found == camera
    assert Camera.load(path, camera_height=3.0, pitch_deg=2.0, pitch_sign="down", **options).pitch_deg == -2.0


def test_formats_without_a_height_ask_for_one(tmp_path):
    camera = Camera(**CAMERA | {"camera_height": None})
    for name in ("a.json", "a.toml", "a.txt", "a.yaml"):
        camera.save(tmp_path / name)
        found = Camera.load(tmp_path / name)
        assert found.camera_height is None
        with pytest.raises(CameraError, match=r"camera_height is not known; give it in metres .*with_preset"):
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
        assert_same(Camera.from_nuscenes(path, camera_name=name), truth, rel=1e-9)  # yaw does not matter
    with pytest.raises(CalibrationError, match=r"holds the cameras t0, t1; camera_name is None"):
        Camera.load(path)
    sensors = [{"token": "s1", "channel": "CAM_FRONT"}, {"token": "s2", "channel": "CAM_BACK"}]
    (tmp_path / "sensor.json").write_text(json.dumps(sensors))
    assert_same(Camera.load(path, camera_name="CAM_BACK"), truth, rel=1e-9)
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
        assert_same(
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
    np.testing.assert_allclose(quaternion_matrix(1e308 * np.array(q) / np.abs(q).max()), turn, atol=1e-12)


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

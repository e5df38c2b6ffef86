"""The file formats of others: KITTI, ROS ``camera_info``, nuScenes, OpenCV (section 5.3)."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusion_core.errors import FusionWarning, InputError
from gvdepth.calib_io import (
    MOUNT,
    PathLike,
    attitude,
    fail,
    from_matrix,
    load_json,
    load_yaml,
    matrix_quaternion,
    mount_of,
    quaternion_matrix,
    read_text,
)
from gvdepth.camera import Camera, PitchSign
from gvdepth.errors import CalibrationError

__all__ = ["guess", "read_kitti", "read_nuscenes", "read_opencv", "read_ros", "stored_distortion"]

_OPENCV_NAMES = ("camera_matrix", "cameraMatrix", "Camera_Matrix", "K", "M1", "M")
_DISTORTION_NAMES = ("distortion_coefficients", "distCoeffs", "Distortion_Coefficients", "D", "D1")
_NUSCENES_SIZE = (1600, 900)


def guess(path: PathLike) -> str:
    """The format of a file, told by suffix and content.

    Raises:
        InputError: an unknown suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".txt", ".toml"):
        return {".txt": "kitti", ".toml": "toml"}[suffix]
    if suffix == ".json":
        document = load_json(path)
        if isinstance(document, list):
            return "nuscenes"
        return "opencv" if isinstance(document, dict) and set(document) & set(_OPENCV_NAMES) else "json"
    if suffix in (".yaml", ".yml"):
        text = read_text(path)
        if text.startswith("%YAML:1.0") or "opencv-matrix" in text:
            return "opencv"
        return "ros" if "camera_matrix" in text else "json"
    if suffix == ".xml":
        raise InputError(f"{path} is XML; write it as YAML or JSON, which OpenCV's FileStorage can do")
    raise InputError(f"{path} has the suffix {suffix!r}, wanted .json, .toml, .txt (KITTI), .yaml or .yml")


def _built(
    path: PathLike,
    matrix: Any,
    size: tuple[Any, Any],
    stored: Any,
    pitch_sign: PitchSign,
    **given: float | None,
) -> Camera:
    width, height = size
    if width is None or height is None:
        raise CalibrationError(f"{path} does not hold the image size; give width= and height= in pixels")
    camera = from_matrix(matrix, width, height)
    mount = mount_of(stored if isinstance(stored, dict) else {}, pitch_sign, **given)
    computed = {key: value for key, value in mount.items() if given.get(key) is None}
    # What a person gave is checked for its units, what the file holds is not.
    camera = camera.computed(**computed)
    return camera.replace(**{key: mount[key] for key in MOUNT if key not in computed})


# KITTI


def read_kitti(
    path: PathLike,
    *,
    index: int = 2,
    camera_name: str | None = None,
    width: int | None = None,
    height: int | None = None,
    camera_height: float | None = None,
    pitch_deg: float | None = None,
    roll_deg: float | None = None,
    pitch_sign: PitchSign = "up",
) -> Camera:
    """Read ``calib_cam_to_cam.txt`` (``P_rect_02``, ``S_rect_02``), or an odometry or object file (``P2``).

    Args:
        path: the file.
        index: of the camera; 2 is the left color camera.
        camera_name: the same as text, such as ``"02"``.
        width: of the rectified image, pixels, where the file does not say (``P2``).
        height: the same.
        camera_height: metres; KITTI's files hold none (``.with_preset("kitti")``).
        pitch_deg: degrees.
        roll_deg: degrees.
        pitch_sign: ``"up"`` or ``"down"``, see :func:`gvdepth.calib_io.from_matrix`.

    Returns:
        The camera of the RECTIFIED images; the stereo offset (fourth column) is left out.

    Raises:
        CalibrationError: a line cannot be read, or the camera is not there; names file, line and text.
    """
    if camera_name is not None:
        digits = re.fullmatch(r"(?:P_rect_|image_|P)?(\d+)", camera_name)
        if digits is None:
            raise CalibrationError(f"camera_name is {camera_name!r}, wanted an index such as '02'")
        index = int(digits[1])
    wanted = {f"P_rect_{index:02d}": 12, f"P{index}": 12, f"S_rect_{index:02d}": 2} | dict.fromkeys(MOUNT, 1)
    found: dict[str, list[float]] = {}
    names: list[str] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        key, colon, rest = line.partition(":")
        key = key.strip()
        if not line.strip():
            continue
        if not colon:
            raise fail(path, number, line, "wanted 'name: numbers'")
        names.append(key)
        if key in wanted:
            found[key] = _floats(path, number, line, rest, wanted[key])
    values = found.get(f"P_rect_{index:02d}") or found.get(f"P{index}")
    if values is None:
        there = ", ".join(n for n in names if n.startswith("P")) or "none"
        raise CalibrationError(f"{path} has no P_rect_{index:02d} or P{index}; its projections are: {there}")
    size = found.get(f"S_rect_{index:02d}", [None, None])
    given = {"camera_height": camera_height, "pitch_deg": pitch_deg, "roll_deg": roll_deg}
    stored = {key: found[key][0] for key in MOUNT if key in found}
    chosen = (width or size[0], height or size[1])
    return _built(path, np.reshape(values, (3, 4)), chosen, stored, pitch_sign, **given)


def _floats(path: PathLike, number: int, line: str, rest: str, count: int) -> list[float]:
    try:
        values = [float(part) for part in rest.split()]
    except ValueError as error:
        raise fail(path, number, line, str(error)) from error
    if len(values) != count:
        raise fail(path, number, line, f"{len(values)} numbers, wanted {count}")
    return values


def kitti_text(camera: Camera) -> str:
    """The text of a KITTI calibration file, with height and attitude in lines of their own."""
    k = camera.matrix
    rows = [*k[0], 0.0, *k[1], 0.0, *k[2], 0.0]
    lines = [f"S_rect_02: {camera.width} {camera.height}", "P_rect_02: " + " ".join(map(_repr, rows))]
    lines += [f"{key}: {_repr(getattr(camera, key))}" for key in MOUNT if getattr(camera, key) is not None]
    return "\n".join(lines) + "\n"


def _repr(value: float) -> str:
    return repr(float(value))


# ROS


def read_ros(
    path: PathLike,
    *,
    rectified: bool = True,
    camera_name: str | None = None,
    width: int | None = None,
    height: int | None = None,
    camera_height: float | None = None,
    pitch_deg: float | None = None,
    roll_deg: float | None = None,
    pitch_sign: PitchSign = "up",
) -> Camera:
    """Read a ROS ``camera_info`` YAML file (extra ``ros``).

    Args:
        path: the file.
        rectified: True for images that ``image_proc`` rectified: ``projection_matrix`` counts where the file
            holds one. False for raw images: ``camera_matrix`` counts, which is right only without distortion.
        camera_name: has to be the file's ``camera_name`` where given.
        width: instead of ``image_width``, pixels.
        height: instead of ``image_height``.
        camera_height: metres; the format holds none.
        pitch_deg: degrees.
        roll_deg: degrees.
        pitch_sign: ``"up"`` or ``"down"``, see :func:`gvdepth.calib_io.from_matrix`.

    Raises:
        CalibrationError: not readable, or numbers are missing.
        MissingExtraError: PyYAML is not installed.
    """
    document = load_yaml(path)
    if not isinstance(document, dict) or "camera_matrix" not in document:
        raise CalibrationError(f"{path} has no camera_matrix: no ROS camera_info file")
    name = document.get("camera_name")
    if camera_name is not None and name != camera_name:
        raise CalibrationError(f"{path} is of the camera {name!r}; camera_name is {camera_name!r}")
    raw = _matrix(path, "camera_matrix", document["camera_matrix"], (3, 3))
    distortion = _numbers(path, "distortion_coefficients", document.get("distortion_coefficients"))
    matrix = raw
    if rectified and document.get("projection_matrix") is not None:
        projection = _matrix(path, "projection_matrix", document["projection_matrix"], (3, 4))
        matrix = projection if projection[0, 0] > 0 else raw
    if matrix is raw and np.any(distortion):
        _warn_distortion(path)
    given = {"camera_height": camera_height, "pitch_deg": pitch_deg, "roll_deg": roll_deg}
    size = (width or document.get("image_width"), height or document.get("image_height"))
    return _built(path, matrix, size, document.get("gvdepth", {}), pitch_sign, **given)


def _warn_distortion(path: PathLike) -> None:
    text = (
        f"{path} has lens distortion, which a pinhole camera has not: rectify the images first "
        "(gvdepth.rectify.read_rectifier)"
    )
    warnings.warn(text, FusionWarning, stacklevel=4)


def stored_distortion(path: PathLike) -> tuple[Any, Any, tuple[int, int], Literal["pinhole", "fisheye"]]:
    """Raw matrix, distortion, ``(width, height)`` and lens of a ROS or OpenCV file.

    Raises:
        CalibrationError: not readable, or one of them is missing.
    """
    document = load_json(path) if Path(path).suffix == ".json" else load_yaml(path, strip="%YAML:")
    if not isinstance(document, dict):
        raise CalibrationError(
            f"{path} holds a {type(document).__name__}, wanted camera_matrix and distortion"
        )
    found = [next((n for n in names if n in document), None) for names in (_OPENCV_NAMES, _DISTORTION_NAMES)]
    if found[0] is None or found[1] is None:
        raise CalibrationError(f"{path} has no {'matrix' if found[0] is None else 'distortion coefficients'}")
    width, height = (document.get(f"image_{side}") for side in ("width", "height"))
    if not isinstance(width, int) or not isinstance(height, int):
        raise CalibrationError(f"{path} has no image_width and image_height")
    fisheye = document.get("distortion_model") in ("equidistant", "fisheye", "kannala_brandt")
    matrix = _matrix(path, found[0], document[found[0]], (3, 3))
    distortion = _numbers(path, found[1], document[found[1]])
    return matrix, distortion, (width, height), "fisheye" if fisheye else "pinhole"


def _numbers(path: PathLike, key: str, entry: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    data = entry.get("data") if isinstance(entry, dict) else entry
    try:
        return np.asarray([] if data is None else data, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"{path}: {key} is {data!r}, wanted numbers") from error


def _matrix(path: PathLike, key: str, entry: Any, shape: tuple[int, int]) -> Any:
    values = _numbers(path, key, entry)
    if values.size != shape[0] * shape[1]:
        raise CalibrationError(
            f"{path}: {key} has {values.size} numbers, wanted {shape[0] * shape[1]} ({shape[0]}x{shape[1]})"
        )
    return values.reshape(shape)


def ros_text(camera: Camera) -> str:
    """The text of a ROS ``camera_info`` file, with height and attitude under the key ``gvdepth``."""
    k = camera.matrix

    def entry(name: str, rows: int, columns: int, values: Any) -> str:
        data = ", ".join(_repr(value) for value in np.ravel(values))
        return f"{name}:\n  rows: {rows}\n  cols: {columns}\n  data: [{data}]\n"

    text = f"image_width: {camera.width}\nimage_height: {camera.height}\ncamera_name: camera\n"
    text += entry("camera_matrix", 3, 3, k)
    text += "distortion_model: plumb_bob\n" + entry("distortion_coefficients", 1, 5, np.zeros(5))
    text += entry("rectification_matrix", 3, 3, np.eye(3))
    text += entry("projection_matrix", 3, 4, np.hstack([k, np.zeros((3, 1))]))
    kept = {key: getattr(camera, key) for key in MOUNT if getattr(camera, key) is not None}
    return text + "gvdepth:\n" + "".join(f"  {key}: {_repr(value)}\n" for key, value in kept.items())


# nuScenes


def read_nuscenes(
    path: PathLike,
    *,
    camera_name: str | None = None,
    width: int = _NUSCENES_SIZE[0],
    height: int = _NUSCENES_SIZE[1],
    camera_height: float | None = None,
    pitch_deg: float | None = None,
    roll_deg: float | None = None,
    pitch_sign: PitchSign = "up",
) -> Camera:
    """Read a row of nuScenes' ``calibrated_sensor.json``, whose height and attitude follow from its place.

    Args:
        path: the file; ``sensor.json`` beside it gives the channels' names.
        camera_name: token of the row or of its sensor, or a channel such as ``"CAM_FRONT"`` (its first row).
        width: of the image, pixels; the file holds no size.
        height: the same.
        camera_height: instead of what the file says, metres.
        pitch_deg: the same, degrees.
        roll_deg: the same, degrees.
        pitch_sign: of ``pitch_deg`` where it is given.

    Raises:
        CalibrationError: not readable, or no such camera.
    """
    rows = load_json(path)
    if not isinstance(rows, list):
        raise CalibrationError(f"{path} holds a {type(rows).__name__}, wanted nuScenes' list of sensors")
    cameras = [row for row in rows if isinstance(row, dict) and row.get("camera_intrinsic")]
    channels = _channels(Path(path).with_name("sensor.json"))
    row = _row(path, cameras, channels, camera_name)
    try:
        transform = np.eye(4)
        transform[:3, :3] = quaternion_matrix(row["rotation"])
        transform[:3, 3] = np.asarray(row["translation"], dtype=np.float64)
        matrix = row["camera_intrinsic"]
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path}: the row {row.get('token')!r} cannot be used: {error}") from error
    stored = dict(zip(MOUNT, attitude(transform), strict=True))
    given = {"camera_height": camera_height, "pitch_deg": pitch_deg, "roll_deg": roll_deg}
    if pitch_deg is None:
        pitch_sign = "up"  # the computed pitch has only one sign
    return _built(path, matrix, (width, height), stored, pitch_sign, **given)


def _channels(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    rows = load_json(path)
    pairs = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {str(row.get("token")): str(row.get("channel")) for row in pairs}


def _row(path: PathLike, rows: list[Any], channels: dict[str, str], name: str | None) -> dict[str, Any]:
    if name is None and len(rows) == 1:
        return rows[0]
    for row in rows:
        sensor = str(row.get("sensor_token"))
        if name is not None and name in (row.get("token"), sensor, channels.get(sensor)):
            return row
    labels = dict.fromkeys(channels.get(str(row.get("sensor_token")), str(row.get("token"))) for row in rows)
    listed = ", ".join(list(labels)[:12]) or "none"
    raise CalibrationError(f"{path} holds the cameras {listed}; camera_name is {name!r}, wanted one of them")


def nuscenes_text(camera: Camera) -> str:
    """One row of ``calibrated_sensor.json``; the image size is not part of the format.

    Raises:
        CameraError: the height is not known.
    """
    # Level axes (x right, y down, z forward) in the vehicle's (x forward, y left, z up).
    vehicle_from_level = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    row = {
        "token": "camera",
        "sensor_token": "camera",
        "translation": [0.0, 0.0, camera.require_height()],
        "rotation": matrix_quaternion(vehicle_from_level @ camera.rotation).tolist(),
        "camera_intrinsic": camera.matrix.tolist(),
    }
    return json.dumps([row], indent=2) + "\n"


# OpenCV


def read_opencv(
    path: PathLike,
    *,
    camera_name: str | None = None,
    width: int | None = None,
    height: int | None = None,
    camera_height: float | None = None,
    pitch_deg: float | None = None,
    roll_deg: float | None = None,
    pitch_sign: PitchSign = "up",
) -> Camera:
    """Read a YAML (extra ``ros``) or JSON file of OpenCV's ``FileStorage``.

    Args:
        path: the file.
        camera_name: key of the matrix; by default the first of ``camera_matrix``, ``cameraMatrix``, ``K``,
            ``M1``.
        width: of the image, pixels, where the file has no ``image_width``.
        height: the same.
        camera_height: metres.
        pitch_deg: degrees.
        roll_deg: degrees.
        pitch_sign: ``"up"`` or ``"down"``, see :func:`gvdepth.calib_io.from_matrix`.

    Raises:
        CalibrationError: not readable, or no matrix.
        MissingExtraError: PyYAML is not installed.
    """
    document = load_json(path) if Path(path).suffix == ".json" else load_yaml(path, strip="%YAML:")
    names = _OPENCV_NAMES if camera_name is None else (camera_name,)
    key = next((name for name in names if isinstance(document, dict) and name in document), None)
    if key is None:
        raise CalibrationError(
            f"{path} has no matrix called {' or '.join(names)}; camera_name= names its key"
        )
    matrix = _matrix(path, key, document[key], (3, 3))
    for name in _DISTORTION_NAMES:
        if np.any(_numbers(path, name, document.get(name))):
            _warn_distortion(path)
            break
    given = {"camera_height": camera_height, "pitch_deg": pitch_deg, "roll_deg": roll_deg}
    size = (width or document.get("image_width"), height or document.get("image_height"))
    return _built(path, matrix, size, document, pitch_sign, **given)


def opencv_text(camera: Camera) -> str:
    """The text of an OpenCV YAML file, with height and attitude as nodes of their own."""

    def entry(name: str, rows: int, columns: int, values: Any) -> str:
        data = ", ".join(_repr(value) for value in np.ravel(values))
        head = f"{name}: !!opencv-matrix\n   rows: {rows}\n   cols: {columns}\n   dt: d\n"
        return f"{head}   data: [ {data} ]\n"

    text = f"%YAML:1.0\n---\nimage_width: {camera.width}\nimage_height: {camera.height}\n"
    text += entry("camera_matrix", 3, 3, camera.matrix) + entry("distortion_coefficients", 1, 5, np.zeros(5))
    kept = {key: getattr(camera, key) for key in MOUNT if getattr(camera, key) is not None}
    return text + "".join(f"{key}: {_repr(value)}\n" for key, value in kept.items())

"""Cameras from calibration files and back, with every convention of sign and axis said aloud (section 5.3).

Pitch is positive where the optical axis points ABOVE the horizon. Files of rigs that count it downwards are
read with ``pitch_sign="down"``. Formats that hold no height or attitude get them from arguments, a preset,
or from the lines that :func:`write_camera` adds; other readers of those formats ignore these lines.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusion_core.atomic import atomic_write
from fusion_core.errors import InputError, ShapeError, reading, require_extra
from fusion_core.results import dump_json
from gvdepth.camera import Camera, PitchSign
from gvdepth.errors import CalibrationError, CameraError
from gvdepth.plane import attitude_of_normal

__all__ = [
    "FORMATS",
    "attitude",
    "from_extrinsics",
    "from_matrix",
    "read_camera",
    "read_json",
    "read_kitti",
    "read_nuscenes",
    "read_opencv",
    "read_ros",
    "write_camera",
]

PathLike = str | os.PathLike[str]
FileFormat = Literal["json", "toml", "kitti", "ros", "nuscenes", "opencv"]
FORMATS = ("json", "toml", "kitti", "ros", "nuscenes", "opencv")
SCHEMA = "gvdepth.camera/1"
MOUNT = ("camera_height", "pitch_deg", "roll_deg")
_SIZE_LIMIT = 64 * 2**20  # bytes
# Columns: camera axes (x right, y down, z forward) in a sensor frame x forward, y left, z up.
_OPTICAL_FROM_BODY = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


# From numbers


def from_matrix(
    matrix: Any,
    width: int,
    height: int,
    *,
    camera_height: float | None = None,
    pitch_deg: float = 0.0,
    roll_deg: float = 0.0,
    pitch_sign: PitchSign = "up",
) -> Camera:
    """A camera of an intrinsic or projection matrix.

    Args:
        matrix: (3, 3) or (3, 4); of a projection matrix the left 3x3 part counts, a stereo offset does not.
        width: of the image, pixels.
        height: of the image, pixels.
        camera_height: metres above the road, or None.
        pitch_deg: degrees.
        roll_deg: degrees, > 0 where the right side dips.
        pitch_sign: ``"up"`` where pitch_deg > 0 means looking up, ``"down"`` where it means looking down.

    Raises:
        CameraError: another shape, skew, or numbers that no camera has.

    Example:
        >>> from_matrix([[500, 0, 320], [0, 500, 240], [0, 0, 1]], 640, 480).cx
        320.0
    """
    try:
        numbers = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise CameraError(f"matrix is {matrix!r}, wanted 3x3 or 3x4 numbers") from error
    if numbers.shape not in ((3, 3), (3, 4)):
        raise CameraError(f"matrix has shape {numbers.shape}, wanted (3, 3) or (3, 4)")
    with np.errstate(all="ignore"):
        k = numbers[:, :3] / numbers[2, 2]
    if not np.isfinite(k).all():
        raise CameraError(
            f"matrix is {numbers[:, :3].tolist()}, wanted finite numbers and 1 at the lower right"
        )
    tiny = 1e-6 * max(abs(k[0, 0]), 1.0)
    if max(abs(k[0, 1]), abs(k[1, 0]), abs(k[2, 0]), abs(k[2, 1])) > tiny:
        raise CameraError(f"matrix is {k.tolist()}, wanted no skew and a last row 0 0 1; rectify the images")
    mount = mount_of({}, pitch_sign, camera_height=camera_height, pitch_deg=pitch_deg, roll_deg=roll_deg)
    return Camera(fx=k[0, 0], fy=k[1, 1], cx=k[0, 2], cy=k[1, 2], width=width, height=height, **mount)


def mount_of(
    stored: Mapping[str, Any], pitch_sign: PitchSign = "up", **given: float | None
) -> dict[str, Any]:
    """Height and attitude: what is given, else what is stored, the pitch turned to count upwards.

    Raises:
        CameraError: unknown sign.
    """
    if pitch_sign not in ("up", "down"):
        raise CameraError(f"pitch_sign is {pitch_sign!r}, wanted 'up' (pitch > 0 looks up) or 'down'")
    found: dict[str, Any] = {"camera_height": None, "pitch_deg": 0.0, "roll_deg": 0.0}
    found |= {key: value for key, value in stored.items() if key in MOUNT and value is not None}
    found |= {key: value for key, value in given.items() if value is not None}
    if pitch_sign == "down" and found["pitch_deg"]:
        found["pitch_deg"] = -found["pitch_deg"]
    return found


def attitude(
    transform: Any, *, camera_axes: Literal["optical", "body"] = "optical", ground_z: float = 0.0
) -> tuple[float, float, float]:
    """Height, pitch and roll of a camera whose place on the vehicle is known.

    Args:
        transform: ``T_vehicle_from_camera``, (4, 4) or (3, 4); vehicle axes x forward, y left, z up.
        camera_axes: ``"optical"`` (x right, y down, z forward) or ``"body"`` (x forward, y left, z up, as
            Waymo's).
        ground_z: height of the road in vehicle coordinates, metres: 0 where the origin lies on the ground;
            for an origin at the axle minus the wheel's radius (Argoverse 1: -0.33).

    Returns:
        ``(camera_height, pitch_deg, roll_deg)``; yaw does not matter on a level road.

    Raises:
        CameraError: no rigid transform.
    """
    matrix = np.asarray(transform, dtype=np.float64)
    if matrix.shape not in ((4, 4), (3, 4)):
        raise CameraError(f"transform has shape {matrix.shape}, wanted (4, 4) or (3, 4)")
    turn = matrix[:3, :3]
    if not np.isfinite(matrix).all() or np.abs(turn @ turn.T - np.eye(3)).max() > 1e-3:
        raise CameraError(f"the rotation of transform is {turn.tolist()}, wanted an orthonormal matrix")
    if camera_axes == "body":
        turn = turn @ _OPTICAL_FROM_BODY
    elif camera_axes != "optical":
        raise CameraError(f"camera_axes is {camera_axes!r}, wanted 'optical' or 'body'")
    pitch_deg, roll_deg = attitude_of_normal(-turn[2])
    return float(matrix[2, 3]) - ground_z, pitch_deg, roll_deg


def from_extrinsics(
    matrix: Any,
    transform: Any,
    width: int,
    height: int,
    *,
    camera_axes: Literal["optical", "body"] = "optical",
    ground_z: float = 0.0,
) -> Camera:
    """A camera of intrinsics (:func:`from_matrix`) and of a place on the vehicle (:func:`attitude`)."""
    return _mounted(
        from_matrix(matrix, width, height), attitude(transform, camera_axes=camera_axes, ground_z=ground_z)
    )


def _mounted(camera: Camera, mount: tuple[float, float, float]) -> Camera:
    # Computed angles may look like radians; the constructor would suspect them.
    return camera.computed(camera_height=mount[0], pitch_deg=mount[1], roll_deg=mount[2])


# From files


def read_text(path: PathLike) -> str:
    """The text of a calibration file.

    Raises:
        CalibrationError: missing, too large or no text.
    """
    try:
        if Path(path).stat().st_size > _SIZE_LIMIT:
            raise CalibrationError(f"{path} is larger than {_SIZE_LIMIT >> 20} MiB: no calibration file")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise CalibrationError(f"{path} cannot be read: {reason}") from error


def fail(path: PathLike, line: int, text: str, why: str) -> CalibrationError:
    """The complaint about a line of a file: file, line number, text, reason."""
    return CalibrationError(f"{path}, line {line}: {text.strip()[:120]!r}: {why}")


def load_json(path: PathLike) -> Any:
    """A JSON document.

    Raises:
        CalibrationError: names file, line and text where it breaks.
    """
    text = read_text(path)
    with reading(path, "is no JSON", CalibrationError):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise fail(path, error.lineno, _line(text, error.lineno), error.msg) from error


def load_yaml(path: PathLike, *, strip: str = "") -> Any:
    """A YAML document, by PyYAML's safe loader; lines that start with ``strip`` are left out.

    Raises:
        MissingExtraError: PyYAML is not installed.
        CalibrationError: names file, line and text where it breaks.
    """
    yaml: Any = require_extra("yaml", "ros", "gvdepth")
    text = read_text(path)

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor(
        "tag:yaml.org,2002:opencv-matrix", lambda loader, node: loader.construct_mapping(node, deep=True)
    )
    kept = "\n".join("" if strip and line.startswith(strip) else line for line in text.splitlines())
    with reading(path, "is no YAML", CalibrationError):
        try:
            return yaml.load(kept, Loader)  # a safe loader with one harmless tag
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            number, why = 1 if mark is None else mark.line + 1, getattr(error, "problem", None) or "no YAML"
            raise fail(path, number, _line(text, number), why) from error


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return lines[number - 1] if 0 < number <= len(lines) else ""


def _chosen(path: PathLike, found: Mapping[str, Any], name: str | None) -> Any:
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name is None or name not in found:
        listed = ", ".join(list(found)[:12])
        raise CalibrationError(
            f"{path} holds the cameras {listed}; camera_name is {name!r}, wanted one of them"
        )
    return found[name]


def read_json(path: PathLike, *, camera_name: str | None = None) -> Camera:
    """Read a camera file of our own, JSON or TOML (by suffix): the nine numbers, or ``cameras`` by name.

    Args:
        path: the file.
        camera_name: which, where it holds several.

    Raises:
        CalibrationError: not readable, a key is missing or unknown.
        CameraError: numbers that no camera has.
    """
    if Path(path).suffix == ".toml":
        text = read_text(path)
        with reading(path, "is no TOML", CalibrationError):
            document: Any = tomllib.loads(text)
    elif Path(path).suffix in (".yaml", ".yml"):
        document = load_yaml(path)
    else:
        document = load_json(path)
    return _from_document(path, document, camera_name)


def _from_document(path: PathLike, document: Any, camera_name: str | None) -> Camera:
    if isinstance(document, dict) and isinstance(document.get("cameras"), dict):
        document = _chosen(path, document["cameras"], camera_name)
    if not isinstance(document, dict):
        raise CalibrationError(f"{path} holds a {type(document).__name__}, wanted an object with fx, fy, ...")
    schema = document.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise CalibrationError(f"{path} has schema {schema!r}, wanted {SCHEMA!r}")
    needed = ("fx", "fy", "cx", "cy", "width", "height")
    if missing := [key for key in needed if key not in document]:
        raise CalibrationError(f"{path} lacks {', '.join(missing)}; it takes {', '.join((*needed, *MOUNT))}")
    return Camera.exact(**{key: document[key] for key in (*needed, *MOUNT) if key in document})


def read_camera(path: PathLike, *, camera_name: str | None = None, **options: Any) -> Camera:
    """Read a camera file of any known format, told by suffix and content.

    Args:
        path: ours (``.json``, ``.toml``), KITTI (``.txt``), ROS or OpenCV (``.yaml``, ``.yml``), nuScenes'
            ``calibrated_sensor.json``, OpenCV's ``.json``.
        camera_name: which, where a file holds several.
        **options: what the reader of the format takes; ``camera_height``, ``pitch_deg``, ``roll_deg`` and
            ``pitch_sign`` replace what the file says.

    Raises:
        CalibrationError: not readable; the message names file, line and text.
        CameraError: numbers that no camera has.
    """
    with reading(path, "is no camera file", CalibrationError):
        return _read_camera(path, camera_name, options)


def _read_camera(path: PathLike, camera_name: str | None, options: dict[str, Any]) -> Camera:
    from gvdepth import calib_formats as formats

    found = formats.guess(path)
    if found not in ("json", "toml"):
        if camera_name is not None:
            options["camera_name"] = camera_name
        return getattr(formats, f"read_{found}")(path, **options)
    camera = read_json(path, camera_name=camera_name)
    sign = options.pop("pitch_sign", "up")
    given = {key: value for key, value in options.items() if value is not None}
    if not given:
        return camera
    if unknown := sorted(set(given) - set(MOUNT)):
        raise InputError(f"a camera file of our own takes no option {unknown[0]!r}")
    changed = mount_of({}, sign, **given)
    return camera.replace(**{key: changed[key] for key in given})


def read_kitti(path: PathLike, **options: Any) -> Camera:
    """Read a KITTI file; see :func:`gvdepth.calib_formats.read_kitti`."""
    from gvdepth import calib_formats

    return calib_formats.read_kitti(path, **options)


def read_ros(path: PathLike, **options: Any) -> Camera:
    """Read a ROS ``camera_info`` file; see :func:`gvdepth.calib_formats.read_ros`."""
    from gvdepth import calib_formats

    return calib_formats.read_ros(path, **options)


def read_nuscenes(path: PathLike, **options: Any) -> Camera:
    """Read nuScenes' ``calibrated_sensor.json``; see :func:`gvdepth.calib_formats.read_nuscenes`."""
    from gvdepth import calib_formats

    return calib_formats.read_nuscenes(path, **options)


def read_opencv(path: PathLike, **options: Any) -> Camera:
    """Read OpenCV's ``FileStorage``; see :func:`gvdepth.calib_formats.read_opencv`."""
    from gvdepth import calib_formats

    return calib_formats.read_opencv(path, **options)


# To files


def write_camera(camera: Camera, path: PathLike, *, format: FileFormat | None = None) -> None:  # noqa: A002
    """Write a camera; the file appears whole or not at all, and :func:`read_camera` gives the same numbers.

    Args:
        camera: what to write.
        path: the file.
        format: one of ``FORMATS``; by the suffix otherwise: ``.json``, ``.toml``, ``.txt`` (KITTI),
            ``.yaml`` or ``.yml`` (ROS).

    Raises:
        InputError: unknown format or suffix.
    """
    from gvdepth import calib_formats as formats

    suffixes = {".json": "json", ".toml": "toml", ".txt": "kitti", ".yaml": "ros", ".yml": "ros"}
    chosen = format or suffixes.get(Path(path).suffix)
    if chosen not in FORMATS:
        wanted = ", ".join(FORMATS if format else suffixes)
        raise InputError(f"format is {format or Path(path).suffix!r}, wanted {wanted}")
    if chosen in ("json", "toml"):
        fields = ("fx", "fy", "cx", "cy", "width", "height", *MOUNT)
        document = {"schema": SCHEMA} | {name: getattr(camera, name) for name in fields}
        text = dump_json(document) if chosen == "json" else _toml(document)
    else:
        text = getattr(formats, f"{chosen}_text")(camera)
    with atomic_write(path, "w") as file:
        file.write(text)


def _toml(document: dict[str, Any]) -> str:
    import tomli_w

    return tomli_w.dumps({key: value for key, value in document.items() if value is not None})


def quaternion_matrix(quaternion: Any) -> NDArray[np.float64]:
    """The rotation of a quaternion (w, x, y, z), normalized first.

    Raises:
        CameraError: not four finite numbers, or all 0.
    """
    q = np.asarray(quaternion, dtype=np.float64)
    if q.shape != (4,) or not np.isfinite(q).all() or not q.any():
        raise CameraError(f"rotation is {quaternion!r}, wanted a quaternion (w, x, y, z)")
    q = q / np.abs(q).max()  # the norm of large numbers overflows
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def matrix_quaternion(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quaternion (w, x, y, z), w >= 0, of a rotation matrix.

    Raises:
        ShapeError: not (3, 3).

    Example:
        >>> matrix_quaternion(np.eye(3)).tolist()
        [1.0, 0.0, 0.0, 0.0]
    """
    if matrix.shape != (3, 3):
        raise ShapeError(f"matrix has shape {matrix.shape}, wanted (3, 3)")
    m = matrix
    # The largest of the four squares keeps the division well conditioned.
    squares = [1 + m[0, 0] + m[1, 1] + m[2, 2], 1 + m[0, 0] - m[1, 1] - m[2, 2]]
    squares += [1 - m[0, 0] + m[1, 1] - m[2, 2], 1 - m[0, 0] - m[1, 1] + m[2, 2]]
    cross = (m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1])
    add = (m[1, 0] + m[0, 1], m[2, 0] + m[0, 2], m[2, 1] + m[1, 2])
    rows = [
        [squares[0], cross[0], cross[1], cross[2]],
        [cross[0], squares[1], add[0], add[1]],
        [cross[1], add[0], squares[2], add[2]],
        [cross[2], add[1], add[2], squares[3]],
    ]
    best = int(np.argmax(squares))
    q = np.array(rows[best]) / (2 * math.sqrt(squares[best]))
    return q if q[0] >= 0 else -q

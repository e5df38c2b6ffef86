"""The camera: intrinsics, height above the road and attitude, and how they change with the image.

Pixel centres are at integers; camera axes are x right, y down, z forward; depth is the z coordinate in
metres. **Pitch > 0 means that the optical axis points ABOVE the horizon** (many rigs use the opposite sign,
see ``pitch_sign="down"`` of the importers); roll > 0 means that the right side of the camera dips.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import FusionWarning
from gvdepth.errors import CameraError

__all__ = ["Camera", "PitchSign", "rotation_homography"]

PitchSign = Literal["up", "down"]
_LARGEST_ANGLE = 60.0  # degrees
_LARGEST_SIDE = 1_000_000  # pixels
_FARTHEST_CENTER = 2.0  # image sizes beyond the edge
_ASPECT = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """A pinhole camera on a vehicle that stands on level road (section 2.1).

    Args:
        fx: focal length along the rows, pixels, > 0.
        fy: focal length along the columns, pixels, > 0.
        cx: column of the principal point, pixels; pixel centres are at integers.
        cy: row of the principal point, pixels.
        width: image width, pixels.
        height: image height, pixels.
        camera_height: of the optical centre above the road, metres, > 0; None where it is not known yet
            (see :meth:`with_preset`, :meth:`replace` and :func:`gvdepth.calibrate`).
        pitch_deg: degrees, > 0 where the optical axis points above the horizon; in (-60, 60).
        roll_deg: degrees, > 0 where the right side dips; in (-60, 60).

    Raises:
        CameraError: a number is not finite or out of range; the message names it.

    Example:
        >>> kitti = Camera(fx=721.5, fy=721.5, cx=609.6, cy=172.9, width=1242, height=375,
        ...                camera_height=1.659, pitch_deg=-0.664)
        >>> small = kitti.crop(0, 95, 1242, 280).resize(640, 144)
        >>> round(small.fx, 2), round(small.cy, 2), small.size
        (371.79, 39.82, (144, 640))
    """

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    camera_height: float | None = None
    pitch_deg: float = 0.0
    roll_deg: float = 0.0

    def __post_init__(self) -> None:
        self._check()
        self._suspect_units(("camera_height", "pitch_deg", "roll_deg"))

    def _check(self, *, far: bool = False) -> None:
        for name in ("width", "height"):
            what = f"a whole number of pixels, 1 to {_LARGEST_SIDE}"
            given, value = getattr(self, name), self._number(name, getattr(self, name), what)
            if isinstance(given, bool) or value != int(value) or not 1 <= value <= _LARGEST_SIDE:
                raise CameraError(f"{name} is {given!r}, wanted {what}")
            object.__setattr__(self, name, int(value))
        for name in ("fx", "fy"):
            self._number(name, getattr(self, name), "a focal length in pixels, > 0", positive=True)
        if self.camera_height is not None:
            what = "metres above the road, > 0"
            self._number("camera_height", self.camera_height, what, positive=True)
        for name in ("pitch_deg", "roll_deg"):
            value = self._number(name, getattr(self, name), "degrees")
            if abs(value) >= _LARGEST_ANGLE:
                raise CameraError(f"{name} is {value:g}, wanted degrees in (-60, 60)")
        for name, size in (("cx", self.width), ("cy", self.height)):
            value = self._number(name, getattr(self, name), "a pixel position")
            low, high = -_FARTHEST_CENTER * size, (1 + _FARTHEST_CENTER) * size
            if not far and not low <= value <= high:  # a small crop may lie far from it
                raise CameraError(
                    f"{name} is {value:g}, wanted {low:g} to {high:g}: at most two image sizes outside an "
                    f"image of {size} pixels; are these the numbers of another resolution?"
                )

    def _number(self, name: str, value: Any, what: str, *, positive: bool = False) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise CameraError(f"{name} is {value!r}, wanted {what}") from error
        if not math.isfinite(number) or (positive and number <= 0):
            raise CameraError(f"{name} is {number:g}, wanted {what}")
        object.__setattr__(self, name, number)
        return number

    def _suspect_units(self, names: Iterable[str]) -> None:
        written = set(names)
        if "camera_height" in written and self.camera_height is not None and self.camera_height > 10:
            _warn(f"camera_height is {self.camera_height:g}: metres are expected")
        for name in sorted(written & {"pitch_deg", "roll_deg"}):
            value = getattr(self, name)
            if 0 < abs(value) < 0.2 and round(value, 5) != value:
                _warn(
                    f"{name} is {value!r}, which looks like radians: degrees expected (round to five "
                    "decimals if they are degrees)"
                )

    @classmethod
    def exact(cls, **numbers: Any) -> Camera:
        """A camera of numbers that were computed or stored, whose units are not suspected.

        Raises:
            CameraError: as the constructor.
        """
        made = cls._bare(numbers)
        made._check()
        return made

    @classmethod
    def _bare(cls, numbers: dict[str, Any]) -> Camera:
        made = object.__new__(cls)
        for field in dataclasses.fields(cls):
            if field.name not in numbers and field.default is dataclasses.MISSING:
                raise CameraError(f"{field.name} is missing")
            object.__setattr__(made, field.name, numbers.get(field.name, field.default))
        return made

    def computed(self, **changes: Any) -> Camera:
        """A copy with computed numbers: neither their units nor a far principal point are suspected.

        See :meth:`replace` for numbers that a person gives.
        """
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        made = self._bare(kept | changes)
        made._check(far=True)
        return made

    # What follows from the numbers

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` of the image, pixels."""
        return self.height, self.width

    @property
    def pitch(self) -> float:
        """Pitch, radians, > 0 above the horizon."""
        return math.radians(self.pitch_deg)

    @property
    def roll(self) -> float:
        """Roll, radians, > 0 where the right side dips."""
        return math.radians(self.roll_deg)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The 3x3 intrinsic matrix K."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector to the ground in camera axes, ``(sin r cos p, cos r cos p, -sin p)``."""
        p, r = self.pitch, self.roll
        return np.array([math.sin(r) * math.cos(p), math.cos(r) * math.cos(p), -math.sin(p)])

    @property
    def rotation(self) -> NDArray[np.float64]:
        """3x3 rotation from camera axes to level axes (x right, y down, z forward): ``Rx(p) Rz(r)``."""
        p, r = self.pitch, self.roll
        around_z = np.array([[math.cos(r), -math.sin(r), 0.0], [math.sin(r), math.cos(r), 0.0], [0, 0, 1.0]])
        around_x = np.array([[1.0, 0, 0], [0, math.cos(p), -math.sin(p)], [0, math.sin(p), math.cos(p)]])
        return around_x @ around_z

    @property
    def hfov_deg(self) -> float:
        """Horizontal field of view, degrees."""
        return 2 * math.degrees(math.atan(self.width / 2 / self.fx))

    def require_height(self) -> float:
        """The camera's height in metres.

        Raises:
            CameraError: it is not known.
        """
        if self.camera_height is None:
            raise CameraError(
                "camera_height is not known; give it in metres (camera_height=, --camera-height), take a "
                "preset with .with_preset(NAME), or estimate it with gvdepth.calibrate"
            )
        return self.camera_height

    # Tensors

    def tensor(self, dtype: torch.dtype = torch.float32, device: Any = None) -> Float[Tensor, "7"]:
        """``(fx, fy, cx, cy, camera_height, pitch, roll)``, the angles in radians.

        Raises:
            CameraError: the height is not known.
        """
        height = self.require_height()
        numbers = [self.fx, self.fy, self.cx, self.cy, height, self.pitch, self.roll]
        return torch.tensor(numbers, dtype=dtype, device=device)

    @staticmethod
    def batch(
        cameras: Sequence[Camera], dtype: torch.dtype = torch.float32, device: Any = None
    ) -> Float[Tensor, "batch 7"]:
        """The cameras' tensors, stacked.

        Raises:
            CameraError: no camera, or a height is not known.
        """
        if not cameras:
            raise CameraError("cameras is empty, wanted one camera per image")
        return torch.stack([camera.tensor(dtype) for camera in cameras]).to(device=device)

    @classmethod
    def from_tensor(cls, numbers: Float[Tensor, "7"], size: tuple[int, int]) -> Camera:
        """The camera of a tensor that :meth:`tensor` made; ``size`` is ``(height, width)``."""
        fx, fy, cx, cy, camera_height, pitch, roll = numbers.detach().double().cpu().tolist()
        plain = cls(fx=fx, fy=fy, cx=cx, cy=cy, height=size[0], width=size[1])
        angles = {"pitch_deg": math.degrees(pitch), "roll_deg": math.degrees(roll)}
        return plain.computed(camera_height=camera_height, **angles)

    # What happens to the image happens to the camera; height and attitude stay (section 2.7)

    def crop(self, x0: float, y0: float, width: int, height: int) -> Camera:
        """The camera of the rectangle with the upper left pixel ``(x0, y0)``; it may reach beyond the image.

        Raises:
            CameraError: the rectangle is empty or too far outside.
        """
        return self.computed(cx=self.cx - x0, cy=self.cy - y0, width=width, height=height)

    def resize(self, width: int, height: int) -> Camera:
        """The camera of the resized image: ``f *= s``, ``c = (c + 1/2) s - 1/2``."""
        sx, sy = width / self.width, height / self.height
        return self.computed(
            fx=self.fx * sx,
            fy=self.fy * sy,
            cx=(self.cx + 0.5) * sx - 0.5,
            cy=(self.cy + 0.5) * sy - 0.5,
            width=width,
            height=height,
        )

    def flip(self) -> Camera:
        """The camera of the image mirrored left to right: ``cx = width - 1 - cx``, roll negated."""
        return self.computed(cx=self.width - 1 - self.cx, roll_deg=-self.roll_deg)

    def rotate(self, pitch_deg: float = 0.0, roll_deg: float = 0.0) -> Camera:
        """The camera turned in place by so many degrees; :func:`rotation_homography` gives the pixels' map.

        Raises:
            CameraError: the new angles are out of range.
        """
        return self.computed(pitch_deg=self.pitch_deg + pitch_deg, roll_deg=self.roll_deg + roll_deg)

    def for_image(self, height: int, width: int) -> Camera:
        """The camera for an image of this size: itself, or resized where the aspect agrees within 1 %.

        Raises:
            CameraError: the image has another aspect, so it was cropped and the camera cannot be known.
        """
        if (height, width) == self.size:
            return self
        ratio = (width / height) / (self.width / self.height)
        if abs(ratio - 1) > _ASPECT:
            raise CameraError(
                f"the image is {width}x{height}, the camera is of {self.width}x{self.height} images: "
                "another aspect. Crop the camera as the image was cropped: camera.crop(x0, y0, width, height)"
            )
        return self.resize(width, height)

    def replace(self, **changes: Any) -> Camera:
        """A copy with other numbers; these are checked as new ones, the others stay as they are.

        Raises:
            CameraError: unknown name, or a number out of range.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise CameraError(f"a camera has no {unknown[0]!r}; it has {', '.join(known)}")
        kept = {name: getattr(self, name) for name in known}
        made = self._bare(kept | changes)
        made._check(far=not {"cx", "cy", "width", "height"} & set(changes))
        made._suspect_units(changes)
        return made

    def with_preset(self, name: str) -> Camera:
        """Height and attitude of a known rig, such as ``"kitti"``; see :data:`gvdepth.cameras.PRESETS`.

        Raises:
            CameraError: unknown name.
        """
        from gvdepth.cameras import preset

        found = preset(name)
        return self.computed(
            camera_height=found.camera_height, pitch_deg=found.pitch_deg, roll_deg=found.roll_deg
        )

    # Made from other numbers

    @classmethod
    def from_fov(cls, hfov_deg: float, width: int, height: int, **numbers: Any) -> Camera:
        """A camera with square pixels and the principal point in the middle.

        Args:
            hfov_deg: horizontal field of view, degrees in (0, 180).
            width: of the image, pixels.
            height: of the image, pixels.
            **numbers: ``camera_height``, ``pitch_deg``, ``roll_deg``, or ``cx`` and ``cy``.

        Raises:
            CameraError: a number is out of range.

        Example:
            >>> round(Camera.from_fov(90, 640, 480, camera_height=1.5).fx, 6)
            320.0
        """
        if not 0 < hfov_deg < 180:
            raise CameraError(f"hfov_deg is {hfov_deg!r}, wanted degrees in (0, 180)")
        f = width / 2 / math.tan(math.radians(hfov_deg) / 2)
        center = {"cx": (width - 1) / 2, "cy": (height - 1) / 2}
        return cls(fx=f, fy=f, width=width, height=height, **(center | numbers))

    @classmethod
    def from_matrix(cls, matrix: Any, width: int, height: int, **numbers: Any) -> Camera:
        """A camera of a 3x3 or 3x4 matrix; see :func:`gvdepth.calib_io.from_matrix`."""
        from gvdepth import calib_io

        return calib_io.from_matrix(matrix, width, height, **numbers)

    @classmethod
    def from_extrinsics(cls, matrix: Any, transform: Any, width: int, height: int) -> Camera:
        """A camera whose height and attitude follow from ``T_vehicle_from_camera``.

        See :func:`gvdepth.calib_io.from_extrinsics`.
        """
        from gvdepth import calib_io

        return calib_io.from_extrinsics(matrix, transform, width, height)

    @classmethod
    def from_kitti(cls, path: str | os.PathLike[str], **options: Any) -> Camera:
        """Read a KITTI calibration file; see :func:`gvdepth.calib_io.read_kitti`."""
        from gvdepth import calib_io

        return calib_io.read_kitti(path, **options)

    @classmethod
    def from_nuscenes(cls, path: str | os.PathLike[str], **options: Any) -> Camera:
        """Read a row of nuScenes' ``calibrated_sensor.json``; see :func:`gvdepth.calib_io.read_nuscenes`."""
        from gvdepth import calib_io

        return calib_io.read_nuscenes(path, **options)

    @classmethod
    def from_ros(cls, path: str | os.PathLike[str], **options: Any) -> Camera:
        """Read a ROS ``camera_info`` YAML file; see :func:`gvdepth.calib_io.read_ros`."""
        from gvdepth import calib_io

        return calib_io.read_ros(path, **options)

    @classmethod
    def from_opencv(cls, path: str | os.PathLike[str], **options: Any) -> Camera:
        """Read an OpenCV ``FileStorage`` file; see :func:`gvdepth.calib_io.read_opencv`."""
        from gvdepth import calib_io

        return calib_io.read_opencv(path, **options)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Camera:
        """Read a camera file of any known format; see :func:`gvdepth.calib_io.read_camera`."""
        from gvdepth import calib_io

        return calib_io.read_camera(path, **options)

    def save(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write a camera file; see :func:`gvdepth.calib_io.write_camera`."""
        from gvdepth import calib_io

        calib_io.write_camera(self, path, **options)


def rotation_homography(source: Camera, target: Camera) -> NDArray[np.float64]:
    """The map from pixels of ``target`` to pixels of ``source`` for two cameras in one place.

    Args:
        source: the camera that took the image.
        target: the camera that the image is warped to, of other attitude or intrinsics.

    Returns:
        3x3 matrix H: ``H (u, v, 1) = w (u', v', 1)``. The depth changes too: ``depth = source depth / w``.
        Pixels with ``w <= 0`` look behind the source.

    Example:
        >>> camera = Camera(fx=100, fy=100, cx=49.5, cy=29.5, width=100, height=60, camera_height=1.5)
        >>> bool(np.allclose(rotation_homography(camera, camera), np.eye(3)))
        True
    """
    turn = source.rotation.T @ target.rotation
    return source.matrix @ turn @ np.linalg.inv(target.matrix)


def _warn(text: str) -> None:
    warnings.warn(text, FusionWarning, stacklevel=5)

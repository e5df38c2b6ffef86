"""Lens distortion, taken out of images when they are loaded: a pinhole camera has none (extra ``cv``).

The maps are OpenCV's; the rectified image has intrinsics of its own, which are the camera's to predict with.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import ShapeError, check_range, reading, require_extra
from gvdepth.calib_formats import stored_distortion
from gvdepth.camera import Camera
from gvdepth.errors import CalibrationError, CameraError

__all__ = ["Lens", "Rectifier", "read_rectifier", "rectifier"]

Lens = Literal["pinhole", "fisheye"]


@dataclass(frozen=True, slots=True, eq=False)
class Rectifier:
    """Rectifies the images of one lens.

    Attributes:
        camera: of the rectified images.
        raw_size: ``(height, width)`` of the images that it takes.
        columns: (height, width) float32, where each rectified pixel lies in the raw image.
        rows: the same.
    """

    camera: Camera
    raw_size: tuple[int, int]
    columns: NDArray[np.float32]
    rows: NDArray[np.float32]

    def __call__(self, image: NDArray[Any]) -> NDArray[Any]:
        """The rectified image, bilinear; 0 where the lens did not look.

        Args:
            image: (height, width) or (height, width, channels), of the calibrated size.

        Raises:
            ShapeError: another size.
        """
        if image.shape[:2] != self.raw_size:
            raise ShapeError(
                f"image is {image.shape[1]}x{image.shape[0]}, the lens was calibrated at "
                f"{self.raw_size[1]}x{self.raw_size[0]}; rectify first, resize afterwards"
            )
        cv2: Any = require_extra("cv2", "cv", "gvdepth")
        return cv2.remap(image, self.columns, self.rows, cv2.INTER_LINEAR)


def rectifier(
    matrix: Any,
    distortion: Any,
    width: int,
    height: int,
    *,
    lens: Lens = "pinhole",
    balance: float = 0.0,
    camera_height: float | None = None,
    pitch_deg: float = 0.0,
    roll_deg: float = 0.0,
) -> Rectifier:
    """A rectifier for OpenCV's lens models.

    Args:
        matrix: (3, 3) intrinsics of the raw image.
        distortion: (4,), (5,), (8,), (12,) or (14,) coefficients of the pinhole model (``plumb_bob``,
            ``rational_polynomial``), or (4,) of the fisheye model (``equidistant``).
        width: of the raw image, pixels.
        height: of the raw image, pixels.
        lens: ``"pinhole"`` or ``"fisheye"``.
        balance: 0 keeps only pixels that the lens saw, 1 keeps all that it saw and leaves black corners.
        camera_height: metres, or None.
        pitch_deg: degrees, > 0 looks up.
        roll_deg: degrees, > 0 where the right side dips.

    Raises:
        CameraError: numbers that no camera has.
        CalibrationError: unknown lens, or another number of coefficients.
        MissingExtraError: OpenCV is not installed.
    """
    cv2: Any = require_extra("cv2", "cv", "gvdepth")
    check_range("balance", balance, 0.0, 1.0)
    raw = Camera.from_matrix(matrix, width, height)
    numbers = np.asarray(distortion, dtype=np.float64).ravel()
    counts = {"pinhole": (4, 5, 8, 12, 14), "fisheye": (4,)}
    if lens not in counts:
        raise CalibrationError(f"lens is {lens!r}, wanted 'pinhole' or 'fisheye'")
    if numbers.size not in counts[lens] or not np.isfinite(numbers).all():
        wanted = ", ".join(map(str, counts[lens]))
        raise CalibrationError(f"distortion is {numbers.tolist()}, wanted {wanted} numbers for lens {lens!r}")
    k, size, turn = raw.matrix, (raw.width, raw.height), np.eye(3)
    if lens == "pinhole":
        new, _ = cv2.getOptimalNewCameraMatrix(k, numbers, size, balance)
        columns, rows = cv2.initUndistortRectifyMap(k, numbers, turn, new, size, cv2.CV_32FC1)
    else:
        new = cv2.fisheye.estimateNewCameraMatrixForUndistortRectify(k, numbers, size, turn, balance=balance)
        columns, rows = cv2.fisheye.initUndistortRectifyMap(k, numbers, turn, new, size, cv2.CV_32FC1)
    if not np.isfinite(new).all() or min(new[0, 0], new[1, 1]) <= 0:
        raise CameraError(f"distortion {numbers.tolist()} leaves no rectified image; check its order")
    mount = {"camera_height": camera_height, "pitch_deg": pitch_deg, "roll_deg": roll_deg}
    camera = Camera.from_matrix(new, raw.width, raw.height, **mount)
    return Rectifier(camera, raw.size, columns, rows)


def read_rectifier(path: str | os.PathLike[str], **options: Any) -> Rectifier:
    """A rectifier of a ROS ``camera_info`` or OpenCV file (YAML, JSON).

    Args:
        path: the file.
        **options: what :func:`rectifier` takes beside the numbers of the file.

    Raises:
        CalibrationError: not readable, or the file holds no distortion or no size.
    """
    with reading(path, "is no camera file", CalibrationError):
        matrix, distortion, size, lens = stored_distortion(Path(path))
        options.setdefault("lens", lens)
        return rectifier(matrix, distortion, *size, **options)

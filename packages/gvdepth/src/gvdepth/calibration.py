"""Height, pitch and roll of a camera from depth maps of the road (section 2.8, the paper's Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import ConfigError, DataError, ShapeError
from fusion_core.results import Result
from fusion_core.seeding import rng
from gvdepth.camera import Camera
from gvdepth.errors import CalibrationError
from gvdepth.plane import attitude_of_normal, ransac_plane

__all__ = ["Calibration", "calibrate", "unproject"]


@dataclass(frozen=True, slots=True, eq=False)
class Calibration(Result):
    """A calibration; unpacks to ``camera_height, pitch_deg, roll_deg``.

    Attributes:
        camera_height: metres above the road, the median over images.
        pitch_deg: degrees, > 0 looks up, the median over images.
        roll_deg: degrees, > 0 where the right side dips.
        inliers: mean share of road pixels on the plane, in [0, 1].
        per_image: (images, 4): height, pitch, roll, inliers; NaN where an image has too little road.
    """

    camera_height: float
    pitch_deg: float
    roll_deg: float
    inliers: float
    per_image: NDArray[np.float64]

    def __iter__(self) -> Iterator[float]:
        return iter((self.camera_height, self.pitch_deg, self.roll_deg))

    @property
    def pitch(self) -> float:
        """Radians."""
        return math.radians(self.pitch_deg)

    @property
    def roll(self) -> float:
        """Radians."""
        return math.radians(self.roll_deg)

    def apply(self, camera: Camera) -> Camera:
        """The camera with this height and attitude."""
        return camera.computed(
            camera_height=self.camera_height, pitch_deg=self.pitch_deg, roll_deg=self.roll_deg
        )


def as_array(x: Any) -> NDArray[Any]:
    """A tensor or array as a NumPy array."""
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def unproject(depth: NDArray[Any], camera: Camera, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The points (n, 3), camera axes, metres, of the True pixels of a depth map (height, width)."""
    rows, columns = np.nonzero(mask)
    z = depth[rows, columns].astype(np.float64)
    return np.stack([(columns - camera.cx) / camera.fx * z, (rows - camera.cy) / camera.fy * z, z], 1)


def paired_with_cameras(
    depths: Sequence[Any], camera: Camera | Sequence[Camera]
) -> list[tuple[NDArray[Any], Camera]]:
    """Each map (height, width) with its camera.

    Raises:
        ShapeError: another shape, or another number of cameras.
        DataError: no map.
        CameraError: a map is of another aspect than its camera.
    """
    maps = [as_array(depth) for depth in depths]
    if not maps:
        raise DataError("depths is empty, wanted at least one depth map (height, width)")
    cameras = [camera] * len(maps) if isinstance(camera, Camera) else list(camera)
    if len(cameras) != len(maps):
        raise ShapeError(f"{len(cameras)} cameras for {len(maps)} depth maps, wanted one, or one per map")
    made: list[tuple[NDArray[Any], Camera]] = []
    for i, (depth, one) in enumerate(zip(maps, cameras, strict=True)):
        single = depth.ndim > 2 and depth.size == math.prod(depth.shape[-2:])
        flat = depth.reshape(depth.shape[-2:]) if single else depth
        if flat.ndim != 2:
            raise ShapeError(f"depths[{i}] has shape {depth.shape}, wanted (height, width)")
        made.append((flat, one.for_image(*flat.shape)))
    return made


def calibrate(
    depths: Sequence[Any],
    road_masks: Sequence[Any] | None,
    camera: Camera | Sequence[Camera],
    *,
    max_depth: float = 20.0,
    threshold: float = 0.05,
    minimum_pixels: int = 100,
    trials: int = 256,
    seed: int = 0,
) -> Calibration:
    """Estimate height, pitch and roll of a camera from metric depth of the road (Algorithm 1).

    Of every image the road pixels nearer than ``max_depth`` are unprojected and a plane is found by RANSAC,
    then refined on its inliers; the medians over the images are returned. This "calibrate" is of camera
    numbers.

    Args:
        depths: depth maps (height, width), metres; 0, NaN or infinite is a hole.
        road_masks: bool maps, True on the road; None takes the lower third of each image, middle half.
        camera: one, or one per image; of it only the intrinsics count.
        max_depth: metres.
        threshold: distance of an inlier from the plane, metres.
        minimum_pixels: road pixels that an image has to have.
        trials: random triples per image.
        seed: of the draws.

    Returns:
        The calibration; ``calibration.apply(camera)`` puts it into a camera.

    Raises:
        CalibrationError: no image has enough road, or the points determine no plane.
        ShapeError: maps, masks and cameras do not fit each other.
        DataError: no maps, or a mask that is not bool.

    Example:
        >>> from gvdepth.geometry import ground_depth
        >>> camera = Camera(fx=300, fy=300, cx=160, cy=80, width=320, height=200,
        ...                 camera_height=1.5, pitch_deg=-1)
        >>> depth = ground_depth(camera, backend="numpy", dtype=np.float64)
        >>> [round(value, 6) + 0.0 for value in calibrate([depth], None, camera)]
        [1.5, -1.0, 0.0]
    """
    if not max_depth > 0 or not threshold > 0:
        raise ConfigError(f"max_depth is {max_depth!r} and threshold {threshold!r}, wanted metres > 0")
    pairs = paired_with_cameras(depths, camera)
    if road_masks is not None and len(road_masks) != len(pairs):
        raise ShapeError(f"{len(road_masks)} road_masks for {len(pairs)} depth maps, wanted one per map")
    rows = np.full((len(pairs), 4), np.nan)
    for i, (depth, one) in enumerate(pairs):
        mask = _lower_middle(one) if road_masks is None else _mask(i, road_masks[i], depth)
        with np.errstate(invalid="ignore"):
            mask = mask & np.isfinite(depth) & (depth > 0) & (depth < max_depth)
        points = unproject(depth, one, mask)
        if len(points) < max(minimum_pixels, 3):
            continue
        normal, distance, share = ransac_plane(
            points, threshold=threshold, trials=trials, rng=rng(seed, "ransac", i)
        )
        rows[i] = (distance, *attitude_of_normal(normal), share)
    used = ~np.isnan(rows[:, 0])
    if not used.any():
        raise CalibrationError(
            f"none of {len(pairs)} images has {minimum_pixels} road pixels nearer than {max_depth:g} m; "
            "check road_masks, the unit of depths (metres) and max_depth"
        )
    height, pitch, roll = (float(np.median(rows[used, k])) for k in range(3))
    return Calibration(height, pitch, roll, float(rows[used, 3].mean()), rows)


def _mask(i: int, mask: Any, depth: NDArray[Any]) -> NDArray[np.bool_]:
    found = as_array(mask)
    if found.dtype != np.bool_:
        raise DataError(f"road_masks[{i}] is {found.dtype}, wanted bool (True = road)")
    if found.size != depth.size or found.shape[-2:] != depth.shape:
        raise ShapeError(f"road_masks[{i}] has shape {found.shape}, wanted that of its map, {depth.shape}")
    return found.reshape(depth.shape)


def _lower_middle(camera: Camera) -> NDArray[np.bool_]:
    mask = np.zeros(camera.size, dtype=np.bool_)
    mask[2 * camera.height // 3 :, camera.width // 4 : 3 * camera.width // 4] = True
    return mask

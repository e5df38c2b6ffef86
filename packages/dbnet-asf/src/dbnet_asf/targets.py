"""Labels of an image: the shrink map, the threshold map and where each counts (section 2.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dbnet_asf.config import Distance, LabelConfig
from dbnet_asf.geometry import PRECISION, area, check_polygon, offset, perimeter
from fusion_core.errors import InputError, check_range

Polygon = Float[np.ndarray, "points 2"]
Image = UInt8[np.ndarray, "height width"]


@dataclass(frozen=True, slots=True)
class Targets:
    """What the losses compare with; (height, width) for one image, (batch, height, width) for many.

    Attributes:
        gt: True inside a shrunk text region.
        mask: False where nothing is known (ignored text).
        thresh_map: the threshold to be learned, in [thresh_min, thresh_max].
        thresh_mask: True where the threshold map counts.
        ignore: per image the flags of its polygons after processing.
    """

    gt: Bool[Tensor, "*batch height width"]
    mask: Bool[Tensor, "*batch height width"]
    thresh_map: Float[Tensor, "*batch height width"]
    thresh_mask: Bool[Tensor, "*batch height width"]
    ignore: tuple[Any, ...] = ()

    @classmethod
    def stack(cls, items: Sequence[Targets]) -> Targets:
        """One batch of images of one size.

        Raises:
            InputError: no items.
        """
        if not items:
            raise InputError("items is empty, wanted the targets of at least one image")
        maps = [
            torch.stack([getattr(t, name) for t in items])
            for name in ("gt", "mask", "thresh_map", "thresh_mask")
        ]
        return cls(*maps, ignore=tuple(t.ignore for t in items))

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> Self:
        """The same on another device."""
        names = ("gt", "mask", "thresh_map", "thresh_mask")
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names}
        return dataclasses.replace(self, **moved)


def make_targets(
    polygons: Sequence[ArrayLike],
    ignore: Sequence[bool] | NDArray[Any] | None,
    size: tuple[int, int],
    config: LabelConfig | None = None,
    *,
    training: bool = True,
) -> Targets:
    """The four label maps of one image.

    Args:
        polygons: each (points, 2), x and y in pixels; what lies outside the image is cut or ignored.
        ignore: True where a polygon is not to be learned ("don't care"); None for nowhere.
        size: height and width of the image.
        config: :class:`~dbnet_asf.config.LabelConfig`; its defaults are the authors'.
        training: clip to the image, drop areas below one pixel and mend the direction of the vertices.

    Raises:
        ShapeError: a polygon with fewer than three points, or not of shape (points, 2).
        NonFiniteError: a polygon with NaN.
        InputError: as many flags as polygons are wanted; a size below 1.

    Example:
        >>> word = [[10, 10], [50, 10], [50, 30], [10, 30]]
        >>> targets = make_targets([word], None, (48, 64))
        >>> targets.gt.sum().item(), round(targets.thresh_map.max().item(), 3)
        (559, 0.7)
    """
    config = config if config is not None else LabelConfig()
    check_size(size)
    outlines = [check_polygon(f"polygons[{i}]", polygon) for i, polygon in enumerate(polygons)]
    flags = check_ignore(ignore, len(outlines))
    if training:
        outlines, flags = clip_polygons(outlines, flags, size)
    gt, mask, flags = shrink_map(
        outlines,
        flags,
        size,
        shrink_ratio=config.shrink_ratio,
        min_text_size=config.min_text_size,
        precise=config.precise,
        pieces=config.pieces,
    )
    thresh, thresh_mask = threshold_map(
        outlines,
        flags,
        size,
        shrink_ratio=config.shrink_ratio,
        thresh_min=config.thresh_min,
        thresh_max=config.thresh_max,
        distance=config.distance,
        precise=config.precise,
        pieces=config.pieces,
    )
    maps = (torch.from_numpy(gt).bool(), torch.from_numpy(mask).bool(), torch.from_numpy(thresh))
    return Targets(*maps, torch.from_numpy(thresh_mask).bool(), tuple(bool(flag) for flag in flags))


def clip_polygons(
    polygons: Sequence[Polygon], ignore: NDArray[np.bool_], size: tuple[int, int]
) -> tuple[list[Polygon], NDArray[np.bool_]]:
    """Clip to the image, ignore what has less than one pixel of area, make the vertices run clockwise.

    Returns:
        New polygons and new flags (section 2.2, step 1).
    """
    height, width = size
    flags, clipped = ignore.copy(), list[Polygon]()
    for index, polygon in enumerate(polygons):
        points = np.clip(polygon, 0, (width - 1, height - 1))
        following = np.roll(points, -1, 0)
        signed = float(((following[:, 0] - points[:, 0]) * (following[:, 1] + points[:, 1])).sum() / 2)
        flags[index] |= abs(signed) < 1
        clipped.append(points[::-1] if signed > 0 else points)
    return clipped, flags


def shrink_distance(polygon: Polygon, shrink_ratio: float = 0.4) -> float:
    """D = area (1 - r^2) / perimeter, by how much an outline is shrunk and grown (DBNet, equation 10)."""
    around = float(perimeter(polygon))
    return float(area(polygon)) * (1 - shrink_ratio**2) / around if around > 0 else 0.0


def shrink_map(
    polygons: Sequence[Polygon],
    ignore: NDArray[np.bool_] | Sequence[bool],
    size: tuple[int, int],
    *,
    shrink_ratio: float = 0.4,
    min_text_size: float = 8.0,
    precise: bool = False,
    pieces: Literal["first", "all"] = "first",
) -> tuple[Image, Image, NDArray[np.bool_]]:
    """Shrunk text regions, where they count, and the flags with those that turned out to be too small.

    Args:
        polygons: each (points, 2) in pixels.
        ignore: True where a polygon is not to be learned.
        size: height and width.
        shrink_ratio: inside (0, 1).
        min_text_size: polygons whose height or width is below are ignored.
        precise: shrink at 1/1024 pixel.
        pieces: of a region that falls apart, the first or all.

    Returns:
        uint8 0 or 1 (height, width) twice, and bool (polygons,) (section 2.2, step 2).

    Raises:
        ConfigError: ``shrink_ratio`` outside (0, 1).
    """
    check_range("shrink_ratio", shrink_ratio, 0, 1, open=True)
    gt, mask = np.zeros(size, np.uint8), np.ones(size, np.uint8)
    flags = np.array(ignore, np.bool_).copy()
    scale = PRECISION if precise else 1
    for index, polygon in enumerate(polygons):
        if not flags[index] and np.ptp(polygon, 0).min() >= min_text_size:
            shrunk = offset(polygon, -shrink_distance(polygon, shrink_ratio), scale=scale)
            for piece in shrunk if pieces == "all" else shrunk[:1]:
                _fill(gt, piece, 1)
            if shrunk:
                continue
        _fill(mask, polygon, 0)
        flags[index] = True
    return gt, mask, flags


def threshold_map(
    polygons: Sequence[Polygon],
    ignore: NDArray[np.bool_] | Sequence[bool],
    size: tuple[int, int],
    *,
    shrink_ratio: float = 0.4,
    thresh_min: float = 0.3,
    thresh_max: float = 0.7,
    distance: Distance = "official",
    precise: bool = False,
    pieces: Literal["first", "all"] = "first",
) -> tuple[Float32[np.ndarray, "height width"], Image]:
    """The threshold that is to be learned, highest on the outlines, and where it counts.

    Args:
        polygons: each (points, 2) in pixels.
        ignore: True where a polygon has no threshold; those of :func:`shrink_map`.
        size: height and width.
        shrink_ratio: inside (0, 1); of the distance that the outlines are grown by.
        thresh_min: away from text.
        thresh_max: on an outline, above ``thresh_min``.
        distance: to an edge: the authors' (that of the nearer end where the ends are seen under less than a
            right angle), the exact one, or that of a drawn outline (up to 0.05 off, fast).
        precise: grow at 1/1024 pixel.
        pieces: of a region that grows into several, the first or all.

    Returns:
        float32 in [thresh_min, thresh_max], and uint8 0 or 1, both (height, width) (section 2.2, step 3).

    Raises:
        ConfigError: ``shrink_ratio`` outside (0, 1) or ``thresh_min`` not below ``thresh_max``.
    """
    settings = LabelConfig(shrink_ratio, thresh_min, thresh_max, distance=distance, pieces=pieces)
    canvas, mask = np.zeros(size, np.float32), np.zeros(size, np.uint8)
    scale = PRECISION if precise else 1
    for polygon, ignored in zip(polygons, ignore, strict=True):
        reach = 0.0 if ignored else shrink_distance(polygon, shrink_ratio)
        grown = offset(polygon, reach, scale=scale) if reach > 0 else []
        for piece in grown if settings.pieces == "all" else grown[:1]:
            _fill(mask, piece, 1)
            _raise_band(canvas, polygon, piece, reach, settings.distance)
    canvas *= thresh_max - thresh_min
    canvas += thresh_min
    return canvas, mask


def _fill(image: Image, polygon: NDArray[Any], value: int) -> None:
    height, width = image.shape
    # Far outside, 16-bit coordinates would wrap inside OpenCV's fixed-point arithmetic.
    points = np.clip(np.trunc(polygon), -2 * width - 2 * height - 64, 3 * (width + height) + 64)
    cv2.fillPoly(image, [points.astype(np.int32)], value)


def _raise_band(
    canvas: Float32[np.ndarray, "height width"],
    polygon: Polygon,
    grown: NDArray[Any],
    reach: float,
    distance: Distance,
) -> None:
    """Raise the canvas to 1 - distance / reach in the grown polygon's box (its part inside the image)."""
    height, width = canvas.shape
    left, top = np.trunc(grown.min(0)).astype(int)
    right, bottom = np.trunc(grown.max(0)).astype(int)
    x0, x1, y0, y1 = max(left, 0), min(right, width - 1), max(top, 0), min(bottom, height - 1)
    if x0 > x1 or y0 > y1:
        return
    grid = (np.arange(x0, x1 + 1.0), np.arange(y0, y1 + 1.0))
    found = _DISTANCES[distance](polygon, *grid)
    found /= -reach
    found += 1
    np.maximum(found, 0, out=found)
    box = canvas[y0 : y1 + 1, x0 : x1 + 1]
    np.maximum(box, found, out=box)


def _edges(polygon: Polygon) -> zip[tuple[Any, Any]]:
    return zip(polygon, np.roll(polygon, -1, 0), strict=True)


def _official_distance(polygon: Polygon, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    best: NDArray[Any] | None = None
    for start, end in _edges(polygon):
        x1, y1, x2, y2 = x - start[0], y - start[1], x - end[0], y - end[1]
        a = y1[:, None] ** 2 + x1**2
        b = y2[:, None] ** 2 + x2**2
        square = float(((end - start) ** 2).sum())
        dx, dy = end - start
        nearest = np.minimum(a, b)
        if square > 0:
            across = (y1 * dx)[:, None] - x1 * dy
            across *= across
            across /= square
            np.copyto(nearest, across, where=a + b <= square)
        best = nearest if best is None else np.minimum(best, nearest, out=best)
    return np.sqrt(cast("NDArray[Any]", best)).astype(np.float32)


def _exact_distance(polygon: Polygon, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    best: NDArray[Any] | None = None
    for start, end in _edges(polygon):
        length = float(np.hypot(*(end - start)))
        dx, dy = (end - start) / length if length > 0 else (1.0, 0.0)
        x1, y1 = x - start[0], y - start[1]
        along = (y1 * dy).astype(np.float32)[:, None] + (x1 * dx).astype(np.float32)
        across = (y1 * dx).astype(np.float32)[:, None] - (x1 * dy).astype(np.float32)
        along -= np.clip(along, 0, np.float32(length))
        along *= along
        across *= across
        along += across
        best = along if best is None else np.minimum(best, along, out=best)
    return np.sqrt(cast("NDArray[Any]", best))


def _raster_distance(polygon: Polygon, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    # The outline may pass beside the image: it is drawn on a canvas that holds all of it.
    low = np.floor(np.minimum(polygon.min(0), (x[0], y[0]))).astype(int)
    high = np.ceil(np.maximum(polygon.max(0), (x[-1], y[-1]))).astype(int)
    drawn = np.ones((high - low + 1)[::-1], np.uint8)
    shift = 4
    points = np.rint((polygon - low) * (1 << shift)).astype(np.int32)
    cv2.polylines(drawn, [points], True, 0, shift=shift)
    found = cv2.distanceTransform(drawn, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    rows, columns = int(y[0]) - low[1], int(x[0]) - low[0]
    return found[rows : rows + len(y), columns : columns + len(x)]


_DISTANCES = {"official": _official_distance, "exact": _exact_distance, "raster": _raster_distance}


def check_ignore(ignore: Sequence[bool] | NDArray[Any] | None, count: int) -> NDArray[np.bool_]:
    """The flags as a bool array, all False for None.

    Raises:
        InputError: another number of flags than polygons.
    """
    flags = np.zeros(count, np.bool_) if ignore is None else np.asarray(ignore).astype(np.bool_).reshape(-1)
    if len(flags) != count:
        raise InputError(f"ignore has {len(flags)} flags for {count} polygons, wanted one each")
    return flags


def check_size(size: tuple[int, int]) -> None:
    """Raise unless the size is two integers of at least 1.

    Raises:
        InputError: otherwise.
    """
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"size is {tuple(size)}, wanted (height, width) of at least 1")

"""Labels of an image: the shrink map, the threshold map and where each counts (section 2.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dbnet_asf.config import Distance, LabelConfig
from dbnet_asf.geometry import PRECISION, Offsetter, area, check_polygon, perimeter
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
        (261, 0.7)
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
    flags = ignore.copy()
    if not len(polygons):
        return [], flags
    pack = _Pack(polygons)
    np.clip(pack.points, 0, (width - 1.0, height - 1.0), out=pack.points)
    signed = pack.signed_areas()
    flags |= np.abs(signed) < 1
    return [part[::-1] if turned else part for part, turned in zip(pack, signed > 0, strict=True)], flags


class _Pack:
    """Polygons end to end in one array, so that what is summed over their vertices is summed at once."""

    def __init__(self, polygons: Sequence[Polygon]) -> None:
        counts = [len(polygon) for polygon in polygons]
        # Beyond this, OpenCV's fixed-point coordinates would wrap.
        self.points = np.clip(np.concatenate(list(polygons)).astype(np.float64), -1e6, 1e6)
        self.ends = np.cumsum(counts, dtype=np.int64)
        self.starts: NDArray[np.int64] = self.ends - np.array(counts, np.int64)
        self._next = np.arange(1, len(self.points) + 1)
        self._next[self.ends - 1] = self.starts

    def __iter__(self) -> Iterator[Polygon]:
        return (self.points[a:b] for a, b in zip(self.starts.tolist(), self.ends.tolist(), strict=True))

    def signed_areas(self) -> NDArray[np.float64]:
        """Net areas, negative where the vertices run clockwise on the screen."""
        here, there = self.points, self.points[self._next]
        return np.add.reduceat((there[:, 0] - here[:, 0]) * (there[:, 1] + here[:, 1]), self.starts) / 2

    def distances(self, shrink_ratio: float) -> NDArray[np.float64]:
        """D of each polygon: area (1 - r^2) / perimeter; 0 where there is no outline."""
        steps = self.points[self._next] - self.points
        around = np.add.reduceat(np.hypot(steps[:, 0], steps[:, 1]), self.starts)
        areas = np.abs(self.signed_areas()) * (1 - shrink_ratio**2)
        return np.divide(areas, around, out=np.zeros_like(areas), where=around > 0)

    def sides(self) -> NDArray[np.float64]:
        """The shorter side of each polygon's upright box."""
        highest = np.maximum.reduceat(self.points, self.starts)
        return (highest - np.minimum.reduceat(self.points, self.starts)).min(1)

    def paths(self, scale: int) -> list[list[list[int]]]:
        """Vertices as integers at ``scale``; at 1 truncated toward zero."""
        scaled = np.rint(self.points * scale) if scale > 1 else np.trunc(self.points)
        whole: list[list[int]] = scaled.astype(np.int64).tolist()
        return [whole[a:b] for a, b in zip(self.starts.tolist(), self.ends.tolist(), strict=True)]


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
    if not len(polygons):
        return gt, mask, flags
    pack, scale = _Pack(polygons), PRECISION if precise else 1
    shrink, whole = Offsetter(scale), pack.paths(1)
    small = pack.sides() < min_text_size
    reaches = pack.distances(shrink_ratio).tolist()
    for index, path in enumerate(pack.paths(scale)):
        if not (flags[index] or small[index]):
            shrunk = shrink(path, -reaches[index])
            for piece in shrunk if pieces == "all" else shrunk[:1]:
                cv2.fillPoly(gt, [_pixels(piece, scale)], 1)
            if shrunk:
                continue
        cv2.fillPoly(mask, [np.array(whole[index], np.int32)], 0)
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
    LabelConfig(shrink_ratio, thresh_min, thresh_max, distance=distance, pieces=pieces)  # checks them
    canvas, mask = np.zeros(size, np.float32), np.zeros(size, np.uint8)
    if len(polygons):
        pack, scale = _Pack(polygons), PRECISION if precise else 1
        reaches, grow = pack.distances(shrink_ratio).tolist(), Offsetter(scale)
        measure = _DISTANCES[distance]
        for polygon, path, reach, ignored in zip(pack, pack.paths(scale), reaches, ignore, strict=True):
            grown = [] if ignored or reach <= 0 else grow(path, reach)
            for piece in grown if pieces == "all" else grown[:1]:
                outline = _pixels(piece, scale)
                cv2.fillPoly(mask, [outline], 1)
                _raise_band(canvas, polygon, outline, reach, measure)
    canvas *= thresh_max - thresh_min
    canvas += thresh_min
    np.minimum(canvas, np.float32(thresh_max), out=canvas)  # the sum may round above it
    return canvas, mask


def _pixels(outline: list[list[int]], scale: int) -> NDArray[np.int32]:
    points = np.array(outline)
    return (points if scale == 1 else np.trunc(points / scale)).astype(np.int32)


def _raise_band(
    canvas: Float32[np.ndarray, "height width"],
    polygon: Polygon,
    grown: NDArray[np.int32],
    reach: float,
    measure: Callable[[Polygon, int, int, int, int], NDArray[Any]],
) -> None:
    """Raise the canvas to 1 - distance / reach in the grown polygon's box (its part inside the image)."""
    height, width = canvas.shape
    (left, top), (right, bottom) = grown.min(0).tolist(), grown.max(0).tolist()
    x0, x1, y0, y1 = max(left, 0), min(right, width - 1), max(top, 0), min(bottom, height - 1)
    if x0 > x1 or y0 > y1:
        return
    found = measure(polygon, x0, x1 + 1, y0, y1 + 1)
    found *= -1 / reach
    found += 1
    box = canvas[y0 : y1 + 1, x0 : x1 + 1]
    np.maximum(box, found, out=box)  # the canvas is never negative, so this clips too


_CHUNK = 1 << 18  # entries of an array that is made at once


def _chunks(polygon: Polygon, x0: int, x1: int, y0: int, y1: int) -> Iterator[tuple[Any, ...]]:
    """Edges by the few: start, step, and the pixels' columns and rows from the start."""
    ends = np.concatenate([polygon[1:], polygon[:1]])
    columns, rows = np.arange(x0, x1, dtype=np.float64), np.arange(y0, y1, dtype=np.float64)
    count = max(1, _CHUNK // (len(columns) * len(rows)))
    for first in range(0, len(polygon), count):
        start, end = polygon[first : first + count], ends[first : first + count]
        yield end - start, columns - start[:, :1], rows - start[:, 1:]


def _official_distance(polygon: Polygon, x0: int, x1: int, y0: int, y1: int) -> NDArray[Any]:
    best: NDArray[Any] | None = None
    for step, x, y in _chunks(polygon, x0, x1, y0, y1):
        dx, dy = step[:, :1], step[:, 1:]
        square = (dx * dx + dy * dy)[..., None]
        a = (y * y)[:, :, None] + (x * x)[:, None, :]
        b = ((y - dy) ** 2)[:, :, None] + ((x - dx) ** 2)[:, None, :]
        across = (y * dx)[:, :, None] - (x * dy)[:, None, :]
        across *= across
        across /= np.maximum(square, 1e-300)
        # Where the ends are seen under less than a right angle, the authors take the nearer end.
        blunt = a + b <= square
        nearest = np.minimum(a, b, out=a)
        np.copyto(nearest, across, where=blunt & (square > 0))
        found = nearest.min(0)
        best = found if best is None else np.minimum(best, found, out=best)
    return np.sqrt(cast("NDArray[Any]", best)).astype(np.float32)


def _exact_distance(polygon: Polygon, x0: int, x1: int, y0: int, y1: int) -> NDArray[Any]:
    best: NDArray[Any] | None = None
    for step, x, y in _chunks(polygon, x0, x1, y0, y1):
        length = np.hypot(step[:, :1], step[:, 1:])
        unit = np.divide(step, length, out=np.ones_like(step), where=length > 0)
        dx, dy, half = unit[:, :1], unit[:, 1:], length / 2
        narrow = np.float32
        along = (y * dy - half).astype(narrow)[:, :, None] + (x * dx).astype(narrow)[:, None, :]
        across = (y * dx).astype(narrow)[:, :, None] - (x * dy).astype(narrow)[:, None, :]
        np.abs(along, out=along)
        along -= half.astype(narrow)[..., None]
        np.maximum(along, 0, out=along)  # how far beyond the nearer end
        along *= along
        across *= across
        along += across
        found = along.min(0)
        best = found if best is None else np.minimum(best, found, out=best)
    return np.sqrt(cast("NDArray[Any]", best))


def _raster_distance(polygon: Polygon, x0: int, x1: int, y0: int, y1: int) -> NDArray[Any]:
    # The outline may pass beside the box: it is drawn on a canvas that holds all of it.
    (left, top), (right, bottom) = polygon.min(0).tolist(), polygon.max(0).tolist()
    left, top = min(math.floor(left), x0), min(math.floor(top), y0)
    right, bottom = max(math.ceil(right), x1), max(math.ceil(bottom), y1)
    drawn = np.ones((bottom - top + 1, right - left + 1), np.uint8)
    points = np.rint((polygon - (left, top)) * (1 << _SHIFT)).astype(np.int32)
    cv2.polylines(drawn, [points], True, 0, shift=_SHIFT)
    found = cv2.distanceTransform(drawn, cv2.DIST_L2, cv2.DIST_MASK_5)
    return found[y0 - top : y1 - top, x0 - left : x1 - left]


_SHIFT = 4  # the outline is drawn at 1/16 pixel
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

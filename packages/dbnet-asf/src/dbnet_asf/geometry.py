"""Polygons and rotated rectangles: offsets, corner order, repair, rectification and reading order.

Coordinates are pixels, x to the right and y down, so "clockwise" means clockwise on the screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyclipper as _pyclipper
from numpy.typing import ArrayLike, NDArray

from fusion_core.errors import InputError, NonFiniteError, ShapeError, check_range

Array = NDArray[Any]

pyclipper: Any = _pyclipper  # a compiled module without types
PRECISION = 1 << 10  # clipper works on integers: this many to a pixel
_ARC = 0.25  # largest distance of a round join's chords from the arc, in pixels


def check_polygon(name: str, points: ArrayLike) -> Array:
    """A polygon as float64 (points, 2).

    Raises:
        ShapeError: not (points, 2) with at least three points.
        NonFiniteError: NaN or infinite coordinates.
        InputError: coordinates beyond 16 million, where float32 no longer tells pixels apart.
    """
    try:
        array = np.asarray(points, np.float64)
    except (TypeError, ValueError) as error:
        raise ShapeError(f"{name} is no array of numbers, wanted (points, 2)") from error
    if array.ndim != 2 or array.shape[1] != 2 or len(array) < 3:
        raise ShapeError(f"{name} has shape {array.shape}, wanted (points, 2) with at least 3 points")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name} holds non-finite coordinates; it takes finite pixels")
    if np.abs(array).max() > 1 << 24:
        raise InputError(f"{name} reaches {np.abs(array).max():.4g}, wanted coordinates within 2**24 pixels")
    return array


def area(points: Array) -> Any:
    """Net area of polygons (..., points, 2): absolute shoelace sum, in square pixels."""
    x, y = points[..., 0], points[..., 1]
    x0, y0 = x - x[..., :1], y - y[..., :1]  # large coordinates would cancel
    return np.abs((x0 * np.roll(y0, -1, -1) - np.roll(x0, -1, -1) * y0).sum(-1)) / 2


def perimeter(points: Array) -> Any:
    """Length of the closed outlines of polygons (..., points, 2)."""
    return np.linalg.norm(np.roll(points, -1, -2) - points, axis=-1).sum(-1)


def offset(points: ArrayLike, distance: float, *, scale: int = PRECISION) -> list[Array]:
    """Vatti offset of a closed polygon with round joins.

    Args:
        points: outline (points, 2), pixels; either orientation.
        distance: > 0 grows, < 0 shrinks, pixels.
        scale: integers to a pixel inside the clipper; 1 truncates the vertices toward zero as the authors'
            code does, and then the results are whole pixels.

    Returns:
        The outlines (points, 2) float64 in the clipper's order, holes among them; empty if nothing is left.

    Raises:
        ShapeError, NonFiniteError, InputError: see :func:`check_polygon`.

    Example:
        >>> grown, = offset([[0, 0], [10, 0], [10, 10], [0, 10]], 2.0)
        >>> grown.min(0).tolist(), grown.max(0).tolist()
        ([-2.0, -2.0], [12.0, 12.0])
    """
    array = check_polygon("points", points)
    if not np.isfinite(distance):
        raise NonFiniteError(f"distance is {distance!r}, wanted a finite number of pixels")
    whole = array.astype(np.int64) if scale == 1 else np.rint(array * scale).astype(np.int64)
    return clip_offset(whole.tolist(), distance, scale)


def clip_offset(path: list[list[int]], distance: float, scale: int) -> list[Array]:
    """:func:`offset` of integers at ``scale``, without checks."""
    grown = Offsetter(scale)(path, distance)
    return [np.array(found, np.float64) / scale for found in grown]


class Offsetter:
    """One clipper for many outlines, integers in and out.

    Args:
        scale: integers to a pixel.
    """

    def __init__(self, scale: int = PRECISION) -> None:
        self.scale = scale
        self._clipper = pyclipper.PyclipperOffset(2.0, _ARC * scale)

    def __call__(self, path: list[list[int]], distance: float) -> list[list[list[int]]]:
        """The outlines of ``path`` grown by ``distance`` pixels; empty for a path without an inside."""
        self._clipper.Clear()
        try:
            self._clipper.AddPath(path, pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
            found = self._clipper.Execute(distance * self.scale)
        except pyclipper.ClipperException:
            return []
        return [outline for outline in found if len(outline) > 2]


def unclip(points: ArrayLike, ratio: float = 1.5, *, scale: int = PRECISION) -> list[Array]:
    """Grow a polygon by area * ratio / perimeter (section 2.5; "unclipping" undoes the labels' shrinking).

    Args:
        points: outline (points, 2), pixels.
        ratio: >= 0; the authors take 1.5 for quads and 2.0 for polygons.
        scale: see :func:`offset`.

    Returns:
        The outlines, usually one.

    Raises:
        ConfigError: a negative ratio.
        ShapeError, NonFiniteError, InputError: see :func:`check_polygon`.
    """
    check_range("unclip_ratio", ratio, 0, float("inf"))
    array = check_polygon("points", points)
    length = float(perimeter(array))
    return offset(array, float(area(array)) * ratio / length if length else 0.0, scale=scale)


def unclip_rectangles(rectangles: Array, ratio: float) -> Array:
    """Closed form of unclipping for rotated rectangles (section 7).

    Growing a w x h rectangle by d with round joins and taking the smallest rectangle round the result gives
    (w + 2d) x (h + 2d) about the same center, d = w h ratio / (2 (w + h)).

    Args:
        rectangles: (count, 5): center x, y, width, height, angle in degrees.
        ratio: see :func:`unclip`.

    Returns:
        The grown rectangles, same shape and dtype.

    Example:
        >>> unclip_rectangles(np.array([[50.0, 20.0, 30.0, 10.0, 7.0]]), 1.6).tolist()
        [[50.0, 20.0, 42.0, 22.0, 7.0]]
    """
    grown = rectangles.copy()
    sides = rectangles[:, 2:4]
    total = sides.sum(1, keepdims=True)
    grown[:, 2:4] += np.divide(sides.prod(1, keepdims=True) * ratio, total, where=total > 0, out=total * 0)
    return grown


def rectangle_corners(rectangles: Array) -> Array:
    """Corners (count, 4, 2) of rectangles (count, 5), in the order of ``cv2.boxPoints``."""
    angle = np.deg2rad(rectangles[:, 4].astype(np.float64))
    b = (np.cos(angle).astype(np.float32) * np.float32(0.5)).astype(rectangles.dtype)
    a = (np.sin(angle).astype(np.float32) * np.float32(0.5)).astype(rectangles.dtype)
    x, y, width, height = rectangles[:, :4].T
    first = np.stack([x - a * height - b * width, y + b * height - a * width], axis=1)
    second = np.stack([x + a * height - b * width, y - b * height - a * width], axis=1)
    twice = 2 * rectangles[:, :2]
    return np.stack([first, second, twice - first, twice - second], axis=1)


def order_corners(quads: Array) -> Array:
    """Quads (count, 4, 2) with their corners top left, top right, bottom right, bottom left (section 2.5).

    Of the two corners furthest left the upper one comes first and the lower one last; of the other two the
    upper one comes second.

    Example:
        >>> order_corners(np.array([[[9, 5], [0, 5], [0, 0], [9, 0]]]))[0].tolist()
        [[0, 0], [9, 0], [9, 5], [0, 5]]
    """
    if not len(quads):
        return quads
    by_x = np.take_along_axis(quads, np.argsort(quads[:, :, 0], axis=1, kind="stable")[..., None], axis=1)
    left_down = by_x[:, 1, 1] > by_x[:, 0, 1]
    right_down = by_x[:, 3, 1] > by_x[:, 2, 1]
    at = np.stack(
        [
            np.where(left_down, 0, 1),
            np.where(right_down, 2, 3),
            np.where(right_down, 3, 2),
            np.where(left_down, 1, 0),
        ],
        axis=1,
    )
    return np.take_along_axis(by_x, at[..., None], axis=1)


def minimum_rectangle(points: Array) -> tuple[float, float, float, float, float]:
    """Smallest rotated rectangle round points: center x, y, width, height, angle in degrees."""
    (x, y), (width, height), angle = cv2.minAreaRect(np.ascontiguousarray(points, np.float32))
    return x, y, width, height, angle


def make_valid(points: ArrayLike) -> Array | None:
    """Repair an outline that crosses itself: its largest simple part, without holes.

    Args:
        points: outline (points, 2).

    Returns:
        The outline itself where it is simple, the largest part of the repaired one, or None where nothing
        that has an area is left.

    Raises:
        ShapeError, NonFiniteError, InputError: see :func:`check_polygon`.
    """
    import shapely

    array = check_polygon("points", points)
    polygon = shapely.Polygon(array)
    if polygon.is_valid and polygon.area > 0:
        return array
    parts = [
        part for part in shapely.get_parts(shapely.make_valid(polygon)) if part.geom_type.endswith("Polygon")
    ]
    parts = [piece for part in parts for piece in shapely.get_parts(part) if piece.area > 0]
    if not parts:
        return None
    return np.asarray(max(parts, key=lambda part: part.area).exterior.coords[:-1], np.float64)


def fold(points: ArrayLike, samples: int = 96) -> tuple[Array, Array]:
    """The two long sides of a band of text, paired across it.

    Two ends cut the outline into two sides. They are chosen so that the sides, each walked at its own even
    pace, stay closest to each other; what belongs to the ends themselves is cut off.

    Args:
        points: outline (points, 2) of a straight or curved band; any start and orientation.
        samples: points along the whole outline.

    Returns:
        Upper and lower side, both (count, 2), in reading direction (left to right, or down where the band is
        much taller than wide).

    Raises:
        ShapeError, NonFiniteError, InputError: see :func:`check_polygon`; or an outline without length.
    """
    array = check_polygon("points", points)
    closed = np.concatenate([array, array[:1]])
    steps = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    if steps[-1] <= 0:
        raise InputError("points has no length, wanted an outline that surrounds something")

    def at(position: Array) -> Array:
        walked = position / samples % 1.0 * steps[-1]
        return np.stack([np.interp(walked, steps, closed[:, axis]) for axis in (0, 1)], axis=-1)

    first, span = np.meshgrid(np.arange(samples), np.arange(samples // 4, samples // 2 + 1), indexing="ij")
    first, span = first.reshape(-1, 1), span.reshape(-1, 1)
    share = np.linspace(0, 1, 17)
    outline = at(np.arange(samples))
    one = outline[np.rint(first + share * span).astype(int) % samples]
    two = outline[np.rint(first - share * (samples - span)).astype(int) % samples]
    best = int(((one - two) ** 2).sum((1, 2)).argmin())
    fine = np.linspace(0, 1, samples)
    one = at(first[best] + fine * span[best])
    two = at(first[best] - fine * (samples - span[best]))
    width = np.linalg.norm(one - two, axis=1)
    inside = np.flatnonzero(width >= 0.9 * np.median(width))
    one, two = one[inside[0] : inside[-1] + 1], two[inside[0] : inside[-1] + 1]
    middle = (one + two) / 2
    run = middle[-1] - middle[0]
    backward = run[1] < 0 if abs(run[1]) > 2 * abs(run[0]) else run[0] < 0
    if backward:
        one, two, middle = one[::-1], two[::-1], middle[::-1]
    step = np.gradient(middle, axis=0) if len(middle) > 1 else np.array([[1.0, 0.0]])
    down = two - one
    turn = (step[:, 0] * down[:, 1] - step[:, 1] * down[:, 0]).sum()
    return (one, two) if turn >= 0 else (two, one)


def rectify(
    image: Array, points: ArrayLike, *, height: int | None = None, upright: bool = True, max_side: int = 8192
) -> Array:
    """Cut a region out of an image and straighten it: quads by perspective, other outlines along the band.

    Args:
        image: (height, width) or (height, width, channels), any dtype that ``cv2.remap`` takes.
        points: outline (points, 2); a quad from its top left corner clockwise.
        height: of the strip in pixels; by default what the region measures.
        upright: turn quads that are at least 1.5 times taller than wide by 90 degrees, to be read as a line.
        max_side: no strip is larger than this.

    Returns:
        The strip (height, width[, channels]), at least 1 x 1.

    Raises:
        ShapeError, NonFiniteError, InputError: see :func:`check_polygon`; or no image.

    Example:
        >>> image = np.arange(100, dtype=np.uint8).reshape(10, 10)
        >>> rectify(image, [[2, 1], [7, 1], [7, 4], [2, 4]])[0].tolist()
        [12, 13, 14, 15, 16]
    """
    array = check_polygon("points", points)
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ShapeError(
            f"image has shape {image.shape}, wanted (height, width) or (height, width, channels)"
        )
    if len(array) == 4:
        top, right, bottom, left = np.linalg.norm(np.roll(array, -1, 0) - array, axis=1)
        wide, tall = max(top, bottom), max(left, right)
        size = _strip(wide, tall, None if upright and tall >= 1.5 * wide else height, max_side)
        target = np.array([[0, 0], [size[0], 0], size, [0, size[1]]], np.float32)
        matrix = cv2.getPerspectiveTransform(array.astype(np.float32), target)
        strip = cv2.warpPerspective(
            image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        if upright and tall >= 1.5 * wide:
            strip = np.ascontiguousarray(np.rot90(strip))
            if height is not None:
                size = _strip(tall, wide, height, max_side)
                strip = cv2.resize(strip, size, interpolation=cv2.INTER_LINEAR)
        return np.asarray(strip)
    upper, lower = fold(array)
    middle = (upper + lower) / 2
    steps = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(middle, axis=0), axis=1))])
    width, tall = _strip(steps[-1], float(np.median(np.linalg.norm(upper - lower, axis=1))), height, max_side)
    along = (np.arange(width) + 0.5) / width * steps[-1]
    ends = [np.stack([np.interp(along, steps, side[:, axis]) for axis in (0, 1)]) for side in (upper, lower)]
    down = ((np.arange(tall) + 0.5) / tall)[:, None]
    x, y = (ends[0][axis] * (1 - down) + ends[1][axis] * down - 0.5 for axis in (0, 1))
    return np.asarray(
        cv2.remap(
            image,
            x.astype(np.float32),
            y.astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
    )


def _strip(width: float, height: float, wanted: int | None, largest: int) -> tuple[int, int]:
    """Whole (width, height) of a strip with the given or the natural height."""
    scale = 1.0 if wanted is None else wanted / max(height, 1.0)
    scale = min(scale, largest / max(width, height, 1.0))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def reading_order(polygons: Sequence[ArrayLike], *, columns: bool = False) -> list[int]:
    """The order in which a person reads regions: lines from the top, each from the left.

    Lines are found after turning the page by the regions' common angle, so a skewed photo is no problem.

    Args:
        polygons: outlines (points, 2).
        columns: read a column to its end before the next one; columns are parted by a vertical gap of at
            least a line's height that no region crosses.

    Returns:
        Indices into ``polygons``.

    Example:
        >>> box = lambda x, y: [[x, y], [x + 30, y], [x + 30, y + 10], [x, y + 10]]
        >>> reading_order([box(50, 1), box(0, 30), box(0, 0)])
        [2, 0, 1]
    """
    if not len(polygons):
        return []
    outlines = [check_polygon(f"polygons[{at}]", polygon) for at, polygon in enumerate(polygons)]
    rectangles = np.array([minimum_rectangle(outline) for outline in outlines])
    corners = order_corners(rectangle_corners(rectangles))
    run = corners[:, 1] - corners[:, 0] + corners[:, 2] - corners[:, 3]
    length, side = np.hypot(*run.T), np.hypot(*(corners[:, 3] - corners[:, 0]).T)
    lying = length > 2 * 1.3 * side
    skew = float(np.median(np.arctan2(run[lying, 1], run[lying, 0]))) if lying.any() else 0.0
    cosine, sine = np.cos(-skew), np.sin(-skew)
    turn = np.array([[cosine, sine], [-sine, cosine]])
    boxes = np.array([[*(outline @ turn).min(0), *(outline @ turn).max(0)] for outline in outlines])
    order: list[int] = []
    for column in _columns(boxes) if columns else [np.arange(len(boxes))]:
        order += _lines(boxes, column)
    return order


def _columns(boxes: Array) -> list[Array]:
    """Parts the regions at vertical gaps that none of them crosses."""
    order = np.argsort(boxes[:, 0], kind="stable")
    reach = np.maximum.accumulate(boxes[order, 2])
    gaps = boxes[order[1:], 0] - reach[:-1]
    return np.split(order, np.flatnonzero(gaps > np.median(boxes[:, 3] - boxes[:, 1])) + 1)


def _lines(boxes: Array, members: Array) -> list[int]:
    """Groups by vertical overlap with the nearest region to the left, then left to right."""
    lines: list[list[int]] = []
    for at in sorted(members.tolist(), key=lambda i: (boxes[i, 0], boxes[i, 1])):
        top, bottom = boxes[at, 1], boxes[at, 3]
        best, found = 0.5, None
        for line in lines:
            last = boxes[line[-1]]
            shared = min(bottom, last[3]) - max(top, last[1])
            share = shared / max(min(bottom - top, last[3] - last[1]), 1e-9)
            if share > best and boxes[at, 0] > (last[0] + last[2]) / 2:
                best, found = share, line
        if found is None:
            lines.append([at])
        else:
            found.append(at)
    lines.sort(key=lambda line: float(np.mean(boxes[line, 1] + boxes[line, 3])))
    return [at for line in lines for at in line]

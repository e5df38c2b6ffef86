"""From a probability map to boxes and polygons (section 2.5), on arrays.

Contours, smallest rectangles and masks come from OpenCV one by one; all else, corner order, unclipping,
filters and scaling, is array code over all regions at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple, cast

import cv2
import numpy as np

from fusion_core.errors import InputError, ShapeError

from .config import PostConfig
from .geometry import (
    PRECISION,
    Array,
    Offsetter,
    area,
    clip_offset,
    minimum_rectangle,
    order_corners,
    rectangle_corners,
    unclip_rectangles,
)

_NO_POINTS = np.zeros((0, 4, 2), np.float32)


class Regions(NamedTuple):
    """What one map holds, in the coordinates of the image.

    Attributes:
        outlines: quads float32 (regions, 4, 2) in quad mode; in polygon mode a list of (points, 2).
        scores: float32 (regions,), in [0, 1].
        uncertainty: float32 (regions,): mean of P (1 - P) along the contour, 0 = sharp, 0.25 = a guess;
            None unless asked for.
    """

    outlines: Any
    scores: Array
    uncertainty: Array | None = None


def check_map(prob: Any) -> Array:
    """A probability map as a contiguous float32 array (height, width).

    Args:
        prob: array or tensor (height, width), or with leading dimensions of size 1; in [0, 1].

    Raises:
        ShapeError: other dimensions, or no pixels.
        InputError: values outside [0, 1], or NaN.
    """
    if hasattr(prob, "detach"):
        prob = prob.detach().float().cpu().numpy()
    array = np.asarray(prob)
    while array.ndim in (3, 4) and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or 0 in array.shape:
        raise ShapeError(f"prob has shape {np.shape(prob)}, wanted (height, width) or (1, 1, height, width)")
    if array.dtype.kind not in "fbiu":
        raise InputError(f"prob has dtype {array.dtype}, wanted floating point in [0, 1]")
    with np.errstate(over="ignore"):  # what float32 does not hold is no probability either
        array = np.ascontiguousarray(array, np.float32)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise InputError(f"prob has values from {low:g} to {high:g}, wanted probabilities in [0, 1]")
    return array


def _settings(config: PostConfig | None, settings: dict[str, Any]) -> PostConfig:
    base = config or PostConfig()
    return base.replace(**settings) if settings else base


def quads_from_map(
    prob: Any, size: Sequence[int] | None = None, config: PostConfig | None = None, **settings: Any
) -> tuple[Array, Array]:
    """Rotated boxes of text from a probability map.

    Args:
        prob: probabilities (height, width) in [0, 1], array or tensor.
        size: (height, width) of the image that the boxes refer to; the map's own by default.
        config: settings; its ``mode`` is not looked at.
        **settings: fields of :class:`PostConfig` to change, such as ``box_thresh=0.5``.

    Returns:
        Corners float32 (boxes, 4, 2), top left, top right, bottom right, bottom left, clipped to the image;
        scores float32 (boxes,). Section 2.5.

    Raises:
        ShapeError, InputError: see :func:`check_map`; ConfigError: bad settings.

    Example:
        >>> prob = np.zeros((32, 64), np.float32)
        >>> prob[10:20, 10:40] = 0.9
        >>> quads, scores = quads_from_map(prob)
        >>> quads.shape, round(float(scores[0]), 2)
        ((1, 4, 2), 0.9)
    """
    found = regions_from_map(prob, size, _settings(config, {**settings, "mode": "quad"}))
    return found.outlines, found.scores


def polygons_from_map(
    prob: Any, size: Sequence[int] | None = None, config: PostConfig | None = None, **settings: Any
) -> tuple[list[Array], Array]:
    """Free outlines of text from a probability map: the same as :func:`quads_from_map` for curved text.

    Returns:
        One float32 (points, 2) array a region, clipped to the image; scores float32 (regions,).
    """
    found = regions_from_map(prob, size, _settings(config, {**settings, "mode": "polygon"}))
    return found.outlines, found.scores


def regions_from_map(
    prob: Any,
    size: Sequence[int] | None = None,
    config: PostConfig | None = None,
    *,
    uncertainty: bool = False,
) -> Regions:
    """Boxes or polygons, as ``config.mode`` says, with scores and on request their uncertainty.

    Raises:
        ShapeError, InputError: see :func:`check_map`; a size that is no (height, width) of at least 1.
    """
    config = config or PostConfig()
    array = check_map(prob)
    height, width = array.shape if size is None else _size(size)
    if config.compat == "official":
        config = config.replace(contours="official", cap="official", several="drop", round=True)
    bitmap = (array > np.float32(config.thresh)).view(np.uint8)
    contours = trace(bitmap, config)
    if config.max_candidates is not None and config.cap == "official":
        contours = contours[: config.max_candidates]
    find = _quads if config.mode == "quad" else _polygons
    outlines, scores, kept = find(array, bitmap, contours, config)
    outlines, scores, kept = _cap(outlines, scores, kept, config)
    sharp = _uncertainty(array, [contours[int(at)] for at in kept]) if uncertainty else None
    scale = np.array([width / array.shape[1], height / array.shape[0]], np.float32)
    limit = np.array([width, height], np.float32)
    if config.mode == "quad":
        return Regions(_scale(outlines, scale, limit, config), scores, sharp)
    if not outlines:
        return Regions([], scores, sharp)
    moved = _scale(np.concatenate(outlines), scale, limit, config)
    return Regions(_cut(moved, [len(outline) for outline in outlines]), scores, sharp)


def _size(size: Sequence[int]) -> tuple[int, int]:
    values = [int(value) for value in size]
    if len(values) != 2 or min(values) < 1:
        raise ShapeError(f"size is {tuple(size)!r}, wanted (height, width) of at least 1")
    return values[0], values[1]


def _scale(points: Array, scale: Array, limit: Array, config: PostConfig) -> Array:
    moved = np.asarray(points, np.float32) * scale
    return np.clip(np.rint(moved) if config.round else moved, 0, limit)


def _cap(outlines: Any, scores: Array, kept: Array, config: PostConfig) -> tuple[Any, Array, Array]:
    """Keep the best ``max_candidates``, in their order, unless the first contours were taken already."""
    if config.max_candidates is None or config.cap != "score" or len(scores) <= config.max_candidates:
        return outlines, scores, kept
    best = np.sort(np.argsort(-scores, kind="stable")[: config.max_candidates])
    chosen = outlines[best] if isinstance(outlines, np.ndarray) else [outlines[int(at)] for at in best]
    return chosen, scores[best], kept[best]


def trace(bitmap: Array, config: PostConfig) -> Sequence[Array]:
    """Contours of a bitmap (uint8, nonzero = text): of the outside only, or of holes too."""
    if config.dilation:
        bitmap = np.asarray(cv2.dilate(bitmap, np.ones((2, 2), np.uint8)))
    if config.contours == "official":
        return cv2.findContours(bitmap, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[0]
    contours, hierarchy = cv2.findContours(bitmap, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return contours
    parents = np.asarray(hierarchy)[0, :, 3]
    return [contour for contour, parent in zip(contours, parents, strict=True) if parent < 0]


def _quads(
    prob: Array, bitmap: Array, contours: Sequence[Array], config: PostConfig
) -> tuple[Array, Array, Array]:
    """Grown quads, scores and which contours they come from, in map coordinates."""
    none = _NO_POINTS, np.zeros(0, np.float32), np.zeros(0, np.int64)
    if not contours:
        return none
    rectangles = _rectangles(contours)
    kept = np.flatnonzero(rectangles[:, 2:4].min(1) >= config.min_size)
    rectangles = rectangles[kept]
    if not len(kept):
        return none
    corners = order_corners(rectangle_corners(rectangles))
    scores = _scores(prob, bitmap, corners, [contours[int(at)] for at in kept], config)
    good = scores >= config.box_thresh
    kept, rectangles, corners, scores = kept[good], rectangles[good], corners[good], scores[good]
    if not len(kept):
        return none
    if config.compat == "official":
        grown = _clipped_rectangles(corners, config.ratio)
    else:
        grown = unclip_rectangles(rectangles, config.ratio)
    large = grown[:, 2:4].min(1) >= config.min_size + 2
    return order_corners(rectangle_corners(grown[large])), scores[large], kept[large]


def _rectangles(contours: Sequence[Array]) -> Array:
    smallest = cv2.minAreaRect
    found = [smallest(contour) for contour in contours]
    flat = [(*center, *sides, angle) for center, sides, angle in found]
    return np.array(flat, np.float32)


def _clipped_rectangles(corners: Array, ratio: float) -> Array:
    """The authors' unclipping: clipper on truncated corners, then the smallest rectangle round the result."""
    sides = np.linalg.norm(np.roll(corners, -1, 1) - corners, axis=2).astype(np.float64)
    areas = np.array([cv2.contourArea(quad) for quad in corners])
    lengths = sides.sum(1)
    distances = np.divide(areas * ratio, lengths, out=np.zeros_like(areas), where=lengths > 0)
    found: list[tuple[float, ...]] = []
    for quad, distance in zip(corners.astype(np.int64).tolist(), distances.tolist(), strict=True):
        grown = clip_offset(quad, distance, 1)
        found.append(minimum_rectangle(np.concatenate(grown)) if grown else (0.0,) * 5)
    return np.array(found, np.float32)


def _polygons(
    prob: Array, bitmap: Array, contours: Sequence[Array], config: PostConfig
) -> tuple[list[Array], Array, Array]:
    """Grown polygons, scores and which contours they come from, in map coordinates."""
    kept: list[int] = []
    outlines: list[Array] = []
    for at, contour in enumerate(contours):
        if len(contour) < 4:  # its outline would have no more
            continue
        outline = cv2.approxPolyDP(contour, config.epsilon * cv2.arcLength(contour, True), True)
        if len(outline) >= 4:
            kept.append(at)
            outlines.append(outline)
    if not kept:
        return [], np.zeros(0, np.float32), np.zeros(0, np.int64)
    of_contour = [contours[at] for at in kept] if config.score != "fast" else outlines
    scores = _scores(prob, bitmap, None, of_contour, config)
    offsetter = Offsetter(1 if config.compat == "official" else PRECISION)
    good = np.flatnonzero(scores >= config.box_thresh).tolist()
    # Lists of points are freed at once: kept, they would set off the garbage collector again and again.
    paths = (
        np.concatenate([outlines[at][:, 0] for at in good]) * offsetter.scale if good else np.zeros((0, 2))
    )
    flat: list[int] = []
    lengths: list[int] = []
    chosen: list[int] = []
    start = 0
    for at in good:
        outline = outlines[at]
        path = paths[start : start + len(outline)].tolist()
        start += len(outline)
        distance = cv2.contourArea(outline) * config.ratio / cv2.arcLength(outline, True)
        grown = offsetter(path, distance)
        if not grown or (len(grown) > 1 and config.several == "drop"):
            continue
        best = grown[0] if len(grown) == 1 else max(grown, key=_signless_area)
        if _wide(best, distance, config.min_size + 2, offsetter.scale):
            flat.extend(chain.from_iterable(best))
            lengths.append(len(best))
            chosen.append(at)
    points = np.array(flat, np.float64).reshape(-1, 2) / offsetter.scale
    parts = _cut(points.astype(np.float32), lengths)
    return parts, scores[chosen], np.asarray(kept, np.int64)[chosen]


def _cut(points: Array, lengths: list[int]) -> list[Array]:
    """Consecutive runs of ``points`` (views)."""
    ends = list(accumulate(lengths, initial=0))
    return [points[start:end] for start, end in pairwise(ends)]


def _signless_area(outline: list[list[int]]) -> float:
    return abs(float(area(np.array(outline, np.float64))))


def _wide(outline: list[list[int]], distance: float, least: float, scale: int) -> bool:
    """Whether the shortest side is long enough; what was grown by a distance is at least twice as wide."""
    if 2 * distance >= least + 2:
        return True
    return min(cv2.minAreaRect(np.array(outline, np.float32) / np.float32(scale))[1]) >= least


def _scores(
    prob: Array, bitmap: Array, corners: Array | None, contours: Sequence[Array], config: PostConfig
) -> Array:
    """Mean probability inside each region, as ``config.score`` defines inside.

    Args:
        prob: the map.
        bitmap: where it exceeds the threshold.
        corners: of the rectangles (regions, 4, 2) in quad mode; None in polygon mode.
        contours: integer outlines; of the regions where ``corners`` is None or the score is not fast.
        config: the settings.
    """
    height, width = prob.shape
    if corners is not None and config.score == "fast":
        limit = np.array([width - 1, height - 1], np.float32)
        low = np.clip(np.floor(corners.min(1)), 0, limit).astype(np.int32)
        high = np.clip(np.ceil(corners.max(1)), 0, limit).astype(np.int32)
        inside: Sequence[Array] = (corners - low[:, None]).astype(np.int32)
    else:
        boxes = np.array([cv2.boundingRect(contour) for contour in contours], np.int32).reshape(-1, 4)
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - 1
        inside = [contour - corner for contour, corner in zip(contours, low, strict=True)]
    extent = high - low + 1
    mask = np.zeros(int(extent[:, 0].max()) * int(extent[:, 1].max()), np.uint8)
    both = config.score == "component"
    scores: list[float] = []
    fill, mean = cv2.fillPoly, cv2.mean
    for (x, y), (w, h), points in zip(low.tolist(), extent.tolist(), inside, strict=True):
        window = mask[: w * h].reshape(h, w)
        window[:] = 0
        fill(window, [points], 1)
        if both:
            window &= bitmap[y : y + h, x : x + w]
        scores.append(mean(prob[y : y + h, x : x + w], window)[0])
    return np.array(scores, np.float32)


def _uncertainty(prob: Array, contours: Sequence[Array]) -> Array:
    """Mean of P (1 - P) along each contour, three pixels wide."""
    values: list[float] = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        left, top = max(x - 1, 0), max(y - 1, 0)
        window = prob[top : y + h + 1, left : x + w + 1]
        line = np.zeros(window.shape, np.uint8)
        cv2.polylines(line, [contour - np.array([left, top], np.int32)], True, 1, 3)
        values.append(cv2.mean(window * (1 - window), line)[0])
    return np.array(values, np.float32)


class PostProcess:
    """Probability maps of a batch to boxes or polygons.

    Args:
        config: settings; the defaults of :class:`PostConfig` otherwise.
        **settings: fields to change, such as ``box_thresh=0.6, mode="polygon"``.

    Raises:
        ConfigError: unknown or bad settings.

    Example:
        >>> quads, scores = PostProcess(box_thresh=0.6)(np.full((2, 1, 32, 32), 0.1), [(32, 32)] * 2)
        >>> [len(found) for found in quads]
        [0, 0]
    """

    def __init__(self, config: PostConfig | None = None, **settings: Any) -> None:
        self.config = _settings(config, settings)

    def __call__(
        self, prob: Any, sizes: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[Any], list[Array]]:
        """Process a batch.

        Args:
            prob: (batch, 1, height, width), (batch, height, width) or (height, width) in [0, 1].
            sizes: (height, width) of each image; the maps' own by default.

        Returns:
            Per image the outlines (see :func:`quads_from_map`, :func:`polygons_from_map`) and the scores.

        Raises:
            ShapeError: other dimensions, or another number of sizes than of maps.
            InputError: values outside [0, 1].
        """
        if hasattr(prob, "detach"):
            prob = prob.detach().float().cpu().numpy()
        maps = np.asarray(prob)
        if maps.ndim == 2:
            maps = maps[None]
        elif maps.ndim == 4 and maps.shape[1] == 1:
            maps = maps[:, 0]
        if maps.ndim != 3:
            raise ShapeError(f"prob has shape {np.shape(prob)}, wanted (batch, 1, height, width)")
        wanted = cast("Sequence[Any]", sizes if sizes is not None else [None] * len(maps))
        if len(wanted) != len(maps):
            raise ShapeError(f"sizes holds {len(wanted)} sizes for {len(maps)} maps, wanted one a map")
        found = [regions_from_map(each, size, self.config) for each, size in zip(maps, wanted, strict=True)]
        return [each.outlines for each in found], [each.scores for each in found]

"""Growing and shrinking outlines by a distance: Vatti offsets with round joins."""

from __future__ import annotations

import math

import numpy as np
import pyclipper
from jaxtyping import Float, Int, Real
from numpy.typing import NDArray

SCALE = 1024  # clipper counts in integers; this many to a pixel with ``precise``
_ARC = 0.01  # pixels that a round join may miss its arc by with ``precise``; clipper's own 0.25 without


def area(polygon: Real[np.ndarray, "points 2"]) -> float:
    """Net area of a closed outline, never negative; crossing parts cancel.

    Example:
        >>> area(np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 2.0], [0.0, 2.0]]))
        8.0
    """
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def perimeter(polygon: Real[np.ndarray, "points 2"]) -> float:
    """Length of a closed outline.

    Example:
        >>> perimeter(np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 2.0], [0.0, 2.0]]))
        12.0
    """
    steps = np.roll(polygon, -1, 0) - polygon
    return float(np.hypot(steps[:, 0], steps[:, 1]).sum())


def vatti(
    polygon: Real[np.ndarray, "points 2"], distance: float, *, precise: bool = False
) -> list[Float[np.ndarray, "points 2"]] | list[Int[np.ndarray, "points 2"]]:
    """Offset a closed outline with round joins (section 2.2, step 4).

    Args:
        polygon: at least three points, in pixels.
        distance: pixels; positive grows, negative shrinks.
        precise: work at 1/1024 pixel; without, vertices are truncated toward zero and the result is whole
            pixels, as in the authors' code.

    Returns:
        The resulting outlines, in the order that clipper gives; none where nothing is left.
    """
    scale = SCALE if precise else 1
    if not math.isfinite(distance):
        return []
    offset = pyclipper.PyclipperOffset(2.0, _ARC * SCALE if precise else 0.25)
    points: NDArray[np.int64] = np.rint(polygon * scale) if precise else np.trunc(polygon)  # pyright: ignore
    try:
        offset.AddPath(points.astype(np.int64).tolist(), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    except pyclipper.ClipperException:  # fewer than three different points
        return []
    paths = offset.Execute(distance * scale)
    if precise:
        return [np.asarray(path, np.float64) / scale for path in paths]
    return [np.asarray(path, np.int64) for path in paths]

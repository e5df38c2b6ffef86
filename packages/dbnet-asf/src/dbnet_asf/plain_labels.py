"""Section 2.2 written plainly, one polygon and edge at a time: what the label maps are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyclipper as _pyclipper
import shapely
from numpy.typing import NDArray

Array = NDArray[Any]
pyclipper: Any = _pyclipper


def _offset(polygon: Array, distance: float) -> list[Any]:
    clipper = pyclipper.PyclipperOffset()
    clipper.AddPath([tuple(point) for point in polygon], pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    return clipper.Execute(distance)


def _reach(polygon: Array, ratio: float) -> float:
    shape = shapely.Polygon(polygon)
    return shape.area * (1 - ratio**2) / shape.length


def labels(
    polygons: Sequence[Array], size: tuple[int, int], ratio: float = 0.4
) -> tuple[Array, Array, Array, Array]:
    """Shrink map, mask, threshold map and its mask of polygons of which none is ignored."""
    gt, mask = np.zeros(size, np.float32), np.ones(size, np.float32)
    canvas, band = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for polygon in polygons:
        shrunk = _offset(polygon, -_reach(polygon, ratio))
        if not shrunk:
            cv2.fillPoly(mask, [polygon.astype(np.int32)], 0.0)
            continue
        cv2.fillPoly(gt, [np.array(shrunk[0]).astype(np.int32)], 1.0)
        _border(polygon.copy(), canvas, band, ratio)
    return gt, mask, canvas * 0.4 + 0.3, band


def _border(polygon: Array, canvas: Array, band: Array, ratio: float) -> None:
    reach = _reach(polygon, ratio)
    grown = np.array(_offset(polygon, reach)[0])
    cv2.fillPoly(band, [grown.astype(np.int32)], 1.0)
    (left, top), (right, bottom) = grown.min(0), grown.max(0)
    width, height = right - left + 1, bottom - top + 1
    polygon -= (left, top)
    xs = np.broadcast_to(np.linspace(0, width - 1, width).reshape(1, width), (height, width))
    ys = np.broadcast_to(np.linspace(0, height - 1, height).reshape(height, 1), (height, width))
    distances = np.zeros((len(polygon), height, width), np.float32)
    for i in range(len(polygon)):
        away = _distance(xs, ys, polygon[i], polygon[(i + 1) % len(polygon)])
        distances[i] = np.clip(away / reach, 0, 1)
    nearest = distances.min(0)
    x0, x1 = min(max(0, left), canvas.shape[1] - 1), min(max(0, right), canvas.shape[1] - 1)
    y0, y1 = min(max(0, top), canvas.shape[0] - 1), min(max(0, bottom), canvas.shape[0] - 1)
    inside = nearest[y0 - top : y1 - bottom + height, x0 - left : x1 - right + width]
    canvas[y0 : y1 + 1, x0 : x1 + 1] = np.fmax(1 - inside, canvas[y0 : y1 + 1, x0 : x1 + 1])


def _distance(xs: Array, ys: Array, start: Array, end: Array) -> Array:
    a = np.square(xs - start[0]) + np.square(ys - start[1])
    b = np.square(xs - end[0]) + np.square(ys - end[1])
    whole = np.square(start[0] - end[0]) + np.square(start[1] - end[1])
    cosine = (whole - a - b) / (2 * np.sqrt(a * b) + 1e-12)
    sine = np.nan_to_num(1 - np.square(cosine))
    away = np.sqrt(np.maximum(a * b * sine / whole, 0))
    away[cosine < 0] = np.sqrt(np.fmin(a, b))[cosine < 0]
    return away

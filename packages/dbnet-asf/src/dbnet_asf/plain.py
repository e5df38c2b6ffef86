"""Section 2.5 written plainly, one contour at a time with shapely: what benchmarks and tests compare with."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pyclipper as _pyclipper
import shapely

from .geometry import Array

pyclipper: Any = _pyclipper


def quads(
    prob: Array, size: tuple[int, int], *, thresh: float, box_thresh: float, ratio: float = 1.5
) -> tuple[list[Array], list[float]]:
    """Boxes of one map, each contour by itself."""
    height, width = prob.shape
    bitmap = (prob > thresh).astype(np.uint8)
    contours, _ = cv2.findContours(bitmap, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    boxes: list[Array] = []
    scores: list[float] = []
    for contour in contours:
        points, side = _smallest_box(contour)
        if side < 3:
            continue
        corners = np.array(points)
        score = _score(prob, corners)
        if score < box_thresh:
            continue
        grown = _unclip(corners, ratio)
        if not len(grown):
            continue
        points, side = _smallest_box(np.array(grown[0]).reshape(-1, 1, 2))
        if side < 5:
            continue
        boxes.append(_to_image(np.array(points), (height, width), size))
        scores.append(score)
    return boxes, scores


def polygons(
    prob: Array, size: tuple[int, int], *, thresh: float, box_thresh: float, ratio: float = 2.0
) -> tuple[list[Array], list[float]]:
    """Polygons of one map, each contour by itself."""
    bitmap = (prob > thresh).astype(np.uint8)
    contours, _ = cv2.findContours(bitmap, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    found: list[Array] = []
    scores: list[float] = []
    for contour in contours:
        outline = cv2.approxPolyDP(contour, 0.002 * cv2.arcLength(contour, True), True).reshape(-1, 2)
        if len(outline) < 4:
            continue
        score = _score(prob, outline)
        if score < box_thresh:
            continue
        grown = _unclip(outline, ratio)
        if len(grown) != 1:
            continue
        polygon = np.array(grown[0]).reshape(-1, 2)
        _, side = _smallest_box(polygon.reshape(-1, 1, 2))
        if side < 5:
            continue
        found.append(_to_image(polygon, prob.shape[:2], size))
        scores.append(score)
    return found, scores


def _smallest_box(contour: Array) -> tuple[list[Any], float]:
    rectangle = cv2.minAreaRect(contour.astype(np.float32))
    points = sorted(cv2.boxPoints(rectangle), key=lambda point: point[0])
    top_left, bottom_left = (0, 1) if points[1][1] > points[0][1] else (1, 0)
    top_right, bottom_right = (2, 3) if points[3][1] > points[2][1] else (3, 2)
    return [points[at] for at in (top_left, top_right, bottom_right, bottom_left)], min(rectangle[1])


def _score(prob: Array, points: Array) -> float:
    height, width = prob.shape
    box = points.astype(np.float32)
    left = int(np.clip(np.floor(box[:, 0].min()), 0, width - 1))
    right = int(np.clip(np.ceil(box[:, 0].max()), 0, width - 1))
    top = int(np.clip(np.floor(box[:, 1].min()), 0, height - 1))
    bottom = int(np.clip(np.ceil(box[:, 1].max()), 0, height - 1))
    mask = np.zeros((bottom - top + 1, right - left + 1), np.uint8)
    box = box - np.array([left, top], np.float32)
    cv2.fillPoly(mask, [box.reshape(-1, 1, 2).astype(np.int32)], 1)
    return cv2.mean(prob[top : bottom + 1, left : right + 1], mask)[0]


def _unclip(points: Array, ratio: float) -> list[Any]:
    polygon = shapely.Polygon(points)
    distance = polygon.area * ratio / polygon.length
    clipper = pyclipper.PyclipperOffset()
    clipper.AddPath(points.astype(np.int64), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    return clipper.Execute(distance)


def _to_image(points: Array, shape: tuple[int, ...], size: tuple[int, int]) -> Array:
    x = np.clip(np.round(points[:, 0] / shape[1] * size[1]), 0, size[1])
    y = np.clip(np.round(points[:, 1] / shape[0] * size[0]), 0, size[0])
    return np.stack([x, y], axis=1)

"""Planes through points: what the road says of the camera above it (section 2.8)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import ShapeError
from gvdepth.errors import CalibrationError

__all__ = ["attitude_of_normal", "fit_plane", "ransac_plane", "total_least_squares"]


def attitude_of_normal(normal: NDArray[np.float64]) -> tuple[float, float]:
    """Pitch and roll, degrees, of the unit vector to the ground in camera axes.

    ``pitch = -asin(n_z)``, ``roll = atan2(n_x, n_y)``.

    Example:
        >>> attitude_of_normal(np.array([0.0, 1.0, 0.0])) == (0.0, 0.0)
        True
    """
    x, y, z = (float(part) for part in normal)
    # atan2 of the whole vector keeps the digits that asin loses near its ends.
    return math.degrees(math.atan2(-z, math.hypot(x, y))) + 0.0, math.degrees(math.atan2(x, y)) + 0.0


def total_least_squares(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The plane with the least squared distances along its normal.

    Args:
        points: (n, 3) camera coordinates, metres.

    Returns:
        Unit normal (3,), pointing away from the origin, and the distance h >= 0 of the plane ``n . p = h``.
    """
    center = points.mean(0)
    around = points - center
    normal = np.linalg.svd(around, full_matrices=False)[2][-1]
    distance = float(normal @ center)
    return (normal, distance) if distance >= 0 else (-normal, -distance)


def fit_plane(points: NDArray[np.float64]) -> tuple[float, float, float]:
    """Height, pitch and roll of a camera from points on the road, by total least squares.

    Args:
        points: (n, 3) camera coordinates, metres, n >= 3.

    Returns:
        ``(camera_height, pitch_deg, roll_deg)``.

    Raises:
        ShapeError: not (n, 3) with n >= 3.

    Example:
        >>> road = np.array([[-1.0, 1.5, 5], [1, 1.5, 5], [0, 1.5, 20], [2, 1.5, 9]])
        >>> [round(value, 9) + 0.0 for value in fit_plane(road)]
        [1.5, 0.0, 0.0]
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < 3:
        raise ShapeError(f"points has shape {points.shape}, wanted (n, 3) with n >= 3")
    normal, distance = total_least_squares(points)
    return (distance, *attitude_of_normal(normal))


def ransac_plane(
    points: NDArray[np.float64],
    *,
    threshold: float = 0.05,
    trials: int = 256,
    score_points: int = 4096,
    refinements: int = 5,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], float, float]:
    """The plane with the most points within a distance, refined on them; all trials at once.

    Args:
        points: (n, 3) camera coordinates, metres.
        threshold: distance of an inlier, metres.
        trials: random triples.
        score_points: points that score them; the refinement sees all.
        refinements: least-squares fits to the inliers, until these no longer change.
        rng: of the draws.

    Returns:
        Unit normal (3,), distance, and the share of inliers.

    Raises:
        CalibrationError: fewer than three points, or all on one line.
    """
    if len(points) < 3:
        raise CalibrationError(f"{len(points)} road points, wanted at least 3")
    corners = points[rng.integers(0, len(points), (trials, 3))]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normals, axis=1)
    kept = length > 1e-9
    if not kept.any():
        raise CalibrationError("the road points lie on one line; no plane is determined")
    normals = normals[kept] / length[kept, None]
    distances = np.einsum("ij,ij->i", normals, corners[kept, 0])
    some = points if len(points) <= score_points else points[rng.integers(0, len(points), score_points)]
    score = np.count_nonzero(np.abs(some @ normals.T - distances) < threshold, axis=0)
    best = int(score.argmax())
    normal, distance = normals[best], float(distances[best])
    inside = np.abs(points @ normal - distance) < threshold
    for _ in range(refinements):
        if np.count_nonzero(inside) < 3:
            break
        normal, distance = total_least_squares(points[inside])
        again = np.abs(points @ normal - distance) < threshold
        if (again == inside).all():
            break
        inside = again
    if distance < 0:
        normal, distance = -normal, -distance
    return normal, distance, float(np.count_nonzero(inside)) / len(points)

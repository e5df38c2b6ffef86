"""Augmentation of section 2.4: flip, rotation, scale and a crop that cuts no word, as one warp."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dbnet_asf.config import AugmentConfig
from dbnet_asf.geometry import Array

Random = np.random.Generator


def move(points: Array, matrix: Array) -> Array:
    """Points (..., 2) under an affine map (2, 3) or (3, 3)."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def flip_matrix(width: int) -> Array:
    """The horizontal flip of an image, on pixel centers."""
    return np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]])


def rotation_matrix(size: tuple[int, int], degrees: float) -> Array:
    """Rotation about the center of an image of size (height, width), counterclockwise on the screen."""
    center = ((size[1] - 1) / 2, (size[0] - 1) / 2)
    return np.vstack([cv2.getRotationMatrix2D(center, degrees, 1.0), [0, 0, 1]])


def free_runs(axis: Array, *, official: bool = False) -> list[Array]:
    """Runs of consecutive numbers.

    Args:
        axis: increasing integers.
        official: as the authors' code, which loses the last run.

    Example:
        >>> [run.tolist() for run in free_runs(np.array([0, 1, 2, 5, 6, 9, 10]))]
        [[0, 1, 2], [5, 6], [9, 10]]
        >>> [run.tolist() for run in free_runs(np.array([0, 1, 2, 5, 6, 9, 10]), official=True)]
        [[0, 1, 2], [5, 6]]
    """
    runs = np.split(axis, np.flatnonzero(np.diff(axis) != 1) + 1)
    return runs[:-1] if official else runs


def _pick(random: Random, axis: Array, runs: list[Array], *, official: bool) -> tuple[int, int]:
    if len(runs) > 1:
        pair = random.integers(len(runs), size=2) if official else random.choice(len(runs), 2, replace=False)
        ends = [int(random.choice(runs[int(at)])) for at in pair]
    else:
        ends = [int(value) for value in random.choice(axis, 2)]
    return min(ends), max(ends)


def choose_crop(
    random: Random,
    size: tuple[int, int],
    polygons: Sequence[Array],
    ignore: Array,
    config: AugmentConfig | None = None,
) -> tuple[int, int, int, int]:
    """A crop whose sides pass between the words.

    Columns and rows that no cared-for word covers are free; two free columns and two free rows make a crop,
    which is taken when it is large enough and a cared-for word reaches into it.

    Args:
        random: the generator.
        size: (height, width) of the image.
        polygons: outlines of the words, pixels.
        ignore: bool (words,).
        config: ``max_tries``, ``min_crop_side`` and ``crop_regions`` are used.

    Returns:
        left, top, width, height; the whole image where no try succeeds.
    """
    config = config or AugmentConfig()
    height, width = size
    cared = [polygon for polygon, skip in zip(polygons, ignore, strict=True) if not skip]
    bounds = np.array([[*polygon.min(0), *polygon.max(0)] for polygon in cared]).reshape(-1, 4)
    whole = 0, 0, width, height
    official = config.crop_regions == "official"
    axes: list[Array] = []
    for length, low, high in ((width, bounds[:, 0], bounds[:, 2]), (height, bounds[:, 1], bounds[:, 3])):
        taken = np.zeros(length, np.bool_)
        for start, stop in zip(np.rint(low).astype(int), np.rint(high).astype(int), strict=True):
            taken[max(start, 0) : max(stop, 0)] = True
        axes.append(np.flatnonzero(~taken))
    if not len(cared) or not len(axes[0]) or not len(axes[1]):
        return whole
    runs = [free_runs(axis, official=official) for axis in axes]
    for _ in range(config.max_tries):
        left, right = _pick(random, axes[0], runs[0], official=official)
        top, bottom = _pick(random, axes[1], runs[1], official=official)
        if right - left < config.min_crop_side * width or bottom - top < config.min_crop_side * height:
            continue
        outside = (
            (bounds[:, 2] < left) | (bounds[:, 0] > right) | (bounds[:, 3] < top) | (bounds[:, 1] > bottom)
        )
        if not outside.all():
            return left, top, right - left, bottom - top
    return whole


def augment(
    random: Random,
    image: Array,
    polygons: Sequence[Array],
    ignore: Array,
    *,
    size: int | tuple[int, int] = 640,
    config: AugmentConfig | None = None,
) -> tuple[Array, list[Array], Array]:
    """Augment one annotated image (section 2.4).

    Flip, rotation on the same canvas, isotropic scale and the crop are composed and the pixels are sampled
    once, bilinearly; the crop is scaled to fit ``size`` and stands at the top left, the rest is black.

    Args:
        random: the generator.
        image: uint8 (height, width, 3).
        polygons: outlines of the words, pixels.
        ignore: bool (words,).
        size: of the result: its side, or (height, width).
        config: ranges.

    Returns:
        Image uint8, polygons and flags of the words that the crop touches.
    """
    config = config or AugmentConfig()
    target = (size, size) if isinstance(size, int) else size
    height, width = image.shape[:2]
    matrix = np.eye(3)
    if random.random() < config.flip:
        matrix = flip_matrix(width) @ matrix
    if config.rotate_deg:
        degrees = float(random.uniform(-config.rotate_deg, config.rotate_deg))
        matrix = rotation_matrix((height, width), degrees) @ matrix
    scale = float(random.uniform(*config.scale))
    matrix = np.diag([scale, scale, 1.0]) @ matrix
    canvas = max(round(height * scale), 1), max(round(width * scale), 1)
    moved = [move(np.asarray(polygon, np.float64), matrix) for polygon in polygons]
    flags = np.asarray(ignore, np.bool_)
    left, top, wide, tall = choose_crop(random, canvas, moved, flags, config)
    fit = min(target[1] / wide, target[0] / tall)
    matrix = np.array([[fit, 0, -left * fit], [0, fit, -top * fit], [0, 0, 1.0]]) @ matrix
    inside = min(max(round(tall * fit), 1), target[0]), min(max(round(wide * fit), 1), target[1])
    warped = cv2.warpAffine(image, matrix[:2], inside[::-1], flags=cv2.INTER_LINEAR)
    result = np.zeros((*target, 3), np.uint8)
    result[: inside[0], : inside[1]] = warped
    if config.color_jitter:
        result[: inside[0], : inside[1]] = jitter(
            random, result[: inside[0], : inside[1]], config.color_jitter
        )
    placed = [move(np.asarray(polygon, np.float64), matrix) for polygon in polygons]
    kept = [at for at, p in enumerate(placed) if (p.max(0) > 0).all() and (p.min(0) < inside[::-1]).all()]
    return result, [placed[at] for at in kept], flags[kept]


def jitter(random: Random, image: Array, strength: float) -> Array:
    """Random brightness, contrast and saturation, each by a factor in [1 - strength, 1 + strength]."""
    brightness, contrast, saturation = random.uniform(1 - strength, 1 + strength, 3)
    pixels = image.astype(np.float32) * np.float32(brightness)
    middle = pixels.mean()
    pixels = middle + (pixels - middle) * np.float32(contrast)
    gray = pixels.mean(2, keepdims=True)
    return np.clip(gray + (pixels - gray) * np.float32(saturation), 0, 255).astype(np.uint8)

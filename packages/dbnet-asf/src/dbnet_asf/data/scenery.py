"""Backgrounds without text, clutter, light and camera: everything of a synthetic scene but its ink."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from fusion_core.images import read_image

Random = np.random.Generator
Picture = NDArray[Any]
Split = Literal["train", "test"]

# Photographs with legible text are in neither list: they would be wrong labels.
_TRAIN = {
    "skimage": (
        "brick.png", "grass.png", "gravel.png", "coins.png", "cell.png", "horse.png", "microaneurysms.png",
        "chessboard_GRAY.png", "chessboard_RGB.png",
    ),
    "sklearn": ("flower.jpg",),
}  # fmt: skip
_TEST = {
    "skimage": (
        "coffee.png", "chelsea.png", "camera.png", "hubble_deep_field.jpg", "moon.png", "retina.jpg",
        "ihc.png",
    ),
    "sklearn": ("china.jpg",),
}  # fmt: skip
_FOLDER = {"skimage": "data", "sklearn": "datasets/images"}


def photographs(split: Split) -> list[Path]:
    """Installed photographs without text: for training, or the eight held out for the acceptance test.

    Args:
        split: ``"train"`` or ``"test"``; the two share no picture.

    Returns:
        Paths inside scikit-image and scikit-learn; empty where neither is installed.
    """
    paths: list[Path] = []
    for module, names in (_TRAIN if split == "train" else _TEST).items():
        spec = find_spec(module)
        if spec is not None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations))) / _FOLDER[module]
            paths += [folder / name for name in names if (folder / name).is_file()]
    return paths


@lru_cache(maxsize=64)
def _photograph(path: Path) -> Picture:
    """A photograph as RGB, its long side at most 1280."""
    image = read_image(path)
    height, width = image.shape[:2]
    scale = 1280 / max(height, width)
    if scale < 1:
        thin = min(height, width) * scale < 1  # a row of pixels keeps its one
        size = (max(round(width * scale), 1), max(round(height * scale), 1)) if thin else None
        image = cv2.resize(image, size, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(image)


def color(random: Random, low: float = 0, high: float = 255) -> NDArray[Any]:
    """A color whose mean level lies in [low, high]; half of the draws are nearly gray."""
    base = random.uniform(low, high)
    hue = random.normal(0, 12 if random.random() < 0.5 else 70, 3)
    hue -= hue.mean()
    return np.clip(base + hue, 0, 255).astype(np.float32)


def noise(random: Random, size: tuple[int, int], cells: int) -> NDArray[Any]:
    """Smooth noise (height, width) of unit deviation with ``cells`` grains along each side."""
    grid = random.normal(0, 1, (cells + 1, cells + 1)).astype(np.float32)
    return cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC)


def _photo(random: Random, size: tuple[int, int], photos: list[Path]) -> NDArray[Any]:
    source = _photograph(photos[int(random.integers(len(photos)))])
    height, width = source.shape[:2]
    share = min(random.uniform(0.35, 1.0) * min(height / size[0], width / size[1]), 3.0)
    h, w = max(int(size[0] * share), 8), max(int(size[1] * share), 8)
    y, x = int(random.integers(max(height - h, 0) + 1)), int(random.integers(max(width - w, 0) + 1))
    crop = source[y : y + h, x : x + w]
    if random.random() < 0.5:
        crop = crop[:, ::-1]
    image = cv2.resize(np.ascontiguousarray(crop), size[::-1], interpolation=cv2.INTER_LINEAR).astype(
        np.float32
    )
    if random.random() < 0.3:
        image = image[..., random.permutation(3)]
    if random.random() < 0.1:
        image = 255 - image
    return np.clip(image * random.uniform(0.6, 1.2) + random.uniform(-20, 30), 0, 255)


def _gradient(random: Random, size: tuple[int, int]) -> NDArray[Any]:
    y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j].astype(np.float32)
    angle = random.uniform(0, 2 * np.pi)
    ramp = (
        np.hypot(x, y) / 1.5 if random.random() < 0.3 else (x * np.cos(angle) + y * np.sin(angle)) / 2.8 + 0.5
    )
    return color(random) * ramp[..., None] + color(random) * (1 - ramp[..., None])


def paper(random: Random, size: tuple[int, int]) -> NDArray[Any]:
    """Paper: light, slightly tinted, with fibre and uneven light; one sheet in eight is dark."""
    base = color(random, 170, 250) if random.random() < 0.87 else color(random, 5, 70)
    base = 0.7 * base + 0.3 * base.mean()
    light = noise(random, size, 3) * random.uniform(0, 14)
    fibre = noise(random, size, max(size) // 4) * random.uniform(0, 5)
    return np.clip(base + (light + fibre)[..., None], 0, 255)


def _texture(random: Random, size: tuple[int, int]) -> NDArray[Any]:
    field = np.zeros(size, np.float32)
    for cells in (3, 9, 27, 81)[: int(random.integers(2, 5))]:
        field += noise(random, size, cells) * random.uniform(0.1, 1)
    mix = np.clip(field / 3 + 0.5, 0, 1)[..., None]
    if random.random() < 0.25:
        mix = (mix > 0.5).astype(np.float32)
    return color(random) * mix + color(random) * (1 - mix)


def background(random: Random, size: tuple[int, int], photos: list[Path]) -> NDArray[Any]:
    """A background without text, float32 (height, width, 3) in [0, 255]."""
    kind = random.random()
    if kind < 0.5 and photos:
        return _photo(random, size, photos)
    if kind < 0.65:
        return _gradient(random, size)
    if kind < 0.8:
        return paper(random, size)
    if kind < 0.9:
        return _texture(random, size)
    return np.broadcast_to(color(random), (*size, 3)).astype(np.float32)


def clutter(random: Random, image: NDArray[Any], count: int) -> None:
    """Draw ``count`` things that are no text into ``image``: bars, grids, rings, waves, dots, edges."""
    height, width = image.shape[:2]
    reach = max(height, width)
    for _ in range(count):
        ink = tuple(float(v) for v in color(random))
        x, y = int(random.integers(width)), int(random.integers(height))
        length = int(reach * random.uniform(0.05, 0.6))
        thick = int(random.integers(1, 6))
        kind = int(random.integers(9))
        if kind == 0:
            cv2.line(
                image,
                (x, y),
                (x + int(random.normal(0, length)), y + int(random.normal(0, length))),
                ink,
                thick,
                cv2.LINE_AA,
            )
        elif kind == 1:
            cv2.rectangle(
                image,
                (x, y),
                (x + length, y + int(length * random.uniform(0.1, 1.5))),
                ink,
                random.choice([-1, thick]),
            )
        elif kind == 2:
            axes = (length // 2 + 1, int(length * random.uniform(0.1, 1)) // 2 + 1)
            cv2.ellipse(
                image,
                (x, y),
                axes,
                random.uniform(0, 180),
                0,
                random.uniform(90, 360),
                ink,
                random.choice([-1, thick]),
                cv2.LINE_AA,
            )
        elif kind == 3:  # parallel bars: fences, blinds, windows
            step, tall = int(random.integers(3, 26)), int(length * random.uniform(0.1, 1.2)) + 4
            for at in range(x, min(x + length, width), step):
                cv2.line(
                    image,
                    (at, y),
                    (at + int(tall * 0.2 * (thick - 3)), y + tall),
                    ink,
                    max(min(thick, step // 2), 1),
                )
        elif kind == 4:  # a grid: tiles, facades
            step = int(random.integers(6, 40))
            for at in range(0, length, step):
                cv2.line(image, (x + at, y), (x + at, y + length), ink, 1 + thick // 3)
                cv2.line(image, (x, y + at), (x + length, y + at), ink, 1 + thick // 3)
        elif kind == 5:  # a wave or scribble
            t = np.linspace(0, 1, 40)
            if random.random() < 0.5:
                wave = np.cumsum(random.normal(0, 1, (40, 2)), 0) * length / 12
            else:
                height_of = length * random.uniform(0.02, 0.2)
                wave = np.stack([t * length, np.sin(t * random.uniform(4, 40)) * height_of], axis=1)
            wave = (wave + np.array([x, y])).astype(np.int32)
            cv2.polylines(image, [wave], False, ink, min(thick, 3), cv2.LINE_AA)
        elif kind == 6:  # scattered dots: leaves, stars, cells, stones
            for at in random.normal((x, y), length / 3, (int(random.integers(5, 60)), 2)).astype(int):
                cv2.circle(
                    image, (int(at[0]), int(at[1])), int(random.integers(1, 3 + thick)), ink, -1, cv2.LINE_AA
                )
        elif kind == 7:
            corners = random.normal((x, y), length / 2, (int(random.integers(3, 6)), 2)).astype(np.int32)
            cv2.fillPoly(image, [corners], ink, cv2.LINE_AA)
        else:  # a row of boxes: windows, keys, buttons
            side = int(random.integers(5, 30))
            for at in range(int(random.integers(2, 9))):
                corner = (x + at * int(side * 1.5), y)
                cv2.rectangle(
                    image,
                    corner,
                    (corner[0] + side, y + int(side * random.uniform(0.8, 1.3))),
                    ink,
                    random.choice([-1, 1, 2]),
                )


def _shadow(random: Random, image: NDArray[Any]) -> None:
    height, width = image.shape[:2]
    dark = np.ones((height, width), np.float32)
    corners = random.uniform(-0.3, 1.3, (4, 2)) * (width, height)
    cv2.fillConvexPoly(dark, cv2.convexHull(corners.astype(np.int32)), random.uniform(0.4, 0.85))
    soft = max(int(max(height, width) * random.uniform(0.01, 0.15)) // 2 * 2 + 1, 3)
    image *= cv2.blur(dark, (soft, soft))[..., None]


def degrade(random: Random, image: NDArray[Any]) -> Picture:
    """What light, lens, sensor and file do: shadow, gray, blur, resampling, noise, JPEG (40-95)."""
    size = image.shape[1::-1]
    if random.random() < 0.25:
        _shadow(random, image)
    if random.random() < 0.15:
        image = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    if random.random() < 0.1:
        image = 255 - image
    if random.random() < 0.3:
        image = np.clip(image / 255, 0, 1) ** np.float32(random.uniform(0.6, 1.7)) * 255
    if random.random() < 0.25:
        scale = random.uniform(0.45, 0.9)
        small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, size, interpolation=random.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC]))
    if random.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), random.uniform(0.3, 1.4))
    elif random.random() < 0.1:
        kernel = np.zeros((7, 7), np.float32)
        angle = random.uniform(0, np.pi)
        reach = random.uniform(1, 3) * np.array([np.cos(angle), np.sin(angle)])
        cv2.line(kernel, tuple(np.rint(3 - reach).astype(int)), tuple(np.rint(3 + reach).astype(int)), 1.0)
        image = cv2.filter2D(image, -1, kernel / kernel.sum())
    if random.random() < 0.5:
        image = image + random.standard_normal(image.shape, np.float32) * np.float32(random.uniform(1, 14))
    picture = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    if random.random() < 0.6:
        _, data = cv2.imencode(
            ".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(random.integers(40, 96))]
        )
        picture = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1]
    return np.ascontiguousarray(picture)

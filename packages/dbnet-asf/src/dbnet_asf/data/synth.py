"""Synthetic scenes with known text, rendered on the fly from nothing but installed libraries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import InputError
from fusion_core.images import list_images
from fusion_core.seeding import rng

from .glyphs import Block, Face, Points, bend, faces, typeset, words
from .scenery import Picture, Random, Split, background, clutter, color, degrade, noise, paper, photographs

_MIN_SIDE = 5.0  # pixels: smaller words are marked as ignored
_MIN_VISIBLE = 0.6


class Rendered(NamedTuple):
    """One synthetic scene; unpacks to image, polygons, ignore.

    Attributes:
        image: uint8 RGB (height, width, 3).
        polygons: one float32 (points, 2) outline a word, pixels, clockwise on the screen from its top left:
            4 points, or 14 for curved text.
        ignore: bool (words,), True = not to be learned: cut off by the border or too small to read.
    """

    image: Picture
    polygons: list[Points]
    ignore: NDArray[Any]


class _Scene:
    """An image under construction: what is drawn, which places are taken, and the words so far."""

    def __init__(self, random: Random, image: NDArray[Any]) -> None:
        self.random, self.image = random, image
        self.size = image.shape[:2]
        self.taken = np.zeros((self.size[0] // 4 + 1, self.size[1] // 4 + 1), np.uint8)
        self.polygons: list[Points] = []

    def free(self, outlines: Points, *, margin: int = 1) -> bool:
        """Whether no word stands where the block's hull lies; takes the place if so."""
        hull = cv2.convexHull(outlines.reshape(-1, 2)).astype(np.int32) // 4
        place = cv2.fillConvexPoly(np.zeros_like(self.taken), hull, 1)
        place = np.asarray(cv2.dilate(place, np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)), np.uint8)
        if (place & self.taken).any():
            return False
        self.taken |= place
        return True

    def ink(self, alpha: NDArray[Any], tone: NDArray[Any], x: int, y: int) -> None:
        """Blend a color into the image where ``alpha`` (in [0, 1], its corner at x, y) says."""
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + alpha.shape[0], self.size[0]), min(x + alpha.shape[1], self.size[1])
        if bottom <= top or right <= left:
            return
        share = alpha[top - y : bottom - y, left - x : right - x, None]
        window = self.image[top:bottom, left:right]
        window += share * (tone - window)


def _size(random: Random, low: float, high: float) -> int:
    return round(float(np.exp(random.uniform(np.log(low), np.log(high)))))


def _contrast(random: Random, window: NDArray[Any]) -> NDArray[Any] | None:
    """A color at least 45 levels from nine tenths of its ground, or None where the ground is too uneven."""
    step = 1 + max(window.shape[:2]) // 64
    low, high = np.percentile(window[::step, ::step].mean(2), (5, 95))
    down, up = low - 45, 255 - (high + 45)
    if max(down, up) < 0:
        return None
    dark = down >= 0 and (up < 0 or random.random() < down / (down + up + 1e-6))
    level = random.uniform(0, down) if dark else 255 - random.uniform(0, up)
    tone = color(random, level, level)
    return tone if abs(float(tone.mean()) - level) < 5 else np.full(3, level, np.float32)


def _homography(
    random: Random, block: Block, center: tuple[float, float], angle: float, tilt: float
) -> NDArray[Any]:
    """The map that stands a block at ``center`` with rotation (degrees), shear, stretch and perspective."""
    height, width = block.ink.shape
    theta = np.deg2rad(angle)
    turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
    shape = np.array([[random.uniform(0.85, 1.2), random.normal(0, 0.06)], [0, 1]])
    matrix = np.eye(3)
    matrix[:2, :2] = turn @ shape
    matrix[2, :2] = random.normal(0, tilt, 2) * 100 / max(height, width, 100)
    shift, origin = np.eye(3), np.eye(3)
    shift[:2, 2] = center
    origin[:2, 2] = -width / 2, -height / 2
    return shift @ matrix @ origin


def _map(points: Points, matrix: NDArray[Any]) -> Points:
    moved = points.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
    return (moved[..., :2] / moved[..., 2:]).astype(np.float32)


def _stand(scene: _Scene, block: Block, matrix: NDArray[Any], *, plain: bool = False) -> bool:
    """Put a block into the scene, with its color, plate, outline and shadow, if its place is free."""
    random = scene.random
    outlines = _map(block.outlines, matrix)
    if not scene.free(outlines):
        return False
    height, width = scene.size
    flat = outlines.reshape(-1, 2)
    pad = 8
    x0, y0 = (max(int(v) - pad, 0) for v in flat.min(0))
    x1, y1 = min(int(flat[:, 0].max()) + pad, width), min(int(flat[:, 1].max()) + pad, height)
    if x1 - x0 < 8 or y1 - y0 < 8:
        return False
    shift = np.array([[1, 0, -x0], [0, 1, -y0], [0, 0, 1.0]])
    ink = cv2.warpPerspective(block.ink, shift @ matrix, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR)
    alpha = ink.astype(np.float32) / 255
    window = scene.image[y0:y1, x0:x1]
    tone = None if not plain and random.random() < 0.2 else _contrast(random, window)
    if tone is None:  # a plate under the text
        hull = cv2.convexHull(flat - np.array([x0, y0], np.float32)).reshape(-1, 2)
        grown = (hull - hull.mean(0)) * random.uniform(1.05, 1.25) + hull.mean(0)
        plate = np.zeros(alpha.shape, np.float32)
        cv2.fillConvexPoly(plate, grown.astype(np.int32), 1.0, cv2.LINE_AA)
        ground = color(random)
        scene.ink(plate * np.float32(random.uniform(0.75, 1)), ground, x0, y0)
        inside = plate[..., None] > 0.5
        tone = _contrast(random, np.where(inside, window, ground))
        if tone is None:  # the ground still shines through
            scene.ink(plate, ground, x0, y0)
            tone = np.full(3, 255.0 if ground.mean() < 128 else 0.0, np.float32)
    if not plain and random.random() < 0.15:
        moved = np.roll(alpha, tuple(int(v) for v in random.integers(-3, 4, 2)), (0, 1))
        scene.ink(
            cv2.GaussianBlur(moved, (0, 0), random.uniform(0.5, 2)) * 0.6, np.zeros(3, np.float32), x0, y0
        )
    elif not plain and random.random() < 0.1:
        around = cv2.dilate(alpha, np.ones((3, 3), np.uint8))
        scene.ink(around, np.full(3, 255.0 if tone.mean() < 128 else 0.0, np.float32), x0, y0)
    scene.ink(alpha * np.float32(random.uniform(0.85, 1)), tone, x0, y0)
    scene.polygons += list(outlines)
    return True


def _face(random: Random) -> Face:
    found = faces()
    return found[int(random.integers(len(found)))]


def _angle(random: Random) -> float:
    return float(random.uniform(-45, 45) if random.random() < 0.2 else random.normal(0, 8))


def _sign(scene: _Scene, *, curved: bool) -> None:
    """A short text somewhere: one to three lines, or one bent line."""
    random = scene.random
    height, width = scene.size
    size = _size(random, 9, min(80, height / 3))
    count = int(random.integers(1, 4)) if curved else 1 + int(random.geometric(0.45)) % 4
    lines = [words(random, max(count, 2) if curved else count)]
    if not curved and size < 40:
        lines += [words(random, 1 + int(random.integers(3))) for _ in range(int(random.geometric(0.6)) - 1)][
            :3
        ]
    tracking = random.uniform(0.05, 0.25) if random.random() < 0.12 else 0.0
    block = typeset(
        lines,
        _face(random),
        size,
        spacing=random.uniform(1.1, 1.7),
        gap=random.uniform(0.25, 0.6) + 2 * tracking,
        align=float(random.choice([0.0, 0.5, 1.0])),
        tracking=tracking,
        stroke=int(random.random() < 0.1),
    )
    if curved:
        radius = max(block.ink.shape[1] / random.uniform(0.5, 2.6), block.ink.shape[0] * 0.9)
        block = bend(block, radius * float(random.choice([-1, 1])))
    for _ in range(6):
        center = (random.uniform(0.02, 0.98) * width, random.uniform(0.05, 0.95) * height)
        matrix = _homography(random, block, center, _angle(random), 3e-4)
        moved = _map(block.outlines, matrix).reshape(-1, 2)
        inside = ((moved >= 0) & (moved < (width, height))).all(1).mean()
        if (inside > 0.7 or random.random() < 0.1) and _stand(scene, block, matrix):
            return


def _page(scene: _Scene) -> None:
    """A paragraph or column of up to 25 lines, with a heading now and then."""
    random = scene.random
    height, width = scene.size
    book = [face for face in faces() if face.serif]
    face = book[int(random.integers(len(book)))] if random.random() < 0.5 else _face(random)
    size = _size(random, 9, min(34, height / 6))
    spacing, gap = random.uniform(1.1, 1.7), random.uniform(0.25, 0.6)
    measure = width * random.uniform(0.45, 1.15)
    count = min(int(random.integers(3, 26)), int(height * 1.15 / (spacing * size)) + 1)
    stream = iter(words(random, int(count * measure / (1.5 * size)) + 8))
    lines: list[list[str]] = []
    while len(lines) < count:
        line: list[str] = []
        room = measure * (random.uniform(0.2, 1) if random.random() < 0.12 else 1.0)
        for word in stream:
            room -= face.advance(word, size) + gap * size
            if room < 0 and line:
                break
            line.append(word)
        if not line:
            break
        lines.append(line)
    if not lines:
        return
    block = typeset(
        lines, face, size, spacing=spacing, gap=gap, width=measure if random.random() < 0.5 else None
    )
    if random.random() < 0.35:  # the sheet is curled
        block = _curl(random, block)
    center = (width * random.uniform(0.4, 0.6), height * random.uniform(0.4, 0.6))
    angle = float(random.normal(0, 2.5)) if random.random() < 0.85 else _angle(random)
    _stand(scene, block, _homography(random, block, center, angle, 1.5e-4), plain=random.random() < 0.9)


def _curl(random: Random, block: Block) -> Block:
    height, width = block.ink.shape
    depth, wave, phase = random.uniform(1, 8), width * random.uniform(0.8, 2.5), random.uniform(0, 2 * np.pi)
    ink = cv2.copyMakeBorder(block.ink, 8, 8, 0, 0, cv2.BORDER_CONSTANT)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height + 16, dtype=np.float32))
    bow = (depth * np.sin(2 * np.pi * x / wave + phase)).astype(np.float32)
    outlines = block.outlines + np.array([0, 8], np.float32)
    outlines[..., 1] += depth * np.sin(2 * np.pi * outlines[..., 0] / wave + phase)
    return Block(
        np.asarray(cv2.remap(ink, x, y - bow, cv2.INTER_LINEAR), np.uint8), outlines.astype(np.float32)
    )


def _ignored(polygons: list[Points], size: tuple[int, int]) -> NDArray[Any]:
    """Which words the border cuts off or which are too small."""
    flags = np.zeros(len(polygons), np.bool_)
    for at, polygon in enumerate(polygons):
        (_, (w, h), _) = cv2.minAreaRect(polygon)
        low, high = polygon.min(0), polygon.max(0)
        seen = np.clip(np.minimum(high, size[::-1]) - np.maximum(low, 0), 0, None)
        flags[at] = (
            min(w, h) < _MIN_SIDE or float(np.prod(seen / np.maximum(high - low, 1e-6))) < _MIN_VISIBLE
        )
    return flags


@lru_cache(maxsize=8)
def _photos(folder: Path | None, split: Split) -> tuple[Path, ...]:
    if folder is None:
        return tuple(photographs(split))
    return tuple(list_images(folder))


def render(
    index: int,
    seed: int = 0,
    size: int | Sequence[int] = 384,
    *,
    photos: str | Path | None = None,
    backgrounds: Split = "train",
) -> Rendered:
    """Render one synthetic scene with known words.

    A quarter of the scenes holds no text at all, a third is page-like, the rest are signs and labels, a fifth
    of them curved; then come shadows, blur, noise and JPEG. The scene depends on the arguments only (and on
    the installed versions of the libraries whose fonts and photographs it uses): any worker renders it alike.

    Args:
        index: number of the scene.
        seed: of the whole series.
        size: side, or (height, width), in pixels, at least 64.
        photos: a folder of photographs WITHOUT text to use as backgrounds, in place of the installed ones.
        backgrounds: ``"train"``, or ``"test"`` for the eight photographs that no training scene shows.

    Returns:
        Image, outlines of the words, flags of the words to ignore.

    Raises:
        InputError: the size is too small, or the folder holds no picture.
        MissingExtraError: matplotlib, whose fonts are used, is missing.

    Example:
        >>> image, polygons, ignore = render(1, seed=0, size=128)
        >>> image.shape, len(polygons) == len(ignore)
        ((128, 128, 3), True)
    """
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(height, width) < 64:
        raise InputError(f"size is {(height, width)}, wanted at least 64 pixels on each side")
    if backgrounds not in ("train", "test"):
        raise InputError(f"backgrounds is {backgrounds!r}, wanted 'train' or 'test'")
    random = rng(seed, "scene", backgrounds, index)
    sources = list(_photos(Path(photos) if photos else None, backgrounds))
    kind = random.random()
    sheet = 0.25 <= kind < 0.51 and random.random() < 0.7
    scene = _Scene(
        random, (paper if sheet else background)(random, (height, width), *(() if sheet else (sources,)))
    )
    scene.image = np.ascontiguousarray(scene.image, np.float32)
    if kind < 0.25:
        clutter(random, scene.image, int(random.integers(0, 12)) if random.random() < 0.7 else 0)
    elif random.random() < 0.3:
        clutter(random, scene.image, int(random.integers(1, 5)))
    if 0.25 <= kind < 0.51:
        _page(scene)
    elif kind >= 0.51:
        curved = random.random() < 0.3
        for _ in range(int(random.integers(1, 9)) * height * width // (384 * 384) + 1):
            _sign(scene, curved=curved and random.random() < 0.6)
    if random.random() < 0.3:
        scene.image *= (1 + 0.1 * noise(random, (height, width), 3))[..., None]
    picture = degrade(random, scene.image)
    return Rendered(picture, scene.polygons, _ignored(scene.polygons, (height, width)))

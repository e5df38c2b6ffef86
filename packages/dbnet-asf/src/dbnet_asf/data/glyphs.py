"""Words, faces and typeset blocks for the renderer: everything that becomes ink."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fusion_core.errors import MissingExtraError

Random = np.random.Generator
Points = NDArray[Any]

_SERIF = ("DejaVuSerif", "STIXGeneral", "cmr10")
_FILES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
    "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10",
)  # fmt: skip
_WORD = re.compile(r"[A-Za-z0-9(][A-Za-z0-9'&@/-]{0,14}[.,:;!?)]?")
_PAD = 0.06  # of the type size, on each side of the ink


@dataclass(frozen=True, slots=True)
class Face:
    """One type face: a font file for Pillow, Pillow's built-in font, or a built-in face of OpenCV.

    Attributes:
        name: the font file's stem, ``"builtin"``, or ``"cv2:NAME"``.
        path: the font file, or None.
    """

    name: str
    path: str | None = None

    @property
    def serif(self) -> bool:
        """Whether books are set in it."""
        return self.name.startswith(_SERIF)

    def advance(self, text: str, size: int) -> float:
        """Width in pixels that ``text`` takes at a type size of ``size`` pixels."""
        if self.name.startswith("cv2:"):
            font = _opencv(self.name)
            return float(cv2.getTextSize((0, 0), text, (0, 0), font, size)[2])  # type: ignore[call-overload]
        return float(_pillow(self.path, size).getlength(text))


@lru_cache(maxsize=16)
def _opencv(name: str) -> Any:
    return cv2.FontFace(name.removeprefix("cv2:"))  # type: ignore[attr-defined]


@lru_cache(maxsize=512)
def _pillow(path: str | None, size: int) -> Any:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@lru_cache(maxsize=1)
def faces() -> tuple[Face, ...]:
    """All faces that ship with the installed libraries: matplotlib's, Pillow's and OpenCV's.

    Raises:
        MissingExtraError: matplotlib, which brings most of the font files, is not installed.
    """
    spec = find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError('matplotlib is not installed; it comes with: pip install "dbnet-asf[synth]"')
    folder = Path(next(iter(spec.submodule_search_locations))) / "mpl-data" / "fonts" / "ttf"
    found = [Face(name, str(folder / f"{name}.ttf")) for name in _FILES if (folder / f"{name}.ttf").is_file()]
    found.append(Face("builtin"))
    if hasattr(cv2, "FontFace"):
        found += [Face("cv2:sans"), Face("cv2:italic")]
    return tuple(found)


@lru_cache(maxsize=1)
def _corpus() -> tuple[str, ...]:
    from pydoc_data import topics

    return tuple(word for word in " ".join(topics.topics.values()).split() if _WORD.fullmatch(word))


def _number(random: Random) -> str:
    value = int(random.integers(0, 10 ** int(random.integers(1, 7))))
    forms = (
        f"{value}",
        f"{value / 100:.2f}",
        f"${value}",
        f"{value % 100}%",
        f"{value % 2400 // 100}:{value % 60:02d}",
        f"{1900 + value % 150}",
        f"No.{value % 1000}",
        f"{value % 31 + 1}/{value % 12 + 1}",
    )
    return forms[int(random.integers(len(forms)))]


def words(random: Random, count: int) -> list[str]:
    """``count`` words as they follow each other in the language's own manual; one in ten is a number."""
    corpus = _corpus()
    start = int(random.integers(len(corpus) - count))
    drawn = list(corpus[start : start + count])
    for at in np.flatnonzero(random.random(count) < 0.1):
        drawn[at] = _number(random)
    case = random.random()
    if case < 0.2:
        return [word.upper() for word in drawn]
    return [word[:1].upper() + word[1:] for word in drawn] if case < 0.4 else drawn


@dataclass(frozen=True, slots=True)
class Block:
    """Typeset text: ``ink`` uint8 (height, width), 255 = full, the words' outlines ``(words, points, 2)``."""

    ink: NDArray[Any]
    outlines: Points


def typeset(
    lines: list[list[str]],
    face: Face,
    size: int,
    *,
    spacing: float = 1.3,
    gap: float = 0.3,
    align: float = 0.0,
    tracking: float = 0.0,
    stroke: int = 0,
    width: float | None = None,
) -> Block:
    """Set lines of words.

    Args:
        lines: the words of each line.
        face: the type face.
        size: type size in pixels.
        spacing: distance of the base lines, in type sizes.
        gap: space between words, in type sizes.
        align: 0 = left, 0.5 = centered, 1 = right.
        tracking: extra space between letters, in type sizes.
        stroke: extra stroke width in pixels (Pillow's faces only).
        width: justify all lines but the last to this width in pixels, where the gaps stay natural.

    Returns:
        The ink and one quadrilateral a word, from the glyphs' extents padded by 6 % of the type size.
    """
    runs = [
        [
            sum(face.advance(letter, size) + tracking * size for letter in word) - tracking * size
            if tracking
            else face.advance(word, size)
            for word in line
        ]
        for line in lines
    ]
    gaps = [gap * size] * len(lines)
    if width is not None:
        for row, run in enumerate(runs[:-1]):
            wanted = (width - sum(run)) / max(len(run) - 1, 1)
            gaps[row] = wanted if 0.2 * size <= wanted <= 0.8 * size else gaps[row]
    spans = [sum(run) + space * (len(run) - 1) for run, space in zip(runs, gaps, strict=True)]
    margin = size // 2 + 2
    full = int(max(spans)) + 2 * margin
    canvas = Image.new("L", (full, int((len(lines) - 1) * spacing * size + 1.3 * size) + 2 * margin))
    pen = (
        _OpenCVPen(canvas, face, size)
        if face.name.startswith("cv2:")
        else _PillowPen(canvas, face, size, stroke)
    )
    boxes: list[tuple[float, float, float, float]] = []
    for row, (line, run, space) in enumerate(zip(lines, runs, gaps, strict=True)):
        x = margin + align * (full - 2 * margin - spans[row])
        baseline = margin + size + row * spacing * size
        for word, advance in zip(line, run, strict=True):
            if tracking:
                parts = []
                for letter in word:
                    parts.append(pen.write(x, baseline, letter))
                    x += face.advance(letter, size) + tracking * size
                x += space - tracking * size
                left, top, right, bottom = zip(*parts, strict=True)
                boxes.append((min(left), min(top), max(right), max(bottom)))
            else:
                boxes.append(pen.write(x, baseline, word))
                x += advance + space
    box = np.asarray(boxes, np.float32) + np.float32(_PAD * size) * np.array([-1, -1, 1, 1], np.float32)
    outlines = np.stack([box[:, [0, 1]], box[:, [2, 1]], box[:, [2, 3]], box[:, [0, 3]]], axis=1)
    return Block(pen.ink(), outlines)


class _PillowPen:
    def __init__(self, canvas: Image.Image, face: Face, size: int, stroke: int) -> None:
        self.canvas, self.font, self.stroke = canvas, _pillow(face.path, size), stroke
        self.draw = ImageDraw.Draw(canvas)

    def write(self, x: float, y: float, text: str) -> tuple[float, float, float, float]:
        x, y = float(round(x)), float(round(y))
        self.draw.text((x, y), text, font=self.font, fill=255, anchor="ls", stroke_width=self.stroke)
        left, top, right, bottom = self.font.getbbox(text, anchor="ls", stroke_width=self.stroke)
        return x + left, y + top, x + right, y + bottom

    def ink(self) -> NDArray[Any]:
        return np.asarray(self.canvas)


class _OpenCVPen:
    def __init__(self, canvas: Image.Image, face: Face, size: int) -> None:
        self.array, self.font, self.size = np.zeros(canvas.size[::-1], np.uint8), _opencv(face.name), size

    def write(self, x: float, y: float, text: str) -> tuple[float, float, float, float]:
        x, y = float(round(x)), float(round(y))
        wide = int(cv2.getTextSize((0, 0), text, (0, 0), self.font, self.size)[2]) + self.size  # type: ignore[call-overload]
        scratch = np.zeros((2 * self.size, wide + self.size), np.uint8)
        at = (self.size // 2, int(1.3 * self.size))
        cv2.putText(scratch, text, at, 255, self.font, self.size)  # type: ignore[call-overload]
        left, top, w, h = cv2.boundingRect(scratch)
        x0, y0 = int(x) + left - at[0], int(y) + top - at[1]
        (y_start, y_stop), (x_start, x_stop) = (
            np.clip((start, start + length), 0, side).tolist()
            for start, length, side in zip((y0, x0), (h, w), self.array.shape, strict=True)
        )
        rows, columns = slice(y_start, y_stop), slice(x_start, x_stop)
        glyphs = scratch[
            top + rows.start - y0 : top + rows.stop - y0, left + columns.start - x0 : left + columns.stop - x0
        ]
        np.maximum(self.array[rows, columns], glyphs, out=self.array[rows, columns])
        return x0, y0, x0 + w, y0 + h

    def ink(self) -> NDArray[Any]:
        return self.array


def bend(block: Block, radius: float) -> Block:
    """Bend one line of text along a circle.

    Args:
        block: the straight line.
        radius: of the circle through the line's middle, in pixels; > 0 = hill, < 0 = valley. It has to exceed
            half of the block's height.

    Returns:
        The bent block; each outline has 14 points, seven along the top and seven back along the bottom.
    """
    height, width = block.ink.shape
    r, sign = abs(radius), np.sign(radius)
    half = min(width / 2 / r, 2.6)

    def forward(points: Points) -> Points:
        theta = (points[..., 0] - width / 2) / r
        rho = r + sign * (height / 2 - points[..., 1])
        return np.stack([rho * np.sin(theta), sign * (r - rho * np.cos(theta))], axis=-1).astype(np.float32)

    edge = np.linspace(0, 1, 7, dtype=np.float32)[None, :, None]
    top = block.outlines[:, :1] * (1 - edge) + block.outlines[:, 1:2] * edge
    bottom = block.outlines[:, 3:4] * (1 - edge) + block.outlines[:, 2:3] * edge
    outlines = forward(np.concatenate([top, bottom[:, ::-1]], axis=1))

    theta = np.linspace(-half, half, 64)
    border = np.stack([width / 2 + theta * r, np.zeros_like(theta)], axis=-1).astype(np.float32)
    corners = np.concatenate([forward(border), forward(border + np.array([0, height], np.float32))])
    low = np.floor(corners.min(0)) - 1
    shape = np.ceil(corners.max(0) - low).astype(int) + 2
    x, y = np.meshgrid(np.arange(shape[0]) + low[0], np.arange(shape[1]) + low[1])
    down = r - sign * y
    source_x = (width / 2 + r * np.arctan2(x, down)).astype(np.float32)
    source_y = (height / 2 - sign * (np.hypot(x, down) - r)).astype(np.float32)
    ink = cv2.remap(block.ink, source_x, source_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return Block(np.asarray(ink, np.uint8), outlines - low.astype(np.float32))

"""Pictures of depth without matplotlib: a stored colour map, ground pictures, sheets of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fusion_core.errors import ShapeError
from gvdepth.camera import Camera
from gvdepth.geometry import ground_depth, horizon

Picture = NDArray[np.uint8]

_MAGMA_R = (
    "fcfdbffcfbbdfcf9bbfcf7b9fcf6b8fcf4b6fcf2b4fcf0b2fceeb0fcecaefdebacfde9aafde7a9fde5a7fde3a5fde2a3"
    "fde0a1fddea0fddc9efdda9cfed89afed799fed597fed395fed194fecf92fecd90fecc8ffeca8dfec88cfec68afec488"
    "fec287fec185febf84febd82febb81feb97ffeb77efeb67cfeb47bfeb27afeb078feae77feac76feaa74fea973fea772"
    "fea571fea36ffea16efe9f6dfe9d6cfd9b6bfd9a6afd9869fd9668fd9467fd9266fc9065fc8e64fc8c63fc8a62fc8961"
    "fb8761fb8560fb835ffa815ffa7f5efa7d5ef97b5df9795df9785df8765cf8745cf7725cf7705cf66e5cf66c5cf56b5c"
    "f4695cf4675cf3655cf2645cf2625df1605df05f5eef5d5eee5b5eed5a5fec5860eb5760ea5661e95462e85362e75263"
    "e55064e44f64e34e65e24d66e04c67df4a68de4968dc4869db476ad9466bd8456cd6456cd5446dd3436ed2426fd0416f"
    "cf4070cd4071cc3f71ca3e72c83e73c73d73c53c74c43c75c23b75c03a76bf3a77bd3977bc3978ba3878b83779b73779"
    "b5367ab3367ab2357bb0357bae347bad347cab337caa337da8327da6317da5317ea3307ea1307ea02f7f9e2f7f9c2e7f"
    "9b2e7f992d80982d80962c80942c80932b80912b81902a818e2a818c29818b2981892881882781862781842681832681"
    "8125818025827e24827c23827b2382792282782281762181752181732081721f81701f816e1e816d1d816b1d816a1c81"
    "681c81671b80651a80641a806219806018805f187f5d177f5c167f5a167e59157e57157e56147d54137d52137c51127c"
    "4f127b4e117b4c117a4a1079491078471078451077440f76420f75400f743f0f723d0f713b0f70390f6e38106c36106b"
    "3410693310673111652f11632d11612c115f2a115c29115a27125825125524125322115021114e20114b1e11491d1147"
    "1c10441a104219103f180f3d160f3b150e38140e36130d34120d31110c2f100b2d0e0b2b0d0a290c09260b09240a0822"
    "09072008071e07061c06051a06051805041604041403031203030f02020d02020b020109010108010106010005000004"
)


@cache
def magma_r() -> Picture:
    """The colour map ``magma_r`` as (256, 3) uint8: from pale (0) to black (255)."""
    return np.frombuffer(bytes.fromhex(_MAGMA_R), np.uint8).reshape(256, 3)


def colorize(
    values: NDArray[Any], low: float, high: float, known: NDArray[np.bool_] | None = None
) -> Picture:
    """Values as colours of :func:`magma_r`; unknown ones are gray.

    Args:
        values: (H, W).
        low: gets the first colour, the palest.
        high: gets the last, black; it may be less than ``low``.
        known: (H, W); by default where the values are finite.

    Raises:
        ShapeError: not two-dimensional.
    """
    if values.ndim != 2:
        raise ShapeError(f"values has shape {values.shape}, wanted (H, W)")
    shown = np.isfinite(values) if known is None else known
    share = (np.where(shown, values, low).astype(np.float64) - low) / ((high - low) or 1.0)
    found = magma_r()[(share.clip(0, 1) * 255 + 0.5).astype(np.uint8)]
    return np.where(shown[..., None], found, np.uint8(128))


def color_depth(depth: NDArray[Any], *, min_depth: float | None = None, max_depth: float = 80.0) -> Picture:
    """A depth map as a picture: near is dark, far is pale, unknown is gray.

    Args:
        depth: (H, W) metres; 0, negative or not finite = unknown.
        min_depth: metres that get the darkest colour; by default the nearest but 2 % of the pixels.
        max_depth: metres that get the palest.

    Returns:
        (H, W, 3) uint8: :func:`magma_r` on 1 / depth.
    """
    known = np.isfinite(depth) & (depth > 0)
    inverse = 1.0 / np.where(known, depth, 1.0)
    if min_depth is not None:
        high = 1.0 / min_depth
    else:
        high = float(np.quantile(inverse[known], 0.98)) if known.any() else 1.0
    return colorize(inverse, 1.0 / max_depth, max(high, 1.01 / max_depth), known)


def draw_ground(
    camera: Camera, image: Picture | None = None, distances: Sequence[float] = (5, 10, 20, 40, 80)
) -> Picture:
    """The road as a camera sees it: ground depth in colour, the horizon, and lines of equal distance.

    Args:
        camera: of the picture.
        image: (H, W, 3) of the camera's size, shown through the colours; None shows colours alone.
        distances: metres of the lines.
    """
    depth = np.asarray(ground_depth(camera, backend="numpy"))
    colors = color_depth(depth, min_depth=3.0).astype(np.float64)
    below = np.isfinite(depth)[..., None]
    base = np.full((*depth.shape, 3), 235.0) if image is None else image.astype(np.float64)
    mixed = np.where(below, 0.45 * colors + 0.55 * base, base) if image is not None else colors
    picture = Image.fromarray(np.where(below, mixed, base).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    columns = np.array([0.0, camera.width - 1.0])
    slope = -np.tan(camera.roll) * camera.fy / camera.fx
    middle = float(horizon(camera))

    def line(row: float, color: tuple[int, int, int], text: str) -> None:
        ends = row + slope * (columns - camera.cx)
        pen.line([(0.0, float(ends[0])), (camera.width - 1.0, float(ends[1]))], fill=color, width=1)
        pen.text((4, float(ends[0]) + 1), text, fill=color)

    line(middle, (30, 120, 255), "horizon")
    normal = camera.normal
    for distance in distances:
        # Rows below the horizon of the same column: fy h / (n_y d).
        below_rows = camera.fy * camera.require_height() / (normal[1] * distance)
        if middle + below_rows < camera.height + abs(slope) * camera.width:
            line(middle + below_rows, (0, 200, 120), f"{distance:g} m")
    return np.asarray(picture)


def sheet(
    rows: Sequence[Sequence[Picture]], heads: Sequence[str], names: Sequence[str], scale: int = 2
) -> Picture:
    """Pictures of one size as a sheet, with words over the columns and beside the rows.

    Args:
        rows: pictures (h, w, 3).
        heads: one for each column.
        names: one for each row.
        scale: pixels are repeated so often.
    """
    height, width = (side * scale for side in rows[0][0].shape[:2])
    left, top, gap = 112, 18, 3
    size = (left + len(heads) * (width + gap), top + len(rows) * (height + gap))
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for column, head in enumerate(heads):
        pen.text((left + column * (width + gap) + 4, 3), head, fill="black")
    for number, (name, tiles) in enumerate(zip(names, rows, strict=True)):
        y = top + number * (height + gap)
        pen.text((4, y + height // 2 - 6), name, fill="black")
        for column, tile in enumerate(tiles):
            big = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(big, (left + column * (width + gap), y))
    return np.asarray(picture)

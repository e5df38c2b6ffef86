"""Pictures of what was found: outlines on the image, maps in color."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .geometry import Array

GREEN, RED = (0, 190, 90), (230, 50, 50)


def outlines(
    image: Array,
    polygons: Sequence[Array],
    *,
    labels: Sequence[str] | None = None,
    color: tuple[int, int, int] = GREEN,
    fill: float = 0.12,
) -> Array:
    """Draw polygons on a copy of an image.

    Args:
        image: uint8 RGB (height, width, 3).
        polygons: (points, 2) each, pixels.
        labels: a short text for each, put above its first point.
        color: RGB.
        fill: how strongly the inside is tinted, in [0, 1].

    Returns:
        uint8 RGB, same shape.
    """
    canvas = np.ascontiguousarray(image).copy()
    shapes = [np.rint(np.asarray(polygon)).astype(np.int32).reshape(-1, 1, 2) for polygon in polygons]
    if fill and shapes:
        tint = canvas.copy()
        cv2.fillPoly(tint, shapes, color)
        canvas = np.asarray(cv2.addWeighted(tint, fill, canvas, 1 - fill, 0))
    thick = max(1, round(max(image.shape[:2]) / 700))
    cv2.polylines(canvas, shapes, True, color, thick, cv2.LINE_AA)
    if not labels:
        return canvas
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    font: Any = ImageFont.load_default(max(9, 8 * thick))
    for polygon, label in zip(polygons, labels, strict=True):
        x, y = (float(v) for v in np.asarray(polygon)[0])
        spot = pen.textbbox((x, max(y - 1, 0)), label, font=font, anchor="lb")
        pen.rectangle(spot, fill=color)
        pen.text((x, max(y - 1, 0)), label, font=font, fill=(255, 255, 255), anchor="lb")
    return np.asarray(picture)


def heat(values: Array, *, low: float = 0.0, high: float = 1.0) -> Array:
    """A map (height, width) as an RGB picture, dark blue at ``low``, yellow at ``high``."""
    scaled = np.clip((np.asarray(values, np.float32) - low) / max(high - low, 1e-9), 0, 1)
    return np.asarray(cv2.applyColorMap((scaled * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS))[
        ..., ::-1
    ].copy()


def panels(pictures: Sequence[Array], titles: Sequence[str], *, columns: int = 2, gap: int = 6) -> Array:
    """Pictures of one size in a grid, each under its title.

    Args:
        pictures: uint8 RGB, all of the shape of the first (others are resized to it).
        titles: one each.
        columns: of the grid.
        gap: white space between them, in pixels.
    """
    height, width = pictures[0].shape[:2]
    font: Any = ImageFont.load_default(max(12, width // 36))
    bar = max(18, width // 24)
    rows = -(-len(pictures) // columns)
    size = (columns * (width + gap) - gap, rows * (height + bar + gap) - gap)
    canvas = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    for at, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x, y = at % columns * (width + gap), at // columns * (height + bar + gap)
        if picture.shape[:2] != (height, width):
            picture = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR))
        pen.text((x + 2, y + bar // 2), title, font=font, fill=(20, 20, 20), anchor="lm")
        canvas.paste(Image.fromarray(picture), (x, y + bar))
    return np.asarray(canvas)

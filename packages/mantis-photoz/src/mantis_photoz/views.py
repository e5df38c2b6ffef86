"""What the network looks at (section 2.3): crops, the paper's stretched stack, turns, flips, augmentation.

Surveys are mappings of a name to planes (batch, bands, height, width), in the order of the early stack. The
sky-true view is :mod:`mantis_photoz.wcs`'s. Everything is batched and stays on the device of the planes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fusion_core.errors import check_range
from mantis_photoz.errors import ConfigError, ShapeError
from mantis_photoz.surveys import SURVEYS

__all__ = [
    "Draw",
    "Planes",
    "augment",
    "center_crop",
    "d4",
    "d4_views",
    "drop_surveys",
    "late_view",
    "official_draw",
    "official_view",
    "resize",
    "rotate_nearest",
    "stretch_view",
    "turn",
]

Planes = Mapping[str, Tensor]
CROPS: Mapping[str, int] = {name: survey.crop for name, survey in SURVEYS.items()}
ELEMENTS = 8


def center_crop(planes: Float[Tensor, "... height width"], size: int) -> Float[Tensor, "... size size"]:
    """The centre pixels; with an odd rest the extra row is cut from the bottom, as torchvision does.

    Raises:
        ShapeError: the planes are smaller.
    """
    height, width = planes.shape[-2:]
    if min(height, width) < size:
        raise ShapeError(f"planes are {height} x {width} pixels, wanted at least the crop, {size}")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return planes[..., top : top + size, left : left + size]


def resize(planes: Float[Tensor, "batch bands h w"], size: int) -> Float[Tensor, "batch bands size size"]:
    """Bilinear, antialiased, half-pixel centres, edges clamped."""
    if planes.shape[-2:] == (size, size):
        return planes
    return F.interpolate(planes, (size, size), mode="bilinear", align_corners=False, antialias=True)


def stretch_view(
    surveys: Planes, *, size: int = 120, crops: Mapping[str, int] = CROPS
) -> Float[Tensor, "batch bands size size"]:
    """The paper's early stack: centre crops, each stretched to ``size``; not aligned on the sky (B9).

    Args:
        surveys: name -> (batch, bands, height, width).
        size: pixels of the result's side.
        crops: name -> pixels of the crop's side; the whole plane where a name is missing.

    Returns:
        (batch, all bands, size, size).

    Example:
        >>> stretch_view({"galex": torch.ones(1, 2, 32, 32), "ps1": torch.ones(1, 5, 170, 170)}).shape
        torch.Size([1, 7, 120, 120])
    """
    _check(surveys)
    parts = [center_crop(x, crops.get(name, min(x.shape[-2:]))) for name, x in surveys.items()]
    return torch.cat([resize(part, size) for part in parts], dim=1)


def late_view(surveys: Planes, *, crops: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """The paper's late view: only PS1 is cropped, GALEX and unWISE keep their pixels."""
    _check(surveys)
    cut = {"ps1": CROPS["ps1"]} if crops is None else crops
    return {name: center_crop(x, cut[name]) if name in cut else x for name, x in surveys.items()}


def _check(surveys: Planes) -> None:
    shapes = {name: tuple(x.shape) for name, x in surveys.items()}
    if not shapes or any(len(s) != 4 for s in shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
        raise ShapeError(f"surveys have shapes {shapes}, wanted (batch, bands, height, width) of one batch")


# ---- the authors' random view (B2) ----


@dataclass(frozen=True, slots=True)
class Draw:
    """A turn in degrees, counter-clockwise on screen, and the two flips after it."""

    angle_deg: float
    horizontal: bool
    vertical: bool


def official_draw(seed: int | np.random.RandomState) -> Draw:
    """One draw of the authors' augmentation: angle, then the horizontal, then the vertical flip.

    Args:
        seed: of numpy's legacy generator, or such a generator that goes on.
    """
    draw = np.random.RandomState(seed) if isinstance(seed, int) else seed
    angle = 360 * float(draw.rand())
    return Draw(angle, float(draw.rand()) > 0.5, float(draw.rand()) > 0.5)


def rotate_nearest(planes: Float[Tensor, "... n n"], angle_deg: float) -> Float[Tensor, "... n n"]:
    """Turn counter-clockwise on screen about the centre: nearest pixel, zeros outside.

    ``out(x, y) = in(round(x cos t - y sin t), round(x sin t + y cos t))``, halves to even.
    """
    height, width = planes.shape[-2:]
    t = math.radians(angle_deg)
    y = torch.arange(height, dtype=torch.float64, device=planes.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64, device=planes.device) - (width - 1) / 2
    column = (x * math.cos(t) - y * math.sin(t) + (width - 1) / 2).round().long()
    row = (x * math.sin(t) + y * math.cos(t) + (height - 1) / 2).round().long()
    outside = (row < 0) | (row >= height) | (column < 0) | (column >= width)
    found = planes[..., row.clamp(0, height - 1), column.clamp(0, width - 1)]
    return found.masked_fill(outside, 0.0)


def turn(surveys: Planes, draw: Draw) -> dict[str, Tensor]:
    """Turn and flip all surveys and objects by one draw, as the authors do."""
    found: dict[str, Tensor] = {}
    for name, planes in surveys.items():
        x = rotate_nearest(planes, draw.angle_deg)
        x = x.flip(-1) if draw.horizontal else x
        found[name] = x.flip(-2) if draw.vertical else x
    return found


def official_view(
    surveys: Planes,
    draw: Draw,
    *,
    fusion: Literal["early", "late"] = "early",
    size: int = 120,
    crops: Mapping[str, int] = CROPS,
) -> Tensor | dict[str, Tensor]:
    """The authors' training view, which their inference takes as well: turned and flipped by a draw."""
    turned = turn(surveys, draw)
    if fusion == "early":
        return stretch_view(turned, size=size, crops=crops)
    return late_view(turned, crops={"ps1": crops["ps1"]})


# ---- the group of the square ----


def d4(planes: Float[Tensor, "... n n"], element: int) -> Float[Tensor, "... n n"]:
    """One of the 8 exact turns and flips: ``element % 4`` quarter turns, then a mirror from 4 on.

    Example:
        >>> d4(torch.tensor([[1, 2], [3, 4]]), 4).tolist()
        [[2, 1], [4, 3]]
    """
    check_range("element", element, 0, ELEMENTS - 1)
    found = torch.rot90(planes, element % 4, (-2, -1))
    return found.flip(-1) if element >= 4 else found


def d4_views(surveys: Planes) -> list[dict[str, Tensor]]:
    """All 8 views of a batch; the mean of a model over them does not depend on how the object lies."""
    return [{name: d4(x, element) for name, x in surveys.items()} for element in range(ELEMENTS)]


def _d4_each(planes: Tensor, elements: Int64[Tensor, " batch"]) -> Tensor:
    height, width = planes.shape[-2:]
    if height != width:
        raise ShapeError(f"planes are {height} x {width} pixels, wanted squares for turns")
    places = torch.arange(height * width, device=planes.device).reshape(height, width)
    table = torch.stack([d4(places, element).reshape(-1) for element in range(ELEMENTS)])
    index = table[elements][:, None].expand(-1, planes.shape[1], -1)
    return planes.flatten(-2).gather(-1, index).reshape(planes.shape)


# ---- augmentation per object ----


def augment(
    surveys: Planes,
    *,
    generator: torch.Generator,
    kind: Literal["d4", "d4-batch", "rotate", "none"] = "d4",
    jitter: float = 0.0,
    noise: float = 0.0,
    pixel_scales: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Turn, flip, shift and roughen a batch, each object by draws of its own that all surveys share.

    Args:
        surveys: name -> (batch, bands, height, width), before the crop.
        generator: of the draws, on the CPU.
        kind: ``"d4"`` exact quarter turns and flips, ``"d4-batch"`` one for the batch, ``"rotate"`` any angle
            with bilinear sampling, ``"none"``.
        jitter: largest shift of the centre in arc seconds, the same place on the sky for all surveys; one
            ``grid_sample`` call per survey does turn and shift.
        noise: standard deviation of normal noise that is added.
        pixel_scales: name -> arc seconds per pixel; the registry's by default.

    Returns:
        Planes of the same shapes.

    Raises:
        ConfigError: an unknown kind.
    """
    _check(surveys)
    if kind not in ("d4", "d4-batch", "rotate", "none"):
        raise ConfigError(f"kind is {kind!r}, wanted 'd4', 'd4-batch', 'rotate' or 'none'")
    check_range("jitter", jitter, 0.0, math.inf)
    check_range("noise", noise, 0.0, math.inf)
    batch = len(next(iter(surveys.values())))
    elements = torch.randint(ELEMENTS, (batch,), generator=generator)
    if kind == "d4-batch":
        elements = elements[:1].expand(batch)
    angle = torch.rand(batch, generator=generator) * (2 * math.pi if kind == "rotate" else 0.0)
    mirror = 1.0 - 2.0 * (torch.rand(batch, generator=generator) < 0.5) * (kind == "rotate")
    shift = (torch.rand(batch, 2, generator=generator) * 2 - 1) * jitter
    scales = pixel_scales or {name: survey.pixel_scale for name, survey in SURVEYS.items()}
    found: dict[str, Tensor] = {}
    for name, planes in surveys.items():
        x = planes
        if kind in ("d4", "d4-batch"):
            x = _d4_each(x, elements.to(x.device))
        if kind == "rotate" or jitter > 0:
            pixels = shift / scales.get(name, 1.0)
            x = _sample(x, angle, mirror, pixels)
        if noise > 0:
            x = x + noise * torch.randn(x.shape, generator=generator).to(x)
        found[name] = x
    return found


def _sample(x: Tensor, angle: Tensor, mirror: Tensor, shift: Tensor) -> Tensor:
    """Bilinear turn (radians), mirror (+-1) and shift (pixels) per object, zeros outside."""
    half = torch.tensor([x.shape[-1] / 2, x.shape[-2] / 2])
    cos, sin = angle.cos(), angle.sin()
    ratio = half[1] / half[0]
    rows = [
        torch.stack([mirror * cos, -sin * ratio, shift[:, 0] / half[0]], -1),
        torch.stack([mirror * sin / ratio, cos, shift[:, 1] / half[1]], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def drop_surveys(
    present: Tensor, chances: Float[Tensor, " surveys"], *, generator: torch.Generator
) -> Tensor:
    """Take surveys from objects at random, never the last one (section 2.9).

    Args:
        present: (batch, surveys) bool.
        chances: (surveys,) of each to be dropped, in [0, 1).
        generator: of the draws, on the CPU.

    Returns:
        (batch, surveys) bool; an object that would lose all keeps those it had.
    """
    drawn = torch.rand(present.shape, generator=generator).to(present.device)
    kept = present & (drawn >= chances.to(present.device))
    return torch.where(kept.any(-1, keepdim=True), kept, present)

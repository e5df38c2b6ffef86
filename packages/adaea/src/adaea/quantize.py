"""Adversarial images as bytes: rounded to k/255 without leaving the budget round the clean image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fusion_core.errors import ConfigError, ShapeError, check_range


def to_uint8(
    adversarial: Tensor, clean: Tensor, eps: float, *, norm: Literal["linf", "l2"] = "linf"
) -> tuple[Tensor, int]:
    """Round adversarial images to bytes inside the budget.

    linf: round(255 adv), then into [ceil(255 (x0 - eps)), floor(255 (x0 + eps))] and [0, 255]; both products
    are rounded to 9 decimals first. l2: the nearest byte where the image stays inside the ball, else each
    value is rounded towards the clean one, which for clean images on the grid lengthens nothing.

    Args:
        adversarial: ``(images, channels, height, width)`` in [0, 1].
        clean: likewise; the middle of the budget.
        eps: its radius, >= 0, in units of [0, 1].
        norm: of the budget.

    Returns:
        uint8 images of the same shape, and how many values have no byte inside the budget (clean image off
        the grid and ``eps`` below 1/510); these take round(255 x0).

    Raises:
        ShapeError: different shapes.
        ConfigError: another norm, or a negative ``eps``.

    Example:
        >>> x = torch.full((1, 1, 1, 1), 0.5)
        >>> to_uint8(x + 8 / 255, x, 8 / 255)[0].item()
        135
    """
    if adversarial.shape != clean.shape:
        raise ShapeError(f"adversarial has shape {tuple(adversarial.shape)}, wanted {tuple(clean.shape)}")
    if norm not in ("linf", "l2"):
        raise ConfigError(f"norm is {norm!r}, wanted 'linf' or 'l2'")
    check_range("eps", eps, 0.0, float("inf"))
    scaled, centre = 255 * adversarial.detach().double(), 255 * clean.detach().double()
    if norm == "l2":
        return _into_ball(scaled, centre, 255 * eps)
    low = (centre - 255 * eps).mul(1e9).round().div(1e9).ceil()
    high = (centre + 255 * eps).mul(1e9).round().div(1e9).floor()
    outside = low > high
    found = torch.minimum(torch.maximum(scaled.round(), low), high)
    found = torch.where(outside, centre.round(), found)
    return found.clamp(0, 255).to(torch.uint8), int(outside.sum())


def _into_ball(scaled: Tensor, centre: Tensor, radius: float) -> tuple[Tensor, int]:
    def length(images: Tensor) -> Tensor:
        return torch.linalg.vector_norm((images - centre).flatten(1), dim=1)

    nearest = scaled.round().clamp(0, 255)
    inside = length(nearest) <= radius * (1 + 1e-9)
    towards = torch.where(scaled > centre, scaled.add(1e-6).floor(), scaled.sub(1e-6).ceil())
    # No byte between the two: the one next to the clean value.
    crossed = (towards - centre) * (scaled - centre) < 0
    towards = torch.where(crossed, centre.round(), towards).clamp(0, 255)
    keep = inside.view(-1, 1, 1, 1)
    found = torch.where(keep, nearest, towards)
    late = (length(found) > radius * (1 + 1e-6)) & ~inside
    return found.to(torch.uint8), int((crossed & late.view(-1, 1, 1, 1)).sum())

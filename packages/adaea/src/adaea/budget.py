"""The norm ball: one step in it, the way back into it, and where an attack starts.

Source: spec of AdaEA (ICCV 2023), its official code for linf; l2 by analogy.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import ConfigError

Norm = Literal["linf", "l2"]
Images = Float[Tensor, "... batch channels height width"]
NORMS = ("linf", "l2")


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-3, -2, -1), keepdim=True)


def step(direction: Images, alpha: float, norm: Norm = "linf") -> Images:
    """The move of length ``alpha`` that a direction asks for.

    Args:
        direction: ``(..., batch, channels, height, width)`` gradient or momentum, ascent.
        alpha: step size; of every value for linf, of the whole image for l2.
        norm: ``"linf"``: alpha * sign; ``"l2"``: alpha * direction / its length.

    Returns:
        The move, in the shape of ``direction``; 0 where the direction is 0.

    Raises:
        ConfigError: another norm.

    Example:
        >>> step(torch.tensor([[[[3.0, 0.0, -4.0]]]]), 0.5, "l2").flatten().tolist()
        [0.30000001192092896, 0.0, -0.4000000059604645]
    """
    if norm == "linf":
        return alpha * direction.sign()
    if norm != "l2":
        raise ConfigError(f"norm is {norm!r}, wanted one of {list(NORMS)}")
    # Divided by its largest value first, so that the squares of a faint gradient do not vanish.
    largest = direction.detach().abs().amax((-3, -2, -1), keepdim=True)
    unit = direction / torch.where(largest == 0, torch.ones_like(largest), largest)
    length = _length(unit)
    return alpha * unit / torch.where(length == 0, torch.ones_like(length), length)


def project(
    images: Images,
    clean: Images,
    eps: float,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Images:
    """The nearest allowed images: in the ball of radius ``eps`` round the clean ones, and in the bounds.

    Args:
        images: ``(..., batch, channels, height, width)``.
        clean: the middle of the ball, of a shape that broadcasts.
        eps: its radius, >= 0.
        norm: ``"linf"`` or ``"l2"``.
        bounds: least and largest value of a pixel.

    Returns:
        ``clip(clean + change, *bounds)`` where the change is clipped per value (linf) or scaled (l2).

    Raises:
        ConfigError: another norm.

    Example:
        >>> clean = torch.full((1, 1, 1, 2), 0.5)
        >>> project(torch.tensor([[[[0.9, 0.52]]]]), clean, 0.25).flatten().tolist()
        [0.75, 0.5199999809265137]
    """
    change = images - clean
    if norm == "linf":
        change = change.clamp(-eps, eps)
    elif norm == "l2":
        length = _length(change)
        outside = length > eps
        change = torch.where(outside, change * (eps / torch.where(outside, length, 1.0)), change)
    else:
        raise ConfigError(f"norm is {norm!r}, wanted one of {list(NORMS)}")
    return (clean + change).clamp(*bounds)

"""The disparity-reduced filter: pixels where the surrogates' gradients point apart get no step.

Source: AdaEA (ICCV 2023), section on DRF. The official code leaves the last surrogate's row out of the sum,
so its map depends on the order of the models; ``form="official"`` reproduces that.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from adaea.losses import wide
from fusion_core.errors import ConfigError, ShapeError

Form = Literal["symmetric", "official"]
_LEAST = 1e-12
FORMS = ("symmetric", "official")
Gradients = Float[Tensor, "surrogates batch channels height width"]


def disparity_map(gradients: Gradients, form: Form = "symmetric") -> Float[Tensor, "batch 1 height width"]:
    """How far the surrogates agree at each pixel: the mean cosine between their gradients' channel vectors.

    In closed form, in time and memory linear in the surrogates: with unit vectors n_k and their sum T,
    ``(|T|^2 - sum |n_k|^2) / (K (K - 1))``. A gradient of 0 contributes a cosine of 0.

    Args:
        gradients: ``(surrogates, batch, channels, height, width)``; their lengths do not matter.
        form: ``"symmetric"``: the mean over all pairs; ``"official"``: without the last surrogate's row, as
            in the authors' code, so that identical gradients give (K-1)/K and the order matters.

    Returns:
        ``(batch, 1, height, width)`` in ``[-1/(K-1), 1]``, float32 or wider; 1 for a single surrogate.

    Raises:
        ShapeError: not five dimensions, or no surrogate.
        ConfigError: another form.

    Example:
        >>> same = torch.ones(3, 1, 3, 1, 1)
        >>> disparity_map(same).item(), round(disparity_map(same, "official").item(), 4)
        (1.0, 0.6667)
    """
    if gradients.dim() != 5 or gradients.shape[0] < 1:
        raise ShapeError(
            f"gradients have shape {tuple(gradients.shape)}, wanted (surrogates, batch, channels, height, "
            "width)"
        )
    if form not in FORMS:
        raise ConfigError(f"form is {form!r}, wanted one of {list(FORMS)}")
    count = gradients.shape[0]
    g = wide(gradients)
    if count == 1:
        return torch.ones_like(g[0, :, :1])
    total = torch.zeros_like(g[0])
    own = torch.zeros_like(g[0, :, :1])
    last: tuple[Tensor, Tensor] | None = None
    for gradient in g:
        # Faster than a vector norm over so few channels, and with a gradient of 0, not NaN, at 0.
        unit = gradient * gradient.square().sum(1, keepdim=True).clamp_min(_LEAST**2).rsqrt()
        square = unit.square().sum(1, keepdim=True)
        total, own, last = total + unit, own + square, (unit, square)
    assert last is not None
    if form == "symmetric":
        rows = total.square().sum(1, keepdim=True) - own
    else:
        rows = ((total - last[0]) * total).sum(1, keepdim=True) - (own - last[1])
    return rows / (count * (count - 1))


def disparity_filter(
    gradients: Gradients, threshold: float = -0.3, form: Form = "symmetric"
) -> Bool[Tensor, "batch 1 height width"]:
    """The pixels that keep their gradient: those whose :func:`disparity_map` reaches the threshold.

    Args:
        gradients: ``(surrogates, batch, channels, height, width)``.
        threshold: the paper's eta; at or below :func:`filter_bound` nothing is ever filtered.
        form: as in :func:`disparity_map`.

    Returns:
        bool ``(batch, 1, height, width)``, True = kept.

    Raises:
        ShapeError: not five dimensions.
        ConfigError: another form.

    Example:
        >>> apart = torch.stack([torch.ones(1, 3, 1, 1), -torch.ones(1, 3, 1, 1)])
        >>> disparity_filter(apart).item()
        False
    """
    return disparity_map(gradients, form) >= threshold


def filter_bound(surrogates: int, form: Form = "symmetric") -> float:
    """The least value that the map can take; a threshold at or below it filters nothing.

    Args:
        surrogates: how many, >= 2.
        form: as in :func:`disparity_map`.

    Raises:
        ConfigError: fewer than two surrogates, or another form.

    Example:
        >>> filter_bound(5), filter_bound(5, "official")
        (-0.25, -0.2125)
    """
    if surrogates < 2 or form not in FORMS:
        raise ConfigError(
            f"surrogates is {surrogates} and form {form!r}, wanted >= 2 and one of {list(FORMS)}"
        )
    if form == "symmetric":
        return -1.0 / (surrogates - 1)
    return -0.5 if surrogates == 2 else -(surrogates - 0.75) / (surrogates * (surrogates - 1))

"""From a gradient to the direction of a step: momentum, looking ahead, variance.

Sources: MI, Dong et al. 2018; NI, Lin et al. 2020; VMI, Wang and He 2021. Unlike in the official code an
image whose gradient is 0 everywhere adds 0 to its momentum instead of NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import check_range

Images = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True, slots=True)
class Momentum:
    """MI: ``m = G / mean|G| + mu m``, the mean over each image.

    Attributes:
        mu: decay, >= 0; 0.9 in the official code, 1.0 in the literature.

    Raises:
        ConfigError: negative.
    """

    mu: float = 0.9

    def __post_init__(self) -> None:
        check_range("Momentum mu", self.mu, 0.0, float("inf"))


@dataclass(frozen=True, slots=True)
class Nesterov:
    """NI: gradients are taken ``alpha mu m`` ahead of the iterate, then as :class:`Momentum`.

    Attributes:
        mu: decay, >= 0.

    Raises:
        ConfigError: negative.
    """

    mu: float = 1.0

    def __post_init__(self) -> None:
        check_range("Nesterov mu", self.mu, 0.0, float("inf"))


@dataclass(frozen=True, slots=True)
class Variance:
    """VMI's variance term: how the gradient differs in the neighbourhood, carried to the next step.

    Attributes:
        neighbours: random points per step, >= 1.
        radius: of the neighbourhood in units of eps, > 0.

    Raises:
        ConfigError: out of these ranges.
    """

    neighbours: int = 20
    radius: float = 1.5

    def __post_init__(self) -> None:
        check_range("Variance neighbours", self.neighbours, 1, float("inf"))
        check_range("Variance radius", self.radius, 0.0, float("inf"), open=True)


def accumulate(gradient: Images, momentum: Images, mu: float) -> Images:
    """One update of the momentum, ``G / mean|G| + mu m``.

    Args:
        gradient: ``(batch, channels, height, width)``.
        momentum: that of the step before.
        mu: decay.

    Returns:
        The new momentum; an image whose gradient is 0 everywhere has ``mu m``.

    Example:
        >>> accumulate(torch.tensor([[[[1.0, -3.0]]], [[[0.0, 0.0]]]]), torch.ones(2, 1, 1, 2), 0.5).flatten()
        tensor([ 1.0000, -1.0000,  0.5000,  0.5000])
    """
    mean = gradient.abs().mean((-3, -2, -1), keepdim=True)
    return gradient / torch.where(mean == 0, torch.ones_like(mean), mean) + mu * momentum

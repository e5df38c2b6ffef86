"""Fusion of the two cue depths by their uncertainties (section 2.4, Eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import ConfigError

__all__ = ["FUSIONS", "Fused", "Fusion", "focal_weight", "fuse"]

Fusion = Literal["scale", "variance", "mean", "select", "focal", "vertical"]
_MIRRORED: dict[Fusion, Fusion] = {"focal": "vertical", "vertical": "focal"}
FUSIONS = ("scale", "variance", "mean", "select", "focal", "vertical")


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """Fused depth and what is known of its error, all of one shape.

    Attributes:
        depth: metres.
        weight_focal: share of the focal cue, in [0, 1].
        uncertainty: of the rule itself, metres.
        disagreement: ``|depth_focal - depth_vertical|``, metres.
        total: mean of the cues' uncertainties plus ``2 w (1 - w) disagreement``, metres; it grows where the
            cues contradict each other.
    """

    depth: Float[Tensor, "..."]
    weight_focal: Float[Tensor, "..."]
    uncertainty: Float[Tensor, "..."]
    disagreement: Float[Tensor, "..."]
    total: Float[Tensor, "..."]


def focal_weight(
    log_uncertainty_focal: Float[Tensor, "..."],
    log_uncertainty_vertical: Float[Tensor, "..."],
    fusion: Fusion = "scale",
) -> Float[Tensor, "..."]:
    """Share of the focal cue under a fusion rule, in float32 or wider; never overflows.

    Raises:
        ConfigError: unknown rule.
    """
    focal, vertical = _wide(log_uncertainty_focal), _wide(log_uncertainty_vertical)
    match fusion:
        case "scale":
            return (vertical - focal).sigmoid()
        case "variance":
            return (2.0 * (vertical - focal)).sigmoid()
        case "select":
            return 0.5 * (1.0 + (vertical - focal).sign())
        case "mean":
            return torch.full_like(focal, 0.5)
        case "focal":
            return torch.ones_like(focal)
        case "vertical":
            return torch.zeros_like(focal)
        case _:  # pyright: ignore[reportUnnecessaryComparison]
            raise ConfigError(f"fusion is {fusion!r}, wanted one of {', '.join(FUSIONS)}")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fuse(
    depth_focal: Float[Tensor, "..."],
    depth_vertical: Float[Tensor, "..."],
    log_uncertainty_focal: Float[Tensor, "..."],
    log_uncertainty_vertical: Float[Tensor, "..."],
    *,
    fusion: Fusion = "scale",
) -> Fused:
    """Fuse the two depths: ``D = w D_F + (1 - w) D_Y`` with ``w = sigmoid(s_Y - s_F)`` by default (Eq. 4).

    Args:
        depth_focal: D_F, metres, any shape.
        depth_vertical: D_Y, metres.
        log_uncertainty_focal: s_F; the uncertainty exp(s_F) is the scale of a Laplace density, metres.
        log_uncertainty_vertical: s_Y.
        fusion: ``"scale"`` (the paper's weights 1/uncertainty), ``"variance"`` (1/uncertainty^2, least
            variance), ``"mean"``, ``"select"`` (the surer cue; the mean of equals), ``"focal"``,
            ``"vertical"``.

    Returns:
        Depth, weight and uncertainties, in float32 or wider.

    Raises:
        ConfigError: unknown rule.

    Example:
        >>> one, two = torch.tensor(10.0), torch.tensor(20.0)
        >>> fuse(one, two, torch.tensor(0.0), torch.tensor(0.0)).depth
        tensor(15.)
    """
    s_focal, s_vertical = _wide(log_uncertainty_focal), _wide(log_uncertainty_vertical)
    d_focal, d_vertical = _wide(depth_focal), _wide(depth_vertical)
    focal = focal_weight(s_focal, s_vertical, fusion)
    # Not 1 - focal, which has no digits left where the focal cue has nearly all weight.
    vertical = focal_weight(s_vertical, s_focal, _MIRRORED.get(fusion, fusion))
    depth = torch.lerp(d_vertical, d_focal, focal.to(d_focal.dtype))
    disagreement = (d_focal - d_vertical).abs()
    # With a, b = 1/uncertainties; in logarithms, so that nothing overflows before it is divided.
    if fusion == "scale":  # 1/(a + b); each cue's weighted uncertainty is the same
        uncertainty = (-log_sum(-s_focal, -s_vertical)).exp()
        mean = 2.0 * uncertainty
    elif fusion == "variance":  # 1/sqrt(a^2 + b^2) and (a + b)/(a^2 + b^2)
        squares = log_sum(-2.0 * s_focal, -2.0 * s_vertical)
        uncertainty = (-0.5 * squares).exp()
        mean = (log_sum(-s_focal, -s_vertical) - squares).exp()
    else:
        uncertainty = mean = _share(focal, s_focal) + _share(vertical, s_vertical)
    return Fused(depth, focal, uncertainty, disagreement, mean + 2.0 * focal * vertical * disagreement)


def log_sum(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``log(exp(a) + exp(b))``: torch.logaddexp in operations that ONNX has."""
    return torch.maximum(a, b) + torch.log1p((-(a - b).abs()).exp())


def _share(weight: Tensor, log_uncertainty: Tensor) -> Tensor:
    return torch.where(weight > 0, weight * log_uncertainty.exp(), torch.zeros_like(weight))

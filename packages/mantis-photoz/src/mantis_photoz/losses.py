"""Training losses of density networks (section 2.5): classifiers, mixtures and quantiles.

Classifier losses take logits (batch, bins), the edges of the bins and redshifts; each is the mean over the
batch. :func:`classifier_loss` picks one by name.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import check_range, check_shape
from mantis_photoz import density
from mantis_photoz.errors import ConfigError
from mantis_photoz.grid import bin_widths, nearest_node

__all__ = [
    "classifier_loss",
    "cross_entropy",
    "mixture_loss",
    "mixture_pmf",
    "ordinal_targets",
    "pinball_loss",
    "quantile_pmf",
    "quantiles_from",
]

LossName = Literal["ce", "crps", "cde", "ordinal-soft"]
_LEAST_SIGMA = 1e-4


def cross_entropy(
    logits: Float[Tensor, "batch bins"], z: Float[Tensor, " batch"], nodes: Float[Tensor, " bins"]
) -> Float[Tensor, ""]:
    """The paper's loss: cross-entropy with the class of the nearest node.

    The authors apply ``log_softmax`` twice, which changes nothing.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([0.3]), torch.arange(4.0))  # ln 4
        tensor(1.3863)
    """
    return F.cross_entropy(logits, nearest_node(z, nodes))


def ordinal_targets(
    z: Float[Tensor, " batch"], edges: Float[Tensor, " edges"], spread: float
) -> Float[Tensor, "batch bins"]:
    """Soft targets: a Gaussian of width ``spread (1 + z)`` integrated over each bin, normalised.

    Args:
        z: (batch,) redshifts.
        edges: (bins + 1,).
        spread: s > 0; towards 0 the target is the bin that holds z.

    Returns:
        (batch, bins) masses that sum to 1.
    """
    check_range("spread", spread, 0.0, math.inf, open=True)
    center = z.clamp(edges[0], edges[-1])[:, None]
    scaled = (edges - center) / (spread * (1 + center)) / math.sqrt(2)
    # Differences of erfc on the side where they do not cancel.
    mass = torch.where(
        scaled[:, 1:] < 0,
        torch.erfc(-scaled[:, 1:]) - torch.erfc(-scaled[:, :-1]),
        torch.erfc(scaled[:, :-1]) - torch.erfc(scaled[:, 1:]),
    )
    return mass / mass.sum(-1, keepdim=True)


def classifier_loss(
    logits: Float[Tensor, "batch bins"],
    z: Float[Tensor, " batch"],
    edges: Float[Tensor, " edges"],
    nodes: Float[Tensor, " bins"],
    *,
    loss: LossName = "ce",
    spread: float = 0.0,
) -> Float[Tensor, ""]:
    """One of the losses of a binned density.

    Args:
        logits: (batch, bins), any float dtype; the loss is computed in float32 or wider.
        z: (batch,) redshifts.
        edges: (bins + 1,).
        nodes: (bins,).
        loss: ``"ce"``; ``"crps"``, closed form; ``"cde"``, bin-exact; ``"ordinal-soft"`` = cross-entropy with
            :func:`ordinal_targets`.
        spread: of ``"ordinal-soft"``; 0 is ``"ce"``.

    Raises:
        ConfigError: an unknown loss.
        ShapeError: bins and logits do not fit.
    """
    check_shape("logits", logits, "batch bins", batch=len(z), bins=len(nodes))
    check_shape("edges", edges, "edges", edges=len(nodes) + 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    edges, nodes, z = edges.to(logits), nodes.to(logits), z.to(logits)
    if loss == "ce" or (loss == "ordinal-soft" and spread == 0):
        return cross_entropy(logits, z, nodes)
    if loss == "crps":
        return density.crps(edges, logits.softmax(-1), z).mean()
    if loss == "cde":
        return density.cde_loss(edges, logits.softmax(-1), z).mean()
    if loss == "ordinal-soft":
        return F.cross_entropy(logits, ordinal_targets(z, edges, spread))
    raise ConfigError(f"loss is {loss!r}, wanted 'ce', 'crps', 'cde' or 'ordinal-soft'")


def _mixture(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if outputs.shape[-1] % 3:
        raise ConfigError(f"outputs has {outputs.shape[-1]} numbers per object, wanted 3 per component")
    weights, mean, raw = outputs.chunk(3, dim=-1)
    return weights.log_softmax(-1), mean, F.softplus(raw) + _LEAST_SIGMA


def mixture_loss(outputs: Float[Tensor, "batch outputs"], z: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Negative log-likelihood of a mixture of Gaussians (head ``mdn``).

    Args:
        outputs: (batch, 3 components): logits of the weights, means, widths before softplus.
        z: (batch,) redshifts.
    """
    weights, mean, sigma = _mixture(outputs)
    away = (z[:, None] - mean) / sigma
    logs = -0.5 * away.square() - sigma.log() - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(weights + logs, -1).mean()


def mixture_pmf(
    outputs: Float[Tensor, "batch outputs"], edges: Float[Tensor, " edges"]
) -> Float[Tensor, "batch bins"]:
    """The mixture's masses in bins, cut to their support and normalised, float64."""
    weights, mean, sigma = (part.double()[..., None] for part in _mixture(outputs))
    steps = torch.special.ndtr((edges.double() - mean) / sigma)
    mass = (weights.exp() * steps.diff(dim=-1)).sum(-2) + 1e-30
    return mass / mass.sum(-1, keepdim=True)


def quantiles_from(
    outputs: Float[Tensor, "batch levels"], z_max: float = 1.6
) -> Float[Tensor, "batch levels"]:
    """Quantiles in (0, z_max) that cannot cross: running sums of positive steps (head ``quantile``).

    Args:
        outputs: (batch, levels) of the network; one more step, of size 1 before normalisation, is the rest.
        z_max: the end of the scale.
    """
    steps = F.softplus(outputs)
    total = steps.cumsum(-1)
    return z_max * total / (total[:, -1:] + 1)


def pinball_loss(
    quantiles: Float[Tensor, "batch levels"], z: Float[Tensor, " batch"], levels: Float[Tensor, " levels"]
) -> Float[Tensor, ""]:
    """Quantile loss: ``max(q (z - x), (q - 1)(z - x))``, the mean over levels and objects.

    Example:
        >>> pinball_loss(torch.zeros(1, 1), torch.ones(1), torch.tensor([0.9]))
        tensor(0.9000)
    """
    away = z[:, None] - quantiles
    return torch.maximum(levels.to(away) * away, (levels.to(away) - 1) * away).mean()


def quantile_pmf(
    quantiles: Float[Tensor, "batch levels"],
    levels: Float[Tensor, " levels"],
    edges: Float[Tensor, " edges"],
) -> Float[Tensor, "batch bins"]:
    """Masses in bins of the CDF that is linear between quantiles and reaches 0 and 1 at the outer edges."""
    from mantis_photoz.arrays import interpolate

    ends = edges.double()
    inner = quantiles.double().clamp(ends[0], ends[-1])
    knots = torch.cat([ends[:1].expand(len(inner), 1), inner, ends[-1:].expand(len(inner), 1)], -1)
    heights = torch.cat([levels.new_zeros(1), levels, levels.new_ones(1)]).double().to(knots.device)
    mass = interpolate(ends.expand(len(inner), -1), knots, heights.expand_as(knots)).diff(dim=-1)
    # Quantiles on the outer edges leave a step there, which the interpolation cannot see.
    mass = mass + (1 - mass.sum(-1, keepdim=True)).clamp(min=0.0) * bin_widths(ends) / (ends[-1] - ends[0])
    return mass / mass.sum(-1, keepdim=True)

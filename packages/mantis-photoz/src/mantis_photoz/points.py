"""Point estimates and shape summaries of a density (section 2.7), batched."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mantis_photoz import density
from mantis_photoz.grid import bin_widths

__all__ = [
    "entropy",
    "lorentzian_best",
    "mean",
    "mode",
    "odds",
    "outlier_probability",
    "peaks",
    "variance",
]


def midpoints(edges: Float[Tensor, " edges"]) -> Float[Tensor, " bins"]:
    """Centres of the bins."""
    return (edges[1:] + edges[:-1]) / 2


def mean(places: Float[Tensor, " bins"], pmf: Float[Tensor, "... bins"]) -> Float[Tensor, "..."]:
    """``sum_k p_k x_k`` over midpoints, or over nodes as the authors do."""
    return pmf @ places


def variance(
    edges: Float[Tensor, " edges"], pmf: Float[Tensor, "... bins"], nodes: Tensor | None = None
) -> Float[Tensor, "..."]:
    """Variance of the piecewise-constant density, ``sum p_k (m_k^2 + w_k^2 / 12) - mean^2``.

    Args:
        edges: (bins + 1,).
        pmf: (..., bins).
        nodes: (bins,) the masses sit there instead (official), without the width of the bins.

    Returns:
        (...), >= 0.
    """
    places = midpoints(edges) if nodes is None else nodes
    inner = bin_widths(edges).square() / 12 if nodes is None else torch.zeros_like(places)
    # About the mean, not as a difference of large squares: narrow densities keep their digits.
    away = places - mean(places, pmf)[..., None]
    return (pmf * (away.square() + inner)).sum(-1)


def mode(nodes: Float[Tensor, " bins"], height: Float[Tensor, "... bins"]) -> Float[Tensor, "..."]:
    """The node of the largest height (density, or mass for the authors' mode), the first on ties."""
    return nodes[_first_argmax(height)]


def _first_argmax(height: Tensor) -> Int64[Tensor, "..."]:
    top = height == height.max(dim=-1, keepdim=True).values
    return top.to(torch.uint8).argmax(dim=-1)


def odds(
    edges: Tensor, pmf: Float[Tensor, "... bins"], center: Float[Tensor, "..."], width: float = 0.06
) -> Float[Tensor, "..."]:
    """Mass within ``width (1 + z)`` of ``center``."""
    reach = width * (1 + center)
    ends = density.cdf(edges, pmf, torch.stack([center - reach, center + reach], -1))
    return ends[..., 1] - ends[..., 0]


def outlier_probability(
    edges: Tensor, pmf: Float[Tensor, "... bins"], center: Float[Tensor, "..."], width: float = 0.15
) -> Float[Tensor, "..."]:
    """Mass further than ``width (1 + z)`` from ``center``."""
    return (1 - odds(edges, pmf, center, width)).clamp(0, 1)


def lorentzian_best(
    nodes: Float[Tensor, " bins"],
    places: Float[Tensor, " bins"],
    pmf: Float[Tensor, "... bins"],
    width: float = 0.15,
) -> Float[Tensor, "..."]:
    """The node of least expected loss ``1 - 1 / (1 + (x / width)^2)`` of x = (z - m_k) / (1 + m_k).

    After Tanaka et al. 2018; one matrix product for all objects.

    Args:
        nodes: (bins,) candidates.
        places: (bins,) where the masses are (midpoints).
        pmf: (..., bins).
        width: of the loss.
    """
    scaled = (nodes - places[:, None]) / (1 + places[:, None]) / width
    gain = 1 / (1 + scaled.square())
    return nodes[_first_argmax((pmf @ gain).round(decimals=14))]


def peaks(
    edges: Tensor, pmf: Float[Tensor, "... bins"], floor: float = 0.1, least: float = 0.05
) -> Int64[Tensor, "..."]:
    """How many runs of bins with density above ``floor`` times the largest hold more than ``least`` mass.

    Example:
        >>> peaks(torch.arange(6.0), torch.tensor([[0.4, 0.1, 0.0, 0.1, 0.4]]))
        tensor([2])
    """
    height = pmf / bin_widths(edges)
    high = height > floor * height.max(dim=-1, keepdim=True).values
    starts = high & ~torch.nn.functional.pad(high, (1, 0))[..., :-1]
    run = starts.long().cumsum(-1)  # 0 before the first run
    mass = torch.zeros(*pmf.shape[:-1], pmf.shape[-1] + 1, dtype=pmf.dtype, device=pmf.device)
    mass = mass.scatter_add(-1, run, pmf.masked_fill(~high, 0.0))
    return (mass > least).sum(-1)


def entropy(pmf: Float[Tensor, "... bins"]) -> Float[Tensor, "..."]:
    """Entropy of the masses in nats."""
    return -torch.xlogy(pmf, pmf).sum(-1)

"""Piecewise-constant densities as pure functions of edges and masses (sections 2.5, 2.7, 2.8).

``edges`` is (bins + 1,), ``pmf`` (..., bins): the density is ``p_k / w_k`` inside bin k and the CDF is linear
there. Every summary and every score of the package comes from this one CDF. All functions are batched and
differentiable in the masses (and in redshifts where the CDF is).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mantis_photoz.grid import bin_widths

__all__ = [
    "cde_loss",
    "cdf",
    "cdf_at_edges",
    "crps",
    "density_at",
    "hpd_interval",
    "hpd_level",
    "log_density",
    "pmf_from_logits",
    "ppf",
    "rebin",
]


def pmf_from_logits(
    logits: Float[Tensor, "... bins"], widths: Float[Tensor, " bins"] | None = None
) -> tuple[Float[Tensor, "... bins"], Bool[Tensor, "..."]]:
    """Softmax in float64; a row with a non-finite logit becomes the uniform density and is reported.

    Args:
        logits: (..., bins) any float dtype.
        widths: (bins,) of the bins, for the uniform density; equal by default.

    Returns:
        masses that sum to 1 in float64, and which rows failed.

    Example:
        >>> pmf, failed = pmf_from_logits(torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))
        >>> pmf.tolist(), failed.tolist()
        ([[0.5, 0.5], [0.5, 0.5]], [False, True])
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    failed = ~torch.isfinite(logits).all(dim=-1)
    pmf = logits.masked_fill(failed[..., None], 0.0).to(dtype).softmax(-1)
    flat = torch.ones(logits.shape[-1]) if widths is None else widths
    flat = flat.to(pmf) / flat.to(pmf).sum()
    return torch.where(failed[..., None], flat, pmf), failed


def cdf_at_edges(pmf: Float[Tensor, "... bins"]) -> Float[Tensor, "... edges"]:
    """The CDF at the edges: 0, p_0, p_0 + p_1, ..., exactly 1."""
    total = pmf.cumsum(-1)
    total = total / total[..., -1:]
    return torch.cat([torch.zeros_like(total[..., :1]), total], dim=-1)


def _bin_of(edges: Tensor, z: Tensor) -> Int64[Tensor, "..."]:
    """The bin that holds z, the right one on an edge; outside redshifts get the end bins."""
    found = torch.searchsorted(edges, z.detach().contiguous(), right=True) - 1
    return found.clamp(0, len(edges) - 2)


def _per_object(pmf: Tensor, z: Tensor) -> tuple[Tensor, bool]:
    """Redshifts as (..., n) beside masses (..., bins), and whether the last dimension was added."""
    single = z.ndim < pmf.ndim
    z = z[..., None] if single else z
    return z.expand(*torch.broadcast_shapes(pmf.shape[:-1], z.shape[:-1]), z.shape[-1]), single


def cdf(
    edges: Float[Tensor, " edges"], pmf: Float[Tensor, "... bins"], z: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Cumulative probability at redshifts: 0 below the support, 1 above.

    Args:
        edges: (bins + 1,) increasing.
        pmf: (..., bins).
        z: (...) one redshift per object, or (..., n) several.

    Returns:
        the shape of ``z``.

    Example:
        >>> cdf(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 2.0, 9.0]]))
        tensor([[0.2500, 0.7500, 1.0000]])
    """
    z, single = _per_object(pmf, z)
    steps = cdf_at_edges(pmf).expand(*z.shape[:-1], len(edges))
    where = _bin_of(edges, z)
    low = steps.gather(-1, where)
    share = ((z - edges[where]) / bin_widths(edges)[where]).clamp(0, 1)
    found = low + share * (steps.gather(-1, where + 1) - low)
    return found[..., 0] if single else found


def ppf(
    edges: Float[Tensor, " edges"], pmf: Float[Tensor, "... bins"], levels: Float[Tensor, "... levels"]
) -> Float[Tensor, "... levels"]:
    """Quantiles: the smallest z whose CDF reaches the level (the left edge where the CDF is flat).

    Args:
        edges: (bins + 1,).
        pmf: (..., bins).
        levels: (levels,) shared, or (..., levels) per object, in [0, 1].

    Example:
        >>> ppf(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([[0.5, 0.5]]), torch.tensor([0.25, 0.5, 1.0]))
        tensor([[0.5000, 1.0000, 3.0000]])
    """
    steps = cdf_at_edges(pmf)
    levels = levels.to(steps).expand(*steps.shape[:-1], levels.shape[-1]).contiguous()
    right = torch.searchsorted(steps.detach().contiguous(), levels.detach()).clamp(1, len(edges) - 1)
    low, high = steps.gather(-1, right - 1), steps.gather(-1, right)
    rise = high - low
    share = (levels - low) / torch.where(rise > 0, rise, torch.ones_like(rise))
    share = share.masked_fill(rise <= 0, 0.0).clamp(0, 1)
    return edges[right - 1] + share * bin_widths(edges)[right - 1]


def density_at(
    edges: Tensor, pmf: Float[Tensor, "... bins"], z: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """The density at redshifts, 0 outside the support; shapes as :func:`cdf`."""
    z, single = _per_object(pmf, z)
    where = _bin_of(edges, z)
    values = (pmf / bin_widths(edges)).expand(*z.shape[:-1], pmf.shape[-1])
    outside = (z < edges[0]) | (z > edges[-1])
    found = values.gather(-1, where).masked_fill(outside, 0.0)
    return found[..., 0] if single else found


def log_density(
    edges: Tensor, pmf: Float[Tensor, "... bins"], z: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Log-density of the bin that holds the redshift (the end bins' for redshifts outside the support)."""
    return density_at(edges, pmf, z.clamp(edges[0], edges[-1])).log()


def crps(edges: Tensor, pmf: Float[Tensor, "... bins"], z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    r"""Continuous ranked probability score in closed form: :math:`\int (F(x) - 1[x \ge z])^2 dx`.

    A bin of width h with end values a, b gives ``h (a^2 + a b + b^2) / 3`` left of z, the same of 1 - a and
    1 - b right of it; the bin with z is split; outside the support the distance to it is added.

    Args:
        edges: (bins + 1,).
        pmf: (..., bins).
        z: (...) one redshift per object.

    Returns:
        (...) in units of redshift, >= 0.

    Example:
        >>> crps(torch.tensor([0.0, 1.0]), torch.tensor([[1.0]]), torch.tensor([0.5]))
        tensor([0.0833])
    """
    steps = cdf_at_edges(pmf)
    inside = z.clamp(edges[0], edges[-1])
    where = _bin_of(edges, inside)
    low, high, width = steps[..., :-1], steps[..., 1:], bin_widths(edges)
    left_of = torch.arange(pmf.shape[-1], device=pmf.device) < where[..., None]
    a = torch.where(left_of, low, 1 - high)
    b = torch.where(left_of, high, 1 - low)
    whole = width * (a * a + a * b + b * b) / 3
    at = where[..., None]
    whole = whole.scatter(-1, at, 0.0)
    start, stop = low.gather(-1, at)[..., 0], high.gather(-1, at)[..., 0]
    step = width[where]
    share = (inside - edges[where]) / step
    middle = start + share * (stop - start)
    before = step * share * (start * start + start * middle + middle * middle) / 3
    c, d = 1 - middle, 1 - stop
    after = step * (1 - share) * (c * c + c * d + d * d) / 3
    return whole.sum(-1) + before + after + (z - inside).abs()


def cde_loss(edges: Tensor, pmf: Float[Tensor, "... bins"], z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Conditional density loss per object, bin-exact: ``sum_k p_k^2 / w_k - 2 f(z)``; lower is better.

    Example:
        >>> cde_loss(torch.tensor([0.0, 0.5]), torch.tensor([[1.0]]), torch.tensor([0.1]))
        tensor([-2.])
    """
    return (pmf.square() / bin_widths(edges)).sum(-1) - 2 * density_at(edges, pmf, z)


def rebin(edges: Tensor, pmf: Float[Tensor, "... bins"], new_edges: Tensor) -> Float[Tensor, "... new"]:
    """Masses in other bins: differences of the CDF at their edges."""
    return cdf(edges, pmf, new_edges.expand(*pmf.shape[:-1], len(new_edges))).diff(dim=-1)


def hpd_level(edges: Tensor, pmf: Float[Tensor, "... bins"], z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Mass of the smallest highest-density region that holds z (ties count half); 1 outside the support."""
    density = pmf / bin_widths(edges)
    here = density_at(edges, pmf, z)[..., None]
    above = torch.where(density > here, pmf, 0.0).sum(-1)
    equal = torch.where(density == here, pmf, 0.0).sum(-1)
    outside = (z < edges[0]) | (z > edges[-1])
    return (above + equal / 2).masked_fill(outside, 1.0)


def hpd_interval(
    edges: Tensor, pmf: Float[Tensor, "... bins"], level: float
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The shortest interval that holds a mass; one of its ends is an edge, so all of those are tried.

    Args:
        edges: (bins + 1,).
        pmf: (..., bins).
        level: mass in (0, 1).

    Returns:
        lower and upper ends, each (...).

    Example:
        >>> low, high = hpd_interval(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[0.2, 0.8]]), 0.8)
        >>> low.item(), high.item()
        (1.0, 2.0)
    """
    steps = cdf_at_edges(pmf)
    slack = 1e-12
    starts, stops = edges.expand_as(steps), edges.expand_as(steps)
    ends = ppf(edges, pmf, (steps + level).clamp(max=1.0))
    begins = ppf(edges, pmf, (steps - level).clamp(min=0.0))
    low = torch.cat([starts, begins], -1)
    high = torch.cat([ends, stops], -1)
    fits = torch.cat([steps + level <= 1 + slack, steps - level >= -slack], -1)
    best = (high - low).masked_fill(~fits, torch.inf).argmin(-1, keepdim=True)
    return low.gather(-1, best)[..., 0], high.gather(-1, best)[..., 0]

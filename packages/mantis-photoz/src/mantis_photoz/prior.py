"""Priors over redshift (section 2.8): exchange the training prior, estimate the target's, stack n(z)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_core.errors import check_range
from fusion_core.seeding import generator as seeded
from mantis_photoz.arrays import Array, as_tensor, quantile, to_numpy, wide
from mantis_photoz.errors import DensityError
from mantis_photoz.pdf import BinnedPDF

__all__ = ["RedshiftDistribution", "counts_prior", "estimate_prior", "reweight", "stack"]


def _prior(values: Array, bins: int, name: str, device: Any) -> Tensor:
    found = wide(as_tensor(values, name)).to(device)
    fine = found.shape == (bins,) and bool((torch.isfinite(found) & (found >= 0)).all())
    if not fine or not bool(found.sum() > 0):
        raise DensityError(f"{name} has shape {tuple(found.shape)}, wanted ({bins},) finite numbers >= 0")
    return found / found.sum()


def counts_prior(z: Array, edges: Array, *, smoothing: float = 1.0) -> Tensor:
    """Masses of a catalogue's redshifts in bins.

    Args:
        z: (n,) redshifts; those outside the bins are left out.
        edges: (bins + 1,).
        smoothing: objects added to each bin, so that none is impossible.

    Returns:
        (bins,) float64 masses that sum to 1.
    """
    check_range("smoothing", smoothing, 0.0, 1e12)
    limits, values = wide(as_tensor(edges)).cpu(), wide(as_tensor(z)).cpu()
    inside = values[(values >= limits[0]) & (values <= limits[-1])]
    bins = (torch.searchsorted(limits, inside, right=True) - 1).clamp(0, len(limits) - 2)
    count = torch.bincount(bins, minlength=len(limits) - 1).double() + smoothing
    if not bool(count.sum() > 0):
        raise DensityError("z has no redshift inside the edges, wanted one, or smoothing > 0")
    return count / count.sum()


def reweight(pdf: BinnedPDF, target: Array, train: Array) -> BinnedPDF:
    """Importance weights: ``p'_k ~ p_k target_k / train_k``. Twice is once with the product.

    Args:
        pdf: densities that carry the training prior (the balanced sampler's is about flat).
        target: (bins,) prior that they should carry, any scale.
        train: (bins,) prior that they carry; where both are 0 the masses stay.

    Raises:
        DensityError: a prior does not fit, or an object has no mass where the target allows any.
    """
    pmf = as_tensor(pdf.pmf)
    new = _prior(target, pdf.bins, "target", pmf.device)
    old = _prior(train, pdf.bins, "train", pmf.device)
    both = (new == 0) & (old == 0)
    if bool(((old == 0) & (new > 0)).any()):
        raise DensityError(
            "train is 0 where target is not, wanted a training prior above 0 there (smooth it)"
        )
    ratio = torch.where(both, torch.ones_like(new), new / old.clamp(min=1e-300))
    made = pmf * ratio
    total = made.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        bad = int((total[:, 0] <= 0).sum())
        raise DensityError(f"target excludes all mass of {bad} objects, wanted a prior above 0 there")
    made = made / total
    return BinnedPDF(pdf.edges, made if pdf.is_torch else to_numpy(made), pdf.nodes)


def estimate_prior(
    pdf: BinnedPDF, train: Array | None = None, *, iterations: int = 200, tolerance: float = 1e-7
) -> Any:
    """The sample's own n(z) by expectation-maximisation (Saerens et al. 2002), without labels.

    Args:
        pdf: densities with the training prior.
        train: (bins,) that prior; flat by default.
        iterations: at most.
        tolerance: largest change of a mass that ends it.

    Returns:
        (bins,) masses, the kind of ``pdf``. Noise grows with iterations: stop early for few objects.
    """
    check_range("iterations", iterations, 1, 1_000_000)
    pmf = as_tensor(pdf.pmf).detach()
    if not len(pmf):
        raise DensityError("there are no densities to estimate a prior from")
    widths = wide(as_tensor(pdf.edges)).diff().to(pmf.device)
    old = widths / widths.sum() if train is None else _prior(train, pdf.bins, "train", pmf.device)
    likelihood = pmf / old.clamp(min=1e-300)
    prior = old
    for _ in range(iterations):
        posterior = likelihood * prior
        new = (posterior / posterior.sum(-1, keepdim=True).clamp(min=1e-300)).mean(0)
        change = float((new - prior).abs().max())
        prior = new
        if change <= tolerance:
            break
    return prior if pdf.is_torch else to_numpy(prior)


@dataclass(frozen=True, slots=True)
class RedshiftDistribution:
    """The n(z) of a sample.

    Args:
        edges: (bins + 1,).
        density: (bins,) mean of the densities.
        low: (bins,) 16th percentile over resampled objects.
        high: (bins,) 84th percentile.
        mean_redshift: of the stack, with its bootstrap standard error.
        mean_error: see there.
    """

    edges: Any
    density: Any
    low: Any
    high: Any
    mean_redshift: float
    mean_error: float


def stack(pdf: BinnedPDF, *, resamples: int = 200, seed: int = 0) -> RedshiftDistribution:
    """The mean of the densities, with bootstrap errors over objects.

    Args:
        pdf: of the sample.
        resamples: how many; one matrix product for all.
        seed: of the draws.
    """
    check_range("resamples", resamples, 2, 100_000)
    pmf = as_tensor(pdf.pmf).detach()
    count = len(pmf)
    if not count:
        raise DensityError("there are no densities to stack")
    edges = wide(as_tensor(pdf.edges)).to(pmf.device)
    draw = seeded(seed, "stack")
    share = torch.zeros(resamples, count, dtype=pmf.dtype)
    rows = torch.randint(count, (resamples, count), generator=draw)
    share.scatter_add_(1, rows, torch.full(rows.shape, 1 / count, dtype=pmf.dtype))
    drawn = share.to(pmf.device) @ pmf / edges.diff()
    spread = quantile(drawn.T, torch.tensor([0.16, 0.84]))
    center = (edges[1:] + edges[:-1]) / 2
    means = (drawn * edges.diff()) @ center
    parts = (edges, pmf.mean(0) / edges.diff(), spread[:, 0], spread[:, 1])
    limits, height, low, high = parts if pdf.is_torch else (to_numpy(part) for part in parts)
    return RedshiftDistribution(limits, height, low, high, float(pmf.mean(0) @ center), float(means.std()))

"""Scores of redshift estimates (section 2.8): point metrics, PIT tests, CRPS, density loss, coverage.

Pure functions; arrays in, arrays (or floats) out, tensors in, tensors out. Residuals are
``r = (z_hat - z) / (1 + z)``. Functions of residuals reduce the last dimension, so that they are batched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_core.errors import FusionWarning, check_range
from fusion_core.seeding import generator as seeded
from mantis_photoz import density
from mantis_photoz.arrays import Array, as_tensor, either_kind, quantile, to_numpy, wide
from mantis_photoz.errors import ConfigError, DataError, ShapeError
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.uniformity import (
    COVERAGE_LEVELS,
    anderson_darling,
    coverage,
    cramer_von_mises,
    kolmogorov_smirnov,
    kolmogorov_smirnov_p,
    pit_outlier_rate,
    qq,
)

__all__ = [
    "anderson_darling",
    "bias",
    "binned_metrics",
    "bootstrap",
    "cde_loss",
    "cde_loss_grid",
    "coverage",
    "cramer_von_mises",
    "crps",
    "density_metrics",
    "eta",
    "hpd_coverage",
    "kolmogorov_smirnov",
    "kolmogorov_smirnov_p",
    "nmad",
    "outlier_rate_sigma",
    "pit",
    "pit_outlier_rate",
    "point_metrics",
    "qq",
    "rail_outlier_rate",
    "residuals",
    "sigma68",
    "sigma_iqr",
    "std",
    "wasserstein",
]

NMAD_FACTOR = 1.4826


@either_kind
def residuals(z_hat: Array, z_true: Array) -> Any:
    """``(z_hat - z) / (1 + z)`` in float64.

    Raises:
        ShapeError: different shapes.
        DataError: a true redshift of -1 or less, or one that is not finite.

    Example:
        >>> residuals(np.array([0.2]), np.array([0.0]))
        array([0.2])
    """
    hat, true = wide(as_tensor(z_hat)), wide(as_tensor(z_true))
    if hat.shape[-1:] != true.shape[-1:]:
        raise ShapeError(f"z_hat has shape {tuple(hat.shape)}, wanted that of z_true, {tuple(true.shape)}")
    if not bool((torch.isfinite(true) & (true > -1)).all()):
        raise DataError("z_true holds redshifts that are not finite or not above -1")
    return (hat - true) / (1 + true)


def _empty(r: Tensor, name: str) -> bool:
    if r.shape[-1]:
        return False
    warnings.warn(f"{name} of an empty set is NaN", FusionWarning, stacklevel=4)
    return True


def _nan(r: Tensor) -> Tensor:
    return r.new_full(r.shape[:-1], math.nan)


def _percentiles(r: Tensor, *percent: float) -> tuple[Tensor, ...]:
    levels = torch.tensor(percent, dtype=r.dtype, device=r.device) / 100
    return quantile(r, levels).unbind(-1)


def _of_residuals(function: Callable[..., Tensor]) -> Callable[..., Any]:
    name = getattr(function, "__name__", "metric")

    def reduced(r: Array, **settings: Any) -> Tensor:
        values = wide(as_tensor(r, "residuals"))
        return _nan(values) if _empty(values, name) else function(values, **settings)

    wrapped = either_kind(reduced)
    wrapped.__doc__, wrapped.__name__ = function.__doc__, name
    return wrapped


@_of_residuals
def bias(r: Tensor, *, center: str = "mean") -> Tensor:
    """Mean residual (the paper), or the median (``center="median"``: RAIL, DESC).

    Example:
        >>> bias(np.array([0.0, 0.0, 3.0])), bias(np.array([0.0, 0.0, 3.0]), center="median")
        (1.0, 0.0)
    """
    if center not in ("mean", "median"):
        raise ConfigError(f"center is {center!r}, wanted 'mean' or 'median'")
    return r.mean(-1) if center == "mean" else _percentiles(r, 50)[0]


@_of_residuals
def nmad(r: Tensor, *, center: bool = True) -> Tensor:
    """``1.4826 median |r - median r|``; without the inner median where ``center`` is False.

    Example:
        >>> nmad(np.array([1.0, 2.0, 3.0]))
        1.4826
    """
    if center:
        r = r - _percentiles(r, 50)[0][..., None]
    return NMAD_FACTOR * _percentiles(r.abs(), 50)[0]


@_of_residuals
def eta(r: Tensor, *, threshold: float) -> Tensor:
    """Share of ``|r| >= threshold``: 0.05 in the paper's tables, 0.15 in its training logs (B13).

    Example:
        >>> eta(np.array([0.01, -0.2, 0.3, 0.0]), threshold=0.05)
        0.5
    """
    check_range("threshold", threshold, 0.0, math.inf, open=True)
    return (r.abs() >= threshold).to(r.dtype).mean(-1)


@_of_residuals
def std(r: Tensor) -> Tensor:
    """Standard deviation, n in the denominator."""
    return (r - r.mean(-1, keepdim=True)).square().mean(-1).sqrt()


@_of_residuals
def sigma68(r: Tensor) -> Tensor:
    """Half the distance of the 15.87 and 84.13 percentiles."""
    low, high = _percentiles(r, 15.87, 84.13)
    return (high - low) / 2


@_of_residuals
def sigma_iqr(r: Tensor) -> Tensor:
    """Interquartile range over 1.349."""
    low, high = _percentiles(r, 25, 75)
    return (high - low) / 1.349


@_of_residuals
def rail_outlier_rate(r: Tensor) -> Tensor:
    """RAIL's outliers: ``|r| > max(0.06, 3 sigma_IQR)``."""
    low, high = _percentiles(r, 25, 75)
    limit = (3 * (high - low) / 1.349).clamp(min=0.06)
    return (r.abs() > limit[..., None]).to(r.dtype).mean(-1)


@_of_residuals
def outlier_rate_sigma(r: Tensor, *, sigmas: float = 3.0) -> Tensor:
    """Share further than ``sigmas`` standard deviations from the mean."""
    away = (r - r.mean(-1, keepdim=True)).abs()
    limit = sigmas * away.square().mean(-1, keepdim=True).sqrt()
    return (away > limit).to(r.dtype).mean(-1)


def _all_point(r: Any, thresholds: Sequence[float]) -> dict[str, Any]:
    found = {
        "bias": bias(r),
        "bias_median": bias(r, center="median"),
        "nmad": nmad(r),
        "nmad_uncentered": nmad(r, center=False),
        "std": std(r),
        "sigma68": sigma68(r),
        "sigma_iqr": sigma_iqr(r),
    }
    found |= {f"eta_{threshold:g}": eta(r, threshold=threshold) for threshold in thresholds}
    return found | {"outlier_rail": rail_outlier_rate(r), "outlier_3sigma": outlier_rate_sigma(r)}


def point_metrics(
    z_hat: Array, z_true: Array, *, thresholds: Sequence[float] = (0.05, 0.15)
) -> dict[str, Any]:
    """All metrics of point estimates, in the paper's and in RAIL's conventions, by name.

    Args:
        z_hat: (n,) estimates.
        z_true: (n,) spectroscopic redshifts.
        thresholds: of ``eta_...``.

    Returns:
        ``bias``, ``bias_median``, ``nmad``, ``nmad_uncentered``, ``std``, ``sigma68``, ``sigma_iqr``, one
        ``eta_<threshold>`` each, ``outlier_rail``, ``outlier_3sigma``; NaN, with a warning, of an empty set.

    Example:
        >>> m = point_metrics(np.array([0.1, 0.3]), np.array([0.1, 0.2]))
        >>> round(m["bias"], 4), m["eta_0.05"]
        (0.0417, 0.5)
    """
    return _all_point(residuals(z_hat, z_true), thresholds)


def bootstrap(
    r: Array,
    metric: Callable[..., Any] = nmad,
    *,
    resamples: int = 1000,
    percentiles: Sequence[float] = (16, 50, 84),
    seed: int = 0,
    **settings: Any,
) -> Any:
    """Percentiles of a metric over resampled residuals, a block of resamples at a time.

    Args:
        r: (n,) residuals, or per-object scores with ``metric=bias`` (the mean).
        metric: a function of residuals of this module.
        resamples: how many.
        percentiles: of the result.
        seed: of the draws.
        **settings: of the metric.

    Returns:
        (percentiles,) array or tensor.

    Raises:
        DataError: no residuals.
    """
    check_range("resamples", resamples, 1, 10**7)
    values = wide(as_tensor(r, "residuals"))
    if values.ndim != 1 or not len(values):
        raise DataError(f"residuals have shape {tuple(values.shape)}, wanted (n,) with n >= 1")
    draw = seeded(seed, "bootstrap")
    block = max(1, min(resamples, 8_000_000 // len(values)))
    found: list[Tensor] = []
    for start in range(0, resamples, block):
        size = (min(block, resamples - start), len(values))
        rows = torch.randint(len(values), size, generator=draw).to(values.device)
        found.append(metric(values[rows], **settings))
    levels = torch.tensor(list(percentiles), dtype=values.dtype, device=values.device) / 100
    result = quantile(torch.cat(found), levels)
    return result if isinstance(r, Tensor) else to_numpy(result)


def binned_metrics(
    z_hat: Array,
    z_true: Array,
    by: Array,
    edges: Sequence[float],
    *,
    name: str = "z",
    thresholds: Sequence[float] = (0.05, 0.15),
) -> list[dict[str, Any]]:
    """Point metrics in bins of redshift, magnitude or signal to noise; empty bins are left out.

    Args:
        z_hat: (n,) estimates.
        z_true: (n,) truths.
        by: (n,) what is binned.
        edges: increasing; a bin holds its lower edge, the last its upper one too.
        name: of ``by``, for the columns ``<name>_low`` and ``<name>_high``.
        thresholds: of ``eta_...``.

    Returns:
        one row per bin, with ``n``.
    """
    limits = [float(edge) for edge in edges]
    if len(limits) < 2 or sorted(set(limits)) != limits:
        raise ConfigError(f"edges are {limits}, wanted two or more that increase")
    r = to_numpy(as_tensor(residuals(z_hat, z_true)))
    place = to_numpy(wide(as_tensor(by, "by")))
    if place.shape != r.shape:
        raise ShapeError(f"by has shape {place.shape}, wanted that of z_true, {r.shape}")
    bins = np.digitize(place, limits) - 1
    bins[place == limits[-1]] = len(limits) - 2
    rows: list[dict[str, Any]] = []
    for i, (low, high) in enumerate(pairwise(limits)):
        inside = r[bins == i]
        if len(inside):
            head = {f"{name}_low": low, f"{name}_high": high, "n": len(inside)}
            rows.append(head | _all_point(inside, thresholds))
    return rows


# ---- densities ----


def pit(pdf: BinnedPDF, z_true: Array) -> Any:
    """(n,) probability integral transforms ``CDF(z_true)``."""
    return pdf.pit(z_true)


def crps(pdf: BinnedPDF, z_true: Array) -> Any:
    """(n,) continuous ranked probability scores, closed form."""
    return pdf.crps(z_true)


def cde_loss(pdf: BinnedPDF, z_true: Array) -> tuple[Any, Any]:
    """Conditional density loss, bin-exact: mean over objects and its standard error."""
    loss = as_tensor(pdf.cde_loss(z_true))
    found = (loss.mean(), loss.std(correction=0) / math.sqrt(max(len(loss), 1)))
    return found if pdf.is_torch else to_numpy(found)


def cde_loss_grid(density_values: Array, nodes: Array, z_true: Array) -> tuple[Any, Any]:
    """The authors' grid form of the loss: rectangle rule and nearest node, but correct (B11).

    Args:
        density_values: (n, nodes) densities at the nodes.
        nodes: (nodes,) evenly spaced; the step is ``(max - min) / (nodes - 1)``.
        z_true: (n,).

    Returns:
        mean loss and its standard error, std / sqrt(n).
    """

    def found(f: Tensor, g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        from mantis_photoz.grid import nearest_node

        f, step = wide(f), (g.max() - g.min()) / (len(g) - 1)
        loss = step.to(f) * f.square().sum(-1) - 2 * f.gather(-1, nearest_node(z, g)[:, None])[:, 0]
        return loss.mean(), loss.std(correction=0) / math.sqrt(len(loss))

    return either_kind(found)(density_values, nodes, z_true)


def hpd_coverage(pdf: BinnedPDF, z_true: Array, *, levels: Sequence[float] = COVERAGE_LEVELS) -> Any:
    """(levels,) share of truths inside the highest-density region of each level."""

    def found(level: Tensor) -> Tensor:
        wanted = torch.tensor(list(levels), dtype=level.dtype, device=level.device)
        return (level[None] <= wanted[:, None]).to(level.dtype).mean(-1)

    return either_kind(found)(pdf.hpd_level(z_true))


def wasserstein(first: BinnedPDF, second: BinnedPDF, *, p: float = 1.0) -> Any:
    """``(integral |F - G|^p dz)^(1/p)`` of two sets of densities on the same bins, by the true p-norm (B12).

    The integral is exact for p = 1 and 2 where F - G does not change sign inside a bin, else a trapezoid.
    """
    check_range("p", p, 1.0, 1e6)
    edges = wide(as_tensor(first.edges))
    if first.bins != second.bins or not torch.allclose(edges, wide(as_tensor(second.edges))):
        raise ShapeError("the two sets of densities have different bins, wanted the same (use rebin)")
    gap = (density.cdf_at_edges(as_tensor(first.pmf)) - density.cdf_at_edges(as_tensor(second.pmf))).abs()
    a, b = gap[..., :-1], gap[..., 1:]
    area = (a * a + a * b + b * b) / 3 if p == 2 else (a**p + b**p) / 2
    found = (area * edges.diff()).sum(-1) ** (1 / p)
    return found if first.is_torch else to_numpy(found)


def density_metrics(pdf: BinnedPDF, z_true: Array) -> dict[str, float]:
    """The scores of densities by name: CRPS, density loss, PIT tests, tails and central coverage."""
    values = pdf.pit(z_true)
    loss, error = cde_loss(pdf, z_true)
    found = {
        "crps": float(pdf.crps(z_true).mean()),
        "cde_loss": float(loss),
        "cde_loss_error": float(error),
        "neg_log_density": -float(pdf.log_density(z_true).mean()),
        "pit_ks": float(kolmogorov_smirnov(values)),
        "pit_cvm": float(cramer_von_mises(values)),
        "pit_ad": float(anderson_darling(values)),
        "pit_outliers": float(pit_outlier_rate(values)),
    }
    for kind, shares in (("", coverage(values)), ("hpd_", hpd_coverage(pdf, z_true))):
        for level, share in zip(COVERAGE_LEVELS, shares, strict=True):
            found[f"{kind}coverage_{level:g}"] = float(share)
    return found

"""Pictures of a run (extra ``plot``): estimates against truth, PIT and QQ, n(z), Shapley shares, cutouts.

Each function draws into ``ax``, or into a new figure, and returns the axes; none touches pyplot's state.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.checkpoint import atomic_write
from fusion_core.errors import require_extra
from mantis_photoz import metrics
from mantis_photoz.arrays import Array, as_tensor, to_numpy
from mantis_photoz.attribution import BAND_EDGES, FEATURES_AT_REST
from mantis_photoz.errors import ShapeError
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.surveys import SURVEYS

__all__ = [
    "COLORS",
    "cutout_grid",
    "mark_features",
    "new_figure",
    "nz",
    "pit",
    "qq",
    "save",
    "shares_by_redshift",
    "shares_of",
    "zz",
]

COLORS: Mapping[str, str] = {"galex": "#7b3294", "ps1": "#1b7837", "unwise": "#d95f02"}
_GRAY = "#777777"


def new_figure(width: float = 5.0, height: float = 4.0) -> Any:
    """A matplotlib figure that no global state knows.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = require_extra("matplotlib.figure", "plot", "mantis-photoz")
    return figure.Figure(figsize=(width, height), layout="constrained")


def _axes(ax: Any, width: float = 5.0, height: float = 4.0) -> Any:
    return new_figure(width, height).subplots() if ax is None else ax


def save(ax_or_figure: Any, path: str | os.PathLike[str], *, dpi: int = 120) -> Path:
    """Write a picture, whole or not at all; the suffix says the format."""
    figure = getattr(ax_or_figure, "figure", None) or ax_or_figure
    target = Path(path)
    with atomic_write(target) as file:
        figure.savefig(file, format=target.suffix.lstrip(".") or "png", dpi=dpi)
    return target


def _flat(values: Array) -> NDArray[np.float64]:
    return np.asarray(to_numpy(as_tensor(values)), dtype=np.float64).reshape(-1)


def zz(
    z_true: Array, z_hat: Array, ax: Any = None, *, threshold: float = 0.05, label: str = "estimate"
) -> Any:
    """Estimates against true redshifts, with the lines of ``|dz| = threshold (1 + z)``.

    Args:
        z_true: (n,).
        z_hat: (n,).
        ax: axes to draw into.
        threshold: of the dashed lines.
        label: of the vertical axis.
    """
    true, hat = _flat(z_true), _flat(z_hat)
    if true.shape != hat.shape:
        raise ShapeError(f"z_hat has shape {hat.shape}, wanted that of z_true, {true.shape}")
    ax = _axes(ax, 4.6, 4.4)
    top = float(max(true.max(initial=0.1), hat.max(initial=0.1))) * 1.02
    if len(true) > 2000:
        ax.hist2d(true, hat, bins=120, range=[[0, top], [0, top]], cmap="viridis", cmin=1, norm="log")
    else:
        ax.plot(true, hat, ".", markersize=3, alpha=0.5, color="#1f77b4", rasterized=True)
    line = np.array([0.0, top])
    ax.plot(line, line, color="black", linewidth=0.8)
    for sign in (-1, 1):
        ax.plot(line, line + sign * threshold * (1 + line), "--", color=_GRAY, linewidth=0.8)
    if len(true):
        found = metrics.point_metrics(hat, true)
        ax.set_title(
            f"NMAD {found['nmad']:.4f}, bias {found['bias']:+.4f}, eta(0.05) {found['eta_0.05']:.1%}",
            fontsize=9,
        )
    ax.set(xlim=(0, top), ylim=(0, top), xlabel="true redshift", ylabel=label)
    return ax


def pit(values: Mapping[str, Array] | Array, ax: Any = None, *, bins: int = 20) -> Any:
    """Histograms of PITs, one per name; a calibrated model is flat at 1."""
    ax = _axes(ax, 4.6, 3.2)
    for name, entry in _named(values).items():
        data = _flat(entry)
        ax.hist(data, bins=bins, range=(0, 1), density=True, histtype="step", linewidth=1.6,
                label=f"{name} (KS {metrics.kolmogorov_smirnov(data):.3f})")  # fmt: skip
    ax.axhline(1, color=_GRAY, linestyle="--", linewidth=0.8)
    ax.set(xlim=(0, 1), xlabel="PIT", ylabel="density")
    ax.legend(fontsize=8, frameon=False)
    return ax


def qq(values: Mapping[str, Array] | Array, ax: Any = None) -> Any:
    """Quantiles of the PIT against even levels; a calibrated model is the diagonal."""
    ax = _axes(ax, 4.2, 4.0)
    ax.plot([0, 1], [0, 1], color=_GRAY, linestyle="--", linewidth=0.8)
    for name, entry in _named(values).items():
        levels, found = metrics.qq(_flat(entry))
        ax.plot(levels, found, linewidth=1.6, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level", ylabel="quantile of the PIT")
    ax.legend(fontsize=8, frameon=False)
    return ax


def _named(values: Mapping[str, Array] | Array) -> dict[str, Array]:
    return dict(values) if isinstance(values, Mapping) else {"model": values}


def nz(pdf: BinnedPDF, z_true: Array | None = None, ax: Any = None) -> Any:
    """The stacked n(z) with its bootstrap band, and the true redshifts where they are known."""
    from mantis_photoz import prior

    ax = _axes(ax, 5.0, 3.2)
    found = prior.stack(pdf.numpy())
    edges = found.edges
    ax.stairs(found.density, edges, color="#1f77b4", linewidth=1.5, label="mean of p(z)")
    ax.fill_between(edges, np.append(found.low, found.low[-1]), np.append(found.high, found.high[-1]),
                    step="post", color="#1f77b4", alpha=0.25, linewidth=0)  # fmt: skip
    if z_true is not None:
        coarse = np.linspace(edges[0], edges[-1], 33)
        ax.hist(
            _flat(z_true), bins=coarse, density=True, histtype="step", color="black", label="true redshifts"
        )
    ax.set(xlim=(edges[0], edges[-1]), xlabel="redshift", ylabel="n(z)")
    ax.legend(fontsize=8, frameon=False)
    return ax


def shares_of(phi: Mapping[str, tuple[float, float]], ax: Any = None, *, value: str = "-CRPS") -> Any:
    """Bars of mean Shapley values with their errors.

    Args:
        phi: player -> (value, error).
        ax: axes to draw into.
        value: what the game is about.
    """
    ax = _axes(ax, 5.0, 3.2)
    names = list(phi)
    ax.bar(names, [phi[n][0] for n in names], yerr=[phi[n][1] for n in names], capsize=3,
           color=[COLORS.get(n, "#1f77b4") for n in names])  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_ylabel(f"Shapley value of {value}")
    return ax


def shares_by_redshift(
    z: Array,
    phi: Array,
    names: Sequence[str],
    ax: Any = None,
    *,
    bins: int = 8,
    value: str = "-CRPS",
    label: str = "",
) -> Any:
    """Mean Shapley values, or shares, in bins of redshift that hold equally many objects.

    Args:
        z: (n,) redshifts.
        phi: (players, n) values.
        names: of the players.
        ax: axes to draw into.
        bins: how many.
        value: what the game is about.
        label: of the vertical axis, instead of the Shapley value's.
    """
    place, values = _flat(z), np.asarray(to_numpy(as_tensor(phi)))
    if values.shape != (len(names), len(place)):
        raise ShapeError(f"phi has shape {values.shape}, wanted ({len(names)}, {len(place)})")
    ax = _axes(ax, 5.0, 3.4)
    edges = np.unique(np.quantile(place, np.linspace(0, 1, bins + 1)))
    which = np.clip(np.searchsorted(edges, place, side="right") - 1, 0, max(len(edges) - 2, 0))
    used = [i for i in range(max(len(edges) - 1, 1)) if (which == i).any()]
    center = [place[which == i].mean() for i in used]
    for name, row in zip(names, values, strict=True):
        mean = [row[which == i].mean() for i in used]
        error = [row[which == i].std() / np.sqrt((which == i).sum()) for i in used]
        ax.errorbar(center, mean, error, marker="o", markersize=3, label=name, color=COLORS.get(name))
    ax.axhline(0, color=_GRAY, linewidth=0.8)
    ax.set(xlabel="redshift", ylabel=label or f"Shapley value of {value}")
    ax.legend(fontsize=8, frameon=False, ncols=2 if len(names) > 4 else 1)
    return ax


def mark_features(ax: Any) -> None:
    """Write above axes of redshift through which bands the rest-frame features move (section 2.10)."""
    low, high = ax.get_xlim()
    ax.set_xlim(low, high)
    above, small = ax.get_xaxis_transform(), {"fontsize": 6, "va": "bottom", "clip_on": False}
    for row, (name, rest) in enumerate(FEATURES_AT_REST.items()):
        height = 1.02 + 0.06 * row
        ax.text(1.01, height, name, transform=ax.transAxes, color=_GRAY, **small)
        for band, (blue, red) in BAND_EDGES.items():
            left, right = max(blue / rest - 1, low, 0.0), min(red / rest - 1, high)
            if right - left > 0.02 * (high - low):
                ax.plot([left, right], [height] * 2, color=_GRAY, lw=1, transform=above, clip_on=False)
                ax.text((left + right) / 2, height, band, ha="center", transform=above, **small)


def cutout_grid(planes: Mapping[str, Array], figure: Any = None, *, title: str = "") -> Any:
    """One galaxy in all bands, in the order of wavelength, asinh stretched.

    Args:
        planes: survey -> (bands, height, width) fluxes.
        figure: to draw into.
        title: over all.

    Returns:
        The figure.
    """
    bands: dict[str, NDArray[Any]] = {}
    for name, entry in planes.items():
        images = np.asarray(to_numpy(as_tensor(entry)))
        known = SURVEYS[name].bands if name in SURVEYS else ()
        labels = known if len(known) == len(images) else tuple(f"{name} {i}" for i in range(len(images)))
        bands |= dict(zip(labels, images, strict=True))
    order = ["fuv", "nuv", *[band for band in bands if band not in ("fuv", "nuv")]]
    shown = [band for band in order if band in bands]
    columns = min(len(shown), 9)
    rows = -(-len(shown) // columns)
    figure = new_figure(1.35 * columns, 1.55 * rows + 0.3) if figure is None else figure
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for ax, band in zip(axes, shown, strict=False):
        image = np.nan_to_num(bands[band])
        noise = 1.4826 * float(np.median(np.abs(image - np.median(image)))) or 1.0
        ax.imshow(np.arcsinh((image - np.median(image)) / (2 * noise)), cmap="gray", origin="lower")
        ax.set_title(band.upper() if len(band) > 1 else band, fontsize=9)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    if title:
        figure.suptitle(title, fontsize=10)
    return figure

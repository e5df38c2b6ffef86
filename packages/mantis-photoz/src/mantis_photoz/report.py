"""The evaluation report: every metric in the paper's and in RAIL's conventions, with pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.report import Figure, Page, print_rows
from fusion_core.results import plain
from mantis_photoz import metrics, plots
from mantis_photoz.arrays import Array, as_tensor, to_numpy
from mantis_photoz.drawn import DrawnReport
from mantis_photoz.errors import DataError
from mantis_photoz.pdf import BinnedPDF

__all__ = ["ESTIMATES", "Evaluation", "evaluate"]

ESTIMATES = ("z_mean", "z_mode", "z_median", "z_best")
"""The point estimates that a report compares."""

_SHOWN = ("bias", "nmad", "eta_0.05", "eta_0.15", "sigma68", "outlier_rail")


@dataclass(frozen=True, kw_only=True)
class Evaluation(DrawnReport):
    """The report of densities against true redshifts.

    Attributes:
        density: scores of the densities by name, of each model.
        binned: point metrics of ``z_mean`` in bins of redshift (and of what else was named).
        pdfs: the densities by model.
        z_true: (n,) truths.
    """

    density: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    binned: Sequence[Mapping[str, Any]] = ()
    pdfs: Mapping[str, BinnedPDF] = field(default_factory=dict[str, BinnedPDF])
    z_true: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers of the first model's mean, and its density scores."""
        first = next(iter(self.density))
        point = next(row for row in self.rows if row["model"] == first and row["estimate"] == "z_mean")
        return {key: value for key, value in point.items() if isinstance(value, float)} | dict(
            self.density[first]
        )

    def shown_rows(self) -> list[dict[str, Any]]:
        """The rows with few metrics, each with its bootstrap interval."""
        lines: list[dict[str, Any]] = []
        for row in self.rows:
            line: dict[str, Any] = {"model": row["model"], "estimate": row["estimate"], "n": row["n"]}
            for name in _SHOWN:
                low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
                spread = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
                line[name] = f"{row[name]:.4f}{spread}"
            lines.append(line)
        return lines

    def density_rows(self) -> list[dict[str, Any]]:
        """One row per model with its density scores."""
        return [{"model": name, **scores} for name, scores in self.density.items()]

    def to_dict(self) -> dict[str, Any]:
        """The report's document with the density scores and the binned table."""
        return super().to_dict() | plain(
            {"density": self.density, "binned": self.binned, "n": len(self.z_true)}
        )

    def page(self) -> Page:
        """The page with all tables."""
        page = super().page()
        page.heading("Densities").table(
            self.density_rows(),
            "CRPS and density loss: lower is better. PIT tests: 0 is uniform. Coverage: equal to its level.",
        )
        if self.binned:
            page.heading("In bins").table(self.binned, "Metrics of z_mean.")
        return page

    def print(self, console: Any = None) -> None:
        """Print the tables to the terminal."""
        super().print(console)
        print_rows(self.density_rows(), console)

    def draw(self, directory: str | os.PathLike[str]) -> list[Figure]:
        """Draw z-z, PIT, QQ and n(z) into a directory (extra ``plot``)."""
        if not self.pdfs:
            return []
        place = Path(directory)
        first, pdf = next(iter(self.pdfs.items()))
        pits = {name: entry.numpy().pit(self.z_true) for name, entry in self.pdfs.items()}
        flat, diagonal = "Flat is calibrated.", "The diagonal is calibrated."
        words = {
            "zz.png": ("Estimated against true redshifts.", "Dashed: |dz| = 0.05 (1 + z)."),
            "pit.png": ("Histogram of the probability integral transform.", flat),
            "qq.png": ("Quantiles of the PIT against even levels.", diagonal),
            "nz.png": ("Stacked redshift distribution.", f"n(z) of {first}."),
        }
        drawn = {
            "zz.png": plots.zz(self.z_true, pdf.numpy().mean(), label=f"z_mean of {first}"),
            "pit.png": plots.pit(pits),
            "qq.png": plots.qq(pits),
            "nz.png": plots.nz(pdf, self.z_true),
        }
        return [Figure(plots.save(ax, place / name), *words[name]) for name, ax in drawn.items()]


def evaluate(
    pdfs: BinnedPDF | Mapping[str, BinnedPDF],
    z_true: Array,
    *,
    by: Mapping[str, tuple[Array, Sequence[float]]] | None = None,
    thresholds: Sequence[float] = (0.05, 0.15),
    resamples: int = 200,
    seed: int = 0,
    title: str = "Photometric redshifts against the truth",
) -> Evaluation:
    """Compare densities with true redshifts.

    Args:
        pdfs: of one model, or of several by name (raw and recalibrated).
        z_true: (n,) redshifts; objects whose truth is not finite are left out.
        by: name -> (values, bin edges): more tables in bins, such as magnitudes; redshift is always there.
        thresholds: of the outlier rates.
        resamples: of the bootstrap intervals (16 to 84 %) of bias, NMAD and outlier rates.
        seed: of the bootstrap.
        title: of the page.

    Returns:
        The report.

    Raises:
        DataError: no object with a true redshift, or another number of objects.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> pdf = BinnedPDF(np.linspace(0, 1, 21), rng.dirichlet(np.ones(20), 50))
        >>> round(evaluate(pdf, rng.random(50), resamples=10).metrics["crps"], 1)
        0.2
    """
    named = dict(pdfs) if isinstance(pdfs, Mapping) else {"model": pdfs}
    truth = np.asarray(to_numpy(as_tensor(z_true, "z_true")), dtype=np.float64).reshape(-1)
    known = np.isfinite(truth)
    counts = {name: len(pdf) for name, pdf in named.items()}
    if not named or any(count != len(truth) for count in counts.values()) or not known.any():
        raise DataError(
            f"z_true has {int(known.sum())} finite redshifts of {len(truth)} for densities {counts}, "
            "wanted one per object, and at least one that is finite"
        )
    kept = {name: pdf.numpy()[known] for name, pdf in named.items()}
    z = truth[known]
    rows: list[dict[str, Any]] = []
    for name, pdf in kept.items():
        columns = pdf.summaries()
        for estimate in ESTIMATES:
            r = metrics.residuals(columns[estimate], z)
            row: dict[str, Any] = {"model": name, "estimate": estimate, "n": len(z)}
            row |= metrics.point_metrics(columns[estimate], z, thresholds=thresholds)
            intervals: list[tuple[str, Any, dict[str, Any]]] = [
                ("bias", metrics.bias, {}),
                ("nmad", metrics.nmad, {}),
                *((f"eta_{t:g}", metrics.eta, {"threshold": t}) for t in thresholds),
            ]
            for key, metric, options in intervals:
                low, high = metrics.bootstrap(
                    r, metric, resamples=resamples, percentiles=(16, 84), seed=seed, **options
                )
                row |= {f"{key}_low": float(low), f"{key}_high": float(high)}
            rows.append(row)
    first = next(iter(kept.values()))
    estimate, binned = first.mean(), list[dict[str, Any]]()
    edges = np.unique(np.quantile(z, np.linspace(0, 1, 6)))
    if len(edges) > 1:
        binned += metrics.binned_metrics(estimate, z, z, edges.tolist(), thresholds=thresholds)
    for name, (values, limits) in (by or {}).items():
        place = np.asarray(to_numpy(as_tensor(values)), dtype=np.float64)[known]
        binned += metrics.binned_metrics(estimate, z, place, limits, name=name, thresholds=thresholds)
    return Evaluation(
        title=title,
        rows=rows,
        density={name: metrics.density_metrics(pdf, z) for name, pdf in kept.items()},
        binned=binned,
        pdfs=kept,
        z_true=z,
    )

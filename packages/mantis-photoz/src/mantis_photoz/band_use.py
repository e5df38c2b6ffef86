"""Which surveys or bands a network uses (section 2.10): exact Shapley values by masked forward passes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import MissingExtraError, check_range
from fusion_core.modules import untouched
from fusion_core.progress import track
from fusion_core.report import Figure, Report
from fusion_core.results import plain
from fusion_core.seeding import generator as seeded
from mantis_photoz import density, metrics, plots, points
from mantis_photoz.errors import ConfigError, DataError
from mantis_photoz.grid import grid_nodes, training_edges
from mantis_photoz.inputs import prepare
from mantis_photoz.samples import batch_of, redshifts
from mantis_photoz.shapley import (
    coalitions,
    interactions,
    leave_one_out,
    mask_channels,
    shapley_values,
    shares,
)
from mantis_photoz.surveys import SURVEYS

__all__ = ["BandUse", "band_use"]

Players = Literal["surveys", "bands"]
Value = Literal["neg_crps", "log_density", "z_mean"]
Baseline = Literal["absent", "zero", "mean", "marginal"]
_VALUES = ("neg_crps", "log_density", "z_mean")


@dataclass(frozen=True, kw_only=True)
class BandUse(Report):
    """Shapley values of surveys or bands.

    Attributes:
        players: names.
        table: (2^players, n) value of each coalition for each object.
        phi: (players, n) Shapley values.
        z: (n,) redshifts; NaN where unknown.
        value: what was explained.
        baseline: what stood for an absent player.
    """

    players: Sequence[str] = ()
    table: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    phi: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    z: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    value: str = "neg_crps"
    baseline: str = "absent"

    def interactions(self) -> NDArray[np.float64]:
        """(players, players) mean interaction indices; rows add up to the mean Shapley values."""
        return np.asarray(interactions(self.table.mean(1)))

    def to_dict(self) -> dict[str, Any]:
        """The report's document with the mean game and the interactions."""
        who = coalitions(len(self.players))
        game = [
            {"players": [n for n, on in zip(self.players, row, strict=True) if on], "value": float(v)}
            for row, v in zip(who, self.table.mean(1), strict=True)
        ]
        more = {"value": self.value, "baseline": self.baseline, "objects": len(self.z), "game": game}
        return super().to_dict() | plain(more | {"interactions": self.interactions()})

    def draw(self, directory: str | os.PathLike[str]) -> list[Figure]:
        """Draw mean values and, where redshifts are known, values against redshift (extra ``plot``)."""
        place = Path(directory)
        bars = {row["player"]: (row["shapley"], row["error"]) for row in self.rows}
        alt = f"Mean Shapley values of {self.value}."
        made = [Figure(plots.save(plots.shares_of(bars, value=self.value), place / "shapley.png"), alt, alt)]
        known = np.isfinite(self.z)
        if known.sum() > 1:
            ax = plots.shares_by_redshift(self.z[known], self.phi[:, known], self.players, value=self.value)
            words = f"Shapley values of {self.value} against redshift."
            made.append(Figure(plots.save(ax, place / "shapley_redshift.png"), words, words))
        return made

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write report and pictures; without matplotlib the report alone."""
        with tempfile.TemporaryDirectory() as place:
            try:
                figures = self.draw(place) if not self.figures else list(self.figures)
            except MissingExtraError:
                figures = []
            Report.save(replace(self, figures=figures), directory)


def band_use(
    model: Any,
    samples: Any,
    *,
    players: Players = "surveys",
    value: Value = "neg_crps",
    baseline: Baseline = "absent",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> BandUse:
    """Exact Shapley values of the surveys (8 passes) or bands (512) of each object.

    Args:
        model: a :class:`~mantis_photoz.fusion.FusionModel`.
        samples: cutouts, as :class:`~mantis_photoz.training.Trainer` takes them.
        players: ``"surveys"`` or ``"bands"``.
        value: ``"neg_crps"`` or ``"log_density"`` (both need true redshifts), or ``"z_mean"``.
        baseline: what stands for an absent player: ``"absent"`` (surveys only: the model is told, as when a
            file is missing), ``"zero"``, ``"mean"`` (mean planes of the samples' first batch), ``"marginal"``
            (another object's planes).
        batch_size: objects per pass.
        seed: of ``"marginal"``.
        progress: a bar on stderr; None decides by the terminal.

    Returns:
        A row per player: Shapley value with its standard error, share, leave-one-out.

    Raises:
        ConfigError: unknown players, value or baseline, or ``"absent"`` bands.
        DataError: no objects, or no true redshifts where the value needs them.
    """
    if players not in ("surveys", "bands"):
        raise ConfigError(f"players is {players!r}, wanted 'surveys' or 'bands'")
    if value not in _VALUES:
        raise ConfigError(f"value is {value!r}, wanted {', '.join(_VALUES)}")
    if baseline not in ("absent", "zero", "mean", "marginal"):
        raise ConfigError(f"baseline is {baseline!r}, wanted 'absent', 'zero', 'mean' or 'marginal'")
    if players == "bands" and baseline == "absent":
        raise ConfigError("baseline is 'absent' for bands, wanted 'zero', 'mean' or 'marginal'")
    check_range("batch_size", batch_size, 1, float("inf"))
    config = model.config
    names, parts = _players(config, players)
    if not len(samples):
        raise DataError("there are no objects to explain")
    try:
        z = np.asarray(redshifts(samples), dtype=np.float64)
    except DataError:
        if value != "z_mean":
            raise
        z = np.full(len(samples), np.nan)
    if value != "z_mean" and not np.isfinite(z).all():
        raise DataError(f"{int((~np.isfinite(z)).sum())} objects have no true redshift; leave them out")
    device = next(model.parameters()).device
    who, found, mean = coalitions(len(names)).tolist(), list[Tensor](), dict[str, Tensor]()
    score = _scorer(config, value)
    starts = range(0, len(samples), batch_size)
    with torch.no_grad(), untouched(model):
        for start in track(starts, "coalitions", enabled=progress):
            rows = list(range(start, min(start + batch_size, len(samples))))
            batch = batch_of(samples, rows, config).to(device)
            images = prepare(batch.images, config, wcs=batch.wcs or None, nan="zero", device=device)
            mean = mean or {name: planes.mean(0) for name, planes in images.items()}
            truth = torch.from_numpy(z[rows])
            columns: list[Tensor] = []
            for row in who:
                gone = [part for part, on in zip(parts, row, strict=True) if not on]
                seen, present = _without(images, batch.present, gone, baseline, mean, seed, config)
                columns.append(score(model(seen, batch.ebv, present).cpu(), truth))
            found.append(torch.stack(columns))
    table = torch.cat(found, dim=1)
    phi = np.asarray(shapley_values(table.numpy()))
    center, error = phi.mean(1), phi.std(1) / np.sqrt(phi.shape[1])
    share, loo = shares(center), leave_one_out(table.numpy()).mean(1)
    rows_out = [
        {"player": n, "shapley": float(center[i]), "error": float(error[i]), "share": float(share[i]),
         "leave_one_out": float(loo[i])}
        for i, n in enumerate(names)
    ]  # fmt: skip
    return BandUse(
        title=f"Use of {players}: exact Shapley values of {value}",
        rows=rows_out,
        players=names,
        table=table.numpy(),
        phi=phi,
        z=z,
        value=value,
        baseline=baseline,
    )


def _players(config: Any, players: Players) -> tuple[list[str], list[list[tuple[str, int]]]]:
    """Names, and the (survey, channel) pairs of each."""
    channels = {name: [(name, i) for i in range(one.bands)] for name, one in config.inputs.items()}
    if players == "surveys":
        return list(channels), list(channels.values())
    names: list[str] = []
    for survey, pairs in channels.items():
        known = SURVEYS[survey].bands if survey in SURVEYS else ()
        names += known if len(known) == len(pairs) else [f"{survey}_{i}" for _, i in pairs]
    return names, [[pair] for pairs in channels.values() for pair in pairs]


def _without(
    images: Mapping[str, Tensor],
    present: Tensor,
    gone: Sequence[Sequence[tuple[str, int]]],
    baseline: Baseline,
    mean: Mapping[str, Tensor],
    seed: int,
    config: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    absent: dict[str, list[int]] = {}
    for survey, channel in (pair for part in gone for pair in part):
        absent.setdefault(survey, []).append(channel)
    seen, told = dict(images), present.clone()
    for survey, taken in absent.items():
        if baseline == "absent":
            told[:, list(config.surveys).index(survey)] = False
            continue
        seen[survey] = mask_channels(
            images[survey], taken, baseline=baseline, mean=mean[survey], generator=seeded(seed, "marginal")
        )
    return seen, told


def _scorer(config: Any, value: Value) -> Any:
    edges = training_edges(config.bins, config.z_max)
    nodes = grid_nodes(config.bins, config.z_max).double()

    def score(logits: Tensor, z: Tensor) -> Tensor:
        pmf, _ = density.pmf_from_logits(logits, edges.diff())
        if value == "neg_crps":
            return -density.crps(edges, pmf, z)
        if value == "log_density":
            return density.log_density(edges, pmf.clamp(min=1e-300), z)
        return points.mean(nodes, pmf)

    return score


def neg_nmad(use: BandUse) -> dict[str, float]:
    """Shapley values of -NMAD of the whole set, from the coalitions' mean redshifts.

    Raises:
        ConfigError: the game was not about ``z_mean``.
        DataError: redshifts are not known.
    """
    if use.value != "z_mean":
        raise ConfigError(f"value is {use.value!r}, wanted a game about 'z_mean'")
    if not np.isfinite(use.z).all():
        raise DataError("the game has objects without true redshift")
    game = np.array([-metrics.nmad(metrics.residuals(row, use.z)) for row in use.table])
    return dict(zip(use.players, np.asarray(shapley_values(game)).tolist(), strict=True))

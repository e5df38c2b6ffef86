"""Which surveys or bands a network uses (section 2.10): exact Shapley values by masked forward passes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.modules import untouched
from fusion_core.progress import track
from fusion_core.report import Figure
from fusion_core.results import plain
from fusion_core.seeding import generator as seeded
from mantis_photoz import density, metrics, plots, points
from mantis_photoz.arrays import wide
from mantis_photoz.drawn import DrawnReport
from mantis_photoz.errors import ConfigError, DataError
from mantis_photoz.grid import grid_nodes, training_edges
from mantis_photoz.predicting import prepared
from mantis_photoz.samples import batch_of, blocks, redshifts
from mantis_photoz.shapley import (
    coalitions,
    interactions,
    leave_one_out,
    mask_channels,
    shapley_values,
    shares,
)
from mantis_photoz.surveys import SURVEYS

__all__ = ["BandUse", "band_use", "check_players", "neg_nmad", "players_of", "scorer", "truths"]

Players = Literal["surveys", "bands"]
Value = Literal["neg_crps", "log_density", "z_mean"]
Baseline = Literal["absent", "zero", "mean", "marginal"]
VALUES = ("neg_crps", "log_density", "z_mean")


@dataclass(frozen=True, kw_only=True)
class BandUse(DrawnReport):
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


def band_use(
    model: Any,
    samples: Any,
    *,
    players: Players = "surveys",
    value: Value = "neg_crps",
    baseline: Baseline = "absent",
    reference: Any = None,
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
            file is missing), ``"zero"``, ``"mean"`` (the mean planes of ``reference``), ``"marginal"`` (the
            planes of another object of the batch).
        reference: cutouts of ``"mean"``, such as the training set; the samples themselves by default.
        batch_size: objects per pass.
        seed: of ``"marginal"``.
        progress: a bar on stderr; None decides by the terminal.

    Returns:
        A row per player: Shapley value with its standard error, share, leave-one-out.

    Raises:
        ConfigError: unknown players, value or baseline, or ``"absent"`` bands.
        DataError: no objects, or no true redshifts where the value needs them.
    """
    check_players(players, value)
    if baseline not in ("absent", "zero", "mean", "marginal"):
        raise ConfigError(f"baseline is {baseline!r}, wanted 'absent', 'zero', 'mean' or 'marginal'")
    if players == "bands" and baseline == "absent":
        raise ConfigError("baseline is 'absent' for bands, wanted 'zero', 'mean' or 'marginal'")
    config = model.config
    names, parts = players_of(config, players)
    z = truths(samples, value)
    device = next(model.parameters()).device
    who, found = coalitions(len(names)).tolist(), list[Tensor]()
    others = samples if reference is None else reference
    mean = _mean_planes(others, config, batch_size, device) if baseline == "mean" else {}
    score = scorer(config, value)
    with torch.no_grad(), untouched(model):
        for rows in track(blocks(len(samples), batch_size), "coalitions", enabled=progress):
            batch = batch_of(samples, rows, config).to(device)
            images = prepared(batch, config)
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


def check_players(players: str, value: str) -> None:
    """Refuse players and values that there are not.

    Raises:
        ConfigError: unknown.
    """
    if players not in ("surveys", "bands"):
        raise ConfigError(f"players is {players!r}, wanted 'surveys' or 'bands'")
    if value not in VALUES:
        raise ConfigError(f"value is {value!r}, wanted {', '.join(VALUES)}")


def truths(samples: Any, value: str) -> NDArray[np.float64]:
    """(n,) redshifts of the samples; NaN where a game about the mean redshift needs none.

    Raises:
        DataError: no objects, or no true redshifts where the value needs them.
    """
    if not len(samples):
        raise DataError("there are no objects to explain")
    try:
        return np.asarray(redshifts(samples), dtype=np.float64)
    except DataError:
        if value != "z_mean":
            raise
        return np.full(len(samples), np.nan)


def _mean_planes(samples: Any, config: Any, batch_size: int, device: torch.device) -> dict[str, Tensor]:
    """Survey -> (bands, height, width) mean view of all samples."""
    total = dict[str, Tensor]()
    for rows in blocks(len(samples), batch_size):
        for name, planes in prepared(batch_of(samples, rows, config).to(device), config).items():
            part = wide(planes).sum(0)
            total[name] = part if name not in total else total[name] + part
    return {name: part / len(samples) for name, part in total.items()}


def players_of(config: Any, players: Players) -> tuple[list[str], list[list[tuple[str, int]]]]:
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
            images[survey],
            taken,
            baseline=baseline,
            mean=mean.get(survey),
            generator=seeded(seed, "marginal"),
        )
    return seen, told


def scorer(config: Any, value: Value) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of logits and true redshifts: the value of each object, (batch,)."""
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

"""Which surveys' pixels a model looks at (section 2.10): shares of a pixel attribution, against redshift.

The share of a survey is ``sum |a|`` over its pixels, over the sum of all (MM-SHAP); ``a`` is expected
gradients (an estimate of SHAP values), integrated gradients or gradient x input. Shares say where a model
looks, not what a survey is worth: for that take :func:`mantis_photoz.band_use.band_use`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import check_range
from fusion_core.modules import untouched
from fusion_core.progress import track
from fusion_core.report import Figure
from fusion_core.results import plain
from fusion_core.seeding import generator as seeded
from mantis_photoz import attribution, plots
from mantis_photoz.arrays import wide
from mantis_photoz.band_use import Players, Value, check_players, players_of, scorer, truths
from mantis_photoz.drawn import DrawnReport
from mantis_photoz.errors import ConfigError
from mantis_photoz.predicting import prepared
from mantis_photoz.samples import Batch, batch_of, blocks
from mantis_photoz.shapley import shares

__all__ = ["PixelUse", "pixel_use"]

Method = Literal["expected", "integrated", "gradient"]
METHODS: tuple[Method, ...] = ("expected", "integrated", "gradient")
_BINS, _BACKGROUND = 6, 256


@dataclass(frozen=True, kw_only=True)
class PixelUse(DrawnReport):
    """Shares of surveys or bands in a pixel attribution.

    Attributes:
        players: names.
        shares: (players, n) of each object; they sum to 1.
        z: (n,) redshifts: the true ones, or the model's where those are not known.
        value: what was attributed.
        method: of the attribution.
        binned: mean shares in bins of redshift, with the band that each rest-frame feature falls in.
    """

    players: Sequence[str] = ()
    shares: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    z: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    value: str = "z_mean"
    method: str = "expected"
    binned: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report's document with the shares in bins of redshift."""
        more = {"value": self.value, "method": self.method, "objects": len(self.z), "binned": self.binned}
        return super().to_dict() | plain(more)

    def page(self) -> Any:
        """The page with the table against redshift."""
        words = "Rest-frame features are named by the band that they fall in."
        return super().page().heading("Against redshift").table(self.binned, words)

    def draw(self, directory: str | os.PathLike[str]) -> list[Figure]:
        """Draw shares against redshift, with the bands that rest-frame features move through."""
        words = f"Shares of |{self.method} gradients| of {self.value} against redshift."
        ax = plots.shares_by_redshift(
            self.z, self.shares, self.players, bins=_BINS, label="share of the attribution"
        )
        plots.mark_features(ax)
        return [Figure(plots.save(ax, Path(directory) / "shares_redshift.png"), words, words)]


def pixel_use(
    model: Any,
    samples: Any,
    *,
    method: Method = "expected",
    players: Players = "surveys",
    value: Value = "z_mean",
    steps: int = 16,
    background: Any = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> PixelUse:
    """Shares of the surveys, or bands, in a pixel attribution of each object.

    Args:
        model: a :class:`~mantis_photoz.fusion.FusionModel`.
        samples: cutouts, as :class:`~mantis_photoz.training.Trainer` takes them.
        method: ``"expected"`` gradients over the background, ``"integrated"`` gradients from zeros, or
            ``"gradient"`` x input.
        players: ``"surveys"`` or ``"bands"``.
        value: ``"z_mean"``, or ``"neg_crps"`` or ``"log_density"`` (both need true redshifts).
        steps: passes of expected and integrated gradients.
        background: cutouts for expected gradients, such as the training set; by default the samples;
            the first 256 are taken.
        batch_size: objects per pass.
        seed: of expected gradients.
        progress: a bar on stderr; None decides by the terminal.

    Returns:
        A row per player: mean share and its standard error.

    Raises:
        ConfigError: an unknown method, players or value.
        DataError: no objects, or no true redshifts where the value needs them.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, wanted {', '.join(METHODS)}")
    check_players(players, value)
    check_range("steps", steps, 1, 100_000)
    config, device = model.config, next(model.parameters()).device
    z = truths(samples, value)
    names, parts = players_of(config, players)
    others = _background(samples if background is None else background, config, device)
    sums, means, draw = list[Tensor](), list[Tensor](), seeded(seed, "background")
    with untouched(model):
        for rows in track(blocks(len(samples), batch_size), "attribution", enabled=progress):
            batch = batch_of(samples, rows, config).to(device)
            planes, layout = _pack(prepared(batch, config))
            scalar = _Scalar(model, batch, layout, scorer(config, value), torch.from_numpy(z[rows]))
            if method == "gradient":
                maps = attribution.gradient_times_input(scalar, planes)
            elif method == "integrated":
                maps = attribution.integrated_gradients(scalar, planes, steps=steps)
            else:
                maps = attribution.expected_gradients(scalar, planes, others, samples=steps, generator=draw)
            channels = {n: a.abs().sum((-2, -1)) for n, a in _unpack(wide(maps), layout).items()}
            sums.append(torch.stack([_total(channels, part) for part in parts]))
            with torch.no_grad():
                means.append(replace(scalar, score=scorer(config, "z_mean"))(planes))
    share = shares(torch.cat(sums, 1).cpu()).numpy()
    place = np.where(np.isfinite(z), z, torch.cat(means).cpu().numpy())
    rows_out = [
        {"player": name, "share": float(row.mean()), "error": float(row.std() / np.sqrt(len(row)))}
        for name, row in zip(names, share, strict=True)
    ]
    return PixelUse(
        title=f"Shares of {players} in {method} gradients of {value}",
        rows=rows_out,
        players=names,
        shares=share,
        z=place,
        value=value,
        method=method,
        binned=_binned(place, share, names),
    )


Layout = Mapping[str, torch.Size]


@dataclass(frozen=True, slots=True)
class _Scalar:
    """One number per object as a function of all surveys' pixels in one tensor."""

    model: Any
    batch: Batch
    layout: Layout
    score: Callable[[Tensor, Tensor], Tensor]
    truth: Tensor

    def __call__(self, planes: Tensor) -> Tensor:
        logits = self.model(_unpack(planes, self.layout), self.batch.ebv, self.batch.present)
        return self.score(logits.cpu(), self.truth)


def _total(channels: Mapping[str, Tensor], part: Sequence[tuple[str, int]]) -> Tensor:
    return torch.stack([channels[name][:, i] for name, i in part]).sum(0)


def _pack(images: Mapping[str, Tensor]) -> tuple[Tensor, Layout]:
    """All surveys' pixels as (batch, 1, 1, pixels), and how to undo it: surveys differ in size."""
    flat = torch.cat([planes.flatten(1) for planes in images.values()], dim=1)
    return flat[:, None, None], {name: planes.shape[1:] for name, planes in images.items()}


def _unpack(flat: Tensor, layout: Layout) -> dict[str, Tensor]:
    parts = flat.flatten(1).split([size.numel() for size in layout.values()], dim=1)
    return {name: part.unflatten(1, size) for (name, size), part in zip(layout.items(), parts, strict=True)}


def _background(samples: Any, config: Any, device: torch.device) -> Tensor:
    rows = list(range(min(len(samples), _BACKGROUND)))
    return _pack(prepared(batch_of(samples, rows, config).to(device), config))[0]


def _binned(z: NDArray[np.float64], share: NDArray[np.float64], names: Sequence[str]) -> list[dict[str, Any]]:
    """Mean shares in bins that hold equally many objects, and where rest-frame features are."""
    rows: list[dict[str, Any]] = []
    for part in np.array_split(np.argsort(z, kind="stable"), min(_BINS, len(z))):
        row: dict[str, Any] = {"z_low": float(z[part].min()), "z_high": float(z[part].max()), "n": len(part)}
        row |= {name: float(values[part].mean()) for name, values in zip(names, share, strict=True)}
        seen = attribution.observed_features(max(float(np.median(z[part])), 0.0))
        rows.append(row | {feature: band or "between bands" for feature, band in seen.items()})
    return rows

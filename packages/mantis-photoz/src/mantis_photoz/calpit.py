"""Cal-PIT (Dey et al. 2022; section 2.8): a monotone network r(alpha; x) = P(PIT <= alpha | x) maps a CDF.

The network and its integrator are :mod:`mantis_photoz.monotone`'s; x are the 83 photometric features of
:mod:`mantis_photoz.photometry`, or a network's hidden layer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fusion_core.checkpoint import digest_state, load_foreign, load_strict, load_tensors, save_tensors
from fusion_core.errors import check_range
from fusion_core.progress import track
from fusion_core.seeding import generator as seeded
from mantis_photoz import density
from mantis_photoz.arrays import Array, as_tensor, to_numpy, wide
from mantis_photoz.errors import CheckpointError, ConfigError, DataError
from mantis_photoz.monotone import DEFAULT_CELLS, MonotoneNetwork, clenshaw_curtis
from mantis_photoz.pchip import pchip_slopes
from mantis_photoz.pdf import BinnedPDF

__all__ = [
    "CalPIT",
    "FeatureSource",
    "MonotoneNetwork",
    "Norm",
    "clenshaw_curtis",
    "official_transform",
    "smooth_masses",
]

Norm = Literal["std", "official"]
FeatureSource = Literal["photometric", "hidden"]
"""Where features of a recalibration come from: fluxes of the cutouts, or the network's hidden layer."""

SOURCES: tuple[FeatureSource | None, ...] = (None, "photometric", "hidden")


def smooth_masses(pmf: Float[Tensor, "... bins"], floor: float) -> Float[Tensor, "... bins"]:
    """``(p + floor) / sum``; the authors' floor of 0.01 makes 80 % of 400 bins' mass uniform (B14)."""
    check_range("floor", floor, 0.0, math.inf)
    raised = pmf + floor
    return raised / raised.sum(-1, keepdim=True)


def official_transform(
    network: MonotoneNetwork,
    pmf: Float[Tensor, "batch nodes"],
    nodes: Float[Tensor, " nodes"],
    x: Float[Tensor, "batch features"],
    *,
    floor: float = 1e-2,
    cells: int | None = None,
) -> dict[str, Tensor]:
    """The authors' chain: floor, unit trapezoid area, r at the CDF's nodes, PCHIP, derivative, sum to 1.

    Args:
        network: evaluated in its own dtype.
        pmf: (batch, nodes).
        nodes: (nodes,) redshifts.
        x: (batch, features), standardised.
        floor: added to each mass.
        cells: of the fast integrator; None takes the authors' quadrature.

    Returns:
        ``smoothed``, ``cdf``, ``new_cdf`` (not rescaled: its ends are not 0 and 1), ``new_density``,
        ``new_pmf``.
    """
    g = wide(nodes)
    smoothed = smooth_masses(wide(pmf), floor)
    smoothed = smoothed / torch.trapezoid(smoothed, g)[:, None]
    cdf = F.pad(torch.cumulative_trapezoid(smoothed, g), (1, 0))
    alpha = cdf.to(x.dtype)
    new_cdf = network.exact(alpha, x) if cells is None else network(alpha, x, cells)
    slopes = pchip_slopes(g, wide(new_cdf))
    return {
        "smoothed": smoothed,
        "cdf": cdf,
        "new_cdf": new_cdf,
        "new_density": slopes,
        "new_pmf": slopes / slopes.sum(-1, keepdim=True),
    }


@dataclass(frozen=True, slots=True, eq=False)
class CalPIT:
    """A fitted monotone network with the statistics of its features.

    Args:
        network: r(alpha; x).
        mean: (features,) of the calibration split.
        std: (features,) of it.
        floor: added to each mass first: 1e-6, the authors' 1e-2 (B14).
        cells: of the integrator.
        norm: features are divided by their ``"std"``; ``"official"`` repeats the authors' error, which
            divides them by their mean (B3).
        source: where ``estimate`` takes the features from; None decides by their number.
        history: validation loss of each epoch of :meth:`fit`.
    """

    network: MonotoneNetwork
    mean: Tensor
    std: Tensor
    floor: float = 1e-6
    cells: int = DEFAULT_CELLS
    norm: Norm = "std"
    source: FeatureSource | None = None
    history: tuple[float, ...] = field(default=(), repr=False)
    kind: ClassVar[str] = "calpit"

    def __post_init__(self) -> None:
        check_range("floor", self.floor, 0.0, math.inf)
        if self.norm not in ("std", "official"):
            raise ConfigError(f"norm is {self.norm!r}, wanted 'std' or 'official'")
        if self.source not in SOURCES:
            raise ConfigError(f"source is {self.source!r}, wanted 'photometric' or 'hidden'")
        sizes = (tuple(self.mean.shape), tuple(self.std.shape))
        if sizes != ((self.network.features,),) * 2:
            raise DataError(
                f"mean and std have shapes {sizes[0]} and {sizes[1]}, wanted ({self.network.features},)"
            )

    def standardize(self, features: Array) -> Tensor:
        """``(x - mean) / std / 3`` in float32.

        Raises:
            DataError: other features, or not finite.
        """
        x = wide(as_tensor(features, "features"))
        if x.ndim != 2 or x.shape[1] != self.network.features or not bool(torch.isfinite(x).all()):
            raise DataError(
                f"features have shape {tuple(x.shape)}, wanted finite (batch, {self.network.features})"
            )
        scale = self.mean if self.norm == "official" else self.std
        return ((x - self.mean.to(x)) / scale.to(x) / 3).float()

    @torch.no_grad()
    def __call__(self, pdf: BinnedPDF, features: Array | None = None) -> BinnedPDF:
        """Densities whose CDF is r(CDF; x), rescaled so that it runs from 0 to 1.

        Raises:
            DataError: no features.
        """
        if features is None:
            raise DataError(f"Cal-PIT needs features, wanted ({len(pdf)}, {self.network.features})")
        x = self.standardize(features).to(self.mean.device)
        if len(x) != len(pdf):
            raise DataError(f"features have {len(x)} rows, wanted one for each of {len(pdf)} densities")
        steps = density.cdf_at_edges(smooth_masses(as_tensor(pdf.pmf), self.floor))
        r = _rescaled(self.network.precise(steps, x, self.cells))
        pmf = r.diff(dim=-1).clamp(min=0.0).to(steps.device)
        pmf = smooth_masses(pmf, 1e-12)  # a step that float32 swallowed leaves no hole
        return BinnedPDF(pdf.edges, pmf if pdf.is_torch else to_numpy(pmf), pdf.nodes)

    def to_dict(self) -> dict[str, Any]:
        """The settings, and a digest of the weights; those are in :meth:`save`'s file."""
        named = {name: getattr(self, name) for name in ("floor", "cells", "norm", "source")}
        weights = digest_state({**self.network.state_dict(), "mean": self.mean, "std": self.std})
        return {**named, "hidden": list(self.network.hidden), "weights": weights}

    def save(self, path: str | os.PathLike[str], **facts: Any) -> None:
        """Write weights, statistics and settings to a ``.safetensors`` file.

        Args:
            path: the file.
            **facts: about the calibration split, kept in the file's header.
        """
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        settings = [self.floor, self.cells, self.norm == "official", SOURCES.index(self.source)]
        tensors |= {"mean": self.mean, "std": self.std}
        tensors["settings"] = torch.tensor(settings, dtype=torch.float64)
        save_tensors(path, tensors, {"schema": "mantis.calpit/1", "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalPIT:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: missing, cut off, or something else.
        """
        tensors = load_tensors(path)
        if not {"mean", "std", "settings", "network.net.0.weight"} <= set(tensors):
            raise CheckpointError(f"{path} holds no Cal-PIT network, wanted mean, std, settings, network.*")
        state = {n.removeprefix("network."): v for n, v in tensors.items() if n.startswith("network.")}
        floor, cells, official, source = [*tensors["settings"].tolist(), 0.0][:4]
        return cls(
            _network_of(state),
            tensors["mean"],
            tensors["std"],
            floor,
            int(cells),
            "official" if official else "std",
            SOURCES[int(source)],
        )

    @classmethod
    def from_official(
        cls, state: Mapping[str, Tensor], mean: Array, std: Array, *, floor: float = 1e-6, norm: Norm = "std"
    ) -> CalPIT:
        """From the authors' state dict (``integrand.net.*``, ``net.*``) and statistics of 83 features.

        Args:
            state: their tensors; prefixes of wrappers are taken off.
            mean: (features,).
            std: (features,).
            floor: their own is 1e-2 (B14).
            norm: ``"official"`` divides by the mean, as their code does (B3).

        Raises:
            CheckpointError: another network.
            DataError: statistics of another number of features.
        """
        network = _network_of(
            {n.removeprefix("_orig_mod.").removeprefix("module."): v for n, v in state.items()}
        )
        parts = (wide(as_tensor(mean, "mean")), wide(as_tensor(std, "std")))
        return cls(network, *parts, floor, 256, norm, "photometric")

    @classmethod
    def load_official(
        cls,
        path: str | os.PathLike[str],
        statistics: str | os.PathLike[str],
        *,
        floor: float = 1e-6,
        norm: Norm = "std",
    ) -> CalPIT:
        """From the authors' ``calpit_checkpoint.pt`` and the folder of ``calpit_{mean,std}.npy``.

        Args:
            path: their checkpoint; nothing in it is executed.
            statistics: the folder.
            floor: see :meth:`from_official`.
            norm: see :meth:`from_official`.

        Raises:
            CheckpointError: a file is missing or broken, or holds another network.
            DataError: statistics of another number of features.
        """
        state = load_foreign(path)
        parts: list[Any] = []
        for name in ("mean", "std"):
            place = Path(statistics) / f"calpit_{name}.npy"
            try:
                parts.append(np.load(place, allow_pickle=False).reshape(-1))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"statistics {place} cannot be read: {error}") from error
        return cls.from_official(state, *parts, floor=floor, norm=norm)

    @classmethod
    def fit(
        cls,
        pdf: BinnedPDF,
        z_true: Array,
        features: Array,
        *,
        hidden: Sequence[int] = (128,) * 3,
        epochs: int = 100,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        batch_size: int = 512,
        patience: int = 20,
        alphas: int = 16,
        held_out: float = 0.2,
        floor: float = 1e-6,
        cells: int = 64,
        source: FeatureSource | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> CalPIT:
        """Train on a calibration split: cross-entropy of ``PIT <= alpha`` at alphas drawn for each object.

        The authors train [1024] * 4 with one alpha an object; here an object's alphas share its nodes, and
        the loss is of r as it is used, rescaled to run from 0 to 1.

        Args:
            pdf: densities of the split.
            z_true: (n,) redshifts.
            features: (n, features).
            hidden: widths of the network.
            epochs: at most.
            lr: of Adam.
            weight_decay: of Adam.
            batch_size: objects per step.
            patience: epochs without gain on the held-out part before the end.
            alphas: drawn per object and step.
            held_out: share for early stopping.
            floor: see the class.
            cells: of the integrator in training.
            source: of the features, see the class.
            seed: of weights, order and alphas.
            progress: a bar on stderr; None decides by the terminal.

        Raises:
            DataError: fewer than ten objects, or features that do not fit.
        """
        check_range("held_out", held_out, 0.0, 0.9, open=True)
        x = wide(as_tensor(features, "features"))
        if x.ndim != 2 or len(x) != len(pdf) or len(x) < 10 or not bool(torch.isfinite(x).all()):
            raise DataError(
                f"features have shape {tuple(x.shape)} for {len(pdf)} densities, wanted finite rows, >= 10"
            )
        smoothed = BinnedPDF(as_tensor(pdf.edges), smooth_masses(as_tensor(pdf.pmf).detach(), floor))
        pits = as_tensor(smoothed.pit(as_tensor(z_true))).float()
        mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-9)
        draw = seeded(seed, "calpit")
        order = torch.randperm(len(x), generator=draw)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=draw)))
            network = MonotoneNetwork(x.shape[1], hidden).to(x.device)
        made = cls(network, mean, std, floor, DEFAULT_CELLS, "std", source)
        scaled = made.standardize(x)
        valid, train = order.tensor_split([max(1, round(held_out * len(x)))])
        grid = torch.linspace(0.01, 0.99, 33, device=x.device)
        optimizer = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay)

        def loss(rows: Tensor, at: Tensor) -> Tensor:
            at = F.pad(F.pad(at.to(x.device), (1, 0), value=0.0), (0, 1), value=1.0)
            r = _rescaled(network.precise(at, scaled[rows], cells))[:, 1:-1].clamp(1e-6, 1 - 1e-6)
            return F.binary_cross_entropy(r, (pits[rows, None] <= at[:, 1:-1]).to(r.dtype))

        best, kept, history, waited = math.inf, network.state_dict(), list[float](), 0
        for _ in track(range(epochs), "Cal-PIT", enabled=progress):
            for rows in train[torch.randperm(len(train), generator=draw)].split(batch_size):
                optimizer.zero_grad()
                loss(rows, torch.rand(len(rows), alphas, generator=draw)).backward()
                optimizer.step()
            with torch.no_grad():
                history.append(float(loss(valid, grid.expand(len(valid), -1))))
            if history[-1] < best:
                best, waited = history[-1], 0
                kept = {name: value.clone() for name, value in network.state_dict().items()}
            else:
                waited += 1
                if waited >= patience:
                    break
        network.load_state_dict(kept)
        return cls(network, mean, std, floor, DEFAULT_CELLS, "std", source, tuple(history))


def _rescaled(r: Tensor) -> Tensor:
    """From values whose first and last are of alpha = 0 and 1."""
    return (r - r[:, :1]) / (r[:, -1:] - r[:, :1]).clamp(min=1e-12)


def _network_of(state: Mapping[str, Tensor]) -> MonotoneNetwork:
    widths: list[int] = []
    while (weight := state.get(f"net.{2 * len(widths)}.weight")) is not None:
        widths.append(len(weight))
    if len(widths) < 2:
        raise CheckpointError(f"the state dict has keys {sorted(state)[:4]}, wanted net.0.weight, ...")
    network = MonotoneNetwork(state["net.0.weight"].shape[1], widths[:-1])
    load_strict(network, dict(state))
    return network.eval()

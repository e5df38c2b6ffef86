"""Cal-PIT (Dey et al. 2022; section 2.8): a monotone network r(alpha; x) = P(PIT <= alpha | x) maps a CDF.

The network is the authors' (unconstrained monotonic network, Wehenkel and Louppe 2019), with their names of
tensors. Their quadrature evaluates 51 nodes for each of 400 alphas; here the integrand is evaluated once in
each cell of a grid that all alphas of an object share, and its integral is looked up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fusion_core.checkpoint import load_strict, load_tensors, save_tensors
from fusion_core.errors import check_range, check_shape
from fusion_core.progress import track
from fusion_core.seeding import generator as seeded
from mantis_photoz import density
from mantis_photoz.arrays import Array, as_tensor, to_numpy, wide
from mantis_photoz.errors import CheckpointError, DataError
from mantis_photoz.pchip import pchip_slopes
from mantis_photoz.pdf import BinnedPDF

__all__ = ["CalPIT", "MonotoneNetwork", "clenshaw_curtis", "official_transform", "smooth_masses"]

FEATURES = 83
DEFAULT_CELLS = 128
_BLOCK = 4_000_000  # activations that are held at once


def clenshaw_curtis(steps: int) -> tuple[Float[Tensor, " nodes"], Float[Tensor, " nodes"]]:
    """Nodes (from 1 down to -1) and weights of the Clenshaw-Curtis rule on [-1, 1].

    Args:
        steps: even; there are ``steps + 1`` nodes.

    Example:
        >>> nodes, weights = clenshaw_curtis(4)
        >>> round((weights * nodes**2).sum().item(), 12) == round(2 / 3, 12)
        True
    """
    check_range("steps", steps, 2, 10_000)
    k = torch.arange(steps + 1, dtype=torch.float64)
    j = torch.arange(1, steps // 2 + 1, dtype=torch.float64)
    b = torch.where(2 * j == steps, 1.0, 2.0) / (4 * j * j - 1)
    weights = 2 / steps * (1 - (torch.cos(2 * math.pi * k[:, None] * j / steps) * b).sum(1))
    weights[[0, -1]] /= 2
    return torch.cos(k * math.pi / steps), weights


class _Integrand(nn.Module):
    """A ReLU network of (alpha, x); ``ELU + 1`` makes it positive."""

    net: nn.Sequential

    def __init__(self, features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = _mlp(features + 1, hidden, 1)

    def forward(self, alpha: Tensor, first: Tensor) -> Tensor:
        """Values (batch, nodes) at alphas (nodes,) or (batch, nodes), given the x part of the first layer."""
        start, *layers = list(self.net)
        column = cast("nn.Linear", start).weight[:, 0]
        h = first[:, None, :] + alpha[..., None] * column
        for layer in layers:
            h = torch.relu_(h) if isinstance(layer, nn.ReLU) else layer(h)
        return F.elu(h[..., 0]) + 1

    def start(self, x: Tensor) -> Tensor:
        """(batch, width) of the first layer without alpha: the same for all nodes."""
        layer = cast("nn.Linear", self.net[0])
        return F.linear(x, layer.weight[:, 1:], layer.bias)


def _mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class MonotoneNetwork(nn.Module):
    """``sigmoid(exp(s(x)) int_0^alpha g(t, x) dt + o(x))``: increasing in alpha by construction.

    Args:
        features: of x; 83 for the authors'.
        hidden: widths of both networks.
        steps: of the authors' quadrature.

    State-dict names are the authors': ``integrand.net.{0,2,...}``, ``net.{0,2,...}``.

    Example:
        >>> sum(p.numel() for p in MonotoneNetwork().parameters())
        6473731
    """

    nodes: Tensor
    weights: Tensor

    def __init__(
        self, features: int = FEATURES, hidden: Sequence[int] = (1024,) * 4, steps: int = 50
    ) -> None:
        super().__init__()
        check_range("features", features, 1, 1_000_000)
        self.features, self.hidden = features, tuple(hidden)
        self.integrand = _Integrand(features, hidden)
        self.net = _mlp(features, hidden, 2)
        nodes, weights = clenshaw_curtis(steps)
        self.register_buffer("nodes", (nodes + 1) / 2, persistent=False)
        self.register_buffer("weights", weights / 2, persistent=False)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offset, scale = self.net(x).unbind(-1)
        return offset[:, None], scale.exp()[:, None]

    def exact(
        self, alpha: Float[Tensor, "batch alphas"], x: Float[Tensor, "batch features"]
    ) -> Float[Tensor, "batch alphas"]:
        """r(alpha; x) by the authors' quadrature: its nodes anew for each alpha.

        It is off the true integral by about 2e-6 in r where the ReLU network has kinks.
        """
        check_shape("x", x, "batch features", batch=len(alpha), features=self.features)
        offset, scale = self._ends(x)
        first = self.integrand.start(x)
        nodes = self.nodes.to(x)
        rows = max(1, _BLOCK // (max(self.hidden) * len(nodes) * alpha.shape[1]))
        parts = [
            (
                self.integrand((a[..., None] * nodes).flatten(1), f).unflatten(1, (*a.shape[1:], -1))
                * self.weights.to(x)
            ).sum(-1)
            for a, f in zip(alpha.split(rows), first.split(rows), strict=True)
        ]
        found = torch.cat(parts) * alpha
        return torch.sigmoid(scale * found + offset)

    def forward(
        self,
        alpha: Float[Tensor, "batch alphas"],
        x: Float[Tensor, "batch features"],
        cells: int = DEFAULT_CELLS,
    ) -> Float[Tensor, "batch alphas"]:
        """r(alpha; x) by one integration for all alphas of an object.

        Args:
            alpha: (batch, alphas) in [0, 1].
            x: (batch, features).
            cells: of the grid on [0, 1], >= 4; the integrand is evaluated once in each.

        Returns:
            (batch, alphas) in (0, 1), increasing in alpha.

        Raises:
            ShapeError: other features than the network's, or not one row per object.
        """
        return self.precise(alpha, x, cells).to(x.dtype)

    def precise(self, alpha: Tensor, x: Tensor, cells: int = DEFAULT_CELLS) -> Tensor:
        """:meth:`forward` with sums and sigmoid in float64: differences of r keep their digits."""
        check_shape("x", x, "batch features", batch=len(alpha), features=self.features)
        check_range("cells", cells, 4, 1_000_000)
        offset, scale = self._ends(x)
        first = self.integrand.start(x)
        nodes = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells).to(x)
        rows = max(1, _BLOCK // (max(self.hidden) * cells))
        g = wide(torch.cat([self.integrand(nodes, part) for part in first.split(rows)]))
        # The mean over a cell from its middle and its neighbours, and the slope there: of fourth order.
        bend = F.pad(g.diff(n=2, dim=-1), (1, 1), mode="replicate")
        ends = (g[:, 1:2] - g[:, :1], g[:, -1:] - g[:, -2:-1])
        slope = torch.cat([ends[0], (g[:, 2:] - g[:, :-2]) / 2, ends[1]], 1)
        mean = (g + bend / 24).clamp(min=0)
        slope = torch.minimum(torch.maximum(slope, -2 * mean), 2 * mean)  # never below 0 inside a cell
        total = F.pad(mean.cumsum(-1), (1, 0))
        place = wide(alpha).clamp(0, 1) * cells
        cell = place.detach().floor().long().clamp(max=cells - 1)
        u = place - cell
        inside = mean.gather(-1, cell) * u + slope.gather(-1, cell) * (u * u - u) / 2
        integral = (total.gather(-1, cell) + inside) / cells
        return torch.sigmoid(wide(scale) * integral + wide(offset))

    @torch.no_grad()
    def choose_cells(
        self, x: Float[Tensor, "batch features"], *, tolerance: float = 1e-5, start: int = 32
    ) -> int:
        """The smallest ``start * 2**n`` whose r agrees with that of twice as many cells."""
        alpha = torch.linspace(0, 1, 401, dtype=x.dtype, device=x.device).expand(len(x), -1)
        cells = start
        coarse = self(alpha, x, cells)
        while cells < 8192:
            fine = self(alpha, x, 2 * cells)
            if float((fine - coarse).abs().max()) <= tolerance:
                return cells
            cells, coarse = 2 * cells, fine
        return cells


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
        std: (features,) of it; the authors divide by the mean again (``norm="official"``, B3).
        floor: added to each mass first: 1e-6, the authors' 1e-2 (B14).
        cells: of the integrator.
    """

    network: MonotoneNetwork
    mean: Tensor
    std: Tensor
    floor: float = 1e-6
    cells: int = DEFAULT_CELLS
    norm: str = "std"
    history: tuple[float, ...] = field(default=(), repr=False)
    kind: ClassVar[str] = "calpit"

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
        """The settings; the weights are in :meth:`save`'s file."""
        named = {name: getattr(self, name) for name in ("floor", "cells", "norm")}
        return {**named, "hidden": list(self.network.hidden)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, statistics and settings to a ``.safetensors`` file."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        settings = torch.tensor([self.floor, self.cells, self.norm == "official"], dtype=torch.float64)
        tensors |= {"mean": self.mean, "std": self.std, "settings": settings}
        save_tensors(path, tensors, {"schema": "mantis.calpit/1"})

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
        floor, cells, official = tensors["settings"].tolist()
        return cls(
            _network_of(state),
            tensors["mean"],
            tensors["std"],
            floor,
            int(cells),
            "official" if official else "std",
        )

    @classmethod
    def from_official(
        cls, state: Mapping[str, Tensor], mean: Array, std: Array, *, floor: float = 1e-2, norm: str = "std"
    ) -> CalPIT:
        """From the authors' state dict (``integrand.net.*``, ``net.*``) and statistics of 83 features."""
        network = _network_of({name.removeprefix("module."): value for name, value in state.items()})
        return cls(network, wide(as_tensor(mean)), wide(as_tensor(std)), floor, 256, norm)

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
        made = cls(network, mean, std, floor, DEFAULT_CELLS)
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
        return cls(network, mean, std, floor, DEFAULT_CELLS, "std", tuple(history))


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

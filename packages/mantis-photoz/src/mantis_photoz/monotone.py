"""The authors' monotone network (Wehenkel and Louppe 2019): their names of tensors, a fast integrator.

Their quadrature evaluates 51 nodes for each of 400 alphas; here the integrand is evaluated once in each cell
of a grid that all alphas of an object share, and its integral is looked up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fusion_core.errors import check_range, check_shape
from mantis_photoz.arrays import wide

__all__ = ["DEFAULT_CELLS", "FEATURES", "MonotoneNetwork", "clenshaw_curtis"]

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

"""The benchmark: each part against the authors' way or the library of the field, in pairs, in one process.

Every entry of :data:`ROWS` makes rows; ``mantis-photoz bench --only cal-pit`` runs those whose name has it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_core.bench import Bench, Row, paired
from fusion_core.errors import ConfigError, FusionError, MissingExtraError
from mantis_photoz import density
from mantis_photoz.calpit import MonotoneNetwork

__all__ = ["ROWS", "rows", "run"]

Measure = Callable[[int, str], Sequence[Row]]
_PARTS = ("bench_read", "bench_simulate")
_CLASSES, _FEATURES = 400, 83
_CDF_TOLERANCE = 1e-5


def _network(device: str) -> MonotoneNetwork:
    """The authors' sizes, with weights that follow from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MonotoneNetwork().to(device).eval()


@torch.no_grad()
def repeated_quadrature(network: MonotoneNetwork, alpha: Tensor, x: Tensor) -> Tensor:
    """r(alpha; x) the authors' way: x is repeated for each of the 51 nodes of each alpha."""
    nodes, weights = network.nodes.to(x), network.weights.to(x)
    places = (alpha[..., None] * nodes).reshape(-1, 1)
    repeated = x.repeat_interleave(alpha.shape[1] * len(nodes), dim=0)
    g = torch.nn.functional.elu(network.integrand.net(torch.cat([places, repeated], 1))) + 1
    integral = (g.reshape(*alpha.shape, len(nodes)) * weights).sum(-1) * alpha
    offset, scale = network.net(x).unbind(-1)
    return torch.sigmoid(scale.exp()[:, None] * integral + offset[:, None])


@torch.no_grad()
def calpit_rows(repeats: int, device: str) -> list[Row]:
    """Cal-PIT of one object at the authors' 400 nodes: one shared integration against 51 nodes an alpha.

    Raises:
        FusionError: the CDFs differ by more than 1e-5.
    """
    network = _network(device)
    made = torch.Generator().manual_seed(1)
    alpha = torch.rand(1, _CLASSES, generator=made).sort().values.to(device)
    x = (torch.randn(1, _FEATURES, generator=made) / 3).to(device)
    wanted = repeated_quadrature(network, alpha, x)
    found: list[Row] = []
    for cells, target in ((64, ">= 100"), (128, ">= 60"), (256, ">= 40")):
        away = float((network(alpha, x, cells) - wanted).abs().max())
        if away > _CDF_TOLERANCE:
            raise FusionError(f"Cal-PIT with {cells} cells is off by {away:.2g}, wanted {_CDF_TOLERANCE:g}")
        found.append(
            paired(
                f"cal-pit, N = {cells}",
                lambda n=cells: network(alpha, x, n),
                lambda: repeated_quadrature(network, alpha, x),
                repeats=repeats,
                target=target,
                device=device,
                dtype="float32",
                against="51-node quadrature for each alpha",
                note=f"1 object, {_CLASSES} alphas, CDF differs by {away:.1g}",
            )
        )
    return found


def quadrature_crps(edges: Tensor, pmf: Tensor, z: Tensor, points: int = 4) -> Tensor:
    """CRPS by general numerical integration: trapezoids on a grid with ``points`` places a bin."""
    fine = torch.linspace(float(edges[0]), float(edges[-1]), points * pmf.shape[1] + 1, dtype=edges.dtype)
    fine = fine.to(edges.device)
    cdf = density.cdf(edges, pmf, fine.expand(len(pmf), -1))
    step = (fine >= z[:, None]).to(cdf.dtype)
    return torch.trapezoid((cdf - step).square(), fine)


def loop_crps(edges: Tensor, pmf: Tensor, z: Tensor) -> list[float]:
    """CRPS an object at a time by :func:`scipy.integrate.quad`, as a generic evaluation does it."""
    from scipy.integrate import quad

    limits = edges.numpy()
    found: list[float] = []
    for row, truth in zip(pmf.numpy(), z.tolist(), strict=True):
        steps = np.concatenate([[0.0], np.cumsum(row)])

        def gap(x: float, steps: Any = steps, truth: float = truth) -> float:
            return float((np.interp(x, limits, steps) - (x >= truth)) ** 2)

        halves = ((limits[0], truth), (truth, limits[-1]))
        parts: list[Any] = [quad(gap, a, b, limit=200, epsabs=1e-5, epsrel=1e-4) for a, b in halves if b > a]
        found.append(sum(float(part[0]) for part in parts))
    return found


def crps_rows(repeats: int, device: str) -> list[Row]:
    """Exact CRPS at 400 bins against quadrature per object and against a fine grid.

    Raises:
        FusionError: the values differ.
    """
    made = torch.Generator().manual_seed(0)
    edges = torch.linspace(0, 1.6, _CLASSES + 1, dtype=torch.float64)
    pmf = (torch.randn(8, _CLASSES, generator=made, dtype=torch.float64) * 2).softmax(-1)
    z = torch.rand(8, generator=made, dtype=torch.float64) * 1.6
    ours, theirs = density.crps(edges, pmf, z), torch.tensor(loop_crps(edges, pmf, z), dtype=torch.float64)
    if not torch.allclose(ours, theirs, atol=2e-5):
        raise FusionError("the closed form of the CRPS differs from quadrature")
    many = (torch.randn(2000, _CLASSES, generator=made, dtype=torch.float64) * 2).softmax(-1).to(device)
    truth, limits = (torch.rand(2000, generator=made, dtype=torch.float64) * 1.6).to(device), edges.to(device)
    return [
        paired(
            "crps, 8 objects",
            lambda: density.crps(edges, pmf, z),
            lambda: loop_crps(edges, pmf, z),
            repeats=repeats,
            target=">= 10",
            dtype="float64",
            against="scipy.integrate.quad per object",
            note=f"{_CLASSES} bins",
        ),
        paired(
            "crps, 2000 objects",
            lambda: density.crps(limits, many, truth),
            lambda: quadrature_crps(limits, many, truth),
            repeats=repeats,
            device=device,
            dtype="float64",
            against="trapezoids, 4 a bin",
            note=f"{_CLASSES} bins; the closed form is exact",
        ),
    ]


ROWS: dict[str, Measure] = {"cal-pit": calpit_rows, "crps": crps_rows}


def rows() -> dict[str, Measure]:
    """All measures: these, and those of reading and simulating where their modules are there."""
    found = dict(ROWS)
    for name in _PARTS:
        if importlib.util.find_spec(f"mantis_photoz.{name}"):
            found |= importlib.import_module(f"mantis_photoz.{name}").ROWS
    return found


def run(*, repeats: int = 5, only: Sequence[str] = (), device: str = "cpu") -> Bench:
    """Run the benchmark.

    Args:
        repeats: pairs per row.
        only: words; measures whose name contains one of them, all by default.
        device: of the tensor rows.

    Raises:
        ConfigError: no measure is called so.
    """
    known = rows()
    chosen = [measure for name, measure in known.items() if not only or any(word in name for word in only)]
    if not chosen:
        raise ConfigError(f"only is {list(only)}, wanted words of {', '.join(known)}")
    bench = Bench("mantis-photoz")
    for measure in chosen:
        try:
            made = measure(repeats, device)
        except MissingExtraError as error:
            sys.stderr.write(f"left out: {error}\n")
            continue
        for row in made:
            bench.add(row)
    return bench

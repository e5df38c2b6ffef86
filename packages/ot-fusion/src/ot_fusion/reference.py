"""The slow path that the benchmarks compare with: one input at a time, every activation stored, POT's solver.

Source: the order of work of the authors' code, on our specifications.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ot_fusion.config import FusionConfig
from ot_fusion.cost import normalize_cost
from ot_fusion.errors import InputError
from ot_fusion.hooks import Statistics, collect
from ot_fusion.plan import Plan
from ot_fusion.spec.types import AlignmentSpec

__all__ = ["ReferenceStatistics", "collect_reference", "exact_distances"]

Distances = Literal["exact", "torch"]


def exact_distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances by SciPy, in float64, difference by difference."""
    from scipy.spatial.distance import cdist

    return torch.from_numpy(cdist(x.double().numpy(), y.double().numpy()))


class ReferenceStatistics(Statistics):
    """Stored activations; costs and plans as the plain path computes them."""

    distances: Distances = "exact"

    def plan(
        self,
        names: list[str],
        config: FusionConfig,
        masses: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Plan:
        """The plan of stored activations by POT."""
        import ot

        if config.metric != "euclidean" or config.solver not in ("emd", "sinkhorn") or masses != (None, None):
            raise InputError(
                "the reference path has euclidean costs, uniform masses and the solvers emd and sinkhorn"
            )
        sides = [torch.cat([self.raw[name][side] for name in names], 1) for side in (0, 1)]
        cost = (
            exact_distances(*sides)
            if self.distances == "exact"
            else torch.cdist(sides[0].float(), sides[1].float())
        )
        cost = normalize_cost(cost.square() if config.squared else cost, config.normalize)
        host = cost.numpy()
        a, b = (np.full(n, 1 / n, dtype=host.dtype) for n in host.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if config.solver == "emd":
                found = ot.emd(a, b, host, numItermax=1_000_000)
            else:
                found = ot.sinkhorn(
                    a, b, host, config.regularization(), numItermax=config.max_iter, stopThr=config.tol
                )
        return Plan(torch.from_numpy(np.asarray(found)), config.map_rule, {"solver": "reference"})


def collect_reference(
    source: nn.Module,
    anchor: nn.Module,
    spec0: AlignmentSpec,
    spec1: AlignmentSpec,
    data: Any,
    config: FusionConfig,
    *,
    cdist: str = "exact",
) -> ReferenceStatistics:
    """Activations of one input at a time, all stored.

    Args:
        source: as in :func:`ot_fusion.hooks.collect`.
        anchor: as there.
        spec0: as there.
        spec1: as there.
        data: as there.
        config: as there.
        cdist: ``exact`` (SciPy, float64) or ``torch`` (its default, a matrix product for more than 25 rows).

    Raises:
        InputError: another ``cdist``.
    """
    if cdist not in ("exact", "torch"):
        raise InputError(f"reference is {cdist!r}, wanted exact or torch")
    found = collect(source, anchor, spec0, spec1, data, config.replace(batch_size=1), keep=True)
    stats = ReferenceStatistics(found.moments, found.sizes, found.raw, found.samples)
    stats.distances = "exact" if cdist == "exact" else "torch"
    return stats

"""What fusing and aligning return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fusion_core.atomic import PathLike
from fusion_core.report import Report
from ot_fusion.config import FusionConfig
from ot_fusion.plan import Plan
from ot_fusion.reporting import plan_rows

__all__ = ["Aligned", "Fused"]


@dataclass
class Aligned:
    """A source re-expressed in an anchor's coordinates.

    Attributes:
        model: of the anchor's class and shape; None where state dicts were given.
        maps: plans by activation (``flow``) or by space (``consistent``).
        state: its tensors.
        costs: what the solvers said.
    """

    model: nn.Module | None
    maps: dict[str, Plan]
    state: dict[str, Tensor] = field(repr=False)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]], repr=False)

    @property
    def report(self) -> Report:
        """Cost, identity share and entropy of every map."""
        return Report(title="Alignment", rows=plan_rows(self.maps, self.costs))


@dataclass
class Fused:
    """One network out of several.

    Attributes:
        model: of the anchor's class and shape; None where state dicts were given.
        maps: plans by activation or space; with more than two models ``source/activation``.
        state: its tensors.
        weights: of each model, summing to 1.
        anchor: name of the model whose coordinates it has.
        config: settings.
        costs: what the solvers said.
        aligned: per source, its tensors in the anchor's coordinates.
    """

    model: nn.Module | None
    maps: dict[str, Plan]
    state: dict[str, Tensor] = field(repr=False)
    weights: dict[str, float]
    anchor: str
    config: FusionConfig = field(repr=False)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]], repr=False)

    @property
    def report(self) -> Report:
        """Cost, identity share and entropy of every map."""
        return Report(title="Fusion", rows=plan_rows(self.maps, self.costs))

    def save_report(self, out: PathLike) -> None:
        """Write the report as a page with pictures: maps before and after sorting, and the costs.

        Args:
            out: a directory.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from ot_fusion.figures import save_map_report

        save_map_report(self.report, self.maps, out)

    def save_pretrained(
        self, out: PathLike, *, parents: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        """Write a model folder with ``maps.safetensors`` and ``ot_fusion.json``.

        It appears whole or not at all.

        Args:
            out: the folder.
            parents: paths of the parents by name, so that ``refuse`` finds them.
            overwrite: replace what is there.

        Raises:
            InputError: the folder is not empty, or there is no model.
        """
        from ot_fusion.storage import save_fused

        save_fused(self, out, parents=parents or {}, overwrite=overwrite)

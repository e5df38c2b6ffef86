"""Is transport the right tool for these models? Asked before any merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from torch import nn

from fusion_core.report import Report
from ot_fusion.config import FusionConfig
from ot_fusion.errors import InputError
from ot_fusion.fusing import align_states, settled, spec_of, state_of
from ot_fusion.metrics import state_distance
from ot_fusion.reporting import plan_rows

__all__ = ["Diagnosis", "diagnose"]

Verdict = Literal["average", "transport", "mixed"]
_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Report):
    """What hard maps between two models look like.

    Attributes:
        verdict: ``average``: the models are aligned already; ``transport``: their neurons come in different
            orders; ``mixed``: some layers are aligned.
        identity_share: share of neurons whose partner has the same index, over all maps.
        distance: of the weights, relative to the anchor's; infinite where shapes differ.
        sentence: what to do.
    """

    verdict: Verdict
    identity_share: float
    distance: float
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """The report's document and the verdict."""
        return super().to_dict() | {
            "verdict": self.verdict,
            "identity_share": self.identity_share,
            "distance": self.distance if self.distance != float("inf") else None,
            "sentence": self.sentence,
        }

    def print(self, console: Console | None = None) -> None:
        """The table and the sentence."""
        from fusion_core.comparison import data_console

        console = console or data_console()
        super().print(console)
        console.print(self.sentence, soft_wrap=True)


def diagnose(
    first: Any,
    second: Any,
    *,
    data: Any = None,
    spec: Any = None,
    config: FusionConfig | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Say whether plain averaging is the right tool: fine-tunes of one model are aligned already.

    Args:
        first: a module (or a state dict, with ``spec``).
        second: the other; the anchor of the maps.
        data: inputs for features ``acts``; without data weights are compared.
        spec: as in :func:`ot_fusion.fuse`.
        config: settings; the solver is made exact.
        progress: show a bar.

    Returns:
        A report with one row per map, and a verdict: more than 95 % of neurons matched with themselves means
        that plain averaging, task arithmetic or TIES are the tools to use.

    Raises:
        InputError, SpecError, ShapeError, DataError: as in :func:`ot_fusion.fuse`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> diagnose(net, net).verdict
        'average'
    """
    for name, model in (("first", first), ("second", second)):
        if not isinstance(model, nn.Module | Mapping):
            raise InputError(f"{name} is {type(model).__name__}, wanted a module or a state dict")
    spec1 = spec_of(second, spec, "anchor")
    base = config or FusionConfig(features="wts" if data is None else "acts", strategy="consistent")
    base = settled(base.replace(solver="emd"), spec1)
    _, maps, costs = align_states(first, second, spec_of(first, spec, "source"), spec1, data, base, progress)
    rows = plan_rows(maps, costs)
    total = sum(plan.matrix.shape[1] for plan in maps.values())
    share = sum(plan.identity_share() * plan.matrix.shape[1] for plan in maps.values()) / max(total, 1)
    distance = state_distance(state_of(first), state_of(second), list(spec1.tensors))
    if share > _SHARE:
        verdict: Verdict = "average"
        sentence = (
            f"{share:.1%} of the neurons are matched with themselves: the models share an ancestor or are "
            "aligned "
            "already. Do not transport: plain averaging, task arithmetic or TIES merge them better."
        )
    elif share > 0.5:
        verdict = "mixed"
        sentence = (
            f"{share:.1%} of the neurons are matched with themselves: some layers are aligned, others are "
            "not. "
            "Look at the table; average where the share is high (fuse_parts), transport the rest."
        )
    else:
        verdict = "transport"
        sentence = (
            f"Only {share:.1%} of the neurons are matched with themselves: averaging would destroy both "
            "models; "
            "align or fuse them by transport."
        )
    return Diagnosis(
        title="Diagnosis",
        rows=rows,
        verdict=verdict,
        identity_share=share,
        distance=distance,
        sentence=sentence,
    )

"""Does fusion help on my texts, and how? Members, static strengths and strategies side by side."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusion_core.errors import InputError
from fusion_core.report import Claim, Report
from fusion_core.stats import paired_t
from logit_fusion.config import FusionConfig
from logit_fusion.errors import UnpairedExpertWarning
from logit_fusion.score import Encoded, Scores, Text, encode, read_texts

if TYPE_CHECKING:
    from logit_fusion.model import FusedModel

__all__ = ["CalibrationReport", "calibrate", "compare", "sweep"]

STRATEGIES: dict[str, dict[str, Any]] = {
    "single (paper)": {"strategy": "single"},
    "centroid": {"strategy": "centroid", "weights": "uniform"},
    "pool, uniform": {"strategy": "pool", "weights": "uniform"},
    "pool, jeffreys": {"strategy": "pool", "weights": "jeffreys"},
    "pool, evidence": {"strategy": "pool", "weights": "evidence"},
}
_UNPAIRED = 5.0  # nats


@dataclass(frozen=True, kw_only=True)
class CalibrationReport(Report):
    """A table of methods on the same texts.

    Attributes:
        scores: method -> its scores.
        best: the method with the least negative log-likelihood.
    """

    scores: dict[str, Scores]
    best: str = ""

    def shown_rows(self) -> Any:
        """The table, its gap measures named in full."""
        return [
            {
                "method": row["method"],
                "NLL, nats per token": row["nll"],
                "top-1 %": 100 * row["top1"],
                "difference to large": row["difference"],
                "p": row["p"],
                "ratio of scores % (the papers' 'gap closed')": 100 * row["ratio_of_scores"],
                "gap closed %": None if row["gap_closed"] is None else 100 * row["gap_closed"],
            }
            for row in self.rows
        ]


@torch.no_grad()
def compare(
    model: FusedModel,
    encoded: Sequence[Encoded],
    methods: dict[str, FusionConfig],
    *,
    batch_size: int = 8,
    progress: bool | None = None,
) -> tuple[dict[str, Scores], float]:
    """Scores of every member and of fusions under several settings, in one reading of the texts.

    Args:
        model: a fusion.
        encoded: texts.
        methods: name -> settings.
        batch_size: texts per pass.
        progress: a bar; None: on a terminal.

    Returns:
        Scores by name (members first), and the median of KL(expert, base) + KL(base, expert) over all
        positions and experts, in nats.
    """
    names = model.engine.names
    parts: dict[str, list[Any]] = {name: [] for name in [*names, *methods]}
    evident = any(config.weights == "evidence" and config.alpha is None for config in methods.values())
    changes: Any = {"weights": "evidence", "alpha": None} if evident else {"weights": "uniform"}
    reading = model.settings.replace(**changes)
    jeffreys: list[Tensor] = []
    for read in read_texts(model, encoded, reading, batch_size=batch_size, progress=progress):
        for name, logits in zip(names, read.aligned, strict=True):
            wide = logits if logits.dtype == torch.float64 else logits.float()
            parts[name].append(read.scored(wide.log_softmax(-1)))
        for number, (name, config) in enumerate(methods.items()):
            weights = read.weights if config.weights == "evidence" else config.weights
            step = model.engine.fuse(config, read.aligned, weights).step
            step.check(["large", *names[1:]])
            parts[name].append(read.scored(step.log_probs))
            if number == 0:
                jeffreys.append((step.f + step.r)[read.mask].flatten())
    scores = {name: Scores.of(found, len(encoded)) for name, found in parts.items()}
    return scores, float(torch.cat(jeffreys).median()) if jeffreys else 0.0


def _report(
    title: str, scores: dict[str, Scores], experts: Sequence[str], claims: Sequence[Claim], target: str
) -> Any:
    large, goal = scores["large"], scores[target]
    rows: list[dict[str, Any]] = []
    for name, found in scores.items():
        test = paired_t(found.nll.tolist(), large.nll.tolist()) if name != "large" else None
        room = large.mean_nll - goal.mean_nll
        rows.append(
            {
                "method": f"expert {name}" if name in experts else name,
                "nll": found.mean_nll,
                "top1": found.top1,
                "difference": test and test.difference,
                "difference_low": test and test.low,
                "difference_high": test and test.high,
                "p": test and test.p,
                "ratio_of_scores": found.top1 / goal.top1 if goal.top1 else float("nan"),
                "gap_closed": (large.mean_nll - found.mean_nll) / room if abs(room) > 1e-12 else None,
            }
        )
    members = ("large", "base", *experts)
    best = min((name for name in scores if name not in members), key=lambda name: scores[name].mean_nll)
    return CalibrationReport(title=title, rows=rows, claims=claims, scores=scores, best=best)


@torch.no_grad()
def calibrate(
    model: FusedModel,
    texts: Sequence[Text],
    *,
    alphas: Sequence[float] = (0.5, 1.0, 1.5),
    target: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool | None = None,
) -> CalibrationReport:
    """Say before deployment whether fusion beats the large model, the experts and a static strength.

    Two measures of the gap are given, because papers print the first under the name of the second: the ratio
    of scores (here top-1 shares: method / target), and the gap closed (large - method) / (large - target) of
    the negative log-likelihood. Nothing is changed in the model.

    Args:
        model: a fusion.
        texts: as in :func:`logit_fusion.score.score`; fifty prompts with answers say much.
        alphas: static strengths to set beside; shared evenly by several experts.
        target: whose scores stand for what could be reached, a member's name; None is the best expert.
        batch_size: texts per pass.
        max_length: most tokens of a text.
        progress: a bar; None: on a terminal.

    Raises:
        InputError: no texts, or an unknown target.

    Warns:
        UnpairedExpertWarning: the median of the Jeffreys divergence of expert and base is over 5 nats.
    """
    experts = model.engine.names[2:]
    count = len(experts)
    plain: Any = {"alpha": None, "per_expert_range": None}
    methods = {
        f"static {alpha:g}" + (" (shared)" if count > 1 else ""): model.settings.replace(alpha=alpha / count)
        for alpha in alphas
    }
    rules = STRATEGIES if count > 1 else {"dynamic": {"strategy": "single", "weights": "uniform"}}
    methods |= {name: model.settings.replace(**plain, **rule) for name, rule in rules.items()}
    if count == 1:
        methods["dynamic, evidence"] = model.settings.replace(**plain, **STRATEGIES["pool, evidence"])
    encoded = encode(model, texts, max_length)
    scores, jeffreys = compare(model, encoded, methods, batch_size=batch_size, progress=progress)
    if target is not None and target not in model.engine.names:
        raise InputError(f"target is {target!r}, wanted one of {model.engine.names}")
    goal = target or min(experts, key=lambda name: scores[name].mean_nll)
    if jeffreys > _UNPAIRED:
        warnings.warn(
            f"the median Jeffreys divergence of expert and base is {jeffreys:.1f} nats: they do not look "
            "like a "
            "model and its fine-tune",
            UnpairedExpertWarning,
            stacklevel=2,
        )
    return _report("Calibration", scores, experts, _claims(scores, list(methods), goal, len(alphas)), goal)


def _claims(scores: dict[str, Scores], methods: list[str], goal: str, statics: int) -> list[Claim]:
    dynamic = min(methods[statics:], key=lambda name: scores[name].mean_nll)
    ours = scores[dynamic]
    rivals = {"the large model": "large", f"the expert {goal}": goal}
    if statics:
        rivals["the best static strength"] = min(methods[:statics], key=lambda name: scores[name].mean_nll)
    found: list[Claim] = []
    for text, name in rivals.items():
        test = paired_t(ours.nll.tolist(), scores[name].nll.tolist())
        sure = "" if test.p is None else f", p {test.p:.3g} over texts"
        found.append(
            Claim(
                f"Dynamic fusion beats {text} on these texts",
                "",
                ours.mean_nll < scores[name].mean_nll and (test.p is None or test.p < 0.05),
                f"{dynamic}: {ours.mean_nll:.4f} nats per token, {name}: {scores[name].mean_nll:.4f}{sure}.",
            )
        )
    return found


@torch.no_grad()
def sweep(
    model: FusedModel,
    texts: Sequence[Text],
    alphas: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0),
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool | None = None,
) -> CalibrationReport:
    """Static strengths side by side with the model's own settings.

    Args:
        model: a fusion.
        texts: as in :func:`logit_fusion.score.score`.
        alphas: finite numbers, shared evenly by several experts.
        batch_size: texts per pass.
        max_length: most tokens of a text.
        progress: a bar; None: on a terminal.

    Raises:
        InputError: no texts, no alphas, or one that is not finite.
    """
    if not len(alphas) or not np.isfinite(np.asarray(alphas, float)).all():
        raise InputError(f"alphas is {list(alphas)}, wanted finite numbers")
    experts = model.engine.names[2:]
    methods = {f"static {alpha:g}": model.settings.replace(alpha=alpha / len(experts)) for alpha in alphas}
    methods["as set"] = model.settings
    encoded = encode(model, texts, max_length)
    scores, _ = compare(model, encoded, methods, batch_size=batch_size, progress=progress)
    goal = min(experts, key=lambda name: scores[name].mean_nll)
    return _report("Sweep of static strengths", scores, experts, (), goal)

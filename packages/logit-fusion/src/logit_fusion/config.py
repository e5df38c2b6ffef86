"""The settings of a fusion, checked, and written to ``fusion.json`` beside the members."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fusion_core.config import Config
from fusion_core.errors import LARGEST, ConfigError, check_range

Strategy = Literal["single", "joint", "centroid", "pool"]
Solver = Literal["exact", "grid", "newton"]
Objective = Literal["paper", "forward", "reverse", "jeffreys"]
Pairing = Literal["main", "swapped"]
Outside = Literal["forbid", "large"]
Validate = Literal["lazy", "eager"]
WeightRule = Literal["uniform", "jeffreys", "evidence"]

CONFIG_NAME = "fusion.json"
MOST_CELLS = 1 << 16


@dataclass(frozen=True)
class ViewConfig(Config):
    """What one member reads in place of the shared prompt; generated tokens are common to all.

    Attributes:
        prefix: text put before the prompt: few-shot examples, retrieved context.
        suffix: text put after the prompt.
        chat: whether the prompt goes through the member's chat template as the user's message.
        system: the system message of that chat, none by default.
    """

    prefix: str = ""
    suffix: str = ""
    chat: bool = False
    system: str | None = None


@dataclass(frozen=True)
class MemberConfig(Config):
    """Where one member comes from.

    Attributes:
        source: a folder or a hub name.
        adapter: a LoRA adapter on top of ``source``, none by default.
        dtype: the weights' dtype, ``"auto"`` or a name.
        device: ``"auto"``, ``"cpu"``, ``"cuda:0"`` and so on.
    """

    source: str
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class FusionConfig(Config):
    """Every setting of a fusion; :meth:`fuse_arguments` gives those of ``fuse_logits``.

    Attributes:
        strategy: how several experts share the shift: ``"pool"`` (log-linear pool, recommended),
            ``"centroid"``, ``"single"`` (the paper: one active expert a step) or ``"joint"``.
        weights: how much each expert counts in ``pool`` and ``centroid``: ``"uniform"``, ``"jeffreys"``,
            ``"evidence"`` or one number per expert.
        evidence_decay: gamma in (0, 1], how slowly ``weights="evidence"`` forgets.
        alpha: static strength of the shift, one number or one per expert; None searches it at each step.
        objective: ``"paper"`` (both divergences), ``"forward"``, ``"reverse"`` or ``"jeffreys"``.
        pairing: ``"main"`` (the paper's main text) or ``"swapped"`` (its appendix).
        solver: ``"exact"``, ``"grid"`` (the paper's) or ``"newton"`` (cheapest, no guarantee).
        certify: report whether the global minimum is proven, row by row.
        alpha_range: (low, high) of alpha, 0 <= low < high.
        step: spacing of the grid; high - low holds it 1 to 65,536 times.
        per_expert_range: one range per expert, for ``strategy="single"``.
        kl_temperature: divides all logits while alpha is sought, > 0.
        max_kl: greatest KL(fused, large) in nats at any step, >= 0; None sets no bound.
        outside: tokens that some member cannot say are forbidden, or keep the large model's logit.
        plausibility: tokens below this share of the large model's greatest probability are forbidden, in
            [0, 1); 0 forbids none (contrastive decoding takes 0.1).
        validate: NaN and +inf are reported at the end (``"lazy"``) or at once (``"eager"``).
        padded: ids above the shared vocabulary are forbidden, or kept unshifted.
        align: members' ids agree (``"id"``), or tokens are matched by their strings.
        min_overlap: share of common token strings below which members are refused, in [0, 1].
        large: where the large model comes from, if the settings stand beside no weights of it.
        base: the same for the small base.
        experts: the same for the experts, by name, in order.
        views: what a member reads in place of the shared prompt, by name; ``"large"``, ``"base"`` or an
            expert's.

    Raises:
        ConfigError: a value outside its range; the message names it.

    Example:
        >>> FusionConfig(strategy="single").replace(step=0.05).step
        0.05
        >>> FusionConfig(alpha_range=(1.0, 0.5))
        Traceback (most recent call last):
        fusion_core.errors.ConfigError: alpha_range is (1.0, 0.5), wanted finite (low, high), 0 <= low < high
    """

    strategy: Strategy = "pool"
    weights: WeightRule | tuple[float, ...] = "uniform"
    evidence_decay: float = 0.97
    alpha: float | tuple[float, ...] | None = None
    objective: Objective = "paper"
    pairing: Pairing = "main"
    solver: Solver = "exact"
    certify: bool = False
    alpha_range: tuple[float, float] = (0.0, 2.0)
    step: float = 0.1
    per_expert_range: tuple[tuple[float, float], ...] | None = None
    kl_temperature: float = 1.0
    max_kl: float | None = None
    outside: Outside = "forbid"
    plausibility: float = 0.0
    validate: Validate = "lazy"
    padded: Literal["forbid", "keep"] = "forbid"
    align: Literal["id", "string"] = "id"
    min_overlap: float = 0.95
    large: MemberConfig | None = None
    base: MemberConfig | None = None
    experts: dict[str, MemberConfig] = field(default_factory=dict[str, MemberConfig])
    views: dict[str, ViewConfig] = field(default_factory=dict[str, ViewConfig])

    def __post_init__(self) -> None:
        check_alpha_range("alpha_range", self.alpha_range)
        check_step(self.step, self.alpha_range)
        for number, pair in enumerate(self.per_expert_range or ()):
            check_alpha_range(f"per_expert_range[{number}]", pair)
        self.check_fields("alpha", low=-LARGEST)
        self.check_fields("kl_temperature", open=True)
        self.check_fields("max_kl", high=math.inf)
        if not 0.0 < self.evidence_decay <= 1.0:
            raise ConfigError(f"evidence_decay is {self.evidence_decay!r}, wanted a number in (0, 1]")
        check_range("min_overlap", self.min_overlap, 0.0, 1.0)
        if not 0.0 <= self.plausibility < 1.0:
            raise ConfigError(f"plausibility is {self.plausibility!r}, wanted a number in [0, 1)")

    def fuse_arguments(self) -> dict[str, Any]:
        """The keyword arguments of :func:`logit_fusion.fuse_logits` that the settings hold.

        ``weights="evidence"`` stands in it as it is: who keeps the evidence replaces it by a tensor.
        """
        names = (
            "strategy", "weights", "alpha", "objective", "pairing", "solver", "certify", "alpha_range",
            "step", "per_expert_range", "kl_temperature", "max_kl", "outside", "validate",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def check_alpha_range(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """The range, if it is finite with 0 <= low < high.

    Raises:
        ConfigError: it is not; the message holds the name and the value.
    """
    try:
        low, high = value
        good = 0.0 <= low < high <= LARGEST
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ConfigError(f"{name} is {value!r}, wanted finite (low, high), 0 <= low < high")
    return float(value[0]), float(value[1])


def check_step(step: float, alpha_range: tuple[float, float]) -> float:
    """The spacing, if it divides the range into 1 to 65,536 cells.

    Raises:
        ConfigError: it does not.
    """
    width = alpha_range[1] - alpha_range[0]
    if not width / MOST_CELLS <= step <= width * (1.0 + 1e-9):
        raise ConfigError(
            f"step is {step!r}, wanted a number in [{width / MOST_CELLS:.3g}, {width:g}]: 1 to {MOST_CELLS} "
            "cells over the width of alpha_range"
        )
    return float(step)

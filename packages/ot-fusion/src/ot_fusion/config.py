"""Every setting of a fusion, with the published code's side of each difference as a switch."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_type_hints

from fusion_core.config import Config
from fusion_core.errors import LARGEST, LARGEST_SEED, ConfigError
from ot_fusion.cost import Metric, Normalize
from ot_fusion.errors import InputError
from ot_fusion.plan import Normalization
from ot_fusion.policies import Residual
from ot_fusion.solvers import Solver

__all__ = ["FusionConfig", "Legal", "Strategy"]

Strategy = Literal["flow", "consistent"]
Legal = Literal["enforce", "warn", "off"]
Rule = Literal["ours", "official"]

_PER_SPACE = {
    "solver",
    "reg",
    "reg_m",
    "metric",
    "squared",
    "normalize",
    "features",
    "transform",
    "max_iter",
    "tol",
}


@dataclass(frozen=True)
class FusionConfig(Config):
    """Settings of :func:`ot_fusion.fuse` and :func:`ot_fusion.align`.

    Attributes:
        strategy: ``flow`` (the paper's: one map per activation, merged at sums) or ``consistent`` (one plan
            per space, hard ones keep the function exactly).
        features: ``acts`` (activations of data) or ``wts`` (incoming weights).
        samples: at most this many input rows are read for activations.
        tokens: which tokens count: ``all``, ``cls``, ``window:k`` (class token and the central k x k
            patches).
        transform: per channel: ``std``, ``center``, ``norm`` (unit L2 over samples), ``none``.
        metric, squared, normalize, clip: the ground cost; ``clip`` is in multiples of ``reg``.
        solver, reg, reg_m, max_iter, tol: the transport; ``reg`` None is 0.08 for acts and 0.06 for wts.
        normalization: how maps come of plans, see :class:`Plan`; None is ``paper``.
        residual: how maps merge at sums.
        qk: maps of queries and keys: ``separate``, ``shared`` (one map), ``joint`` (one map of twice the
            size).
        alpha: weight of the ANCHOR, in [0, 1]; None is 1 / number of models. ``weights`` of ``fuse`` replaces
            it.
        row_norm: in wts mode each feature row is divided by its norm.
        wts_bias: in wts mode the bias is one more feature.
        importance: masses: ``none`` (uniform), ``l1`` or ``l2`` (norms of the weight rows).
        legal: ``enforce`` legal maps only, ``warn`` of illegal ones, ``off``; None enforces for decoders.
        last_block_tokens: ``cls``: the last block's output and MLP are compared on the class token alone,
            where the head reads only that; ``same``: the tokens of the other blocks.
        class_token: ``stream`` (the default) or ``own_map``, the authors' choice.
        transport_last: the last layer gets a map of its own (the predecessor's option).
        fuse_parts: glob patterns of parameters that are fused; all others come from the anchor.
        seed: of random orders.
        batch_size: rows per forward.
        faithful: ``ours``, or ``official``: the authors' code with its defects, for every setting below and
            for ``normalization``, ``class_token`` and ``legal`` where they are None.
        alpha_rule: ``official``: blocks are averaged half and half whatever ``alpha``.
        residual_weights: ``official``: weighted policies measure the transformed activations.
        joint_order: ``official``: joint maps stack activations as keys, queries.
        identity_skip: ``official``: a sum without an incoming map takes the branch's map.
        post_norm: ``official``: a block's second norm is averaged with the branch's map, before the merge.
        shortcut: ``official``: a shortcut's own map leaves the sum (the predecessor's ResNets).
        unfused: ``official``: what is not fused comes from the source (norms, attention, MLP).
        overrides: glob of activation or space names -> settings of those (solver, reg, metric, ...).
    """

    strategy: Strategy = "flow"
    features: Literal["acts", "wts"] = "acts"
    samples: int | None = 200
    tokens: str = "all"
    transform: Literal["std", "center", "norm", "none"] = "std"
    metric: Metric = "euclidean"
    squared: bool = False
    normalize: Normalize = "max"
    clip: tuple[float, float] | None = None
    solver: Solver | Literal["gromov"] = "sinkhorn"
    reg: float | None = None
    reg_m: float = 1.0
    max_iter: int = 1000
    tol: float = 1e-9
    normalization: Normalization | None = None
    residual: Residual = "mean"
    qk: Literal["separate", "shared", "joint"] = "separate"
    alpha: float | None = None
    row_norm: bool = True
    wts_bias: bool = False
    importance: Literal["none", "l1", "l2"] = "none"
    legal: Legal | None = None
    last_block_tokens: Literal["cls", "same"] = "cls"
    class_token: Literal["stream", "own_map"] | None = None
    transport_last: bool = False
    fuse_parts: tuple[str, ...] = ("*",)
    seed: int = 0
    batch_size: int = 32
    faithful: Rule = "ours"
    alpha_rule: Rule | None = None
    residual_weights: Rule | None = None
    joint_order: Rule | None = None
    identity_skip: Rule | None = None
    post_norm: Rule | None = None
    shortcut: Rule | None = None
    unfused: Rule | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(f"alpha is {self.alpha}, wanted the anchor's weight in [0, 1]")
        self.check_fields("reg", open=True)
        self.check_fields("reg_m", high=math.inf)  # infinity is balanced transport
        self.check_fields("clip", low=-LARGEST)
        self.check_fields("samples", "batch_size", "max_iter", low=1)
        self.check_fields("tol")
        self.check_fields("seed", high=LARGEST_SEED)
        if self.clip is not None and self.clip[0] > self.clip[1]:
            raise InputError(f"clip is {self.clip}, wanted a lower end that is not above the upper one")
        if not (self.tokens in ("all", "cls") or self.tokens.removeprefix("window:").isdigit()):
            raise InputError(f"tokens is {self.tokens!r}, wanted all, cls or window:k such as window:6")
        for pattern, settings in self.overrides.items():
            unknown = sorted(set(settings) - _PER_SPACE)
            if unknown:
                raise ConfigError(
                    f"overrides[{pattern!r}] has {unknown}, wanted some of {', '.join(sorted(_PER_SPACE))}"
                )
            self._checked(settings)

    def _checked(self, settings: dict[str, Any]) -> None:
        hints = get_type_hints(type(self))
        for name, value in settings.items():
            choices = get_args(hints[name])
            words = [c for choice in choices for c in (get_args(choice) or (choice,)) if isinstance(c, str)]
            if words and value not in words:
                raise ConfigError(f"overrides: {name} is {value!r}, wanted one of {', '.join(words)}")

    def official_side(self, name: str) -> bool:
        """Whether one of the seven rules follows the authors' code: its own setting, else ``faithful``.

        Example:
            >>> FusionConfig(faithful="official", shortcut="ours").official_side("shortcut")
            False
        """
        return (getattr(self, name) or self.faithful) == "official"

    @property
    def map_rule(self) -> Normalization:
        """``normalization`` with its default."""
        return self.normalization or ("official" if self.faithful == "official" else "paper")

    @property
    def token_on_stream(self) -> bool:
        """Whether the class token takes the stream's map; ``class_token`` with its default."""
        return (self.class_token or ("own_map" if self.faithful == "official" else "stream")) == "stream"

    def regularization(self) -> float:
        """``reg``, or the paper's value for the features."""
        return self.reg if self.reg is not None else (0.08 if self.features == "acts" else 0.06)

    def at(self, name: str) -> FusionConfig:
        """The settings of one activation or space: the overrides that match its name, later ones first.

        Example:
            >>> FusionConfig(overrides={"*.mlp": {"solver": "emd"}}).at("blocks.0.mlp").solver
            'emd'
        """
        found: dict[str, Any] = {}
        for pattern, settings in self.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                found |= settings
        return replace(self, **found, overrides={}) if found else self

    def fuses(self, key: str) -> bool:
        """Whether a parameter is fused at all."""
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in self.fuse_parts)

    @classmethod
    def official(cls, **settings: Any) -> FusionConfig:
        """The authors' code with its defects: the official side of every rule."""
        defaults: dict[str, Any] = {"faithful": "official", "legal": "off"}
        return cls(**(defaults | settings))

    @classmethod
    def paper_vit(cls, **settings: Any) -> FusionConfig:
        """The paper's vision transformer: activations of 200 images, central window, Sinkhorn 0.08."""
        defaults: dict[str, Any] = {"tokens": "window:6", "legal": "off"}
        return cls(**(defaults | settings))

    @classmethod
    def paper_bert(cls, **settings: Any) -> FusionConfig:
        """The paper's BERT: all tokens, Sinkhorn 0.08."""
        defaults: dict[str, Any] = {"legal": "off"}
        return cls(**(defaults | settings))

    @classmethod
    def otfusion(cls, **settings: Any) -> FusionConfig:
        """The predecessor: exact plans of raw weights or activations (arXiv 1910.05653)."""
        defaults: dict[str, Any] = {
            "features": "wts",
            "solver": "emd",
            "normalize": "none",
            "transform": "none",
            "row_norm": False,
            "normalization": "otfusion",
            "legal": "off",
            "identity_skip": "official",
            "shortcut": "official",
        }
        return cls(**(defaults | settings))

    @classmethod
    def git_rebasin(cls, **settings: Any) -> FusionConfig:
        """Git Re-Basin's weight matching: one hard, legal plan per space (arXiv 2209.04836)."""
        defaults: dict[str, Any] = {
            "strategy": "consistent",
            "features": "wts",
            "solver": "lsa",
            "row_norm": False,
            "legal": "enforce",
        }
        return cls(**(defaults | settings))

"""The whole method on logits: targets, strategy, solver, fused log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from logit_fusion.config import Objective, Outside, Pairing, Solver, Strategy, Validate, WeightRule

Weights = (
    WeightRule | Sequence[float] | Float[Tensor, "*batch experts"] | Callable[[Tensor, Tensor], Tensor]
)


@dataclass(frozen=True, slots=True, eq=False)
class FusionStep:
    """One fused step, row by row; all tensors on the device of the large model's logits.

    Attributes:
        log_probs: (..., vocab) fused log-probabilities, -inf outside the support.
        alpha: (..., T) strength of each expert's shift.
        f: (..., T) KL(expert, base) in nats.
        r: (..., T) KL(base, expert) in nats.
        kl_forward: (...) F = KL(fused, large) at ``alpha`` (at ``kl_temperature``, like f and r).
        kl_reverse: (...) R = KL(large, fused).
        loss: (...) objective at ``alpha``; 0 for a static alpha.
        expert: (...) index of the greatest alpha, -1 where all are 0.
        certified: (...) whether the minimum is proven to be the global one; False unless asked for.
        non_finite: (..., T + 2) whether the logits of large, base and experts hold NaN or +inf in the row.
        empty: (...) whether no token is left in the row.
    """

    log_probs: Float[Tensor, "*batch vocab"]
    alpha: Float[Tensor, "*batch experts"]
    f: Float[Tensor, "*batch experts"]
    r: Float[Tensor, "*batch experts"]
    kl_forward: Float[Tensor, "*batch"]
    kl_reverse: Float[Tensor, "*batch"]
    loss: Float[Tensor, "*batch"]
    expert: Int64[Tensor, "*batch"]
    certified: Bool[Tensor, "*batch"]
    non_finite: Bool[Tensor, "*batch members"]
    empty: Bool[Tensor, "*batch"]

    def check(self, names: Sequence[str] | None = None) -> None:
        """Raise if a row was unusable; one device synchronisation.

        Args:
            names: of the members: large, base, experts.

        Raises:
            NonFiniteLogitsError: names the member and the first row with NaN or +inf.
            EmptySupportError: names the first row without a token.
        """
        raise NotImplementedError


def fuse_logits(
    large: Float[Tensor, "*batch vocab"],
    base: Float[Tensor, "*batch vocab"],
    experts: Sequence[Tensor] | Float[Tensor, "experts *batch vocab"],
    *,
    strategy: Strategy = "pool",
    weights: Weights = "uniform",
    alpha: float | Sequence[float] | None = None,
    objective: Objective = "paper",
    pairing: Pairing = "main",
    solver: Solver = "exact",
    certify: bool = False,
    alpha_range: tuple[float, float] = (0.0, 2.0),
    step: float = 0.1,
    per_expert_range: Sequence[tuple[float, float]] | None = None,
    kl_temperature: float = 1.0,
    max_kl: float | None = None,
    mask: Bool[Tensor, "*#batch vocab"] | None = None,
    active: Bool[Tensor, "*batch"] | None = None,
    outside: Outside = "forbid",
    validate: Validate = "lazy",
    differentiable: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
) -> FusionStep:
    """Shift the large model's logits by what fine-tuning did to the small ones, as far as the KLs allow.

    Args:
        large: (..., vocab) logits of the large model; a row is one position of one sequence.
        base: (..., vocab) logits of the small base.
        experts: T of (..., vocab), or one (T, ..., vocab).
        strategy: see :class:`~logit_fusion.FusionConfig`; with one expert all four are the same.
        weights: of ``pool`` and ``centroid``: a rule, T numbers >= 0 (scaled to sum 1), a (T) or (..., T)
            tensor (taken as it is, sum at most 1), or a function of f and r that returns one.
            ``"evidence"`` needs a history, which this function has not: hand it the (..., T) tensor of
            :func:`~logit_fusion.evidence.evidence_weights`.
        alpha: static strength, one number or T, any sign; no search then.
        objective: what is matched.
        pairing: F with f and R with r (``"main"``), or crosswise.
        solver: ``"exact"``, ``"grid"`` or ``"newton"``.
        certify: prove the global minimum row by row (costs scalars only).
        alpha_range: (low, high), 0 <= low < high.
        step: spacing of the grid.
        per_expert_range: T ranges, ``strategy="single"`` only.
        kl_temperature: > 0, divides the logits of all members while alpha is sought.
        max_kl: bound on KL(fused, large) in nats.
        mask: (vocab) or (..., vocab), True = the token takes part.
        active: (...) rows that still decode; the others get alpha 0.
        outside: tokens outside the support (mask, or -inf in any member) get -inf, or keep the large
            model's log-probability (``"large"``; masked ones are -inf all the same).
        validate: ``"eager"`` calls :meth:`FusionStep.check` at once; ``"lazy"`` leaves it to the caller.
        differentiable: keep the graph; alpha of ``exact`` and ``newton`` then has its implicit gradient.
        compute_dtype: float32 or float64; narrower logits are widened, float64 logits stay float64.
        out_dtype: of the floating results, ``compute_dtype`` by default.

    Returns:
        The fused step.

    Raises:
        VocabularyMismatchError: members of different shapes.
        InputError: no expert, or a setting outside its range; the message holds the value.
        NonFiniteLogitsError, EmptySupportError: with ``validate="eager"``.
    """
    raise NotImplementedError

"""The whole method on logits: targets, strategy, solver, fused log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fusion_core.errors import InputError
from logit_fusion.arguments import (
    Strengths,
    Weights,
    check_choice,
    check_scales,
    check_search,
    expert_weights,
    member_rows,
    row_mask,
    strengths,
)
from logit_fusion.arrays import as_tensor
from logit_fusion.config import Objective, Outside, Pairing, Solver, Strategy, Validate
from logit_fusion.errors import EmptySupportError, NonFiniteLogitsError
from logit_fusion.joint import joint
from logit_fusion.kernels import make_family, prepared
from logit_fusion.objective import loss
from logit_fusion.solve import Solution, solve
from logit_fusion.strategies import Search, Steered, aim_at, centroid, mean_shift, pool, single, static
from logit_fusion.targets import Prepared


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
        if not bool(self.non_finite.any() | self.empty.any()):
            return
        if bool(self.non_finite.any()):
            *row, member = (int(i) for i in self.non_finite.nonzero()[0])
            known = names or ["large", "base", *(f"experts[{t}]" for t in range(self.alpha.shape[-1]))]
            raise NonFiniteLogitsError(
                f"logits of {known[member]!r} hold NaN or +inf in row {_row(row)}; wanted finite ones or -inf"
            )
        row = [int(i) for i in self.empty.nonzero()[0]]
        raise EmptySupportError(
            f"no token is left in row {_row(row)}; wanted one that the mask allows and that is finite in all "
            "members"
        )


def _row(index: list[int]) -> str:
    return str(index[0]) if len(index) == 1 else str(tuple(index))


def fuse_logits(
    large: Float[Tensor, "*batch vocab"],
    base: Float[Tensor, "*batch vocab"],
    experts: Sequence[Tensor] | Float[Tensor, "experts *batch vocab"],
    *,
    strategy: Strategy = "pool",
    weights: Weights = "uniform",
    alpha: Strengths | None = None,
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
        alpha: static strength of any sign, one number, T numbers or a (T) or (..., T) tensor; no search then.
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

    Example:
        >>> large, base = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])
        >>> step = fuse_logits(large, base, [torch.tensor([0.0, 2.0, 1.0])])
        >>> step.alpha.shape, int(step.log_probs.argmax())
        (torch.Size([1]), 1)
    """
    rows = member_rows(large, base, experts)
    batch, count = large.shape[:-1], len(rows) - 2
    check_choice("strategy", strategy, get_args(Strategy))
    check_choice("objective", objective, get_args(Objective))
    check_choice("pairing", pairing, get_args(Pairing))
    check_choice("solver", solver, get_args(Solver))
    check_choice("outside", outside, get_args(Outside))
    check_choice("validate", validate, get_args(Validate))
    if compute_dtype not in (torch.float32, torch.float64):
        raise InputError(f"compute_dtype is {compute_dtype}, wanted torch.float32 or torch.float64")
    ranges = check_search(alpha_range, step, per_expert_range, count, strategy)
    check_scales(kl_temperature, max_kl)
    mask = row_mask("mask", mask, large.shape, large.device)
    active = row_mask("active", active, batch, large.device)
    dtype = compute_dtype
    for member in rows:
        dtype = torch.promote_types(dtype, member.dtype)
    search = Search(objective, pairing, solver, alpha_range, step, certify, differentiable)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        flat_mask = None if mask is None else mask.reshape(-1, large.shape[-1])
        members, support = prepared(rows, flat_mask, dtype, differentiable=differentiable)
        warm = members
        if kl_temperature != 1.0:
            scaled = [member.to(dtype) / kl_temperature for member in rows]
            warm, _ = prepared(scaled, flat_mask, dtype, differentiable=differentiable)
        if alpha is not None:
            steered = static(warm, strengths(alpha, warm.f, batch), differentiable=differentiable)
        elif strategy == "single" or (count == 1 and not (isinstance(weights, Tensor) or callable(weights))):
            if strategy != "single":  # no weight to choose, but a wrong one is still told
                expert_weights(weights, warm.f, warm.r, batch)
            steered = single(warm, search, ranges)
        elif strategy == "joint":
            steered = joint(warm, search)
        else:
            share = expert_weights(weights, warm.f, warm.r, batch)
            steered = (pool if strategy == "pool" else centroid)(warm, search, share)
        flat_active = None if active is None else active.reshape(-1)
        fused = _finish(members, warm, steered, search, max_kl, flat_active)
        log_probs = fused.log_probs
        if support is not None and outside == "large":
            log_probs = _keep_outside(rows[0].to(dtype), flat_mask, support, log_probs)
        step_ = _result(fused, warm, log_probs, rows, flat_mask, support, batch, out_dtype or dtype)
    if validate == "eager":
        step_.check()
    return step_


@dataclass(frozen=True, slots=True, eq=False)
class _Fused:
    log_probs: Tensor
    alpha: Tensor
    found: Solution


def _finish(
    members: Prepared,
    warm: Prepared,
    steered: Steered,
    search: Search,
    max_kl: float | None,
    active: Tensor | None,
) -> _Fused:
    """Fused log-probabilities at temperature 1, after the bound and without the rows that are done."""
    graph = search.differentiable
    alpha, direction, length, found, target = steered
    log_norm = found.log_norm
    if members is not warm:
        direction, length = mean_shift(members.shifts, alpha), torch.ones_like(length)
        family = make_family(members.log_p, members.p, direction, differentiable=graph)
        log_norm = as_tensor(family.normalizer(length)[0])
    if max_kl is not None:
        part, log_norm, bounded = _bound(members, direction, length, max_kl, search)
        alpha, length = alpha * part.unsqueeze(-1), length * part
        if members is warm:
            found = bounded
        else:
            shift = mean_shift(warm.shifts, alpha)
            family = make_family(warm.log_p, warm.p, shift, differentiable=graph)
            norm, mean = (as_tensor(x) for x in family.normalizer(torch.ones_like(length)))
            found = found._replace(forward=(mean - norm).clamp(min=0.0), reverse=norm.clamp(min=0.0))
        value = torch.zeros_like(part)
        if target is not None:
            value = loss(target.tensors(), found.forward, found.reverse)
        found = found._replace(loss=value, certified=steered.found.certified & (part == 1.0))
    if active is not None:
        alpha = alpha * active.unsqueeze(-1)
        length, log_norm = torch.where(active, length, 0.0), torch.where(active, log_norm, 0.0)
        found = Solution(
            *(x & active if x.dtype == torch.bool else torch.where(active, x, 0.0) for x in found)
        )
    dtype = direction.dtype
    fused = torch.addcmul(members.log_p, direction, length.to(dtype).unsqueeze(-1))
    norm = log_norm.to(dtype).unsqueeze(-1)
    return _Fused(fused - norm if graph else fused.sub_(norm), alpha, found)


def _bound(
    members: Prepared, direction: Tensor, length: Tensor, max_kl: float, search: Search
) -> tuple[Tensor, Tensor, Solution]:
    """The share of the shift that keeps F within the bound, A there, and the solution there."""
    graph = search.differentiable
    whole = direction * length.to(direction.dtype).unsqueeze(-1)
    family = make_family(members.log_p, members.p, whole, differentiable=graph)
    limit = torch.full_like(length, max_kl).unsqueeze(-1)
    target = aim_at(limit, limit, members, search._replace(objective="forward"))
    found = solve(family, target, (0.0, 1.0), 0.1, "exact", differentiable=graph)
    root = Solution(*(as_tensor(x) for x in found))
    # Should the steps not have sufficed, the node below is within the bound.
    part = torch.where(root.forward <= max_kl + 5e-7, root.alpha, (10.0 * root.alpha.detach()).floor() / 10.0)
    norm, mean = (as_tensor(x) for x in family.normalizer(part))
    forward = (part * mean - norm).clamp(min=0.0)
    return part, norm, root._replace(alpha=part, log_norm=norm, forward=forward, reverse=norm.clamp(min=0.0))


def _keep_outside(large: Tensor, mask: Tensor | None, support: Tensor, log_probs: Tensor) -> Tensor:
    """The fused law on the support, scaled to the large model's mass there; its own law elsewhere."""
    seen = torch.isfinite(large) if mask is None else torch.isfinite(large) & mask
    own = large.masked_fill(~seen, -torch.inf).log_softmax(-1)
    mass = own.masked_fill(~support, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(support, log_probs + mass, own)


def _result(
    fused: _Fused,
    warm: Prepared,
    log_probs: Tensor,
    rows: list[Tensor],
    mask: Tensor | None,
    support: Tensor | None,
    batch: torch.Size,
    dtype: torch.dtype,
) -> FusionStep:
    found, count = fused.found, warm.f.shape[-1]
    size = log_probs.shape[0]
    if support is None:
        non_finite = torch.zeros(size, count + 2, dtype=torch.bool, device=log_probs.device)
        empty = non_finite[:, 0]
    else:
        wrong = [x.isnan() | (x == torch.inf) for x in rows]
        wrong = wrong if mask is None else [x & mask for x in wrong]
        non_finite, empty = torch.stack([x.any(-1) for x in wrong], -1), ~support.any(-1)
    expert = fused.alpha.argmax(-1).masked_fill((fused.alpha == 0.0).all(-1), -1)
    shape = lambda x: x.reshape((*batch, *x.shape[1:]))
    cast = lambda x: shape(x.to(dtype))
    return FusionStep(
        log_probs=cast(log_probs),
        alpha=cast(fused.alpha),
        f=cast(warm.f),
        r=cast(warm.r),
        kl_forward=cast(found.forward),
        kl_reverse=cast(found.reverse),
        loss=cast(found.loss),
        expert=shape(expert),
        certified=shape(found.certified),
        non_finite=shape(non_finite),
        empty=shape(empty),
    )

r"""How several experts share the shift: one at a time (the paper), jointly, or as one virtual expert.

The objective sees the experts' targets through two means only: a joint search has T unknowns for two
equations, and which single expert wins is decided by rounding. ``centroid`` and ``pool`` fix the direction
:math:`\sum_t w_t d_t` and search its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from logit_fusion.arrays import as_tensor
from logit_fusion.config import Objective, Pairing, Solver
from logit_fusion.kernels import make_family, tiled
from logit_fusion.objective import Target, make_target
from logit_fusion.solve import Solution, solve
from logit_fusion.targets import Prepared


class Search(NamedTuple):
    """How alpha is sought, whatever the strategy; the fields are those of ``fuse_logits``."""

    objective: Objective = "paper"
    pairing: Pairing = "main"
    solver: Solver = "exact"
    alpha_range: tuple[float, float] = (0.0, 2.0)
    step: float = 0.1
    certify: bool = False
    differentiable: bool = False


class Steered(NamedTuple):
    """What a strategy found, in N rows.

    Attributes:
        alpha: (N, T) strengths.
        direction: (N, vocab) one shift of mean 0 under the large model.
        length: (N) so that ``length * direction`` is the fused shift.
        found: F, R, loss and the rest at that place.
        target: what they were to reach; None for fixed strengths.
    """

    alpha: Float[Tensor, "rows experts"]
    direction: Float[Tensor, "rows vocab"]
    length: Float[Tensor, "rows"]
    found: Solution
    target: Target | None


def aim_at(
    f: Float[Tensor, "rows experts"], r: Float[Tensor, "rows experts"], members: Prepared, search: Search
) -> Target:
    """The target of f and r, in the arrays that the members' family computes with."""
    on_cpu = tiled(members.p, differentiable=search.differentiable)
    values = (f.numpy(), r.numpy()) if on_cpu else (f, r)
    return make_target(*values, search.objective, search.pairing, members.p.dtype)


def _seek(members: Prepared, direction: Tensor, target: Target, search: Search) -> Solution:
    found = solve(
        make_family(members.log_p, members.p, direction, differentiable=search.differentiable),
        target,
        search.alpha_range,
        search.step,
        search.solver,
        certify=search.certify,
        differentiable=search.differentiable,
    )
    return Solution(*(as_tensor(x) for x in found))


def single(members: Prepared, search: Search, ranges: Sequence[tuple[float, float]] | None = None) -> Steered:
    """The paper's rule: the one expert and alpha of least loss; ties go to the first expert.

    Args:
        members: of T experts.
        search: how alpha is sought.
        ranges: T ranges instead of the common one.
    """
    count = members.f.shape[-1]
    target = aim_at(members.f, members.r, members, search)
    each = ranges or [search.alpha_range] * count
    found = [
        _seek(members, members.shifts[t], target, search._replace(alpha_range=each[t])) for t in range(count)
    ]
    if count == 1:
        return Steered(found[0].alpha.unsqueeze(-1), members.shifts[0], found[0].alpha, found[0], target)
    stacked = Solution(*(torch.stack(x, -1) for x in zip(*found, strict=True)))
    winner = stacked.loss.argmin(-1)
    place = winner.unsqueeze(-1)
    chosen = Solution(*(x.gather(-1, place).squeeze(-1) for x in stacked))
    # Certified: every expert's own minimum is.
    chosen = chosen._replace(certified=stacked.certified.all(-1))
    alpha = torch.zeros_like(stacked.alpha).scatter(-1, place, chosen.alpha.unsqueeze(-1))
    return Steered(alpha, _pick(members.shifts, winner), chosen.alpha, chosen, target)


def _pick(shifts: Tensor, winner: Int64[Tensor, "rows"]) -> Tensor:
    index = winner.view(1, -1, 1).expand(1, *shifts.shape[1:])
    return shifts.gather(0, index).squeeze(0)


def mean_shift(
    shifts: Float[Tensor, "experts rows vocab"], weights: Float[Tensor, "rows experts"]
) -> Float[Tensor, "rows vocab"]:
    """``sum_t w_t d_t``, row by row."""
    scale = weights.to(shifts.dtype)
    total = shifts[0] * scale[:, 0:1]
    for t in range(1, shifts.shape[0]):
        total = torch.addcmul(total, shifts[t], scale[:, t : t + 1])
    return total


def _greatest(weights: Tensor) -> Tensor:
    # Weights of evidence may all be near 0: the scale then stays bounded, and alpha goes to 0 with them.
    return weights.amax(-1).clamp(min=1.0 / weights.shape[-1])


def centroid(members: Prepared, search: Search, weights: Float[Tensor, "rows experts"]) -> Steered:
    """Search along the weighted mean of the shifts against the experts' own targets.

    Args:
        members: of T experts.
        search: how the length is sought; its range is that of the strongest expert.
        weights: (N, T) >= 0, sum at most 1.
    """
    target = aim_at(members.f, members.r, members, search)
    return _along(members, search, weights, target)


def pool(members: Prepared, search: Search, weights: Float[Tensor, "rows experts"]) -> Steered:
    """Search along a virtual expert, the log-linear pool J of the experts, against its own targets.

    Args:
        members: of T experts.
        search: how the length is sought; its range is that of the strongest expert.
        weights: (N, T) >= 0, sum at most 1; what is missing is the base's share.
    """
    f, r = pool_targets(members, weights, differentiable=search.differentiable)
    target = aim_at(f.unsqueeze(-1), r.unsqueeze(-1), members, search)
    return _along(members, search, weights, target)


def pool_targets(
    members: Prepared, weights: Float[Tensor, "rows experts"], *, differentiable: bool = False
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """KL(J, base) and KL(base, J) of J = softmax(log q + sum_t w_t d_t), in nats.

    Args:
        members: of T experts.
        weights: (N, T).
        differentiable: keep the graph.
    """
    wide = weights.to(members.f.dtype)
    mean_base = -(wide * (members.r + members.mean0)).sum(-1)  # of the centred direction, under the base
    direction = mean_shift(members.shifts, weights)
    centered = direction - mean_base.to(direction.dtype).unsqueeze(-1)
    family = make_family(members.log_q, members.log_q, centered, differentiable=differentiable)
    log_norm, mean = (as_tensor(x) for x in family.normalizer(torch.ones_like(mean_base)))
    return (mean - log_norm).clamp(min=0.0), log_norm.clamp(min=0.0)


def _along(members: Prepared, search: Search, weights: Tensor, target: Target) -> Steered:
    scale = weights.to(members.f.dtype)
    scale = scale / _greatest(scale).unsqueeze(-1)
    direction = mean_shift(members.shifts, scale)
    found = _seek(members, direction, target, search)
    return Steered(found.alpha.unsqueeze(-1) * scale, direction, found.alpha, found, target)


def static(
    members: Prepared, alpha: Float[Tensor, "rows experts"], *, differentiable: bool = False
) -> Steered:
    """Fixed strengths, without a search: proxy tuning, emulated fine-tuning, DExperts, contrastive decoding.

    Args:
        members: of T experts.
        alpha: (N, T) strengths of any sign.
        differentiable: keep the graph.
    """
    direction = mean_shift(members.shifts, alpha)
    length = torch.ones_like(members.f[:, 0])
    family = make_family(members.log_p, members.p, direction, differentiable=differentiable)
    log_norm, mean = (as_tensor(x) for x in family.normalizer(length))
    nothing = torch.zeros_like(length)
    return Steered(
        alpha.to(length.dtype),
        direction,
        length,
        Solution(
            length, log_norm, (mean - log_norm).clamp(min=0.0), log_norm.clamp(min=0.0), nothing,
            torch.zeros_like(length, dtype=torch.bool),
        ),
        None,
    )  # fmt: skip

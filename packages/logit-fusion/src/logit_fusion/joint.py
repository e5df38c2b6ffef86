"""All strengths free at once: the paper's stated problem, made well-posed where it has many answers."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import InputError
from logit_fusion.grid import make_grid
from logit_fusion.objective import Target, loss, make_target
from logit_fusion.strategies import Search, Steered, centroid, mean_shift, static
from logit_fusion.targets import Prepared

GRID_EXPERTS = 3
GRID_POINTS = 1 << 22
_CHUNK = 4_000_000  # entries of one batch of grid points
_DOWN, _ALONG = 20, 24
_RIDGE = 1e-6
_SLACK = 1e-6  # relative to the targets: the floor is followed to first order only


def joint(members: Prepared, search: Search) -> Steered:
    """The best strengths in the box [low, high]^T.

    ``"grid"`` tries all points, the first minimum in C order wins; ``"exact"`` and ``"newton"`` take the
    point of least norm among the best (two equations determine no more), by projected, damped Gauss-Newton
    steps from the uniform centroid. Alpha has no gradient.

    Args:
        members: of T experts.
        search: how alpha is sought.

    Raises:
        InputError: a grid for more than three experts, or of more than four million points.
    """
    count = members.f.shape[-1]
    if search.solver == "grid" and count > GRID_EXPERTS:
        raise InputError(
            f"strategy='joint' with solver='grid' got {count} experts, wanted at most {GRID_EXPERTS}: "
            "take strategy='pool', or solver='exact'"
        )
    target = make_target(members.f, members.r, search.objective, search.pairing, members.p.dtype)
    with torch.no_grad():
        alpha = (
            _every_point(members, search, target)
            if search.solver == "grid"
            else _least_norm(members, search, target)
        )
    steered = static(members, alpha, differentiable=search.differentiable)
    found = steered.found
    found = found._replace(loss=loss(target, found.forward, found.reverse))
    return steered._replace(found=found, target=target)


def _every_point(members: Prepared, search: Search, target: Target) -> Tensor:
    places = make_grid(*search.alpha_range, search.step).places
    count, rows, vocab = members.shifts.shape
    if (size := len(places) ** count) > GRID_POINTS:
        raise InputError(
            f"strategy='joint' with solver='grid', step {search.step:g} and {count} experts has {size} "
            f"points, wanted at most {GRID_POINTS}: take a larger step, or solver='exact'"
        )
    points = torch.tensor(
        list(itertools.product(places, repeat=count)), dtype=members.f.dtype, device=members.f.device
    )
    least = torch.full_like(target.forward, torch.inf)
    alpha = points.new_zeros(rows, count)
    for part in points.split(max(1, _CHUNK // max(rows * vocab, 1))):
        shift = torch.tensordot(part.to(members.shifts.dtype), members.shifts, 1)
        exponent = members.log_p + shift
        log_norm = exponent.logsumexp(-1, keepdim=True)
        mean = ((exponent - log_norm).exp() * shift).sum(-1)
        reverse = log_norm.squeeze(-1).to(alpha.dtype)
        forward = mean.to(alpha.dtype) - reverse
        value, index = loss(target, forward.clamp(min=0.0).t(), reverse.clamp(min=0.0).t()).min(-1)
        better = value < least
        least = torch.where(better, value, least)
        alpha = torch.where(better.unsqueeze(-1), part[index], alpha)
    return alpha


class _Place(NamedTuple):
    alpha: Float[Tensor, "rows experts"]
    gap: Float[Tensor, "rows equations"]
    jacobian: Float[Tensor, "rows equations experts"]

    @property
    def merit(self) -> Tensor:
        return self.gap.square().sum(-1)


def _evaluate(members: Prepared, target: Target, alpha: Tensor) -> _Place:
    shift = mean_shift(members.shifts, alpha)
    exponent = members.log_p + shift
    log_norm = exponent.logsumexp(-1, keepdim=True)
    weight = (exponent - log_norm).exp()
    mean = (weight * shift).sum(-1, keepdim=True)
    means = torch.einsum("nv,tnv->nt", weight, members.shifts).to(alpha.dtype)
    pulls = torch.einsum("nv,tnv->nt", weight * (shift - mean), members.shifts).to(alpha.dtype)
    reverse = log_norm.squeeze(-1).to(alpha.dtype)
    forward = mean.squeeze(-1).to(alpha.dtype) - reverse
    f, r = forward - target.forward, reverse - target.reverse
    match target.objective:
        case "paper":
            return _Place(alpha, torch.stack([f, r], -1), torch.stack([pulls, means], -2))
        case "forward":
            return _Place(alpha, f.unsqueeze(-1), pulls.unsqueeze(-2))
        case "reverse":
            return _Place(alpha, r.unsqueeze(-1), means.unsqueeze(-2))
        case "jeffreys":
            return _Place(alpha, (f + r).unsqueeze(-1), (pulls + means).unsqueeze(-2))


def _least_norm(members: Prepared, search: Search, target: Target) -> Tensor:
    """Down into the valley from several places, then along its floor to the point of least norm."""
    count, rows = members.f.shape[-1], members.f.shape[0]
    inner = search._replace(solver="exact", certify=False, differentiable=False)
    uniform = torch.full_like(members.f, 1.0 / count)
    best: _Place | None = None
    for t in range(count + 1):
        if t < count:  # one expert alone
            weights = torch.zeros_like(uniform).index_fill(-1, torch.tensor([t], device=uniform.device), 1.0)
        else:
            weights = uniform
        start = centroid(members, inner, weights).alpha.clamp(*search.alpha_range)
        here = _descend(members, target, _evaluate(members, target, start), search.alpha_range)
        if best is None:
            best = here
        else:
            close = here.merit <= best.merit + 1e-9 * (target.forward.square() + target.reverse.square())
            shorter = here.alpha.square().sum(-1) < best.alpha.square().sum(-1)
            clearly = best.merit > here.merit + 1e-9 * (target.forward.square() + target.reverse.square())
            best = _pick(clearly | (close & shorter), here, best)
    if best is None:  # pragma: no cover - there is at least one expert
        return uniform.new_zeros(rows, count)
    return _along_floor(members, target, best, search.alpha_range).alpha


def _pick(rows: Tensor, yes: _Place, no: _Place) -> _Place:
    return _Place(
        *(torch.where(rows.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(yes, no, strict=True))
    )


def _descend(members: Prepared, target: Target, here: _Place, alpha_range: tuple[float, float]) -> _Place:
    """Levenberg-Marquardt steps in the box."""
    damping = torch.full_like(target.forward, 1e-2)
    for _ in range(_DOWN):
        there = _evaluate(members, target, _step(here, damping, alpha_range))
        better = there.merit <= here.merit
        here = _pick(better, there, here)
        damping = torch.where(better, damping / 4.0, damping * 8.0).clamp(1e-12, 1e6)
    return here


def _along_floor(members: Prepared, target: Target, here: _Place, alpha_range: tuple[float, float]) -> _Place:
    """Steps to the linearised floor's point of least norm, halved where they climb; then down once more."""
    deepest = here
    slack = _SLACK * (target.forward.square() + target.reverse.square())
    scale = torch.ones_like(here.merit)
    for _ in range(_ALONG):
        goal = _goal(here, alpha_range)
        there = _evaluate(members, target, here.alpha + scale.unsqueeze(-1) * (goal - here.alpha))
        taken = there.merit <= deepest.merit + slack
        here = _pick(taken, there, here)
        scale = torch.where(taken, (2.0 * scale).clamp(max=1.0), scale / 2.0)
    here = _descend(members, target, here, alpha_range)
    return _pick(here.merit <= deepest.merit + 1e-6 * slack, here, deepest)


def _goal(place: _Place, alpha_range: tuple[float, float]) -> Tensor:
    """The shortest vector in the box that solves the linearised equations."""
    alpha, gap, jacobian = place
    fixed = torch.zeros_like(alpha, dtype=torch.bool)
    value = alpha
    wanted = (jacobian @ alpha.unsqueeze(-1)).squeeze(-1) - gap
    eye = torch.eye(gap.shape[-1], dtype=alpha.dtype, device=alpha.device)
    for _ in range(alpha.shape[-1]):
        held = torch.where(fixed, value, 0.0)
        free = jacobian.masked_fill(fixed.unsqueeze(-2), 0.0)
        rest = wanted - (jacobian @ held.unsqueeze(-1)).squeeze(-1)
        gram = free @ free.mT
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-300)
        matrix = gram + _RIDGE * trace[:, None, None] * eye
        found = (free.mT @ torch.linalg.solve_ex(matrix, rest.unsqueeze(-1)).result).squeeze(-1)
        value = torch.where(fixed, value, found.clamp(*alpha_range))
        fixed = fixed | (found < alpha_range[0]) | (found > alpha_range[1])
    return value


def _step(place: _Place, damping: Tensor, alpha_range: tuple[float, float]) -> Tensor:
    """One damped step; strengths that it would push out of the box stand on its side."""
    alpha, gap, jacobian = place
    low, high = alpha_range
    slope = (jacobian.mT @ gap.unsqueeze(-1)).squeeze(-1)
    held = ((alpha <= low) & (slope > 0.0)) | ((alpha >= high) & (slope < 0.0))
    free = jacobian.masked_fill(held.unsqueeze(-2), 0.0)
    gram = free.mT @ free
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    extra = (damping * trace).clamp(min=1e-300)
    matrix = gram + extra[:, None, None] * torch.eye(alpha.shape[-1], dtype=alpha.dtype, device=alpha.device)
    move = torch.linalg.solve_ex(matrix, -slope.masked_fill(held, 0.0).unsqueeze(-1)).result.squeeze(-1)
    return (alpha + move.masked_fill(held, 0.0)).clamp(low, high)

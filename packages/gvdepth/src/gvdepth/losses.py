"""Training losses over valid pixels, pooled over the whole batch, on request of all ranks (section 2.5).

An image without valid pixels adds nothing; a batch without any gives 0 with gradient 0, never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_core.errors import ConfigError, DataError, ShapeError
from gvdepth.warping import ViewLike, warp

__all__ = [
    "LossOutput",
    "consistency_loss",
    "depth_loss",
    "pooled_mean",
    "silog_loss",
    "uncertainty_loss",
    "valid_mask",
]

_LEAST_DEPTH = 1e-6  # metres; a logarithm needs one
_LARGEST_EXPONENT = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """The total and its parts before weighting, each a scalar with a gradient."""

    total: Float[Tensor, ""]
    silog: Float[Tensor, ""]
    uncertainty: Float[Tensor, ""]
    consistency: Float[Tensor, ""]


def valid_mask(
    target: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None, max_depth: float | None = 80.0
) -> Bool[Tensor, "..."]:
    """Pixels that take part: target > 0, finite, at most ``max_depth`` metres, and True in ``mask``.

    Raises:
        DataError: the mask is not bool.

    Example:
        >>> valid_mask(torch.tensor([0.0, 5.0, 80.0, 81.0])).tolist()
        [False, True, True, False]
    """
    valid = (target > 0) & torch.isfinite(target)
    if max_depth is not None:
        valid = valid & (target <= max_depth)
    if mask is None:
        return valid
    if mask.dtype != torch.bool:
        raise DataError(f"mask is {mask.dtype}, wanted torch.bool (True = takes part)")
    return valid & mask


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks; its gradient is scaled so that averaging gradients over ranks gives the pooled one."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # noqa: ARG004 - the signature of torch
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return grads[0] * dist.get_world_size()


def _total(local: Tensor, across_ranks: bool) -> Tensor:
    if across_ranks and dist.is_available() and dist.is_initialized():
        return _SumOverRanks.apply(local)  # pyright: ignore[reportReturnType]
    return local


def pooled_mean(
    x: Float[Tensor, "..."], mask: Bool[Tensor, "..."], *, across_ranks: bool = False
) -> Float[Tensor, ""]:
    """Mean over True pixels of the whole batch; with ``across_ranks`` weighted by every rank's pixel count.

    Args:
        x: values; those where the mask is False count neither in value nor in gradient.
        mask: True takes part.
        across_ranks: pool over the ranks of ``torch.distributed``, for gradients that are averaged over
            ranks.

    Returns:
        The mean in float32 or wider; 0 (with gradient 0) without pixels.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    kept = torch.where(mask, x.to(wide), torch.zeros((), dtype=wide, device=x.device))
    sums = torch.stack([kept.sum(), mask.expand_as(x).sum().to(wide)])
    sums = _total(sums, across_ranks)
    return sums[0] / sums[1].detach().clamp(min=1.0)


def _same_shape(**tensors: Tensor | None) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ShapeError(f"{listed}: wanted one shape (upsample the prediction to the target first)")


def silog_loss(
    depth: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    alpha: float = 10.0,
    lam: float = 0.15,
    correction: int = 0,
    across_ranks: bool = False,
) -> Float[Tensor, ""]:
    """Scale-invariant log loss ``alpha sqrt(Var[g] + lam E[g]^2)`` with ``g = log depth - log target``.

    Args:
        depth: prediction, metres, > 0.
        target: metres; <= 0 or not finite is a hole.
        mask: True takes part; holes never do.
        alpha: factor.
        lam: weight of the squared mean; 0 makes the loss blind to a global scale.
        correction: 0 for the population variance, 1 for n - 1 (one pixel then counts as variance 0).
        across_ranks: pool over ranks, see :func:`pooled_mean`.

    Returns:
        Scalar >= 0, in float32 or wider; its gradient is 0 where the loss is 0.

    Raises:
        ShapeError: different shapes.
        ConfigError: ``correction`` is neither 0 nor 1.

    Example:
        >>> silog_loss(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]), lam=1.0).round(decimals=4)
        tensor(6.9315)
    """
    _same_shape(depth=depth, target=target, mask=mask)
    if correction not in (0, 1):
        raise ConfigError(f"correction is {correction!r}, wanted 0 or 1")
    valid = valid_mask(target, mask, None)
    wide = torch.promote_types(depth.dtype, torch.float32)
    one = torch.ones((), dtype=wide, device=depth.device)
    guess = torch.where(valid, depth.to(wide), one).clamp(min=_LEAST_DEPTH)
    gap = guess.log() - torch.where(valid, target.to(wide), one).log()
    mean = pooled_mean(gap, valid, across_ranks=across_ranks)
    # The variance does not depend on the center to first order. Across ranks this has to be used: each rank
    # would see only its own part of that zero.
    center = mean.detach() if across_ranks else mean
    square = pooled_mean((gap - center) ** 2, valid, across_ranks=across_ranks)
    if correction:
        count = _total(valid.sum().to(wide), across_ranks).detach()
        square = square * count / (count - 1).clamp(min=1.0)
    inside = square + lam * mean * mean
    positive = inside > 0
    root = torch.where(positive, inside, torch.ones_like(inside)).sqrt()
    return alpha * torch.where(positive, root, torch.zeros_like(root))


def _safe_exp(x: Tensor) -> Tensor:
    # exp that goes on as its tangent: no overflow, and never a vanishing gradient.
    bounded = x.clamp(max=_LARGEST_EXPONENT)
    return bounded.exp() * (1.0 + (x - bounded))


def uncertainty_loss(
    depth: Float[Tensor, "..."],
    log_uncertainty: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    unc_weighting: bool = True,
    across_ranks: bool = False,
) -> Float[Tensor, ""]:
    """Laplace likelihood of one cue, the mean of ``|depth - target| / U + log U`` with ``U = exp(s)``.

    Args:
        depth: the cue's depth, metres.
        log_uncertainty: s.
        target: metres; <= 0 or not finite is a hole.
        mask: True takes part; holes never do.
        unc_weighting: False gives the plain mean absolute error (the paper's "L1" ablation).
        across_ranks: pool over ranks, see :func:`pooled_mean`.

    Returns:
        Scalar; least, per pixel, at ``U = |depth - target|``.

    Raises:
        ShapeError: different shapes.
    """
    _same_shape(depth=depth, log_uncertainty=log_uncertainty, target=target, mask=mask)
    valid = valid_mask(target, mask, None)
    wide = torch.promote_types(depth.dtype, torch.float32)
    zero = torch.zeros((), dtype=wide, device=depth.device)
    error = (torch.where(valid, depth.to(wide), zero) - torch.where(valid, target.to(wide), zero)).abs()
    if not unc_weighting:
        return pooled_mean(error, valid, across_ranks=across_ranks)
    s = torch.where(valid, log_uncertainty.to(wide), zero)
    return pooled_mean(error * _safe_exp(-s) + s, valid, across_ranks=across_ranks)


def consistency_loss(
    depth_1: Float[Tensor, "batch 1 h1 w1"],
    depth_2: Float[Tensor, "batch 1 h2 w2"],
    view_1: ViewLike,
    view_2: ViewLike,
    mask: Bool[Tensor, "batch 1 h2 w2"] | None = None,
    *,
    across_ranks: bool = False,
) -> Float[Tensor, ""]:
    """Mean absolute difference of two augmented views of one image, with no gradient into the second.

    Args:
        depth_1: prediction of view 1, metres; also (h1, w1).
        depth_2: prediction of view 2, metres; also (h2, w2).
        view_1: ``[x0, y0, w, h, new_w, new_h]`` or with a seventh entry ``hflip``, one or (batch, 6 or 7);
            see :func:`gvdepth.warping.warp`.
        view_2: the same of view 2.
        mask: True takes part, in view 2.
        across_ranks: pool over ranks, see :func:`pooled_mean`.

    Returns:
        Scalar over the pixels of view 2 that lie inside view 1.
    """
    warped, valid = warp(depth_1, view_1, view_2, (depth_2.shape[-2], depth_2.shape[-1]))
    if mask is not None:
        valid = valid & mask
    gap = (warped - depth_2.detach().to(warped.dtype)).abs()
    return pooled_mean(gap, valid, across_ranks=across_ranks)


def depth_loss(
    depth: Float[Tensor, "..."],
    target: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    cues: tuple[tuple[Tensor, Tensor], ...] = (),
    consistency: Float[Tensor, ""] | None = None,
    uncertainty_weight: float = 0.5,
    consistency_weight: float = 0.1,
    alpha: float = 10.0,
    lam: float = 0.15,
    correction: int = 0,
    unc_weighting: bool = True,
    max_depth: float | None = 80.0,
    across_ranks: bool = False,
) -> LossOutput:
    """``L = L_SIlog + 0.5 L_unc + 0.1 L_con``.

    Args:
        depth: fused prediction at the target's size, metres.
        target: metres; <= 0, not finite or beyond ``max_depth`` is a hole.
        mask: True takes part.
        cues: ``(depth, log_uncertainty)`` of each cue, whose losses are added.
        consistency: what :func:`consistency_loss` gave.
        uncertainty_weight: of L_unc.
        consistency_weight: of L_con.
        alpha: see :func:`silog_loss`.
        lam: see :func:`silog_loss`.
        correction: see :func:`silog_loss`.
        unc_weighting: see :func:`uncertainty_loss`.
        max_depth: metres, or None.
        across_ranks: pool over ranks, see :func:`pooled_mean`.
    """
    valid = valid_mask(target, mask, max_depth)
    silog = silog_loss(
        depth, target, valid, alpha=alpha, lam=lam, correction=correction, across_ranks=across_ranks
    )
    zero = torch.zeros_like(silog)
    parts = [
        uncertainty_loss(*cue, target, valid, unc_weighting=unc_weighting, across_ranks=across_ranks)
        for cue in cues
    ]
    uncertainty = torch.stack(parts).sum() if parts else zero
    consistent = zero if consistency is None else consistency
    total = silog + uncertainty_weight * uncertainty + consistency_weight * consistent
    return LossOutput(total, silog, uncertainty, consistent)

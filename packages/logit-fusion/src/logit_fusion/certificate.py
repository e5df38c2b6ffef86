"""Proof that the minimum found is the global one, from the monotony of both divergences.

On a cell [a, b] F lies in [F(a), F(b)] and R in [R(a), R(b)], which bounds the objective from below; a cell
whose bound is not under the loss found holds nothing better. The cells of the grid are divided by
interpolation of degree 5, so the proof holds up to its error. Where only cells are left on which the
objective is convex, the minimum among them is the only one.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from logit_fusion.family import divergences
from logit_fusion.hermite import Hermite
from logit_fusion.objective import Target, curvature, loss

PARTS = 16


def cell_bounds(
    target: Target, forward: Float[Tensor, "rows places"], reverse: Float[Tensor, "rows places"]
) -> Float[Tensor, "rows cells"]:
    """The least loss that values between neighbouring places could have.

    Args:
        target: of N rows.
        forward: (N, M) F at growing alphas.
        reverse: (N, M) R at the same.

    Returns:
        (N, M - 1) lower bounds of the objective on the cells.
    """
    nearest = [
        wanted.unsqueeze(-1).clamp(low[..., :-1], low[..., 1:])
        for wanted, low in ((target.forward, forward), (target.reverse, reverse))
    ]
    return loss(target, *nearest)


def certify_rows(
    target: Target,
    alphas: Float[Tensor, "nodes"],
    spacing: float,
    log_norm: Float[Tensor, "rows nodes"],
    mean: Float[Tensor, "rows nodes"],
    best: Float[Tensor, "rows"],
) -> Bool[Tensor, "rows"]:
    """Whether no alpha between the first and the last node has a smaller loss than ``best``.

    Args:
        target: of N rows, objective ``"paper"``.
        alphas: (K) evenly spaced nodes, K >= 3.
        spacing: between them.
        log_norm: (N, K) A at the nodes.
        mean: (N, K) its slope.
        best: (N) loss of the candidate.

    Returns:
        (N) True where it is proven.
    """
    rows, count = log_norm.shape
    inner = torch.arange(1, count - 1, device=alphas.device)
    middle = torch.cat([inner[:1], inner])  # the first cell belongs to the first polynomial
    picks = middle.repeat_interleave(PARTS).expand(rows, -1)
    curve = Hermite.around(alphas, spacing, log_norm, mean, picks)
    inside = torch.arange(PARTS, device=alphas.device, dtype=alphas.dtype) / PARTS
    places = (alphas[:-1].unsqueeze(-1) + spacing * inside).flatten()
    stats = curve.at(places.expand(rows, -1))
    bends = curvature(target, places, stats) > 0.0
    forward, reverse = divergences(stats, places, 0.0)
    last = tuple(
        x.clamp(min=0.0).unsqueeze(-1) for x in (alphas[-1] * mean[:, -1] - log_norm[:, -1], log_norm[:, -1])
    )
    forward, reverse = (
        torch.cat([x, y], -1).cummax(-1).values for x, y in zip((forward, reverse), last, strict=True)
    )
    bends = torch.cat([bends, bends[:, -1:]], -1)
    left = cell_bounds(target, forward, reverse) < best.unsqueeze(-1)
    first = left.int().argmax(-1)
    span = left.shape[-1] - left.flip(-1).int().argmax(-1) - first
    connected = left.sum(-1) == span
    convex = (~left | (bends[:, :-1] & bends[:, 1:])).all(-1)
    return ~left.any(-1) | (connected & convex)

"""Adaptive gradient modulation: a surrogate counts as much as the step it proposes hurts the others.

Entry ``[i, j]`` of the loss matrix is the loss of surrogate i on the candidate that surrogate j proposes.
Source: AdaEA (ICCV 2023), section on AGM; constants from the official code.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaea.losses import cross_entropy, wide
from fusion_core.errors import ConfigError, ShapeError, check_range

Ratio = Literal["given", "received"]
RATIOS = ("given", "received")
_LEAST = 1e-12


def loss_matrix(
    logits: Float[Tensor, "surrogates candidates batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, "surrogates candidates batch"]:
    """Cross-entropy of every surrogate on every candidate, per image.

    Args:
        logits: ``(surrogates, candidates, batch, classes)``; ``logits[i, j]`` is surrogate i on candidate j.
        labels: ``(batch,)`` class indices.

    Returns:
        ``(surrogates, candidates, batch)`` in nats; its mean over the last dimension is the matrix of the
        official code.

    Raises:
        ShapeError: other dimensions.

    Example:
        >>> loss_matrix(torch.zeros(2, 2, 3, 4), torch.tensor([0, 1, 2])).shape
        torch.Size([2, 2, 3])
    """
    if logits.dim() != 4 or logits.shape[0] != logits.shape[1]:
        raise ShapeError(
            f"logits have shape {tuple(logits.shape)}, wanted (surrogates, candidates, batch, classes) with "
            "as many candidates as surrogates"
        )
    return cross_entropy(logits, labels)


def linear_losses(
    losses: Float[Tensor, "surrogates batch"],
    gradients: Float[Tensor, "surrogates batch channels height width"],
    moves: Float[Tensor, "candidates batch channels height width"],
) -> Float[Tensor, "surrogates candidates batch"]:
    """The loss matrix to first order, from what a step has at hand: no further forward pass.

    ``L[i, j] = l_i + <grad l_i, c_j - x>`` with the candidates' moves ``c_j - x``.

    Args:
        losses: ``(surrogates, batch)`` at the point x.
        gradients: ``(surrogates, batch, channels, height, width)`` of those losses at x.
        moves: ``(candidates, batch, channels, height, width)`` from x to each candidate.

    Returns:
        ``(surrogates, candidates, batch)``.

    Example:
        >>> one = torch.ones(2, 1, 1, 1, 1)
        >>> linear_losses(torch.tensor([[1.0], [2.0]]), one, 0.5 * one)[..., 0]
        tensor([[1.5000, 1.5000],
                [2.5000, 2.5000]])
    """
    products = torch.einsum("ibp,jbp->ijb", gradients.flatten(2), moves.flatten(2))
    return losses.unsqueeze(1) + products


def agm_weights(
    loss_matrix: Float[Tensor, "surrogates surrogates *batch"],
    beta: float = 10.0,
    *,
    ratio: Ratio = "given",
    targeted: bool = False,
) -> Float[Tensor, "surrogates *batch"]:
    """Weights of the surrogates, ``softmax(beta * r)``, from how their steps hurt each other.

    ``r_j`` is the sum over i != j of ``L[i, j] / L[i, i]``: the harm that j's step does to i, relative to the
    harm of i's own.

    Args:
        loss_matrix: ``(K, K)``, or ``(K, K, batch)`` for weights per image; clamped at 1e-12.
        beta: sharpness, >= 0; 0 weighs evenly.
        ratio: ``"given"``; ``"received"`` is the transposed form of another public implementation,
            ``L[j, i] / L[i, i]``.
        targeted: turns each quotient over, so that more harm stays larger where the loss is to fall.

    Returns:
        ``(K,)`` or ``(K, batch)``, positive, summing to 1 over the surrogates.

    Raises:
        ShapeError: not square in its first two dimensions.
        ConfigError: negative ``beta``, or another ``ratio``.

    Example:
        >>> agm_weights(torch.tensor([[2.0, 1.0], [2.0, 2.0]]), beta=1.0)
        tensor([0.6225, 0.3775])
    """
    shape = tuple(loss_matrix.shape)
    if len(shape) not in (2, 3) or shape[0] != shape[1]:
        raise ShapeError(f"loss_matrix has shape {shape}, wanted (K, K) or (K, K, batch)")
    check_range("beta", beta, 0.0, float("inf"))
    if ratio not in RATIOS:
        raise ConfigError(f"ratio is {ratio!r}, wanted one of {list(RATIOS)}")
    losses = wide(loss_matrix).clamp_min(_LEAST)
    own = losses.diagonal(dim1=0, dim2=1)  # (*batch, K)
    own = own.movedim(-1, 0).unsqueeze(1)  # (K, 1, *batch): of row i
    quotients = losses / own if ratio == "given" else losses.transpose(0, 1) / own
    if targeted:
        quotients = quotients.reciprocal()
    others = ~torch.eye(shape[0], dtype=torch.bool, device=losses.device)
    harm = (quotients * others.view(*shape[:2], *[1] * (len(shape) - 2))).sum(0)
    if beta == 0.0:  # exactly even, also where a ratio is infinite
        return torch.full_like(harm, 1.0 / shape[0])
    return (beta * harm).softmax(0)

"""Differentiable binarization: a step that a gradient can pass."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["db", "db_log"]


def db(
    p: Float[Tensor, "*maps height width"], t: Float[Tensor, "*maps height width"], k: float = 50.0
) -> Float[Tensor, "*maps height width"]:
    """Approximate binary map of a probability map and a threshold map (DBNet, equation 2).

    Its derivative is k B (1 - B) with respect to ``p`` and the negative of it with respect to ``t``. It is
    computed as a sigmoid: the reciprocal of an exponential gives NaN gradients in half precision.

    Args:
        p: probabilities in [0, 1].
        t: thresholds in [0, 1], same shape.
        k: steepness, > 0.

    Returns:
        Values in [0, 1]; 0.5 where ``p`` equals ``t``.

    Example:
        >>> db(torch.tensor([[0.9, 0.3]]), torch.tensor([[0.3, 0.3]])).tolist()
        [[1.0, 0.5]]
    """
    return torch.sigmoid(k * (p - t))


def db_log(
    p: Float[Tensor, "*maps height width"], t: Float[Tensor, "*maps height width"], k: float = 50.0
) -> Float[Tensor, "*maps height width"]:
    """Logarithm of :func:`db` without forming it; ``db_log(t, p, k)`` is that of one minus it.

    The gradient of ``-db_log(p, t)`` is -k sigmoid(-k (p - t)), and of ``-db_log(t, p)`` it is
    k sigmoid(k (p - t)), with respect to ``p`` (DBNet, equation 4): exact where the map saturates.

    Example:
        >>> db_log(torch.tensor([[0.0]]), torch.tensor([[10.0]])).item()
        -500.0
    """
    return torch.nn.functional.logsigmoid(k * (p - t))

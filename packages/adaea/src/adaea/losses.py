"""Losses of an attack, one number per image, that grow as the label loses; computed in float32 or wider.

An untargeted attack ascends them with the true label, a targeted one descends them with the wanted label.
Sources: cross-entropy as in the official code; margin after Carlini and Wagner 2017; the difference of logits
ratio after Croce and Hein 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Loss = Literal["ce", "logit", "margin", "dlr"]
Logits = Float[Tensor, "... batch classes"]
Labels = Int[Tensor, " batch"]
PerImage = Float[Tensor, "... batch"]
_LEAST = 1e-12


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _of_label(logits: Tensor, labels: Tensor) -> Tensor:
    index = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    return logits.gather(-1, index).squeeze(-1)


def cross_entropy(logits: Logits, labels: Labels) -> PerImage:
    """Cross-entropy ``log sum exp z - z_y``, per image.

    Args:
        logits: ``(..., batch, classes)``.
        labels: ``(batch,)`` class indices.

    Returns:
        ``(..., batch)``, >= 0, in nats.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
        tensor([1.3863])
    """
    flat = wide(logits).flatten(0, -2)
    repeated = labels.expand(logits.shape[:-1]).flatten()
    return F.cross_entropy(flat, repeated, reduction="none").view(logits.shape[:-1])


def logit_loss(logits: Logits, labels: Labels) -> PerImage:
    """The label's logit, negated: ``-z_y``; it never saturates.

    Example:
        >>> logit_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([1]))
        tensor([-3.])
    """
    return -_of_label(wide(logits), labels)


def margin_loss(logits: Logits, labels: Labels) -> PerImage:
    """The best other class over the label: ``max_{i != y} z_i - z_y``; positive where the label has lost.

    Example:
        >>> margin_loss(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
        tensor([-1.])
    """
    z = wide(logits)
    label = F.one_hot(labels, z.shape[-1]).bool()
    return z.masked_fill(label, -torch.inf).amax(-1) - _of_label(z, labels)


def dlr_loss(logits: Logits, labels: Labels) -> PerImage:
    """Difference of logits ratio: margin over ``z_(1) - z_(3)``, logits sorted downwards.

    It does not change when logits are scaled or shifted. With fewer than three classes it is the margin.

    Example:
        >>> dlr_loss(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
        tensor([-0.5000])
    """
    z = wide(logits)
    margin = margin_loss(z, labels)
    if z.shape[-1] < 3:
        return margin
    top = z.topk(3, dim=-1).values
    return margin / (top[..., 0] - top[..., 2]).clamp_min(_LEAST)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "logit": logit_loss,
    "margin": margin_loss,
    "dlr": dlr_loss,
}

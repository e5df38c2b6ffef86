"""T-bar: the teacher's mean prediction for the samples of each class, the inter-sample vertex."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_core.errors import ShapeError


class ClassMeanState(NamedTuple):
    """Sums ``(classes, classes)`` of probabilities by label, and counts; both add up over parts."""

    sums: Tensor
    counts: Tensor


def class_mean(
    t: Float[Tensor, "batch classes"],
    y: Int[Tensor, " batch"],
    num_classes: int,
    previous: ClassMeanState | None = None,
    *,
    ignore_index: int = -100,
) -> tuple[Float[Tensor, "classes classes"], ClassMeanState]:
    """Mean teacher prediction per label, streamed.

    Args:
        t: teacher probabilities ``(batch, classes)``; rows sum to 1.
        y: labels ``(batch,)``; rows with ``ignore_index`` are left out.
        num_classes: K.
        previous: the state of the parts seen so far.
        ignore_index: label of rows that take no part.

    Returns:
        T-bar ``(classes, classes)``, row c = mean of t over the samples with label c, uniform for a class
        without samples; and the state to pass on. Sums are kept in float64 where the device has it, so that
        neither the order nor the cut into parts matters.

    Raises:
        ShapeError: t is not ``(batch, num_classes)`` or y not ``(batch,)``.

    Example:
        >>> import torch
        >>> tbar, state = class_mean(torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([0, 0]), 2)
        >>> tbar
        tensor([[0.7000, 0.3000],
                [0.5000, 0.5000]])
    """
    if t.dim() != 2 or t.shape[1] != num_classes or y.shape != t.shape[:1]:
        raise ShapeError(
            f"t has shape {tuple(t.shape)} and y {tuple(y.shape)}, wanted (batch, {num_classes}) and (batch,)"
        )
    wide = torch.float32 if t.device.type == "mps" else torch.float64
    if previous is None:
        zeros = t.new_zeros(num_classes, num_classes, dtype=wide)
        previous = ClassMeanState(zeros, t.new_zeros(num_classes, dtype=wide))
    keep = (y != ignore_index).to(wide)
    rows = torch.where(y == ignore_index, 0, y)
    sums = previous.sums.index_add(0, rows, t.to(wide) * keep.unsqueeze(-1))
    counts = previous.counts.index_add(0, rows, keep)
    mean = sums / counts.clamp_min(1.0).unsqueeze(-1)
    tbar = torch.where(counts.unsqueeze(-1) > 0, mean, 1.0 / num_classes)
    return tbar.to(torch.promote_types(t.dtype, torch.float32)), ClassMeanState(sums, counts)

"""Sums, extremes and the largest values of a batch, over one process or over all."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, distributed


class Reduction:
    """How the losses add up.

    Args:
        everywhere: over all processes of ``torch.distributed`` where it runs; then each process has the
            gradient of its own share, and :meth:`scale` makes the average over processes their sum.
    """

    def __init__(self, everywhere: bool = False) -> None:
        running = everywhere and distributed.is_available() and distributed.is_initialized()
        self.processes = distributed.get_world_size() if running else 1

    def total(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The sum of a number over processes; its gradient is that of this process' share."""
        if self.processes == 1:
            return value
        whole = value.detach().clone()
        distributed.all_reduce(whole)
        return value + (whole - value.detach())

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value; over processes their gradients meet where they are attained."""
        low, high = values.min(), values.max()
        if self.processes > 1:
            low = cast("Tensor", _Extreme.apply(low, distributed.ReduceOp.MIN))
            high = cast("Tensor", _Extreme.apply(high, distributed.ReduceOp.MAX))
        return low, high

    def scale(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The same number with a gradient that averages to the sum over processes."""
        return loss if self.processes == 1 else loss * self.processes - (self.processes - 1) * loss.detach()

    def top_sum(self, values: Float[Tensor, " n"], count: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Sum of the ``count`` largest of non-negative values.

        No number leaves the device: on a GPU the values are sorted and weighed.
        """
        if self.processes > 1:
            return self.total((values * _share(values, count)).sum())
        if values.device.type == "cpu":
            return values.topk(min(int(count), len(values)), sorted=False).values.sum()
        ordered = values.sort(descending=True).values
        return ordered.where(torch.arange(len(values), device=values.device) < count, 0).sum()


class _Extreme(torch.autograd.Function):
    """The smallest or largest of a number over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, op: Any) -> Tensor:
        whole = own.detach().clone()
        distributed.all_reduce(whole, op)
        ctx.save_for_backward(own == whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (attained,) = ctx.saved_tensors
        together = grads[0].clone()
        distributed.all_reduce(together)
        return together * attained, None


def _share(values: Tensor, count: Tensor) -> Tensor:
    """How much each value counts among the largest of all processes: 1, 0, and a share for ties.

    The smallest that counts is found bit by bit: as integers, non-negative floats have the same order.
    """
    kind = torch.int64 if values.dtype == torch.float64 else torch.int32
    bits = values.detach().view(kind)
    bound = torch.zeros((), dtype=kind, device=values.device)
    for bit in range(62 if kind == torch.int64 else 30, -1, -1):
        tried = bound | (1 << bit)
        there = (bits >= tried).sum().double()
        distributed.all_reduce(there)
        bound = torch.where(there >= count, tried, bound)
    tallies = torch.stack([(bits > bound).sum(), (bits == bound).sum()]).double()
    distributed.all_reduce(tallies)
    tie = ((count - tallies[0]) / tallies[1].clamp(min=1)).clamp(0, 1).to(values.dtype)
    return torch.where(bits > bound, 1.0, torch.where(bits == bound, tie, 0.0)).to(values.dtype)

"""Which code computes the family's statistics: tiles on the CPU, Triton on CUDA, plain tensors elsewhere.

Plain tensors are also what ``torch.compile`` traces and what gradients flow through.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from logit_fusion.family import Tilted, tilted
from logit_fusion.solve import Family
from logit_fusion.targets import Prepared, common_support, prepare
from logit_fusion.tiles import TiledFamily, prepare_tiled


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Of sums and alphas: float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


class PlainFamily:
    """Statistics of ``softmax(log_p + alpha * shift)`` out of place: traced, differentiated, on any device.

    Args:
        log_p: (N, vocab) log-probabilities, -inf allowed.
        shift: (N, vocab) finite, of mean 0 under the large model.
    """

    def __init__(self, log_p: Tensor, shift: Tensor) -> None:
        self.log_p, self.shift = log_p, shift
        self.wide = scalar_dtype(shift.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the vocabulary."""
        return self.shift.dtype

    def nodes(self, places: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """A and its slope at evenly spaced alphas: (N, K) each."""
        found = [_normalizer(self.log_p, self.shift, place) for place in places]
        log_norm, mean = (torch.stack(x, -1).to(self.wide) for x in zip(*found, strict=True))
        return log_norm, mean

    def moments(self, alpha: Tensor) -> Tilted:
        """All four statistics at one alpha per row."""
        return Tilted(*(x.to(self.wide) for x in tilted(self.log_p, self.shift, alpha)))

    def normalizer(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """A and its slope at one alpha per row."""
        log_norm, mean = _normalizer(self.log_p, self.shift, alpha.to(self.shift.dtype).unsqueeze(-1))
        return log_norm.to(self.wide), mean.to(self.wide)


def _normalizer(log_p: Tensor, shift: Tensor, alpha: Tensor | float) -> tuple[Tensor, Tensor]:
    exponent = log_p + alpha * shift
    log_norm = exponent.logsumexp(-1)
    return log_norm, ((exponent - log_norm.unsqueeze(-1)).exp() * shift).sum(-1)


def prepared(
    members: list[Tensor], mask: Tensor | None, dtype: torch.dtype, *, differentiable: bool
) -> tuple[Prepared, Tensor | None]:
    """The members on their common support, and that support (None = every token of every row).

    Args:
        members: (N, vocab) logits of large, base and the experts.
        mask: (N, vocab), True = takes part.
        dtype: to compute in.
        differentiable: keep the graph.
    """
    if tiled(members[0], differentiable=differentiable):
        # Reading a sum costs no synchronisation here, and -inf is rare.
        whole = mask is None and all(bool(torch.isfinite(x.sum(dtype=torch.float32))) for x in members)
        if whole:
            return prepare_tiled(members, dtype), None
    members = [x.to(dtype) for x in members]
    support = common_support(members, mask)
    return prepare(members, support), support


def tiled(like: Tensor, *, differentiable: bool) -> bool:
    """Whether the CPU's in-place code takes over."""
    return like.device.type == "cpu" and not differentiable and not torch.compiler.is_compiling()


def make_family(log_p: Tensor, p: Tensor, shift: Tensor, *, differentiable: bool = False) -> Family:
    """The family of N rows, by the fastest code for their device.

    Args:
        log_p: (N, vocab) log-probabilities, -inf allowed.
        p: their exponentials.
        shift: (N, vocab) finite, of mean 0 under ``p``.
        differentiable: keep the graph.
    """
    if tiled(shift, differentiable=differentiable):
        return TiledFamily(log_p, p, shift)
    if shift.is_cuda and not differentiable and not torch.compiler.is_compiling() and _has_triton():
        from logit_fusion.triton_kernels import TritonFamily

        return TritonFamily(log_p, shift)
    return PlainFamily(log_p, shift)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None

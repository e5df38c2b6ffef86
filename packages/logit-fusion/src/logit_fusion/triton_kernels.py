"""The family's statistics on CUDA: each statistic reads the shift and the log-probabilities once.

One program sums one tile of one row; the sums of the tiles, a few numbers each, are joined in float64.
A tile's weights are scaled by its own maximum, so no shift overflows.
"""

# Triton reads the kernels' parameters itself, and adds some of its own.
# pyright: reportMissingParameterType=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from logit_fusion.arrays import constant
from logit_fusion.family import Tilted

BLOCK = 1024
_WARPS = 4


@triton.jit
def _node_sums(
    log_p, shift, top, total, moment, alphas, vocab, tiles,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Sums of the weights and of weight times shift at COUNT evenly spaced alphas, for one tile."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tile * BLOCK + tl.arange(0, BLOCK)
    inside = place < vocab
    log_weight = tl.load(log_p + row * vocab + place, mask=inside, other=-float("inf")).to(DTYPE)
    d = tl.load(shift + row * vocab + place, mask=inside, other=0.0).to(DTYPE)
    out = (row * tiles + tile) * COUNT
    for j in range(COUNT):
        exponent = log_weight + tl.load(alphas + j).to(DTYPE) * d
        high = tl.max(exponent, 0)
        high = tl.where(high == -float("inf"), 0.0, high)
        weight = tl.exp(exponent - high)
        tl.store(top + out + j, high)
        tl.store(total + out + j, tl.sum(weight, 0))
        tl.store(moment + out + j, tl.sum(weight * d, 0))


@triton.jit
def _moment_sums(  # pyright: ignore
    log_p, shift, alpha, top, sums, vocab, tiles, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):
    """The sums of weight * shift**k, k = 0 to 3, at one alpha per row, for one tile."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tile * BLOCK + tl.arange(0, BLOCK)
    inside = place < vocab
    log_weight = tl.load(log_p + row * vocab + place, mask=inside, other=-float("inf")).to(DTYPE)
    d = tl.load(shift + row * vocab + place, mask=inside, other=0.0).to(DTYPE)
    exponent = log_weight + tl.load(alpha + row).to(DTYPE) * d
    high = tl.max(exponent, 0)
    high = tl.where(high == -float("inf"), 0.0, high)
    weight = tl.exp(exponent - high)
    out = row * tiles + tile
    tl.store(top + out, high)
    for k in range(4):
        tl.store(sums + out * 4 + k, tl.sum(weight, 0))
        weight = weight * d


class TritonFamily:
    """Statistics of ``softmax(log_p + alpha * shift)`` by Triton; N rows, float64 scalars on the device.

    Args:
        log_p: (N, vocab) log-probabilities, -inf allowed.
        shift: (N, vocab) finite, of mean 0 under the large model.
    """

    def __init__(self, log_p: Tensor, shift: Tensor) -> None:
        self.log_p, self.shift = log_p.contiguous(), shift.contiguous()
        self.rows, self.vocab = shift.shape
        self.tiles = triton.cdiv(self.vocab, BLOCK)
        self.kind = tl.float64 if shift.dtype == torch.float64 else tl.float32

    @property
    def dtype(self) -> torch.dtype:
        """Of the vocabulary."""
        return self.shift.dtype

    def _empty(self, *shape: int) -> Tensor:
        return self.shift.new_empty(self.rows, self.tiles, *shape)

    def nodes(self, places: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """A and its slope at evenly spaced alphas, (N, K) each."""
        count = len(places)
        alphas = constant(places, torch.float64, self.shift.device)
        top, total, moment = (self._empty(count) for _ in range(3))
        if self.rows:
            _node_sums[(self.rows, self.tiles)](
                self.log_p, self.shift, top, total, moment, alphas, self.vocab, self.tiles,
                COUNT=count, BLOCK=BLOCK, DTYPE=self.kind, num_warps=_WARPS,
            )  # fmt: skip
        log_norm, (mean,) = join(top, total, moment.unsqueeze(-1))
        return log_norm, mean

    def moments(self, alpha: Tensor) -> Tilted:
        """All four statistics at one alpha per row."""
        top, sums = self._empty(), self._empty(4)
        if self.rows:
            _moment_sums[(self.rows, self.tiles)](
                self.log_p, self.shift, alpha.to(self.shift.dtype), top, sums, self.vocab, self.tiles,
                BLOCK=BLOCK, DTYPE=self.kind, num_warps=_WARPS,
            )  # fmt: skip
        log_norm, (mean, second, third) = join(top, sums[..., 0], sums[..., 1:])
        var = (second - mean * mean).clamp(min=0.0)
        return Tilted(log_norm, mean, var, third - mean * (3.0 * var + mean * mean))

    def normalizer(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """A and its slope at one alpha per row."""
        stats = self.moments(alpha)
        return stats.log_norm, stats.mean


def join(top: Tensor, total: Tensor, sums: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The logarithm of the whole normaliser, and the moments, of tiles scaled each by its own maximum.

    Args:
        top: (N, tiles, ...) the tiles' maxima.
        total: (N, tiles, ...) their sums of weights.
        sums: (N, tiles, ..., M) their sums of weight times something.
    """
    top, total, sums = top.double(), total.double(), sums.double()
    high = top.amax(1, keepdim=True)
    scale = (top - high).exp()
    whole = (total * scale).sum(1)
    moments = (sums * scale.unsqueeze(-1)).sum(1) / whole.unsqueeze(-1)
    return whole.log() + high.squeeze(1), moments.unbind(-1)

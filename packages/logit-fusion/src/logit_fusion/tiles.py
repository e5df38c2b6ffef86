r"""The family's statistics on the CPU: in place, all nodes of the grid while a tile is in cache.

:math:`e^{(\alpha + jh)d} = e^{\alpha d}(e^{hd})^j`: one exponential for the weights and one for the ratio per
token, then one product a node. Powers are built by doubling, so that a tile takes few calls.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from logit_fusion.arrays import Array, as_array, positive
from logit_fusion.family import Tilted
from logit_fusion.targets import Prepared

# Entries of a tile with its powers, and of one without: measured best on two-core machines with 0.5-1 MB of
# L2.
NODE_TILE = 32_768
TILE = 65_536


def _wide(rows: int, columns: int) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64)


def exponent_limit(dtype: torch.dtype) -> float:
    """The largest alpha * d that the products of powers bear.

    The normaliser is >= 1 as d is centred, so below it neither an overflow nor a weight that was lost at the
    first node can matter.
    """
    return 600.0 if dtype == torch.float64 else 60.0


def _blocks(rows: int, vocab: int, size: int) -> list[tuple[slice, slice]]:
    height = max(1, min(rows, size // max(vocab, 1)))
    width = min(vocab, size)
    return [
        (slice(i, min(i + height, rows)), slice(j, min(j + width, vocab)))
        for i in range(0, rows, height)
        for j in range(0, vocab, width)
    ]


def prepare_tiled(members: list[Tensor], dtype: torch.dtype) -> Prepared:
    """As :func:`logit_fusion.targets.prepare` without a mask, for finite logits, row block by row block.

    Args:
        members: (N, vocab) finite logits of large, base and the experts, of any floating dtype.
        dtype: to compute in.
    """
    rows, vocab = members[0].shape
    count = len(members) - 2
    log_p, p, log_q = (torch.empty(rows, vocab, dtype=dtype) for _ in range(3))
    shifts = torch.empty(count, rows, vocab, dtype=dtype)
    f, r, mean0 = _wide(rows, count), _wide(rows, count), _wide(rows, count)
    height = max(1, min(rows, TILE // max(vocab, 1)))
    q_all, e_all = (torch.empty(height, vocab, dtype=dtype) for _ in range(2))
    for start in range(0, rows, height):
        at = slice(start, min(start + height, rows))
        q, e = q_all[: at.stop - start], e_all[: at.stop - start]
        _normalize(members[0][at], log_p[at], p[at])
        _normalize(members[1][at], log_q[at], q)
        for t in range(count):
            shift = shifts[t, at]
            _normalize(members[2 + t][at], shift, e)
            shift.sub_(log_q[at])
            f[at, t] = e.mul_(shift).sum(-1)
            r[at, t] = torch.mul(q, shift, out=e).sum(-1)
            mean = torch.mul(p[at], shift, out=e).sum(-1, keepdim=True)
            mean0[at, t] = mean.squeeze(-1)
            shift.sub_(mean)
    return Prepared(log_p, p, log_q, shifts, f, r.neg_(), mean0)


def _normalize(logits: Tensor, log_probs: Tensor, probs: Tensor) -> None:
    log_probs.copy_(logits)
    log_probs.sub_(log_probs.amax(-1, keepdim=True))
    torch.exp(log_probs, out=probs)
    total = probs.sum(-1, keepdim=True)
    log_probs.sub_(total.log())
    probs.div_(total)


class TiledFamily:
    """Statistics of ``softmax(log_p + alpha * shift)``, N rows of one shift each, in float64 sums.

    Args:
        log_p: (N, vocab) log-probabilities, -inf allowed.
        p: their exponentials.
        shift: (N, vocab) finite, of mean 0 under ``p``.
    """

    def __init__(self, log_p: Tensor, p: Tensor, shift: Tensor) -> None:
        self.log_p, self.p, self.shift = log_p, p, shift
        peak = shift.amax(-1).numpy().astype(np.float64)
        self.peak = np.where(np.isnan(peak), np.inf, peak)

    @property
    def dtype(self) -> torch.dtype:
        """Of the vocabulary."""
        return self.shift.dtype

    def _within(self, alpha: Array) -> Array:
        return self.peak * alpha <= exponent_limit(self.shift.dtype)

    def nodes(self, places: tuple[float, ...]) -> tuple[Array, Array]:
        """A and its slope at evenly spaced alphas: (N, K) each."""
        easy = self._within(places[-1])
        if easy.all():
            return _node_sums(self.log_p, self.p, self.shift, places)
        log_norm, mean = (np.zeros((len(easy), len(places))) for _ in range(2))
        rows = np.flatnonzero(easy)
        if len(rows):
            log_norm[rows], mean[rows] = _node_sums(self.log_p[rows], self.p[rows], self.shift[rows], places)
        rows = np.flatnonzero(~easy)
        log_p, shift = self.log_p[rows], self.shift[rows]
        for j, place in enumerate(places):
            log_norm[rows, j], mean[rows, j] = _moments(log_p, shift, np.full(len(rows), place), 1, hard=True)
        return log_norm, mean

    def moments(self, alpha: Array) -> Tilted:
        """All four statistics at one alpha per row."""
        return _central(_moments(self.log_p, self.shift, alpha, 3, hard=not self._within(alpha).all()))

    def normalizer(self, alpha: Array) -> tuple[Array, Array]:
        """A and its slope at one alpha per row."""
        alpha = as_array(alpha)
        log_norm, mean = _moments(self.log_p, self.shift, alpha, 1, hard=not self._within(alpha).all())
        return log_norm, mean


def _node_sums(log_p: Tensor, p: Tensor, shift: Tensor, alphas: tuple[float, ...]) -> tuple[Array, Array]:
    rows, vocab = shift.shape
    count = len(alphas)
    spacing = (alphas[-1] - alphas[0]) / max(count - 1, 1)
    total, moment = _wide(rows, count), _wide(rows, count)
    blocks = _blocks(rows, vocab, NODE_TILE)
    size = max(((i.stop - i.start) * (j.stop - j.start) for i, j in blocks), default=0)
    powers, ratio_all = shift.new_empty(count * size), shift.new_empty(size)
    for i, j in blocks:
        d = shift[i, j]
        weight = powers[: count * d.numel()].view(count, *d.shape)
        ratio = ratio_all[: d.numel()].view(d.shape)
        if alphas[0] == 0.0:
            weight[0].copy_(p[i, j])
        else:
            torch.add(log_p[i, j], d, alpha=alphas[0], out=weight[0]).exp_()
        torch.mul(d, spacing, out=ratio).exp_()
        filled = 1
        while filled < count:
            more = min(filled, count - filled)
            torch.mul(weight[:more], ratio, out=weight[filled : filled + more])
            filled += more
            if filled < count:
                ratio.mul_(ratio)
        total[i] += weight.sum(-1).t()
        moment[i] += torch.bmm(d.unsqueeze(1), weight.permute(1, 2, 0)).squeeze(1)
    sums = total.numpy()
    return np.log(sums), moment.numpy() / sums


def _moments(log_p: Tensor, shift: Tensor, alpha: Array, order: int, *, hard: bool) -> Array:
    """A and the first ``order`` raw moments of the shift, (order + 1, N)."""
    rows, vocab = shift.shape
    scale = torch.from_numpy(alpha).to(shift.dtype).unsqueeze(-1)
    if rows * vocab <= TILE and not hard:  # one tile: a few rows are over in few calls
        weight = torch.addcmul(log_p, shift, scale).exp_()
        found = [weight.sum(-1)]
        found += (weight.mul_(shift).sum(-1) for _ in range(order))
        sums = torch.stack(found).numpy().astype(np.float64)
        sums[1:] /= sums[0]
        sums[0] = np.log(sums[0])
        return sums
    total = _wide(order + 1, rows)
    top = None
    if hard:
        top = torch.addcmul(log_p, shift, scale).amax(-1, keepdim=True)
    blocks = _blocks(rows, vocab, TILE)
    size = max(((i.stop - i.start) * (j.stop - j.start) for i, j in blocks), default=0)
    buffer = shift.new_empty(size)
    for i, j in blocks:
        d = shift[i, j]
        weight = buffer[: d.numel()].view(d.shape)
        torch.addcmul(log_p[i, j], d, scale[i], out=weight)
        if top is not None:
            weight.sub_(top[i])
        weight.exp_()
        total[0, i] += weight.sum(-1)
        for k in range(1, order + 1):
            total[k, i] += weight.mul_(d).sum(-1)
    sums = total.numpy()
    sums[1:] /= sums[0]
    sums[0] = np.log(sums[0])
    if top is not None:
        sums[0] += top.squeeze(-1).numpy()
    return sums


def _central(raw: Array) -> Tilted:
    log_norm, mean, second, third = raw
    var = positive(second - mean * mean)
    return Tilted(log_norm, mean, var, third - mean * (3.0 * var + mean * mean))

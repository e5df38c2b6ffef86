r"""The family's statistics on the CPU: in place, all nodes of the grid while a tile is in cache.

:math:`e^{(\alpha + jh)d} = e^{\alpha d}(e^{hd})^j`: one exponential for the weights and one for the ratio per
token, then one product a node. Powers are built by doubling, so that a tile takes few calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logit_fusion.arrays import Array, as_tensor
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
        peak = shift.amax(-1)
        self.peak = peak.nan_to_num(nan=torch.inf)

    @property
    def dtype(self) -> torch.dtype:
        """Of the vocabulary."""
        return self.shift.dtype

    def _within(self, alpha: float) -> Tensor:
        return self.peak * alpha <= exponent_limit(self.shift.dtype)

    def nodes(self, places: tuple[float, ...]) -> tuple[Array, Array]:
        """A and its slope at evenly spaced alphas: (N, K) each."""
        easy = self._within(places[-1])
        if bool(easy.all()):
            log_norm, mean = _node_sums(self.log_p, self.p, self.shift, places)
            return log_norm.numpy(), mean.numpy()
        log_norm, mean = (_wide(len(easy), len(places)) for _ in range(2))
        rows = easy.nonzero().squeeze(-1)
        if len(rows):
            log_norm[rows], mean[rows] = _node_sums(self.log_p[rows], self.p[rows], self.shift[rows], places)
        rows = (~easy).nonzero().squeeze(-1)
        log_p, shift = self.log_p[rows], self.shift[rows]
        for j, place in enumerate(places):
            alpha = torch.full((len(rows),), place, dtype=torch.float64)
            log_norm[rows, j], mean[rows, j] = _moments(log_p, shift, alpha, 1, hard=True)
        return log_norm.numpy(), mean.numpy()

    def moments(self, alpha: Array) -> Tilted:
        """All four statistics at one alpha per row."""
        place = as_tensor(alpha)
        return _central(_moments(self.log_p, self.shift, place, 3, hard=self._hard(place)))

    def normalizer(self, alpha: Array) -> tuple[Array, Array]:
        """A and its slope at one alpha per row."""
        place = as_tensor(alpha)
        log_norm, mean = _moments(self.log_p, self.shift, place, 1, hard=self._hard(place))
        return log_norm.numpy(), mean.numpy()

    def _hard(self, alpha: Tensor) -> bool:
        return not bool((self.peak * alpha <= exponent_limit(self.shift.dtype)).all())


def _node_sums(log_p: Tensor, p: Tensor, shift: Tensor, alphas: tuple[float, ...]) -> tuple[Tensor, Tensor]:
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
    return total.log(), moment / total


def _moments(log_p: Tensor, shift: Tensor, alpha: Tensor, order: int, *, hard: bool) -> tuple[Tensor, ...]:
    """A and the first ``order`` raw moments of the shift."""
    rows, vocab = shift.shape
    sums = _wide(order + 1, rows)
    scale = alpha.to(shift.dtype).unsqueeze(-1)
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
        sums[0, i] += weight.sum(-1)
        for k in range(1, order + 1):
            sums[k, i] += weight.mul_(d).sum(-1)
    log_norm = sums[0].log()
    if top is not None:
        log_norm = log_norm + top.squeeze(-1)
    return log_norm, *(sums[1:] / sums[0])


def _central(raw: tuple[Tensor, ...]) -> Tilted:
    log_norm, mean, second, third = (x.numpy() for x in raw)
    var = (second - mean * mean).clip(0.0)
    return Tilted(log_norm, mean, var, third - mean * (3.0 * var + mean * mean))

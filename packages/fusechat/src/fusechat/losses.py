"""Divergences between a few kept entries of a target and the student's logits, without a dense target.

The only tensor as wide as the vocabulary is the gradient of the logits itself.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fusion_core.errors import ConfigError
from fusion_core.numerics import kl_divergence

Divergence = Literal["ce", "kl", "rkl", "jsd", "uld"]
DIVERGENCES = ("ce", "kl", "rkl", "jsd", "uld")
_ENTRIES = 1 << 20  # logits that are widened at a time


class _LogProbs(torch.autograd.Function):
    """Log-probabilities of some classes and the sum over all, with one gradient buffer."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.empty(len(logits), dtype=wide, device=logits.device)
        total = torch.empty_like(lse)
        for rows in _chunks(logits):
            part = logits[rows].to(wide)
            lse[rows] = part.logsumexp(-1)
            total[rows] = part.sum(-1)
        ctx.save_for_backward(logits, ids, lse)
        return logits.gather(-1, ids).to(wide) - lse[:, None], total - logits.shape[-1] * lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, ids, lse = ctx.saved_tensors
        picked, total = grads
        out = torch.empty_like(logits)
        scale = -(picked.sum(-1) + logits.shape[-1] * total)
        idle = (picked == 0).all(-1) & (total == 0)
        for rows in _chunks(logits):
            part = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_()
            part.mul_(scale[rows, None]).add_(total[rows, None])
            part.scatter_add_(-1, ids[rows], picked[rows])
            # A padded position may hold anything, NaN included.
            out[rows] = part.masked_fill_(idle[rows, None], 0.0)
        return out, None


def _chunks(logits: Tensor) -> list[slice]:
    step = max(1, _ENTRIES // max(1, logits.shape[-1]))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def log_probs_at(
    logits: Float[Tensor, "... classes"], ids: Int64[Tensor, "... m"]
) -> tuple[Float[Tensor, "... m"], Float[Tensor, "..."]]:
    """Log-probabilities of the named classes, and the sum of the log-probabilities of all classes.

    Args:
        logits: (..., classes) of any float dtype; computed in float32 or wider, a slice at a time.
        ids: (..., m) classes, which may repeat.

    Returns:
        (..., m) and (...), differentiable once.

    Example:
        >>> picked, total = log_probs_at(torch.zeros(1, 4), torch.tensor([[0, 3]]))
        >>> picked.exp().tolist()
        [[0.25, 0.25]]
    """
    flat = logits.reshape(-1, logits.shape[-1])
    picked, total = _LogProbs.apply(flat, ids.reshape(-1, ids.shape[-1]))  # pyright: ignore[reportGeneralTypeIssues]
    return picked.reshape(ids.shape), total.reshape(ids.shape[:-1])


def entropy(
    probs: Float[Tensor, "... k"], rest: Float[Tensor, "..."], others: Tensor | int
) -> Float[Tensor, "..."]:
    """Entropy in nats of distinct entries and a rest that is spread evenly over ``others`` classes."""
    spread = rest / torch.as_tensor(others).clamp(min=1)
    return -torch.xlogy(probs, probs).sum(-1) - torch.xlogy(rest, spread)


def sparse_divergence(
    log_q: Float[Tensor, "... k"],
    total: Float[Tensor, "..."],
    ids: Int64[Tensor, "... k"],
    probs: Float[Tensor, "... k"],
    rest: Float[Tensor, "..."],
    size: int,
    divergence: Literal["ce", "kl", "jsd"] = "ce",
    beta: float = 0.5,
) -> Float[Tensor, "..."]:
    """Divergence of a target with few entries from the student, per position (section 2.7).

    Args:
        log_q: student's log-probabilities at the ids.
        total: sum of the student's log-probabilities over all classes.
        ids: distinct classes, -1 where there is no entry.
        probs: of the entries, 0 where there is none.
        rest: target's mass on all other classes, spread evenly; 0 for ``"jsd"``.
        size: number of classes.
        divergence: ``"ce"``, ``"kl"`` (target to student) or ``"jsd"``.
        beta: share of the target in the middle of ``"jsd"``.

    Returns:
        (...) nats.
    """
    kept = ids >= 0
    inside = log_q.masked_fill(~kept, 0.0)
    if divergence == "jsd":
        q = inside.exp().masked_fill(~kept, 0.0)
        middle = (beta * probs + (1 - beta) * q).masked_fill(~kept, 1.0)
        own = torch.xlogy(probs, probs) - probs * middle.log()
        other = (q * (inside - middle.log())).sum(-1)
        outside = (1 - q.sum(-1)).clamp(min=0.0) * -math.log(1 - beta)
        return beta * own.sum(-1) + (1 - beta) * (other + outside)
    others = size - kept.sum(-1)
    spread = rest / others.clamp(min=1)
    cross = -(probs * inside).sum(-1) - spread * (total - inside.sum(-1))
    return cross if divergence == "ce" else cross - entropy(probs, rest, others)


def dense_divergence(
    log_q: Float[Tensor, "... classes"],
    p: Float[Tensor, "... classes"],
    divergence: Divergence = "ce",
    beta: float = 0.5,
) -> Float[Tensor, "..."]:
    """The same from dense probabilities: the equations of section 2.7 as they stand.

    Args:
        log_q: student's log-probabilities.
        p: target's probabilities; for ``"uld"`` on its own vocabulary of any size.
        divergence: which.
        beta: of ``"jsd"``.

    Returns:
        (...) nats, or a distance in [0, 2] for ``"uld"``.

    Raises:
        ConfigError: unknown divergence.

    Example:
        >>> p = torch.tensor([0.5, 0.5])
        >>> round(dense_divergence(torch.tensor([0.25, 0.75]).log(), p, "kl").item(), 4)
        0.1438
    """
    check_divergence(divergence, beta)
    if divergence == "ce":
        return -(p * log_q).masked_fill(p == 0, 0.0).sum(-1)
    if divergence == "kl":
        return kl_divergence(p.log(), log_q)
    if divergence == "rkl":
        return kl_divergence(log_q, p.log())
    if divergence == "jsd":
        middle = (beta * p + (1 - beta) * log_q.exp()).log()
        return beta * kl_divergence(p.log(), middle) + (1 - beta) * kl_divergence(log_q, middle)
    q = log_q.exp().sort(-1, descending=True).values
    more = torch.nn.functional.pad
    width = max(q.shape[-1], p.shape[-1])
    p = more(p.sort(-1, descending=True).values, (0, width - p.shape[-1]))
    return (more(q, (0, width - q.shape[-1])) - p).abs().sum(-1)


def uld(log_q_top: Float[Tensor, "... k"], probs: Float[Tensor, "... k"]) -> Float[Tensor, "..."]:
    """Sum of the distances of descending probabilities, the target's beyond its k entries being 0.

    Args:
        log_q_top: the student's k largest log-probabilities, descending.
        probs: the target's k probabilities in any order, on its own vocabulary.
    """
    q = log_q_top.exp()
    p = probs.sort(-1, descending=True).values
    return (q - p).abs().sum(-1) + (1 - q.sum(-1)).clamp(min=0.0)


def check_divergence(divergence: str, beta: float) -> None:
    """Raise unless the divergence is known and beta lies inside (0, 1).

    Raises:
        ConfigError: otherwise.
    """
    if divergence not in DIVERGENCES:
        raise ConfigError(f"divergence is {divergence!r}, wanted one of {list(DIVERGENCES)}")
    if not 0.0 < beta < 1.0:
        raise ConfigError(f"beta is {beta!r}, wanted a number in (0, 1)")

"""What fine-tuning did to the small model: support, shift and the divergences that the method aims at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_core.numerics import kl_divergence
from logit_fusion.family import normalized


class Prepared(NamedTuple):
    """Members ready for the solver: normalised on their common support, shifts centred under the large model.

    Attributes:
        log_p: (N, vocab) log-probabilities of the large model, -inf outside the support.
        p: (N, vocab) their exponentials.
        log_q: (N, vocab) log-probabilities of the small base.
        shifts: (T, N, vocab) log q_t - log q - ``mean0``, 0 outside the support.
        f: (N, T) KL(expert, base), nats.
        r: (N, T) KL(base, expert), nats.
        mean0: (N, T) mean of log q_t - log q under the large model.
    """

    log_p: Float[Tensor, "rows vocab"]
    p: Float[Tensor, "rows vocab"]
    log_q: Float[Tensor, "rows vocab"]
    shifts: Float[Tensor, "experts rows vocab"]
    f: Float[Tensor, "rows experts"]
    r: Float[Tensor, "rows experts"]
    mean0: Float[Tensor, "rows experts"]


def targets(
    base: Float[Tensor, "*batch vocab"], expert: Float[Tensor, "*batch vocab"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """F = KL(expert, base) and r = KL(base, expert) of two members' logits, in nats.

    Args:
        base: (..., vocab) logits of the small base.
        expert: (..., vocab) logits of its fine-tune.

    Example:
        >>> f, r = targets(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
        >>> round(float(f), 4), round(float(r), 4)
        (0.1109, 0.1201)
    """
    log_q, log_e = normalized(base), normalized(expert)
    return kl_divergence(log_e, log_q), kl_divergence(log_q, log_e)


def common_support(
    members: list[Float[Tensor, "rows vocab"]], mask: Bool[Tensor, "rows vocab"] | None
) -> Bool[Tensor, "rows vocab"]:
    """Tokens that the mask allows and that have a finite logit in every member."""
    kept = torch.isfinite(members[0])
    for member in members[1:]:
        kept = kept & torch.isfinite(member)
    return kept if mask is None else kept & mask


def prepare(
    members: list[Float[Tensor, "rows vocab"]], support: Bool[Tensor, "rows vocab"] | None
) -> Prepared:
    """Normalise the members on the support and centre the shifts; out of place, differentiable.

    Args:
        members: logits of large, base and the experts, of one dtype.
        support: True = the token takes part; None = all do.
    """
    inside = members if support is None else [x.masked_fill(~support, -torch.inf) for x in members]
    log_p, log_q, *log_experts = [normalized(x) for x in inside]
    p, q = log_p.exp(), log_q.exp()
    shifts, f, r, mean0 = [], [], [], []
    for log_expert in log_experts:
        # Where both are -inf the difference is NaN, and where() alone would send it back to the gradient.
        if support is None:
            shift = log_expert - log_q
        else:
            shift = log_expert.masked_fill(~support, 0.0) - log_q.masked_fill(~support, 0.0)
        mean = (p * shift).sum(-1)
        f.append((log_expert.exp() * shift).sum(-1))
        r.append(-(q * shift).sum(-1))
        mean0.append(mean)
        centered = shift - mean.unsqueeze(-1)
        shifts.append(centered if support is None else centered.masked_fill(~support, 0.0))
    return Prepared(
        log_p, p, log_q, torch.stack(shifts), torch.stack(f, -1), torch.stack(r, -1), torch.stack(mean0, -1)
    )

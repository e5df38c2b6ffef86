"""Which drafted tokens are kept, so that the output has the law of plain decoding (speculative sampling)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fusion_core.errors import check_shape


@dataclass(frozen=True, slots=True, eq=False)
class Accepted:
    """What a verified draft gives.

    Attributes:
        count: (batch) how many drafted tokens are kept, 0 to G.
        token: (batch) the token that follows the kept ones: the correction, or the bonus token.
        tokens: (batch, G + 1) kept tokens, then ``token``, then -1.
    """

    count: Int64[Tensor, "batch"]
    token: Int64[Tensor, "batch"]
    tokens: Int64[Tensor, "batch drafted1"]


def accept_greedy(
    draft: Int64[Tensor, "batch drafted"],
    target_scores: Float[Tensor, "batch drafted1 vocab"],
) -> Accepted:
    """Keep the drafted tokens as long as each is the target's argmax.

    Args:
        draft: (batch, G) tokens.
        target_scores: (batch, G + 1, vocab) the target's scores at the G drafted positions and the next one.

    Raises:
        ShapeError: the shapes do not fit each other.

    Example:
        >>> scores = torch.eye(3)[[1, 2, 0]].unsqueeze(0)
        >>> accept_greedy(torch.tensor([[1, 1]]), scores).tokens
        tensor([[ 1,  2, -1]])
    """
    _check(draft, target_scores)
    best = target_scores.argmax(-1)
    return _kept(draft, draft == best[:, :-1], best)


def accept_sampled(
    draft: Int64[Tensor, "batch drafted"],
    draft_log_probs: Float[Tensor, "batch drafted vocab"],
    target_log_probs: Float[Tensor, "batch drafted1 vocab"],
    *,
    generator: torch.Generator | None = None,
) -> Accepted:
    """Keep drafted token x with probability min(1, p(x) / q(x)), else draw from the positive part of p - q.

    The output has exactly the law p, whatever q is (both after temperature, top-k and the like).

    Args:
        draft: (batch, G) tokens, drawn from ``draft_log_probs``.
        draft_log_probs: (batch, G, vocab) log q, normalised, -inf allowed.
        target_log_probs: (batch, G + 1, vocab) log p, normalised, -inf allowed.
        generator: of the draws, on the tensors' device.

    Raises:
        ShapeError: the shapes do not fit each other.

    Example:
        >>> certain = torch.tensor([[[0.0, -torch.inf]]])
        >>> accept_sampled(torch.tensor([[0]]), certain, certain.expand(1, 2, 2)).tokens
        tensor([[0, 0]])
    """
    _check(draft, target_log_probs)
    check_shape("draft_log_probs", draft_log_probs, "batch drafted vocab", **_sizes(draft, target_log_probs))
    place = draft.unsqueeze(-1)
    p = target_log_probs[:, :-1].gather(-1, place).squeeze(-1)
    q = draft_log_probs.gather(-1, place).squeeze(-1)
    chance = torch.rand(draft.shape, generator=generator, device=draft.device, dtype=p.dtype)
    # u < p / q without a division; where q is 0 the token cannot have been drawn, and is refused if p is 0
    # too.
    kept = (chance * q.exp() < p.exp()) & (p > -torch.inf)
    rest = (target_log_probs[:, :-1].exp() - draft_log_probs.exp()).clamp(min=0.0)
    # p = q leaves nothing but rounding errors; nothing is refused there either, so p itself stands in.
    left = rest.sum(-1, keepdim=True)
    rest = torch.where(left > 0.0, rest, target_log_probs[:, :-1].exp())
    law = torch.cat([rest, target_log_probs[:, -1:].exp()], 1)
    after = torch.multinomial(law.flatten(0, 1), 1, generator=generator).view(law.shape[:2])
    return _kept(draft, kept, after)


def _sizes(draft: Tensor, scores: Tensor) -> dict[str, int]:
    return {"batch": draft.shape[0], "drafted": draft.shape[1], "vocab": scores.shape[-1]}


def _check(draft: Tensor, scores: Tensor) -> None:
    check_shape("draft", draft, "batch drafted")
    sizes = {"batch": draft.shape[0], "next": draft.shape[1] + 1}
    check_shape("target scores", scores, "batch next vocab", **sizes)


def _kept(draft: Tensor, agreed: Tensor, after: Tensor) -> Accepted:
    """The agreed prefix, then the token drawn for the place behind it."""
    count = agreed.long().cumprod(-1).sum(-1)
    token = after.gather(-1, count.unsqueeze(-1))
    place = torch.arange(after.shape[-1], device=draft.device)
    padded = torch.cat([draft, torch.full_like(token, -1)], -1)
    tokens = torch.where(place < count.unsqueeze(-1), padded, -1).scatter(-1, count.unsqueeze(-1), token)
    return Accepted(count, token.squeeze(-1), tokens)

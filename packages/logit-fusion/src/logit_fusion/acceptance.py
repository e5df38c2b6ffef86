"""Which drafted tokens are kept, so that the output has the law of plain decoding (speculative sampling)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


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
    """
    raise NotImplementedError


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
    """
    raise NotImplementedError

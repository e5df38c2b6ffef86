"""Which expert fits the text so far: running log-likelihoods, and the weights that follow from them.

The spec's own rule (section 2.7), not the paper's: ``e <- gamma * e + log q(token)`` for the small base and each
expert, and a softmax over them. The base's share means "no expert".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fusion_core.errors import check_range

GAMMA = 0.97
_BLOCK = 256


def token_log_probs(logits: Float[Tensor, "... vocab"], tokens: Int64[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Log-probability of each token under its own logits, in float32 or wider.

    Args:
        logits: (..., vocab), -inf allowed.
        tokens: (...) ids.

    Returns:
        (...) natural log-probabilities.
    """
    raise NotImplementedError


def update_evidence(
    evidence: Float[Tensor, "*batch sources"],
    log_probs: Float[Tensor, "*batch sources"],
    *,
    gamma: float = GAMMA,
    active: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch sources"]:
    """One token seen: ``gamma * evidence + log_probs``; rows that are not active keep theirs.

    Args:
        evidence: running log-likelihoods of the small base (column 0) and the experts (1 to T); 0 at the start.
        log_probs: of the token just seen, under the same sources, in the same order.
        gamma: in (0, 1]; 1 never forgets.
        active: rows that saw a real token (not padding).

    Returns:
        The new evidence.

    Raises:
        ConfigError: ``gamma`` outside (0, 1].
    """
    raise NotImplementedError


def scan_evidence(
    log_probs: Float[Tensor, "*batch tokens sources"],
    *,
    gamma: float = GAMMA,
    mask: Bool[Tensor, "*batch tokens"] | None = None,
    initial: Float[Tensor, "*batch sources"] | None = None,
) -> Float[Tensor, "*batch tokens sources"]:
    """The evidence after each token of a sequence: :func:`update_evidence` over all of them at once.

    Args:
        log_probs: of the tokens, column 0 the small base, then the experts.
        gamma: in (0, 1].
        mask: True for real tokens; others leave the evidence as it is.
        initial: evidence before the first token, 0 by default.

    Returns:
        Entry n has seen tokens 0 to n; the last one goes on with :func:`update_evidence`.
    """
    raise NotImplementedError


def evidence_weights(evidence: Float[Tensor, "*batch sources"]) -> Float[Tensor, "*batch experts"]:
    """Weights of the experts: softmax over base and experts, without the base's share.

    Args:
        evidence: column 0 the small base, then the experts.

    Returns:
        (..., T) weights >= 0 that sum to at most 1; what is missing is the share of "no expert".

    Example:
        >>> evidence_weights(torch.zeros(1, 3))
        tensor([[0.3333, 0.3333]])
    """
    raise NotImplementedError

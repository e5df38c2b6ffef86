"""Which expert fits the text so far: running log-likelihoods, and the weights that follow from them.

This package's rule, not the paper's: ``e <- gamma * e + log q(token)`` for the small base and each
expert, and a softmax over them. The base's share means "no expert".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fusion_core.errors import ConfigError

GAMMA = 0.97
# A token that a source thinks impossible counts against it for a while, not for ever.
FLOOR = -50.0
_BLOCK = 256


def token_log_probs(logits: Float[Tensor, "... vocab"], tokens: Int64[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Log-probability of each token under its own logits, in float32 or wider.

    Args:
        logits: (..., vocab), -inf allowed.
        tokens: (...) ids.

    Returns:
        (...) natural log-probabilities.

    Example:
        >>> token_log_probs(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor([0.2500])
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - wide.logsumexp(-1)


def update_evidence(
    evidence: Float[Tensor, "*batch sources"],
    log_probs: Float[Tensor, "*batch sources"],
    *,
    gamma: float = GAMMA,
    active: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch sources"]:
    """One token seen: ``gamma * evidence + log_probs``; rows that are not active keep theirs.

    Args:
        evidence: running log-likelihoods of the small base (column 0) and the experts (1 to T); 0 at the
            start.
        log_probs: of the token just seen, under the same sources, in the same order.
        gamma: in (0, 1]; 1 never forgets.
        active: rows that saw a real token (not padding).

    Returns:
        The new evidence.

    Raises:
        ConfigError: ``gamma`` outside (0, 1].

    Example:
        >>> update_evidence(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -1.0]]), gamma=0.5)
        tensor([[-1.5000, -2.0000]])
    """
    _check(gamma)
    new = gamma * evidence + log_probs.clamp(min=FLOOR)
    return new if active is None else torch.where(active.unsqueeze(-1), new, evidence)


def _check(gamma: float) -> None:
    if not 0.0 < gamma <= 1.0:
        raise ConfigError(f"gamma is {gamma!r}, wanted a number in (0, 1]")


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

    Raises:
        ConfigError: ``gamma`` outside (0, 1].

    Example:
        >>> scan_evidence(torch.tensor([[[-1.0], [-1.0], [-1.0]]]), gamma=0.5).flatten()
        tensor([-1.0000, -1.5000, -1.7500])
    """
    _check(gamma)
    *batch, tokens, sources = log_probs.shape
    seen = log_probs.clamp(min=FLOOR)
    real = torch.ones(*batch, tokens, dtype=torch.bool, device=seen.device) if mask is None else mask
    seen = torch.where(real.unsqueeze(-1), seen, 0.0)
    state = seen.new_zeros(*batch, sources) if initial is None else initial.to(seen.dtype)
    found: list[Tensor] = []
    for start in range(0, tokens, _BLOCK):
        part = slice(start, min(start + _BLOCK, tokens))
        # How many real tokens lie between; a padding token neither adds nor forgets.
        count = real[..., part].to(seen.dtype).cumsum(-1)
        age = count.unsqueeze(-1) - count.unsqueeze(-2)
        length = part.stop - part.start
        before = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
        decay = torch.where(before, torch.pow(gamma, age.clamp(min=0.0)), 0.0)
        block = decay @ seen[..., part, :]
        block = block + torch.pow(gamma, count).unsqueeze(-1) * state.unsqueeze(-2)
        state = block[..., -1, :]
        found.append(block)
    return torch.cat(found, -2) if found else seen


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
    return evidence.softmax(-1)[..., 1:]

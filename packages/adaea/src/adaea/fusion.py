"""Joining the surrogates' predictions under weights: at the logits, the probabilities or the losses."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from adaea.losses import LOSSES, Loss, wide
from fusion_core.errors import ConfigError

Fusion = Literal["logits", "probs", "loss"]
FUSIONS = ("logits", "probs", "loss")
Logits = Float[Tensor, "surrogates ... batch classes"]
Weights = Float[Tensor, " surrogates"] | Float[Tensor, "surrogates batch"]


def _beside(weights: Tensor, dims: int) -> Tensor:
    """(K,) or (K, B) so that it multiplies (K, ..., B, N) of so many dimensions."""
    if weights.dim() == 1:
        return weights.view(-1, *[1] * (dims - 1))
    return weights.view(weights.shape[0], *[1] * (dims - 3), weights.shape[1], 1)


def fuse_logits(
    logits: Logits, weights: Weights, fusion: Literal["logits", "probs"] = "logits"
) -> Float[Tensor, "... batch classes"]:
    """The ensemble's logits: the weighted mean, or the logarithm of the weighted mean of probabilities.

    Args:
        logits: ``(surrogates, ..., batch, classes)``.
        weights: ``(surrogates,)`` or ``(surrogates, batch)``, summing to 1 over the surrogates.
        fusion: ``"logits"`` or ``"probs"``; the latter by log-sum-exp, so nothing underflows.

    Returns:
        ``(..., batch, classes)``, float32 or wider.

    Raises:
        ConfigError: another rule.

    Example:
        >>> import torch
        >>> z = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])
        >>> fuse_logits(z, torch.tensor([0.5, 0.5]))
        tensor([[1., 0.]])
        >>> fuse_logits(z, torch.tensor([0.5, 0.5]), "probs").exp()
        tensor([[0.6904, 0.3096]])
    """
    z = wide(logits)
    w = _beside(weights, z.dim()).to(z.dtype)
    if fusion == "logits":
        return (w * z).sum(0)
    if fusion != "probs":
        raise ConfigError(f"fusion is {fusion!r}, wanted 'logits' or 'probs'")
    return (z.log_softmax(-1) + w.log()).logsumexp(0)


def fused_loss(
    logits: Logits,
    weights: Weights,
    labels: Int[Tensor, " batch"],
    fusion: Fusion = "logits",
    loss: Loss = "ce",
) -> Float[Tensor, "... batch"]:
    """The ensemble's loss per image.

    Args:
        logits: ``(surrogates, ..., batch, classes)``.
        weights: ``(surrogates,)`` or ``(surrogates, batch)``, held constant.
        labels: ``(batch,)``.
        fusion: ``"logits"``: loss of the mean logits; ``"probs"``: of the mean probabilities, for
            cross-entropy ``-log sum_k w_k softmax(z_k)_y``; ``"loss"``: mean of the losses.
        loss: name in :data:`adaea.losses.LOSSES`.

    Returns:
        ``(..., batch)``.

    Raises:
        ConfigError: unknown rule or loss.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([0])
        >>> [round(fused_loss(z, torch.tensor([0.5, 0.5]), y, rule).item(), 4) for rule in FUSIONS]
        [0.3133, 0.3705, 0.41]
    """
    if fusion not in FUSIONS or loss not in LOSSES:
        raise ConfigError(
            f"fusion is {fusion!r} and loss {loss!r}, wanted one of {list(FUSIONS)} and of {list(LOSSES)}"
        )
    if fusion == "loss":
        each = LOSSES[loss](logits, labels)
        return (_beside(weights, logits.dim()).squeeze(-1).to(each.dtype) * each).sum(0)
    return LOSSES[loss](fuse_logits(logits, weights, fusion), labels)

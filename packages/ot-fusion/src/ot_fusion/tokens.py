"""Which rows of an activation are samples: token filters for images and text.

Source: section 4.3 and the authors' code (class token and central window).
"""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from ot_fusion.errors import InputError, ShapeError

__all__ = ["as_samples", "token_mask"]


def token_mask(rule: str, tokens: int) -> Bool[Tensor, "tokens"]:
    """Which tokens of an image transformer count: class token first, then a square grid of patches.

    Args:
        rule: ``all``, ``cls`` (the first token) or ``window:k`` (class token and the central k x k patches).
        tokens: how many there are; one more than a square number for ``window:k``.

    Raises:
        InputError: an unknown rule, or a window that does not fit.

    Example:
        >>> int(token_mask("window:2", 17).sum())
        5
    """
    if rule == "all":
        return torch.ones(tokens, dtype=torch.bool)
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[0] = True
    if rule == "cls":
        return mask
    side, size = math.isqrt(tokens - 1), rule.removeprefix("window:")
    if not size.isdigit():
        raise InputError(f"tokens is {rule!r}, wanted all, cls or window:k such as window:6")
    k = int(size)
    if side * side != tokens - 1 or not 0 < k <= side:
        raise InputError(
            f"tokens is {rule!r}, but there are {tokens} tokens: wanted one class token and a square grid of "
            "at "
            f"least {k} x {k} patches"
        )
    low = (side - k) // 2
    mask[1:].view(side, side)[low : low + k, low : low + k] = True
    return mask


def as_samples(output: Tensor, neurons: int, *, keep: Tensor | None = None) -> Tensor:
    """Rows of neurons from a module's output.

    ``(batch, neurons)``, ``(batch, tokens, neurons)``, ``(batch, channels, h, w)``.

    Args:
        output: what the module returned.
        neurons: the size of the neuron axis.
        keep: which tokens count, ``(batch, tokens)`` or ``(tokens,)``; None is all. Images without tokens
            ignore it.

    Returns:
        ``(samples, neurons)``, positions of one input side by side.

    Raises:
        ShapeError: no axis has that size.

    Example:
        >>> as_samples(torch.zeros(2, 3, 4, 4), 3).shape
        torch.Size([32, 3])
    """
    if output.ndim >= 4 and output.shape[1] == neurons:
        return output.flatten(2).transpose(1, 2).flatten(0, 1)
    if output.shape[-1] == neurons:
        if output.ndim == 3 and keep is not None and keep.shape[-1] == output.shape[1]:
            return output[keep.expand(output.shape[:2])]
        return output.reshape(-1, neurons)
    if output.ndim >= 3 and output.shape[1] == neurons:
        return output.flatten(2).transpose(1, 2).flatten(0, 1)
    raise ShapeError(f"an activation has shape {tuple(output.shape)}, wanted an axis of {neurons} neurons")

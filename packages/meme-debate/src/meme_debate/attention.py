"""Attention on a CPU for the fused judge's training.

There PyTorch's own takes a plain path for T5, whose position bias needs a gradient: it guards against rows
without any key, and draws 64 bits for each weight that it may drop. Both take more time than the products.
Every row of the judge has a key, and 16 bits are enough to drop a weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

__all__ = ["attention", "draw_kept", "use_attention"]

NAME = "meme_debate"
_LEVELS = 1 << 16


def draw_kept(shape: tuple[int, ...], dropout: float) -> tuple[Bool[Tensor, "..."], float]:
    """Which entries stay, drawn from PyTorch's generator of the CPU, 16 bits each.

    Args:
        shape: of the entries.
        dropout: the share that goes, in [0, 1); rounded to 1/65536.

    Returns:
        True where an entry stays, and the exact probability of that.

    Example:
        >>> kept, share = draw_kept((2, 3), 0.25)
        >>> kept.shape, share
        (torch.Size([2, 3]), 0.75)
    """
    count = math.prod(shape)
    dropped = min(round(dropout * _LEVELS), _LEVELS - 1)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
    kept = (bits[:count] >= dropped - _LEVELS // 2).view(shape)
    return kept, 1 - dropped / _LEVELS


def attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch heads keys width"],
    value: Float[Tensor, "batch heads keys width"],
    bias: Float[Tensor, "..."] | None = None,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries width"]:
    """``dropout(softmax(scale Q K^T + bias + mask)) V``, where no row may be without a key.

    Args:
        query: (B, H, Q, D).
        key: (B, H, K, D).
        value: (B, H, K, D).
        bias: added to the scores, of a shape that (B, H, Q, K) takes in.
        mask: likewise; or of booleans, True = takes part.
        causal: without a mask, query i sees the keys 0 to i only.
        scale: of the products.
        dropout: share of the weights that are dropped; the others grow by as much.
    """
    scores = query @ key.transpose(-1, -2)
    if scale != 1.0:
        scores = scores.mul_(scale)
    if bias is not None:
        scores = scores.add_(bias)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
        scores = scores.add_(mask)
    weights = torch.softmax(scores, -1)
    if dropout:
        kept, share = draw_kept(tuple(weights.shape), dropout)
        weights, value = weights * kept.to(weights.device), value / share
    return weights.to(value.dtype) @ value


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: :func:`attention` where it is the faster one, PyTorch's own elsewhere."""
    if module.training and query.device.type == "cpu":
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = bool(getattr(module, "is_causal", False))
        found = attention(
            query, key, value, position_bias, attention_mask, causal=causal, scale=scale, dropout=dropout
        )
        return found.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
        position_bias=position_bias, **kwargs,
    )  # fmt: skip


def use_attention(model: PreTrainedModel) -> None:
    """Let a model whose attention is PyTorch's take ours where it trains on a CPU.

    A model that was given another attention, or a transformers whose T5 has no choice, is left as it is.
    """
    config: Any = model.config
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _forward)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(NAME)

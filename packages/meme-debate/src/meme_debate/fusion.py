"""The judge's fusion: single-head cross-attention from text states to image states, added to the text."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fusion_core.errors import ConfigError, check_shape

__all__ = ["CrossAttention", "cross_attention"]


def cross_attention(
    states: Float[Tensor, "batch length width"],
    image: Float[Tensor, "batch patches vision"],
    q: nn.Linear,
    k: nn.Linear,
    v: nn.Linear,
    o: nn.Linear,
) -> Float[Tensor, "batch length width"]:
    """What the image adds to each text state: ``W_o softmax(W_q H (W_k I)^T / sqrt(d/2)) W_v I``.

    The addition itself is the caller's. Source: the paper's multimodal fusion (section 2.4 of the package's
    description of the method), one head of width d/2, all four maps with bias.

    Args:
        states: (B, L, d) text states H.
        image: (B, P, Dv) image states I, CLS first; all of them take part.
        q: d -> d/2.
        k: Dv -> d/2.
        v: Dv -> d/2.
        o: d/2 -> d.

    Returns:
        (B, L, d), in the dtype of ``states``.
    """
    weights = torch.softmax(q(states) @ k(image).transpose(-1, -2) / math.sqrt(q.out_features), -1)
    return o(weights @ v(image))


class CrossAttention(nn.Module):
    """:func:`cross_attention` with its weights, ``proj_q``, ``proj_k``, ``proj_v``, ``proj_o``.

    Args:
        width: of the text states, even.
        vision: width of the image states.

    Raises:
        ConfigError: an odd width.

    Example:
        >>> block = CrossAttention(8, 6)
        >>> block(torch.zeros(2, 5, 8), torch.zeros(2, 3, 6)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, width: int, vision: int) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ConfigError(f"width is {width}, wanted an even number")
        self.proj_q = nn.Linear(width, width // 2)
        self.proj_k = nn.Linear(vision, width // 2)
        self.proj_v = nn.Linear(vision, width // 2)
        self.proj_o = nn.Linear(width // 2, width)

    def forward(
        self, states: Float[Tensor, "batch length width"], image: Float[Tensor, "batch patches vision"]
    ) -> Float[Tensor, "batch length width"]:
        """What the image adds; see :func:`cross_attention`.

        Raises:
            ShapeError: widths or batch sizes that do not fit.
        """
        found = check_shape("states", states, "batch length width", width=self.proj_q.in_features)
        check_shape(
            "image", image, "batch patches vision", batch=found["batch"], vision=self.proj_k.in_features
        )
        return cross_attention(states, image, self.proj_q, self.proj_k, self.proj_v, self.proj_o)

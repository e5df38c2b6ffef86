"""Modulated deformable 3x3 convolution on any device, with both rules for the offsets of strided blocks."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

OFFSETS = 18  # (dy, dx) of the nine taps, row by row; nine mask logits follow


class DeformConv2d(nn.Module):
    """Modulated deformable 3x3 convolution without bias, fed by an ordinary 3x3 convolution (DCNv2).

    Args:
        inputs: channels.
        outputs: channels.
        stride: of the convolution.
        rule: ``"strided"`` gives the offset convolution the same stride; ``"official"`` gives it stride 1
            and reads its larger output as if it were contiguous with the size of the result, as the authors'
            kernel does in strided blocks (section 2.1). Without stride the two are one.

    The offset convolution starts at zero: no offsets, and every tap weighs one half.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, rule: Literal["strided", "official"] = "strided"
    ) -> None:
        super().__init__()
        self.stride = stride
        self.rule = rule
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        self.offset = nn.Conv2d(inputs, 27, 3, stride=1 if rule == "official" else stride, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight (kaiming, fan out) and set the offsets to zero."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.offset.weight)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """Convolve at the learned places."""
        from torchvision.ops import deform_conv2d  # seconds to import; only deformable nets need it

        raw = self.offset(x)
        offset, mask = raw[:, :OFFSETS], raw[:, OFFSETS:].sigmoid()
        if self.rule == "official" and self.stride > 1:
            size = tuple((side - 1) // self.stride + 1 for side in x.shape[-2:])
            offset, mask = _misread(offset, size), _misread(mask, size)
        stride = (self.stride, self.stride)
        return deform_conv2d(x, offset, self.weight, stride=stride, padding=(1, 1), mask=mask)

    def extra_repr(self) -> str:
        """Shape, stride and rule."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, stride={self.stride}, rule={self.rule!r}"


def _misread(x: Float[Tensor, "batch channels height width"], size: tuple[int, ...]) -> Tensor:
    channels = x.shape[1]
    return x.flatten(1)[:, : channels * size[0] * size[1]].reshape(-1, channels, *size)

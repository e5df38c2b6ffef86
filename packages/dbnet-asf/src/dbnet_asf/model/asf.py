"""Adaptive scale fusion: a weight for every level of the pyramid at every pixel (DBNet++, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from dbnet_asf.config import Attention

LEVELS = 4


class AdaptiveScaleFusion(nn.Module):
    """Weights of the four levels, and the levels times their weights (section 2.1, 4).

    The spatial term is added after the level convolution instead of before it, which is the same number:
    level(G + s) = level(G) + s * (sum of level's weights over its inputs). Written so, OpenCV can run it.

    Args:
        inner: channels of the four levels together; a multiple of 16.
        attention: ``"scale_channel_spatial"`` (the released networks), ``"scale_spatial"`` (the paper's
            text) or ``"scale_channel"`` (one weight per level and image, softmax over levels).
    """

    def __init__(self, inner: int, attention: Attention = "scale_channel_spatial") -> None:
        super().__init__()
        width = inner // LEVELS
        self.attention = attention
        self.conv = nn.Conv2d(inner, width, 3, padding=1)
        if attention == "scale_channel":
            self.fc1 = nn.Conv2d(width, width // 2, 1, bias=False)
            self.bn = nn.BatchNorm2d(width // 2)
            self.fc2 = nn.Conv2d(width // 2, LEVELS, 1, bias=False)
        else:
            if attention == "scale_channel_spatial":
                self.channel = nn.ModuleList(
                    [
                        nn.Conv2d(width, width // LEVELS, 1, bias=False),
                        nn.Conv2d(width // LEVELS, width, 1, bias=False),
                    ]
                )
            self.spatial = nn.ModuleList(
                [nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 1, bias=False)]
            )
            self.level = nn.Conv2d(width, LEVELS, 1, bias=False)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def weights(
        self, x: Float[Tensor, "batch inner height width"]
    ) -> Float[Tensor, "batch 4 height_or_1 width_or_1"]:
        """Weights in (0, 1) of p5, p4, p3, p2, in this order; one per image for ``"scale_channel"``."""
        s = self.conv(x)
        if self.attention == "scale_channel":
            squeezed = self.fc1(s.mean((-2, -1), keepdim=True))
            return self.fc2(torch.relu(self.bn(squeezed))).softmax(1)
        level, mean = self.level(s), s.mean(1, keepdim=True)
        if self.attention == "scale_channel_spatial":
            gate = self.gate(s.mean((-2, -1), keepdim=True))
            level, mean = level + self.level(gate), mean + gate.mean(1, keepdim=True)
        return torch.sigmoid(level + self.place(mean) * self.level_sum())

    def gate(self, squeezed: Tensor) -> Tensor:
        """Weights of the channels in (0, 1), of their means over space."""
        return torch.sigmoid(self.channel[1](torch.relu(self.channel[0](squeezed))))

    def place(self, mean: Tensor) -> Tensor:
        """Weights of the places in (0, 1), of the means over channels."""
        return torch.sigmoid(self.spatial[1](torch.relu(self.spatial[0](mean))))

    def level_sum(self) -> Float[Tensor, "1 4 1 1"]:
        """Sum of the level convolution's weights over its inputs."""
        return self.level.weight.sum((1, 2, 3)).view(1, LEVELS, 1, 1)

    def forward(
        self, levels: Sequence[Float[Tensor, "batch width height width_"]]
    ) -> tuple[Float[Tensor, "batch inner height width_"], Tensor]:
        """Fuse p5, p4, p3, p2, all at stride 4.

        Returns:
            The weighted levels side by side, and the weights.
        """
        weights = self.weights(torch.cat(list(levels), 1))
        return weigh(levels, weights), weights


class FoldedFusion(nn.Module):
    """The same weights with the convolution folded into what is made of its result, for inference.

    Only three things are read of S = conv(x): its level convolution (four channels), its mean over channels
    and its mean over space. The first two are a convolution with five outputs. The third is linear in nine
    sums over windows of x, those that the taps of the kernel see. So the wide convolution is never run.

    Args:
        fusion: with any attention but ``"scale_channel"``.
    """

    def __init__(self, fusion: AdaptiveScaleFusion) -> None:
        super().__init__()
        with torch.no_grad():
            weight, bias = fusion.conv.weight, cast("Tensor", fusion.conv.bias)
            level = fusion.level.weight.flatten(1)
            rows = torch.cat([level, torch.full_like(level[:1], 1 / level.shape[1])])
            self.conv = nn.Conv2d(weight.shape[1], LEVELS + 1, 3, padding=1)
            self.conv.weight = nn.Parameter(torch.einsum("rc,ciyx->riyx", rows, weight))
            self.conv.bias = nn.Parameter(rows @ bias)
        self.attention = fusion.attention
        self.inner = fusion
        self.requires_grad_(False)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As :class:`AdaptiveScaleFusion`."""
        x = torch.cat(list(levels), 1)
        found = self.conv(x)
        level, mean, fusion = found[:, :LEVELS], found[:, LEVELS:], self.inner
        if self.attention == "scale_channel_spatial":
            gate = fusion.gate(self._mean_over_space(x))
            level, mean = level + fusion.level(gate), mean + gate.mean(1, keepdim=True)
        weights = torch.sigmoid(level + fusion.place(mean) * fusion.level_sum())
        return weigh(levels, weights), weights

    def _mean_over_space(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        rows = _windows(wide.sum(-1), wide[..., 0], wide[..., -1])  # batch, inputs, height, taps across
        sums = _windows(rows.sum(-2), rows[..., 0, :], rows[..., -1, :]).mT  # ..., taps down, taps across
        weight = self.inner.conv.weight
        mean = torch.einsum("niyx,ciyx->nc", sums, weight.to(sums.dtype)) / (x.shape[-2] * x.shape[-1])
        return (mean + cast("Tensor", self.inner.conv.bias).to(mean.dtype))[:, :, None, None].to(weight.dtype)


class PlainFusion(nn.Module):
    """The same weights made of operators that both engines of OpenCV run, for export.

    Means over channels and the spread of the spatial term are 1x1 convolutions with constant weights, means
    over space are poolings, and no convolution is followed by the addition of a smaller tensor, which the
    newer engine would fuse wrongly.

    Args:
        fusion: any attention; its batch norm, if any, has been folded.
    """

    def __init__(self, fusion: AdaptiveScaleFusion) -> None:
        super().__init__()
        self.inner = fusion
        if fusion.attention != "scale_channel":
            width = fusion.level.weight.shape[1]
            self.mean, self.spread = nn.Conv2d(width, 1, 1, bias=False), nn.Conv2d(1, LEVELS, 1, bias=False)
            self.mean.weight = nn.Parameter(torch.full_like(self.mean.weight, 1 / width))
            self.spread.weight = nn.Parameter(fusion.level_sum().detach().mT.reshape(LEVELS, 1, 1, 1))
        self.requires_grad_(False)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As :class:`AdaptiveScaleFusion`."""
        fusion = self.inner
        s = fusion.conv(torch.cat(list(levels), 1))
        if fusion.attention == "scale_channel":
            hidden = torch.relu(fusion.bn(fusion.fc1(adaptive_avg_pool2d(s, 1))))
            weights = fusion.fc2(hidden).softmax(1)
        else:
            if fusion.attention == "scale_channel_spatial":
                s = s + fusion.gate(adaptive_avg_pool2d(s, 1))
            weights = torch.sigmoid(fusion.level(s) + self.spread(fusion.place(self.mean(s))))
        return weigh(levels, weights), weights


def _windows(total: Tensor, first: Tensor, last: Tensor) -> Tensor:
    # A tap that looks one step back never sees the last entry; one that looks ahead never sees the first.
    return torch.stack([total - last, total, total - first], -1)


def weigh(levels: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Levels times their weights, side by side."""
    return torch.cat([weights[:, i : i + 1] * level for i, level in enumerate(levels)], 1)

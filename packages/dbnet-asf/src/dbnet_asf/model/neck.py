"""Feature pyramid: four backbone maps become one at stride 4, fused by concatenation or by attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dbnet_asf.config import Attention
from dbnet_asf.model.asf import AdaptiveScaleFusion


class Neck(nn.Module):
    """Top-down pyramid of C2..C5 and its fusion in the order p5, p4, p3, p2 (section 2.1, 3 and 4).

    Args:
        channels: of C2..C5.
        inner: channels of the result, a multiple of 16.
        attention: kind of adaptive scale fusion, None for plain concatenation.
    """

    def __init__(self, channels: Sequence[int], inner: int, attention: Attention | None) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(width, inner, 1, bias=False) for width in channels])
        self.smooth = nn.ModuleList(
            [nn.Conv2d(inner, inner // 4, 3, padding=1, bias=False) for _ in channels]
        )
        for part in (*self.lateral, *self.smooth):
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
        self.asf: nn.Module | None = None if attention is None else AdaptiveScaleFusion(inner, attention)

    def forward(
        self, features: Sequence[Float[Tensor, "batch channels height width"]]
    ) -> tuple[Float[Tensor, "batch inner h w"], Tensor | None]:
        """The tensor that enters the heads, and the weights of the levels (None without attention)."""
        maps = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for i in (2, 1, 0):
            maps[i] = maps[i] + interpolate(maps[i + 1], scale_factor=2.0)
        levels = [
            smooth(level) if i == 0 else interpolate(smooth(level), scale_factor=float(2**i))
            for i, (smooth, level) in enumerate(zip(self.smooth, maps, strict=True))
        ][::-1]
        return (torch.cat(levels, 1), None) if self.asf is None else self.asf(levels)

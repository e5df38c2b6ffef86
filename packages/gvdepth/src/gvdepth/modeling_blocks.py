"""Parts of the network: blocks, the decoder, and the small U-Nets of both cues as one grouped module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def normalization(channels: int, groups: int = 1) -> nn.GroupNorm:
    """Group normalization that never mixes the ``groups`` halves of a grouped module.

    Batches of any size and any split over processes give the same numbers, unlike batch normalization.
    """
    return nn.GroupNorm(groups * math.gcd(channels // groups, 8), channels)


class ConvBlock(nn.Sequential):
    """Twice 3x3 convolution, group normalization, SiLU.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution.
        groups: of both convolutions, but for the first where ``shared``.
        shared: the first convolution shows every input channel to all groups.
    """

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, groups: int = 1, shared: bool = False
    ) -> None:
        first = 1 if shared else groups
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False, groups=first),
            normalization(outputs, groups),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False, groups=groups),
            normalization(outputs, groups),
            nn.SiLU(),
        )


def upsample(x: Float[Tensor, "b c h w"], like: Float[Tensor, "b d i j"]) -> Float[Tensor, "b c i j"]:
    """Bilinear upsampling to another map's size."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class Decoder(nn.Module):
    """From the deepest feature up to half resolution: upsample, join skip and embedding, convolve twice.

    Args:
        channels: of the features, at half resolution first.
        widths: of the blocks, deepest first; one less than features.
        embedding: channels of the ground-plane embedding, 0 = none.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], embedding: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        previous = channels[-1] + embedding
        for skip, width in zip(reversed(channels[:-1]), widths, strict=True):
            blocks.append(ConvBlock(previous + skip + embedding, width))
            previous = width
        self.blocks = nn.ModuleList(blocks)

    def forward(self, features: Sequence[Tensor], embedding: Sequence[Tensor]) -> Tensor:
        """Features and embeddings (empty, or one a level), half resolution first -> (B, widths[-1], h, w)."""
        x = torch.cat([features[-1], *embedding[-1:]], dim=1)
        for level, block in enumerate(self.blocks, start=2):
            skip = features[-level]
            x = block(torch.cat([upsample(x, skip), skip, *embedding[-level:][:1]], dim=1))
        return x


class CueHeads(nn.Module):
    """The small U-Nets, one per cue, as one module with ``groups``: a GPU launches each layer once.

    The cues share nothing but the input: group c of every layer is the network of cue c alone.

    Args:
        inputs: channels of the decoder's feature.
        widths: of one U-Net, finest first; each deeper level has half the resolution.
        cues: how many U-Nets.
    """

    def __init__(self, inputs: int, widths: Sequence[int], cues: int) -> None:
        super().__init__()
        self.cues = cues
        wide = [width * cues for width in widths]
        downs: list[nn.Module] = []
        previous = inputs
        for level, width in enumerate(wide):
            downs.append(ConvBlock(previous, width, stride=2, groups=cues, shared=level == 0))
            previous = width
        ups: list[nn.Module] = []
        for skip, width in zip([*reversed(wide[:-1]), inputs * cues], reversed(wide), strict=True):
            ups.append(ConvBlock(previous + skip, width, groups=cues))
            previous = width
        self.downs, self.ups = nn.ModuleList(downs), nn.ModuleList(ups)
        self.project = nn.Conv2d(previous, 2 * cues, 3, 1, 1, groups=cues)

    def _join(self, x: Tensor, skip: Tensor) -> Tensor:
        batch, _, height, width = skip.shape
        shape = (batch, self.cues, -1, height, width)
        return torch.cat([x.reshape(shape), skip.reshape(shape)], dim=2).flatten(1, 2)

    def forward(self, feature: Float[Tensor, "b c h w"]) -> Float[Tensor, "b cues 2 h w"]:
        """The decoder's feature -> (z, s) of every cue, float32 at least."""
        skips = [feature.repeat(1, self.cues, 1, 1) if self.cues > 1 else feature]
        x = feature
        for down in self.downs:
            x = down(x)
            skips.append(x)
        skips.pop()
        for up in self.ups:
            skip = skips.pop()
            x = up(self._join(upsample(x, skip), skip))
        with torch.autocast(x.device.type, enabled=False):
            project = self.project
            kind = torch.promote_types(x.dtype, torch.float32)
            bias = None if project.bias is None else project.bias.to(kind)
            raw = F.conv2d(x.to(kind), project.weight.to(kind), bias, padding=1, groups=self.cues)
        return raw.unflatten(1, (self.cues, 2))

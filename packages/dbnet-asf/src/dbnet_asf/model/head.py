"""Heads at full resolution: logits of the probability map and of the threshold map."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle


class Head(nn.Sequential):
    """3x3 convolution, then twice a doubling of the size: logits (section 2.1, 5).

    The indices of the layers are the authors': 0 and 1, 3 and 4, and 6 have weights.

    Args:
        inputs: channels that enter.
        width: channels inside.
        smooth: nearest doubling and a 3x3 convolution instead of a transposed one.
        bias: of the first convolution.
    """

    def __init__(self, inputs: int, width: int, *, smooth: bool = False, bias: bool = False) -> None:
        super().__init__(
            nn.Conv2d(inputs, width, 3, padding=1, bias=bias),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _double(width, width, smooth),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            _double(width, 1, smooth),
        )
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(part.weight)
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.constant_(part.bias, 1e-4)


def _double(inputs: int, outputs: int, smooth: bool) -> nn.Module:
    if not smooth:
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
    middle = inputs if outputs == 1 else outputs
    layers: list[nn.Module] = [nn.Upsample(scale_factor=2.0), nn.Conv2d(inputs, middle, 3, padding=1)]
    return nn.Sequential(*layers, *([nn.Conv2d(middle, 1, 1)] if outputs == 1 else []))


class ShuffledDouble(nn.Module):
    """A 2x2 transposed convolution of stride 2 as a 1x1 convolution and a pixel shuffle: the same numbers.

    Args:
        layer: the transposed convolution; its weights are copied.
    """

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        weight = layer.weight.detach()  # inputs, outputs, 2, 2
        self.conv = nn.Conv2d(weight.shape[0], weight.shape[1] * 4, 1, bias=layer.bias is not None)
        self.conv.weight = nn.Parameter(weight.permute(1, 2, 3, 0).reshape(-1, weight.shape[0], 1, 1).clone())
        if layer.bias is not None:
            self.conv.bias = nn.Parameter(layer.bias.detach().repeat_interleave(4))
        self.requires_grad_(False)

    def forward(self, x: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs height width"]:
        """Twice the size."""
        return pixel_shuffle(self.conv(x), 2)

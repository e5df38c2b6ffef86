"""Encoders from images to features: timm's, our small ones, the report's ResNet-50; stems of any width.

Every encoder has ``num_features``, ``forward_features(x)`` (a map, its channels last counted in
``map_channels``) and ``forward(x)`` (one vector an image), as timm's models have.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.errors import ConfigError, require_extra
from mantis_photoz.config import StemScale

REPORT = "resnet50-report"
_SMALL = re.compile(r"small-(\d+)")


def adapt_stem(
    weight: Float[Tensor, "out in height width"], channels: int, scale: StemScale = "mean"
) -> Float[Tensor, "out channels height width"]:
    """Widen a stem's kernel: the mean over its inputs, for each of ``channels`` inputs (section 2.4).

    Args:
        weight: of a convolution, usually with 3 inputs.
        channels: wanted inputs.
        scale: ``"mean"`` leaves the mean as it is (official: with more channels activations grow);
            ``"preserve"`` multiplies by inputs / channels, so that like planes give the like sum.

    Example:
        >>> adapt_stem(torch.ones(1, 3, 1, 1), 9).flatten().sum().item()
        9.0
        >>> round(adapt_stem(torch.ones(1, 3, 1, 1), 9, "preserve").flatten().sum().item(), 4)
        3.0
    """
    mean = weight.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1)
    return mean * (weight.shape[1] / channels) if scale == "preserve" else mean


def _normal(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2 if size % 2 else 0, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class SmallBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _normal(inputs, outputs, 3, stride)
        self.second = _normal(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _normal(inputs, outputs, 1, stride)

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """The block's map."""
        return F.gelu(self.second(F.gelu(self.first(x))) + self.shortcut(x))


class SmallEncoder(nn.Module):
    """A small residual network (section 6.2): 2x2 patches, three blocks, mean and maximum of the map.

    Args:
        channels: planes.
        width: of the first block; the others have twice and three times as many.

    Example:
        >>> SmallEncoder(9, 8)(torch.zeros(2, 9, 32, 32)).shape
        torch.Size([2, 48])
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stem = _normal(channels, width, 2, 2)
        self.blocks = nn.Sequential(
            SmallBlock(width, width, 1),
            SmallBlock(width, 2 * width, 2),
            SmallBlock(2 * width, 3 * width, 2),
        )
        self.map_channels, self.num_features = 3 * width, 6 * width

    def forward_features(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch map h2 w2"]:
        """The last map."""
        return self.blocks(F.gelu(self.stem(x)))

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch features"]:
        """Mean and maximum of the last map."""
        maps = self.forward_features(x).flatten(2)
        return torch.cat([maps.mean(2), maps.amax(2)], dim=1)


class Bottleneck(nn.Module):
    """A ResNet bottleneck (v1.5: the 3x3 convolution strides) with leaky rectifiers."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = _normal(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Float[Tensor, "batch in h w"]) -> Float[Tensor, "batch out h2 w2"]:
        """The block's map."""
        y = F.leaky_relu(self.bn1(self.conv1(x)))
        y = F.leaky_relu(self.bn2(self.conv2(y)))
        return F.leaky_relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ReportResNet(nn.Module):
    """The report's ResNet-50: any number of channels, LeakyReLU(0.01) in the place of ReLU.

    Args:
        channels: planes of the 7x7 stem.
        depths: blocks of the four stages.
    """

    def __init__(self, channels: int = 9, depths: tuple[int, int, int, int] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, depth in enumerate(depths):
            width, blocks = 64 * 2**stage, list[nn.Module]()
            for block in range(depth):
                blocks.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
                inputs = 4 * width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.map_channels = self.num_features = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.01, mode="fan_out", nonlinearity="leaky_relu")

    def forward_features(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch map h2 w2"]:
        """The last map."""
        x = F.max_pool2d(F.leaky_relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{stage}")(x)
        return x

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch features"]:
        """The mean of the last map."""
        return self.forward_features(x).mean(dim=(2, 3))


def build_encoder(
    name: str, channels: int, *, pretrained: bool = False, stem_scale: StemScale = "mean"
) -> Any:
    """An encoder by name.

    Args:
        name: ``"small-WIDTH"``, ``"resnet50-report"``, or a model of timm (``"hf_hub:USER/MODEL"`` too).
        channels: planes it takes.
        pretrained: start from timm's weights, the stem widened by :func:`adapt_stem`.
        stem_scale: of that.

    Raises:
        ConfigError: timm has no such model, or no pretrained weights for one of ours.
        MissingExtraError: timm is not installed.
    """
    small = _SMALL.fullmatch(name)
    if (small or name == REPORT) and pretrained:
        raise ConfigError(f"encoder {name!r} has no pretrained weights; take a timm model")
    if small:
        return SmallEncoder(channels, int(small[1]))
    if name == REPORT:
        return ReportResNet(channels)
    timm: Any = require_extra("timm", "timm", "mantis-photoz")
    try:
        if not pretrained:
            return timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, ValueError) as error:  # a name that only looks like one of the hub is a ValueError
        raise ConfigError(
            f"encoder {name!r} is unknown ({error}); wanted 'small-24', {REPORT!r} or a model of timm"
        ) from error
    widen_stem(model, channels, stem_scale)
    return model


def widen_stem(model: Any, channels: int, scale: StemScale = "mean") -> None:
    """Give a timm model's first convolution another number of inputs, in place; its bias is kept.

    Raises:
        ConfigError: the model does not say which convolution comes first.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    if not isinstance(name, str):
        raise ConfigError(
            f"{type(model).__name__} names no single first convolution; its stem stays as it is"
        )
    old: Any = model.get_submodule(name)
    options = {key: getattr(old, key) for key in ("stride", "padding", "dilation")}
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, bias=old.bias is not None, **options)
    with torch.no_grad():
        new.weight.copy_(adapt_stem(old.weight, channels, scale))
        if new.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new.to(old.weight))


def map_channels(encoder: Any) -> int:
    """Channels of an encoder's last map."""
    return int(getattr(encoder, "map_channels", encoder.num_features))

"""Feature extractors: four maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

from jaxtyping import Float
from torch import Tensor, nn

from dbnet_asf.config import DBConfig
from dbnet_asf.model.deform import DeformConv2d
from fusion_core.errors import ConfigError, require_extra

Features = list[Float[Tensor, "batch channels height width"]]
_RESNETS = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
}


class Block(nn.Module):
    """A residual block, two 3x3 convolutions (``basic``) or 1x1, 3x3, 1x1 (``bottleneck``).

    Args:
        inputs: channels.
        width: channels inside; a bottleneck gives out four times as many.
        stride: on ``conv1`` of a basic block, on ``conv2`` of a bottleneck.
        bottleneck: which of the two.
        dcn: rule of the offsets where ``conv2`` is deformable, else None.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        *,
        bottleneck: bool = False,
        dcn: Literal["strided", "official"] | None = None,
    ) -> None:
        super().__init__()
        outputs = width * 4 if bottleneck else width
        first, second = (1, stride) if bottleneck else (stride, 1)
        side = 1 if bottleneck else 3
        self.conv1 = nn.Conv2d(inputs, width, side, stride=first, padding=side // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2: nn.Module = (
            nn.Conv2d(width, width, 3, stride=second, padding=1, bias=False)
            if dcn is None
            else DeformConv2d(width, width, second, dcn)
        )
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.bottleneck = bottleneck

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs h w"]:
        """The block's convolutions plus the shortcut."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(self.relu(y)))
        return self.relu(y + shortcut)


def _stage(inputs: int, width: int, blocks: int, stride: int, make: Any) -> tuple[nn.Sequential, int]:
    first = make(inputs, width, stride)
    outputs = width * 4 if first.bottleneck else width
    return nn.Sequential(first, *(make(outputs, width, 1) for _ in range(blocks - 1))), outputs


class ResNet(nn.Module):
    """ResNet-18, 34, 50 or 101 without its classifier; the names of its weights are torchvision's.

    Args:
        name: ``"resnet18"`` ... ``"resnet101"``.
        dcn: rule of the offsets where stages 2 to 4 are deformable, else None.
    """

    def __init__(self, name: str, dcn: Literal["strided", "official"] | None = None) -> None:
        super().__init__()
        kind, blocks = _RESNETS[name]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, self.channels = 64, list[int]()
        for index, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True)):
            make = partial(Block, bottleneck=kind == "bottleneck", dcn=dcn if index else None)
            stage, channels = _stage(channels, width, count, 2 if index else 1, make)
            self.add_module(f"layer{index + 1}", stage)
            self.channels.append(channels)
        _initialize(self)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Features:
        """C2 to C5."""
        return _through(self, self.maxpool(self.relu(self.bn1(self.conv1(x)))))


class Nano(nn.Module):
    """A small ResNet: two strided 3x3 convolutions, then four stages of basic blocks.

    Args:
        channels: of the stages.
        blocks: of the stages.
        stem: channels of the first two convolutions.
    """

    def __init__(self, channels: Sequence[int], blocks: Sequence[int], stem: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem, stem, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
        )
        inputs, self.channels = stem, list(channels)
        for index, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            stage, inputs = _stage(inputs, width, count, 2 if index else 1, Block)
            self.add_module(f"layer{index + 1}", stage)
        _initialize(self)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Features:
        """C2 to C5."""
        return _through(self, self.stem(x))


class MobileNetV3(nn.Module):
    """Torchvision's MobileNetV3-large, tapped after blocks 3, 6, 12 and 16: 24, 40, 112, 960 channels."""

    _TAPS = (3, 6, 12, 16)

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v3_large

        self.features = mobilenet_v3_large(weights=None).features
        self.channels = [24, 40, 112, 960]

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Features:
        """C2 to C5."""
        found: Features = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._TAPS:
                found.append(x)
        return found


class Timm(nn.Module):
    """Any feature extractor of timm that has maps at strides 4, 8, 16 and 32.

    Args:
        name: of the model in timm; weights are not downloaded.

    Raises:
        ConfigError: unknown, or without these strides.
        MissingExtraError: timm is not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        timm = require_extra("timm", "timm", "dbnet-asf")
        try:
            self.body = timm.create_model(name, features_only=True, pretrained=False)
        except (RuntimeError, AttributeError, ValueError, TypeError) as error:
            raise ConfigError(f"backbone 'timm:{name}' cannot be made: {error}") from error
        strides = list(self.body.feature_info.reduction())
        if missing := [stride for stride in (4, 8, 16, 32) if stride not in strides]:
            raise ConfigError(
                f"backbone 'timm:{name}' has maps at strides {strides}, but none at {missing}; "
                "wanted 4, 8, 16 and 32"
            )
        self._taps = [strides.index(stride) for stride in (4, 8, 16, 32)]
        self.channels = [self.body.feature_info.channels()[tap] for tap in self._taps]

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Features:
        """C2 to C5."""
        found = self.body(x)
        return [found[tap] for tap in self._taps]


def build_backbone(config: DBConfig) -> ResNet | Nano | MobileNetV3 | Timm:
    """The backbone that a configuration names; its ``channels`` are those of its four maps.

    Raises:
        ConfigError: timm does not know it.
        MissingExtraError: it needs timm, which is not installed.
    """
    if config.backbone in _RESNETS:
        return ResNet(config.backbone, config.dcn_offset if config.dcn else None)
    if config.backbone == "nano":
        return Nano(config.channels, config.blocks, config.stem)
    if config.backbone == "mobilenetv3_large":
        return MobileNetV3()
    return Timm(config.backbone.removeprefix("timm:"))


def _through(module: nn.Module, x: Tensor) -> Features:
    found: Features = []
    for index in range(1, 5):
        x = cast("nn.Module", getattr(module, f"layer{index}"))(x)
        found.append(x)
    return found


def _initialize(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part.out_channels != 27:
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

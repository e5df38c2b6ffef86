"""Encoders: a tiny one of our own, and the backbones of transformers, all as features at 1/2, 1/4, ..."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.errors import ConfigError, reading, require_extra
from gvdepth.config import GVDepthConfig
from gvdepth.modeling_blocks import ConvBlock, normalization

_CONVNEXT = {
    "tiny": ([3, 3, 9, 3], [96, 192, 384, 768]),
    "small": ([3, 3, 27, 3], [96, 192, 384, 768]),
    "base": ([3, 3, 27, 3], [128, 256, 512, 1024]),
    "large": ([3, 3, 27, 3], [192, 384, 768, 1536]),
    "xlarge": ([3, 3, 27, 3], [256, 512, 1024, 2048]),
}
_CONVNEXTV2 = {
    "atto": ([2, 2, 6, 2], [40, 80, 160, 320]),
    "femto": ([2, 2, 6, 2], [48, 96, 192, 384]),
    "pico": ([2, 2, 6, 2], [64, 128, 256, 512]),
    "nano": ([2, 2, 8, 2], [80, 160, 320, 640]),
    "tiny": _CONVNEXT["tiny"],
    "base": _CONVNEXT["base"],
    "large": _CONVNEXT["large"],
    "huge": ([3, 3, 27, 3], [352, 704, 1408, 2816]),
}
_RESNET = {
    "18": ([2, 2, 2, 2], "basic", [64, 128, 256, 512]),
    "34": ([3, 4, 6, 3], "basic", [64, 128, 256, 512]),
    "50": ([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
    "101": ([3, 4, 23, 3], "bottleneck", [256, 512, 1024, 2048]),
    "152": ([3, 8, 36, 3], "bottleneck", [256, 512, 1024, 2048]),
}
_SWIN = {
    "tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "small": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "base": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "large": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}
_DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}
_STAGED = ("convnext", "convnextv2", "resnet", "swin")
_PLAIN = ("dinov2", "dinov2_with_registers")


class TinyEncoder(nn.Module):
    """Strided convolution blocks; features at 1/2, 1/4, ...

    Args:
        widths: channels of the levels.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(widths)
        before = (3, *widths[:-1])
        self.stages = nn.ModuleList(ConvBlock(a, b, stride=2) for a, b in zip(before, widths, strict=True))
        self.multiple = 2 ** len(widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> features, half resolution first."""
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Stem(nn.Sequential):
    """Two convolutions on the image: the feature at half resolution that a backbone does not have."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, 2, 1, bias=False),
            normalization(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1),
        )


class StagedEncoder(nn.Module):
    """A backbone with four stages at 1/4 ... 1/32 (ConvNeXt, ResNet, Swin), and a stem at 1/2."""

    multiple = 32

    def __init__(self, backbone: Any, stem: int) -> None:
        super().__init__()
        self.stem, self.backbone = Stem(stem), backbone
        self.channels = (stem, *backbone.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> features, half resolution first."""
        return [self.stem(x), *self.backbone(x).feature_maps]


class PlainEncoder(nn.Module):
    """A vision transformer with one scale (DINOv2): four of its layers, reassembled to 1/4 ... 1/32.

    The image is resized so that one patch covers 16 x 16 of its pixels: patches and pixels stay aligned, so
    the
    camera needs no change whatever the patch size is.
    """

    multiple = 32

    def __init__(self, backbone: Any, stem: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.stem, self.backbone = Stem(stem), backbone
        self.patch = int(backbone.config.patch_size)
        hidden = int(backbone.channels[0])
        a, b, c, d = widths
        self.adapters = nn.ModuleList(
            [
                nn.ConvTranspose2d(hidden, a, 4, 4),
                nn.ConvTranspose2d(hidden, b, 2, 2),
                nn.Conv2d(hidden, c, 1),
                nn.Conv2d(hidden, d, 3, 2, 1),
            ]
        )
        self.channels = (stem, *widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> features, half resolution first."""
        height, width = x.shape[-2] // 16, x.shape[-1] // 16
        size = (height * self.patch, width * self.patch)
        seen = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
        maps = self.backbone(seen).feature_maps
        return [self.stem(x), *(adapt(found) for adapt, found in zip(self.adapters, maps, strict=True))]


def architecture(name: str) -> dict[str, Any] | None:
    """The settings of a backbone that is known by name, without asking any hub.

    Args:
        name: such as ``"facebook/convnext-tiny-224"``, ``"convnextv2-nano"``, ``"microsoft/resnet-50"``,
            ``"swin-tiny"`` or ``"facebook/dinov2-small"``.

    Returns:
        ``{"model_type": ..., ...}``, or None for a name that is not known.

    Example:
        >>> architecture("microsoft/resnet-18")["depths"]
        [2, 2, 2, 2]
    """
    plain = name.rpartition("/")[2].lower()
    kind, _, rest = plain.partition("-")
    size = re.split(r"[-_]", rest)[0] if rest else ""
    if kind == "convnext" and size in _CONVNEXT:
        depths, hidden = _CONVNEXT[size]
        return {"model_type": kind, "depths": depths, "hidden_sizes": hidden}
    if kind == "convnextv2" and size in _CONVNEXTV2:
        depths, hidden = _CONVNEXTV2[size]
        return {"model_type": kind, "depths": depths, "hidden_sizes": hidden}
    if kind == "resnet" and size in _RESNET:
        depths, layer, hidden = _RESNET[size]
        return {"model_type": kind, "depths": depths, "layer_type": layer, "hidden_sizes": hidden}
    if kind == "swin" and size in _SWIN:
        width, depths, heads = _SWIN[size]
        return {"model_type": kind, "embed_dim": width, "depths": depths, "num_heads": heads}
    if kind == "dinov2" and size in _DINOV2:
        hidden, layers, heads = _DINOV2[size]
        swiglu = {"use_swiglu_ffn": True} if size == "giant" else {}
        shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        return {"model_type": kind, "image_size": 518, "patch_size": 14, **shape, **swiglu}
    return None


def _taps(config: Any) -> list[int]:
    """Which of the backbone's outputs to take, 0 being the embedding."""
    if config.model_type in _STAGED:
        return [1, 2, 3, 4]
    layers = int(config.num_hidden_layers)
    if layers < 4:
        raise ConfigError(f"the backbone has {layers} layers, wanted at least 4")
    return [layers * i // 4 for i in (1, 2, 3, 4)]


def _settings(config: GVDepthConfig, transformers: Any) -> Any:
    """The backbone's configuration object: stored, known by name, or of a folder or hub."""
    stored = config.encoder_config or (None if config.pretrained else architecture(config.encoder))
    wanted = "'tiny', a folder with a backbone, or a name such as 'facebook/convnext-tiny-224'"
    with reading(f"encoder {config.encoder!r}", f"is none (wanted {wanted})", ConfigError):
        if stored is not None:
            plain = {
                key: value for key, value in stored.items() if key not in ("out_features", "out_indices")
            }
            found = transformers.AutoConfig.for_model(plain.pop("model_type"), **plain)
        else:
            found = transformers.AutoConfig.from_pretrained(config.encoder)
    if found.model_type not in (*_STAGED, *_PLAIN):
        raise ConfigError(
            f"encoder {config.encoder!r} is a {found.model_type}, wanted one of {[*_STAGED, *_PLAIN]}"
        )
    found.out_indices = _taps(found)
    if found.model_type in _PLAIN:
        found.reshape_hidden_states = True
    return found


def build_encoder(config: GVDepthConfig) -> tuple[nn.Module, GVDepthConfig]:
    """The encoder that a configuration names, and the configuration with all that was left open filled in.

    Raises:
        ConfigError: no such encoder, or widths that do not fit it.
        MissingExtraError: transformers is not installed.
    """
    if config.encoder == "tiny":
        encoder: nn.Module = TinyEncoder(config.encoder_widths)
        levels = len(config.encoder_widths)
        decoder = (*reversed(config.encoder_widths[1:-1]), 16) if levels > 1 else ()
        heads: tuple[int, ...] = (8,)
        filled = config
    else:
        transformers = require_extra("transformers", "hf", "gvdepth")
        settings = _settings(config, transformers)
        with reading(f"encoder {config.encoder!r}", "cannot be loaded", ConfigError):
            backbone = (
                transformers.AutoBackbone.from_pretrained(config.encoder, config=settings)
                if config.pretrained
                else transformers.AutoBackbone.from_config(settings)
            )
        large = max(backbone.channels) > 1024 or (
            settings.model_type == "dinov2" and max(backbone.channels) > 768
        )
        stem = 64 if large else 32
        decoder = (768, 512, 256, 128) if large else (384, 256, 128, 64)
        heads = (64, 96, 128) if large else (32, 48, 64)
        if settings.model_type in _PLAIN:
            encoder = PlainEncoder(backbone, stem, decoder[::-1])
        else:
            encoder = StagedEncoder(backbone, stem)
        levels = 5
        stored = {key: value for key, value in settings.to_diff_dict().items() if _is_plain(value)}
        stored["model_type"] = settings.model_type
        filled = config.replace(encoder_config=stored, pretrained=False)
    decoder = config.decoder_widths or decoder
    if len(decoder) != levels - 1:
        raise ConfigError(
            f"decoder_widths is {decoder}, wanted {levels - 1} widths: one less than the features of "
            f"encoder {config.encoder!r}"
        )
    return encoder, filled.replace(decoder_widths=decoder, head_widths=config.head_widths or heads)


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | list | tuple | dict) or value is None


def encoder_parameters(encoder: nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of the part that may come pretrained: the backbone, or the whole tiny encoder."""
    return list(getattr(encoder, "backbone", encoder).parameters())

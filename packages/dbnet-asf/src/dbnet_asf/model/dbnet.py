"""The whole network: backbone, neck, heads, and the form that inference runs."""

from __future__ import annotations

import copy
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from dbnet_asf.binarization import db
from dbnet_asf.config import DBConfig
from dbnet_asf.model.asf import AdaptiveScaleFusion, FoldedFusion
from dbnet_asf.model.backbone import build_backbone
from dbnet_asf.model.head import Head, ShuffledDouble
from dbnet_asf.model.neck import Neck
from fusion_core.atomic import PathLike, atomic_directory
from fusion_core.checkpoint import load_strict, load_tensors, save_tensors
from fusion_core.device import autocast, resolve_dtype
from fusion_core.errors import CheckpointError, ConfigError, FusionWarning, ShapeError, check_range, reading
from fusion_core.hub import CONFIG, WEIGHTS, model_file

_LAST = (nn.Conv2d, nn.ConvTranspose2d)
SHIPPED = Path(__file__).parent.parent / "checkpoints"


@dataclass(frozen=True, slots=True)
class DBOutput:
    """What the network gives.

    Attributes:
        prob: (batch, 1, height, width) probability of the shrunk text region, float32 or wider.
        thresh: the threshold map, same shape; None in evaluation.
        binary: the approximate binary map, same shape; None in evaluation.
        prob_logit: ``prob`` before the sigmoid.
        k: steepness that made ``binary``.
        attention: weights of p5, p4, p3, p2, (batch, 4, height / 4, width / 4) or one per image; None for
            the plain DBNet.
    """

    prob: Float[Tensor, "batch 1 height width"]
    thresh: Float[Tensor, "batch 1 height width"] | None
    binary: Float[Tensor, "batch 1 height width"] | None
    prob_logit: Float[Tensor, "batch 1 height width"]
    k: float = 50.0
    attention: Tensor | None = None

    @classmethod
    def from_maps(cls, prob: Tensor, thresh: Tensor | None = None, k: float = 50.0) -> DBOutput:
        """The output that has these maps, for losses on maps made elsewhere.

        Args:
            prob: (batch, 1, height, width) probabilities in (0, 1).
            thresh: thresholds in [0, 1], same shape, or None.
            k: steepness.
        """
        binary = None if thresh is None else db(prob, thresh, k)
        return cls(prob, thresh, binary, torch.logit(prob), k)


class DBNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="dbnet-asf",
    pipeline_tag="object-detection",
    tags=["text-detection", "ocr"],
    license="apache-2.0",
):
    """DBNet and, with adaptive scale fusion, DBNet++ (section 2.1).

    Args:
        config: :class:`DBConfig`; its default is DBNet++ on a ResNet-18.

    Raises:
        ConfigError, MissingExtraError: the backbone cannot be made.

    Example:
        >>> net = DBNet(DBConfig.nano()).eval()
        >>> with torch.no_grad():
        ...     net(torch.zeros(1, 3, 64, 96)).prob.shape
        torch.Size([1, 1, 64, 96])
    """

    def __init__(self, config: DBConfig | None = None) -> None:
        super().__init__()
        self.config = config if config is not None else DBConfig()
        self.backbone = build_backbone(self.config)
        inner = self.config.inner
        self.neck = Neck(self.backbone.channels, inner, self.config.attention)
        width, smooth = inner // 4, self.config.smooth
        self.head = nn.ModuleDict(
            {
                "prob": Head(inner, width, smooth=smooth),
                "thresh": Head(inner + self.config.serial, width, smooth=smooth),
            }
        )
        self.compute_dtype: torch.dtype | None = None  # set in the fused form

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> DBOutput:
        """Maps of normalized images whose height and width are multiples of 32.

        In training mode all three maps, else the probability map alone.

        Raises:
            ShapeError: another shape.
            ConfigError: training mode without a threshold head (a fused network).
        """
        self._check(images)
        if self.compute_dtype is None:
            fused, attention = self.neck(self.backbone(images))
            logit = self.head["prob"](fused)
        else:
            with autocast(images.device, self.compute_dtype):
                x = images.contiguous(memory_format=torch.channels_last)
                fused, attention = self.neck(self.backbone(x))
                logit = self.head["prob"](fused)
        logit = _wide(logit)
        prob = torch.sigmoid(logit)
        if not self.training:
            return DBOutput(prob, None, None, logit, self.config.k, attention)
        thresh = torch.sigmoid(_wide(self.head["thresh"](self._thresh_input(fused, prob))))
        binary = db(prob, thresh, self.config.k)
        return DBOutput(prob, thresh, binary, logit, self.config.k, attention)

    def _thresh_input(self, fused: Tensor, prob: Tensor) -> Tensor:
        if not self.config.serial:
            return fused
        small = nn.functional.interpolate(prob, fused.shape[-2:])
        return torch.cat([fused, small.to(fused.dtype)], 1)

    def _check(self, images: Tensor) -> None:
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != 3 or not shape[2] or shape[2] % 32 or shape[3] % 32 or not shape[3]:
            raise ShapeError(
                f"images has shape {shape}, wanted (batch, 3, height, width) with multiples of 32"
            )
        if self.training and "thresh" not in self.head:
            raise ConfigError(
                "the network has no threshold head and cannot train; take the one before fuse()"
            )
        if self.config.dcn and not self.training and images.device.type == "cpu":
            warnings.warn(
                "deformable convolutions take several times longer on a CPU; the presets 'resnet18' and "
                "'nano' have none",
                FusionWarning,
                stacklevel=3,
            )

    @torch.no_grad()
    def fuse(self, dtype: str | torch.dtype = "float32") -> Self:
        """A copy for inference: batch norms folded, no threshold head, channels last, the fusion folded.

        Args:
            dtype: ``"float32"``; ``"bfloat16"`` or ``"float16"`` run the convolutions in it (the maps stay
                float32); ``"auto"`` takes bfloat16 where the device computes in it. The network's own dtype
                is kept with ``"float32"``.

        Returns:
            A network whose maps differ from this one's by rounding only; it cannot train.
        """
        made = copy.deepcopy(self).eval().requires_grad_(False)
        if "thresh" in made.head:
            del made.head["thresh"]
        _fold(made)
        asf = made.neck.asf
        if isinstance(asf, AdaptiveScaleFusion) and asf.attention != "scale_channel":
            made.neck.asf = FoldedFusion(asf)
        device = next(self.parameters()).device
        made.compute_dtype = _compute_dtype(dtype, device)
        return made.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def start_at(self, prior: float = 0.05) -> Self:
        """Let a network that is about to be trained say ``prior`` of nearly every pixel at first.

        With the authors' start half of all pixels are text. Fresh heads on a trained backbone then learn
        first to say less, and the shortest way is to close all gates of the scale fusion: their sigmoids
        saturate, and nothing is learned any more. RetinaNet (section 4.1 of its paper) starts so too.

        Args:
            prior: the share of text pixels, in (0, 1).

        Returns:
            The network itself, with other weights of its last layer.

        Raises:
            ConfigError: a prior outside of (0, 1).
        """
        check_range("prior", prior, 0, 1, open=True)
        *_, last = (part for part in self.head["prob"].modules() if isinstance(part, _LAST))
        last.weight.mul_(0.1)
        assert last.bias is not None
        last.bias.fill_(math.log(prior / (1 - prior)))
        return self

    def save_pretrained(self, save_directory: PathLike, **options: Any) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and a model card; the directory appears whole.

        Raises:
            InputError: the directory is there and not empty.
        """
        with atomic_directory(save_directory) as directory:
            return super().save_pretrained(directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.config.save(save_directory / CONFIG)
        save_tensors(save_directory / WEIGHTS, dict(self.state_dict()))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: PathLike = "nano", **hub: Any) -> Self:
        """Load a network that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a directory, the name of a shipped checkpoint (``"nano"``), or a
                repository of the Hugging Face hub.
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` ... of the hub.

        Raises:
            CheckpointError: not there, damaged, or of another architecture.
            ConfigError: its configuration cannot be used.
        """
        directory = _locate(pretrained_model_name_or_path, hub)
        net = cls(DBConfig.load(directory / CONFIG))
        state = load_tensors(directory / WEIGHTS)
        if not any(key.startswith("head.thresh.") for key in state):
            del net.head["thresh"]  # a checkpoint for inference
        with reading(directory / WEIGHTS):
            load_strict(net, state)
        return net.eval()


def _locate(name: PathLike, hub: dict[str, Any]) -> Path:
    path = Path(name)
    if path.is_dir():
        if missing := [file for file in (CONFIG, WEIGHTS) if not (path / file).is_file()]:
            raise CheckpointError(f"{name} has no {' and no '.join(missing)}; wanted a saved network")
        return path
    if (shipped := SHIPPED / str(name)).is_dir() and len(path.parts) == 1:
        return shipped
    if len(path.parts) != 2 or path.is_absolute() or os.sep * 2 in str(name):
        there = sorted(p.name for p in SHIPPED.glob("*") if p.is_dir())
        raise CheckpointError(
            f"{name!r} is no directory, no shipped checkpoint ({there}) and no 'owner/name' of the hub"
        )
    config, _ = (model_file(str(name), file, **hub) for file in (CONFIG, WEIGHTS))
    return config.parent


def _compute_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto" and device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return resolve_dtype(dtype, device)


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (AVX-512 BF16 or AMX), so that it pays."""
    cpu: Any = torch.cpu
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(cpu, name, bool)()) for name in checks)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _fold(module: nn.Module) -> None:
    """Fold batch norms into the convolutions before them, and turn doublings into pixel shuffles."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for part in module.modules():
        before: str = ""
        last: nn.Module | None = None
        for name, child in list(part.named_children()):
            if isinstance(child, nn.BatchNorm2d) and isinstance(last, nn.Conv2d | nn.ConvTranspose2d):
                transpose = isinstance(last, nn.ConvTranspose2d)
                setattr(part, before, fuse_conv_bn_eval(last, child, transpose=transpose))
                setattr(part, name, nn.Identity())
            before, last = name, child
    for part in module.modules():
        for name, child in list(part.named_children()):
            if isinstance(child, nn.ConvTranspose2d):
                setattr(part, name, ShuffledDouble(child))

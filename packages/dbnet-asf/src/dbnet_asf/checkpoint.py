"""Reading the authors' checkpoints (EasyOCR uses their names too), and ImageNet weights for a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dbnet_asf.config import Attention, DBConfig, Mode
from dbnet_asf.model.dbnet import DBNet
from fusion_core.atomic import PathLike
from fusion_core.checkpoint import KeyMap, load_foreign, load_strict
from fusion_core.errors import CheckpointError, reading

_FUSION = r"^decoder\.concat_attention\."
_ATTENTION = _FUSION + r"enhanced_attention\."

OFFICIAL = KeyMap(
    [
        (r"^backbone\.(fc|smooth)\.", None),
        (r"^criterion\.", None),
        (r"^(backbone\.layer\d\.\d+)\.conv2_offset\.", r"\1.conv2.offset."),
        (r"^decoder\.in5\.", "neck.lateral.3."),
        (r"^decoder\.in4\.", "neck.lateral.2."),
        (r"^decoder\.in3\.", "neck.lateral.1."),
        (r"^decoder\.in2\.", "neck.lateral.0."),
        (r"^decoder\.out5\.0\.", "neck.smooth.3."),
        (r"^decoder\.out4\.0\.", "neck.smooth.2."),
        (r"^decoder\.out3\.0\.", "neck.smooth.1."),
        (r"^decoder\.out2\.", "neck.smooth.0."),
        (_FUSION + r"conv\.", "neck.asf.conv."),
        (_ATTENTION + r"channel_wise\.1\.", "neck.asf.channel.0."),
        (_ATTENTION + r"channel_wise\.3\.", "neck.asf.channel.1."),
        (_ATTENTION + r"spatial_wise\.0\.", "neck.asf.spatial.0."),
        (_ATTENTION + r"spatial_wise\.2\.", "neck.asf.spatial.1."),
        (_ATTENTION + r"attention_wise\.0\.", "neck.asf.level."),
        (_ATTENTION + r"(fc1|bn|fc2)\.", r"neck.asf.\1."),
        (r"^decoder\.binarize\.", "head.prob."),
        (r"^decoder\.thresh\.", "head.thresh."),
    ],
    strip=("module.", "model.", "_orig_mod."),
)
_BLOCKS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
}


def load_official(
    path: PathLike, *, k: float = 50.0, mode: Mode = "quad", dcn_offset: str | None = None
) -> DBNet:
    """Load a checkpoint of the authors' code (or one of EasyOCR's, which are such).

    The file is read without running any of it; the architecture is inferred from names and shapes; every
    tensor must find its place. A deformable ResNet-50 or 101 gets the authors' rule for its offsets, without
    which it would be another network.

    Args:
        path: ``.pth``, ``.pt`` or no suffix: a state dict.
        k: steepness of differentiable binarization; the file does not tell.
        mode: of the post-processing.
        dcn_offset: ``"strided"`` for a file that was trained with strided offsets; None decides as above.

    Returns:
        The network in evaluation mode, its configuration with the authors' input and post-processing.

    Raises:
        CheckpointError: missing, damaged, more than tensors, or no network of this kind.
    """
    with reading(path, error=CheckpointError):
        return from_official(load_foreign(path), k=k, mode=mode, dcn_offset=dcn_offset)


def from_official(
    state: Mapping[str, Tensor], *, k: float = 50.0, mode: Mode = "quad", dcn_offset: str | None = None
) -> DBNet:
    """As :func:`load_official`, from tensors.

    Raises:
        CheckpointError: a tensor is missing, extra or of another shape; the message lists them.
    """
    mapped = OFFICIAL.apply(state)
    config = infer_config(mapped, mode=mode, dcn_offset=dcn_offset).replace(k=k)
    dtype = next((v.dtype for v in mapped.values() if v.is_floating_point()), torch.float32)
    net = DBNet(config).to(dtype)
    if not any(key.startswith("head.thresh.") for key in mapped):
        del net.head["thresh"]  # a checkpoint for inference
    load_strict(net, mapped)
    return net.eval()


def infer_config(
    state: Mapping[str, Tensor], *, mode: Mode = "quad", dcn_offset: str | None = None
) -> DBConfig:
    """The architecture of a state dict under our names, with the authors' input and post-processing.

    Raises:
        CheckpointError: no ResNet with the pyramid and the heads of DBNet.
    """
    blocks = tuple(_count(state, f"backbone.layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    backbone = _BLOCKS.get((bottleneck, blocks))
    lateral, head = state.get("neck.lateral.0.weight"), state.get("head.prob.0.weight")
    if backbone is None or lateral is None or lateral.ndim != 4 or head is None:
        found = sorted({".".join(key.split(".")[:2]) for key in state})[:8]
        raise CheckpointError(
            f"no network of DBNet's authors: {blocks} residual blocks and parts {found}; wanted a ResNet-18, "
            "34, 50 or 101 with 'decoder.in2' ... and 'decoder.binarize'"
        )
    dcn = any(".conv2.offset." in key for key in state)
    rule: Any = dcn_offset or ("official" if dcn and bottleneck else "strided")
    inner = int(lateral.shape[0])
    thresh = state.get("head.thresh.0.weight")
    official = DBConfig.official(backbone, dcn=dcn, attention=_attention(state), mode=mode)
    return official.replace(
        dcn_offset=rule,
        inner=inner,
        serial=thresh is not None and thresh.ndim == 4 and thresh.shape[1] == inner + 1,
        smooth="head.prob.3.1.weight" in state,
    )


def _attention(state: Mapping[str, Tensor]) -> Attention | None:
    kinds: dict[str, Literal["scale_channel", "scale_channel_spatial", "scale_spatial"]] = {
        "neck.asf.fc1.weight": "scale_channel",
        "neck.asf.channel.0.weight": "scale_channel_spatial",
        "neck.asf.spatial.0.weight": "scale_spatial",
    }
    return next((kind for key, kind in kinds.items() if key in state), None)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)})


def load_imagenet(net: DBNet, path: PathLike | None = None) -> DBNet:
    """Give a ResNet or MobileNetV3 backbone torchvision's ImageNet weights, in place.

    Args:
        net: whose backbone is to be filled; deformable convolutions get the ordinary weights, their offsets
            stay at zero.
        path: a state dict of torchvision's classifier; None lets torchvision download it.

    Returns:
        The same network.

    Raises:
        CheckpointError: damaged, or of another backbone.
    """
    if path is None:
        from torchvision.models import get_model_weights

        name = net.config.backbone.replace("mobilenetv3", "mobilenet_v3")
        state: Mapping[str, Tensor] = get_model_weights(name).DEFAULT.get_state_dict()  # pyright: ignore
    else:
        state = load_foreign(path)
    wanted = net.backbone.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith(("fc.", "classifier."))}
    kept |= {key: value for key, value in wanted.items() if ".conv2.offset." in key}
    load_strict(net.backbone, kept)
    return net

"""ONNX files for onnxruntime and for OpenCV's text detector, with the settings of the pipeline inside."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dbnet_asf.model.asf import AdaptiveScaleFusion, FoldedFusion, PlainFusion
from dbnet_asf.model.dbnet import DBNet
from dbnet_asf.model.deform import DeformConv2d
from fusion_core.atomic import PathLike, atomic_write
from fusion_core.errors import InputError, require_extra
from fusion_core.onnx import export_onnx as _export

INPUT, OUTPUT = "images", "prob"


class _Probability(nn.Module):
    """The network with one output: (batch, 1, height, width), or (height, width) of the first image."""

    def __init__(self, net: DBNet, plane: bool) -> None:
        super().__init__()
        self.net, self.plane = net, plane

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Tensor:
        net = self.net
        fused, _ = net.neck(net.backbone(images))
        prob = torch.sigmoid(net.head["prob"](fused))
        return prob[0, 0] if self.plane else prob


def export_onnx(
    net: DBNet,
    path: PathLike,
    *,
    opencv: bool = False,
    dynamic: bool = True,
    size: tuple[int, int] = (736, 1280),
    drop_deform: bool = False,
) -> Path:
    """Write the network for inference, batch norms folded, as an ONNX file.

    The input ``images`` is normalized as the configuration says. The settings of the whole pipeline (mean,
    std, order of colors, post-processing) are in the file; :func:`fusion_core.onnx.read_metadata` reads them.

    Args:
        net: in any mode; it is not changed.
        path: the file.
        opencv: for ``cv2.dnn.TextDetectionModel_DB``: one image, output ``prob`` of shape (height, width).
            Otherwise ``prob`` is (batch, 1, height, width), for onnxruntime and others.
        dynamic: any batch (not with ``opencv``) and any height and width that are multiples of 32.
        size: height and width without ``dynamic``, multiples of 32.
        drop_deform: take deformable convolutions whose offsets are all zero for ordinary ones.

    Returns:
        The path.

    Raises:
        InputError: OpenCV cannot run deformable convolutions; or the size is no multiple of 32.
        MissingExtraError: the extra ``onnx`` is not installed.
    """
    if min(size) < 32 or size[0] % 32 or size[1] % 32:
        raise InputError(f"size is {size}, wanted multiples of 32")
    made = _undeformed(net) if drop_deform else net
    deformable = any(isinstance(part, DeformConv2d) for part in made.modules())
    if opencv and deformable:
        raise InputError(
            "opencv is True, and OpenCV has no deformable convolutions; export one of the presets without "
            "them ('resnet18', 'resnet50', 'nano'), or, where all offsets are zero, with drop_deform"
        )
    if deformable:
        importlib.import_module("torchvision.ops")  # the exporter knows only operators that are loaded
    fused = copy.deepcopy(made).float().cpu().fuse("float32")
    if opencv and isinstance(fused.neck.asf, FoldedFusion | AdaptiveScaleFusion):
        asf = fused.neck.asf
        fused.neck.asf = PlainFusion(asf.inner if isinstance(asf, FoldedFusion) else asf)
    module = _Probability(fused, opencv).to(memory_format=torch.contiguous_format).eval()
    height, width = (64, 96) if dynamic else size
    example = torch.zeros(1 if opencv or not dynamic else 2, 3, height, width)
    written = _export(
        module,
        [example],
        path,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic={INPUT: _dynamic(opencv)} if dynamic else None,
        metadata={
            "package": "dbnet-asf",
            "output": "height x width" if opencv else "batch x 1 x height x width",
            "multiple": 32,
            "config": net.config.to_dict(),
        },
    )
    if opencv:
        _pool(written)
    return written


def _pool(path: Path) -> None:
    """Write means over space as poolings: OpenCV's classic engine does not know them as reductions."""
    onnx: Any = require_extra("onnx", "onnx", "dbnet-asf")
    model = onnx.load(str(path))
    for node in model.graph.node:
        if node.op_type == "ReduceMean":
            del node.attribute[:], node.input[1:]
            node.op_type = "GlobalAveragePool"
    with atomic_write(path) as file:
        file.write(model.SerializeToString())


def _dynamic(opencv: bool) -> dict[int, Any]:
    height, width = torch.export.Dim("rows", min=1, max=512), torch.export.Dim("columns", min=1, max=512)
    sides: dict[int, Any] = {2: 32 * height, 3: 32 * width}
    return sides if opencv else {0: torch.export.Dim("batch", min=1, max=4096), **sides}


def _undeformed(net: DBNet) -> DBNet:
    made = copy.deepcopy(net)
    for part in list(made.modules()):
        for name, child in list(part.named_children()):
            if not isinstance(child, DeformConv2d):
                continue
            bias = child.offset.bias
            if bool(child.offset.weight.any()) or (bias is not None and bool(bias.any())):
                raise InputError("drop_deform is True, but the offsets are not all zero")
            outputs, inputs = child.weight.shape[:2]
            plain = nn.Conv2d(inputs, outputs, 3, stride=child.stride, padding=1, bias=False)
            plain = plain.to(child.weight.device, child.weight.dtype)
            plain.weight = nn.Parameter(child.weight.detach() / 2)  # every tap weighed one half
            setattr(part, name, plain)
    made.config = net.config.replace(dcn=False)
    return made


def detector_parameters(net: DBNet) -> dict[str, Any]:
    """What ``cv2.dnn.TextDetectionModel_DB`` wants to be told, by the names of its setters.

    OpenCV computes scale * (pixel - mean) with one scale, in the order of the channels that it is told; a
    network with three different deviations gets their mean, which is off by a few percent.

    Example:
        >>> from dbnet_asf.config import DBConfig
        >>> detector_parameters(DBNet(DBConfig.nano()))["setBinaryThreshold"]
        0.3
    """
    config = net.config
    spread = sum(config.std) / 3
    return {
        "setBinaryThreshold": config.post.thresh,
        "setPolygonThreshold": config.post.box_thresh,
        "setUnclipRatio": config.post.ratio,
        "setMaxCandidates": config.post.max_candidates or 1000,
        "setInputParams": {
            "scale": 1 / spread,
            "mean": tuple(config.mean),
            "swapRB": config.color == "rgb",
            "crop": False,
        },
    }

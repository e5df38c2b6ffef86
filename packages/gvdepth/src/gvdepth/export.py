"""A model as one ONNX graph: the camera is an input, normalization and padding are inside (invariant 15)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fusion_core.atomic import PathLike
from fusion_core.errors import FusionError, InputError, require_extra
from fusion_core.onnx import export_onnx as core_export
from fusion_core.results import Result
from gvdepth.camera import Camera
from gvdepth.modeling import GVDepth

INPUTS = ("pixel_values", "camera")
OUTPUTS = ("depth", "uncertainty", "weight_focal")
TOLERANCE = 1e-3
"""Largest difference of log depth between onnxruntime and torch."""


class Graph(nn.Module):
    """What is exported: ``(pixel_values, camera) -> depth, uncertainty, weight_focal``.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: GVDepth) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(
        self, pixel_values: Float[Tensor, "b 3 h w"], camera: Float[Tensor, "b 7"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (B, 1, H, W): metres, metres, share."""
        found = self.model(pixel_values, camera)
        return found.depth, found.uncertainty, found.weight_focal


@dataclass(frozen=True, slots=True)
class Exported(Result):
    """A written graph and how well it agrees with the model.

    Args:
        path: the file.
        log_depth_difference: the largest, over two sizes and two cameras.
    """

    path: Path
    log_depth_difference: float


def example(
    model: GVDepth, height: int, width: int, batch: int = 1, *, other: bool = False
) -> tuple[Tensor, Tensor]:
    """An image of noise and one of two different cameras for it."""
    camera = Camera(
        fx=0.6 * width,
        fy=0.6 * width,
        cx=(width - 1) / 2,
        cy=0.45 * height,
        width=width,
        height=height,
        camera_height=1.2 if other else 1.65,
        pitch_deg=-3.0 if other else 0.5,
        roll_deg=2.0 if other else 0.0,
    )
    draws = torch.Generator().manual_seed(height * 10007 + width)
    images = torch.rand(batch, 3, height, width, generator=draws)
    return images.to(model.device), Camera.batch([camera] * batch, device=model.device)


def export_onnx(
    model: GVDepth, path: PathLike, *, size: tuple[int, int] | None = None, check: bool = True
) -> Exported:
    """Write a model as one ONNX file that takes any batch, any size and any camera.

    Inputs: ``pixel_values`` (B, 3, H, W) RGB in [0, 1], and ``camera`` (B, 7): fx, fy, cx, cy in pixels of
    THIS
    image, camera height in metres, pitch and roll in radians. Outputs: ``depth``, ``uncertainty`` in metres
    and
    ``weight_focal``, (B, 1, H, W).

    Args:
        model: on the CPU.
        path: the file.
        size: ``(height, width)`` of the traced example; None takes a small one.
        check: compare with the model by onnxruntime, at two sizes and with two cameras.

    Raises:
        InputError: the model is on another device.
        FusionError: the exporter cannot express the model, or the comparison fails: the file is then not
        left.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    if model.device.type != "cpu":
        raise InputError(f"model is on {model.device}, wanted the cpu for the export")
    model = model.eval()
    least = model.least_size
    height, width = size or (least + 16, 2 * least + 16)
    # A batch of two, so that the exporter does not take the batch for a constant.
    args = example(model, height, width, batch=2)
    dynamic = {"pixel_values": {0: "batch", 2: "height", 3: "width"}, "camera": {0: "batch"}}
    target = Path(path)
    core_export(
        Graph(model),
        args,
        target,
        input_names=INPUTS,
        output_names=OUTPUTS,
        dynamic=dynamic,
        metadata={"gvdepth": model.config.to_dict(), "inputs": INPUTS, "outputs": OUTPUTS},
    )
    if not check:
        return Exported(target, float("nan"))
    sizes = ((height, width), (height + 2 * least + 5, width + 3))
    worst = difference(target, model, sizes)
    if not worst < TOLERANCE:
        target.unlink(missing_ok=True)
        raise FusionError(
            f"onnxruntime and torch differ by {worst:.2e} in log depth, allowed is {TOLERANCE:g}; nothing "
            f"was written"
        )
    return Exported(target, worst)


def difference(path: PathLike, model: GVDepth, sizes: Sequence[tuple[int, int]]) -> float:
    """The largest difference of log depth between a file and its model, over sizes and two cameras."""
    runtime = require_extra("onnxruntime", "onnx", "gvdepth")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for height, width in sizes:
        for other in (False, True):
            images, camera = example(model, height, width, other=other)
            feed = dict(zip(INPUTS, (images.numpy(), camera.numpy()), strict=True))
            theirs = torch.from_numpy(session.run(["depth"], feed)[0])
            with torch.no_grad():
                ours = Graph(model)(images, camera)[0]
            worst = max(worst, float((ours.log() - theirs.log()).abs().max().nan_to_num(nan=float("inf"))))
    return worst

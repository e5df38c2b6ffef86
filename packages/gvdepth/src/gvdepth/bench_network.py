"""Benchmark rows of the network: the closed-form head, compilation, and prediction of a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_core.bench import Row, paired
from fusion_core.device import threads
from fusion_core.images import save_png
from gvdepth.camera import Camera
from gvdepth.config import GVDepthConfig
from gvdepth.data.simulated import Simulated
from gvdepth.modeling import GVDepth
from gvdepth.modeling_head import cue_depths, fuse_cues
from gvdepth.predict import predict, predict_folder

KITTI_LIKE = Camera(
    fx=721.5, fy=721.5, cx=609.6, cy=172.9, width=1242, height=375, camera_height=1.659, pitch_deg=-0.664
)
SIZE = (416, 640)
_FRAMES = 12


@lru_cache(maxsize=2)
def large_model(cue: Any = "fusion") -> GVDepth:
    """ConvNeXt-T with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GVDepth(GVDepthConfig(encoder="facebook/convnext-tiny-224", cue=cue)).eval()


def _inputs(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    camera = KITTI_LIKE.crop(0, 0, 577, 375).resize(SIZE[1], SIZE[0]).tensor()[None]
    return torch.rand(1, 3, *SIZE).to(device), camera.to(device)


def _forward(model: GVDepth, images: torch.Tensor, camera: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(images, camera, roll=False)

    return run


def closed_form(config: GVDepthConfig) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]:
    """Activations, FCT, VCT and fusion: raw numbers and camera to depth, uncertainty and weight."""

    def head(raw: torch.Tensor, camera: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fused = fuse_cues(cue_depths(raw, camera, SIZE[0], config, roll=False), config)
        return fused.depth, fused.total, fused.weight_focal

    return head


def head_rows(repeats: int, device: str = "cpu") -> list[Row]:
    """The closed-form head against the whole forward, and the fusion model against a focal one."""
    model = large_model().to(device)
    images, camera = _inputs(device)
    raw = torch.randn(1, 2, 2, SIZE[0] // 2, SIZE[1] // 2, device=device)
    head, compiled = closed_form(model.config), torch.compile(closed_form(model.config), fullgraph=True)

    def eager() -> object:
        with torch.inference_mode():
            return head(raw, camera)

    def fast() -> object:
        with torch.inference_mode():
            return compiled(raw, camera)

    common: dict[str, Any] = {"repeats": repeats, "device": device, "dtype": "float32"}
    forward = _forward(model, images, camera)
    rows = [
        paired(
            "closed-form head", eager, forward, target=">= 100", against="forward, ConvNeXt-T at 416x640",
            note="<= 1 % of the forward", **common,
        ),
        paired(
            "fusion model", forward, _forward(large_model("focal").to(device), images, camera), target=">= "
            "0.8",
            against="focal model of the same trunk", note="<= 1.25x its time", **common,
        ),
    ]  # fmt: skip
    try:
        rows.append(
            paired(
                "head, torch.compile(fullgraph=True)", fast, eager, against="the eager head",
                note="one graph, no break", **common,
            )
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - no C++ compiler, or none that works
        words = " ".join(str(error).split())[:120]
        rows.append(
            Row(name="head, torch.compile(fullgraph=True)", ratio=float("nan"), met=False, note=words)
        )
    return rows


def whole_row(repeats: int) -> Row:
    """Reading a PNG, the network with ConvNeXt-T, and writing the depth, against the network alone."""
    model = large_model()
    with tempfile.TemporaryDirectory() as folder:
        camera = Camera.from_fov(60, SIZE[1], SIZE[0], camera_height=1.6)
        image = Simulated(camera, 1).frame(0).image
        path = save_png(Path(folder) / "frame.png", image)
        forward = _forward(model, torch.rand(1, 3, *SIZE), camera.tensor()[None])

        def whole() -> object:
            return predict(model, path, camera).save(folder, formats=("npy",))

        return paired(
            "whole predict, PNG to npy", whole, forward, repeats=repeats, target=">= 0.9", dtype="float32",
            against="the network alone", note=">= 90 % of the time in the network",
        )  # fmt: skip


def overlap_row(repeats: int, frames: int = _FRAMES) -> Row:
    """A folder of large frames with threads, against one thing after the other."""
    from gvdepth.experiment import shipped

    model = shipped("fusion")
    streets = Simulated(KITTI_LIKE, 2, supersample=1)
    images = [streets.frame(index).image for index in range(2)]
    formats = ("npy", "png16", "color")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for index in range(frames):
            save_png(place / "in" / f"{index:03d}.png", np.roll(images[index % 2], index, axis=1))

        def run(workers: int) -> Callable[[], object]:
            return lambda: predict_folder(
                model, place / "in", KITTI_LIKE, place / f"out{workers}", formats=formats,
                num_workers=workers, overwrite=True, progress=False,
            )  # fmt: skip

        return paired(
            "predict a folder", run(2), run(0), repeats=repeats, target=">= 1.3", dtype="float32",
            against="one thing after the other",
            note=f"{frames} PNG of 1242x375, shipped tiny model, npy, png16 and color; torch on one thread",
        )  # fmt: skip


def _alone(rows: Callable[[int, str], list[Row]]) -> Callable[[int, str], list[Row]]:
    def run(repeats: int, device: str) -> list[Row]:
        with threads():
            return rows(repeats, device)

    return run


NETWORK_ROWS: dict[str, Callable[[int, str], list[Row]]] = {
    "head": _alone(head_rows),
    "whole predict": _alone(lambda repeats, _device: [whole_row(repeats)]),
    "folder": _alone(lambda repeats, _device: [overlap_row(repeats)]),
}
"""For :data:`gvdepth.bench.ROWS`; torch runs on one thread."""

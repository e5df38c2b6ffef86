"""The benchmark: label maps, network, post-processing and detector against plain forms and budgets."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dbnet_asf.bench_boxes import add_rows
from dbnet_asf.config import DBConfig, Distance, LabelConfig
from dbnet_asf.model.dbnet import DBNet, cpu_has_bfloat16
from dbnet_asf.plain_labels import labels
from dbnet_asf.targets import make_targets
from fusion_core.bench import Bench, Row, paired
from fusion_core.device import resolve_device
from fusion_core.errors import ConfigError, FusionError

SIDE, WORDS = 640, 60
TARGETS: dict[Distance, str | None] = {"official": None, "exact": ">= 2", "raster": ">= 5"}


def words(count: int = WORDS, side: int = SIDE, seed: int = 0) -> list[NDArray[np.float64]]:
    """Rotated word rectangles on a grid that do not touch.

    Args:
        count: how many.
        side: of the image in pixels.
        seed: of sizes and angles.
    """
    random = np.random.default_rng(seed)
    columns, rows = 6, -(-count // 6)
    found: list[NDArray[np.float64]] = []
    for index in range(count):
        center = np.array([(index % columns + 0.5) * side / columns, (index // columns + 0.5) * side / rows])
        w, h = random.uniform(50, 85), random.uniform(14, 30)
        angle = random.uniform(-0.15, 0.15)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corners = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2
        found.append(corners @ turn.T + center)
    return found


def label_rows(repeats: int) -> list[Row]:
    """The four label maps of one image, against one edge at a time.

    Raises:
        FusionError: the maps are not those of the plain form.
    """
    polygons, size = words(), (SIDE, SIDE)
    wanted = labels(polygons, size)
    made = make_targets(polygons, None, size)
    off = float(np.abs(made.thresh_map.numpy() - wanted[2]).max())
    if off > 1e-4 or (made.gt.numpy() != wanted[0].astype(bool)).any():
        raise FusionError(f"the label maps differ from the plain ones by {off:g}")
    return [
        paired(
            f"label maps, {SIDE} x {SIDE}, {WORDS} words, distance={distance!r}",
            partial(make_targets, polygons, None, size, LabelConfig(distance=distance)),
            lambda: labels(polygons, size),
            repeats=repeats,
            target=target,
            against="per polygon and edge, shapely + pyclipper + NumPy",
        )
        for distance, target in TARGETS.items()
    ]


def network_rows(repeats: int, device: str = "cpu", size: tuple[int, int] = (384, 640)) -> list[Row]:
    """The inference form of DBNet++ on a ResNet-18, against the modules as they are trained.

    The reference runs in float32, in evaluation mode, without its threshold head, on the same threads.
    """
    place = resolve_device(device)
    net = DBNet(DBConfig(backbone="resnet18")).to(place).eval()
    images = torch.randn(1, 3, *size, device=place)
    half = place.type == "cuda" or cpu_has_bfloat16()
    rows: list[Row] = []
    for dtype, target in (("float32", ">= 1.2"), ("bfloat16", ">= 2.5")):
        if dtype == "bfloat16" and not half:
            continue
        fused = net.fuse(dtype)
        rows.append(_forward_row(net, fused, images, dtype, target, repeats, device))
    nano = DBNet(DBConfig.nano()).to(place).eval()
    rows.append(_forward_row(nano, nano.fuse(), images, "float32", None, repeats, device, "nano"))
    return rows


def _forward_row(
    net: DBNet,
    fused: DBNet,
    images: torch.Tensor,
    dtype: str,
    target: str | None,
    repeats: int,
    device: str,
    name: str = "ResNet-18",
) -> Row:
    def run(module: DBNet) -> Any:
        with torch.inference_mode():
            return module(images)

    return paired(
        f"network, {name} + ASF, {images.shape[2]} x {images.shape[3]}, {dtype}",
        lambda: run(fused),
        lambda: run(net),
        repeats=repeats,
        target=target,
        device=device,
        dtype=dtype,
        against="the modules in float32",
    )


def run(*, repeats: int = 5, device: str = "cpu", memory: bool = True) -> Bench:
    """Measure everything.

    Args:
        repeats: pairs per row.
        device: of the network and the detector.
        memory: also the row that starts a fresh process.

    Raises:
        ConfigError: fewer than one repeat.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, wanted at least 1")
    bench = Bench("dbnet-asf")
    for row in (*label_rows(repeats), *network_rows(repeats, device)):
        bench.add(row)
    add_rows(bench, repeats=repeats, device=device, memory=memory)
    return bench

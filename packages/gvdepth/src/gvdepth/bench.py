"""The benchmark: geometry and metrics against what peers do, in pairs, in one process.

Every entry of :data:`ROWS` makes rows; ``gvdepth bench --only ground`` runs those whose name contains a word.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusion_core.bench import Bench, Row, paired
from fusion_core.errors import ConfigError, FusionError
from gvdepth.bench_network import NETWORK_ROWS
from gvdepth.camera import Camera
from gvdepth.geometry import ground_depth
from gvdepth.measures import METRICS, metrics

__all__ = ["ROWS", "run"]

Measure = Callable[[int, str], Sequence[Row]]
GROUND_TARGET, METRICS_TARGET = ">= 500", ">= 5"
_KITTI: dict[str, Any] = {"fx": 721.5, "fy": 721.5, "cx": 609.6, "cy": 172.9, "width": 1242, "height": 375}


def meshgrid_depth(camera: Camera, device: str) -> torch.Tensor:
    """Ground depth the peers' way: a grid of homogeneous pixels, the inverse intrinsics, the plane."""
    height, width = camera.size
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)]).reshape(3, -1).float().to(device)
    inverse = torch.linalg.inv(torch.as_tensor(camera.matrix, dtype=torch.float32)).to(device)
    normal = torch.as_tensor(camera.normal, dtype=torch.float32, device=device)
    down = normal @ (inverse @ pixels)
    depth = torch.where(down > 0, camera.require_height() / down, torch.inf)
    return depth.reshape(height, width)


def ground_rows(repeats: int, device: str) -> list[Row]:
    """The ground map of a KITTI image, without and with roll, and of another camera each time.

    Raises:
        FusionError: the two ways differ.
    """
    rows: list[Row] = []
    for name, roll_deg, target in (("ground map", 0.0, GROUND_TARGET), ("ground map, rolled", 1.0, None)):
        camera = Camera(**_KITTI, camera_height=1.659, pitch_deg=-0.664, roll_deg=roll_deg)

        def ours(camera: Camera = camera) -> Any:
            return ground_depth(camera, device=None if device == "cpu" else device)

        def reference(camera: Camera = camera) -> Any:
            return meshgrid_depth(camera, device)

        near = reference() < 100
        if not torch.allclose(ours()[near], reference()[near], rtol=1e-3):
            raise FusionError("the closed form of the ground map differs from the meshgrid way")
        note = f"{camera.height}x{camera.width}"
        options: dict[str, Any] = {"dtype": "float32", "against": "meshgrid, inverse K, dot", "note": note}
        rows.append(paired(name, ours, reference, repeats=repeats, target=target, device=device, **options))
    # More cameras than are remembered.
    others = itertools.cycle(
        [Camera(**_KITTI, camera_height=1.659, pitch_deg=0.01 * step) for step in range(-100, 100)]
    )
    target_device = None if device == "cpu" else device
    rows.append(
        paired(
            "ground map, another camera each time",
            lambda: ground_depth(next(others), device=target_device),
            lambda: meshgrid_depth(next(others), device),
            repeats=repeats,
            device=device,
            dtype="float32",
            against="meshgrid, inverse K, dot",
            note=f"{_KITTI['height']}x{_KITTI['width']}",
        )
    )
    return rows


def indexed_metrics(prediction: NDArray[Any], target: NDArray[Any], cap: float = 80.0) -> dict[str, float]:
    """The eleven metrics the peers' way: each takes its own valid pixels by boolean indexing."""
    clipped = np.clip(prediction, 1e-3, cap)
    valid = (target > 1e-3) & (target <= cap)

    def both() -> tuple[NDArray[Any], NDArray[Any]]:
        return clipped[valid], target[valid]

    def of(function: Callable[[NDArray[Any], NDArray[Any]], Any]) -> float:
        return float(function(*both()))

    def logs(p: NDArray[Any], g: NDArray[Any]) -> NDArray[Any]:
        return np.log(p) - np.log(g)

    def share(power: int) -> float:
        return of(lambda p, g: np.mean(np.maximum(p / g, g / p) < 1.25**power))

    return {
        "abs_rel": of(lambda p, g: np.mean(np.abs(p - g) / g)),
        "sq_rel": of(lambda p, g: np.mean((p - g) ** 2 / g)),
        "rmse": of(lambda p, g: np.sqrt(np.mean((p - g) ** 2))),
        "rmse_log": of(lambda p, g: np.sqrt(np.mean(logs(p, g) ** 2))),
        "silog": of(lambda p, g: 100 * np.sqrt(np.mean(logs(p, g) ** 2) - np.mean(logs(p, g)) ** 2)),
        "log10": of(lambda p, g: np.mean(np.abs(np.log10(p) - np.log10(g)))),
        "irmse": of(lambda p, g: 1000 * np.sqrt(np.mean((1 / p - 1 / g) ** 2))),
        "mae": of(lambda p, g: np.mean(np.abs(p - g))),
        "d1": share(1),
        "d2": share(2),
        "d3": share(3),
    }


def metrics_rows(repeats: int, _device: str) -> list[Row]:
    """Eleven metrics of a KITTI image of which 70 % is valid.

    Raises:
        FusionError: the two ways differ.
    """
    draw = np.random.default_rng(0)
    shape = (_KITTI["height"], _KITTI["width"])
    target = np.where(draw.random(shape) < 0.7, draw.uniform(1, 75, shape), 0.0)
    prediction = np.maximum(target, 1.0) * np.exp(draw.normal(0, 0.1, shape))
    found, expected = metrics(prediction, target), indexed_metrics(prediction, target)
    if any(abs(found[name] / expected[name] - 1) > 1e-9 for name in METRICS):
        raise FusionError("the metrics of one pass differ from those of boolean indexing")
    return [
        paired(
            "eleven metrics",
            lambda: metrics(prediction, target),
            lambda: indexed_metrics(prediction, target),
            repeats=repeats,
            target=METRICS_TARGET,
            dtype="float64",
            against="boolean indexing per metric",
            note=f"{shape[0]}x{shape[1]}, 70 % valid",
        )
    ]


ROWS: dict[str, Measure] = {"ground map": ground_rows, "metrics": metrics_rows, **NETWORK_ROWS}


def run(*, repeats: int = 5, only: Sequence[str] = (), device: str = "cpu") -> Bench:
    """Run the benchmark.

    Args:
        repeats: pairs per row.
        only: words; rows whose name contains one of them, all by default.
        device: of the tensor rows.

    Raises:
        ConfigError: no row is called so.
    """
    chosen = [measure for name, measure in ROWS.items() if not only or any(word in name for word in only)]
    if not chosen:
        raise ConfigError(f"only is {list(only)}, wanted words of {', '.join(ROWS)}")
    bench = Bench("gvdepth")
    for measure in chosen:
        for row in measure(repeats, device):
            bench.add(row)
    return bench

"""What a prediction is: maps of one image, and the files they become."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.atomic import atomic_write
from fusion_core.errors import InputError
from fusion_core.images import save_png
from fusion_core.results import Result
from gvdepth.camera import Camera
from gvdepth.data.base import encode_depth
from gvdepth.geometry import pixel_centers
from gvdepth.viz import color_depth

FORMATS = ("npy", "png16", "color", "ply", "uncertainty", "height")
"""Files of a prediction: depth as float32 metres, 16-bit PNG or picture, points, uncertainty, height."""


@dataclass(frozen=True, slots=True)
class DepthOutput(Result):
    """Metric depth of one image; maps are (H, W) float32, at the image's own size.

    Args:
        depth: metres along the optical axis.
        uncertainty: of the depth, metres; it grows where the two cues contradict each other.
        depth_focal: of the focal cue (of a single-cue model: that cue's).
        depth_vertical: of the vertical cue (of a single-cue model: that cue's).
        uncertainty_focal: of the focal cue, metres.
        uncertainty_vertical: of the vertical cue, metres.
        weight_focal: share of the focal cue, in [0, 1].
        height_above_road: of what each pixel shows, metres above the level road.
        image: (H, W, 3) uint8.
        camera: of the image.
        id: a name; files are called after it.
    """

    depth: Tensor
    uncertainty: Tensor
    depth_focal: Tensor
    depth_vertical: Tensor
    uncertainty_focal: Tensor
    uncertainty_vertical: Tensor
    weight_focal: Tensor
    height_above_road: Tensor
    image: NDArray[np.uint8]
    camera: Camera
    id: str

    def obstacles(self, min_height: float = 0.3, max_height: float = 3.0) -> Tensor:
        """(H, W) bool: what stands on the road, by its height above it, metres."""
        return (self.height_above_road > min_height) & (self.height_above_road < max_height)

    def point_cloud(self, max_depth: float | None = None) -> Float[Tensor, "points 6"]:
        """The pixels as points: x right, y down, z forward in metres, and RGB in [0, 255].

        Args:
            max_depth: leave out what is farther, metres.
        """
        depth = self.depth.float()
        rows = pixel_centers(depth.shape[0], device=depth.device).to(depth.dtype)[:, None]
        columns = pixel_centers(depth.shape[1], device=depth.device).to(depth.dtype)
        x = (columns - self.camera.cx) / self.camera.fx * depth
        y = (rows - self.camera.cy) / self.camera.fy * depth
        colors = torch.from_numpy(self.image).to(depth)
        points = torch.cat([torch.stack([x, y, depth], -1), colors], -1)
        keep = torch.isfinite(depth) & (depth > 0)
        return points[keep if max_depth is None else keep & (depth <= max_depth)]

    def save(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        path: str | os.PathLike[str],
        *,
        formats: Sequence[str] = ("npy",),
        name: str | None = None,
        max_depth: float = 80.0,
    ) -> list[Path]:
        """Write files, each whole or not at all.

        Args:
            path: a directory, made if it is not there; or a file of :meth:`Result.save` (``.npz`` ...).
            formats: of :data:`FORMATS`.
            name: of the files, instead of ``id``.
            max_depth: of the picture's palest colour and the farthest point, metres.

        Returns:
            The files: ``NAME.depth.npy``, ``NAME.depth.png``, ``NAME.color.png``, ``NAME.ply``,
            ``NAME.uncertainty.npy``, ``NAME.height.npy``.

        Raises:
            InputError: an unknown format.
        """
        if Path(path).suffix in (".npz", ".safetensors", ".json"):
            Result.save(self, path)
            return [Path(path)]
        check_formats(formats)
        base = Path(path) / (name or self.id)
        written: list[Path] = []

        def place(ending: str) -> Path:
            written.append(base.with_name(f"{base.name}.{ending}"))
            return written[-1]

        depth = np.nan_to_num(self.depth.float().cpu().numpy(), nan=0.0, posinf=0.0, neginf=0.0)
        for kind in dict.fromkeys(formats):
            match kind:
                case "npy":
                    _save_array(place("depth.npy"), depth)
                case "png16":
                    save_png(place("depth.png"), encode_depth(depth))
                case "color":
                    save_png(place("color.png"), color_depth(depth, max_depth=max_depth))
                case "ply":
                    save_ply(place("ply"), self, max_depth)
                case "uncertainty":
                    _save_array(place("uncertainty.npy"), self.uncertainty.float().cpu().numpy())
                case _:
                    _save_array(place("height.npy"), self.height_above_road.float().cpu().numpy())
        return written


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that do not exist.

    Raises:
        InputError: an unknown one, or none.
    """
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown or not formats:
        raise InputError(f"formats is {list(formats)}, wanted some of {', '.join(FORMATS)}")


def _save_array(path: Path, values: NDArray[Any]) -> None:
    with atomic_write(path) as file:
        np.save(file, np.ascontiguousarray(values, np.float32))


def save_ply(path: str | os.PathLike[str], output: DepthOutput, max_depth: float | None = None) -> None:
    """Write the points with colour and uncertainty as binary little-endian PLY.

    Args:
        path: the file.
        output: the prediction.
        max_depth: leave out what is farther, metres.
    """
    depth = output.depth.float()
    points = output.point_cloud(max_depth).cpu().numpy()
    keep = torch.isfinite(depth) & (depth > 0)
    keep = keep if max_depth is None else keep & (depth <= max_depth)
    kinds = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
    table = np.empty(len(points), [*kinds, ("uncertainty", "<f4")])
    for column, (field, _) in enumerate(kinds):
        table[field] = points[:, column]
    table["uncertainty"] = output.uncertainty.float()[keep].cpu().numpy()
    words = {"<f4": "float", "u1": "uchar"}
    lines = [f"property {words[kind]} {field}" for field, kind in [*kinds, ("uncertainty", "<f4")]]
    head = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(table)}",
        *lines,
        "end_header",
        "",
    ]
    with atomic_write(path) as file:
        file.write("\n".join(head).encode("ascii"))
        file.write(table.tobytes())

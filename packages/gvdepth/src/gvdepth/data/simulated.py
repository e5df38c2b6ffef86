"""Simulated streets as a data set, the cameras of the experiments, and streets written as a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.errors import InputError
from fusion_core.images import save_png
from gvdepth.camera import Camera
from gvdepth.data.base import Sample, write_depth
from gvdepth.simulate import Frame, make_scene, render


def _small(f: float, camera_height: float, pitch_deg: float) -> Camera:
    return Camera(
        fx=f, fy=f, cx=59.5, cy=21.4, width=120, height=48, camera_height=camera_height, pitch_deg=pitch_deg
    )


RIGS: dict[str, tuple[Camera, float]] = {
    "train": (
        Camera(fx=125, fy=125, cx=99.5, cy=36, width=200, height=80, camera_height=1.65, pitch_deg=-0.5),
        1.0,
    ),
    "A": (_small(75.0, 1.65, -0.5), 1.0),
    "B": (_small(130.0, 1.65, -0.5), 1.0),
    "C": (_small(90.0, 2.15, -0.3), 1.0),
    "D": (_small(90.0, 1.2, 1.0), 1.0),
    "E": (_small(90.0, 1.5, -4.0), 1.0),
    "F": (_small(95.0, 1.5, 0.0), 1.3),
}
"""Camera and object size of the experiments of section 6: one to train with, A like it, B to F unseen."""


class Simulated:
    """Streets seen by one camera; see :mod:`gvdepth.simulate`.

    Args:
        camera: a camera, or the name of one of :data:`RIGS`.
        count: how many.
        seed: of the streets.
        object_size: multiplies all objects; by default that of the rig, else 1.
        supersample: rays per pixel and side; by default 2 for images below 100 rows, else 1.
        noise: of the pixels.
        keep: hold what was rendered in memory.

    Raises:
        InputError: no such rig, or ``count`` below 1.
    """

    def __init__(
        self,
        camera: Camera | str,
        count: int,
        *,
        seed: int = 0,
        object_size: float | None = None,
        supersample: int | None = None,
        noise: float = 0.02,
        keep: bool = False,
    ) -> None:
        if isinstance(camera, str) and camera not in RIGS:
            raise InputError(f"camera is {camera!r}, wanted a Camera or one of {', '.join(RIGS)}")
        if count < 1:
            raise InputError(f"count is {count}, wanted at least 1")
        rig = RIGS[camera] if isinstance(camera, str) else (camera, 1.0)
        self.camera = rig[0]
        self.object_size = rig[1] if object_size is None else object_size
        self.count, self.seed, self.noise = count, seed, noise
        self.supersample = supersample or (2 if self.camera.height < 100 else 1)
        self._kept: dict[int, Sample] | None = {} if keep else None

    def __len__(self) -> int:
        return self.count

    def frame(self, index: int) -> Frame:
        """The street with all the simulator knows of it.

        Raises:
            IndexError: no such frame.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"index is {index}, there are {self.count} frames")
        scene = make_scene(self.seed, index, object_size=self.object_size)
        return render(scene, self.camera, supersample=self.supersample, noise=self.noise)

    def __getitem__(self, index: int) -> Sample:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        frame = self.frame(index)
        depth = frame.depth.astype(np.float32)
        sample = Sample(frame.image, depth, depth > 0, self.camera, frame.id)
        if self._kept is not None:
            self._kept[index] = sample
        return sample


def write_frames(frames: Iterable[Frame], out: str | Path) -> int:
    """Write streets as a plain folder that :class:`Folder` reads, road masks included.

    Args:
        frames: of one camera.
        out: an existing directory.

    Returns:
        How many were written.
    """
    place, count = Path(out), 0
    camera: Any = None
    for frame in frames:
        if camera is None:
            camera = frame.camera
            camera.save(place / "camera.json")
        save_png(place / "images" / f"{frame.id}.png", frame.image)
        write_depth(place / "depth" / f"{frame.id}.png", np.where(frame.depth < 255.0, frame.depth, 0.0))
        save_png(place / "road" / f"{frame.id}.png", (frame.ground * 255).astype(np.uint8))
        count += 1
    return count

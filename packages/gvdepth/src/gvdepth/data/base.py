"""What every reader yields, and depth files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fusion_core.atomic import PathLike, atomic_write
from fusion_core.errors import DataError, InputError, ShapeError, naming, reading
from fusion_core.images import save_png
from gvdepth.camera import Camera

DEPTH_SCALE = 256.0
"""16-bit PNG: depth = value / 256 metres, 0 = unknown (KITTI)."""
_MAX_PIXELS = 200_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with what is known about it.

    Args:
        image: (H, W, 3) uint8 RGB.
        depth: (H, W) float32 metres, 0 where unknown.
        valid: (H, W), True where the depth is known.
        camera: of this image.
        id: unique in its data set.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]
    valid: NDArray[np.bool_]
    camera: Camera
    id: str


class Samples(Protocol):
    """A data set: its length, and samples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Subset:
    """Some samples of a data set.

    Args:
        samples: the data set.
        indices: which; in this order.
    """

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self.samples, self.indices = samples, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.indices[index]]


def make_sample(image: NDArray[np.uint8], depth: NDArray[Any], camera: Camera, name: str) -> Sample:
    """A sample whose parts fit each other.

    Raises:
        ShapeError: image and depth differ in size.
        CameraError: the camera is of images of another aspect.
    """
    if image.shape[:2] != depth.shape:
        raise ShapeError(
            f"{name}: the image has {image.shape[0]}x{image.shape[1]} pixels, its depth "
            f"{depth.shape[0]}x{depth.shape[1]}"
        )
    known = np.isfinite(depth) & (depth > 0)
    plain = np.where(known, depth, 0.0).astype(np.float32)
    with naming(name):
        fitted = camera.for_image(*image.shape[:2])
    return Sample(image, plain, known, fitted, name)


def read_depth(path: PathLike) -> NDArray[np.float32]:
    """Read a depth map in metres.

    Args:
        path: ``.png`` of 16 bits (metres times 256), or ``.npy`` (metres).

    Returns:
        (H, W) float32; 0 where unknown.

    Raises:
        DataError: missing, cut off, of another kind or too large.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"depth {str(path)!r} is not there")
    if file.suffix == ".npy":
        with reading(f"depth {path}", error=DataError):
            found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise DataError(f"depth {path} is an archive of arrays, wanted one array: metres (H, W)")
        if found.ndim != 2 or found.dtype.kind not in "fiu":
            raise DataError(f"depth {path} is {found.dtype} of shape {found.shape}, wanted metres (H, W)")
        return np.nan_to_num(found.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    if file.suffix != ".png":
        raise DataError(f"depth {path} has suffix {file.suffix!r}, wanted .png (16 bits) or .npy")
    from PIL import Image

    with reading(f"depth {path}", error=DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limit is ours, and a broken file is an error or it is not
        with Image.open(file) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(
                    f"depth {path} has {image.width}x{image.height} pixels, more than {_MAX_PIXELS}"
                )
            if not image.mode.startswith("I"):
                raise DataError(f"depth {path} is a PNG of mode {image.mode}, wanted 16-bit gray")
            values = np.asarray(image)
    return values.astype(np.float32) / np.float32(DEPTH_SCALE)


def write_depth(path: PathLike, depth: NDArray[Any]) -> None:
    """Write a depth map, whole or not at all; what is not finite or not positive becomes 0 (unknown).

    Args:
        path: ``.png`` (16 bits, metres times 256, up to 255.99 m) or ``.npy`` (float32).
        depth: (H, W) metres.

    Raises:
        DataError: another suffix.
    """
    known = np.isfinite(depth) & (depth > 0)
    plain = np.where(known, depth, 0.0)
    suffix = Path(path).suffix
    if suffix == ".png":
        save_png(path, encode_depth(plain))
    elif suffix == ".npy":
        with atomic_write(path) as file:
            np.save(file, plain.astype(np.float32))
    else:
        raise DataError(f"depth {path} has suffix {suffix!r}, wanted .png or .npy")


def encode_depth(depth: NDArray[Any]) -> NDArray[np.uint16]:
    """Metres as 16 bits, times 256, rounded; known depths never become 0, far ones saturate."""
    scaled = np.rint(np.asarray(depth, np.float64) * DEPTH_SCALE)
    return np.where(depth > 0, scaled.clip(1, 65535), 0).astype(np.uint16)


def open_data(spec: str, *, split: str | None = None, limit: int | None = None) -> Samples:
    """The data set that a command line names.

    Args:
        spec: ``"kitti:ROOT"``, ``"folder:ROOT"`` (or a plain path), or ``"simulated:RIG[:COUNT[:SEED]]"``
            with a
            rig of :data:`RIGS`.
        split: a file of frames, for KITTI.
        limit: the first so many.

    Raises:
        InputError: no such kind, or nothing there.
    """
    from gvdepth.data.folder import Folder
    from gvdepth.data.kitti import KITTI
    from gvdepth.data.simulated import RIGS, Simulated

    kind, colon, rest = spec.partition(":")
    if not colon and Path(spec).is_dir():
        kind, rest = "folder", spec
    if kind != "kitti" and split is not None:
        raise InputError(f"split is {split!r}, which only kitti: takes")
    found: Samples
    if kind == "kitti" and rest:
        found = KITTI(rest, split=split)
    elif kind == "folder" and rest:
        found = Folder(rest)
    elif kind == "simulated" and rest.split(":")[0] in RIGS:
        name, *numbers = rest.split(":")
        try:
            count, seed = (*map(int, numbers), *(32, 1)[len(numbers) :])
        except ValueError as error:
            raise InputError(f"data is {spec!r}, wanted simulated:RIG[:COUNT[:SEED]]") from error
        found = Simulated(name, count, seed=seed)
    else:
        raise InputError(
            f"data is {spec!r}, wanted kitti:ROOT, folder:ROOT or simulated:RIG[:COUNT[:SEED]] with RIG one "
            f"of "
            f"{', '.join(RIGS)}"
        )
    return found if limit is None or limit >= len(found) else Subset(found, range(limit))

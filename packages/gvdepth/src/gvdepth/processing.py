"""Images and cameras on their way into the network, and maps on their way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fusion_core.errors import InputError, ShapeError
from fusion_core.images import read_image, to_tensor
from gvdepth.camera import Camera


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image as the network takes it.

    Args:
        image: (H, W, 3) uint8, as it was given.
        pixel_values: (3, h, w) in [0, 1].
        camera: of the image.
        network_camera: of ``pixel_values``.
        id: a name.
    """

    image: NDArray[np.uint8]
    pixel_values: Tensor
    camera: Camera
    network_camera: Camera
    id: str

    @property
    def size(self) -> tuple[int, int]:
        """``(height, width)`` of the network's image."""
        return self.network_camera.size


def prepare(source: Any, camera: Camera, *, height: int | None = None, name: str = "image") -> Prepared:
    """Read an image, resize it where asked, and let the camera follow.

    Args:
        source: path, bytes, PIL image, (H, W, 3) uint8 array, or (3, H, W) tensor.
        camera: of this image; one of the same aspect (within 1 %) is resized to it.
        height: rows of the network's image, the aspect is kept; None = as it is.
        name: for messages and files.

    Raises:
        InputError: no image.
        CameraError: the camera is of images of another aspect, or its height is not known.
    """
    image = read_image(source)
    rows, columns = image.shape[:2]
    fitted = camera.for_image(rows, columns)
    fitted.require_height()
    if height is None or height == rows:
        return Prepared(image, to_tensor(image), fitted, fitted, name)
    width = max(round(columns * height / rows), 1)
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return Prepared(image, to_tensor(small), fitted, fitted.resize(width, height), name)


def batch(items: Sequence[Prepared], device: torch.device) -> tuple[Tensor, Tensor]:
    """Images of one size and their cameras as (B, 3, h, w) and (B, 7).

    Raises:
        ShapeError: different sizes.
    """
    sizes = {item.size for item in items}
    if len(sizes) != 1:
        raise ShapeError(f"images have the sizes {sorted(sizes)}, wanted one size in a batch")
    images = torch.stack([item.pixel_values for item in items]).to(device, non_blocking=True)
    return images, Camera.batch([item.network_camera for item in items], device=device)


def undo(maps: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c H W"]:
    """Maps at the image's own size; metres do not change when an image is resized."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def is_batch(images: Any) -> bool:
    """Whether several images were given: a list, a tuple, or a tensor or array of four dimensions."""
    return isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4


def pair(images: Any, cameras: Any) -> list[tuple[Any, Camera]]:
    """Images with one camera each; one camera serves all.

    Raises:
        InputError: other numbers of images and cameras, or something that is no camera.
    """
    several = list(images) if is_batch(images) else [images]
    found: list[Any] = [cameras] * len(several) if isinstance(cameras, Camera) else _listed(cameras)
    if len(found) != len(several):
        raise InputError(
            f"there are {len(several)} images and {len(found)} cameras, wanted one camera for each"
        )
    for camera in found:
        if not isinstance(camera, Camera):
            raise InputError(f"cameras has a {type(camera).__name__}, wanted gvdepth.Camera")
    return list(zip(several, found, strict=True))


def _listed(cameras: Any) -> list[Any]:
    if not isinstance(cameras, list | tuple):
        raise InputError(
            f"camera is a {type(cameras).__name__}, wanted gvdepth.Camera, or one for each image"
        )
    return list(cameras)  # pyright: ignore[reportUnknownArgumentType]

"""The road as every camera sees it: ground depth, horizon, height above the road (sections 2.1 and 2.2).

With the unit vector to the ground ``n`` and the ray ``r(u, v) = ((u - cx)/fx, (v - cy)/fy, 1)`` a pixel sees
the road at the depth ``h / (n . r)``. ``n . r`` is a row vector plus, with roll, a column vector: no matrix
product and no grid of coordinates is ever formed. Products of camera numbers are formed in double precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import ConfigError, ShapeError
from gvdepth.camera import Camera

__all__ = [
    "CameraLike",
    "camera_numbers",
    "down_component",
    "ground_depth",
    "ground_embedding",
    "ground_pyramid",
    "height_above_road",
    "horizon",
    "pixel_centers",
]

CameraLike = Camera | Sequence[Camera] | Tensor
_EMBEDDING_SCALE = 8.0


def camera_numbers(camera: CameraLike, like: Tensor | None = None) -> Float[Tensor, "... 7"]:
    """The numbers ``(fx, fy, cx, cy, camera_height, pitch, roll)``, in double precision where there is one.

    Args:
        camera: a camera, several of them, or a tensor (..., 7) with angles in radians.
        like: its device is taken for cameras.

    Raises:
        CameraError: a camera's height is not known.
        ShapeError: the tensor's last dimension is not 7.
    """
    if isinstance(camera, Tensor):
        if camera.shape[-1:] != (7,):
            raise ShapeError(
                f"camera has shape {tuple(camera.shape)}, wanted (..., 7): fx, fy, cx, cy, camera_height, "
                "pitch, roll"
            )
        return camera.to(_wide(camera.device))
    device = torch.device("cpu") if like is None else like.device
    wide = _wide(device)
    if isinstance(camera, Camera):
        return camera.tensor(wide, device)
    return Camera.batch(camera, wide, device)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def pixel_centers(count: int, stride: int = 1, device: Any = None) -> Float[Tensor, " count"]:
    """Full-resolution positions of the cells of a coarser map: ``stride j + (stride - 1)/2``.

    Example:
        >>> pixel_centers(3, stride=2).tolist()
        [0.5, 2.5, 4.5]
    """
    place = torch.device("cpu" if device is None else device)
    return torch.arange(count, dtype=_wide(place), device=place) * stride + (stride - 1) / 2


def unit_normal(numbers: Float[Tensor, "... 7"]) -> tuple[Tensor, Tensor, Tensor]:
    """The unit vector to the ground in camera axes, ``(sin r cos p, cos r cos p, -sin p)``, each (...)."""
    pitch, roll = numbers[..., 5], numbers[..., 6]
    return roll.sin() * pitch.cos(), roll.cos() * pitch.cos(), -pitch.sin()


def aligned(value: Tensor, ndim: int) -> Tensor:
    """A per-camera value (batch, ...) with trailing dimensions of 1, so that it broadcasts to ``ndim``."""
    return value.reshape(value.shape + (1,) * (ndim - value.ndim)) if value.ndim else value


def down_component(
    camera: CameraLike, rows: Float[Tensor, " h"], columns: Float[Tensor, " w"] | None = None
) -> Float[Tensor, "... h w"]:
    """``n . r``: how far a ray goes down per metre of depth; 0 on the horizon, positive below.

    Args:
        camera: one camera, or (batch, 7).
        rows: (h,) full-resolution rows.
        columns: (w,) full-resolution columns; None promises that roll is 0, and the result has width 1.

    Returns:
        (h, w) of one camera or (batch, 1, h, w), in double precision; differentiable in the camera.

    Example:
        >>> camera = Camera(fx=50, fy=50, cx=20, cy=10, width=40, height=24, camera_height=1.5)
        >>> down_component(camera, torch.tensor([10.0, 15.0])).flatten().tolist()
        [0.0, 0.1]
    """
    numbers = camera_numbers(camera, rows)
    ndim = 4 if numbers.ndim > 1 else 0
    fx, fy, cx, cy = (aligned(numbers[..., i], ndim) for i in range(4))
    nx, ny, nz = (aligned(part, ndim) for part in unit_normal(numbers))
    # Differences first: a pixel exactly on the horizon has to give exactly 0.
    down = (rows.to(numbers.dtype)[:, None] - cy) * (ny / fy) + nz
    return down if columns is None else down + (columns.to(numbers.dtype) - cx) * (nx / fx)


@overload
def ground_depth(
    camera: CameraLike,
    size: tuple[int, int] | None = None,
    *,
    stride: int = 1,
    roll: bool | None = None,
    backend: Literal["torch"] = "torch",
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor: ...


@overload
def ground_depth(
    camera: Camera,
    size: tuple[int, int] | None = None,
    *,
    stride: int = 1,
    roll: bool | None = None,
    backend: Literal["numpy"],
    dtype: Any = None,
    device: None = None,
) -> NDArray[Any]: ...


def ground_depth(
    camera: CameraLike,
    size: tuple[int, int] | None = None,
    *,
    stride: int = 1,
    roll: bool | None = None,
    backend: Literal["torch", "numpy"] = "torch",
    dtype: Any = None,
    device: Any = None,
) -> Any:
    """Depth of the level road at every pixel, ``h / (n . r)`` where the ray goes down, else infinite (Eq. 3).

    Args:
        camera: one camera, several of one size, or a tensor (batch, 7).
        size: ``(height, width)`` of the image, pixels; a camera's own by default, needed for tensors.
        stride: of the map's cells, pixels.
        roll: False promises that no camera has roll, so that the depth depends on the row only; None looks
            at the cameras (a tensor is taken to have roll: looking would wait for the device).
        backend: ``"numpy"`` needs no tensors and takes one camera.
        dtype: of the result, float32 by default (computed in double precision).
        device: of the result, for cameras.

    Returns:
        (height, width) metres for one camera, else (batch, 1, height, width). Without roll it is one row
        vector seen as a map: ``clone()`` it before writing into it.

    Raises:
        CameraError: a camera's height is not known.
        ShapeError: cameras of different sizes, or a tensor without ``size``.
        ConfigError: unknown backend.

    Example:
        >>> camera = Camera(fx=50, fy=50, cx=20, cy=10, width=40, height=24, camera_height=1.5)
        >>> ground_depth(camera)[[9, 10, 15, 20], 0].tolist()
        [inf, inf, 15.0, 7.5]
    """
    if backend not in ("torch", "numpy"):
        raise ConfigError(f"backend is {backend!r}, wanted 'torch' or 'numpy'")
    height, width = _size(camera, size)
    count = -(-height // stride), -(-width // stride)
    if isinstance(camera, Camera):
        flat = camera.roll_deg == 0 if roll is None else not roll
        if backend == "numpy":
            kind = np.float32 if dtype is None else dtype
            if flat:
                return np.broadcast_to(_row_depth(camera, count[0], stride, kind)[:, None], count)
            return _map_depth(camera, count, stride).astype(kind)
        if flat and device is None and (dtype is None or dtype == torch.float32):
            row = _row_depth(camera, count[0], stride, np.float32)
            # One row vector seen as a map: NumPy makes the view in a third of the time.
            return torch.from_numpy(np.ndarray(count, np.float32, row, 0, (row.itemsize, 0)))
        if flat:
            found = torch.from_numpy(_row_depth(camera, count[0], stride, np.float64))
            return found.to(device, dtype or torch.float32).as_strided(count, (1, 0))
        if device is None:
            return torch.from_numpy(_map_depth(camera, count, stride)).to(dtype or torch.float32)
    elif backend == "numpy":
        raise ConfigError("backend='numpy' takes one Camera")
    elif roll is None and not isinstance(camera, Tensor):
        roll = any(one.roll_deg != 0 for one in camera)
    numbers = camera_numbers(camera, None if device is None else torch.empty(0, device=device))
    rows = pixel_centers(count[0], stride, numbers.device)
    columns = None if roll is False else pixel_centers(count[1], stride, numbers.device)
    down = down_component(numbers, rows, columns)
    scale = aligned(numbers[..., 4], down.ndim if numbers.ndim > 1 else 0)
    return _depth(down, scale).to(dtype or torch.float32).expand(*down.shape[:-2], *count)


def _depth(down: Tensor, camera_height: Tensor) -> Tensor:
    below = down > 0
    # A safe denominator first, so that the gradient of the other branch is no NaN.
    return torch.where(below, camera_height / torch.where(below, down, torch.ones_like(down)), math.inf)


def _size(camera: CameraLike, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is not None:
        return size
    if isinstance(camera, Tensor):
        raise ShapeError("size is None, wanted (height, width): a camera tensor does not hold it")
    if isinstance(camera, Camera):
        return camera.size
    sizes = {one.size for one in camera}
    if len(sizes) != 1:
        raise ShapeError(f"cameras have the sizes {sorted(sizes)}, wanted one size, or size=(height, width)")
    return sizes.pop()


@functools.lru_cache(maxsize=32)
def _positions(count: int, stride: int) -> NDArray[np.float64]:
    """Centers of the cells along one side, pixels; not to be written into."""
    found: NDArray[np.float64] = np.arange(count, dtype=np.float64)
    found = found * stride + (stride - 1) / 2
    found.flags.writeable = False
    return found


def _row_depth(camera: Camera, count: int, stride: int, kind: Any) -> NDArray[Any]:
    """Ground depth of every row of a camera without roll."""
    height = camera.require_height()
    return _rows(height, camera.fy, camera.cy, camera.pitch, count, stride, kind).copy()


@functools.lru_cache(maxsize=64)
def _rows(
    height: float, fy: float, cy: float, pitch: float, count: int, stride: int, kind: Any
) -> NDArray[Any]:
    """What :func:`_row_depth` copies: the next image is often of the same camera."""
    level = cy + fy * math.tan(pitch)  # row of the horizon
    first = min(max(math.floor((level - (stride - 1) / 2) / stride) + 1, 0), count)
    depth = np.empty(count, kind)
    depth[:first] = math.inf
    scale = height * fy / math.cos(pitch)
    np.divide(scale, _positions(count, stride)[first:] - level, out=depth[first:], casting="same_kind")
    return depth


def _map_depth(camera: Camera, count: tuple[int, int], stride: int) -> NDArray[np.float64]:
    nx, ny, nz = camera.normal.tolist()
    along = (_positions(count[0], stride) - camera.cy) * (ny / camera.fy) + nz
    down = along[:, None] + (_positions(count[1], stride) - camera.cx) * (nx / camera.fx)
    above = down <= 0
    down[above] = 1.0
    np.divide(camera.require_height(), down, out=down)
    down[above] = math.inf
    return down


def horizon(camera: CameraLike, columns: Float[Tensor, " w"] | None = None) -> Float[Tensor, "..."]:
    """Row of the horizon (section 2.2).

    Args:
        camera: one camera, or (batch, 7).
        columns: (w,) where to look, pixels; None means the principal column, where roll makes no difference
            but a factor.

    Returns:
        Rows in pixels, (...) or (..., w), in double precision: ``cy + fy tan p / cos r - fy tan r (u -
        cx)/fx``.

    Example:
        >>> camera = Camera(fx=50, fy=50, cx=20, cy=10, width=40, height=24, camera_height=1.5, pitch_deg=-45)
        >>> round(float(horizon(camera)), 9)
        -40.0
    """
    numbers = camera_numbers(camera, columns)
    fx, fy, cx, cy = numbers[..., :4].unbind(-1)
    pitch, roll = numbers[..., 5], numbers[..., 6]
    # No tangent: onnxruntime has none in double precision.
    middle = cy + fy * pitch.sin() / (pitch.cos() * roll.cos())
    if columns is None:
        return middle
    slope = fy * roll.sin() / (roll.cos() * fx)
    return middle[..., None] - slope[..., None] * (columns.to(numbers.dtype) - cx[..., None])


def height_above_road(
    depth: Float[Tensor, "... h w"], camera: CameraLike, *, stride: int = 1, roll: bool = True
) -> Float[Tensor, "... h w"]:
    """Height of what every pixel shows above the level road, ``h - depth (n . r)``, metres.

    Args:
        depth: (h, w) of one camera or (batch, 1, h, w), metres.
        camera: one camera, or (batch, 7).
        stride: of the map's cells, full-resolution pixels.
        roll: False promises that roll is 0.

    Returns:
        Metres, in the shape of ``depth``; negative below the road.
    """
    numbers = camera_numbers(camera, depth)
    rows = pixel_centers(depth.shape[-2], stride, depth.device)
    columns = pixel_centers(depth.shape[-1], stride, depth.device) if roll else None
    down = down_component(numbers, rows, columns).to(_dtype(depth))
    return aligned(numbers[..., 4], depth.ndim if numbers.ndim > 1 else 0).to(down.dtype) - depth * down


def ground_embedding(
    camera: CameraLike,
    size: tuple[int, int],
    *,
    stride: int = 1,
    roll: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch 2 h w"]:
    """What the network is told of the camera: inverse ground depth and angle to the road (section 2.6).

    Args:
        camera: a tensor (batch, 7), or cameras.
        size: ``(height, width)`` of the (padded) image, pixels.
        stride: of the map's cells, pixels.
        roll: False promises that roll is 0.
        dtype: of the result.

    Returns:
        (batch, 2, height / stride, width / stride): ``8 clip(1 / ground depth, 0, 1)`` and the sine
        ``(n . r) / |r|`` of the angle under the horizon, in [-1, 1].
    """
    numbers = camera_numbers(camera)
    numbers = numbers[None] if numbers.ndim == 1 else numbers
    count = -(-size[0] // stride), -(-size[1] // stride)
    rows = pixel_centers(count[0], stride, numbers.device)
    columns = pixel_centers(count[1], stride, numbers.device)
    down = down_component(numbers, rows, columns if roll else None).to(dtype)
    fx, fy, cx, cy, camera_height = (aligned(numbers[..., i], 4) for i in range(5))
    across = ((columns - cx) / fx).to(dtype)
    along = ((rows[:, None] - cy) / fy).to(dtype)
    inverse = (down / camera_height.to(dtype)).clamp(0.0, 1.0) * _EMBEDDING_SCALE
    sine = down * torch.rsqrt(across * across + (along * along + 1.0))
    return torch.cat([inverse.expand_as(sine), sine], dim=1)


def ground_pyramid(
    embedding: Float[Tensor, "batch 2 h w"], strides: Sequence[int]
) -> list[Float[Tensor, "batch 2 _ _"]]:
    """The embedding area-resized to each level.

    Args:
        embedding: at full resolution; h and w divisible by every stride.
        strides: such as ``(2, 4, 8, 16, 32)``.

    Returns:
        One map per stride.

    Raises:
        ShapeError: a size that a stride does not divide.
    """
    height, width = embedding.shape[-2:]
    for stride in strides:
        if height % stride or width % stride:
            raise ShapeError(f"the embedding is {height}x{width}, wanted multiples of the stride {stride}")
    return [F.avg_pool2d(embedding, stride) if stride > 1 else embedding for stride in strides]

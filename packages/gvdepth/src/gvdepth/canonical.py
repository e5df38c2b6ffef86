"""The two canonical transforms: of the row of the ground projection (VCT) and of the focal length (FCT).

Rows are counted from the bottom, as in the paper: ``y = H - v``. ``depth = fy h / (n_y (y_horizon - y))``
with ``n_y = cos p cos r`` and the horizon of the pixel's column (section 2.2, Eq. 3 and 10).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gvdepth.geometry import CameraLike, aligned, camera_numbers, horizon, unit_normal

__all__ = ["fct", "fct_derivative", "fct_inverse", "row_scale", "vct", "vct_derivative", "vct_inverse"]

DEFAULT_FOCAL = 500.0


def row_scale(numbers: Float[Tensor, "... 7"]) -> Float[Tensor, "..."]:
    """``fy h / n_y``: depth in metres times rows below the horizon, the one number that VCT needs."""
    return numbers[..., 1] * numbers[..., 4] / unit_normal(numbers)[1]


def horizon_map(
    numbers: Float[Tensor, "... 7"], columns: Tensor | None, ndim: int
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Horizon rows and :func:`row_scale`, both shaped to broadcast to a map of ``ndim`` dimensions."""
    target = ndim if numbers.ndim > 1 else 0
    scale = aligned(row_scale(numbers), target)
    if columns is None:
        return aligned(horizon(numbers), target), scale
    rows = horizon(numbers, columns)  # (w,) or (batch, w)
    if rows.ndim > 1:
        rows = rows.reshape(rows.shape[0], *(1,) * (ndim - 2), rows.shape[-1])
    return rows, scale


def _compute(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _height(image_height: float | Tensor, ndim: int, like: Tensor) -> Any:
    if not isinstance(image_height, Tensor):
        return image_height
    return aligned(image_height.to(like), ndim)


def vct(
    y: Float[Tensor, "..."],
    camera: CameraLike,
    image_height: float | Tensor,
    *,
    columns: Float[Tensor, " w"] | None = None,
) -> Float[Tensor, "..."]:
    """Depth of the road point whose row, counted from the bottom, is ``y`` (Eq. 3, 10).

    Args:
        y: (...) or (batch, ..., w) rows from the bottom of the (virtually extended) image, pixels.
        camera: one camera, or (batch, 7).
        image_height: H of the image from whose bottom ``y`` is counted, pixels; per image where (batch,).
        columns: (w,) of the last dimension, for cameras with roll; None takes the principal column.

    Returns:
        Metres; infinite at the horizon and negative above it.

    Example:
        >>> from gvdepth.camera import Camera
        >>> camera = Camera(fx=50, fy=50, cx=20, cy=10, width=40, height=24, camera_height=1.5)
        >>> vct(torch.tensor([0.0, 9.0]), camera, 25).tolist()
        [5.0, 12.5]
    """
    numbers = camera_numbers(camera, y)
    rows, scale = horizon_map(numbers, columns, y.ndim)
    top = _height(image_height, y.ndim, rows) - rows
    dtype = _compute(y)
    return scale.to(dtype) / (top.to(dtype) - y.to(dtype))


def vct_inverse(
    depth: Float[Tensor, "..."],
    camera: CameraLike,
    image_height: float | Tensor,
    *,
    columns: Float[Tensor, " w"] | None = None,
) -> Float[Tensor, "..."]:
    """Row, counted from the bottom, where the road is ``depth`` metres deep: the inverse of :func:`vct`.

    Args:
        depth: (...) or (batch, ..., w) metres, not 0.
        camera: one camera, or (batch, 7).
        image_height: as in :func:`vct`.
        columns: as in :func:`vct`.

    Returns:
        Pixels; negative for points so close that their ground projection lies below the image.
    """
    numbers = camera_numbers(camera, depth)
    rows, scale = horizon_map(numbers, columns, depth.ndim)
    top = _height(image_height, depth.ndim, rows) - rows
    dtype = _compute(depth)
    return top.to(dtype) - scale.to(dtype) / depth.to(dtype)


def vct_derivative(depth: Float[Tensor, "..."], camera: CameraLike) -> Float[Tensor, "..."]:
    """How many metres one row is worth at a depth, ``d^2 n_y / (fy h)``.

    Example:
        >>> from gvdepth.camera import Camera
        >>> camera = Camera(fx=372, fy=372, cx=320, cy=90, width=640, height=192, camera_height=1.65)
        >>> round(float(vct_derivative(torch.tensor(80.0), camera)), 1)
        10.4
    """
    numbers = camera_numbers(camera, depth)
    scale = aligned(row_scale(numbers), depth.ndim if numbers.ndim > 1 else 0)
    wide = depth.to(_compute(depth))
    return wide * wide / scale.to(wide.dtype)


def fct_derivative(camera: CameraLike, *, f_c: float = DEFAULT_FOCAL) -> Float[Tensor, "..."]:
    """Metres of depth per metre of canonical depth, ``fy / f_c``, in double precision, (...)."""
    return camera_numbers(camera)[..., 1] / f_c


def fct(
    canonical: Float[Tensor, "..."], camera: CameraLike, *, f_c: float = DEFAULT_FOCAL
) -> Float[Tensor, "..."]:
    """Depth from the depth that a camera of the canonical focal length would have, ``fy / f_c canonical``.

    Args:
        canonical: (batch, ...) metres at the canonical focal length.
        camera: one camera, or (batch, 7); only ``fy`` is used.
        f_c: canonical focal length, pixels.

    Returns:
        Metres (section 3.2 of the paper).
    """
    wide = canonical.to(_compute(canonical))
    return wide * _focal_ratio(camera, canonical, f_c)


def fct_inverse(
    depth: Float[Tensor, "..."], camera: CameraLike, *, f_c: float = DEFAULT_FOCAL
) -> Float[Tensor, "..."]:
    """The inverse of :func:`fct`: canonical depth of a depth in metres."""
    wide = depth.to(_compute(depth))
    return wide / _focal_ratio(camera, depth, f_c)


def _focal_ratio(camera: CameraLike, like: Tensor, f_c: float) -> Tensor:
    numbers = camera_numbers(camera, like)
    return aligned(numbers[..., 1] / f_c, like.ndim if numbers.ndim > 1 else 0).to(_compute(like))

"""What the vertical head's numbers mean: three ways from a network output to depth (section 2.3).

With the row ``v`` of a pixel's ground projection and ``x = d_max n_y (v - horizon) / (fy h)`` the depth is
``d_max / x``. The three forms differ in how the network's output gives that row; none of them may lose the
camera on the way (the "trap" of section 2.3: tie the lowest row to a fixed depth, and the camera cancels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import ConfigError
from gvdepth.camera import Camera
from gvdepth.canonical import horizon_map
from gvdepth.errors import GeometryError
from gvdepth.geometry import (
    CameraLike,
    aligned,
    camera_numbers,
    horizon,
    pixel_centers,
    unit_normal,
)

__all__ = [
    "VERTICAL",
    "Bounded",
    "Offset",
    "Row",
    "VerticalHead",
    "VerticalParam",
    "bounded_depth",
    "check_ground",
    "focal_canonical",
    "offset_depth",
    "row_depth",
    "row_offset",
    "sees_ground",
    "soft_bound",
    "softplus",
    "vertical_head",
    "y_max",
]

VerticalParam = Literal["bounded", "row", "offset"]
_LEAST_ROWS = 16.0


def softplus(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``log(1 + exp(x))`` without overflow and without a threshold."""
    # Written out: exporters turn logsigmoid and logaddexp into forms that overflow. The maximum of equals has
    # gradient 1/2, so that the derivative at 0 is right too.
    return torch.maximum(x, torch.zeros_like(x)) + torch.log1p(torch.exp(-x.abs()))


def soft_bound(
    x: Float[Tensor, "..."], max_depth: float = 80.0, softness: float = 8.0
) -> Float[Tensor, "..."]:
    """Depth of ``x = max_depth / depth``, bent below ``max_depth``: positive, with a gradient everywhere.

    Args:
        x: max_depth over the raw depth; at most 0 above the horizon.
        max_depth: bound, metres.
        softness: k; larger is closer to a hard bound.

    Returns:
        ``max_depth / (1 + softplus(k (x - 1)) / k)``, metres in (0, max_depth].

    Example:
        >>> soft_bound(torch.tensor([4.0, 1.0, -9.0]))
        tensor([20.0000, 73.6212, 80.0000])
    """
    return max_depth / (1.0 + softplus(softness * (x - 1.0)) / softness)


def focal_canonical(
    z: Float[Tensor, "..."], focal_range: tuple[float, float] = (0.5, 300.0)
) -> Float[Tensor, "..."]:
    """Canonical depth of the focal head's output, ``c_min (c_max / c_min)^sigmoid(z)``, metres."""
    low, high = focal_range
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return low * torch.pow(torch.full((), high / low, dtype=wide.dtype, device=z.device), wide.sigmoid())


def row_offset(
    z: Float[Tensor, "..."], image_height: float | Tensor, offset_scale: float = 0.125
) -> Float[Tensor, "..."]:
    """Rows from a pixel down to its ground projection, ``offset_scale H softplus(z)`` >= 0; 0 on the road."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return softplus(wide) * (_per_image(image_height, wide) * offset_scale)


def _per_image(value: float | Tensor, like: Tensor) -> Any:
    return aligned(value.to(like), like.ndim) if isinstance(value, Tensor) else value


def y_max(
    camera: CameraLike,
    image_height: float | Tensor,
    *,
    extend: float = 0.5,
    max_depth: float = 80.0,
    columns: Float[Tensor, " w"] | None = None,
    ndim: int = 0,
) -> Float[Tensor, "..."]:
    """The row, from the bottom of the extended image, where the road is ``max_depth`` metres deep.

    Where the extended image still lies above that row it is extended further, until the row is the 16th.

    Args:
        camera: one camera, or (batch, 7).
        image_height: H of the image, pixels.
        extend: rho; the virtual image is (1 + rho) H high.
        max_depth: metres.
        columns: (w,), for cameras with roll.
        ndim: dimensions of the map that the result shall broadcast to.

    Returns:
        Pixels, in double precision.
    """
    numbers = camera_numbers(camera, columns)
    rows, scale = horizon_map(numbers, columns, ndim)
    found = _per_image(image_height, rows) * (1.0 + extend) - rows - scale / max_depth
    return torch.where(found > 0, found, torch.full_like(found, _LEAST_ROWS))


def bounded_depth(
    z: Float[Tensor, "..."],
    camera: CameraLike,
    image_height: float | Tensor,
    *,
    columns: Float[Tensor, " w"] | None = None,
    extend: float = 0.5,
    max_depth: float = 80.0,
) -> Float[Tensor, "..."]:
    """The paper's form: ``y = y_max sigmoid(z)``, then VCT (appendix H).

    Args:
        z: network output, (...) of one camera or (batch, ..., w).
        camera: one camera, or (batch, 7).
        image_height: H of the image, pixels; per image where (batch,).
        columns: (w,) full-resolution columns of the last dimension, for cameras with roll.
        extend: rho; the virtual image is (1 + rho) H high.
        max_depth: metres.

    Returns:
        Metres in (0, max_depth], in float32 or wider.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    numbers = camera_numbers(camera, z)
    scale = horizon_map(numbers, None, z.ndim)[1]
    highest = y_max(numbers, image_height, extend=extend, max_depth=max_depth, columns=columns, ndim=z.ndim)
    # 1/D is affine in sigmoid(-z); the horizon, where digits would be lost, has cancelled.
    return 1.0 / (1.0 / max_depth + (highest / scale).to(dtype) * (-z.to(dtype)).sigmoid())


def row_depth(
    z: Float[Tensor, "..."],
    camera: CameraLike,
    image_height: float | Tensor,
    *,
    columns: Float[Tensor, " w"] | None = None,
    extend: float = 0.5,
    max_depth: float = 80.0,
    softness: float = 8.0,
) -> Float[Tensor, "..."]:
    """The form whose map from ``z`` to rows is every camera's: ``y = (1 + rho) H sigmoid(z)``.

    Arguments as of :func:`bounded_depth`; ``softness`` as of :func:`soft_bound`.

    Returns:
        Metres in (0, max_depth], in float32 or wider.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    numbers = camera_numbers(camera, z)
    rows, scale = horizon_map(numbers, columns, z.ndim)
    factor = max_depth / scale
    whole = _per_image(image_height, rows if rows.ndim else scale) * (1.0 + extend)
    x = (factor * whole).to(dtype) * (-z.to(dtype)).sigmoid() - (factor * rows).to(dtype)
    return soft_bound(x, max_depth, softness)


def offset_depth(
    z: Float[Tensor, "... h w"],
    camera: CameraLike,
    image_height: float | Tensor,
    *,
    rows: Float[Tensor, " h"],
    columns: Float[Tensor, " w"] | None = None,
    max_depth: float = 80.0,
    softness: float = 8.0,
    offset_scale: float = 0.125,
) -> Float[Tensor, "... h w"]:
    """The form relative to the pixel: ``row_offset(z)`` rows below it lies its ground projection.

    Args:
        z: network output, (h, w) of one camera or (batch, ..., h, w).
        camera: one camera, or (batch, 7).
        image_height: H of the image, pixels; per image where (batch,).
        rows: (h,) full-resolution rows of the map.
        columns: (w,) full-resolution columns, for cameras with roll.
        max_depth: metres.
        softness: as of :func:`soft_bound`.
        offset_scale: share of H that ``softplus(z) = 1`` stands for.

    Returns:
        Metres in (0, max_depth], in float32 or wider; decreasing in ``z``.
    """
    numbers = camera_numbers(camera, z)
    horizons, scale = horizon_map(numbers, columns, z.ndim)
    offset = row_offset(z, image_height, offset_scale)
    factor = max_depth / scale
    level = factor * (rows.to(numbers.dtype)[:, None] - horizons)
    return soft_bound(level.to(offset.dtype) + factor.to(offset.dtype) * offset, max_depth, softness)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # see VERTICAL
class Bounded:
    """:func:`bounded_depth` with its settings; see :func:`vertical_head`."""

    extend: float = 0.5
    max_depth: float = 80.0

    def __call__(
        self,
        z: Tensor,
        camera: CameraLike,
        image_height: float | Tensor,
        *,
        stride: int = 2,
        roll: bool = True,
    ) -> Tensor:
        """Depth, metres, of a map (batch, 1, h, w) whose cells are ``stride`` full-resolution pixels."""
        columns = pixel_centers(z.shape[-1], stride, z.device) if roll else None
        settings = {"extend": self.extend, "max_depth": self.max_depth}
        return bounded_depth(z, camera, image_height, columns=columns, **settings)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # see VERTICAL
class Row:
    """:func:`row_depth` with its settings; see :func:`vertical_head`."""

    extend: float = 0.5
    max_depth: float = 80.0
    softness: float = 8.0

    def __call__(
        self,
        z: Tensor,
        camera: CameraLike,
        image_height: float | Tensor,
        *,
        stride: int = 2,
        roll: bool = True,
    ) -> Tensor:
        """Depth, metres, of a map (batch, 1, h, w) whose cells are ``stride`` full-resolution pixels."""
        columns = pixel_centers(z.shape[-1], stride, z.device) if roll else None
        settings = {"extend": self.extend, "max_depth": self.max_depth, "softness": self.softness}
        return row_depth(z, camera, image_height, columns=columns, **settings)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # see VERTICAL
class Offset:
    """:func:`offset_depth` with its settings; see :func:`vertical_head`."""

    max_depth: float = 80.0
    softness: float = 8.0
    offset_scale: float = 0.125

    def __call__(
        self,
        z: Tensor,
        camera: CameraLike,
        image_height: float | Tensor,
        *,
        stride: int = 2,
        roll: bool = True,
    ) -> Tensor:
        """Depth, metres, of a map (batch, 1, h, w) whose cells are ``stride`` full-resolution pixels."""
        rows = pixel_centers(z.shape[-2], stride, z.device)
        columns = pixel_centers(z.shape[-1], stride, z.device) if roll else None
        return offset_depth(
            z,
            camera,
            image_height,
            rows=rows,
            columns=columns,
            max_depth=self.max_depth,
            softness=self.softness,
            offset_scale=self.offset_scale,
        )

    def gamma(
        self, z: Float[Tensor, "..."], camera: CameraLike, image_height: float | Tensor
    ) -> Float[Tensor, "..."]:
        """(Height above the road) / depth before the bound, ``offset n_y / fy``."""
        offset = row_offset(z, image_height, self.offset_scale)
        numbers = camera_numbers(camera, z)
        slope = aligned(unit_normal(numbers)[1] / numbers[..., 1], z.ndim if numbers.ndim > 1 else 0)
        return offset * slope.to(offset.dtype)


VerticalHead = Bounded | Row | Offset
# Without eq: PyTorch 2.8 compiles a head by its hash, which that of its fields is not ready for.
VERTICAL: dict[str, Callable[..., VerticalHead]] = {"bounded": Bounded, "row": Row, "offset": Offset}


def vertical_head(name: VerticalParam = "offset", **settings: float) -> VerticalHead:
    """The vertical parametrization of a name.

    Args:
        name: ``"offset"`` (default), ``"bounded"`` (the paper's) or ``"row"``.
        **settings: fields of its class: ``max_depth``, ``extend``, ``softness``, ``offset_scale``.

    Returns:
        ``head(z, camera, image_height, stride=2, roll=True) -> depth``.

    Raises:
        ConfigError: unknown name or setting.

    Example:
        >>> vertical_head("bounded", extend=0.25)
        Bounded(extend=0.25, max_depth=80.0)
    """
    if name not in VERTICAL:
        raise ConfigError(f"vertical_param is {name!r}, wanted one of {', '.join(VERTICAL)}")
    try:
        return VERTICAL[name](**settings)
    except TypeError as error:
        raise ConfigError(f"vertical_param {name!r} takes no such setting: {error}") from error


def sees_ground(camera: Camera, *, extend: float = 0.0) -> bool:
    """Whether any ray of the (virtually extended) image goes down."""
    ends = torch.tensor([0.0, camera.width - 1.0], dtype=torch.float64)
    return bool((horizon(camera, ends) < (1.0 + extend) * camera.height - 1).any())


def check_ground(camera: Camera) -> None:
    """Raise where the vertical cue has nothing to stand on.

    Raises:
        GeometryError: the whole image lies above the horizon.
    """
    if not sees_ground(camera):
        raise GeometryError(
            f"the whole image of {camera.height} rows lies above the horizon (row "
            f"{float(horizon(camera)):.1f}): no road is in view. Check cy and pitch_deg "
            f"({camera.pitch_deg:g}; > 0 looks up), or use cue='focal'"
        )

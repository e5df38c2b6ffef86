"""What errors of canonical depths, rows and camera numbers mean in metres, to first order (section 2.4)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gvdepth.canonical import DEFAULT_FOCAL, row_scale
from gvdepth.fusion import log_sum
from gvdepth.geometry import CameraLike, aligned, camera_numbers

__all__ = ["calibration_std", "inflate", "propagate"]

Std = float | Tensor
_LEAST_STD = 1e-12  # metres


def propagate(
    depth: Float[Tensor, "..."],
    camera: CameraLike,
    *,
    canonical_std: Std | None = None,
    row_std: Std | None = None,
    height_std: Std | None = None,
    pitch_std_deg: Std | None = None,
    f_c: float = DEFAULT_FOCAL,
) -> Float[Tensor, "..."]:
    """Standard deviation of a depth from independent errors of what it was computed from, in quadrature.

    Args:
        depth: (batch, ...) or (...) metres.
        camera: one camera, or (batch, 7).
        canonical_std: of the canonical depth, metres: ``fy / f_c`` times it.
        row_std: of the row of the ground projection, pixels: ``d^2 n_y / (fy h)`` times it.
        height_std: of the camera's height, metres: ``d / h`` times it.
        pitch_std_deg: of the pitch, degrees: ``d^2 / h |((v_g - cy)/fy) sin p + cos p|`` times it, with the
            row v_g of the ground projection; exact under roll too.
        f_c: canonical focal length, pixels.

    Returns:
        Metres, in the shape of ``depth``; 0 where no error is given.

    Example:
        >>> from gvdepth.camera import Camera
        >>> camera = Camera(fx=720, fy=720, cx=620, cy=180, width=1240, height=370, camera_height=1.6)
        >>> depth = torch.tensor([10.0, 40.0])
        >>> propagate(depth, camera, height_std=0.02, pitch_std_deg=0.1)
        tensor([0.1659, 1.8155])
    """
    wide = depth.to(torch.promote_types(depth.dtype, torch.float32))
    numbers = camera_numbers(camera, depth)
    ndim = depth.ndim if numbers.ndim > 1 else 0

    def number(value: Tensor) -> Tensor:
        return aligned(value, ndim).to(wide.dtype)

    height, pitch = number(numbers[..., 4]), numbers[..., 5]
    square = torch.zeros_like(wide)
    if canonical_std is not None:
        square = square + (number(numbers[..., 1] / f_c) * canonical_std) ** 2
    if row_std is not None:
        square = square + (wide * wide / number(row_scale(numbers)) * row_std) ** 2
    if height_std is not None:
        square = square + (wide / height * height_std) ** 2
    if pitch_std_deg is not None:
        # sin r x + cos r y of the ground projection follows from its depth: no row, no column is needed.
        slope = (height / wide + number(pitch.sin())) * number(pitch.tan()) + number(pitch.cos())
        square = square + (wide * wide / height * slope * (pitch_std_deg * (math.pi / 180.0))) ** 2
    some = square > 0
    return torch.where(some, torch.where(some, square, torch.ones_like(square)).sqrt(), square)


def calibration_std(
    depth: Float[Tensor, "..."], camera: CameraLike, calib_std: tuple[float, float]
) -> Float[Tensor, "..."]:
    """Standard deviation in metres from ``calib_std = (camera height in m, pitch in degrees)``."""
    return propagate(depth, camera, height_std=calib_std[0], pitch_std_deg=calib_std[1])


def inflate(log_uncertainty: Float[Tensor, "..."], std: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Add an independent error to a Laplace scale b: ``log sqrt(b^2 + std^2 / 2)``.

    Args:
        log_uncertainty: log of the Laplace scale, metres.
        std: standard deviation of the further error, metres, >= 0.

    Returns:
        Log of the inflated scale.

    Example:
        >>> inflate(torch.tensor(0.0), torch.tensor(2.0 ** 0.5)).exp().round(decimals=4)
        tensor(1.4142)
    """
    # A floor instead of log(0): the gradient at std 0 is 0, not NaN.
    added = 2.0 * std.clamp(min=_LEAST_STD).log() - math.log(2.0)
    return 0.5 * log_sum(2.0 * log_uncertainty, added)

"""Flux scaling of pixels and asinh magnitudes (section 2.2), elementwise on arrays or tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusion_core.errors import check_range
from mantis_photoz.arrays import Array, either_kind
from mantis_photoz.surveys import Scaling

__all__ = [
    "asinh_inverse",
    "asinh_magnitude",
    "asinh_magnitude_error",
    "asinh_scale",
    "clip_scale",
    "linear_stack",
    "scale_pixels",
]

_POGSON = 2.5 / math.log(10)
_LINEAR_ABOVE = 1e8  # asinh(x) = ln(2x) to double precision, and no x squared that overflows


def _asinh(x: Tensor) -> Tensor:
    large = x.abs() > _LINEAR_ABOVE
    small = torch.asinh(x.masked_fill(large, 0.0))
    tail = x.sign() * (x.abs().masked_fill(~large, 1.0).log() + math.log(2))
    return torch.where(large, tail, small)


def clip_scale(pixels: Array, *, scale: float = 0.05, signed: bool = False) -> Any:
    """GALEX: ``clip(a / scale, 0, 1)``.

    Args:
        pixels: (...) fluxes.
        scale: flux that becomes 1, > 0.
        signed: keep negative (noise) pixels, down to -1.

    Returns:
        (...) in [0, 1], the same kind.

    Example:
        >>> clip_scale(torch.tensor([-1.0, 0.025, 1.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    check_range("scale", scale, 0.0, math.inf, open=True)
    return either_kind(lambda a: (a / scale).clamp(-1.0 if signed else 0.0, 1.0))(pixels)


def asinh_scale(
    pixels: Array, *, alpha: float = 0.1, q: float = 6.0, m: float = 0.0, signed: bool = False
) -> Any:
    """PS1 and unWISE: ``T(a) = asinh(alpha q (a - m)) / q``, values below ``m`` set to ``m``.

    Args:
        pixels: (...) fluxes.
        alpha: slope at ``m``, > 0 (0.01 for PS1, 0.1 for unWISE).
        q: softening, > 0 (8 for PS1, 6 for unWISE).
        m: zero point, and the floor.
        signed: no floor: stacking of faint pixels stays unbiased (not for official weights).

    Returns:
        (...) finite for any finite input, the same kind.

    Example:
        >>> asinh_scale(torch.tensor([-1.0, 0.0, 1e30])).isfinite().all()
        tensor(True)
    """
    check_range("alpha", alpha, 0.0, math.inf, open=True)
    check_range("q", q, 0.0, math.inf, open=True)

    def scaled(a: Tensor) -> Tensor:
        found = _asinh(alpha * q * (a - m)) / q
        return found if signed else found.clamp(min=m)

    return either_kind(scaled)(pixels)


def asinh_inverse(scaled: Array, *, alpha: float = 0.1, q: float = 6.0, m: float = 0.0) -> Any:
    """The inverse of :func:`asinh_scale` above its floor: ``m + sinh(q t) / (alpha q)``.

    Example:
        >>> round(asinh_inverse(asinh_scale(torch.tensor(7.0, dtype=torch.float64))).item(), 9)
        7.0
    """
    check_range("alpha", alpha, 0.0, math.inf, open=True)
    check_range("q", q, 0.0, math.inf, open=True)
    return either_kind(lambda t: (q * t).sinh() / (alpha * q) + m)(scaled)


def scale_pixels(pixels: Array, scaling: Scaling, *, signed: bool = False) -> Any:
    """Scale the planes of one survey by its :class:`~mantis_photoz.surveys.Scaling`."""
    if scaling.kind == "clip":
        return clip_scale(pixels, scale=scaling.scale, signed=signed)
    return asinh_scale(pixels, alpha=scaling.alpha, q=scaling.q, m=scaling.m, signed=signed)


def linear_stack(stored: Array, *, softening: float, offset: float) -> Any:
    """Linear flux of an asinh-compressed PS1 stack: ``BOFFSET + 2 BSOFTEN sinh(v ln(10) / 2.5)``.

    Args:
        stored: (...) pixels as the file has them.
        softening: the header's ``BSOFTEN``.
        offset: the header's ``BOFFSET``.
    """
    return either_kind(lambda v: offset + 2 * softening * (v / _POGSON).sinh())(stored)


def asinh_magnitude(flux: Array, *, softening: Any, zero_flux: float = 3.631e9) -> Any:
    """Asinh magnitude (Lupton et al. 1999): ``-(2.5/ln 10)[asinh((f/f0)/(2B)) + ln B]``.

    Args:
        flux: (..., bands), any sign.
        softening: B, a number or (bands,), > 0: where linear turns to logarithmic, in ``zero_flux``.
        zero_flux: f0, the flux of magnitude 0.

    Returns:
        (..., bands) magnitudes, the same kind.

    Example:
        >>> round(asinh_magnitude(torch.tensor(3.631e8, dtype=torch.float64), softening=1e-10).item(), 9)
        2.5
    """

    def found(f: Tensor) -> Tensor:
        soft = _soft(softening, f)
        return -_POGSON * (_asinh(f / zero_flux / (2 * soft)) + soft.log())

    return either_kind(found)(flux)


def asinh_magnitude_error(flux: Array, error: Array, *, softening: Any, zero_flux: float = 3.631e9) -> Any:
    """One-sigma error of :func:`asinh_magnitude`.

    Args:
        flux: (..., bands).
        error: one-sigma flux errors, broadcast to ``flux``.
        softening: B.
        zero_flux: f0.
    """

    def found(f: Tensor, sigma: Tensor) -> Tensor:
        twice = 2 * _soft(softening, f)
        return _POGSON * (sigma / zero_flux / twice) / (1 + (f / zero_flux / twice) ** 2).sqrt()

    return either_kind(found)(flux, error)


def _soft(softening: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(softening, dtype=like.dtype, device=like.device)

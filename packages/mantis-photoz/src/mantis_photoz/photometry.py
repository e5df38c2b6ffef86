"""Fluxes of the source in the middle and the 83 features of the authors' recalibration (section 2.8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import require_extra
from mantis_photoz.arrays import Array, either_kind, wide
from mantis_photoz.errors import DataError, ShapeError
from mantis_photoz.scaling import asinh_scale

__all__ = ["Photometry", "color_features", "luptitudes", "measure_batch", "measure_plane", "measure_planes"]

_THRESHOLD, _NEAR, _KRON_RANGE, _KRON_RADII, _FORCED_RADIUS = 2.0, 5.0, 6.0, 2.5, 4.0


@dataclass(frozen=True, slots=True)
class Photometry:
    """Fluxes and whether each is a forced one (no source at the centre).

    Args:
        flux: (..., bands).
        forced: (..., bands) True where a circle of 4 px was summed instead of a Kron ellipse (B15).
    """

    flux: NDArray[np.float64]
    forced: NDArray[np.bool_]


def measure_plane(plane: NDArray[Any]) -> tuple[float, bool]:
    """Flux of the source nearest to pixel (N // 2, N // 2), with SEP (extra ``phot``).

    The background is subtracted; sources are extracted above twice its global RMS. One within 5 px gets its
    Kron flux: 2.5 Kron radii, themselves measured within 6. Else the flux in a circle of 4 px is forced.

    Args:
        plane: (height, width), finite.

    Returns:
        the flux, and whether it was forced; (0, True) of an all-zero plane.

    Raises:
        MissingExtraError: SEP is not installed.
        DataError: the plane is no image or holds NaN.
    """
    sep = require_extra("sep", "phot", "mantis-photoz")
    data = np.ascontiguousarray(plane, dtype=np.float64)
    if data.ndim != 2 or not np.isfinite(data).all():
        raise DataError(f"plane has shape {data.shape}, wanted a finite (height, width)")
    if not data.any():
        return 0.0, True
    background = sep.Background(data)
    data = data - background.back()
    y0, x0 = data.shape[0] // 2, data.shape[1] // 2
    flux = _kron_flux(sep, data, float(background.globalrms), x0, y0)
    if flux is not None and np.isfinite(flux):
        return flux, False
    total, _, _ = sep.sum_circle(data, [x0], [y0], _FORCED_RADIUS)
    return float(total[0]), True


def _kron_flux(sep: Any, data: NDArray[np.float64], rms: float, x0: int, y0: int) -> float | None:
    try:
        found = sep.extract(data, _THRESHOLD, err=rms)
        if not len(found):
            return None
        away = np.hypot(found["x"] - x0, found["y"] - y0)
        if away.min() > _NEAR:
            return None
        one = found[[int(away.argmin())]]
        shape = (one["a"], one["b"], one["theta"])
        radius, _ = sep.kron_radius(data, one["x"], one["y"], *shape, _KRON_RANGE)
        flux, _, _ = sep.sum_ellipse(data, one["x"], one["y"], *shape, _KRON_RADII * radius)
    except Exception as error:
        # SEP raises plain Exceptions of its C code (too many pixels, an ellipse that is none).
        if type(error) is not Exception and not isinstance(error, ValueError):
            raise
        return None
    return float(flux[0])


def measure_planes(planes: NDArray[Any]) -> Photometry:
    """Fluxes of (bands, height, width)."""
    measured = [measure_plane(plane) for plane in planes]
    return Photometry(np.array([f for f, _ in measured]), np.array([forced for _, forced in measured]))


def measure_batch(surveys: Mapping[str, Array]) -> Photometry:
    """Fluxes of a batch of cutouts, (batch, all bands) in the order of the surveys.

    Args:
        surveys: name -> (batch, bands, height, width) fluxes, not scaled.
    """
    arrays = {name: np.asarray(planes) for name, planes in surveys.items()}
    shapes = {name: planes.shape for name, planes in arrays.items()}
    if not shapes or any(len(s) != 4 for s in shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
        raise ShapeError(f"surveys have shapes {shapes}, wanted (batch, bands, height, width) of one batch")
    parts = [[measure_planes(planes) for planes in batch] for batch in arrays.values()]
    rows = [
        Photometry(np.concatenate([p.flux for p in row]), np.concatenate([p.forced for p in row]))
        for row in zip(*parts, strict=True)
    ]
    bands = sum(shape[1] for shape in shapes.values())
    flux = np.array([row.flux for row in rows]).reshape(-1, bands)
    return Photometry(flux, np.array([row.forced for row in rows], dtype=bool).reshape(-1, bands))


def luptitudes(flux: Array) -> Any:
    """``asinh(0.6 f) / 6`` of fluxes of any sign: the authors' scaling, without its floor."""
    return asinh_scale(flux, signed=True)


def color_features(luptitude: Array, ebv: Array) -> Any:
    """The features of the recalibration: all ordered differences, then E(B-V), then the luptitudes.

    Args:
        luptitude: (..., bands).
        ebv: (..., 2) E(B-V) of CSFD and Planck.

    Returns:
        (..., bands (bands - 1) + 2 + bands): 83 for nine bands. Differences are l_i - l_j, i over j, i != j.

    Example:
        >>> color_features(np.array([1.0, 3.0]), np.array([0.1, 0.2])).tolist()
        [-2.0, 2.0, 0.1, 0.2, 1.0, 3.0]
    """

    def found(values: Tensor, dust: Tensor) -> Tensor:
        values, dust = wide(values), wide(dust)
        if dust.shape[:-1] != values.shape[:-1]:
            raise ShapeError(f"ebv has shape {tuple(dust.shape)}, wanted that of luptitude and 2 at the end")
        bands = values.shape[-1]
        other = ~torch.eye(bands, dtype=torch.bool, device=values.device)
        pairs = values[..., :, None] - values[..., None, :]
        return torch.cat([pairs[..., other], dust, values], dim=-1)

    return either_kind(found)(luptitude, ebv)


def magnitude_features(flux: Array, ebv: Sequence[float] | Array) -> Any:
    """:func:`color_features` of fluxes."""
    return color_features(luptitudes(flux), ebv)  # pyright: ignore[reportArgumentType]

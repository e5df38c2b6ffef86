"""What to do with pixels that are not numbers (sections 2.2, B8, B21)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import check_range, require_extra
from mantis_photoz.errors import ConfigError, CutoutError

__all__ = ["NanPolicy", "clean_planes", "inpaint", "nan_fraction"]

NanPolicy = Literal["inpaint", "zero", "official", "error"]


def nan_fraction(planes: NDArray[Any]) -> NDArray[np.float64]:
    """(..., bands) share of pixels of each plane that are NaN or infinite.

    Example:
        >>> nan_fraction(np.array([[[1.0, np.nan]], [[1.0, 2.0]]]))
        array([0.5, 0. ])
    """
    return (~np.isfinite(planes)).mean(axis=(-2, -1))


def inpaint(planes: NDArray[Any], *, radius: float = 3.0, official: bool = False) -> NDArray[np.float32]:
    """Fill NaN pixels by Telea's method, plane by plane (OpenCV, extra ``inpaint``).

    Args:
        planes: (bands, height, width).
        radius: in pixels.
        official: give OpenCV the image with its NaN, as the authors do: they spread, most survive (B21). By
            default they are 0 first: the result is finite, and the same where the authors' is finite.

    Returns:
        float32 planes; known pixels are unchanged. A plane without a known pixel is 0.

    Raises:
        MissingExtraError: OpenCV is not installed.
        CutoutError: not (bands, height, width).
    """
    if planes.ndim != 3:
        raise CutoutError(f"planes have shape {planes.shape}, wanted (bands, height, width)")
    check_range("radius", radius, 0.0, 100.0, open=True)
    found = planes.astype(np.float32)
    found[np.isinf(found)] = np.nan
    bad = np.isnan(found)
    if not bad.any():
        return found
    cv2 = require_extra("cv2", "inpaint", "mantis-photoz")
    for plane, mask in zip(found, bad, strict=True):
        if not mask.any():
            continue
        if mask.all() and not official:
            plane[:] = 0.0
            continue
        known = plane if official else np.where(mask, np.float32(0), plane)
        filled = cv2.inpaint(known, mask.astype(np.uint8), radius, cv2.INPAINT_TELEA)
        plane[mask] = filled[mask]
    return found


def clean_planes(
    planes: NDArray[Any], *, nan: NanPolicy = "inpaint", limit: float = 0.01
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
    """Replace what is not finite and say how much it was.

    Args:
        planes: (bands, height, width).
        nan: ``"inpaint"`` (zeros if OpenCV fills nothing), ``"zero"`` (the authors' training), ``"official"``
            (the authors' inference: what survives OpenCV is set to 0), ``"error"`` (GALEX, unWISE there).
        limit: share of bad pixels above which a plane is reported; the authors' test never is true (B8).

    Returns:
        float32 planes without NaN, the share of bad pixels per band, and which bands are above the limit.

    Raises:
        CutoutError: ``nan`` is ``"error"`` and a pixel is not finite.
        ConfigError: an unknown policy.

    Example:
        >>> planes, share, flagged = clean_planes(np.array([[[1.0, np.nan]]]), nan="zero")
        >>> planes.tolist(), share.tolist(), flagged.tolist()
        ([[[1.0, 0.0]]], [0.5], [True])
    """
    check_range("limit", limit, 0.0, 1.0)
    share = nan_fraction(planes)
    if nan == "error" and share.any():
        raise CutoutError(f"planes {np.flatnonzero(share).tolist()} hold NaN; take nan='zero' or 'inpaint'")
    if nan in ("inpaint", "official"):
        found = inpaint(planes, official=nan == "official")
    elif nan in ("zero", "error"):
        found = planes.astype(np.float32)
    else:
        raise ConfigError(f"nan is {nan!r}, wanted 'inpaint', 'zero', 'official' or 'error'")
    return np.where(np.isfinite(found), found, np.float32(0)), share, share > limit

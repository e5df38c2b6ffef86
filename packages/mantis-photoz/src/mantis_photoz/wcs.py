"""Sky geometry of cutouts: gnomonic (TAN) coordinates, and resampling of one survey onto another's grid.

The map between the pixels of two TAN cutouts of one place is affine to a small part of a pixel, so that a
whole batch is resampled by one ``grid_sample``; where it is not (more than :data:`AFFINE_LIMIT` pixels off),
the coordinates of every pixel are computed instead. All positions are float64; pixel coordinates are
0-based, (x, y), with whole numbers at pixel centers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import InputError, check_range, check_shape, require_extra
from mantis_photoz.errors import CutoutError

AFFINE_LIMIT = 0.02
"""Pixels of the source that an affine map may be off before exact coordinates are used."""

_DEGREE = math.pi / 180.0
_EDGE = 1.0 + 1e-6
_FWHM = 2.0 * math.sqrt(2.0 * math.log(2.0))


@dataclass(frozen=True, slots=True)
class Tan:
    """A gnomonic world coordinate system.

    Args:
        crval: right ascension and declination of the reference point, degrees.
        crpix: its pixel, 1-based as in FITS.
        cd: degrees per pixel, ``(CD1_1, CD1_2, CD2_1, CD2_2)``.

    Example:
        >>> tan = Tan.centered(150.0, 2.0, pixels=120, scale=0.25)
        >>> round(tan.scale, 6), tan.parity, tan.to_pixel(150.0, 2.0)
        (0.25, -1, (59.5, 59.5))
    """

    crval: tuple[float, float]
    crpix: tuple[float, float]
    cd: tuple[float, float, float, float]

    @classmethod
    def centered(cls, ra: float, dec: float, *, pixels: int, scale: float, rotation: float = 0.0) -> Tan:
        """North up, east left, the position in the middle.

        Args:
            ra: degrees.
            dec: degrees.
            pixels: width and height.
            scale: arc seconds per pixel.
            rotation: degrees; ``cd = [[-cos, sin], [sin, cos]] scale``.
        """
        angle, step = rotation * _DEGREE, scale / 3600.0
        cd = (-math.cos(angle) * step, math.sin(angle) * step, math.sin(angle) * step, math.cos(angle) * step)
        return cls((float(ra), float(dec)), ((pixels + 1) / 2, (pixels + 1) / 2), cd)

    @classmethod
    def from_header(cls, header: Mapping[str, Any], shape: Sequence[int], name: str = "header") -> Tan | None:
        """The coordinates that a FITS header gives; another projection is replaced by its local TAN.

        Args:
            header: name -> value.
            shape: (..., height, width) of the image.
            name: of the file, for messages.

        Returns:
            None where the header has no celestial coordinates.

        Raises:
            CutoutError: coordinates that make no sense.
        """
        kinds = (str(header.get("CTYPE1", "")).strip(), str(header.get("CTYPE2", "")).strip())
        if kinds == ("", ""):
            return None
        if kinds != ("RA---TAN", "DEC--TAN") or _special(header):
            return _local_tan(header, shape, name)
        try:
            crval = (float(header["CRVAL1"]), float(header["CRVAL2"]))
            crpix = (float(header["CRPIX1"]), float(header["CRPIX2"]))
            cd = _matrix(header)
        except (KeyError, TypeError, ValueError) as error:
            raise CutoutError(f"{name}: its WCS lacks {error}; give CRVAL, CRPIX and CD or CDELT") from error
        found = cls(crval, crpix, cd)
        if not (math.isfinite(sum(crval) + sum(crpix) + sum(cd)) and found.scale > 0):
            raise CutoutError(f"{name}: its WCS has a scale of {found.scale} arc seconds; write it anew")
        return found

    def cards(self) -> dict[str, Any]:
        """The FITS header cards."""
        names = ("CD1_1", "CD1_2", "CD2_1", "CD2_2")
        return {
            "CTYPE1": "RA---TAN",
            "CTYPE2": "DEC--TAN",
            "CUNIT1": "deg",
            "CUNIT2": "deg",
            "CRVAL1": self.crval[0],
            "CRVAL2": self.crval[1],
            "CRPIX1": self.crpix[0],
            "CRPIX2": self.crpix[1],
            **dict(zip(names, self.cd, strict=True)),
        }

    def row(self) -> tuple[float, ...]:
        """Eight numbers, as :func:`pixel_map` takes them: crval, crpix, cd."""
        return (*self.crval, *self.crpix, *self.cd)

    @property
    def scale(self) -> float:
        """Arc seconds per pixel, the root of a pixel's area."""
        return math.sqrt(abs(self.cd[0] * self.cd[3] - self.cd[1] * self.cd[2])) * 3600.0

    @property
    def parity(self) -> int:
        """-1 as the sky is seen (east left when north is up), 1 where it is mirrored."""
        return 1 if self.cd[0] * self.cd[3] - self.cd[1] * self.cd[2] > 0 else -1

    def shifted(self, x: float, y: float) -> Tan:
        """The same sky for an image whose first pixel was pixel (x, y) of this one."""
        return Tan(self.crval, (self.crpix[0] - x, self.crpix[1] - y), self.cd)

    def to_pixel(self, ra: float, dec: float) -> tuple[float, float]:
        """The pixel of a position in degrees; NaN for the far side of the sky."""
        ra0, dec0, dec = self.crval[0] * _DEGREE, self.crval[1] * _DEGREE, dec * _DEGREE
        away = ra * _DEGREE - ra0
        depth = math.sin(dec0) * math.sin(dec) + math.cos(dec0) * math.cos(dec) * math.cos(away)
        if depth <= 0:
            return math.nan, math.nan
        xi = math.cos(dec) * math.sin(away) / depth / _DEGREE
        up = math.cos(dec0) * math.sin(dec) - math.sin(dec0) * math.cos(dec) * math.cos(away)
        eta = up / depth / _DEGREE
        a, b, c, d = self.cd
        area = a * d - b * c
        x = (d * xi - b * eta) / area + self.crpix[0] - 1
        y = (a * eta - c * xi) / area + self.crpix[1] - 1
        return round(x, 9), round(y, 9)

    def to_sky(self, x: float, y: float) -> tuple[float, float]:
        """The position in degrees of a pixel."""
        pixel = torch.tensor([[[x, y]]], dtype=torch.float64)
        found = pixel_to_sky(torch.tensor([self.row()], dtype=torch.float64), pixel)
        return float(found[0, 0, 0]), float(found[0, 0, 1])


def _special(header: Mapping[str, Any]) -> bool:
    """Whether a TAN header bends or turns the plane further."""
    bent = any(key in header for key in ("A_ORDER", "B_ORDER", "PV1_1", "PV2_1"))
    return bent or float(header.get("LONPOLE", 180.0)) != 180.0


def _matrix(header: Mapping[str, Any]) -> tuple[float, float, float, float]:
    if "CD1_1" in header or "CD1_2" in header or "CD2_1" in header or "CD2_2" in header:
        found = [float(header.get(key, 0.0)) for key in ("CD1_1", "CD1_2", "CD2_1", "CD2_2")]
        return (found[0], found[1], found[2], found[3])
    keys = ("1_1", "1_2", "2_1", "2_2")
    steps = [float(header[f"CDELT{axis}"]) for axis in (1, 2)]
    styles = ("PC{}_{}", "PC00{}00{}")  # the second is that of Pan-STARRS1
    written = next((s for s in styles if any(s.format(*key.split("_")) in header for key in keys)), None)
    if written is not None:
        names = {key: written.format(*key.split("_")) for key in keys}
        pc = [float(header.get(names[key], float(key[0] == key[2]))) for key in keys]
    else:
        angle = float(header.get("CROTA2", 0.0)) * _DEGREE
        ratio = steps[1] / steps[0]
        pc = [math.cos(angle), -math.sin(angle) * ratio, math.sin(angle) / ratio, math.cos(angle)]
    return (steps[0] * pc[0], steps[0] * pc[1], steps[1] * pc[2], steps[1] * pc[3])


def _local_tan(header: Mapping[str, Any], shape: Sequence[int], name: str) -> Tan | None:
    """The TAN system that touches the sky at the middle of an image of any projection, from its pixels."""
    import warnings

    from astropy.io.fits import Header
    from astropy.wcs import WCS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = Header()
            for key, value in dict(header).items():
                if value is not None and key not in ("COMMENT", "HISTORY", ""):
                    plain[key] = value
            system: Any = WCS(plain, naxis=2)
            if not system.has_celestial:
                return None
            x, y = (shape[-1] - 1) / 2, (shape[-2] - 1) / 2
            places = np.array([[x, y], [x + 1, y], [x - 1, y], [x, y + 1], [x, y - 1]])
            sky = np.asarray(system.pixel_to_world_values(places[:, 0], places[:, 1])).T
            axes = [str(kind)[:2] for kind in system.wcs.ctype]
            sky = sky[:, ::-1] if axes[0] == "DE" else sky
    except Exception as error:
        raise CutoutError(f"{name}: its WCS cannot be read ({' '.join(str(error).split())})") from error
    center = (float(sky[0, 0]), float(sky[0, 1]))
    flat = Tan(center, (1.0, 1.0), (1.0, 0.0, 0.0, 1.0))  # pixel offsets are degrees of the tangent plane
    plane = [flat.to_pixel(float(ra), float(dec)) for ra, dec in sky]
    columns = [((plane[a][k] - plane[b][k]) / 2) for k in (0, 1) for a, b in ((1, 2), (3, 4))]
    return Tan(center, (x + 1, y + 1), (columns[0], columns[1], columns[2], columns[3]))


def sky_to_pixel(
    system: Float[Tensor, "batch 8"], sky: Float[Tensor, "batch points 2"]
) -> Float[Tensor, "batch points 2"]:
    """Pixels of positions.

    Args:
        system: rows of :meth:`Tan.row`.
        sky: right ascension and declination, degrees.

    Returns:
        0-based (x, y); NaN where the position is 90 degrees or more from the reference point.
    """
    ra0, dec0 = system[:, None, 0] * _DEGREE, system[:, None, 1] * _DEGREE
    away, dec = sky[..., 0] * _DEGREE - ra0, sky[..., 1] * _DEGREE
    depth = dec0.sin() * dec.sin() + dec0.cos() * dec.cos() * away.cos()
    depth = torch.where(depth > 0, depth, torch.nan)
    xi = dec.cos() * away.sin() / depth / _DEGREE
    eta = (dec0.cos() * dec.sin() - dec0.sin() * dec.cos() * away.cos()) / depth / _DEGREE
    a, b, c, d = (system[:, None, k] for k in (4, 5, 6, 7))
    area = a * d - b * c
    x = (d * xi - b * eta) / area + system[:, None, 2] - 1
    y = (a * eta - c * xi) / area + system[:, None, 3] - 1
    return torch.stack([x, y], -1)


def pixel_to_sky(
    system: Float[Tensor, "batch 8"], pixels: Float[Tensor, "batch points 2"]
) -> Float[Tensor, "batch points 2"]:
    """Positions of pixels: the inverse of :func:`sky_to_pixel`; right ascension in [0, 360)."""
    x, y = pixels[..., 0] + 1 - system[:, None, 2], pixels[..., 1] + 1 - system[:, None, 3]
    a, b, c, d = (system[:, None, k] for k in (4, 5, 6, 7))
    xi, eta = (a * x + b * y) * _DEGREE, (c * x + d * y) * _DEGREE
    ra0, dec0 = system[:, None, 0] * _DEGREE, system[:, None, 1] * _DEGREE
    across = dec0.cos() - eta * dec0.sin()
    ra = ra0 + torch.atan2(xi, across)
    dec = torch.atan2(dec0.sin() + eta * dec0.cos(), torch.hypot(xi, across))
    return torch.stack([torch.remainder(ra / _DEGREE, 360.0), dec / _DEGREE], -1)


def pixel_map(
    target: Float[Tensor, "batch 8"], source: Float[Tensor, "batch 8"], size: tuple[int, int]
) -> tuple[Float[Tensor, "batch 2 3"], Float[Tensor, " batch"]]:
    """The affine map from a target's pixels to a source's, and how far it is off.

    Args:
        target: rows of :meth:`Tan.row`.
        source: likewise.
        size: (height, width) of the target.

    Returns:
        Least squares over 3 x 3 pixels of the target: ``source = A @ (x, y, 1)``, and the largest residual in
        source pixels.
    """
    places = _lattice(size, 3, target)
    wanted = sky_to_pixel(source, pixel_to_sky(target, places.expand(len(target), -1, -1)))
    design = torch.cat([places, torch.ones_like(places[..., :1])], -1)[0]
    fit = torch.linalg.pinv(design) @ wanted
    return fit.transpose(-1, -2), (design @ fit - wanted).norm(dim=-1).amax(-1)


def _lattice(size: tuple[int, int], count: int | None, like: Tensor) -> Tensor:
    height, width = size
    y = torch.linspace(0, height - 1, count or height, dtype=like.dtype, device=like.device)
    x = torch.linspace(0, width - 1, count or width, dtype=like.dtype, device=like.device)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns.reshape(-1), rows.reshape(-1)], -1)[None]


def resample(
    images: Float[Tensor, "batch bands height width"],
    source: Float[Tensor, "batch 8"],
    target: Float[Tensor, "batch 8"],
    size: tuple[int, int],
    *,
    outside: float = math.nan,
) -> Float[Tensor, "batch bands rows columns"]:
    """Bilinear surface brightness of images on other grids, one call for a batch.

    Args:
        images: any float dtype.
        source: coordinates of the images, rows of :meth:`Tan.row`, float64.
        target: coordinates of the result.
        size: (rows, columns) of the result.
        outside: value where a target pixel's center lies outside the source's pixels; the outer half pixel
            repeats the edge.

    Returns:
        (batch, bands, rows, columns) in the images' dtype; differentiable in the images.

    Raises:
        ShapeError: other shapes.

    Example:
        >>> tan = torch.tensor([Tan.centered(10.0, 0.0, pixels=4, scale=1.0).row()], dtype=torch.float64)
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> bool(torch.allclose(resample(image, tan, tan, (4, 4)), image, atol=1e-5))
        True
    """
    sizes = check_shape("images", images, "batch bands height width")
    for name, system in (("source", source), ("target", target)):
        check_shape(name, system, "batch 8", batch=sizes["batch"])
    affine, residual = pixel_map(target, source, size)
    kind = torch.float64 if images.dtype == torch.float64 else torch.float32
    scale = affine.new_tensor([2.0 / sizes["width"], 2.0 / sizes["height"]])
    grid = _grid(_theta(affine, scale, size).to(kind), size)
    if bool((bent := ~(residual <= AFFINE_LIMIT)).any()):
        places = _lattice(size, None, target).expand(int(bent.sum()), -1, -1)
        pixels = sky_to_pixel(source[bent], pixel_to_sky(target[bent], places))
        far = ((pixels + 0.5) * scale - 1).nan_to_num(nan=-2.0)
        grid[bent] = far.reshape(-1, *size, 2).to(kind)
    found = F.grid_sample(images, grid.to(images.dtype), "bilinear", "border", align_corners=False)
    corners = grid[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    if bool((corners.abs() <= _EDGE).all()) and not bool(bent.any()):  # then all between them is inside
        return found
    inside = (grid.abs() <= _EDGE).all(-1)
    return found.masked_fill(~inside[:, None], outside)


def _grid(theta: Tensor, size: tuple[int, int]) -> Tensor:
    """``affine_grid`` as two sums by broadcasting: a third of its time on a CPU."""
    y, x = (
        (2 * torch.arange(count, dtype=theta.dtype, device=theta.device) + 1) / count - 1 for count in size
    )
    grid = theta.new_empty(len(theta), *size, 2)
    for axis in (0, 1):
        along, down, shift = (theta[:, axis, k, None] for k in (0, 1, 2))
        torch.add((along * x)[:, None, :], (down * y + shift)[:, :, None], out=grid[..., axis])
    return grid


def _theta(affine: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """An affine map of pixels as one of normalized coordinates, -1 and 1 at the outer edges of the pixels."""
    half = affine.new_tensor([size[1] / 2, size[0] / 2])
    middle = affine[..., :2] @ (half - 0.5) + affine[..., 2]
    return torch.cat([affine[..., :2] * half * scale[:, None], ((middle + 0.5) * scale - 1)[..., None]], -1)


def resample_exact(
    image: NDArray[Any], source: Tan, target: Tan, size: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Area-weighted surface brightness of one plane on another grid (reproject; extra ``sky``).

    Args:
        image: (height, width).
        source: its coordinates.
        target: those of the result.
        size: (rows, columns) of the result.

    Returns:
        (values, footprint): NaN and 0 outside; ``sum(values x footprint) x area ratio`` is the flux.

    Raises:
        InputError: no 2-D image.
        MissingExtraError: reproject is not installed.
    """
    from astropy.wcs import WCS

    reproject: Any = require_extra("reproject", "sky", "mantis-photoz")
    if image.ndim != 2:
        raise InputError(f"image has shape {image.shape}, wanted (height, width)")
    systems: list[Any] = []
    for tan in (source, target):
        system: Any = WCS(naxis=2)
        system.wcs.ctype = ["RA---TAN", "DEC--TAN"]
        system.wcs.crval, system.wcs.crpix = tan.crval, tan.crpix
        system.wcs.cd = np.reshape(tan.cd, (2, 2))
        systems.append(system)
    values, footprint = reproject.reproject_exact(
        (np.asarray(image, np.float64), systems[0]), systems[1], shape_out=size
    )
    return values, footprint


def match_psf(
    images: Float[Tensor, "batch bands height width"], fwhm: Sequence[float], target: float, scale: float
) -> Float[Tensor, "batch bands height width"]:
    """Blur every band to one point-spread function by a Gaussian of ``sqrt(target^2 - fwhm^2)``.

    Args:
        images: the planes.
        fwhm: full width at half maximum of each band, arc seconds.
        target: of the result, arc seconds.
        scale: arc seconds per pixel.

    Returns:
        The same shape; edges are repeated outward, a band that is there already stays as it is.

    Raises:
        ConfigError: ``target`` is sharper than a band, or a number is not positive.
        ShapeError: another number of bands.

    Example:
        >>> round(match_psf(torch.ones(1, 1, 5, 5), [1.0], 2.0, 0.5).sum().item(), 3)
        25.0
    """
    check_shape("images", images, "batch bands height width", bands=len(fwhm))
    check_range("scale", scale, 0.0, math.inf, open=True)
    for width in fwhm:
        check_range("fwhm", width, 0.0, math.inf, open=True)
        check_range("target", target, width, math.inf)
    sigma = torch.tensor([math.sqrt(target**2 - width**2) / _FWHM / scale for width in fwhm])
    sigma = sigma.to(torch.float64)
    reach = max(1, math.ceil(4 * float(sigma.max())))
    place = torch.arange(-reach, reach + 1, dtype=torch.float64)
    # Sampled, not integrated over pixels: the pixels' own width is in the images already.
    kernel = torch.exp(-0.5 * (place / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).to(images)
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    across = F.conv2d(padded, kernel[:, None, None, :], groups=len(fwhm))
    return F.conv2d(across, kernel[:, None, :, None], groups=len(fwhm))

"""From the images of files to the planes of one survey: bands, units, scale, parity, place, size, gaps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mantis_photoz.errors import CutoutError
from mantis_photoz.fits_fast import Image
from mantis_photoz.flags import Flag
from mantis_photoz.surveys import Survey
from mantis_photoz.wcs import Tan, resample

OFF_CENTER = 1.5
"""Arc seconds that the WCS may be off the catalogue before a cutout is shifted."""

_SCALE_LIMIT = 0.01
_ALIASES = {"n": "nuv", "f": "fuv", "1": "w1", "2": "w2"}
_ZERO_POINTS = ("EXPTIME", "ZEROPT", "ZEROPNT", "MAGZERO", "MAGZPT", "PHOTZP", "ZPT", "FPA.ZP", "BUNIT", "ZP")


@dataclass(frozen=True, slots=True)
class Reading:
    """What one survey has of one object.

    Args:
        planes: (bands, pixels, pixels) float32 in the survey's order; NaN where there is no pixel, zeros
            where the survey has nothing.
        wcs: of the planes.
        present: whether the survey takes part.
        nan_fraction: the largest share of NaN pixels among the planes.
        flags: of :class:`~mantis_photoz.flags.Flag`.
        notes: reasons in words.
    """

    planes: NDArray[np.float32]
    wcs: Tan
    present: bool
    nan_fraction: float
    flags: int
    notes: tuple[str, ...] = ()


def absent(survey: Survey, ra: float, dec: float, note: str = "", flags: int = 0) -> Reading:
    """The reading of a survey without data."""
    planes = np.zeros((len(survey.bands), survey.pixels, survey.pixels), np.float32)
    tan = Tan.centered(ra, dec, pixels=survey.pixels, scale=survey.pixel_scale)
    found = int(flags) | int(Flag.MISSING_SURVEY)
    return Reading(planes, tan, False, 0.0, found, (note,) if note else ())


def read_planes(
    images: Sequence[tuple[Image, str | None]],
    survey: Survey,
    ra: float,
    dec: float,
    *,
    name: str,
    nan_limit: float = 0.01,
    band_order: Sequence[str] | None = None,
) -> Reading:
    """Check the images of one survey and bring them into its order, scale, parity, place and size.

    Args:
        images: each with the band that its file's name gives, or None; a cube has several planes.
        survey: what is wanted.
        ra: the catalogue's position, degrees.
        dec: likewise.
        name: of the object and survey, for messages.
        nan_limit: share of NaN pixels of a plane that raises the flag.
        band_order: of the planes where no header tells; the survey's by default, flagged.

    Returns:
        The reading; ``present`` is False where all pixels are zero or a plane has none.

    Raises:
        CutoutError: another number of planes, a band that is not the survey's, a wrong scale without a
            WCS to mend it, or an image of another place.
    """
    flags, notes, seen = 0, list[str](), list[str]()
    cubes: list[tuple[list[str], Image]] = []
    for image, told in images:
        bands, assumed = _bands(image, survey, told, name, band_order)
        if assumed:
            flags |= int(Flag.ASSUMED_BANDS)
            notes.append(f"{survey.name}: no BANDS in the header, took {','.join(bands)}")
        for band in bands:
            if band in seen:
                raise CutoutError(f"{name}: band {band} is there twice; remove one of the files")
            seen.append(band)
        cubes.append((bands, image))
    if missing := [band for band in survey.bands if band not in seen]:
        raise CutoutError(
            f"{name}: bands {', '.join(missing)} are missing, wanted {', '.join(survey.bands)}; fetch them"
        )
    planes, tan, found = _placed(cubes, survey, ra, dec, name, notes)
    flags |= found
    if "count" in survey.unit and not _has_zero_point(cubes[0][1].header):
        flags |= int(Flag.NO_ZERO_POINT)
    share, empty = 0.0, list[str]()
    with np.errstate(invalid="ignore"):  # where both infinities are there
        total = float(planes.sum(dtype=np.float64))
    if not math.isfinite(total):
        infinite = np.isinf(planes)
        if infinite.any():
            flags |= int(Flag.INF_PIXELS)
            planes[infinite] = np.nan
        gaps = np.isnan(planes).mean((1, 2))
        share = float(gaps.max())
        empty = [band for band, gap in zip(survey.bands, gaps, strict=True) if gap >= 1]
        flags |= int(Flag.NAN_PIXELS) if share > nan_limit else 0
    if empty or not (planes if share == 0 else np.nan_to_num(planes)).any():
        why = f"{', '.join(empty)} all NaN" if empty else "all pixels are zero"
        gone = absent(survey, ra, dec, f"{survey.name}: {why}", flags)
        return Reading(gone.planes, gone.wcs, False, share, gone.flags, (*notes, *gone.notes))
    return Reading(planes, tan, True, share, flags, tuple(notes))


def _bands(
    image: Image, survey: Survey, told: str | None, name: str, order: Sequence[str] | None
) -> tuple[list[str], bool]:
    """The bands of an image's planes, and whether the header left that open."""
    count = len(image.data)
    stated = header_bands(image.header, count)
    if stated and all(band in survey.bands for band in stated):
        if told is not None and stated != [told]:
            raise CutoutError(
                f"{name}: the file of band {told} says it is {', '.join(stated)}; fetch it again"
            )
        return stated, False
    if stated and any(re.fullmatch(r"[a-z]{1,4}\d?", band) for band in stated):
        raise CutoutError(
            f"{name}: the header says bands {', '.join(stated)}, wanted {', '.join(survey.bands)}; is it "
            "another survey's file?"
        )
    if told is not None and count == 1:
        return [told], False
    if count != len(survey.bands):
        raise CutoutError(
            f"{name} has {count} planes, wanted {len(survey.bands)} ({', '.join(survey.bands)})"
        )
    if order is not None:
        return list(order), False
    return list(survey.bands), count > 1


def header_bands(header: Mapping[str, Any], count: int) -> list[str]:
    """The bands that a header gives to its planes, lower case; empty where it says nothing.

    Example:
        >>> header_bands({"BANDS": "nf"}, 2), header_bands({"BAND0": "w1", "BAND1": "w2"}, 2)
        (['nuv', 'fuv'], ['w1', 'w2'])
    """
    found: list[str] = []
    if all(f"BAND{k}" in header for k in range(count)):
        found = [str(header[f"BAND{k}"]) for k in range(count)]
    elif "BANDS" in header:
        text = str(header["BANDS"]).strip()
        parts = re.split(r"[,\s]+", text)
        found = (
            parts if len(parts) == count else list(text) if len(text) == count else re.findall(r"..", text)
        )
    elif count == 1:
        stated = header.get("FILTER") or header.get("BAND") or header.get("FPA.FILTER")
        found = [str(stated).partition(".")[0]] if stated else []
    names = [_ALIASES.get(band.strip().lower(), band.strip().lower()) for band in found]
    return names if len(names) == count else []


def _linear(cube: NDArray[Any], header: Mapping[str, Any]) -> NDArray[np.float32]:
    """Linear flux, native float32: whole-skycell PS1 stacks are asinh-compressed, and say so."""
    if "BSOFTEN" in header and "BOFFSET" in header:
        from mantis_photoz.scaling import linear_stack

        values = np.asarray(cube, np.float64)
        softening, offset = float(header["BSOFTEN"]), float(header["BOFFSET"])
        with np.errstate(over="ignore"):
            return np.asarray(linear_stack(values, softening=softening, offset=offset), np.float32)
    return cube.astype(np.float32)


def _has_zero_point(header: Mapping[str, Any]) -> bool:
    return any(key in header for key in _ZERO_POINTS)


def _placed(
    cubes: Sequence[tuple[list[str], Image]],
    survey: Survey,
    ra: float,
    dec: float,
    name: str,
    notes: list[str],
) -> tuple[NDArray[np.float32], Tan, int]:
    """All planes of one size on the survey's grid, with the first band's coordinates; reasons go to notes."""
    flags = 0
    done: dict[str, NDArray[np.float32]] = {}
    systems: dict[str, Tan | None] = {}
    whole: NDArray[np.float32] | None = None
    for bands, image in cubes:
        tan, mend, found, words = _judge(image, survey, ra, dec, name)
        if words and words not in notes:
            notes.append(words)
        flags |= found
        cube = _linear(image.data, image.header)
        if tan is not None and mend:
            target = Tan.centered(ra, dec, pixels=survey.pixels, scale=survey.pixel_scale)
            cube, tan = _mended(cube, tan, target, survey.pixels), target
        else:
            cube, tan, small = _sized(cube, tan, survey.pixels)
            flags |= int(Flag.PADDED) if small else 0
        whole = cube if tuple(bands) == survey.bands else None
        done |= zip(bands, cube, strict=True)
        systems |= dict.fromkeys(bands, tan)
    system = systems[survey.bands[0]]
    if system is None:
        system = Tan.centered(ra, dec, pixels=survey.pixels, scale=survey.pixel_scale)
    return np.stack([done[band] for band in survey.bands]) if whole is None else whole, system, flags


def _judge(
    image: Image, survey: Survey, ra: float, dec: float, name: str
) -> tuple[Tan | None, bool, int, str]:
    """The coordinates of an image, whether it has to be resampled, and why."""
    shape = image.data.shape
    tan = Tan.from_header(image.header, shape, name)
    if tan is None:
        stated = image.header.get("PIXSCALE") or image.header.get("CDELT2")
        step = abs(float(stated)) * (1.0 if "PIXSCALE" in image.header else 3600.0) if stated else None
        if step is not None and abs(step / survey.pixel_scale - 1) > _SCALE_LIMIT:
            raise CutoutError(
                f"{name} has {step:.4g} arc seconds per pixel, wanted {survey.pixel_scale:g}, and no WCS to "
                "resample by; fetch it at the right scale"
            )
        return None, False, 0, ""
    flags, reasons, mend = 0, list[str](), False
    if abs(tan.scale / survey.pixel_scale - 1) > _SCALE_LIMIT:
        flags, mend = flags | int(Flag.RESAMPLED), True
        reasons.append(f'{tan.scale:.4g}"/px instead of {survey.pixel_scale:g}')
    if tan.parity > 0:
        flags, mend = flags | int(Flag.RESAMPLED), True
        reasons.append("mirrored (right ascension grows to the right)")
    x, y = tan.to_pixel(ra, dec)
    # An even image has its middle between two pixels; services center either on it or on pixel N // 2.
    away = [math.hypot(x - (shape[-1] - odd) / 2, y - (shape[-2] - odd) / 2) * tan.scale for odd in (1, 0)]
    offset = min(away) if shape[-1] % 2 == 0 else away[0]
    if not offset <= survey.field_arcsec / 2 + OFF_CENTER:
        raise CutoutError(
            f'{name} shows another place: its center is {offset:.4g}" from the catalogue position '
            f"({ra:.5f}, {dec:.5f}); fetch it again"
        )
    if offset > OFF_CENTER:
        flags, mend = flags | int(Flag.OFF_CENTRE), True
        reasons.append(f'{offset:.3g}" off the catalogue position')
    return tan, mend, flags, f"{survey.name}: {'; '.join(reasons)}" if reasons else ""


def _mended(cube: NDArray[np.float32], source: Tan, target: Tan, pixels: int) -> NDArray[np.float32]:
    rows = [torch.tensor([tan.row()], dtype=torch.float64) for tan in (source, target)]
    found = resample(torch.from_numpy(cube)[None], rows[0], rows[1], (pixels, pixels))
    return found[0].numpy()


def _sized(
    cube: NDArray[np.float32], tan: Tan | None, pixels: int
) -> tuple[NDArray[np.float32], Tan | None, bool]:
    """Cut or pad around the middle; the coordinates follow."""
    height, width = cube.shape[1:]
    if height == width == pixels:
        return cube, tan, False
    top, left = (height - pixels) // 2, (width - pixels) // 2
    cut = cube[:, max(top, 0) : max(top, 0) + pixels, max(left, 0) : max(left, 0) + pixels]
    small = cut.shape[1:] != (pixels, pixels)
    if small:
        whole = np.zeros((len(cube), pixels, pixels), np.float32)
        rows, columns = max(-top, 0), max(-left, 0)
        whole[:, rows : rows + cut.shape[1], columns : columns + cut.shape[2]] = cut
        cut = whole
    return np.ascontiguousarray(cut), None if tan is None else tan.shifted(left, top), small

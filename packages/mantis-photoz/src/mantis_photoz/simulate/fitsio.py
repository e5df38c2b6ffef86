"""Simulated surveys on disk: a FITS cube per object and survey, and a catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.atomic import PathLike, atomic_directory
from fusion_core.progress import track
from mantis_photoz.samples import CutoutArrays
from mantis_photoz.simulate.bands import NAMES, SURVEY_BANDS, ZERO_POINT
from mantis_photoz.wcs import Tan

UNITS = {"galex": "count/s", "ps1": "count", "unwise": "nanomaggy (Vega)"}
CATALOG = "catalog.ecsv"
_BLOCK = 2880


def fits_bytes(planes: NDArray[Any], cards: Mapping[str, Any]) -> bytes:
    """A FITS file of one float32 image.

    Args:
        planes: (bands, height, width).
        cards: name -> value of the header, after the obligatory ones.
    """
    head: dict[str, Any] = {"SIMPLE": True, "BITPIX": -32, "NAXIS": planes.ndim}
    head |= {f"NAXIS{i + 1}": size for i, size in enumerate(reversed(planes.shape))}
    text = "".join(_card(name, value) for name, value in (head | dict(cards)).items()) + "END".ljust(80)
    data = np.ascontiguousarray(planes, dtype=">f4").tobytes()
    return _padded(text.encode("ascii"), b" ") + _padded(data, b"\0")


def _card(name: str, value: Any) -> str:
    if isinstance(value, bool):
        shown = f"{'T' if value else 'F':>20}"
    elif isinstance(value, str):
        shown = f"'{value:<8}'"
    else:
        shown = f"{value!r:>20}".upper()
    return f"{name:<8}= {shown}".ljust(80)


def _padded(data: bytes, fill: bytes) -> bytes:
    return data + fill * (-len(data) % _BLOCK)


def write_survey(
    samples: CutoutArrays,
    out: PathLike,
    *,
    sky: NDArray[np.float64],
    scales: Mapping[str, float],
    overwrite: bool = False,
    progress: bool | None = None,
    **columns: Any,
) -> Path:
    """Write ``{id}.{survey}.fits`` for each object and ``catalog.ecsv``, whole or not at all.

    A survey that does not cover an object has no file.

    Args:
        samples: images in the units of their surveys.
        out: the directory.
        sky: (n, 2) positions, degrees.
        scales: survey -> arcsec per pixel.
        overwrite: replace a directory.
        progress: None shows a bar on a terminal only.
        **columns: further columns of the catalogue.

    Returns:
        The catalogue's path.

    Raises:
        InputError: ``out`` is there already and not empty.
    """
    from astropy.table import Table

    with atomic_directory(out, overwrite=overwrite) as place:
        for row in track(range(len(samples)), "writing FITS", enabled=progress):
            for number, (name, planes) in enumerate(samples.images.items()):
                if not bool(samples.present[row, number]):
                    continue
                image = planes[row].numpy()
                tan = Tan.centered(*sky[row], pixels=image.shape[-1], scale=scales[name])
                cards = _header(name) | tan.cards()
                (place / f"{samples.ids[row]}.{name}.fits").write_bytes(fits_bytes(image, cards))
        facts: dict[str, Any] = {"id": list(samples.ids), "ra": sky[:, 0], "dec": sky[:, 1]}
        facts |= {"ebv_csfd": samples.ebv[:, 0].numpy(), "ebv_planck": samples.ebv[:, 1].numpy()}
        table: Any = Table(facts | {"z_spec": samples.z.numpy()} | columns)
        for name, unit in (("ra", "deg"), ("dec", "deg"), ("ebv_csfd", "mag"), ("ebv_planck", "mag")):
            table[name].unit = unit
        table.meta["simulated"] = "mantis_photoz.simulate; known truth, no real galaxies"
        table.write(place / CATALOG, format="ascii.ecsv")
    return Path(out) / CATALOG


def _header(survey: str) -> dict[str, Any]:
    part = SURVEY_BANDS[survey]
    bands = {f"BAND{i}": name for i, name in enumerate(NAMES[part])}
    zero: dict[str, Any] = {f"ZP{i}": float(value) for i, value in enumerate(ZERO_POINT[part])}
    return {**bands, "BUNIT": UNITS[survey], **zero, "EXPTIME": 1.0, "ORIGIN": "simulated"}

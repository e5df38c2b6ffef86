"""What to ask of which service: addresses, the Pan-STARRS1 table of files, and checks of what comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np

from mantis_photoz.catalog import Catalog, file_name
from mantis_photoz.errors import CutoutError
from mantis_photoz.fits_fast import parse_fits
from mantis_photoz.surveys import Survey

SERVICES: Mapping[str, str] = MappingProxyType(
    {
        "viewer": "https://www.legacysurvey.org/viewer/fits-cutout",
        "ps1names": "https://ps1images.stsci.edu/cgi-bin/ps1filenames.py",
        "ps1cut": "https://ps1images.stsci.edu/cgi-bin/fitscut.cgi",
    }
)
"""Base addresses by name; others, such as a local server, may be given instead."""

LAYERS: Mapping[str, str] = MappingProxyType({"galex": "galex", "unwise": "unwise-neo7"})
PS1_ROWS = 5000
"""Positions of one request to the table of Pan-STARRS1 files."""

PS1_SCALE = 0.25
_BOUNDARY = "mantis-photoz-positions"
_MATCH = 1.0 / 3600.0


@dataclass(frozen=True, slots=True)
class Job:
    """One file to fetch.

    Args:
        file: name in the output directory; the key in its manifest.
        url: canonical address.
        shape: (planes, height, width) that the file must have.
        order: jobs of one service are asked in this order.
    """

    file: str
    url: str
    shape: tuple[int, int, int]
    order: tuple[Any, ...] = ()


def canonical(base: str, query: Mapping[str, Any]) -> str:
    """An address whose parameters are sorted, so that one question has one address.

    Example:
        >>> canonical("http://h/x?b=1", {"a": 2})
        'http://h/x?a=2&b=1'
    """
    parts = urlsplit(base)
    pairs = sorted([*parse_qsl(parts.query), *((key, str(value)) for key, value in query.items())])
    return urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(pairs, safe="/"), ""))


def digest_url(url: str) -> str:
    """The name of an address in the cache: its sha256."""
    return hashlib.sha256(url.encode()).hexdigest()


def number(value: float) -> str:
    """A coordinate as it is sent: to 1e-7 degrees, without an exponent."""
    return f"{value:.7f}".rstrip("0").rstrip(".")


def plan_viewer(catalog: Catalog, survey: Survey, base: str = SERVICES["viewer"]) -> list[Job]:
    """One cube per object from the Legacy viewer.

    Args:
        catalog: positions.
        survey: one of :data:`LAYERS`.
        base: address of the service.
    """
    jobs: list[Job] = []
    for identifier, ra, dec in zip(catalog.ids, catalog.ra, catalog.dec, strict=True):
        query = {
            "ra": number(ra),
            "dec": number(dec),
            "size": survey.pixels,
            "pixscale": f"{survey.pixel_scale:g}",
        }
        url = canonical(base, {**query, "layer": LAYERS[survey.name]})
        shape = (len(survey.bands), survey.pixels, survey.pixels)
        jobs.append(Job(f"{file_name(identifier)}.{survey.name}.fits", url, shape))
    return jobs


def ps1_form(catalog: Catalog, bands: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the request for the table of Pan-STARRS1 files, of all positions (bug B6)."""
    lines = "".join(f"{number(ra)} {number(dec)}\n" for ra, dec in zip(catalog.ra, catalog.dec, strict=True))
    parts = [
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in (("filters", "".join(bands)), ("type", "stack"))
    ]
    parts.append(
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="positions.txt"\r\n'
        f"Content-Type: text/plain\r\n\r\n{lines}\r\n--{_BOUNDARY}--\r\n"
    )
    return "".join(parts).encode(), {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}


def parse_ps1_table(text: str) -> list[dict[str, str]]:
    """The rows of a table of Pan-STARRS1 files.

    Raises:
        CutoutError: no such table.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    wanted = {"ra", "dec", "filter", "filename"}
    if not lines or not wanted <= set(lines[0]):
        raise CutoutError(f"the service sent no table of files but {text[:80]!r}")
    if bad := next((line for line in lines[1:] if len(line) != len(lines[0])), None):
        raise CutoutError(f"the service's table of files is cut off at {' '.join(bad)[:80]!r}")
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    try:
        for row in rows:
            _ = float(row["ra"]) + float(row["dec"])
    except ValueError as error:
        raise CutoutError(f"the service's table of files has a position that is none: {error}") from error
    return rows


def plan_ps1(
    catalog: Catalog, survey: Survey, rows: Sequence[Mapping[str, str]], base: str = SERVICES["ps1cut"]
) -> tuple[list[Job], dict[str, str]]:
    """One file per object and band, named by the band of its own row (bug B5).

    Args:
        catalog: positions that the table was asked for.
        survey: Pan-STARRS1, at any pixel scale.
        rows: of :func:`parse_ps1_table`; matched by position, in any order.
        base: address of the service.

    Returns:
        The jobs, ordered by sky cell and filter, which is kind to the server's cache; and the files that the
        table does not know, with the reason.
    """
    pixels = round(survey.field_arcsec / PS1_SCALE)
    found: dict[tuple[int, str], Mapping[str, str]] = {}
    if len(catalog) and rows:
        from scipy.spatial import KDTree

        tree: Any = KDTree(_unit(catalog.ra, catalog.dec))
        places = _unit(
            np.array([float(row["ra"]) for row in rows]), np.array([float(row["dec"]) for row in rows])
        )
        near = tree.query_ball_point(places, np.deg2rad(_MATCH))
        for row, objects in zip(rows, near, strict=True):
            for index in objects:
                found.setdefault((index, row["filter"]), row)
    jobs: list[Job] = []
    missing: dict[str, str] = {}
    for index, identifier in enumerate(catalog.ids):
        for band in survey.bands:
            name = f"{file_name(identifier)}.{band}.fits"
            row = found.get((index, band))
            if row is None:
                missing[name] = "Pan-STARRS1 has no stack here"
                continue
            sky = {"ra": number(catalog.ra[index]), "dec": number(catalog.dec[index])}
            url = canonical(base, {**sky, "size": pixels, "format": "fits", "red": row["filename"]})
            order = (row.get("projcell", ""), row.get("subcell", ""), band)
            jobs.append(Job(name, url, (1, pixels, pixels), order))
    return sorted(jobs, key=lambda job: job.order), missing


def _unit(ra: Any, dec: Any) -> Any:
    ra, dec = np.deg2rad(ra), np.deg2rad(dec)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], -1)


def verify(body: bytes, job: Job) -> None:
    """Accept a body only where it is a whole FITS image of the right shape with a center that is finite.

    Raises:
        CutoutError: it is not; the message says what came instead.
    """
    image = parse_fits(body, job.file)[0]
    if image.data.shape != job.shape:
        raise CutoutError(f"{job.file} has shape {image.data.shape}, wanted {job.shape}")
    middle = tuple(slice(max(size // 2 - 2, 0), size // 2 + 3) for size in job.shape[1:])
    if not np.isfinite(image.data[(slice(None), *middle)]).any():
        raise CutoutError(f"{job.file} has no finite pixel in its center")

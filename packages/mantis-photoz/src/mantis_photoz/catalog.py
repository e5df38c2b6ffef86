"""Read catalogues of sky positions in any format of the field and find their columns.

Columns are found by UCD first, then by name, then by unit; ``--id``, ``--ra``, ``--dec`` name them instead.
Coordinates may be numbers with or without a unit, sexagesimal text, or a SkyCoord column.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import InputError, reading, require_extra
from mantis_photoz.errors import CatalogError

if TYPE_CHECKING:
    from astropy.table import Table

_LONGEST_HEAD = 400_000  # bytes
FORMATS = {
    ".ecsv": "ascii.ecsv",
    ".csv": "ascii.csv",
    ".fits": "fits",
    ".fit": "fits",
    ".fits.gz": "fits",
    ".parquet": "parquet",
    ".vot": "votable",
    ".votable": "votable",
    ".xml": "votable",
}
_UCDS = {
    "id": ("meta.id;meta.main", "id_main"),
    "ra": ("pos.eq.ra;meta.main", "pos_eq_ra_main", "pos.eq.ra", "pos_eq_ra"),
    "dec": ("pos.eq.dec;meta.main", "pos_eq_dec_main", "pos.eq.dec", "pos_eq_dec"),
}
_NAMES = {
    "id": ("id", "objid", "object_id", "objectid", "obj_id", "name", "source_id", "targetid", "specobjid"),
    "ra": ("ra", "raj2000", "ra_icrs", "ra_deg", "radeg", "_raj2000", "_ra", "ramean", "rastack",
           "alpha_j2000", "right_ascension", "ra_j2000", "host_ra", "ra_host"),
    "dec": ("dec", "dej2000", "decj2000", "de_icrs", "dec_icrs", "dec_deg", "decdeg", "_dej2000", "_dec",
            "_de", "decmean", "decstack", "delta_j2000", "declination", "dec_j2000", "host_dec", "dec_host"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Catalog:
    """Positions of objects, with every other column of their table.

    Args:
        table: the whole astropy table, as read.
        ids: one text for each object, none twice.
        ra: right ascension in degrees, [0, 360), float64.
        dec: declination in degrees, [-90, 90], float64.
        columns: the columns that ``id``, ``ra`` and ``dec`` came from.
    """

    table: Any
    ids: tuple[str, ...]
    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    columns: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | NDArray[Any]) -> Catalog:
        """The catalogue of some rows, in that order."""
        index = np.asarray(rows, dtype=np.int64)
        ids = tuple(self.ids[row] for row in index)
        return Catalog(self.table[index], ids, self.ra[index], self.dec[index], self.columns)

    def column(self, name: str) -> NDArray[np.float64]:
        """A numeric column as float64; masked entries are NaN.

        Raises:
            CatalogError: no such column, or no numbers; the message lists the columns.
        """
        if name not in self.table.colnames:
            raise CatalogError(f"the catalogue has no column {name!r}; it has {_listed(self.table)}")
        try:
            return _float(self.table[name])
        except (TypeError, ValueError) as error:
            raise CatalogError(
                f"column {name!r} holds {_example(self.table[name])}, wanted numbers"
            ) from error


def read_catalog(
    source: Any,
    *,
    id: str | None = None,  # noqa: A002 - the column's usual name
    ra: str | None = None,
    dec: str | None = None,
) -> Catalog:
    """Read a catalogue and check it.

    Args:
        source: a file (ECSV, CSV, FITS, Parquet, VOTable), an astropy table, a :class:`Catalog`, or a mapping
            of columns.
        id: name of the column of identifiers; None finds it.
        ra: of right ascensions; ``ra`` and ``dec`` may both name one SkyCoord column.
        dec: of declinations.

    Returns:
        The catalogue; an empty one keeps its columns.

    Raises:
        CatalogError: a column is missing or ambiguous, a value is no number or out of range (ra outside
            [0, 360), dec outside [-90, 90]), an identifier is empty or there twice. The message names row,
            column and remedy.
        InputError: the file cannot be read as a table.
    """
    if isinstance(source, Catalog):
        return source
    table: Any = read_table(source)
    if not isinstance(source, str | os.PathLike):
        return _catalog(table, id, ra, dec)
    with reading(source, error=CatalogError):
        return _catalog(table, id, ra, dec)


def _catalog(table: Any, id: str | None, ra: str | None, dec: str | None) -> Catalog:  # noqa: A002
    for word, name in (("id", id), ("ra", ra), ("dec", dec)):
        if name is not None and name not in table.colnames:
            raise CatalogError(f"--{word} names {name!r}, but the catalogue has {_listed(table)}")
    columns = {"id": id or _find(table, "id")}
    sky = _sky(table, ra, dec)
    if sky is None:
        columns |= {"ra": ra or _find(table, "ra"), "dec": dec or _find(table, "dec")}
        degrees = [_degrees(table[columns[word]], word, columns[word]) for word in ("ra", "dec")]
    else:
        columns |= {"ra": sky, "dec": sky}
        position: Any = table[sky].icrs
        degrees = [np.asarray(getattr(position, word).deg, np.float64).reshape(-1) for word in ("ra", "dec")]
    ids = _ids(table[columns["id"]], columns["id"])
    _check("ra", columns["ra"], degrees[0], ids, 0.0, 360.0, "[0, 360)")
    _check("dec", columns["dec"], degrees[1], ids, -90.0, 90.0, "[-90, 90]")
    return Catalog(table, ids, degrees[0], degrees[1], columns)


def file_name(identifier: str) -> str:
    """An identifier as part of a file's name: slashes and the like are percent-encoded, so none can leave.

    Example:
        >>> file_name("SN 2020abc+1"), file_name("../a/b")
        ('SN 2020abc+1', '..%2Fa%2Fb')
    """
    text = quote(identifier, safe=" +-_.()=,@#~")
    return text.replace(".", "%2E", 1) if text in (".", "..") else text


def read_table(source: Any) -> Table:
    """A table from a file by its suffix, an astropy table, or a mapping of columns.

    Raises:
        InputError: not there, another format, or no table.
    """
    from astropy.table import Table

    if isinstance(source, Table):
        return source
    if isinstance(source, Mapping):
        return Table(dict(source))
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"catalog is a {type(source).__name__}, wanted a file, an astropy table or a mapping"
        )
    path = Path(source)
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    form = FORMATS.get(suffix.lower())
    if form is None:
        raise InputError(f"catalog {path} has suffix {path.suffix!r}, wanted one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise InputError(f"catalog {path} is not there; name an existing file")
    if form == "parquet":
        return _from_parquet(path)
    if form == "ascii.csv":
        with path.open("rb") as file:
            if len(file.readline(_LONGEST_HEAD + 1)) > _LONGEST_HEAD:  # astropy's time grows with its square
                raise InputError(f"catalog {path} has no names of columns in its first {_LONGEST_HEAD} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown units and old VOTable versions are kept as they are
            return Table.read(path, format=form)
    except Exception as error:
        raise InputError(
            f"catalog {path} cannot be read as {form}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def _from_parquet(path: Path) -> Table:
    from astropy.table import Table

    parquet: Any = require_extra("pyarrow.parquet", "parquet", "mantis-photoz")
    table: Any = Table()
    with reading(f"catalog {path}", "cannot be read as parquet"):
        found = parquet.read_table(path)
        for name in found.column_names:
            column = found.column(name).combine_chunks()
            values = column.to_numpy(zero_copy_only=False)
            if values.dtype == object:  # text, or lists of one length
                entries = column.to_pylist()
                values = np.asarray(["" if entry is None else entry for entry in entries])
            table[name] = values
            unit = ((found.schema.field(name).metadata or {}).get(b"unit") or b"").decode()
            if unit:
                table[name].unit = unit
    return table


def _listed(table: Table) -> str:
    return ", ".join(map(str, table.colnames)) or "no columns"


def _ucd(column: Any) -> str:
    meta: Mapping[str, Any] = getattr(getattr(column, "info", None), "meta", None) or {}
    return str(meta.get("ucd") or meta.get("UCD") or "").lower()


def _find(table: Table, word: str) -> str:
    for ucd in _UCDS[word]:
        if found := [name for name in table.colnames if _ucd(table[name]) == ucd]:
            return _single(found, word)
    lower: dict[str, list[str]] = {}
    for name in table.colnames:
        lower.setdefault(name.lower(), []).append(name)
    for guess in _NAMES[word]:
        if guess in lower:
            return _single(lower[guess], word)
    if word == "ra":
        units = [name for name in table.colnames if str(getattr(table[name], "unit", "")) == "hourangle"]
        if len(units) == 1:
            return units[0]
    raise CatalogError(
        f"the catalogue has no column for {word}; it has {_listed(table)}: name one with --{word}"
    )


def _single(found: list[str], word: str) -> str:
    if len(found) > 1:
        raise CatalogError(f"columns {', '.join(found)} may all be {word}: name one with --{word}")
    return found[0]


def _sky(table: Table, ra: str | None, dec: str | None) -> str | None:
    """The SkyCoord column to take the position from, if there is one."""
    mixed = [name for name in table.colnames if hasattr(table[name], "icrs")]
    named = [name for name in (ra, dec) if name is not None]
    if named:
        return named[0] if set(named) <= set(mixed) else None
    plain = {name.lower() for name in table.colnames}
    if not mixed or {"ra", "dec"} <= plain:
        return None
    return _single(mixed, "ra")


def _float(column: Any) -> NDArray[np.float64]:
    values = np.ma.asarray(getattr(column, "value", column))
    return np.ma.filled(values.astype(np.float64), np.nan)


def _example(column: Any) -> str:
    return repr(str(column[0])) if len(column) else "nothing"


def _degrees(column: Any, word: str, name: str) -> NDArray[np.float64]:
    from astropy import units

    if len(column) == 0:
        return np.zeros(0)
    unit = getattr(column, "unit", None)
    try:
        values = _float(column)
    except (TypeError, ValueError):
        return _sexagesimal(column, word, name)
    if unit is None or str(unit) in ("", "deg", "degree", "degrees"):
        return values
    try:
        return np.asarray(units.Quantity(values, unit).to_value(units.deg), np.float64)
    except Exception as error:
        raise CatalogError(f"column {name!r} has unit {unit}, wanted an angle such as deg") from error


def _sexagesimal(column: Any, word: str, name: str) -> NDArray[np.float64]:
    from astropy.coordinates import Angle

    found = np.empty(len(column))
    for row, entry in enumerate(column):
        text = str(entry).strip()
        hours = word == "ra" and not any(sign in text for sign in "d°")
        try:
            plain = not any(sign in text for sign in ": hdm°'")
            found[row] = float(text) if plain else Angle(text, unit="hourangle" if hours else "deg").deg
        except Exception as error:
            raise CatalogError(
                f"row {row}: {name} is {text!r}, wanted degrees or sexagesimal text such as "
                f"{'10:00:24.0' if word == 'ra' else '+02:12:00'}"
            ) from error
    return found


def _ids(column: Any, name: str) -> tuple[str, ...]:
    entries = [value.decode() if isinstance(value, bytes) else value for value in column]
    ids = tuple("" if value is np.ma.masked else str(value).strip() for value in entries)
    seen: dict[str, int] = {}
    for row, text in enumerate(ids):
        if not text:
            raise CatalogError(f"row {row}: {name} is empty; each object needs an identifier")
        if text in seen:
            raise CatalogError(
                f"{name} {text!r} stands in rows {seen[text]} and {row}; identifiers name files and rows of "
                "the output, so each must be there once"
            )
        seen[text] = row
    return ids


def _check(
    word: str, name: str, values: NDArray[np.float64], ids: Sequence[str], low: float, high: float, words: str
) -> None:
    inside = (values >= low) & (values < high if word == "ra" else values <= high)
    if not inside.all():
        row = int(np.argmin(inside))
        raise CatalogError(
            f"row {row} ({ids[row]}): {name} is {values[row]:g}, wanted {words} degrees"
            + ("; add 360 to negative right ascensions" if word == "ra" and values[row] < 0 else "")
        )

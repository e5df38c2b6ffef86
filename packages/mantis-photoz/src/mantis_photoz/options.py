"""What the verbs of the command line share: arguments, the model that is meant, the first rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_core.errors import InputError

__all__ = [
    "CatalogFile",
    "CutoutDir",
    "DecColumn",
    "IdColumn",
    "Model",
    "RaColumn",
    "Tta",
    "first_rows",
    "load_photoz",
    "model_name",
    "needed",
    "parse_tta",
]

CatalogFile = Annotated[Path, typer.Argument(help="Positions: .ecsv, .csv, .fits, .parquet or VOTable.")]
CutoutDir = Annotated[Path | None, typer.Option("--cutouts", help="Directory of FITS files, or packed .h5.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, name on the hub, or one that ships.")
]
Tta = Annotated[
    str, typer.Option("--tta", help="Views: none, d4 (mean of 8 exact ones), official, or a number.")
]
IdColumn = Annotated[str | None, typer.Option("--id", help="Column of identifiers; found by itself.")]
RaColumn = Annotated[str | None, typer.Option("--ra", help="Column of right ascensions.")]
DecColumn = Annotated[str | None, typer.Option("--dec", help="Column of declinations.")]
NOTICE = (
    "note: the models that ship were trained on simulated galaxies only; train or load a real one before you "
    "trust a redshift\n"
)


def model_name(name: str | None) -> str:
    """The model that is meant: without a name one that ships, with a word that it knows simulations only.

    Raises:
        InputError: no name, and none ships.
    """
    from mantis_photoz.fusion import shipped

    own = shipped()
    if name is None:
        names = sorted(own, key=lambda entry: ("early" not in entry, entry))
        if not names:
            raise InputError("--model is missing: name a folder, or a model on the hub")
        name = names[0]
    if name in own and not Path(name).is_dir():
        sys.stderr.write(NOTICE)
    return name


def load_photoz(name: str | None, **options: Any) -> Any:
    """The :class:`~mantis_photoz.PhotoZ` of ``--model``; options as for its ``from_pretrained``."""
    from mantis_photoz.estimate import PhotoZ

    return PhotoZ.from_pretrained(model_name(name), **options)


def parse_tta(text: str) -> Any:
    """``none``, ``d4``, ``official`` or a number of views."""
    return int(text) if text.isdecimal() else text


def first_rows(path: Path, limit: int | None, **columns: str | None) -> Any:
    """The catalogue of a file, or its first ``limit`` rows."""
    from mantis_photoz.catalog import read_catalog

    found = read_catalog(path, **columns)
    return found if limit is None else found.take(range(min(limit, len(found))))


def needed(cutouts: Path | None, more: str = "") -> Path:
    """The place of the cutouts.

    Raises:
        InputError: none.
    """
    if cutouts is None:
        raise InputError(f"--cutouts is missing: name a directory of FITS files or a packed .h5 file{more}")
    return cutouts

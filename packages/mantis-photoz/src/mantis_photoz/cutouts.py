"""Cutouts of a catalogue: where the files are, what they hold, and batches of them.

``DIR/{id}.{survey}.fits`` (a cube), the official ``{id}.Galex.fits, {id}.g.fits ... {id}.Unwise.fits``, one
``{id}.fits`` with an extension per survey or band, or packed shards (:mod:`mantis_photoz.pack`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fusion_core.errors import InputError
from mantis_photoz.catalog import Catalog, file_name, read_catalog
from mantis_photoz.ebv import find_ebv
from mantis_photoz.errors import CutoutError
from mantis_photoz.fits_fast import Image, parse_fits, read_bytes
from mantis_photoz.flags import Flag
from mantis_photoz.reading import Reading, absent, read_planes
from mantis_photoz.surveys import PS1_SOUTH, SURVEYS, Survey, select_surveys

SPLITS = ("train", "val", "test")
_SHARES = (0.8, 0.1, 0.1)
_SUFFIXES = (".fits", ".fits.gz")


class Source(Protocol):
    """Where readings come from."""

    def read(self, identifier: str, survey: Survey, ra: float, dec: float) -> Reading:
        """The reading of one object in one survey; never an error for what a file holds."""
        ...


class FitsDirectory:
    """Cutouts as FITS files in one directory; ``checksums`` gets the sha256 of every file that is read.

    Args:
        path: the directory; its names are listed once.
        nan_limit: share of NaN pixels of a plane that raises the flag.
        band_order: survey -> bands, for files whose header does not tell.
        fast: take the quick way through plain files.

    Raises:
        InputError: no such directory.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        nan_limit: float = 0.01,
        band_order: Mapping[str, Sequence[str]] | None = None,
        fast: bool = True,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(
                f"cutouts is {str(path)!r}, wanted a directory of FITS files or a packed .h5 file"
            )
        with os.scandir(self.path) as entries:
            self.names = frozenset(entry.name for entry in entries if entry.name.endswith(_SUFFIXES))
        self.nan_limit, self.band_order, self.fast = nan_limit, dict(band_order or {}), fast
        self.checksums: dict[str, str] = {}

    def files(self, identifier: str, survey: Survey) -> list[tuple[Path, str | None]]:
        """The files of one object in one survey, each with the band of its name."""
        stem = file_name(identifier)
        for middle in (survey.name, survey.name.capitalize(), survey.name.upper()):
            if found := self._named(f"{stem}.{middle}"):
                return [(found, None)]
        singles = [(self._named(f"{stem}.{band}"), band) for band in survey.bands]
        if any(path is not None for path, _ in singles):
            return [(path, band) for path, band in singles if path is not None]
        whole = self._named(stem)
        return [(whole, None)] if whole else []

    def _named(self, stem: str) -> Path | None:
        return next((self.path / (stem + end) for end in _SUFFIXES if stem + end in self.names), None)

    def read(self, identifier: str, survey: Survey, ra: float, dec: float) -> Reading:
        """See :class:`Source`."""
        files = self.files(identifier, survey)
        if not files:
            return absent(survey, ra, dec, f"{survey.name}: no file")
        try:
            images: list[tuple[Image, str | None]] = []
            for path, band in files:
                images += self._images(
                    path, band, survey, whole=path.name.startswith(file_name(identifier) + ".fits")
                )
            if not images:
                return absent(survey, ra, dec, f"{survey.name}: no extension")
            name = files[0][0].name if len(files) == 1 else f"{file_name(identifier)} ({survey.name})"
            return read_planes(
                images,
                survey,
                ra,
                dec,
                name=name,
                nan_limit=self.nan_limit,
                band_order=self.band_order.get(survey.name),
            )
        except CutoutError as error:
            words = " ".join(str(error).split())
            return absent(survey, ra, dec, f"{survey.name}: {words}", Flag.BAD_CUTOUT)

    def _images(
        self, path: Path, band: str | None, survey: Survey, *, whole: bool
    ) -> list[tuple[Image, str | None]]:
        content = read_bytes(path)
        self.checksums[path.name] = hashlib.sha256(content).hexdigest()
        found = parse_fits(content, path.name, fast=self.fast)
        if not whole:
            return [(found[0], band)]
        named = [image for image in found if image.name == survey.name.upper()]
        if named:
            return [(named[0], None)]
        bands = {name.upper(): name for name in survey.bands}
        return [(image, bands[image.name]) for image in found if image.name in bands]


@dataclass(frozen=True, slots=True)
class CutoutBatch:
    """Some objects, ready for a device.

    Args:
        rows: of the catalogue.
        ids: identifiers.
        planes: survey -> (batch, bands, pixels, pixels) float32 flux as served, NaN where there is no pixel.
        wcs: survey -> (batch, 8) float64 rows of :meth:`mantis_photoz.wcs.Tan.row`.
        sky: (batch, 2) catalogue position, degrees.
        present: (batch, surveys) which take part.
        nan_fraction: (batch, surveys) largest share of NaN pixels among a survey's planes.
        ebv: (batch, 2) E(B-V) of CSFD and Planck, magnitudes.
        flags: (batch,) int64 of :class:`~mantis_photoz.flags.Flag`.
        notes: reasons in words, one text per object.
    """

    rows: NDArray[np.int64]
    ids: tuple[str, ...]
    planes: dict[str, Tensor]
    wcs: dict[str, Tensor]
    sky: Tensor
    present: Tensor
    nan_fraction: NDArray[np.float32]
    ebv: Tensor
    flags: NDArray[np.int64]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Cutouts(Dataset[dict[str, Any]]):
    """The cutouts of a catalogue, read when they are asked for.

    Args:
        catalog: positions.
        source: where the images are.
        surveys: what is wanted, by name.
        ebv: (objects, 2) E(B-V); None looks into the catalogue, else 0 with a flag.
        truth: column of true redshifts, for training; None takes ``z_spec`` or ``z`` where there is one.

    Raises:
        DataError: ``truth`` names no numeric column.
    """

    def __init__(
        self,
        catalog: Catalog,
        source: Source,
        surveys: Mapping[str, Survey],
        *,
        ebv: NDArray[np.floating[Any]] | None = None,
        truth: str | None = None,
        seed: int = 0,
    ) -> None:
        self.catalog, self.source, self.surveys, self.seed = catalog, source, dict(surveys), seed
        self.ebv, self._dust_flags = find_ebv(catalog, ebv)
        names = (
            [truth]
            if truth
            else [name for name in ("z_spec", "zspec", "z_true") if name in catalog.table.colnames]
        )
        self.z: NDArray[np.float64] | None = catalog.column(names[0]) if names else None

    @classmethod
    def from_directory(
        cls,
        path: str | os.PathLike[str],
        catalog: Any,
        surveys: str | Sequence[str] | Mapping[str, Survey] = tuple(SURVEYS),
        *,
        truth: str | None = None,
        seed: int = 0,
        nan_limit: float = 0.01,
        band_order: Mapping[str, Sequence[str]] | None = None,
    ) -> Cutouts:
        """Cutouts in a directory of FITS files, or in packed shards.

        Args:
            path: the directory, or an ``.h5`` file of :func:`mantis_photoz.pack.pack`.
            catalog: what :func:`~mantis_photoz.catalog.read_catalog` takes.
            surveys: names, or surveys of your own.
            truth: column of true redshifts.
            seed: of :meth:`split`.
            nan_limit: share of NaN pixels of a plane that raises the flag.
            band_order: survey -> bands, for files whose header does not tell.

        Raises:
            InputError: no such directory.
            DataError: as in :func:`~mantis_photoz.catalog.read_catalog`.
        """
        wanted = surveys if isinstance(surveys, Mapping) else select_surveys(surveys)
        source = open_source(path, nan_limit=nan_limit, band_order=band_order)
        return cls(read_catalog(catalog), source, wanted, truth=truth, seed=seed)

    def __len__(self) -> int:
        return len(self.catalog)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One object: ``id``, ``planes``, ``wcs``, ``sky``, ``present``, ``ebv`` and ``z``."""
        found = self.batch([range(len(self))[row]])
        item: dict[str, Any] = {
            "id": found.ids[0],
            "planes": {name: planes[0] for name, planes in found.planes.items()},
            "wcs": {name: system[0] for name, system in found.wcs.items()},
            "sky": found.sky[0],
            "present": found.present[0],
            "ebv": found.ebv[0],
        }
        if self.z is not None:
            item["z"] = float(self.z[row])
        return item

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def batch(self, rows: Sequence[int] | NDArray[Any]) -> CutoutBatch:
        """Read some objects; a file that cannot be used leaves its survey missing and a note."""
        index = np.asarray(rows, np.int64)
        readings = [self.read(int(row)) for row in index]
        flags = np.array(
            [self._judged(int(row), found) for row, found in zip(index, readings, strict=True)], np.int64
        )
        names = list(self.surveys)
        planes = {
            name: torch.from_numpy(_stack([found[name].planes for found in readings], self.surveys[name]))
            for name in names
        }
        wcs = {
            name: torch.tensor([found[name].wcs.row() for found in readings], dtype=torch.float64).reshape(
                -1, 8
            )
            for name in names
        }
        shape = (len(index), len(names))
        present = np.array([[found[name].present for name in names] for found in readings], bool).reshape(
            shape
        )
        gaps = np.array([[found[name].nan_fraction for name in names] for found in readings], np.float32)
        sky = np.stack([self.catalog.ra[index], self.catalog.dec[index]], -1)
        return CutoutBatch(
            rows=index,
            ids=tuple(self.catalog.ids[row] for row in index),
            planes=planes,
            wcs=wcs,
            sky=torch.from_numpy(sky),
            present=torch.from_numpy(present),
            nan_fraction=gaps.reshape(shape),
            ebv=torch.from_numpy(self.ebv[index].astype(np.float32)),
            flags=flags,
            notes=tuple(
                "; ".join(note for name in names for note in found[name].notes) for found in readings
            ),
        )

    def read(self, row: int) -> dict[str, Reading]:
        """The readings of one object by survey."""
        identifier, ra, dec = self.catalog.ids[row], float(self.catalog.ra[row]), float(self.catalog.dec[row])
        return {name: self.source.read(identifier, survey, ra, dec) for name, survey in self.surveys.items()}

    def _judged(self, row: int, readings: Mapping[str, Reading]) -> int:
        flags = int(self._dust_flags[row])
        for reading in readings.values():
            flags |= reading.flags
        if not any(reading.present for reading in readings.values()):
            flags |= Flag.NO_IMAGES
        if self.catalog.dec[row] < PS1_SOUTH:
            flags |= Flag.OUTSIDE_PS1
        return flags

    def take(self, rows: Sequence[int] | NDArray[Any]) -> Cutouts:
        """The cutouts of some rows."""
        index = np.asarray(rows, np.int64)
        found = Cutouts(
            self.catalog.take(index), self.source, self.surveys, ebv=self.ebv[index], seed=self.seed
        )
        found.z = None if self.z is None else self.z[index]
        found._dust_flags = self._dust_flags[index]
        return found

    def split(self, name: str) -> Cutouts:
        """The objects of one split: by the catalogue's column ``split``, else by a hash of id and seed.

        Args:
            name: ``"train"`` (80 %), ``"val"`` or ``"test"`` (10 % each), or any word of the column.
                An object stays in its split however the catalogue grows.

        Raises:
            InputError: no such split.
        """
        if "split" in self.catalog.table.colnames:
            words = np.asarray([str(word) for word in self.catalog.table["split"]])
            known = sorted(set(words))
        else:
            limits = np.cumsum(_SHARES)
            numbers = [_share(self.seed, identifier) for identifier in self.catalog.ids]
            words = np.asarray([SPLITS[int(np.searchsorted(limits, number, "right"))] for number in numbers])
            known = list(SPLITS)
        if name not in known:
            raise InputError(f"split is {name!r}, wanted one of {', '.join(known)}")
        return self.take(np.flatnonzero(words == name))


def open_source(
    path: str | os.PathLike[str],
    *,
    nan_limit: float = 0.01,
    band_order: Mapping[str, Sequence[str]] | None = None,
) -> Source:
    """The source behind a path: a directory of FITS files, or packed shards (``.h5`` or a folder of them).

    Raises:
        InputError: neither.
    """
    place = Path(path)
    packed = place.suffix in (".h5", ".hdf5") or (place / "cutouts.h5").is_file()
    if packed:
        from mantis_photoz.pack import PackedCutouts

        return PackedCutouts(place if place.is_file() else place / "cutouts.h5")
    return FitsDirectory(place, nan_limit=nan_limit, band_order=band_order)


def _stack(planes: Sequence[NDArray[np.float32]], survey: Survey) -> NDArray[np.float32]:
    if not planes:
        return np.zeros((0, len(survey.bands), survey.pixels, survey.pixels), np.float32)
    return np.stack(planes)


def _share(seed: int, identifier: str) -> float:
    word = hashlib.sha256(f"{seed}/{identifier}".encode()).digest()
    return int.from_bytes(word[:8], "big") / 2**64

"""Cutouts packed in one HDF5 file: one dataset per survey, with coordinates, masks and flags."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusion_core.checkpoint import digest_file
from fusion_core.errors import ConfigError, InputError, reading
from mantis_photoz.cutouts import Cutouts
from mantis_photoz.errors import CutoutError
from mantis_photoz.flags import Flag
from mantis_photoz.reading import Reading, absent
from mantis_photoz.samples import blocks
from mantis_photoz.surveys import Survey
from mantis_photoz.wcs import Tan

SCHEMA = "mantis.cutouts/1"
_FORMAT = ("v110", "v110")
"""With checksums over what describes the data: a damaged file of the older one HDF5 may read for ever."""
_KINDS = {"present": ("biu", "true or false"), "flags": ("iu", "integers")}
_FLOAT16_MAX = 65504.0


def pack(
    data: Cutouts,
    out: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int = 64,
    overwrite: bool = False,
    progress: bool | None = None,
) -> int:
    """Write cutouts to a packed file, whole or not at all.

    Args:
        data: what is to be packed; memory is bounded by a batch.
        out: ``.h5`` file, in the format of HDF5 1.10 and later, whose checksums tell damage.
        dtype: ``"float32"`` gives back what was read, bit for bit; ``"float16"`` keeps three digits (values
            beyond its range are an error).
        batch_size: objects at a time.
        overwrite: replace a file that is there.
        progress: None shows a bar on a terminal only.

    Returns:
        The number of objects.

    Raises:
        InputError: another suffix, a file that is there, or a place that cannot be written.
        CutoutError: a pixel that float16 cannot hold.
    """
    import h5py

    from fusion_core.progress import track

    target = Path(out)
    if target.suffix not in (".h5", ".hdf5"):
        raise InputError(f"--out is {str(target)!r}, wanted a file in .h5")
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"dtype is {dtype!r}, wanted 'float32' or 'float16'")
    if target.exists() and not overwrite:
        raise InputError(f"--out {target} is there already; pass --overwrite, or name another file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; name a writable place"
        ) from error
    temporary, count = Path(name), len(data)
    try:
        with h5py.File(temporary, "w", libver=_FORMAT) as file:
            _create(file, data, dtype)
            notes = {survey: list[str]() for survey in data.surveys}
            for rows in track(blocks(count, batch_size), "packing", enabled=progress):
                _write(file, data, rows, dtype, notes)
            for survey, texts in notes.items():
                file.create_dataset(f"{survey}/notes", data=_fixed(texts))
        temporary.chmod(0o644)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return count


def _create(file: Any, data: Cutouts, dtype: str) -> None:
    count = len(data)
    surveys = {name: survey.to_dict() for name, survey in data.surveys.items()}
    file.attrs["schema"], file.attrs["surveys"] = SCHEMA, json.dumps(surveys)
    file.create_dataset("id", data=_fixed(data.catalog.ids))
    file.create_dataset("sky", data=np.stack([data.catalog.ra, data.catalog.dec], -1))
    file.create_dataset("ebv", data=data.ebv)
    if data.z is not None:
        file.create_dataset("z", data=data.z)
    for name, survey in data.surveys.items():
        shape = (count, len(survey.bands), survey.pixels, survey.pixels)
        group = file.create_group(name)
        group.create_dataset("planes", shape, dtype, chunks=(1, *shape[1:]) if count else None)
        group.create_dataset("wcs", (count, 8), "float64")
        group.create_dataset("present", (count,), bool)
        group.create_dataset("nan_fraction", (count,), "float32")
        group.create_dataset("flags", (count,), "int64")


def _fixed(texts: Sequence[str]) -> NDArray[np.void]:
    """Texts of one length in bytes; those of any length lie where HDF5 keeps no checksum."""
    import h5py

    encoded = [text.encode() for text in texts]
    length = max(map(len, encoded), default=0)
    return np.array(encoded, dtype=h5py.string_dtype(length=max(length, 1)))


def _write(file: Any, data: Cutouts, rows: list[int], dtype: str, notes: dict[str, list[str]]) -> None:
    found = [data.read(row) for row in rows]
    where = slice(rows[0], rows[-1] + 1)
    for name in data.surveys:
        readings = [one[name] for one in found]
        planes = np.stack([reading.planes for reading in readings])
        if dtype == "float16" and np.nanmax(np.abs(planes), initial=0.0) > _FLOAT16_MAX:
            raise CutoutError(
                f"{name} has pixels beyond {_FLOAT16_MAX:g}, which float16 cannot hold; pack as float32"
            )
        group = file[name]
        group["planes"][where] = planes.astype(dtype)
        group["wcs"][where] = np.array([reading.wcs.row() for reading in readings])
        for field in ("present", "nan_fraction", "flags"):
            group[field][where] = np.array([getattr(reading, field) for reading in readings])
        notes[name] += ["; ".join(reading.notes) for reading in readings]


class PackedCutouts:
    """Cutouts in a packed file, by identifier; threads take turns.

    Args:
        path: of :func:`pack`.

    Raises:
        InputError: no such file, or none of :func:`pack`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import h5py

        self.path = Path(path)
        with reading(f"cutouts {self.path}", "is no packed file (write one with pack)"):
            self._file: Any = h5py.File(self.path, "r")
            if self._file.attrs.get("schema") != SCHEMA:
                raise ValueError(f"schema is {self._file.attrs.get('schema')!r}, wanted {SCHEMA!r}")
            surveys = json.loads(self._file.attrs["surveys"])
            self.surveys = {name: Survey.from_dict(entry) for name, entry in surveys.items()}
            self.rows = {text: row for row, text in enumerate(self._file["id"].asstr()[:])}
            self._check(len(self.rows))
        self._lock = threading.Lock()
        self._checksum = ""

    def _check(self, count: int) -> None:
        """Look whether every survey has its arrays, of the sizes that the file says."""
        if not self.surveys:
            raise ValueError("surveys is empty, wanted at least one")
        for name, survey in self.surveys.items():
            group = self._file[name]
            shapes = {"planes": (count, len(survey.bands), survey.pixels, survey.pixels), "wcs": (count, 8)}
            for field in ("planes", "wcs", "notes", "present", "nan_fraction", "flags"):
                array, wanted = group[field], shapes.get(field, (count,))
                if array.shape != wanted:
                    raise ValueError(f"{name}/{field} has shape {array.shape}, wanted {wanted}")
                kinds, words = _KINDS.get(field, ("f", "floating-point numbers"))
                if field != "notes" and array.dtype.kind not in kinds:
                    raise ValueError(f"{name}/{field} is of {array.dtype}, wanted {words}")

    @property
    def checksum(self) -> str:
        """Sha256 of the file."""
        self._checksum = self._checksum or digest_file(self.path)
        return self._checksum

    def facts(self) -> dict[str, Any]:
        """What is in the file."""
        first = next(iter(self.surveys))
        found: dict[str, Any] = {"objects": len(self.rows), "dtype": str(self._file[first]["planes"].dtype)}
        found["redshifts"] = "z" in self._file
        for name, survey in self.surveys.items():
            has = int(np.asarray(self._file[name]["present"]).sum())
            found[name] = (
                f'{",".join(survey.bands)}; {survey.pixels} px of {survey.pixel_scale:g}"; {has} present'
            )
        return found

    def read(self, identifier: str, survey: Survey, ra: float, dec: float) -> Reading:
        """See :class:`~mantis_photoz.cutouts.Source`."""
        own, row = self.surveys.get(survey.name), self.rows.get(identifier)
        if own is None or row is None:
            return absent(survey, ra, dec, f"{survey.name}: not in {self.path.name}")
        if (own.bands, own.pixels, own.pixel_scale) != (survey.bands, survey.pixels, survey.pixel_scale):
            words = (
                f'{survey.name}: packed with {own.pixels} px of {own.pixel_scale:g}", wanted '
                f"{survey.pixels} of {survey.pixel_scale:g}; pack it for this model"
            )
            return absent(survey, ra, dec, words, Flag.BAD_CUTOUT)
        with self._lock, reading(self.path, "is damaged"):
            group = self._file[survey.name]
            planes: NDArray[np.float32] = np.asarray(group["planes"][row], np.float32)
            numbers = [float(number) for number in group["wcs"][row]]
            notes = str(group["notes"].asstr()[row])
            facts = (bool(group["present"][row]), float(group["nan_fraction"][row]), int(group["flags"][row]))
        tan = Tan(
            (numbers[0], numbers[1]),
            (numbers[2], numbers[3]),
            (numbers[4], numbers[5], numbers[6], numbers[7]),
        )
        return Reading(planes, tan, *facts, (notes,) if notes else ())

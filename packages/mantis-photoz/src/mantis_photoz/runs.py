"""Batches of an estimate on disk, so that an interrupted run goes on where it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.atomic import atomic_write
from fusion_core.checkpoint import digest
from fusion_core.errors import InputError, StoreError
from fusion_core.store import Manifest

_HEAD = "run"
Arrays = dict[str, NDArray[Any]]


class Run:
    """The parts of one run beside its output: ``NAME.run/manifest.jsonl`` and one file per batch.

    Args:
        out: the output file; its parts lie in ``NAME.run``, removed by :meth:`remove`.
        fingerprint: what the parts depend on.
        resume: take the parts of an earlier run of the same fingerprint.
        overwrite: throw an earlier run's parts away, and replace ``out``.

    Raises:
        InputError: ``out`` or parts are there without ``resume`` or ``overwrite``, or cannot be written.
        StoreError: ``resume`` meets parts of another run; the message names what differs.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        fingerprint: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        target = Path(out)
        self.folder = target.with_name(f"{target.name}.run")
        if overwrite and not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif target.exists() and not (resume and self.folder.exists()):
            raise InputError(f"--out {target} is there already; pass --overwrite, or name another file")
        elif self.folder.exists() and not resume:
            raise InputError(f"{self.folder} holds an unfinished run; pass --resume to go on or --overwrite")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manifest = Manifest(self.folder / "manifest.jsonl")
            known = self.manifest.entries.get(_HEAD)
            if known is None:
                self.manifest.add(_HEAD, **fingerprint)
        except OSError as error:
            raise InputError(
                f"cannot write {self.folder}: {error.strerror or error}; name a writable place"
            ) from error
        if known is not None and digest(known) != digest(dict(fingerprint)):
            other = [key for key in fingerprint if digest(known.get(key)) != digest(fingerprint[key])]
            raise StoreError(
                f"{self.folder} was made with other {', '.join(other)}; pass --overwrite to begin anew"
            )

    def __contains__(self, part: int) -> bool:
        return str(part) in self.manifest and self._file(part).is_file()

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.npz"

    def add(self, part: int, arrays: Mapping[str, NDArray[Any]], **facts: Any) -> None:
        """Keep a batch; on disk when it returns."""
        with atomic_write(self._file(part)) as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        self.manifest.add(str(part), **facts)

    def load(self, part: int) -> Arrays:
        """The arrays of a batch.

        Raises:
            StoreError: its file is gone or damaged.
        """
        try:
            with np.load(self._file(part), allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise StoreError(f"{self._file(part)} cannot be read ({error}); pass --overwrite") from error

    def facts(self, part: int) -> dict[str, Any]:
        """What was noted with a batch."""
        return self.manifest.entries[str(part)]

    @staticmethod
    def remove(out: str | os.PathLike[str]) -> None:
        """Remove the parts of a run whose output is written."""
        target = Path(out)
        shutil.rmtree(target.with_name(f"{target.name}.run"), ignore_errors=True)

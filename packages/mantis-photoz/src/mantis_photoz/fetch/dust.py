"""Dust maps for E(B-V), fetched by ``dustmaps`` itself, which knows their addresses and checksums."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_core.errors import InputError, require_extra
from mantis_photoz.ebv import maps_folder

MAPS = ("csfd", "planck")


def fetch_dust(folder: str | os.PathLike[str], maps: Sequence[str] = MAPS) -> dict[str, str]:
    """Fetch the maps that are not there yet (some 100 MB to 1.6 GB).

    Args:
        folder: where they go; give it to ``estimate --dust``.
        maps: of :data:`MAPS`.

    Returns:
        map -> ``"ok"``, or what went wrong.

    Raises:
        InputError: an unknown map, or a place that cannot be written.
        MissingExtraError: dustmaps is not installed.
    """
    if unknown := [name for name in maps if name not in MAPS]:
        raise InputError(f"maps are {list(maps)}, {unknown} unknown; wanted some of {', '.join(MAPS)}")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror or error}; name a writable place"
        ) from error
    done: dict[str, str] = {}
    with maps_folder(folder):
        for name in maps:
            module: Any = require_extra(f"dustmaps.{name}", "sky", "mantis-photoz")
            done[name] = _fetched(module)
    return done


def _fetched(module: Any) -> str:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module.fetch()
    except (OSError, ValueError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("dustmaps", "requests"):
            raise
        return " ".join(str(error).split()) or type(error).__name__
    return "ok"

"""E(B-V) of a catalogue: from its columns or from dust maps on disk; never silently 0."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import InputError, require_extra
from mantis_photoz.catalog import Catalog
from mantis_photoz.errors import CatalogError
from mantis_photoz.flags import Flag

_COLUMNS = {
    "csfd": ("ebv_csfd", "csfd", "ebv_sfd", "ebv", "e(b-v)", "e_bv"),
    "planck": ("ebv_planck", "planck", "ebv", "e(b-v)", "e_bv"),
}


def find_ebv(
    catalog: Catalog, given: NDArray[np.floating[Any]] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """E(B-V) by CSFD and by Planck for each object.

    Args:
        catalog: its columns ``ebv_csfd`` and ``ebv_planck`` (or ``ebv`` for both) are taken.
        given: (objects, 2) values instead, such as those of :func:`dust_maps`.

    Returns:
        (objects, 2) magnitudes and flags: ``NO_DUST`` with 0 where a value is missing, ``HIGH_DUST`` above 1.

    Raises:
        CatalogError: a value below 0.
        InputError: ``given`` has another shape.
    """
    count = len(catalog)
    if given is None:
        lower = {name.lower(): name for name in catalog.table.colnames}
        chosen = [next((lower[n] for n in names if n in lower), None) for names in _COLUMNS.values()]
        columns = [np.full(count, np.nan) if name is None else catalog.column(name) for name in chosen]
        # One of the two stands in for the other: they measure the same dust.
        columns = [np.where(np.isnan(own), other, own) for own, other in (columns, columns[::-1])]
        found = np.stack(columns, -1)
    else:
        found = np.asarray(given, np.float64)
        if found.shape != (count, 2):
            raise InputError(f"ebv has shape {found.shape}, wanted ({count}, 2): CSFD and Planck")
    if (found < 0).any():
        row = int(np.argmax((found < 0).any(-1)))
        raise CatalogError(
            f"row {row} ({catalog.ids[row]}): E(B-V) is {found[row].min():g}, wanted magnitudes >= 0"
        )
    lacking = ~np.isfinite(found).all(-1)
    flags = np.where(lacking, int(Flag.NO_DUST), 0) | np.where((found > 1).any(-1), int(Flag.HIGH_DUST), 0)
    return np.where(np.isfinite(found), found, 0.0), flags.astype(np.int64)


def dust_maps(catalog: Catalog, folder: str | os.PathLike[str] | None = None) -> NDArray[np.float64]:
    """E(B-V) by the maps of ``dustmaps`` (extra ``sky``); nothing is fetched.

    Args:
        catalog: positions.
        folder: where the maps are; None = where dustmaps is set to.

    Returns:
        (objects, 2) magnitudes; NaN for a map that is not there.

    Raises:
        MissingExtraError: dustmaps is not installed.
    """
    from astropy.coordinates import SkyCoord

    with maps_folder(folder):
        sky: Any = SkyCoord(catalog.ra, catalog.dec, unit="deg", frame="icrs")
        return np.stack([_query(module, kind, sky) for module, kind in _MAPS], -1)


@contextlib.contextmanager
def maps_folder(folder: str | os.PathLike[str] | None) -> Generator[None, None, None]:
    """Let ``dustmaps`` look into a folder within the block; its own setting would write to the user's home.

    Raises:
        MissingExtraError: dustmaps is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for a configuration file
        config: Any = require_extra("dustmaps.config", "sky", "mantis-photoz").config
    options: dict[str, Any] = config._options
    before = dict(options)
    if folder is not None:
        options["data_dir"] = os.fspath(folder)
    try:
        yield
    finally:
        options.clear()
        options.update(before)


_MAPS = (("dustmaps.csfd", "CSFDQuery"), ("dustmaps.planck", "PlanckQuery"))


def _query(module: str, kind: str, sky: Any) -> NDArray[np.float64]:
    maps: Any = require_extra(module, "sky", "mantis-photoz")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what to download
            return np.asarray(getattr(maps, kind)()(sky), np.float64)
    except OSError:
        return np.full(sky.shape, np.nan)

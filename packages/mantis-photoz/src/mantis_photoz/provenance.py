"""Where an estimate comes from: versions, weights, settings, services and checksums, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.checkpoint import digest
from fusion_core.device import environment
from mantis_photoz.catalog import Catalog
from mantis_photoz.flags import Flag
from mantis_photoz.steps import Options, maps_of, plain_maps

__all__ = ["fingerprint", "provenance"]


def fingerprint(
    photoz: Any, catalog: Catalog, options: Options, prior: Any, only: NDArray[np.bool_]
) -> dict[str, Any]:
    """What the kept batches of a run depend on.

    Args:
        photoz: the :class:`~mantis_photoz.PhotoZ`.
        catalog: of the run.
        options: of the run.
        prior: (bins,) masses, or None.
        only: (surveys,) which take part.
    """
    settings = {name: getattr(options, name) for name in ("tta", "batch_size", "nan", "official", "seed")}
    return {
        "weights": photoz.weights_digest,
        "config": digest(photoz.config.to_dict()),
        "catalogue": digest(list(catalog.ids), catalog.ra, catalog.dec),
        "settings": settings | {"grid": photoz.grid, "dtype": str(photoz.dtype), "surveys": only.tolist()},
        "corrections": digest(
            None if photoz.recalibration is None else plain_maps(photoz.recalibration),
            None if prior is None else np.asarray(prior).tolist(),
        ),
    }


def provenance(
    photoz: Any,
    catalog: Catalog,
    options: Options,
    *,
    source: Any,
    prior: Any,
    checksums: Mapping[str, str],
    columns: Mapping[str, NDArray[Any]],
) -> dict[str, Any]:
    """The record that goes with a result.

    Args:
        photoz: the :class:`~mantis_photoz.PhotoZ`.
        catalog: of the run.
        options: of the run.
        source: of the cutouts.
        prior: (bins,) masses, or None.
        checksums: file -> sha256.
        columns: ``present`` (n, surveys) and ``flags`` (n,) of the run.
    """
    used = [name for k, name in enumerate(photoz.surveys) if columns["present"][:, k].any()]
    kinds = [part.kind for part in maps_of(photoz.recalibration)]
    dust = ["csfd", "planck"] if not (columns["flags"] & int(Flag.NO_DUST)).all() else []
    uses = [*used, *dust, *photoz.uses, *kinds, *(["prior"] if prior is not None else [])]
    return {
        "schema": "mantis.provenance/1",
        "package": "mantis-photoz",
        "version": version("mantis-photoz"),
        "environment": environment(),
        "model": {"name": photoz.name, "digest": photoz.weights_digest},
        "config": photoz.config.to_dict(),
        "settings": {
            **{name: getattr(options, name) for name in Options.__dataclass_fields__ if name != "features"},
            "grid": photoz.grid,
            "dtype": str(photoz.dtype),
            "recalibration": kinds,
            "prior": None if prior is None else np.asarray(prior).tolist(),
        },
        "catalogue": {
            "objects": len(catalog),
            "columns": dict(catalog.columns),
            "digest": digest(list(catalog.ids)),
        },
        "cutouts": str(getattr(source, "path", type(source).__name__)),
        "services": {name: survey.url for name, survey in photoz.surveys.items() if survey.url},
        "files": dict(sorted(checksums.items())),
        "uses": list(dict.fromkeys(uses)),
    }

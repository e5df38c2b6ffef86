"""Step 9 of ``estimate``: recalibration and priors, with the features and files that they ask for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import InputError, reading
from mantis_photoz.errors import ConfigError, DataError
from mantis_photoz.pdf import BinnedPDF


def parts_of(recalibration: Any) -> list[Any]:
    """The maps of a chain, or the one map."""
    return [part for entry in getattr(recalibration, "maps", (recalibration,)) for part in
            ([entry] if not hasattr(entry, "maps") else parts_of(entry))]  # fmt: skip


def features_wanted(recalibration: Any) -> tuple[int, str | None]:
    """How many features a recalibration needs per object, and their source; (0, None) for densities alone."""
    for part in parts_of(recalibration):
        if part.kind == "calpit":
            return int(part.network.features), part.source
        if part.kind == "nearest":
            return int(part.features.shape[-1]), part.source
    return 0, None


def photometric_features(planes: Mapping[str, Tensor], ebv: Tensor) -> NDArray[np.float64]:
    """The features of Cal-PIT, 83 for nine bands: colours, dust, luptitudes of Kron fluxes (extra ``phot``).

    Args:
        planes: survey -> (batch, bands, height, width) flux without NaN.
        ebv: (batch, 2) E(B-V).
    """
    from mantis_photoz.photometry import magnitude_features, measure_batch

    fluxes = measure_batch({name: images.double().cpu().numpy() for name, images in planes.items()}).flux
    return np.asarray(magnitude_features(fluxes, ebv.double().cpu().numpy()), np.float64)


def features_from(
    source: str, hidden: Tensor | None, planes: Mapping[str, Tensor], ebv: Tensor
) -> NDArray[np.float64]:
    """The features of one source, (batch, features).

    Raises:
        ConfigError: another source.
        DataError: the hidden layer of a network that has none.
        MissingExtraError: photometric ones without SEP (extra ``phot``).
    """
    if source == "photometric":
        return photometric_features(planes, ebv)
    if source != "hidden":
        raise ConfigError(f"features are {source!r}, wanted 'photometric' or 'hidden'")
    if hidden is None:
        raise DataError("the network has no hidden layer to take features from; take photometric ones")
    return hidden.double().cpu().numpy()


def choose_features(
    wanted: tuple[int, str | None], hidden: Tensor | None, planes: Mapping[str, Tensor], ebv: Tensor
) -> NDArray[np.float64] | None:
    """The features that a recalibration wants; one that does not name their source gets those that fit.

    Args:
        wanted: of :func:`features_wanted`.
        hidden: (batch, width) of the network's head, if it has one.
        planes: see :func:`photometric_features`.
        ebv: see there.

    Raises:
        DataError: the source has another number of features.
    """
    count, source = wanted
    if not count:
        return None
    if source is None:
        source = "hidden" if hidden is not None and hidden.shape[1] == count else "photometric"
    found = features_from(source, hidden, planes, ebv)
    if found.shape[1] != count:
        has = "none" if hidden is None else hidden.shape[1]
        raise DataError(
            f"the recalibration wants {count} features; {found.shape[1]} are {source}, and the network's "
            f"hidden layer has {has}: fit it for this model"
        )
    return found


def load_prior(path: str | os.PathLike[str], edges: Any) -> NDArray[np.float64]:
    """A redshift distribution as masses in bins.

    Args:
        path: ``.json`` with ``z`` and ``n``; or a table (ECSV, CSV, FITS, Parquet) with ``z`` and ``n``
            (a density at redshifts, taken as linear between them), or ``z`` alone (a sample of redshifts).
        edges: (bins + 1,).

    Returns:
        (bins,) masses that sum to 1.

    Raises:
        InputError: no such columns, or nothing within the bins.
    """
    place = Path(path)
    with reading(f"--prior {place}"):
        z, n = _columns(place)
        if z.ndim != 1 or (n is not None and n.shape != z.shape):
            has = z.shape if n is None else (z.shape, n.shape)
            raise ValueError(f"z and n have the shapes {has}, wanted one number n for each redshift z")
    limits = np.asarray(edges, np.float64)
    if n is None:
        from mantis_photoz.prior import counts_prior

        return np.asarray(counts_prior(torch.from_numpy(z), torch.from_numpy(limits)).numpy())
    order = np.argsort(z)
    z, n = z[order], n[order]
    if len(z) < 2 or not np.isfinite([*z, *n]).all() or (n < 0).any() or (np.diff(z) <= 0).any():
        raise InputError(
            f"--prior {place} holds no density: wanted two or more redshifts z, each once, and n >= 0"
        )
    n = n / max(n.max(), 1e-300)  # sums of it stay finite
    fine = np.unique(np.concatenate([limits, z[(z > limits[0]) & (z < limits[-1])]]))
    height = np.interp(fine, z, n, left=0.0, right=0.0)
    total = np.concatenate([[0.0], np.cumsum(np.diff(fine) * (height[1:] + height[:-1]) / 2)])
    masses = np.diff(np.interp(limits, fine, total))
    if not masses.sum() > 0:
        raise InputError(f"--prior {place} is 0 on the model's redshifts, {limits[0]:g} to {limits[-1]:g}")
    return masses / masses.sum()


def _columns(place: Path) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    if place.suffix == ".json":
        found: Any = json.loads(place.read_text(encoding="utf-8"))
        n = found.get("n")
        return np.asarray(found["z"], np.float64), None if n is None else np.asarray(n, np.float64)
    from mantis_photoz.catalog import read_table

    table = read_table(place)
    if "z" not in table.colnames:
        raise KeyError(f"no column z among {', '.join(table.colnames)}")
    n = np.asarray(table["n"], np.float64) if "n" in table.colnames else None
    return np.asarray(table["z"], np.float64), n


def correct(
    pdf: BinnedPDF,
    *,
    recalibration: Any = None,
    features: Any = None,
    prior: Any = None,
    train_prior: Any = None,
) -> BinnedPDF:
    """Recalibrate, then exchange the prior.

    Args:
        pdf: densities of the network.
        recalibration: of :mod:`mantis_photoz.calibrate`, or None.
        features: that it needs.
        prior: (bins,) masses that the densities shall carry, or None.
        train_prior: (bins,) masses that they carry; flat by default, as the balanced sampler has it.
    """
    if recalibration is not None:
        pdf = recalibration(pdf, features)
    if prior is not None:
        widths = np.diff(np.asarray(pdf.numpy().edges))
        pdf = pdf.reweight(np.asarray(prior), widths if train_prior is None else np.asarray(train_prior))
    return pdf

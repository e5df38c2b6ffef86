"""Fit a recalibration for a model on cutouts with known redshifts: what the verb ``calibrate`` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import ConfigError, InputError
from fusion_core.progress import track
from mantis_photoz import calibrate
from mantis_photoz.calpit import CalPIT
from mantis_photoz.errors import DataError
from mantis_photoz.flags import UNUSABLE
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.samples import blocks
from mantis_photoz.steps import Options, joined

__all__ = [
    "KINDS",
    "CalibrationSet",
    "calibration_set",
    "check_kinds",
    "check_place",
    "feature_source",
    "fit",
    "parse_widths",
    "save",
]

KINDS = ("temperature", "pit", "beta", "nearest", "calpit")
_WITH_FEATURES = {"nearest", "calpit"}


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Densities of a network as it is, with the truth.

    Args:
        pdf: (n) densities without recalibration.
        z: (n,) true redshifts.
        features: (n, features) of ``source``, or None.
        source: of the features.
        left_out: objects without a truth, or without a density that says anything.
    """

    pdf: BinnedPDF
    z: NDArray[np.float64]
    features: NDArray[np.float64] | None
    source: str | None
    left_out: int


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuse kinds that there are not; Cal-PIT stands alone.

    Raises:
        ConfigError: unknown, none, or Cal-PIT with others.
    """
    if not kinds or any(kind not in KINDS for kind in kinds) or ("calpit" in kinds and len(kinds) > 1):
        raise ConfigError(
            f"--kind is {','.join(kinds)!r}, wanted some of {', '.join(KINDS[:-1])}, or calpit alone"
        )


def feature_source(kinds: Sequence[str], wanted: str | None = None) -> str | None:
    """Where the features of these kinds come from.

    Args:
        kinds: of the recalibration.
        wanted: ``"photometric"`` (Kron fluxes, the authors' choice) or ``"hidden"`` (the network's last
            hidden layer). None takes photometric ones for Cal-PIT where SEP is installed (extra ``phot``),
            else the hidden layer.

    Returns:
        The source; None where the kinds need no features.

    Raises:
        ConfigError: another word, or features for kinds that take none.
    """
    takes = bool(_WITH_FEATURES & set(kinds))
    if wanted is not None and (not takes or wanted not in ("photometric", "hidden")):
        raise ConfigError(
            f"--features is {wanted!r} for {','.join(kinds)}, wanted photometric or hidden, and a kind of "
            "nearest or calpit"
        )
    if not takes:
        return None
    return wanted or ("photometric" if "calpit" in kinds and find_spec("sep") is not None else "hidden")


def calibration_set(
    photoz: Any,
    samples: Any,
    *,
    source: str | None = None,
    tta: Any = "none",
    batch_size: int = 64,
    progress: bool | None = None,
) -> CalibrationSet:
    """Densities, features and truths of cutouts, on the very path that ``estimate`` takes.

    Args:
        photoz: a :class:`~mantis_photoz.PhotoZ` without recalibration.
        samples: :class:`~mantis_photoz.cutouts.Cutouts` with redshifts.
        source: of features, see :func:`feature_source`.
        tta: views, as in ``estimate``.
        batch_size: objects per forward pass.
        progress: a bar on stderr; None decides by the terminal.

    Raises:
        DataError: no object with a truth and a density.
    """
    if photoz.recalibration is not None:
        raise ConfigError("the model has a recalibration already; load it with recalibration=False")
    options = Options(tta=tta, batch_size=batch_size, features=source)
    parts = list[dict[str, NDArray[Any]]]()
    for rows in track(blocks(len(samples), batch_size), "calibrating", enabled=progress):
        parts.append(photoz.predict(samples.batch(rows), options))
    columns = joined(parts, photoz.config.bins, len(photoz.surveys))
    z = np.asarray(np.full(len(samples), np.nan) if samples.z is None else samples.z, np.float64)
    good = np.isfinite(z) & (columns["flags"] & int(UNUSABLE) == 0)
    if not good.any():
        raise DataError(f"none of {len(samples)} objects has a redshift and cutouts to calibrate with")
    pdf = BinnedPDF(photoz.edges.numpy(), columns["pmf"][good], photoz.nodes.numpy())
    features = None if source is None else np.concatenate([part["features"] for part in parts])[good]
    return CalibrationSet(pdf, z[good], features, source, int((~good).sum()))


def fit(
    data: CalibrationSet,
    kinds: Sequence[str],
    *,
    epochs: int = 100,
    hidden: Sequence[int] = (128, 128, 128),
    seed: int = 0,
    progress: bool | None = None,
) -> Any:
    """Fit the kinds in turn; see :func:`mantis_photoz.calibrate.fit` and :meth:`CalPIT.fit`.

    Args:
        data: of :func:`calibration_set`.
        kinds: of :data:`KINDS`.
        epochs: of Cal-PIT, at most.
        hidden: widths of Cal-PIT's network; the authors' are four of 1024.
        seed: of Cal-PIT.
        progress: a bar on stderr; None decides by the terminal.

    Raises:
        ConfigError: see :func:`check_kinds`.
        DataError: too few objects, or features that do not fit.
    """
    check_kinds(kinds)
    given: Any = data.features
    if "calpit" in kinds:
        source: Any = data.source
        return CalPIT.fit(
            data.pdf, data.z, given, hidden=hidden, epochs=epochs, source=source, seed=seed, progress=progress
        )
    near = {"features": given, "neighbours": max(2, min(200, len(data.z) // 4)), "source": data.source}
    return calibrate.fit(data.pdf, data.z, kinds, nearest=near)


def parse_widths(text: str) -> tuple[int, ...]:
    """Widths by commas.

    Raises:
        ConfigError: not one or more numbers above 0.

    Example:
        >>> parse_widths("64,32")
        (64, 32)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--hidden is {text!r}, wanted widths such as 128,128")
    return tuple(map(int, parts))


def check_place(path: str | os.PathLike[str], kinds: Sequence[str]) -> None:
    """Refuse a file that the kinds cannot be kept in.

    Raises:
        InputError: another suffix.
    """
    wanted = ".safetensors" if "calpit" in kinds else ".json"
    if Path(path).suffix != wanted:
        raise InputError(f"--out is {path}, wanted a {wanted} file for {','.join(kinds)}")


def save(recalibration: Any, path: str | os.PathLike[str], **facts: Any) -> None:
    """Write a recalibration with facts about its split, whole or not at all."""
    if recalibration.kind == "calpit":
        recalibration.save(path, **facts)
    else:
        calibrate.save(recalibration, path, **facts)

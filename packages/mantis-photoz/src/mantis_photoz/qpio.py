"""Densities to and from ``qp``, the field's exchange format (extra ``qp``)."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusion_core.atomic import atomic_write
from fusion_core.errors import ConfigError, InputError, reading, require_extra
from mantis_photoz.pdf import BinnedPDF

QUANTILES = 101


def _qp() -> Any:
    require_extra("tables_io", "qp", "mantis-photoz")
    return require_extra("qp", "qp", "mantis-photoz")


def to_qp(
    pdf: BinnedPDF, kind: Literal["hist", "interp", "quant"] = "hist", ancil: Mapping[str, Any] | None = None
) -> Any:
    """A ``qp.Ensemble`` of the densities.

    Args:
        pdf: the densities.
        kind: ``"hist"`` keeps them exactly; ``"interp"`` is linear between the middles of the bins;
            ``"quant"`` holds 101 quantiles.
        ancil: columns that go with them, (objects,) each.

    Returns:
        The ensemble. A histogram of qp takes densities, not masses: with bins of unequal width (the training
        grid's first is half as wide) the two differ. qp 1.1 takes all bins for equally wide in ``mean()`` and
        ``std()`` of a histogram, though not in its CDF: use ``ancil``'s ``z_mean``, or
        :meth:`BinnedPDF.rebin` to even bins first.

    Raises:
        ConfigError: another kind.
        MissingExtraError: qp is not installed.
    """
    qp, numbers = _qp(), pdf.numpy()
    columns = {name: _plain(values) for name, values in (ancil or {}).items()} or None
    if kind == "hist":
        data = {"bins": np.asarray(numbers.edges), "pdfs": np.asarray(numbers.density)}
        return qp.Ensemble(qp.hist, data=data, ancil=columns)
    if kind == "interp":
        edges, middles = np.asarray(numbers.edges), np.asarray(numbers.midpoints)
        places = np.concatenate([edges[:1], middles, edges[-1:]])
        heights = np.asarray(numbers.density)
        values = np.concatenate([heights[:, :1], heights, heights[:, -1:]], -1)
        return qp.Ensemble(qp.interp, data={"xvals": places, "yvals": values}, ancil=columns)
    if kind == "quant":
        levels = np.linspace(0.0, 1.0, QUANTILES)
        return qp.Ensemble(qp.quant, data={"quants": levels, "locs": numbers.ppf(levels)}, ancil=columns)
    raise ConfigError(f"kind is {kind!r}, wanted 'hist', 'interp' or 'quant'")


def _plain(values: Any) -> NDArray[Any]:
    found = np.asarray(values)
    return np.char.encode(found, "utf-8") if found.dtype.kind == "U" else found  # HDF5 knows no fixed unicode


def from_qp(ensemble: Any, edges: Any = None) -> BinnedPDF:
    """Densities on bins from a ``qp.Ensemble``.

    Args:
        ensemble: of any kind.
        edges: (bins + 1,) for those that have no bins, or other bins: masses are differences of the CDF.

    Raises:
        InputError: no ensemble, or one without bins and no ``edges``.
    """
    if not hasattr(ensemble, "metadata") or not hasattr(ensemble, "cdf"):
        raise InputError(f"ensemble is a {type(ensemble).__name__}, wanted a qp.Ensemble")
    own = ensemble.metadata.get("bins")
    if own is not None:
        limits = np.asarray(own, np.float64).reshape(-1)
        heights = np.asarray(ensemble.objdata["pdfs"], np.float64).reshape(-1, len(limits) - 1)
        masses = heights * np.diff(limits)
        found = BinnedPDF(limits, masses / masses.sum(-1, keepdims=True), nodes_of(limits))
        return found if edges is None else found.rebin(np.asarray(edges, np.float64))
    if edges is None:
        raise InputError("the ensemble has no bins of its own; pass edges")
    limits = np.asarray(edges, np.float64)
    steps = np.atleast_2d(np.asarray(ensemble.cdf(limits), np.float64))
    masses = np.clip(np.diff(steps, axis=-1), 0.0, None)
    return BinnedPDF(limits, masses / masses.sum(-1, keepdims=True))


def nodes_of(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nodes of bins: their middles, and 0 for the half bin that the training grid begins with.

    Example:
        >>> nodes_of(np.array([0.0, 0.1, 0.3, 0.5])).round(9).tolist()
        [0.0, 0.2, 0.4]
    """
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    half = len(widths) > 1 and edges[0] == 0 and abs(2 * widths[0] - widths[1]) < 1e-9 * widths[1]
    if half:
        middles[0] = 0.0
    return middles


def write_qp(pdf: BinnedPDF, path: str | os.PathLike[str], ancil: Mapping[str, Any] | None = None) -> None:
    """Write a qp histogram file (HDF5), whole or not at all.

    Raises:
        InputError: another suffix, or a place that cannot be written.
        MissingExtraError: qp is not installed.
    """
    target = Path(path)
    check_pdf_suffix(target)
    ensemble = to_qp(pdf, "hist", ancil)
    with atomic_write(target) as file, tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "pdf.hdf5"
        with contextlib.redirect_stdout(io.StringIO()):
            ensemble.write_to(str(place))
        with place.open("rb") as written:
            shutil.copyfileobj(written, file)


def check_pdf_suffix(path: Path) -> None:
    """Refuse what is no HDF5 file's name, before any work."""
    if path.suffix not in (".hdf5", ".h5"):
        raise InputError(f"--pdf is {str(path)!r}, wanted a file in .hdf5")
    _qp()


def read_qp(path: str | os.PathLike[str], edges: Any = None) -> tuple[BinnedPDF, dict[str, NDArray[Any]]]:
    """Densities and their columns from a qp file.

    Raises:
        InputError: no such file, or none of qp.
        MissingExtraError: qp is not installed.
    """
    qp = _qp()
    with (
        reading(path, "is no qp file"),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore"),  # densities are checked here
    ):
        ensemble = qp.read(str(path))
        return from_qp(ensemble, edges), dict(ensemble.ancil or {})

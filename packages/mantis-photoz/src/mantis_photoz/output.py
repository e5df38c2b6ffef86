"""What ``estimate`` returns and writes: a table with units and words, densities, and their origin."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusion_core.atomic import atomic_write
from fusion_core.errors import ConfigError, InputError, reading, require_extra
from fusion_core.results import dump_json
from mantis_photoz.catalog import Catalog
from mantis_photoz.flags import UNUSABLE, describe, legend
from mantis_photoz.pdf import BinnedPDF

if TYPE_CHECKING:
    from astropy.table import Table

SUFFIXES = (".ecsv", ".fits", ".parquet")
PMF = "pmf"
DESCRIPTIONS = {
    "id": "identifier of the object",
    "ra": "right ascension, ICRS",
    "dec": "declination, ICRS",
    "z_mean": "mean of p(z)",
    "z_mode": "redshift of the largest density of p(z), the lowest on ties",
    "z_median": "median of p(z)",
    "z_best": "redshift of least expected loss (Tanaka et al. 2018)",
    "z_q025": "2.5 % quantile of p(z)",
    "z_q16": "16 % quantile of p(z)",
    "z_q84": "84 % quantile of p(z)",
    "z_q975": "97.5 % quantile of p(z)",
    "z_std": "standard deviation of p(z)",
    "odds": "probability within 0.06 (1 + z_mode) of z_mode",
    "n_peaks": "number of peaks of p(z)",
    "entropy": "entropy of the masses of p(z), nats",
    "p_outlier": "probability outside of 0.15 (1 + z_median) about z_median",
    "z_spread": "standard deviation of z_mean over the views of the same cutouts",
    "ood": "rank among the training objects by distance from them; 1 = stranger than all of them",
    "flags_text": "the flags in words",
    "notes": "what was wrong with files, in words",
    "model": "model that made the estimate",
}
_RAIL = {"z_mode": "zmode", "z_mean": "zmean", "z_median": "zmedian", "z_std": "zstd", "id": "object_id"}


@dataclass(frozen=True, slots=True)
class PhotoZResult:
    """Redshift densities of a catalogue, row by row in its order.

    Args:
        table: one row per object of the catalogue; every column has a description and, where it has one, a
            unit.
        pdf: the densities.
        provenance: versions, weights, settings, services and checksums of all files that were read.
        stages: seconds and objects of each stage, for :meth:`throughput`.
    """

    table: Table
    pdf: BinnedPDF
    provenance: dict[str, Any]
    stages: dict[str, float] = field(default_factory=dict[str, float])

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"PhotoZResult({len(self)} objects, {self.pdf.bins} bins, {self.flagged} flagged)"

    @property
    def flagged(self) -> int:
        """Objects with any flag."""
        return int((np.asarray(self.table["flags"]) != 0).sum())

    @property
    def failed(self) -> int:
        """Objects whose density says nothing (no images, or no finite logits)."""
        return int((np.asarray(self.table["flags"]) & int(UNUSABLE) != 0).sum())

    def throughput(self) -> dict[str, Any]:
        """Objects per second of each stage, the slowest one, and the network's share of the wall time.

        Stages overlap: what is read ahead while the network runs costs no wall time.
        """
        seconds = {name: value for name, value in self.stages.items() if name not in ("wall", "objects")}
        count, wall = self.stages.get("objects", 0.0), self.stages.get("wall", 0.0)
        rates = {name: count / value if value > 0 else None for name, value in seconds.items()}
        return {
            "objects_per_s": rates,
            "bottleneck": max(seconds, key=lambda name: seconds[name]) if count else None,
            "network_share": seconds.get("network", 0.0) / wall if wall > 0 else None,
            "wall_s": wall,
        }

    def summary(self) -> dict[str, Any]:
        """Counts and rates, as ``--json`` prints them."""
        return {"objects": len(self), "flagged": self.flagged, "failed": self.failed, **self.throughput()}

    def to_dict(self) -> dict[str, Any]:
        """The summary and the provenance; the table and the densities have files of their own."""
        return {**self.summary(), "provenance": self.provenance}

    def to_qp(self, kind: Literal["hist", "interp", "quant"] = "hist") -> Any:
        """The densities as a ``qp.Ensemble`` with point estimates and flags as ``ancil`` (extra ``qp``)."""
        return self.pdf.to_qp(kind, self._ancil())

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        pdf: str | os.PathLike[str] | None = None,
        columns: Literal["own", "rail"] = "own",
        pmf_dtype: Literal["float32", "float16"] = "float32",
    ) -> list[Path]:
        """Write the table, the densities and the provenance, each whole or not at all.

        Args:
            path: ``.ecsv``, ``.fits`` or ``.parquet`` (with the masses, as lists of fixed length).
                The provenance goes beside it, as ``NAME.provenance.json``.
            pdf: ``.hdf5`` file of qp's histogram for the densities.
            columns: ``"rail"`` names the columns as RAIL does.
            pmf_dtype: of the masses in Parquet.

        Returns:
            The files.

        Raises:
            InputError: another suffix, or a place that cannot be written.
            MissingExtraError: pyarrow or qp is not installed.
        """
        target = Path(path)
        check_suffix(target)
        written = [target]
        write_table(self._shown(columns), target, self.pdf, self.provenance, pmf_dtype=pmf_dtype)
        if pdf is not None:
            self.save_pdf(pdf)
            written.append(Path(pdf))
        beside = provenance_file(target)
        with atomic_write(beside, "w") as file:
            file.write(dump_json(self.provenance))
        return [*written, beside]

    def save_pdf(self, path: str | os.PathLike[str]) -> None:
        """Write the densities alone, as ``pdf`` of :meth:`save`."""
        from mantis_photoz.qpio import write_qp

        write_qp(self.pdf, path, self._ancil())

    def _ancil(self) -> dict[str, NDArray[Any]]:
        return {
            name: np.asarray(self.table[name]) for name in ("id", "z_mode", "z_mean", "z_median", "flags")
        }

    def _shown(self, columns: str) -> Table:
        if columns not in ("own", "rail"):
            raise ConfigError(f"columns is {columns!r}, wanted 'own' or 'rail'")
        return rail_columns(self.table) if columns == "rail" else self.table


def check_suffix(path: Path) -> None:
    """Refuse a table format that cannot be written, before any work.

    Raises:
        InputError: another suffix.
        MissingExtraError: Parquet without pyarrow.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"--out is {str(path)!r}, wanted a file in {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        require_extra("pyarrow.parquet", "parquet", "mantis-photoz")


def provenance_file(path: Path) -> Path:
    """Where the provenance of a table lies."""
    return path.with_name(f"{path.stem}.provenance.json")


def build_table(
    catalog: Catalog,
    pdf: BinnedPDF,
    columns: Mapping[str, NDArray[Any]],
    surveys: tuple[str, ...],
    *,
    official: bool = False,
    model: str = "",
) -> Table:
    """The output table: identifiers, estimates, reasons, then the catalogue's other columns.

    Args:
        catalog: whose rows these are.
        pdf: their densities.
        columns: ``present`` (n, surveys), ``nan_fraction`` likewise, ``flags``, ``notes``, and where known
            ``ood`` and ``z_spread``.
        surveys: names, in the order of ``present``.
        official: summaries with the masses at the nodes.
        model: name of the model.
    """
    from astropy.table import Column, Table

    count, numbers = len(catalog), pdf.numpy()
    made: dict[str, Any] = {"id": np.asarray(catalog.ids, dtype=str), "ra": catalog.ra, "dec": catalog.dec}
    made |= numbers.summaries(official=official)
    made["n_peaks"] = np.asarray(made["n_peaks"]).astype(np.int64)
    if "z_spread" in columns:
        made["z_spread"] = columns["z_spread"]
    made["ood"] = columns.get("ood", np.full(count, np.nan))
    present = np.asarray(columns["present"], bool).reshape(count, len(surveys))
    made["survey_mask"] = (present << np.arange(len(surveys))).sum(-1).astype(np.int64)
    for number, name in enumerate(surveys):
        made[f"nan_frac_{name}"] = np.asarray(columns["nan_fraction"])[:, number].astype(np.float32)
    flags = np.asarray(columns["flags"], np.int64)
    missing = [[name for name, has in zip(surveys, row, strict=True) if not has] for row in present]
    made["flags"] = flags
    words = [describe(int(value), gone) for value, gone in zip(flags, missing, strict=True)]
    made["flags_text"] = _texts(words)
    made["notes"] = _texts(list(columns["notes"]))
    made["model"] = _texts([model] * count)
    told = {
        **DESCRIPTIONS,
        "survey_mask": "surveys with data: "
        + ", ".join(f"{1 << k} {name}" for k, name in enumerate(surveys)),
        "flags": legend(),
        **{f"nan_frac_{name}": f"largest share of NaN pixels among the planes of {name}" for name in surveys},
    }
    table = Table()
    for name, values in made.items():
        unit = "deg" if name in ("ra", "dec") else None
        table[name] = Column(np.asarray(values), description=told.get(name, ""), unit=unit)
    own = set(catalog.columns.values())
    for name in catalog.table.colnames:
        if name not in own:
            table[f"{name}_input" if name in made else name] = catalog.table[name]
    return table


def _texts(words: list[str]) -> NDArray[Any]:
    return np.asarray(words, dtype=str) if words else np.zeros(0, "U1")


def rail_columns(table: Table) -> Table:
    """The table under RAIL's column names; quantiles keep ours (RAIL's ``z_q84`` is at 0.85)."""
    found = table.copy(copy_data=False)
    for ours, theirs in _RAIL.items():
        if theirs in found.colnames:
            found.rename_column(theirs, f"{theirs}_input")
        found.rename_column(ours, theirs)
    return found


def write_table(
    table: Table,
    path: Path,
    pdf: BinnedPDF | None = None,
    provenance: Mapping[str, Any] | None = None,
    *,
    pmf_dtype: str = "float32",
) -> None:
    """Write a table by its suffix, whole or not at all."""
    if path.suffix == ".parquet":
        _write_parquet(table, path, pdf, provenance or {}, pmf_dtype)
        return
    if path.suffix == ".ecsv":
        text = io.StringIO()
        table.write(text, format="ascii.ecsv")
        with atomic_write(path, "w") as file:
            file.write(text.getvalue())
        return
    with atomic_write(path) as file:
        file.write(_fits_bytes(table))


def _fits_bytes(table: Table) -> bytes:
    from astropy.io import fits

    plain: Any = table.copy()
    for name in plain.colnames:
        if plain[name].dtype.kind == "U" and len(plain) == 0:
            plain[name] = plain[name].astype("U1")
    unit: Any = fits.table_to_hdu(plain)
    for number, name in enumerate(plain.colnames, 1):
        words = str(plain[name].info.description or "")
        if words:
            unit.header[f"TCOMM{number}"] = words
    unit.name = "PHOTOZ"
    buffer = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), unit]).writeto(buffer)
    return buffer.getvalue()


def _write_parquet(
    table: Table, path: Path, pdf: BinnedPDF | None, provenance: Mapping[str, Any], pmf_dtype: str
) -> None:
    arrow: Any = require_extra("pyarrow", "parquet", "mantis-photoz")
    parquet: Any = require_extra("pyarrow.parquet", "parquet", "mantis-photoz")
    if pmf_dtype not in ("float32", "float16"):
        raise ConfigError(f"pmf_dtype is {pmf_dtype!r}, wanted 'float32' or 'float16'")
    arrays: list[Any] = []
    fields: list[Any] = []
    for name in table.colnames:
        column: Any = table[name]
        values = np.ma.asarray(getattr(column, "value", column))
        mask = np.ma.getmaskarray(values)
        data = np.asarray(values.filled() if mask.any() else values.data)
        if data.ndim > 1:
            array = arrow.array(data.tolist())
        else:
            native = (
                data.astype(data.dtype.newbyteorder("=")) if data.dtype.kind in "iufb" else data.astype(str)
            )
            array = arrow.array(native.tolist() if native.dtype.kind == "U" else native, mask=mask)
        words = {"description": str(column.info.description or ""), "unit": str(column.info.unit or "")}
        arrays.append(array)
        fields.append(arrow.field(name, array.type, metadata={k: v for k, v in words.items() if v}))
    if pdf is not None:
        masses = np.asarray(pdf.numpy().pmf, pmf_dtype)
        kind = {"float32": arrow.float32, "float16": arrow.float16}[pmf_dtype]()
        flat = arrow.array(masses.reshape(-1), type=kind)
        arrays.append(arrow.FixedSizeListArray.from_arrays(flat, masses.shape[1]))
        edges = json.dumps(np.asarray(pdf.numpy().edges).tolist())
        nodes = json.dumps(np.asarray(pdf.numpy().nodes).tolist())
        told = {"description": "masses of p(z) in bins", "edges": edges, "nodes": nodes}
        fields.append(arrow.field(PMF, arrays[-1].type, metadata=told))
    schema = arrow.schema(fields, metadata={"mantis_photoz": dump_json(provenance)})
    with atomic_write(path) as file:
        parquet.write_table(arrow.Table.from_arrays(arrays, schema=schema), file)


def read_pdf(path: str | os.PathLike[str]) -> BinnedPDF:
    """The densities in a Parquet table that :meth:`PhotoZResult.save` wrote.

    Raises:
        InputError: no such table.
    """
    parquet: Any = require_extra("pyarrow.parquet", "parquet", "mantis-photoz")
    with reading(path, "holds no densities"):
        found = parquet.read_table(path, columns=[PMF])
        told = found.schema.field(PMF).metadata
        column = found.column(PMF).combine_chunks()
        edges, nodes = (np.array(json.loads(told[name])) for name in (b"edges", b"nodes"))
        return BinnedPDF(
            edges, np.asarray(column.flatten(), np.float64).reshape(len(column), len(nodes)), nodes
        )

"""The estimator plug-in of RAIL: inform and estimate stages around :class:`~mantis_photoz.PhotoZ`.

RAIL (``pz-rail-base``) brings its own stage classes. Where it is installed the two stages derive from its
``CatInformer`` and ``CatEstimator``; :func:`make_stages` builds them from any pair of base classes with the
same interface, which is how the tests run without RAIL.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusion_core.errors import InputError, require_extra
from mantis_photoz.qpio import to_qp

OPTIONS: Mapping[str, tuple[type, Any, str]] = {
    "cutout_root": (str, "", "directory of FITS cutouts, or packed .h5"),
    "id_col": (str, "object_id", "column of identifiers"),
    "ra_col": (str, "ra", "column of right ascensions, degrees"),
    "dec_col": (str, "dec", "column of declinations, degrees"),
    "batch_size": (int, 64, "objects per forward pass"),
    "device": (str, "auto", "auto, cpu, cuda or mps"),
    "tta": (str, "none", "none, d4 or a number of views"),
    "prior": (str, "", "file of n(z) that the densities shall carry; empty for none"),
}
"""Settings beyond RAIL's own: name -> type, default, meaning."""


def columns_of(data: Mapping[str, Any], group: str = "") -> Mapping[str, Any]:
    """The columns of a chunk, out of their HDF5 group where they are in one."""
    return data[group] if group and group in data else data


def chunk_table(data: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Identifiers and positions of a chunk, for ``estimate``.

    Raises:
        InputError: a column is missing; the message lists what there is.
    """
    names = {"id": config.id_col, "ra": config.ra_col, "dec": config.dec_col}
    if missing := [name for name in names.values() if name not in data]:
        raise InputError(f"the input has no columns {missing}; it has {', '.join(map(str, data))}")
    table = {ours: np.asarray(data[theirs]) for ours, theirs in names.items()}
    if table["id"].dtype.kind == "S":
        table["id"] = np.char.decode(table["id"], "utf-8")
    lower = {str(name).lower(): name for name in data}
    return table | {
        name: np.asarray(data[lower[name]]) for name in ("ebv_csfd", "ebv_planck", "ebv") if name in lower
    }


def make_stages(informer: type, estimator: type, parameter: Any, kinds: Any) -> tuple[type, type]:
    """The two stages on given base classes.

    Args:
        informer: as ``rail.estimation.informer.CatInformer``.
        estimator: as ``rail.estimation.estimator.CatEstimator``.
        parameter: as ``ceci.config.StageParameter``: called with type, default and ``msg``.
        kinds: as ``rail.core.enums.DistributionType``: has ``ad_hoc`` and ``posterior``.

    Returns:
        ``MantisInformer`` and ``MantisEstimator``.
    """
    base_informer: Any = informer
    base_estimator: Any = estimator
    own = {name: parameter(kind, default, msg=words) for name, (kind, default, words) in OPTIONS.items()}

    class MantisInformer(base_informer):
        """Names the model's folder to the estimator; ``mantis-photoz train`` trains the network."""

        name = "MantisInformer"
        config_options = {  # noqa: RUF012 - RAIL's own form
            **base_informer.config_options,
            "model_folder": parameter(str, "", msg="folder of config.json and model.safetensors"),
        }

        def run(self) -> None:
            """Put the folder's name into the model handle."""
            if not self.config.model_folder:
                raise InputError("model_folder is empty, wanted a folder of mantis-photoz train")
            self.model = {"mantis_photoz": str(self.config.model_folder)}
            self.add_data("model", self.model)

    class MantisEstimator(base_estimator):
        """Densities from cutouts, chunk by chunk."""

        name = "MantisEstimator"
        config_options = {**own, **base_estimator.config_options}  # noqa: RUF012 - RAIL's own form

        def open_model(self, *tag: str, **options: Any) -> Any:
            """Load the network once per process."""
            from mantis_photoz.corrections import load_prior
            from mantis_photoz.estimate import PhotoZ

            super().open_model(*tag, **options)
            found = self.model
            if not (isinstance(found, Mapping) and "mantis_photoz" in found):
                raise InputError("the model is none of MantisInformer; run that stage first")
            self.photoz = PhotoZ.from_pretrained(found["mantis_photoz"], device=self.config.device)
            prior = str(self.config.prior)
            self.prior = load_prior(prior, self.photoz.edges.numpy()) if prior else None
            return found

        def default_distribution_type(self) -> Any:
            """What RAIL calls these densities: a posterior where a prior was put in."""
            return kinds.posterior if str(self.config.prior) else kinds.ad_hoc

        def _process_chunk(self, start: int, end: int, data: Mapping[str, Any], first: bool) -> None:
            columns = columns_of(data, str(getattr(self.config, "hdf5_groupname", "") or ""))
            tta: Any = str(self.config.tta)
            found = self.photoz.estimate(
                chunk_table(columns, self.config),
                self.config.cutout_root,
                tta=int(tta) if tta.isdecimal() else tta,
                batch_size=self.config.batch_size,
                prior=self.prior,
                progress=False,
            )
            pdf = found.pdf
            limits: list[Any] = [getattr(self.config, name, None) for name in ("zmin", "zmax", "nzbins")]
            if None not in limits:
                edges = np.linspace(float(limits[0]), float(limits[1]), int(limits[2]) + 1)
                if edges[0] <= pdf.edges[0] and edges[-1] >= pdf.edges[-1]:  # else mass would be lost
                    pdf = pdf.rebin(edges)
            names = {"zmode": "z_mode", "zmean": "z_mean", "zmedian": "z_median", "flags": "flags"}
            ensemble = to_qp(
                pdf, "hist", {theirs: np.asarray(found.table[ours]) for theirs, ours in names.items()}
            )
            self._do_chunk_output(ensemble, start, end, first, data=columns)

        def _calculate_summary_stats(self, qp_dstn: Any) -> Any:
            """RAIL's, but for ``z_q84`` (at 0.85 there), and for chunks of one, where it gives scalars."""
            found = super()._calculate_summary_stats(qp_dstn)
            found.ancil["z_q84"] = np.asarray(found.ppf(0.84)).reshape(-1, 1)
            found.ancil.update({name: np.atleast_1d(values) for name, values in found.ancil.items()})
            return found

    for stage in (MantisInformer, MantisEstimator):
        stage.__qualname__ = stage.__name__
    return MantisInformer, MantisEstimator


def __getattr__(name: str) -> Any:
    if name not in ("MantisInformer", "MantisEstimator"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_extra("rail.estimation.estimator", "rail", "mantis-photoz")
    places = {
        "CatInformer": "rail.estimation.informer",
        "CatEstimator": "rail.estimation.estimator",
        "StageParameter": "ceci.config",
        "DistributionType": "rail.core.enums",
    }
    parts = [getattr(importlib.import_module(module), part) for part, module in places.items()]
    made: dict[str, Any] = dict(zip(("MantisInformer", "MantisEstimator"), make_stages(*parts), strict=True))
    globals().update(made)
    return made[name]

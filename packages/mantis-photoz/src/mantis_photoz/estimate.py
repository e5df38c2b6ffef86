"""``PhotoZ``: from a catalogue and cutouts to calibrated densities, in batches, losing no object."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.checkpoint import digest_state
from fusion_core.device import autocast, resolve_device, resolve_dtype, synchronize
from fusion_core.errors import ConfigError
from fusion_core.modules import untouched
from mantis_photoz import inputs, views
from mantis_photoz.ahead import read_ahead
from mantis_photoz.catalog import read_catalog
from mantis_photoz.corrections import choose_features, correct, features_from, features_wanted
from mantis_photoz.cutouts import CutoutBatch, Cutouts, open_source
from mantis_photoz.flags import Flag
from mantis_photoz.grid import bin_edges, grid_nodes, training_edges
from mantis_photoz.nans import NanPolicy
from mantis_photoz.output import PhotoZResult, build_table
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.provenance import fingerprint, provenance
from mantis_photoz.runs import Run
from mantis_photoz.samples import blocks
from mantis_photoz.steps import (
    Clock,
    Grid,
    Options,
    Prepared,
    Tta,
    chosen,
    joined,
    restricted,
    take_checksums,
)
from mantis_photoz.surveys import SURVEYS, Survey
from mantis_photoz.views import center_crop

if TYPE_CHECKING:
    from mantis_photoz.band_use import BandUse
    from mantis_photoz.report import Evaluation


class PhotoZ:
    """A network with its redshift grid, recalibration, prior and memory of its training set.

    Args:
        model: of :mod:`mantis_photoz.fusion`, or any module with a ``config`` that is called alike.
        name: for the output.
        device: where it runs.
        dtype: that it computes in; densities are float64 whatever it is.
        recalibration: of :mod:`mantis_photoz.calibrate`.
        train_prior: (bins,) masses that the network learned; flat in redshift by default.
        ood: :class:`~mantis_photoz.ood.OutOfDistribution` of the hidden layer.
        grid: ``"official-infer"`` repeats the authors' redshift grid (bug B1).
        registry: bands and scalings by survey.
        uses: words for :func:`~mantis_photoz.citations`.

    Raises:
        ConfigError: a survey that the registry does not have.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str = "",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        recalibration: Any = None,
        train_prior: Any = None,
        ood: Any = None,
        grid: Grid = "training",
        registry: Mapping[str, Survey] = SURVEYS,
        uses: Sequence[str] = (),
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.model = model.to(self.device).eval()
        self.config = model.config
        self.name = name or type(model).__name__
        self.recalibration, self.train_prior, self.ood = recalibration, train_prior, ood
        self.registry, self.uses = registry, tuple(uses)
        self.surveys = inputs.surveys_of(self.config, registry)
        self.nodes = grid_nodes(self.config.bins, self.config.z_max, grid=grid).double()
        training = grid == "training"
        edges = training_edges(self.config.bins, self.config.z_max) if training else bin_edges(self.nodes)
        self.edges, self.grid = edges.double(), grid

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        recalibration: Any = None,
        grid: Grid = "training",
    ) -> PhotoZ:
        """A model by folder, by the name of one that ships, or by its name on the hub.

        Args:
            name: holds ``config.json`` and ``model.safetensors``; ``recalibration.json``, ``ood.safetensors``
                and ``prior.json`` beside them are taken too.
            device: see :class:`PhotoZ`.
            dtype: see :class:`PhotoZ`.
            recalibration: instead of the model's own: a map, a file, or False for none.
            grid: see :class:`PhotoZ`.

        Raises:
            CheckpointError: no such model, or broken files.
        """
        from mantis_photoz.loading import load_parts

        found = load_parts(name, recalibration)
        return cls(**found, device=device, dtype=dtype, grid=grid)

    @functools.cached_property
    def weights_digest(self) -> str:
        """Sha256 of the weights, whatever the file that they came from."""
        return digest_state(self.model.state_dict())

    @torch.no_grad()
    def predict(
        self,
        batch: CutoutBatch,
        options: Options | None = None,
        *,
        prior: Any = None,
        clock: Clock | None = None,
        ready: Prepared | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Densities of one batch of cutouts, with flags (steps 5 to 10).

        Args:
            batch: of :meth:`mantis_photoz.cutouts.Cutouts.batch`.
            options: see :meth:`estimate`.
            prior: (bins,) masses that the densities shall carry.
            clock: gets the seconds.
            ready: of :meth:`prepare`, where that was done before.

        Returns:
            ``pmf`` (batch, bins) float64, ``flags``, ``ood``, ``z_spread``, ``present``, ``nan_fraction``,
            ``notes``, and ``features`` where the options ask for them.
        """
        choice, timer = options or Options(), clock or Clock()
        start = time.perf_counter()
        made = ready or self.prepare(batch, choice)
        planes = made.planes
        start = timer.add("prepare", start)
        masses: list[Tensor] = []
        hidden: Tensor | None = None
        bad = torch.zeros(len(batch), dtype=torch.bool)
        ebv, present = batch.ebv.to(self.device), batch.present.to(self.device)
        for number, images in enumerate(self._views(made, batch, choice)):
            start = timer.add("prepare", start)
            logits, layer = self._forward(images, ebv, present)
            good = torch.isfinite(logits).all(-1)
            bad |= ~good.cpu()
            masses.append(torch.softmax(torch.where(good[:, None], logits, 0.0), -1).cpu())
            hidden = layer if number == 0 else hidden
            start = timer.add("network", start)
        pmf = torch.stack(masses).mean(0)
        failed = bad | ~batch.present.any(-1)
        widths = self.edges.diff()
        pmf = torch.where(failed[:, None], widths / widths.sum(), pmf / pmf.sum(-1, keepdim=True))
        flags = batch.flags | np.where(bad.numpy(), int(Flag.FAILED), 0)
        pdf = self._corrected(pmf, hidden, planes, batch, prior, ~failed)
        rank = np.full(len(batch), np.nan)
        if self.ood is not None and hidden is not None and len(batch):
            safe = torch.where(torch.isfinite(hidden), hidden, 0.0).double().cpu()
            score, strange = self.ood(safe)
            usable = ~failed.numpy()
            rank[usable] = score.numpy()[usable]
            flags = flags | np.where(usable & strange.numpy(), int(Flag.OUT_OF_DISTRIBUTION), 0)
        found: dict[str, NDArray[Any]] = {
            "pmf": pdf,
            "flags": flags.astype(np.int64),
            "ood": rank,
            "present": batch.present.numpy(),
            "nan_fraction": batch.nan_fraction,
            "notes": np.asarray(batch.notes, dtype=str),
        }
        if choice.features is not None:
            found["features"] = features_from(choice.features, hidden, planes, batch.ebv)
        if len(masses) > 1:
            means = torch.stack([each @ self.nodes for each in masses])
            found["z_spread"] = means.std(0, correction=0).numpy()
        timer.add("correct", start)
        return found

    @torch.no_grad()
    def prepare(self, batch: CutoutBatch, options: Options) -> Prepared:
        """Steps 5 to 7 of a batch: gaps, scaling and, where it does not turn with each view, the view."""
        fixed = options.tta in ("none", "d4")
        planes = inputs.fill_gaps(batch.planes, options.nan)
        moved = {name: images.to(self.device) for name, images in planes.items()}
        if fixed and self.config.align in ("native", "stretch"):  # what is cropped need not be scaled
            moved = {name: center_crop(moved[name], one.side) for name, one in self.config.inputs.items()}
        scaled = inputs.scale(moved, self.config, self.registry, batch.ebv)
        return Prepared(planes, self._view(scaled, batch) if fixed else scaled)

    def _view(self, scaled: dict[str, Tensor], batch: CutoutBatch) -> dict[str, Tensor]:
        places = {name: rows.to(self.device) for name, rows in batch.wcs.items()}
        return inputs.view(scaled, self.config, places)

    def _views(self, ready: Prepared, batch: CutoutBatch, choice: Options) -> Iterator[dict[str, Tensor]]:
        """The views to average over: one, the 8 exact ones, the authors' random one, or n random ones."""
        view = lambda planes: self._view(planes, batch)
        scaled = ready.images
        if choice.tta == "none":
            yield scaled
        elif choice.tta == "d4":
            for element in range(views.ELEMENTS):
                yield {name: views.d4(planes, element) for name, planes in scaled.items()}
        elif choice.tta == "official":
            yield view(views.turn(scaled, views.official_draw(choice.seed)))
        else:
            from fusion_core.seeding import generator

            for number in range(choice.tta):
                # One draw for all objects of a view, so that neither order nor batch size changes a result.
                draw = torch.rand(3, generator=generator(choice.seed, "view", number)).tolist()
                drawn = views.Draw(360 * draw[0], draw[1] > 0.5, draw[2] > 0.5)
                yield view(views.turn(scaled, drawn))

    def _forward(
        self, images: dict[str, Tensor], ebv: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if not len(ebv):
            return torch.zeros(0, self.config.bins, dtype=torch.float64), None
        with untouched(self.model, frozen=False), autocast(self.device, self.dtype):
            if hasattr(self.model, "penultimate"):
                hidden = self.model.penultimate(images, ebv, present)
                logits = self.model.classify(hidden)
            else:
                hidden, logits = None, self.model(images, ebv, present)
        if logits.shape != (len(ebv), self.config.bins):
            raise ConfigError(
                f"the model gives logits of shape {tuple(logits.shape)}, its configuration says "
                f"({len(ebv)}, {self.config.bins}); mend bins in config.json"
            )
        synchronize(self.device)
        return logits.double() if self.device.type != "mps" else logits.cpu().double(), hidden

    def _corrected(self, pmf: Tensor, hidden: Tensor | None, planes: Mapping[str, Tensor], batch: CutoutBatch,
                   prior: Any, usable: Tensor) -> NDArray[np.float64]:  # fmt: skip
        pdf = BinnedPDF(self.edges.numpy(), pmf.numpy(), self.nodes.numpy())
        rows = usable.nonzero().flatten().numpy()
        if (self.recalibration is None and prior is None) or not len(rows):
            return np.asarray(pdf.pmf)
        wanted = (0, None) if self.recalibration is None else features_wanted(self.recalibration)
        at = torch.from_numpy(rows)
        some = {name: images[at] for name, images in planes.items()}
        layer = None if hidden is None else hidden[at.to(hidden.device)]
        features = choose_features(wanted, layer, some, batch.ebv[at])
        made = correct(
            pdf[rows],
            recalibration=self.recalibration,
            features=features,
            prior=prior,
            train_prior=self.train_prior,
        )
        result = np.array(pdf.pmf)
        result[rows] = np.asarray(made.numpy().pmf)
        return result

    def estimate(
        self,
        catalog: Any,
        cutouts: Any,
        *,
        tta: Tta = "none",
        batch_size: int = 64,
        nan: NanPolicy = "inpaint",
        nan_limit: float = 0.01,
        prior: Any = None,
        official: bool = False,
        surveys: Iterable[str] | None = None,
        ebv: Any = None,
        seed: int = 0,
        num_workers: int = 1,
        out: str | os.PathLike[str] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> PhotoZResult:
        """Densities of all objects of a catalogue (the eleven steps of section 2.12, but for writing).

        Args:
            catalog: what :func:`~mantis_photoz.catalog.read_catalog` takes.
            cutouts: a directory of FITS files, packed shards, or a source of one's own.
            tta: ``"none"``: as it lies; ``"d4"``: mean over the 8 exact turns and flips; a number: over so
                many seeded random views; ``"official"``: the authors' one random view (bug B2).
            batch_size: objects per forward pass; memory is bounded by a few of them.
            nan: see :func:`mantis_photoz.nans.clean_planes`.
            nan_limit: share of NaN pixels of a plane that raises the flag.
            prior: (bins,) masses that the densities shall carry.
            official: point estimates with the masses at the nodes.
            surveys: use these only; the others count as missing.
            ebv: (objects, 2) E(B-V); by default from the catalogue.
            seed: of random views.
            num_workers: threads that read ahead; 0 = one thing after the other.
            out: output file whose run can be resumed; it is not written here (:meth:`PhotoZResult.save`), but
                finished batches are kept beside it.
            resume: go on with the batches that are there.
            overwrite: begin anew.
            progress: None shows a bar on a terminal only.

        Returns:
            One row per object, in the catalogue's order, whatever is missing or broken.

        Raises:
            DataError: a bad catalogue.
            InputError: no such cutouts, bad options, or ``out`` holds another run.
        """
        options = Options(tta=tta, batch_size=batch_size, nan=nan, official=official, seed=seed)
        found = read_catalog(catalog)
        source = cutouts if hasattr(cutouts, "read") else open_source(cutouts, nan_limit=nan_limit)
        data = Cutouts(found, source, self.surveys, ebv=ebv)
        only = chosen(list(self.surveys), surveys)
        run = None if out is None else Run(out, fingerprint(self, found, options, prior, only), resume=resume,
                                           overwrite=overwrite)  # fmt: skip
        rows = blocks(len(found), batch_size)
        todo = [part for part in range(len(rows)) if run is None or part not in run]
        jobs = [np.array(rows[part]) for part in todo]
        clock, begun = Clock(), time.perf_counter()
        parts: dict[int, dict[str, NDArray[Any]]] = {}
        checksums: dict[str, str] = {}

        ahead = self.device.type == "cpu"  # with an accelerator, scaling and views are its work

        def read(rows: NDArray[Any]) -> tuple[CutoutBatch, Prepared | None, Clock]:
            own, start = Clock(), time.perf_counter()
            batch = restricted(data.batch(rows), only)
            start = own.add("read", start)
            ready = self.prepare(batch, options) if ahead else None
            own.add("prepare", start)
            return batch, ready, own

        from fusion_core.progress import track

        stream = read_ahead(read, jobs, num_workers)
        for part, (batch, ready, own) in zip(
            todo, track(stream, "estimating", len(jobs), progress), strict=True
        ):
            clock.merge(own)
            made = self.predict(batch, options, prior=prior, clock=clock, ready=ready)
            if run is not None:
                run.add(part, made, objects=len(batch), files=take_checksums(source))
            else:
                parts[part] = made
                checksums |= take_checksums(source)
        if run is not None:
            parts = {part: run.load(part) for part in range(len(rows))}
            for part in parts:
                checksums |= run.facts(part).get("files", {})
        start = time.perf_counter()
        columns = joined(list(parts.values()), self.config.bins, len(self.surveys))
        pdf = BinnedPDF(self.edges.numpy(), columns.pop("pmf"), self.nodes.numpy())
        table = build_table(found, pdf, columns, tuple(self.surveys), official=official, model=self.name)
        clock.add("summarize", start)
        stages = {**clock.seconds, "wall": time.perf_counter() - begun, "objects": float(sum(map(len, jobs)))}
        record = provenance(
            self, found, options, source=source, prior=prior, checksums=checksums, columns=columns
        )
        return PhotoZResult(table, pdf, record, stages)

    def evaluate(
        self,
        samples: Cutouts,
        *,
        tta: Tta = "none",
        batch_size: int = 64,
        progress: bool | None = None,
        **options: Any,
    ) -> Evaluation:
        """Scores on cutouts with known redshifts, of the densities that :meth:`estimate` gives.

        Args:
            samples: with redshifts; those that are not finite are left out.
            tta: see :meth:`estimate`.
            batch_size: see :meth:`estimate`.
            progress: see :meth:`estimate`.
            **options: of :func:`mantis_photoz.report.evaluate`.

        Raises:
            DataError: no redshifts.
        """
        from mantis_photoz.report import evaluate

        common: dict[str, Any] = {"tta": tta, "batch_size": batch_size, "progress": progress}
        found = self.estimate(samples.catalog, samples.source, ebv=samples.ebv, **common)
        z = np.full(len(samples), np.nan) if samples.z is None else samples.z
        return evaluate({self.name: found.pdf}, z, **options)

    def band_use(self, samples: Any, **options: Any) -> BandUse:
        """Exact Shapley values of surveys or bands; see :func:`mantis_photoz.band_use.band_use`."""
        from mantis_photoz.band_use import band_use

        return band_use(self.model, samples, **options)

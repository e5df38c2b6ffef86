"""A small, complete distillation loop: splits, teacher, bilevel steps, checkpoints, metrics."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_core.checkpoint import PathLike, digest
from fusion_core.device import resolve_device
from fusion_core.errors import ConfigError, DataError, FusionWarning
from fusion_core.modules import logits_of, untouched
from fusion_core.progress import track
from fusion_core.seeding import generator
from kd_trilateral.bilevel import Bilevel
from kd_trilateral.config import Config
from kd_trilateral.errors import DivergedError
from kd_trilateral.evaluation import evaluate
from kd_trilateral.forward import call_arguments
from kd_trilateral.module import TrilateralKD
from kd_trilateral.rowsource import Rows, moved, stratified
from kd_trilateral.runstate import AUDIT, Progress, RunDirectory, check_out
from kd_trilateral.schedule import (
    Teacher,
    TeacherSource,
    held_out_draws,
    make_optimizer,
    row_order,
    set_lr,
)
from kd_trilateral.trace import AlphaTrace, TraceRows, as_rows, trace_columns

if TYPE_CHECKING:
    from kd_trilateral.report import RunReport


# Categorical rows coincide now and then; more than this share is no accident.
_OVERLAP = 0.05


@dataclass
class Splits:
    """What a run learns from and is measured on; each part is what ``Rows`` takes.

    Attributes:
        train: training rows.
        val: held-out rows; None = drawn from the training rows.
        test: rows for the metrics only.
        teacher: cache, logits ``(rows, classes)`` of the training rows, or a module.
        val_teacher: logits of the held-out rows, where a refit or ``val_mix`` needs them and the teacher is
            no module.
        num_classes: K; None = from the teacher's logits.
    """

    train: Any
    val: Any = None
    test: Any = None
    teacher: Teacher | None = None
    val_teacher: Tensor | None = None
    num_classes: int | None = None


@dataclass
class FitResult:
    """What :func:`fit` returns.

    Attributes:
        student: trained, in evaluation mode.
        ratio: the loss with its ratio network and T-bar.
        trace: ratios over training.
        metrics: one mapping per epoch, ``epoch``, ``step``, ``loss``, ``alpha`` and those of the test rows.
        audit: the final ratio and geometry of every training row.
        config: settings of the run.
    """

    student: nn.Module
    ratio: TrilateralKD
    trace: AlphaTrace
    metrics: list[dict[str, Any]]
    audit: TraceRows
    config: Config

    def report(self, **options: Any) -> RunReport:
        """Pictures, suspects and statistics, see :func:`kd_trilateral.report.run_report`."""
        from kd_trilateral.report import run_report

        return run_report(self.trace, self.audit, self.metrics, self.config, **options)


def fit(
    student: nn.Module,
    train: Any,
    val: Any = None,
    *,
    teacher: Teacher,
    test: Any = None,
    val_teacher: Tensor | None = None,
    learned: FitResult | None = None,
    config: Config | None = None,
    num_classes: int | None = None,
    out: PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    num_workers: int = 0,
    logits_from: Callable[[Any], Tensor] | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> FitResult:
    """Distil a teacher into a student with a learned, per-sample weight of the teacher.

    Args:
        student: trained in place, moved to ``config.device``.
        train: training rows: ``(x, y)`` tensors or a map-style dataset.
        val: held-out rows for the ratio network, never trained on (but by ``refit``); None = ``val_share``
            of the training rows, drawn by class.
        teacher: a :class:`~kd_trilateral.TeacherCache` or its path, logits ``(rows, classes)`` of the
            training rows in their order, or a module (run once over the rows).
        test: rows for the metrics of each epoch; never used for any choice.
        val_teacher: logits of ``val``, where ``refit`` or ``val_mix`` needs them and the teacher is no
            module.
        learned: with ``refit``, what the same call without it returned: its ratio network is taken, and not
            learned a second time; the outcome is the same, bit for bit.
        config: settings; keyword arguments replace single ones: ``fit(..., epochs=30, ratio="wls", seed=1)``.
        num_classes: K; None = from the teacher's logits.
        out: run directory, written after each epoch; None = nothing is written.
        resume: go on with the run in ``out``: same result, bit for bit, as without the interruption.
        overwrite: replace the run in ``out``.
        num_workers: loader processes for datasets.
        logits_from: finds the logits in the student's output.
        progress: show a bar; None = on a terminal.
        **settings: fields of :class:`~kd_trilateral.Config` to replace.

    Returns:
        student, loss, trace, metrics and the final ratio of every training row.

    Raises:
        ConfigError: a setting is unknown or out of range, or ``learned`` comes of other settings.
        DataError: rows, labels or teacher logits that cannot be used.
        StoreError: ``resume`` of a run with other settings or data.
        DivergedError: the loss left the finite numbers.

    Example:
        >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
        >>> result = fit(nn.Linear(4, 3), (x, y), teacher=torch.randn(60, 3), epochs=1, batch_size=16)
        >>> len(result.metrics), result.audit.alpha.shape
        (1, (54,))
    """
    config = config or Config()
    if settings:
        config = config.replace(**settings)
    if learned is not None and learned.config.replace(refit=True) != config:
        raise ConfigError("learned comes of other settings; wanted those of this refit, but for refit=False")
    if out is not None:
        check_out(out, resume=resume, overwrite=overwrite)
    device = resolve_device(config.device)
    rows, apart = Rows(train), None if val is None else Rows(val)
    labels = rows.labels()
    everyone = torch.arange(len(rows))
    if apart is None:
        ids, held_ids = stratified(labels, config.val_share, config.seed, ignore_index=config.ignore_index)
        if not len(held_ids):
            raise DataError(f"{len(rows)} training rows are too few to hold some out; pass val")
    else:
        _warn_overlap(rows, apart)
        ids, held_ids = everyone, len(rows) + torch.arange(len(apart))
    with_held = config.refit or config.hypergradient == "val_mix"
    source = TeacherSource(teacher, rows, apart, val_teacher, with_held, device, config, num_workers)
    run = _Run(
        student=student.to(device),
        base=rows,
        ids=ids,
        labels=labels[ids],
        held=rows.subset(held_ids) if apart is None else apart,
        held_ids=held_ids,
        source=source,
        test=None if test is None else Rows(test),
        config=config,
        device=device,
        num_workers=num_workers,
        logits_from=logits_from,
        num_classes=2 if config.task == "binary" else num_classes or source.num_classes,
        learned=learned,
    )
    if out is not None:
        data = digest(rows.fingerprint(), run.held.fingerprint(), source.digest())
        run.directory = RunDirectory(out, config, data, resume=resume, overwrite=overwrite)
    return run.run(progress)


def _warn_overlap(rows: Rows, held: Rows) -> None:
    common = held.overlap(rows)
    if common > _OVERLAP * len(held):
        warnings.warn(
            f"{common} of {len(held)} held-out rows are training rows too; the ratio network then learns "
            "what the "
            "student has memorised: keep the two apart",
            FusionWarning,
            stacklevel=4,
        )


@dataclass
class _Run:
    """One call of :func:`fit`; ``ids`` are the caller's row numbers, held-out rows given apart come after."""

    student: nn.Module
    base: Rows
    ids: Tensor
    labels: Tensor
    held: Rows
    held_ids: Tensor
    source: TeacherSource
    test: Rows | None
    config: Config
    device: torch.device
    num_workers: int
    logits_from: Callable[[Any], Tensor] | None
    num_classes: int
    learned: FitResult | None = None
    directory: RunDirectory | None = None

    def __post_init__(self) -> None:
        config = self.config
        self.total = config.steps or config.epochs * self._steps_per_epoch(len(self.ids))
        self.weights: Tensor | None = None
        if config.balance == "oversample":
            keep = self.labels != config.ignore_index
            place = self.labels[keep].unique(return_inverse=True)[1]
            self.weights = torch.zeros(len(self.labels), dtype=torch.float64)
            self.weights[keep] = 1.0 / torch.bincount(place).double()[place]
        count = len(self.base) + len(self.held)
        options = config.loss_kwargs(self.num_classes)
        self.loss = TrilateralKD(**options, total_steps=self.total, num_samples=count).to(self.device)
        if self.loss.network is not None and self.loss.tbar_from == "train":
            self.source.fill(self.loss, self.ids, self.labels)

    def _steps_per_epoch(self, count: int) -> int:
        return len(row_order(count, self.config.batch_size, self.config.seed, 0, None))

    def run(self, progress: bool | None) -> FitResult:
        config = self.config
        fresh = copy.deepcopy(self.student) if config.refit else None
        first = self.directory.phase() if self.directory is not None else 0
        state = Progress(0, 0, AlphaTrace(config.trace_capacity), [])
        if first == 0 and self.learned is not None:
            self.loss.load_state_dict(self.learned.ratio.state_dict())
            state = Progress(0, 0, self.learned.trace, list(self.learned.metrics))
        elif first == 0:
            state = self._phase(0, state, self.ids, progress)
        if fresh is not None:
            with torch.no_grad():
                self.student.load_state_dict(fresh.state_dict())
            ids = torch.cat([self.ids, self.held_ids])
            state = self._phase(1, dataclasses.replace(state, step=0), ids, progress)
        self.student.eval()
        audit = self._audit()
        if self.directory is not None:
            audit.save(self.directory.path / AUDIT)
        return FitResult(self.student, self.loss, state.trace, state.metrics, audit, config)

    def _rows(self, phase: int, view: int) -> Rows:
        """The rows of a phase in the order of its ids, in one fixed version where the data are random."""
        base = self.base if self.source.views == 1 else Rows(self.base.dataset.view(view))
        mine = base if len(self.ids) == len(base) else base.subset(self.ids)
        return mine if phase == 0 else mine.joined(self.held)

    def _engine(self, phase: int, optimizer: torch.optim.Optimizer) -> Bilevel:
        options = self.config.bilevel_kwargs()
        if phase == 1:
            options["hypergradient"] = "frozen"
        size = min(self.config.val_batch_size or self.config.batch_size, len(self.held))
        asked = self.config.hypergradient == "val_mix"
        logits = (lambda index: self.source.get(self.held_ids[index])) if asked else None
        draws = held_out_draws(self.held, logits, size, self.config.seed, self.device)
        return Bilevel(self.student, self.loss, optimizer, draws, **options, logits_from=self.logits_from)

    def _phase(self, phase: int, state: Progress, ids: Tensor, progress: bool | None) -> Progress:
        config, views = self.config, self.source.views
        optimizer = make_optimizer(config, self.student)
        engine = self._engine(phase, optimizer)
        weights = self.weights if phase == 0 else None
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                # Dropout draws from the global generator: give it the run's own state.
                torch.manual_seed(generator(config.seed, "dropout", phase).initial_seed())
                if self.directory is not None and self.directory.phase() == phase:
                    loaded = self.directory.load(
                        self.student, self.loss, engine, optimizer, config.trace_capacity
                    )
                    state = loaded or state
                self.student.train()
                self.loss.train()
                if phase == 1:
                    self.loss.restart(state.step)
                    if self.loss.network is not None:
                        self.loss.network.eval()  # learned and frozen
                rows = self._rows(phase, 0)
                for epoch in self._epochs(state.step, len(ids), progress, phase):
                    rows = rows if views == 1 else self._rows(phase, epoch % views)
                    order = row_order(len(ids), config.batch_size, config.seed, epoch, weights)
                    self._epoch(state, phase, epoch, rows, ids, order, engine, optimizer)
                    if self.directory is not None:
                        state.phase = phase
                        self.directory.save(state, self.student, self.loss, engine, optimizer)
        finally:
            engine.close()
        return state

    def _epoch(
        self,
        state: Progress,
        phase: int,
        epoch: int,
        rows: Rows,
        ids: Tensor,
        order: list[Tensor],
        engine: Bilevel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        find = self.logits_from or logits_of
        total = torch.zeros(2, device=self.device)
        left = self.total - state.step
        for index, x, y in rows.batches(order[:left], self.num_workers):
            set_lr(optimizer, self.config, state.step, self.total)
            inputs = moved(x, self.device)
            args, kwargs = call_arguments(inputs)
            number = ids[index]
            zt = self.source.get(number, epoch % self.source.views)
            out = self.loss(find(self.student(*args, **kwargs)), zt, y.to(self.device), number)
            optimizer.zero_grad(set_to_none=True)
            engine.backward(out)
            engine.step(inputs, out)
            if phase == 0:
                state.trace.record(state.step, out)
            state.step += 1
            total += torch.stack([out.loss.detach(), out.alpha.detach().mean()])
        loss, alpha = (total / len(order[:left])).tolist()
        if not math.isfinite(loss):
            raise DivergedError(
                f"the training loss is {loss} in epoch {epoch}; lower lr = {self.config.lr:g}"
            )
        row: dict[str, Any] = {"epoch": epoch, "step": state.step, "loss": loss, "alpha": alpha}
        if phase:
            row["refit"] = True
        if self.test is not None:
            row |= evaluate(
                self.student,
                self.test,
                task=self.config.task,
                logits_from=self.logits_from,
                ignore_index=self.config.ignore_index,
            )
        state.metrics.append(row)

    def _epochs(self, step: int, count: int, progress: bool | None, phase: int) -> Iterator[int]:
        steps = self._steps_per_epoch(count)
        epochs = range(step // steps, math.ceil(self.total / steps)) if step < self.total else range(0)
        return iter(track(epochs, "refit" if phase else "distil", enabled=progress))

    @torch.no_grad()
    def _audit(self) -> TraceRows:
        """The ratio that the finished networks give each training row, by row number."""
        parts: list[dict[str, Tensor]] = []
        find = self.logits_from or logits_of
        with untouched(self.student, self.loss):
            for index, x, y in self._rows(0, 0).batches(
                list(torch.arange(len(self.ids)).split(512)), self.num_workers
            ):
                args, kwargs = call_arguments(moved(x, self.device))
                number = self.ids[index]
                out = self.loss(
                    find(self.student(*args, **kwargs)), self.source.get(number), y.to(self.device), number
                )
                parts.append(trace_columns(self.total, out))
        return as_rows({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

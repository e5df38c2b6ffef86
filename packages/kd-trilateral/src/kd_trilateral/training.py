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
from fusion_core.errors import DataError, FusionWarning, ShapeError
from fusion_core.modules import logits_of, untouched
from fusion_core.progress import track
from fusion_core.seeding import generator
from kd_trilateral.bilevel import Bilevel
from kd_trilateral.cache import TeacherCache
from kd_trilateral.config import Config
from kd_trilateral.errors import DivergedError
from kd_trilateral.evaluation import evaluate
from kd_trilateral.forward import call_arguments
from kd_trilateral.module import TrilateralKD
from kd_trilateral.rowsource import Rows, check_teacher, moved, stratified, teacher_logits
from kd_trilateral.runstate import AUDIT, Progress, RunDirectory
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
        teacher: a :class:`~kd_trilateral.TeacherCache`, logits ``(rows, classes)`` of the training rows in
            their order, or a module (run once over the rows).
        test: rows for the metrics of each epoch; never used for any choice.
        val_teacher: logits of ``val``, where ``refit`` or ``val_mix`` needs them and the teacher is no
            module.
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
        ConfigError: a setting is unknown or out of range.
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
    device = resolve_device(config.device)
    rows = Rows(train)
    held, labels = _held_out(rows, val, config)
    if held[1] is not None:  # drawn from the training rows: those leave training
        rest, drawn = held[1]
        if isinstance(teacher, nn.Module):
            check_teacher(teacher)
            teacher = teacher_logits(teacher, rows, torch.arange(len(rows)), num_workers=num_workers)
        if isinstance(teacher, TeacherCache):
            teacher = teacher.logits(torch.arange(len(rows)))
        teacher = torch.as_tensor(teacher)
        if len(teacher) != len(rows):
            raise ShapeError(f"the teacher has logits of {len(teacher)} rows, the training data {len(rows)}")
        val_teacher, teacher = teacher[drawn], teacher[rest]
        rows, labels = _subset(rows, rest), labels[rest]
    val_rows = held[0]
    if (
        isinstance(teacher, nn.Module)
        and val_teacher is None
        and (config.refit or config.hypergradient == "val_mix")
    ):
        val_teacher = teacher_logits(teacher, val_rows, torch.arange(len(val_rows)), num_workers=num_workers)
    student.to(device)
    source = TeacherSource(teacher, rows, device, num_workers, config.task)
    run = _Run(student, rows, val_rows, source, labels, config, num_classes, device, num_workers, logits_from)
    run.test = None if test is None else Rows(test)
    run.val_teacher = None if val_teacher is None else torch.as_tensor(val_teacher).to(device)
    if config.refit and run.val_teacher is None:
        raise DataError(
            "refit trains on the held-out rows too and needs the teacher's logits there; pass val_teacher"
        )
    if out is not None:
        data = digest(rows.fingerprint(), val_rows.fingerprint(), source.digest())
        run.directory = RunDirectory(out, config, data, resume=resume, overwrite=overwrite)
    return run.run(progress)


def _held_out(
    rows: Rows, val: Any, config: Config
) -> tuple[tuple[Rows, tuple[Tensor, Tensor] | None], Tensor]:
    labels = rows.labels().long()
    if val is None:
        split = stratified(labels, config.val_share, config.seed)
        if not len(split[1]):
            raise DataError(f"{len(rows)} training rows are too few to hold some out; pass val")
        return (_subset(rows, split[1]), split), labels
    held = Rows(val)
    common = held.overlap(rows)
    if common > _OVERLAP * len(held):
        warnings.warn(
            f"{common} of {len(held)} held-out rows are training rows too; the ratio network then learns "
            "what the student has memorised: keep the two apart",
            FusionWarning,
            stacklevel=4,
        )
    return (held, None), labels


def _subset(rows: Rows, index: Tensor) -> Rows:
    if rows.tensors is not None:
        return Rows(rows[index])
    return Rows(torch.utils.data.Subset(rows.dataset, index.tolist()))


class _Run:
    """One call of :func:`fit`."""

    def __init__(
        self,
        student: nn.Module,
        rows: Rows,
        val_rows: Rows,
        source: TeacherSource,
        labels: Tensor,
        config: Config,
        num_classes: int | None,
        device: torch.device,
        num_workers: int,
        logits_from: Callable[[Any], Tensor] | None,
    ) -> None:
        self.student, self.rows, self.val_rows, self.source = student, rows, val_rows, source
        self.config, self.device, self.num_workers = config, device, num_workers
        self.logits_from = logits_from
        self.test: Rows | None = None
        self.val_teacher: Tensor | None = None
        self.directory: RunDirectory | None = None
        steps = len(row_order(len(rows), config.batch_size, config.seed, 0, None))
        self.total = config.steps or config.epochs * steps
        self.epochs = math.ceil(self.total / steps)
        self.weights: Tensor | None = None
        if config.balance == "oversample":
            classes, place = labels.unique(return_inverse=True)
            self.weights = 1.0 / torch.bincount(place, minlength=len(classes)).double()[place]
        classes = 2 if config.task == "binary" else num_classes or source.num_classes
        options = config.loss_kwargs(classes)
        self.loss = TrilateralKD(**options, total_steps=self.total, num_samples=len(rows) + len(val_rows)).to(
            device
        )
        if self.loss.network is not None and self.loss.tbar_from == "train":
            source.fill(self.loss, rows)

    def run(self, progress: bool | None) -> FitResult:
        config = self.config
        fresh = copy.deepcopy(self.student) if config.refit else None
        first = self.directory.phase() if self.directory is not None else 0
        state = Progress(0, 0, AlphaTrace(config.trace_capacity), [])
        if first == 0:
            state = self._phase(0, state, self.student, self.rows, self._row_logits(), progress)
        if fresh is not None:
            with torch.no_grad():
                self.student.load_state_dict(fresh.state_dict())
            joined = self.rows.joined(self.val_rows)
            assert self.val_teacher is not None
            state = self._phase(
                1, dataclasses.replace(state, step=0), self.student, joined, self._both(), progress
            )
        self.student.eval()
        audit = self._audit()
        if self.directory is not None:
            audit.save(self.directory.path / AUDIT)
        return FitResult(self.student, self.loss, state.trace, state.metrics, audit, config)

    def _row_logits(self) -> Callable[[Tensor], Tensor]:
        return lambda index: self.source[index]

    def _both(self) -> Callable[[Tensor], Tensor]:
        count, held = len(self.rows), self.val_teacher
        assert held is not None

        def logits(index: Tensor) -> Tensor:
            mine = index < count
            out = held.new_empty(len(index), *held.shape[1:])
            if bool(mine.any()):
                out[mine.to(self.device)] = self.source[index[mine]].to(held)
            out[~mine.to(self.device)] = held[(index[~mine] - count).to(self.device)]
            return out

        return logits

    def _engine(self, phase: int, optimizer: torch.optim.Optimizer) -> Bilevel:
        options = self.config.bilevel_kwargs()
        if phase == 1:
            options["hypergradient"] = "frozen"
        size = min(self.config.val_batch_size or self.config.batch_size, len(self.val_rows))
        draws = held_out_draws(self.val_rows, self.val_teacher, size, self.config.seed, self.device)
        return Bilevel(self.student, self.loss, optimizer, draws, **options, logits_from=self.logits_from)

    def _phase(
        self,
        phase: int,
        state: Progress,
        student: nn.Module,
        rows: Rows,
        logits: Callable[[Tensor], Tensor],
        progress: bool | None,
    ) -> Progress:
        config = self.config
        optimizer = make_optimizer(config, student)
        engine = self._engine(phase, optimizer)
        find = self.logits_from or logits_of
        weights = self.weights if phase == 0 else None
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                # Dropout draws from the global generator: give it the run's own state.
                torch.manual_seed(generator(config.seed, "dropout", phase).initial_seed())
                if self.directory is not None and self.directory.phase() == phase:
                    loaded = self.directory.load(student, self.loss, engine, optimizer, config.trace_capacity)
                    state = loaded or state
                student.train()
                self.loss.train(phase == 0)
                for epoch in self._epochs(state.step, rows, progress, phase):
                    order = row_order(len(rows), config.batch_size, config.seed, epoch, weights)
                    total = torch.zeros((), device=self.device)
                    alpha = torch.zeros((), device=self.device)
                    done = 0
                    for index, x, y in rows.batches(order, self.num_workers):
                        if state.step >= self.total:
                            break
                        set_lr(optimizer, config, state.step, self.total)
                        inputs = moved(x, self.device)
                        args, kwargs = call_arguments(inputs)
                        out = self.loss(
                            find(student(*args, **kwargs)), logits(index), y.to(self.device), index
                        )
                        optimizer.zero_grad(set_to_none=True)
                        engine.backward(out)
                        engine.step(inputs, out)
                        if phase == 0:
                            state.trace.record(state.step, out)
                        state.step += 1
                        done += 1
                        total += out.loss.detach()
                        alpha += out.alpha.detach().mean()
                    self._close_epoch(
                        state, phase, epoch, float(total) / max(done, 1), float(alpha) / max(done, 1)
                    )
                    if self.directory is not None:
                        state.phase = phase
                        self.directory.save(state, student, self.loss, engine, optimizer)
        finally:
            engine.close()
        return state

    def _epochs(self, step: int, rows: Rows, progress: bool | None, phase: int) -> Iterator[int]:
        steps = len(row_order(len(rows), self.config.batch_size, self.config.seed, 0, None))
        epochs = range(step // steps, math.ceil(self.total / steps))
        return iter(track(epochs, "refit" if phase else "distil", enabled=progress))

    def _close_epoch(self, state: Progress, phase: int, epoch: int, loss: float, alpha: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(
                f"the training loss is {loss} in epoch {epoch}; lower lr = {self.config.lr:g}"
            )
        row: dict[str, Any] = {"epoch": epoch, "step": state.step, "loss": loss, "alpha": alpha}
        if phase:
            row["refit"] = True
        if self.test is not None:
            row |= evaluate(self.student, self.test, task=self.config.task, logits_from=self.logits_from)
        state.metrics.append(row)

    @torch.no_grad()
    def _audit(self) -> TraceRows:
        """The ratio that the finished networks give each training row, by row number."""
        parts: list[dict[str, Tensor]] = []
        find = self.logits_from or logits_of
        with untouched(self.student, self.loss):
            for index, x, y in self.rows.batches(
                list(torch.arange(len(self.rows)).split(512)), self.num_workers
            ):
                args, kwargs = call_arguments(moved(x, self.device))
                out = self.loss(
                    find(self.student(*args, **kwargs)), self.source[index], y.to(self.device), index
                )
                parts.append(trace_columns(self.total, out))
        return as_rows({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

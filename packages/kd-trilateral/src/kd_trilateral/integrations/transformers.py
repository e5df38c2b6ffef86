"""TrilateralTrainer: per-sample distillation inside Hugging Face's ``Trainer`` (extra ``hf``)."""
# transformers and accelerate leave many of their types unsaid.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeArgument=false
# ruff: noqa: ARG002 - signatures of the callbacks and methods overridden

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.checkpoint import atomic_write, load_strict, load_tensors, plain_tensors, save_tensors
from fusion_core.errors import CheckpointError, ConfigError, DataError, FusionWarning, reading, require_extra
from fusion_core.modules import logits_of
from kd_trilateral.bilevel import Bilevel
from kd_trilateral.classmean import ClassMeanState
from kd_trilateral.errors import StateError
from kd_trilateral.losses import as_pair
from kd_trilateral.module import Output, TrilateralKD

for _module in ("accelerate", "transformers"):
    require_extra(_module, "hf", "kd-trilateral")

from transformers import Trainer, TrainerCallback  # noqa: E402 - after the check that it is there
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

if TYPE_CHECKING:
    from kd_trilateral.config import Config

RATIO_FILE = "ratio.safetensors"
STATE_FILE = "bilevel.pt"
TRACE_FILE = "trace.npz"
_OURS = ("teacher_logits", "sample_id")
_LABELS = ("labels", "label", "label_ids")


class TrilateralTrainer(Trainer):
    """``transformers.Trainer`` whose loss is TGeo-KD's; the ratio network learns between optimiser steps.

    Labels are class indices in a column ``labels`` (``label``). The teacher's logits come from ``teacher`` or
    from a column ``teacher_logits``; a column ``sample_id`` names the rows in the trace. Evaluation reports
    plain cross-entropy. With gradient accumulation the outer step looks at the last micro-batch. Under
    ``bf16`` the hypergradient passes run in the model's own autocast, too coarse for ``fd`` and ``fd1``.

    Checkpoints hold the ratio network with T-bar (``ratio.safetensors``), the engine (``bilevel.pt``) and the
    trace beside the Trainer's files; ``train(resume_from_checkpoint=...)`` reads them.

    Args:
        model: the student.
        teacher: a classifier of the same labels, put into evaluation mode without gradients; None = the data
            bring a column ``teacher_logits``.
        hyper_dataset: held-out rows that the ratio network learns from; not used where it does not learn.
        kd: a :class:`~kd_trilateral.Config`, or ``{"loss": {...}, "bilevel": {...}}`` with arguments of
            :class:`~kd_trilateral.TrilateralKD` and :class:`~kd_trilateral.Bilevel`.
        alpha_trace: records what the ratio does; None = an :class:`~kd_trilateral.AlphaTrace`.
        **trainer: arguments of ``transformers.Trainer``.

    Attributes:
        loss: the :class:`~kd_trilateral.TrilateralKD`.
        engine: the :class:`~kd_trilateral.Bilevel` of the last ``train()``; None before.

    Raises:
        MissingExtraError: at import, where transformers or accelerate is not installed.
        ConfigError: settings that cannot be used, or more than one process or device.
        DataError: held-out rows are needed and missing.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        teacher: nn.Module | None = None,
        hyper_dataset: Any = None,
        kd: Config | Mapping[str, Any] | None = None,
        alpha_trace: Any = None,
        **trainer: Any,
    ) -> None:
        super().__init__(model=model, **trainer)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ConfigError(
                f"TrilateralTrainer runs in one process on one device, got {self.args.world_size} processes "
                f"and {self.args.n_gpu} devices"
            )
        self.model_accepts_loss_kwargs = False  # our loss is a mean per micro-batch
        if not self.label_names:
            self.label_names = ["labels"]
        self.teacher = self._freeze(teacher)
        self.hyper_dataset = hyper_dataset
        loss_settings, self._bilevel_settings, capacity = self._settings({} if kd is None else kd)
        self.loss = TrilateralKD(**loss_settings).to(self.args.device)
        self.engine: Bilevel | None = None
        if alpha_trace is None:
            from kd_trilateral.trace import AlphaTrace

            alpha_trace = AlphaTrace(**capacity)
        self.alpha_trace: Any = alpha_trace
        self._last: tuple[dict[str, Any], Output] | None = None
        self._resume: str | bool | None = None
        omega = any(p.requires_grad for p in self.loss.parameters())
        learns = omega and self._bilevel_settings.get("every", 4) != 0
        engine = self._bilevel_settings.get("hypergradient", "jvp")
        free = engine in ("joint", "frozen") or self.loss.free_logit is not None
        if learns and not free and not hyper_dataset:
            raise DataError(
                f"hyper_dataset is missing or empty: hypergradient {engine!r} learns the ratios from "
                "held-out rows; pass some, or choose 'joint' or 'frozen'"
            )
        if hyper_dataset is not None and hyper_dataset is self.train_dataset:
            warnings.warn(
                "hyper_dataset is train_dataset; ratios learned on training rows favour what the student "
                "has memorised",
                FusionWarning,
                stacklevel=2,
            )
        self.add_callback(_Hooks(self))

    def _freeze(self, teacher: nn.Module | None) -> nn.Module | None:
        if teacher is None:
            return None
        if teacher is self.model:
            raise ConfigError("teacher is the student itself; pass another module")
        found = ["was in training mode"] if teacher.training else []
        found += ["required gradients"] if any(p.requires_grad for p in teacher.parameters()) else []
        if found:
            warnings.warn(
                f"the teacher {' and '.join(found)}; it is put into evaluation mode without gradients",
                FusionWarning,
                stacklevel=3,
            )
        return teacher.eval().requires_grad_(False).to(self.args.device)

    def _settings(
        self, kd: Config | Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Arguments of the loss, the engine and the trace."""
        task = kd.get("loss", {}).get("task") if isinstance(kd, Mapping) else kd.task
        outputs = getattr(getattr(self.model, "config", None), "num_labels", None)
        classes: Any = 2 if task == "binary" else outputs
        if isinstance(kd, Mapping):
            if unknown := sorted(set(kd) - {"loss", "bilevel"}):
                raise ConfigError(f"kd has {unknown}, wanted 'loss' and 'bilevel', or a Config")
            loss = {"num_classes": classes, **kd.get("loss", {})}
            bilevel: dict[str, Any] = dict(kd.get("bilevel", {}))
            capacity: dict[str, Any] = {}
        else:
            loss, bilevel = kd.loss_kwargs(classes), kd.bilevel_kwargs()
            capacity = {"capacity": kd.trace_capacity}
        if loss["num_classes"] is None:
            raise ConfigError("the model has no config.num_labels; pass kd={'loss': {'num_classes': K}}")
        if bilevel.get("order", "inner_first") != "inner_first":
            raise ConfigError("order is 'outer_first', wanted 'inner_first': the Trainer steps by itself")
        if loss.get("ratio") == "anl":
            loss.setdefault("total_steps", 1)  # known when training begins
        if loss.get("ratio") == "rw":
            loss.setdefault("num_samples", len(cast(Any, self.train_dataset)))
        return loss, bilevel, capacity

    # ---------------------------------------------------------------- batches

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = cast("list[str]", self._signature_columns)
        teacher = [] if self.teacher is None else list(_parameters(self.teacher))
        columns += [name for name in (*_OURS, *teacher) if name not in columns]

    def _collate(self, rows: list[Any]) -> dict[str, Any]:
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            kept = {*cast("list[str]", self._signature_columns), *_LABELS}
            rows = [{k: v for k, v in r.items() if k in kept} if isinstance(r, Mapping) else r for r in rows]
        return cast("dict[str, Any]", self._prepare_inputs(cast(Any, self.data_collator)(rows)))

    def _held_out(self, outer_step: int) -> dict[str, Any]:
        """Batch of an outer step, shuffled per pass: a function of the step alone, so resuming is exact."""
        rows, size = len(self.hyper_dataset), min(self.args.train_batch_size, len(self.hyper_dataset))
        turn, position = divmod(outer_step, max(rows // size, 1))
        draw = torch.Generator().manual_seed(self.args.seed + turn)
        order = torch.randperm(rows, generator=draw)[position * size : (position + 1) * size].tolist()
        batch = self._collate([self.hyper_dataset[i] for i in order])
        kept = {**_fitting(self.model, batch), "labels": _labels(batch)}
        if self.engine is not None and self.engine.engine == "val_mix":
            kept["teacher_logits"] = self._teacher_logits(batch)
        return kept

    def _teacher_logits(self, inputs: Mapping[str, Any]) -> Tensor:
        if "teacher_logits" in inputs:
            return inputs["teacher_logits"]
        if self.teacher is None:
            raise DataError(
                "teacher_logits are missing: pass teacher=..., or a dataset with a column 'teacher_logits' "
                f"(this batch has {sorted(inputs)})"
            )
        with torch.no_grad():
            return logits_of(self.teacher(**_fitting(self.teacher, inputs)))

    def _fit_class_mean(self) -> None:
        loss = self.loss
        wanted = loss.network is not None and loss.geometry.needs_class_mean and loss.tbar_from == "train"
        if not wanted or bool(loss.tbar_fitted):
            return
        data: Any = self.train_dataset
        if not hasattr(data, "__len__"):
            raise StateError(
                "the class mean T-bar takes a pass over train_dataset, which has no length: call "
                "trainer.loss.fit_class_mean(teacher_logits, labels) first, or pass tbar='batch' or 'none'"
            )
        size = self.args.eval_batch_size
        state: ClassMeanState | None = None
        for start in range(0, len(data), size):
            batch = self._collate([data[i] for i in range(start, min(start + size, len(data)))])
            state = loss.fit_class_mean(self._teacher_logits(batch), _labels(batch), state)

    # ---------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Distillation loss in training, plain cross-entropy in evaluation."""
        labels, student = _labels(inputs), _fitting(self.model, inputs)
        if not model.training:
            outputs = model(**student)
            logits = logits_of(outputs)
            pair = as_pair(logits) if self.loss.task == "binary" else logits
            loss = F.cross_entropy(pair.float(), labels.long(), ignore_index=self.loss.ignore_index)
            shown = outputs if isinstance(outputs, dict) else {"logits": logits}
            return (loss, shown) if return_outputs else loss
        teacher = self._teacher_logits(inputs)
        outputs = model(**student)
        out = cast(Output, self.loss(logits_of(outputs), teacher, labels, inputs.get("sample_id")))
        self._last = (student, out)
        self.alpha_trace.record(self.state.global_step, out)
        return (out.loss, outputs) if return_outputs else out.loss

    # ---------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; a checkpoint brings the ratio network, T-bar, engine and trace as well."""
        self._resume = resume_from_checkpoint
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._last = None
            if self.engine is not None:
                self.engine.close()

    def _begin(self) -> None:
        if self.loss.ratio == "anl" and self.loss.total_steps == 1:
            self.loss.total_steps = self.state.max_steps * self.args.gradient_accumulation_steps
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        self.engine = Bilevel(
            cast(nn.Module, self.model),
            self.loss,
            cast(torch.optim.Optimizer, optimizer),
            self._held_out if self.hyper_dataset else None,
            **self._bilevel_settings,
        )
        folder = get_last_checkpoint(str(self.args.output_dir)) if self._resume is True else self._resume
        if folder:
            self.load_ratio(folder)
        self.loss.train()
        self._fit_class_mean()

    def save_ratio(self, folder: str | Path) -> None:
        """Write the ratio network with T-bar, the engine's state and the trace into a folder that exists."""
        save_tensors(Path(folder) / RATIO_FILE, self.loss.state_dict())
        if self.engine is not None:
            with atomic_write(Path(folder) / STATE_FILE) as file:
                torch.save(self.engine.state_dict(), file)
        if hasattr(self.alpha_trace, "save"):
            self.alpha_trace.save(Path(folder) / TRACE_FILE)

    def load_ratio(self, folder: str | Path) -> None:
        """Read what :meth:`save_ratio` wrote.

        Raises:
            CheckpointError: a file is missing or does not fit.
        """
        path = Path(folder)
        load_strict(self.loss, load_tensors(path / RATIO_FILE))
        if self.engine is not None:
            if not (path / STATE_FILE).is_file():
                raise CheckpointError(
                    f"{path / STATE_FILE} is missing; this run cannot be resumed from {path}"
                )
            with reading(path / STATE_FILE, "is damaged", CheckpointError), plain_tensors():
                state = torch.load(path / STATE_FILE, map_location=self.args.device, weights_only=True)
                self.engine.load_state_dict(dict(state))  # a bare tensor would take names for indices
        if hasattr(self.alpha_trace, "load") and (path / TRACE_FILE).is_file():
            kept = self.alpha_trace.capacity
            self.alpha_trace = self.alpha_trace.load(path / TRACE_FILE, kept)

    def _around_step(self, *, after: bool) -> None:
        assert self.engine is not None
        assert self._last is not None
        student, out = self._last
        if not after:
            self.engine.before_optimizer_step(student, out)
        elif self.accelerator.optimizer_step_was_skipped:
            self.engine.skip_optimizer_step()
        else:
            self.engine.after_optimizer_step(student, out)


class _Hooks(TrainerCallback):
    """Hands the Trainer's events to the bilevel engine."""

    def __init__(self, trainer: TrilateralTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin()  # pyright: ignore[reportPrivateUsage]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._around_step(after=False)  # pyright: ignore[reportPrivateUsage]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._around_step(after=True)  # pyright: ignore[reportPrivateUsage]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.trainer.save_ratio(folder)


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = inspect.signature(module.forward).parameters
    return {name: p for name, p in named.items() if p.kind not in kinds}


def _fitting(module: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a module's ``forward`` names, without the labels: it computes no loss of its own."""
    named = _parameters(module) or inputs
    return {k: v for k, v in inputs.items() if k in named and k not in (*_LABELS, *_OURS)}


def _labels(inputs: Mapping[str, Any]) -> Tensor:
    if "labels" not in inputs:
        raise DataError(f"a batch has no 'labels', only {sorted(inputs)}; distillation needs class indices")
    return inputs["labels"]

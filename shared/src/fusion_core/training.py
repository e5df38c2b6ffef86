"""A training loop that runs on whatever ``accelerate`` launches and resumes exactly (extra ``train``).

The caller owns the equations: a function from a batch to named losses. The loop owns the rest: devices and
processes, mixed precision, accumulation, clipping, averaging, logging, checkpoints, Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, RandomSampler

from fusion_core.atomic import PathLike, atomic_write
from fusion_core.checkpoint import digest, plain_tensors, save_tensors
from fusion_core.errors import CheckpointError, ConfigError, FusionError, InputError, reading, require_extra
from fusion_core.seeding import generator, restore_rng, rng_state

StepFunction = Callable[[nn.Module, Any], Mapping[str, Tensor]]
Validate = Callable[[nn.Module], Mapping[str, float]]
STATE, METRICS, WEIGHTS, BEST = "last.pt", "metrics.jsonl", "model.safetensors", "best.safetensors"


@dataclass(frozen=True, slots=True)
class LoopResult:
    """What a run ended with: optimizer steps, epochs, last logged losses, best validation and its step."""

    steps: int
    epochs: int
    metrics: dict[str, float]
    best: dict[str, float] | None


@dataclass
class _Progress:
    """Where a run stands; what a checkpoint remembers beside the tensors."""

    step: int = 0
    epoch: int = 0
    groups: int = 0  # steps made within the epoch
    seconds: float = 0.0
    lines: int = 0  # of metrics.jsonl
    best: dict[str, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict[str, float])


class Loop:
    """Train a model; one optimizer step per ``accumulate`` batches.

    In ``out``: ``metrics.jsonl`` (a line for each log or validation), ``last.pt`` (everything a resumed run
    needs), ``best.safetensors`` (best validation so far) and, at the end, ``model.safetensors`` (the best, or
    the last where nothing was validated; averaged weights where ``ema`` is on).

    A resumed run equals an uninterrupted one bit for bit on one CPU: orders of shuffled ``DataLoader`` are
    drawn from ``seed`` and the epoch, the global generators are restored, lines logged after the checkpoint
    are removed. With several processes or loader workers that holds where the data set draws by index.

    Args:
        model: trained in place; on the device that accelerate chooses.
        optimizer: of the model's parameters.
        scheduler: a torch scheduler, stepped as ``interval`` says.
        out: the run's directory.
        steps: optimizer steps in all; or
        epochs: passes over the loader.
        mixed_precision: ``"no"``, ``"bf16"``, ``"fp16"`` (CUDA only) for ``step_fn``'s forward.
        accumulate: batches per optimizer step; an epoch's last step may have fewer.
        max_grad_norm: clip the gradient's norm.
        ema: decay of an exponential moving average of the weights, in (0, 1).
        interval: step the scheduler after each ``"step"`` or each ``"epoch"``.
        save_every: optimizer steps between checkpoints; also written at the end and on Ctrl-C.
        log_every: optimizer steps between lines; losses are read from the device only then.
        validate_every: optimizer steps between validations; None = at each epoch's end.
        resume: go on from ``last.pt``, or start where there is none.
        overwrite: start anew in a directory that holds another run.
        seed: of the loader's order.
        device: ``"auto"`` (accelerate's choice) or ``"cpu"``.
        progress: None shows a bar on a terminal only.

    Raises:
        InputError: ``out`` holds another run, with neither ``resume`` nor ``overwrite``.
        ConfigError: a number out of its range, or not exactly one of ``steps`` and ``epochs``.
        MissingExtraError: accelerate is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        out: PathLike,
        scheduler: Any = None,
        steps: int | None = None,
        epochs: int | None = None,
        mixed_precision: Literal["no", "bf16", "fp16"] = "no",
        accumulate: int = 1,
        max_grad_norm: float | None = None,
        ema: float | None = None,
        interval: Literal["step", "epoch"] = "step",
        save_every: int = 500,
        log_every: int = 20,
        validate_every: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
        seed: int = 0,
        device: str = "auto",
        progress: bool | None = None,
    ) -> None:
        if (steps is None) == (epochs is None):
            raise ConfigError(f"steps is {steps} and epochs is {epochs}, wanted exactly one of them")
        counts = {"accumulate": accumulate, "save_every": save_every, "log_every": log_every}
        counts |= {"steps": steps or epochs or 0, "validate_every": validate_every or 1}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}, wanted at least 1")
        if ema is not None and not 0 < ema < 1:
            raise ConfigError(f"ema is {ema}, wanted a number in (0, 1)")
        if mixed_precision not in ("no", "bf16", "fp16"):
            raise ConfigError(f"mixed_precision is {mixed_precision!r}, wanted 'no', 'bf16' or 'fp16'")
        accelerate = require_extra("accelerate", "train", "fusion-core")
        self.accelerator: Any = accelerate.Accelerator(cpu=device == "cpu")
        if mixed_precision == "fp16" and self.accelerator.device.type != "cuda":
            raise ConfigError(
                f"mixed_precision 'fp16' needs CUDA, not {self.accelerator.device.type}; use 'bf16'"
            )
        self.folder = Path(out)
        self.steps, self.epochs, self.accumulate, self.seed = steps, epochs, accumulate, seed
        self.save_every, self.log_every, self.validate_every = save_every, log_every, validate_every
        self.max_grad_norm, self.interval, self.show = max_grad_norm, interval, progress
        self.precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
        self.scaler = torch.amp.GradScaler("cuda", enabled=mixed_precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]
        held = [name for name in (STATE, METRICS, WEIGHTS) if (self.folder / name).exists()]
        if held and not (resume or overwrite):
            raise InputError(f"out {str(out)!r} holds a run ({', '.join(held)}); pass resume or overwrite")
        self.raw, self.optimizer, self.scheduler = model, optimizer, scheduler
        model.to(self.accelerator.device)
        self.model: nn.Module = self.accelerator.prepare_model(model)
        self.average = None if ema is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema))
        self.at = _Progress()
        self.pending: list[dict[str, Tensor]] = []  # losses that are not logged yet, on their device
        self.print = digest(
            {name: tuple(value.shape) for name, value in model.state_dict().items()},
            {"accumulate": accumulate, "ema": ema, "seed": seed, "precision": mixed_precision},
        )
        if resume and (self.folder / STATE).exists():
            self._load()
        elif self.accelerator.is_main_process:
            for name in (STATE, METRICS, WEIGHTS, BEST):
                (self.folder / name).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    def run(
        self, loader: Iterable[Any], step_fn: StepFunction, validate: Validate | None = None
    ) -> LoopResult:
        """Train to the end.

        Args:
            loader: a ``DataLoader`` (shuffled by the loop's seed, split over processes), or anything that can
                be iterated once an epoch; ``set_epoch(epoch)`` of the loader or its data set is called.
            step_fn: ``(model, batch) -> {"loss": scalar, ...}``; the other scalars are logged.
            validate: ``model -> {"score": higher is better, ...}``; gets averaged weights where ``ema`` is
                on, in eval mode, without gradients. Without ``"score"`` nothing counts as best.

        Raises:
            FusionError: a loss is not finite.
            KeyboardInterrupt: after Ctrl-C, with the step finished and a checkpoint written.
        """
        loader = self._prepared(loader)
        started, stop = time.monotonic() - self.at.seconds, threading.Event()
        terms = self.pending
        with _caught_ctrl_c(stop), self._bar(loader) as advance:
            while not self._finished():
                empty = self.at.groups == 0
                for group in self._groups(loader):
                    empty = False
                    self.model.train()
                    terms.append(self._step(group, step_fn))
                    self.at.step, self.at.groups = self.at.step + 1, self.at.groups + 1
                    self.at.seconds = time.monotonic() - started
                    due = self.validate_every is not None and self.at.step % self.validate_every == 0
                    if self.at.step % self.log_every == 0 or self._finished() or stop.is_set():
                        self._log(terms)
                    if due:
                        self._validate(validate)
                    if self.at.step % self.save_every == 0 or stop.is_set():
                        self._save()
                    advance()
                    if stop.is_set():
                        raise KeyboardInterrupt
                    if self._finished():
                        break
                else:
                    if empty:
                        raise InputError("loader gave no batch in an epoch")
                    self.at.epoch, self.at.groups = self.at.epoch + 1, 0
                    if self.scheduler is not None and self.interval == "epoch":
                        with warnings.catch_warnings():  # the optimizer's steps may be of an earlier run
                            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                            self.scheduler.step()
                    if self.validate_every is None:
                        self._validate(validate)
        self._log(terms)
        self._save()
        self._write_weights(WEIGHTS, from_best=self.at.best is not None)
        return LoopResult(self.at.step, self.at.epoch, dict(self.at.metrics), self.at.best)

    def _finished(self) -> bool:
        return self.at.step >= self.steps if self.steps is not None else self.at.epoch >= (self.epochs or 0)

    def _step(self, group: list[Any], step_fn: StepFunction) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        device = self.accelerator.device
        for number, batch in enumerate(group):
            last = number == len(group) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with torch.autocast(device.type, self.precision, enabled=self.precision is not None):
                    losses = step_fn(self.model, _to(batch, device))
                self.scaler.scale(losses["loss"] / len(group)).backward()
            for name, value in losses.items():
                part = value.detach().float() / len(group)
                sums[name] = sums[name] + part if name in sums else part
        if self.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None and self.interval == "step":
            self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.raw)
        return sums

    def _prepared(self, loader: Iterable[Any]) -> Iterable[Any]:
        if isinstance(loader, DataLoader):
            sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
            self._order = generator(self.seed, "order")
            if isinstance(sampler, RandomSampler):
                sampler.generator = self._order
            loader.generator = generator(self.seed, "workers")
            if self.accelerator.num_processes > 1:
                return self.accelerator.prepare_data_loader(loader, device_placement=False)
        return loader

    def _groups(self, loader: Any) -> Iterator[list[Any]]:
        epoch, skip = self.at.epoch, self.at.groups * self.accumulate
        if isinstance(loader, DataLoader):
            self._order.manual_seed(generator(self.seed, "order", epoch).initial_seed())
            if loader.generator is not None:
                loader.generator.manual_seed(generator(self.seed, "workers", epoch).initial_seed())
        targets: list[Any] = [loader, getattr(loader, "dataset", None), getattr(loader, "sampler", None)]
        for target in targets:
            if hasattr(target, "set_epoch"):
                target.set_epoch(epoch)
        if skip and isinstance(loader, DataLoader):
            batches = iter(
                require_extra("accelerate", "train", "fusion-core").skip_first_batches(loader, skip)
            )
        else:
            batches = islice(iter(loader), skip, None)
        while group := list(islice(batches, self.accumulate)):
            yield group

    @contextlib.contextmanager
    def _bar(self, loader: Any) -> Generator[Callable[[], Any], None, None]:
        from fusion_core.progress import track

        length = -(-len(loader) // self.accumulate) if hasattr(loader, "__len__") else None
        total = self.steps or (length * (self.epochs or 0) if length else None)
        shown = self.show if self.accelerator.is_main_process else False
        left = None if total is None else max(total - self.at.step, 0)
        ticks = track(iter(int, 1), "training", total=left, enabled=shown)
        try:
            yield lambda: next(ticks, None)
        finally:
            ticks.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _log(self, terms: list[dict[str, Tensor]]) -> None:
        if not terms:
            return
        means = {name: float(torch.stack([t[name] for t in terms if name in t]).mean()) for name in terms[-1]}
        terms.clear()
        if not np.isfinite(means["loss"]):
            raise FusionError(f"training diverged: the loss is {means['loss']} at step {self.at.step}")
        self.at.metrics = means
        self._line({"lr": float(self.optimizer.param_groups[0]["lr"]), **means})

    def _line(self, facts: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            line = {
                "step": self.at.step,
                "epoch": self.at.epoch,
                "seconds": round(self.at.seconds, 3),
                **facts,
            }
            self.at.lines += 1
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _validate(self, validate: Validate | None) -> None:
        if validate is None:
            return
        model = self.raw if self.average is None else self.average.module
        model.eval()
        with torch.no_grad():
            found = {name: float(value) for name, value in validate(model).items()}
        self.raw.train()
        self._line(
            {f"validation_{name}": value if np.isfinite(value) else None for name, value in found.items()}
        )
        score = found.get("score")
        if score is not None and (self.at.best is None or score > self.at.best["score"]):
            self.at.best = {"step": float(self.at.step), **found}
            self._write_weights(BEST)

    def _weights(self) -> dict[str, Tensor]:
        model = self.raw if self.average is None else self.average.module
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}

    def _write_weights(self, name: str, *, from_best: bool = False) -> None:
        if not self.accelerator.is_main_process:
            return
        if from_best and (self.folder / BEST).exists():
            with atomic_write(self.folder / name) as file:
                file.write((self.folder / BEST).read_bytes())
        else:
            save_tensors(self.folder / name, self._weights(), {"step": str(self.at.step)})

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state: dict[str, Any] = {
            "print": self.print,
            "model": self.raw.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
            "at": dict(vars(self.at)),
            "pending": self.pending,
            "rng": _plain_rng(),
        }
        with atomic_write(self.folder / STATE) as file:
            torch.save(state, file)

    def _load(self) -> None:
        path = self.folder / STATE
        with reading(path, error=CheckpointError), plain_tensors():
            state = dict(torch.load(path, map_location=self.accelerator.device, weights_only=True))
        if state.get("print") != self.print:
            raise InputError(
                f"{path} is of another run: the model's shapes, accumulate, ema, seed or precision differ"
            )
        with reading(path, "is damaged", CheckpointError), plain_tensors():
            self.raw.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None and state["scheduler"] is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.scaler.load_state_dict(state["scaler"])
            self.at = _Progress(**state["at"])
            self.pending = list(state["pending"])
            _restore_plain_rng(state["rng"])
        metrics = self.folder / METRICS
        if self.accelerator.is_main_process and metrics.exists():
            with reading(metrics, "is damaged", CheckpointError):
                kept = metrics.read_text("utf-8").splitlines()[: self.at.lines]
            with atomic_write(metrics, "w") as file:
                file.writelines(line + "\n" for line in kept)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _plain_rng() -> dict[str, Any]:
    """The global generators' states in what ``torch.load(weights_only=True)`` takes."""
    state = rng_state()
    name, keys, *rest = state["numpy"]
    version, words, gauss = state["python"]
    state["numpy"] = [name, torch.from_numpy(keys.astype(np.int64)), *rest]
    state["python"] = [version, list(words), gauss]
    return state


def _restore_plain_rng(state: dict[str, Any]) -> None:
    name, keys, *rest = state["numpy"]
    version, words, gauss = state["python"]
    restore_rng(
        {
            "numpy": (name, keys.cpu().numpy().astype(np.uint32), *rest),
            "python": (version, tuple(words), gauss),
            "torch": state["torch"].cpu(),
            "cuda": [value.cpu() for value in state["cuda"]],
        }
    )


@contextlib.contextmanager
def _caught_ctrl_c(stop: threading.Event) -> Generator[None, None, None]:
    """The first Ctrl-C sets ``stop``, the second interrupts; outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def caught(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, caught)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

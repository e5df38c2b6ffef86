"""A training run on disk: what a run directory holds, and going on from it bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusion_core.atomic import entries, sweep
from fusion_core.checkpoint import PathLike, atomic_write, load_strict, plain_tensors, save_tensors
from fusion_core.errors import CheckpointError, ConfigError, DataError, InputError, StoreError, reading
from fusion_core.results import plain
from kd_trilateral.bilevel import Bilevel
from kd_trilateral.config import Config
from kd_trilateral.forward import rng_snapshot
from kd_trilateral.module import TrilateralKD
from kd_trilateral.trace import AlphaTrace, TraceRows

STUDENT, RATIO, STATE, TRACE = "model.safetensors", "ratio.safetensors", "optimizer.pt", "trace.npz"
METRICS, CONFIG, AUDIT = "metrics.jsonl", "config.json", "audit.npz"
FILES = (STATE, STUDENT, RATIO, TRACE, METRICS, CONFIG, AUDIT)
REPORT = ("report.html", "report.json", "table.csv", "suspects.csv", "alpha.png", "lengths.png")


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: student steps done.
        phase: 0 while the ratio network is learned, 1 in the refit.
        trace: of the first phase.
        metrics: one row per epoch.
    """

    step: int
    phase: int
    trace: AlphaTrace
    metrics: list[dict[str, Any]]


def check_out(path: PathLike, *, resume: bool, overwrite: bool) -> None:
    """Refuse a place that a run must not write to, before any work.

    Raises:
        InputError: a file, a directory of something else, or another run without ``resume`` or ``overwrite``.
    """
    place = Path(path)
    if place.exists() and not place.is_dir():
        raise InputError(f"out is {place}, which is a file; name a directory")
    names = entries(place)
    if not names:
        return
    ours = STATE in names
    if not ours and CONFIG in names and names <= {*FILES, *REPORT}:  # cut off before its first checkpoint
        try:
            Config.load(place / CONFIG)
            ours = True
        except ConfigError:
            ours = False
    if not ours:
        raise InputError(f"out is {place}, which holds something else than a run; name another directory")
    if not resume and not overwrite:
        raise InputError(f"out is {place}, which is not empty; pass resume, overwrite or another name")


class RunDirectory:
    """Reads and writes the files of one run.

    ``config.json``; ``optimizer.pt``, the whole state in one file that appears at once and loads with
    ``weights_only=True``; and for other programs ``model.safetensors``, ``ratio.safetensors`` (ratio
    network, T-bar, normaliser), ``trace.npz``, ``metrics.jsonl`` and at the end ``audit.npz``.

    Args:
        path: the directory.
        config: settings of the run.
        data: digest of what the run learns from.
        resume: go on with the run that is there.
        overwrite: start anew over the run that is there.

    Raises:
        InputError: another run's directory without ``resume`` or ``overwrite``.
    """

    def __init__(self, path: PathLike, config: Config, data: str, *, resume: bool, overwrite: bool) -> None:
        self.path = Path(path)
        check_out(path, resume=resume, overwrite=overwrite)
        sweep(self.path)
        self.fingerprint = {"rows": data, **{k: v for k, v in config.to_dict().items() if k != "device"}}
        if not resume:
            for name in (*FILES, *REPORT):
                (self.path / name).unlink(missing_ok=True)
        if not (self.path / STATE).exists():
            config.save(self.path / CONFIG)

    def save(
        self,
        progress: Progress,
        student: nn.Module,
        loss: TrilateralKD,
        engine: Bilevel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write the files for other programs, then the state: a killed run makes anew what is ahead of it."""
        rows = progress.trace.rows()
        state = {
            "fingerprint": json.dumps(self.fingerprint),
            "step": progress.step,
            "phase": progress.phase,
            "student": student.state_dict(),
            "loss": loss.state_dict(),
            "optimizer": optimizer.state_dict(),
            "engine": engine.state_dict(),
            "rng": [r for r in rng_snapshot(engine.forward.device) if r is not None],
            "trace": {f.name: torch.from_numpy(getattr(rows, f.name)) for f in dataclasses.fields(rows)},
            "metrics": json.dumps(plain(progress.metrics)),
        }
        save_tensors(self.path / STUDENT, student.state_dict())
        save_tensors(self.path / RATIO, loss.state_dict())
        progress.trace.save(self.path / TRACE)
        with atomic_write(self.path / METRICS, "w") as file:
            file.writelines(json.dumps(plain(row)) + "\n" for row in progress.metrics)
        with atomic_write(self.path / STATE) as file:
            torch.save(state, file)

    def load(
        self,
        student: nn.Module,
        loss: TrilateralKD,
        engine: Bilevel,
        optimizer: torch.optim.Optimizer,
        capacity: int,
    ) -> Progress | None:
        """Restore everything, torch's global generators included; None where no state was written yet.

        Raises:
            StoreError: the run was made with other settings or data; the field is named.
            CheckpointError: the file is damaged or of another student.
        """
        state = self._state()
        if state is None:
            return None
        with reading(self.path / STATE, "is damaged", CheckpointError):
            load_strict(student, state["student"])
            load_strict(loss, state["loss"])
            optimizer.load_state_dict(state["optimizer"])
            engine.load_state_dict(state["engine"])
            torch.set_rng_state(state["rng"][0])
            for saved in state["rng"][1:]:
                torch.cuda.set_rng_state(saved, engine.forward.device)
            trace = AlphaTrace(capacity)
            trace.add(TraceRows(**{name: column.numpy() for name, column in state["trace"].items()}))
            return Progress(int(state["step"]), int(state["phase"]), trace, json.loads(state["metrics"]))

    def phase(self) -> int:
        """The phase that the stored state is in; 0 where there is none."""
        state = self._state()
        with reading(self.path / STATE, "is damaged", CheckpointError):
            return 0 if state is None else int(state["phase"])

    def _state(self) -> dict[str, Any] | None:
        if not (self.path / STATE).exists():
            return None
        with reading(self.path / STATE, error=CheckpointError), plain_tensors():
            loaded = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
            state: dict[str, Any] = dict(loaded)  # a bare tensor would take names for indices
            was = dict(json.loads(state["fingerprint"]))
        for name, value in json.loads(json.dumps(self.fingerprint)).items():
            if was.get(name) != value:
                raise StoreError(
                    f"{self.path} was made with {name} = {was.get(name)!r}, this run has {value!r}; take "
                    "the same "
                    "settings and data, or another directory (random data need a fixed attribute fingerprint)"
                )
        return state


def load_run(path: PathLike) -> tuple[Config, AlphaTrace, TraceRows | None, list[dict[str, Any]]]:
    """Settings, trace, final rows (where the run is finished) and metrics of a run directory.

    Raises:
        DataError: no run there.
    """
    place = Path(path)
    if not (place / CONFIG).is_file() or not (place / TRACE).is_file():
        raise DataError(
            f"{path} is no run directory; wanted one with {CONFIG} and {TRACE}, as train makes it"
        )
    audit = AlphaTrace.load(place / AUDIT).rows() if (place / AUDIT).is_file() else None
    with reading(place / METRICS, "is damaged", DataError):
        lines = [json.loads(line) for line in (place / METRICS).read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise DataError(f"{place / METRICS} is damaged: wanted one object a line")
    return Config.load(place / CONFIG), AlphaTrace.load(place / TRACE), audit, lines

"""What the ratio did to whom: one row per sample and step, kept in a ring."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.checkpoint import PathLike, atomic_write
from fusion_core.errors import DataError, InputError, check_range, reading
from fusion_core.plotting import axes_or_new, clean_axes
from fusion_core.results import Result
from kd_trilateral.module import Output

Array = NDArray[Any]
_FLUSH = 64
_NAMES = (
    "step",
    "sample",
    "alpha",
    "st",
    "sg",
    "tg",
    "label",
    "student_class",
    "teacher_class",
    "teacher_margin",
)


@dataclass(frozen=True, slots=True)
class TraceRows(Result):
    """Rows of a trace; every array has the one axis ``(rows,)``.

    Attributes:
        step: student steps done when the row was seen.
        sample: row number in the training set, -1 where it was not given.
        alpha: weight of the TEACHER.
        st: distance student-teacher over sqrt 2, in [0, 1].
        sg: student-label.
        tg: teacher-label.
        label: class index.
        student_class: the student's first choice.
        teacher_class: the teacher's.
        teacher_margin: probability of the label minus the best other class, by the teacher, in [-1, 1].
    """

    step: Array
    sample: Array
    alpha: Array
    st: Array
    sg: Array
    tg: Array
    label: Array
    student_class: Array
    teacher_class: Array
    teacher_margin: Array

    def __len__(self) -> int:
        return int(self.step.shape[0])

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``; MissingExtraError where pandas is not installed."""
        from fusion_core.report import dataframe

        return dataframe({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    def select(self, keep: Array) -> TraceRows:
        """The rows where a boolean or index array says so."""
        return TraceRows(*(getattr(self, name)[keep] for name in _NAMES))

    def last_of_each(self) -> TraceRows:
        """The latest row of each sample, by sample number; rows without one are left out."""
        known = self.select(self.sample >= 0)
        order = np.lexsort((known.step, known.sample))
        ids = known.sample[order]
        latest = np.flatnonzero(np.append(ids[1:] != ids[:-1], True)) if len(ids) else np.zeros(0, int)
        return known.select(order[latest])

    def drift(self) -> dict[int, float]:
        """Per sample the mean ratio of its later half of rows minus that of its earlier half."""
        known = self.select(self.sample >= 0)
        order = np.lexsort((known.step, known.sample))
        ids, alpha = known.sample[order], known.alpha[order].astype(np.float64)
        samples, start, count = np.unique(ids, return_index=True, return_counts=True)
        total = np.concatenate([[0.0], np.cumsum(alpha)])
        half = np.maximum(count // 2, 1)
        early = (total[start + half] - total[start]) / half
        stop = start + count
        late = (total[stop] - total[stop - half]) / half
        return dict(zip(samples.tolist(), (late - early).tolist(), strict=True))

    def plot(self, ax: Any = None) -> Any:
        """The ratio over training: its median and the bands that hold 50 % and 90 % of the rows.

        Args:
            ax: matplotlib axes to draw on; None makes a figure.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        ax = axes_or_new(ax, "kd-trilateral", 6.0, 3.4)
        clean_axes(ax, "weight of the teacher over training", "student step", "alpha")
        if len(self):
            bins = min(60, len(np.unique(self.step)))
            edges = np.linspace(self.step.min(), self.step.max() + 1, bins + 1)
            place = np.clip(np.searchsorted(edges, self.step, "right") - 1, 0, bins - 1)
            order = np.argsort(place, kind="stable")
            cuts = np.searchsorted(place[order], np.arange(1, bins))
            parts = [part for part in np.split(self.alpha[order], cuts) if len(part)]
            middle = ((edges[1:] + edges[:-1]) / 2)[np.unique(place)]
            q = np.stack([np.quantile(part, [0.05, 0.25, 0.5, 0.75, 0.95]) for part in parts], 1)
            band = {"color": "#1d4ed8", "linewidth": 0}
            ax.fill_between(middle, q[0], q[4], alpha=0.15, label="90 % of rows", **band)
            ax.fill_between(middle, q[1], q[3], alpha=0.3, label="50 %", **band)
            ax.plot(middle, q[2], color="#1d4ed8", linewidth=1.6, label="median")
            ax.legend(fontsize=8, frameon=False)
        ax.set_ylim(-0.02, 1.02)
        return ax


def lengths(out: Output) -> tuple[Tensor, Tensor, Tensor]:
    """The edges ST, SG and TG of each sample over sqrt 2, ``(batch,)`` in [0, 1]."""
    s, t, g = out.context.vertices
    edge = lambda a, b: torch.linalg.vector_norm(a - b, dim=-1) / math.sqrt(2.0)
    return edge(s, t), edge(s, g), edge(t, g)


@torch.no_grad()
def trace_columns(step: int, out: Output) -> dict[str, Tensor]:
    """The columns of :class:`TraceRows` for one forward pass, on its device."""
    context = out.context
    s, t, g = context.vertices
    st, sg, tg = lengths(out)
    sample = context.sample_id
    y = context.labels
    return {
        "step": torch.full_like(y, step),
        "sample": torch.full_like(y, -1) if sample is None else sample.to(y.dtype),
        "alpha": out.alpha.detach().float(),
        "st": st,
        "sg": sg,
        "tg": tg,
        "label": y,
        "student_class": s.argmax(-1),
        "teacher_class": t.argmax(-1),
        "teacher_margin": (g * t).sum(-1) - (t - 2.0 * g).amax(-1),
    }


def as_rows(columns: dict[str, Tensor]) -> TraceRows:
    """Columns on any device as rows on the host."""
    return TraceRows(*(columns[name].cpu().numpy() for name in _NAMES))


def _column(values: Array, name: str) -> Array:
    """A column as it was saved: one axis of whole numbers, or of decimals that are finite."""
    whole = name in ("step", "sample", "label", "student_class", "teacher_class")
    if values.ndim != 1 or values.dtype.kind not in ("iu" if whole else "fiu"):
        raise DataError(f"{name} is {values.dtype} of shape {values.shape}, wanted one axis of numbers")
    if not np.isfinite(values).all():
        raise DataError(f"{name} holds NaN or infinity")
    return values


class AlphaTrace:
    """Keeps the last rows that a training run saw.

    Rows stay on their device for 64 steps and come over together, so that recording does not stall the queue.

    Args:
        capacity: rows kept; older ones are dropped, whole steps at a time.

    Example:
        >>> from kd_trilateral.module import TrilateralKD
        >>> loss = TrilateralKD(3, tbar="none")
        >>> trace = AlphaTrace()
        >>> trace.record(0, loss(torch.zeros(2, 3), torch.eye(3)[:2], torch.tensor([0, 1])))
        >>> trace.rows().alpha
        array([0.5, 0.5], dtype=float32)
    """

    def __init__(self, capacity: int = 200_000) -> None:
        self.capacity = int(check_range("capacity", capacity, 1, float("inf")))
        self._parts: deque[TraceRows] = deque()
        self._waiting: list[dict[str, Tensor]] = []
        self._held = 0

    def record(self, step: int, out: Output) -> None:
        """Add the rows of one forward pass.

        Args:
            step: student steps done.
            out: what the loss returned.
        """
        self._waiting.append(trace_columns(step, out))
        if len(self._waiting) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        together = {name: torch.cat([part[name] for part in self._waiting]) for name in _NAMES}
        self._waiting = []
        self.add(as_rows(together))

    def add(self, rows: TraceRows) -> None:
        """Append rows that are on the host already."""
        self._parts.append(rows)
        self._held += len(rows)
        while self._held > self.capacity and self._parts:
            first = self._parts.popleft()
            excess = self._held - self.capacity
            self._held -= len(first)
            if len(first) > excess:  # the rest of the oldest part still fits
                keep = first.select(np.arange(excess, len(first)))
                self._parts.appendleft(keep)
                self._held += len(keep)

    def rows(self) -> TraceRows:
        """Everything that is held, oldest first."""
        self._flush()
        if not self._parts:
            return TraceRows(
                *(np.zeros(0, dtype=np.int64 if n in ("step", "sample") else np.float32) for n in _NAMES)
            )
        if len(self._parts) > 1:
            whole = TraceRows(*(np.concatenate([getattr(p, n) for p in self._parts]) for n in _NAMES))
            self._parts = deque([whole])
        return self._parts[0]

    def __len__(self) -> int:
        return self._held + sum(int(part["step"].shape[0]) for part in self._waiting)

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``."""
        return self.rows().to_dataframe()

    def plot(self, ax: Any = None) -> Any:
        """The ratio over training; see :meth:`TraceRows.plot`."""
        return self.rows().plot(ax)

    def save(self, path: PathLike) -> None:
        """Write ``.npz`` or ``.jsonl``, whole or not at all."""
        rows, suffix = self.rows(), Path(path).suffix
        if suffix == ".npz":
            rows.save(path)
        elif suffix == ".jsonl":
            import json

            with atomic_write(path, "w") as file:
                columns = [getattr(rows, name).tolist() for name in _NAMES]
                for values in zip(*columns, strict=True):
                    file.write(json.dumps(dict(zip(_NAMES, values, strict=True))) + "\n")
        else:
            raise InputError(f"path is {path}, wanted .npz or .jsonl")

    @classmethod
    def load(cls, path: PathLike, capacity: int = 200_000) -> AlphaTrace:
        """Read what :meth:`save` wrote as ``.npz``.

        Raises:
            DataError: no such file, or not a trace.
        """
        with reading(path, "is no trace", DataError), np.load(path, allow_pickle=False) as arrays:
            rows = TraceRows(*(_column(arrays[name], name) for name in _NAMES))
            if len({len(getattr(rows, name)) for name in _NAMES}) > 1:
                raise DataError(f"{path} is no trace: its columns have different lengths")
        trace = cls(capacity)
        trace.add(rows)
        return trace

"""What a run tells: which rows to distrust, how the ratio moved, and whether it helps on your data."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.checkpoint import PathLike, atomic_write
from fusion_core.errors import check_range
from fusion_core.plotting import clean_axes, new_figure, save_figure
from fusion_core.report import Figure, Page, Report, print_rows
from fusion_core.results import plain
from kd_trilateral.config import Config
from kd_trilateral.trace import AlphaTrace, TraceRows

TEACHER, LABEL = "teacher wrong?", "label wrong?"
_COLORS = {"clean": "#7a8794", "teacher wrong": "#c2410c", "label wrong": "#1d4ed8", "both wrong": "#7e22ce"}


def suspects(rows: TraceRows, n: int = 20, trace: AlphaTrace | None = None) -> list[dict[str, Any]]:
    """Rows to look at by hand, most suspicious first.

    ``teacher wrong?``: a low ratio although the teacher is sure of another class than the label, score
    ``(1 - alpha) * margin``. ``label wrong?``: a high ratio, and student and teacher agree against the
    label, score ``alpha * margin``. The margin is the teacher's best other class minus the label, in [0, 1].

    Args:
        rows: final rows, one per sample, such as ``FitResult.audit``.
        n: at most this many.
        trace: adds how far each row's ratio drifted over training.

    Returns:
        Mappings with ``sample``, ``suspicion``, ``score`` in [0, 1], ``alpha``, ``label``, ``teacher_class``,
        ``student_class``, ``st``, ``sg``, ``tg`` and, with a trace, ``drift``.
    """
    check_range("n", n, 0, float("inf"))
    margin = np.maximum(-rows.teacher_margin.astype(np.float64), 0.0)
    alpha = rows.alpha.astype(np.float64)
    agree = (rows.student_class == rows.teacher_class) & (rows.teacher_class != rows.label)
    scores = np.stack([(1.0 - alpha) * margin, np.where(agree, alpha, 0.0) * margin])
    best = scores.max(0)
    order = np.argsort(-best, kind="stable")[:n]
    drift = trace.rows().drift() if trace is not None else {}
    found: list[dict[str, Any]] = []
    for i in order[best[order] > 0].tolist():
        row: dict[str, Any] = {
            "sample": int(rows.sample[i]),
            "suspicion": (TEACHER, LABEL)[int(scores[:, i].argmax())],
            "score": float(best[i]),
        }
        row |= {name: float(getattr(rows, name)[i]) for name in ("alpha", "st", "sg", "tg")}
        row |= {name: int(getattr(rows, name)[i]) for name in ("label", "teacher_class", "student_class")}
        if trace is not None:
            row["drift"] = drift.get(row["sample"])
        found.append(row)
    return found


def save_suspects(rows: Sequence[dict[str, Any]], path: PathLike) -> None:
    """Write suspects as CSV, whole or not at all."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(
            file, list(rows[0]) if rows else ["sample", "suspicion", "score"], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


def group_means(rows: TraceRows, groups: dict[str, Any], bins: int = 40) -> tuple[Any, dict[str, Any]]:
    """Mean ratio of groups of samples over training.

    Args:
        rows: of a trace, with sample numbers.
        groups: name -> boolean array over sample numbers.
        bins: points of the curve.

    Returns:
        Steps at the bins' middles, and name -> mean ratio per bin (NaN where no row fell).
    """
    edges = np.linspace(rows.step.min(), rows.step.max() + 1, bins + 1)
    place = np.clip(np.searchsorted(edges, rows.step, "right") - 1, 0, bins - 1)
    curves: dict[str, Any] = {}
    for name, chosen in groups.items():
        keep = chosen[rows.sample]
        total = np.bincount(place[keep], rows.alpha[keep], bins)
        count = np.bincount(place[keep], minlength=bins)
        curves[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return (edges[1:] + edges[:-1]) / 2, curves


def plot(trace: AlphaTrace | TraceRows, path: PathLike | None = None, ax: Any = None) -> Any:
    """The ratio over training: its median and the bands that hold 50 % and 90 % of the rows.

    Args:
        trace: of a run.
        path: write a PNG there.
        ax: matplotlib axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    ax = trace.plot(ax)
    if path is not None:
        save_figure(ax.figure, path)
    return ax


def plot_lengths(rows: TraceRows, ax: Any) -> Any:
    """Final ratio against the distance student-teacher, coloured by whose first choice the label is."""
    clean_axes(ax, "final ratio and student-teacher distance", "ST / sqrt 2", "alpha")
    student, teacher = rows.student_class == rows.label, rows.teacher_class == rows.label
    for name, keep, color in (
        ("both say the label", student & teacher, "#15803d"),
        ("student alone", student & ~teacher, "#c2410c"),
        ("teacher alone", ~student & teacher, "#7e22ce"),
        ("neither", ~student & ~teacher, "#1d4ed8"),
    ):
        if keep.any():
            ax.scatter(rows.st[keep], rows.alpha[keep], s=9, alpha=0.6, color=color, linewidths=0, label=name)
    ax.set_ylim(-0.02, 1.02)
    ax.legend(fontsize=8, frameon=False)
    return ax


def plot_groups(rows: TraceRows, kind: Any, histogram: Any, curve: Any, audit: TraceRows) -> None:
    """Final ratios and their course for rows whose fault is known.

    Args:
        rows: of the trace.
        kind: per sample 0 clean, 1 teacher wrong, 2 label wrong, 3 both.
        histogram: axes for the final ratios.
        curve: axes for the means over training.
        audit: final rows.
    """
    kind = np.asarray(kind)
    groups = {name: kind == i for i, name in enumerate(_COLORS) if i < 3 and (kind == i).any()}
    clean_axes(histogram, "final ratio by kind of row", "alpha", "share of its rows")
    values = [audit.alpha[chosen[audit.sample]] for chosen in groups.values()]
    histogram.hist(
        values,
        bins=np.linspace(0, 1, 11).tolist(),
        weights=[np.full(len(v), 1.0 / max(len(v), 1)) for v in values],
        color=[_COLORS[name] for name in groups],
        label=[f"{name} ({len(v)})" for name, v in zip(groups, values, strict=True)],
    )
    histogram.legend(fontsize=8, frameon=False)
    clean_axes(curve, "mean ratio of those rows over training", "student step", "alpha")
    steps, curves = group_means(rows, groups)
    for name, values in curves.items():
        curve.plot(steps, values, color=_COLORS[name], linewidth=1.6, label=name)
    curve.set_ylim(-0.02, 1.02)
    curve.legend(fontsize=8, frameon=False)


@dataclass(frozen=True, kw_only=True)
class RunReport(Report):
    """A training run: statistics of the ratio, suspects (``rows``), pictures.

    Attributes:
        statistics: of the final ratio and the last epoch.
        trace: ratios over training.
        audit: final row of each training sample.
    """

    statistics: dict[str, Any]
    trace: AlphaTrace
    audit: TraceRows

    def page(self) -> Page:
        """The page, with the statistics first."""
        page = Page(self.title).heading("The ratio").table(_as_rows(self.statistics))
        if self.rows:
            page.heading("Rows to distrust").table(self.rows)
        for figure in self.figures:
            page.figure(figure)
        return page

    def print(self, console: Any = None) -> None:
        """Print statistics and suspects."""
        print_rows(_as_rows(self.statistics), console)
        if self.rows:
            print_rows(self.rows, console)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, with the statistics."""
        return {**super().to_dict(), "statistics": plain(self.statistics)}

    def suspects(self, n: int = 20) -> list[dict[str, Any]]:
        """The ``n`` most suspicious rows, see :func:`suspects`."""
        return suspects(self.audit, n, self.trace)

    def save(self, directory: PathLike) -> None:
        """Write page, JSON, table, ``alpha.png``, ``lengths.png`` and ``suspects.csv``."""
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder) / "alpha.png", Path(folder) / "lengths.png"
            plot(self.trace, first)
            figure = new_figure(6.0, 3.4, "kd-trilateral")
            plot_lengths(self.audit, figure.subplots())
            save_figure(figure, second)
            pictures = [
                Figure(
                    first,
                    "Median and spread of the teacher's weight over training steps.",
                    "Ratio over training",
                ),
                Figure(
                    second,
                    "Final teacher weight of each row against the student-teacher distance.",
                    "Final ratio",
                ),
            ]
            page = replace(self, figures=[*self.figures, *pictures])
            Report.save(page, directory)
        save_suspects(self.suspects(max(len(self.audit), 1)), Path(directory) / "suspects.csv")


def run_report(
    trace: AlphaTrace, audit: TraceRows, metrics: Sequence[dict[str, Any]], config: Config, n: int = 20
) -> RunReport:
    """A report of one run.

    Args:
        trace: ratios over training.
        audit: final rows.
        metrics: one mapping per epoch; the last is shown.
        config: names the method in the title.
        n: suspects in the table.
    """
    alpha = audit.alpha
    facts: dict[str, Any] = {"rows": len(audit)}
    if len(audit):
        low, middle, high = np.quantile(alpha, [0.05, 0.5, 0.95]).tolist()
        facts |= {
            "alpha mean": float(alpha.mean()),
            "alpha 5 %": low,
            "alpha median": middle,
            "alpha 95 %": high,
        }
    facts |= {k: v for k, v in (metrics[-1] if metrics else {}).items() if k not in ("alpha",)}
    table = suspects(audit, n, trace)
    title = f"Distillation run, ratio {config.ratio}"
    return RunReport(title=title, rows=table, statistics=facts, trace=trace, audit=audit)


def _as_rows(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"what": name, "value": value} for name, value in facts.items()]

"""Does a per-sample ratio help on this data? Methods over seeds, with a paired test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import nn

from fusion_core.comparison import Comparison
from fusion_core.errors import ConfigError, InputError
from fusion_core.progress import track
from fusion_core.report import Report
from kd_trilateral.config import Config
from kd_trilateral.module import RATIOS
from kd_trilateral.rowsource import Rows, check_teacher, teacher_logits
from kd_trilateral.training import FitResult, Splits, fit

METRICS: dict[str, Any] = {
    "accuracy": {"better": "higher", "percent": True},
    "nll": {"better": "lower"},
}
BASELINE = "KD 0.5"
Settings = Mapping[str, Any]


def method(word: str) -> tuple[str, dict[str, Any]]:
    """Label and settings of a method's short name.

    ``alone`` (the student without teacher), ``const`` or ``const:0.9``, ``ada``, ``wls``, ``anl``, ``rw``,
    ``tgeo`` (preset robust), ``tgeo:paper``, ``tgeo:refit``, ``tgeo:frozen``.

    Raises:
        ConfigError: unknown.

    Example:
        >>> method("const:0.9")
        ('KD 0.9', {'ratio': 'const', 'alpha': 0.9})
    """
    name, _, option = word.strip().partition(":")
    if name == "alone" and not option:
        return "student alone", {"ratio": "const", "alpha": 0.0}
    if name == "const":
        try:
            alpha = float(option or 0.5)
        except ValueError:
            raise ConfigError(f"ratio is {word!r}, wanted const:NUMBER") from None
        return f"KD {alpha:g}", {"ratio": "const", "alpha": alpha}
    if name == "tgeo" and option in ("", "paper", "refit", "frozen"):
        extra: dict[str, dict[str, Any]] = {
            "": {"preset": "robust"},
            "paper": {"preset": "paper"},
            "refit": {"preset": "robust", "refit": True},
            "frozen": {"preset": "paper", "hypergradient": "frozen"},
        }
        return f"TGeo {option or 'robust'}", {"ratio": "tgeo", **extra[option]}
    if name in RATIOS and not option and name != "tgeo":
        return name.upper(), {"ratio": name}
    raise ConfigError(
        f"ratio is {word!r}, wanted alone, const[:NUMBER], ada, wls, anl, rw, tgeo, tgeo:paper, tgeo:refit "
        "or "
        "tgeo:frozen"
    )


@dataclass(frozen=True, kw_only=True)
class CompareReport(Report):
    """Methods over seeds; ``verdict`` says in words whether the per-sample ratio helped.

    Attributes:
        verdict: one sentence per metric.
    """

    verdict: Sequence[str] = ()

    def page(self) -> Any:
        """The page, with the verdict first."""
        page = super().page()
        for sentence in self.verdict:
            page.text(sentence)
        return page

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, with the verdict."""
        return {**super().to_dict(), "verdict": list(self.verdict)}


def judge(comparison: Comparison) -> list[str]:
    """For each metric: the best fixed or heuristic method against the best learned one, by the paired test.

    The difference is taken on the same seeds; "helps" is said only where its 95 % interval leaves out 0.
    """
    from fusion_core.stats import paired_t

    sentences: list[str] = []
    rows = comparison.rows()
    for metric, reading in comparison.metrics.items():
        sign = 1.0 if reading["better"] == "higher" else -1.0
        mine = [r for r in rows if r["metric"] == metric and r["mean"] is not None]
        learned = [r for r in mine if r["method"].startswith("TGeo")]
        plain = [r for r in mine if not r["method"].startswith("TGeo")]
        if not learned or not plain:
            continue
        best, rival = (max(some, key=lambda r: sign * r["mean"]) for some in (learned, plain))
        pairs = [(a, b) for a, b in zip(best["values"], rival["values"], strict=True) if None not in (a, b)]
        test = paired_t([a for a, _ in pairs], [b for _, b in pairs])
        scale, unit = (100.0, " points") if reading.get("percent") else (1.0, "")
        words = f"{metric}: {best['method']} - {rival['method']} = {scale * test.difference:+.3f}{unit}"
        if test.low is None or test.high is None:
            sentences.append(f"{words} (one seed: no test)")
            continue
        words += f" [{scale * test.low:+.3f}, {scale * test.high:+.3f}], p = {test.p:.3f}"
        gain = sign * test.difference
        clear = min(sign * test.low, sign * test.high) > 0 or max(sign * test.low, sign * test.high) < 0
        sentences.append(
            f"{words}: {'no clear difference' if not clear else 'helps' if gain > 0 else 'harms'}"
        )
    return sentences


def _with_logits(rows: Splits, refits: bool) -> Splits:
    """The splits with a teacher module's logits: it runs once per draw, not once per method."""
    if rows.test is None or rows.teacher is None:
        raise InputError("compare measures on test rows and distils a teacher; the splits need both")
    if not isinstance(rows.teacher, nn.Module):
        return rows
    check_teacher(rows.teacher)
    held = rows.val_teacher
    if refits and held is None and rows.val is not None:
        held = teacher_logits(rows.teacher, Rows(rows.val))
    return replace(rows, teacher=teacher_logits(rows.teacher, Rows(rows.train)), val_teacher=held)


def compare(
    splits: Callable[[int], Splits],
    student: Callable[[int], nn.Module],
    methods: Mapping[str, Settings],
    seeds: Sequence[int],
    *,
    config: Config | None = None,
    baseline: str | None = None,
    title: str = "",
    watch: Callable[[str, int, FitResult], None] | None = None,
    metrics: Mapping[str, Any] = METRICS,
    progress: bool | None = None,
) -> CompareReport:
    """Train a student with each method on each seed and test the differences in pairs.

    Args:
        splits: seed -> rows; every method sees the same draw, whose test rows are needed.
        student: seed -> fresh student; the same weights for every method.
        methods: label -> settings that replace those of ``config``, such as ``dict(map(method, words))``.
        seeds: the runs.
        config: common settings.
        baseline: label that the others are compared with; None = ``KD 0.5`` or the first.
        title: of the table.
        watch: called with label, seed and result after each run.
        metrics: of the test rows that the table shows.
        progress: show a bar; None = on a terminal.

    Returns:
        A report with the comparison and a verdict.

    Raises:
        InputError: no methods, no seeds, or a split without test rows.
    """
    if not methods:
        raise InputError("methods is empty, wanted label -> settings")
    chosen = baseline or (BASELINE if BASELINE in methods else next(iter(methods)))
    table = Comparison(metrics, chosen, list(seeds), title)
    common = config or Config()
    jobs = [(seed, name) for seed in seeds for name in methods]
    drawn: dict[int, Splits] = {}
    for seed, name in track(jobs, title or "compare", enabled=progress):
        if seed not in drawn:
            drawn = {seed: _with_logits(splits(seed), any(m.get("refit") for m in methods.values()))}
        rows = drawn[seed]
        result = fit(
            student(seed),
            rows.train,
            rows.val,
            teacher=cast(Any, rows.teacher),
            val_teacher=rows.val_teacher,
            test=rows.test,
            num_classes=rows.num_classes,
            config=common.replace(**{**methods[name], "seed": seed}),
            progress=False,
        )
        for metric in metrics:
            if metric in result.metrics[-1]:
                table.add(name, metric, seed, result.metrics[-1][metric])
        if watch is not None:
            watch(name, seed, result)
    return CompareReport(title=title or "Comparison", comparison=table, verdict=judge(table))

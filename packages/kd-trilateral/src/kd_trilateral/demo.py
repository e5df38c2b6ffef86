"""The demo: who is wrong, the teacher or the label? Digits with 30 % of both, and the same data clean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_core.comparison import Comparison
from fusion_core.demo import Demo, Method
from fusion_core.device import threads
from fusion_core.errors import InputError, require_extra
from fusion_core.plotting import clean_axes, new_figure, save_figure
from fusion_core.processes import Start, second_process
from fusion_core.report import Claim, Figure
from fusion_core.stats import Paired, paired_t, summary
from kd_trilateral.comparing import METRICS, compare, judge
from kd_trilateral.comparing import method as method_settings
from kd_trilateral.config import Config
from kd_trilateral.evaluation import auc
from kd_trilateral.report import plot_groups, plot_lengths
from kd_trilateral.tasks import BOTH_WRONG, LABEL_WRONG, TEACHER_WRONG, Task, make_task
from kd_trilateral.training import FitResult, fit

NOISY = ("alone", "const:0.5", "const:0.9", "wls", "tgeo:paper", "tgeo")
MORE = ("alone", "const:0.3", "const:0.5", "const:0.9", "ada", "wls", "tgeo:frozen", "tgeo:paper", "tgeo")
CLEAN = ("alone", "const:0.5", "const:0.9", "wls", "tgeo")
# The settings of the recorded experiment: an outer step at each student step, v without preconditioner.
RECIPE: dict[str, Any] = {"every": 1, "precondition": False, "val_batch_size": 64, "device": "cpu"}
QUICK = {"every": 2, "steps": 200}  # of the quick mode: fewer outer steps, and at most so many of the student
_VARIANT = "Compact geometry with a bounded outer loss (preset robust) beats a fixed ratio and WLS"
AUDIT: Any = {"better": "higher", "percent": False}


def audit_auc(result: FitResult, kind: torch.Tensor) -> float | None:
    """Area under the ROC curve with which the final ratio tells wrong labels from a wrong teacher."""
    wrong = kind[torch.from_numpy(result.audit.sample)].numpy()
    one = (wrong == TEACHER_WRONG) | (wrong == LABEL_WRONG)
    if len(np.unique(wrong[one])) < 2:
        return None
    return auc(result.audit.alpha[one], wrong[one] == LABEL_WRONG)


class _Bench:
    """Runs methods on draws of one task and keeps what the pictures need."""

    def __init__(
        self, task: str, noise: tuple[float, float], val_noise: float, seeds: Sequence[int], *, full: bool
    ) -> None:
        self.task, self.noise, self.val_noise, self.seeds = task, noise, val_noise, list(seeds)
        self.full = full
        self.drawn: dict[int, Task] = {}
        self.first: dict[str, FitResult] = {}
        self.robust: dict[int, FitResult] = {}
        self.settings: dict[str, Any] = {}
        self.teacher: list[float] = []

    def draw(self, seed: int) -> Task:
        """The task of a seed; every method gets the same."""
        if seed not in self.drawn:
            self.drawn[seed] = make_task(self.task, seed, self.noise, self.val_noise)
            self.teacher.append(self.drawn[seed].teacher_accuracy)
        return self.drawn[seed]

    def run(
        self, methods: Sequence[str], title: str, *, all_rows: bool = False, audit: bool = False
    ) -> Comparison:
        """One table; ``all_rows`` trains the plain methods on the held-out rows too."""
        metrics: dict[str, Any] = dict(METRICS)
        if self.task != "digits":
            metrics["auc"] = {"better": "higher", "percent": True}
        found: dict[tuple[str, int], float] = {}

        def watch(name: str, seed: int, result: FitResult) -> None:
            if seed == self.seeds[0]:
                self.first[name] = result
            if name == "TGeo robust":
                self.robust[seed] = result
            value = audit_auc(result, self.draw(seed).kind) if audit else None
            if value is not None and not name.startswith(("KD", "student")):
                found[name, seed] = value

        def splits(seed: int) -> Any:
            return self.draw(seed).splits

        self.settings = {**RECIPE, **self.draw(self.seeds[0]).settings}
        if not self.full:
            self.settings |= {**QUICK, "steps": min(QUICK["steps"], self.settings["steps"])}
        config = Config().replace(**self.settings)
        chosen = dict(method_settings(word) for word in methods)
        if all_rows:
            return _on_all_rows(self, chosen, config, title)
        student = lambda seed: self.draw(seed).student()
        report = compare(
            splits, student, chosen, self.seeds, config=config, title=title, watch=watch, metrics=metrics
        )
        table = report.comparison
        assert table is not None
        if not found:
            return table
        full = Comparison({**metrics, "audit": AUDIT}, table.baseline, self.seeds, title)
        for row in table.rows():
            for seed, value in zip(self.seeds, row["values"], strict=True):
                full.add(row["method"], row["metric"], seed, value)
        for (name, seed), value in found.items():
            full.add(name, "audit", seed, value)
        return full


def _on_all_rows(bench: _Bench, chosen: dict[str, dict[str, Any]], config: Config, title: str) -> Comparison:
    """The comparison on equal rows: everyone may train on the clean held-out rows as well."""
    table = Comparison(METRICS, next(iter(chosen)), bench.seeds, title)
    for seed in bench.seeds:
        task = bench.draw(seed)
        rows = task.splits
        joined = tuple(torch.cat(pair) for pair in zip(rows.train, rows.val, strict=True))
        assert isinstance(rows.teacher, torch.Tensor)
        assert rows.val_teacher is not None
        for name, settings in chosen.items():
            refit = settings.get("refit", False)
            result = fit(
                task.student(),
                rows.train if refit else joined,
                rows.val if refit else rows.test,  # a heuristic ratio never looks at held-out rows
                teacher=rows.teacher if refit else torch.cat([rows.teacher, rows.val_teacher]),
                val_teacher=rows.val_teacher if refit else None,
                learned=bench.robust.get(seed) if refit else None,
                test=rows.test,
                num_classes=rows.num_classes,
                config=config.replace(**{**settings, "seed": seed}),
                progress=False,
            )
            for metric in METRICS:
                table.add(name, metric, seed, result.metrics[-1][metric])
    return table


def _values(table: Comparison, name: str, metric: str) -> list[float]:
    return next(r["values"] for r in table.rows() if r["method"] == name and r["metric"] == metric)


def _test(table: Comparison, one: str, other: str, metric: str) -> Paired:
    return paired_t(_values(table, one, metric), _values(table, other, metric))


def _words(test: Paired, scale: float = 1.0, digits: int = 3) -> str:
    text = f"{scale * test.difference:+.{digits}f}"
    if test.low is not None and test.high is not None and test.p is not None:
        chance = "p < 0.001" if test.p < 1e-3 else f"p = {test.p:.3f}"
        text += f" [{scale * test.low:+.{digits}f}, {scale * test.high:+.{digits}f}], {chance}"
    return text


def _clear(test: Paired, sign: float) -> bool:
    return test.low is not None and test.high is not None and min(sign * test.low, sign * test.high) > 0


def _versus(table: Comparison, ours: str, rivals: Sequence[str], metric: str) -> tuple[bool, str]:
    """Shown only if ours is clearly better than every rival, by the paired 95 % interval."""
    higher = metric == "accuracy"
    scale, digits, unit = (100.0, 2, " points") if higher else (1.0, 3, "")
    tests = {rival: _test(table, ours, rival, metric) for rival in rivals}
    shown = all(_clear(test, 1.0 if higher else -1.0) for test in tests.values())
    parts = [f"{ours} - {rival}: {_words(test, scale, digits)}{unit}" for rival, test in tests.items()]
    return shown, "; ".join(parts) + f" ({len(table.seeds)} seeds, paired)."


def _noisy_claims(table: Comparison) -> list[Claim]:
    claims: list[Claim] = []
    for name, who in (("TGeo robust", "our variant"), ("TGeo paper", "the paper's own configuration")):
        values = _values(table, name, "audit")
        mean, std, _ = summary(values)
        text = "The learned ratio tells whom to trust: low for a wrong teacher, high for a wrong label"
        claims.append(
            Claim(
                f"{text} ({who}).",
                "TGeo-KD, introduction (trust the teacher less on samples it gets wrong)",
                mean > 0.9,
                f"Final alpha separates wrong labels from a wrong teacher with AUC {mean:.3f}"
                + (f" +- {std:.3f}" if std is not None else "")
                + f" (worst seed {min(values):.3f}); nobody told the method which rows are wrong.",
            )
        )
    for ours, text, source, metric in (
        (
            "TGeo paper",
            "The paper's configuration beats a fixed ratio and WLS in accuracy.",
            "TGeo-KD, abstract",
            "accuracy",
        ),
        ("TGeo robust", f"{_VARIANT} in accuracy.", "this package, not the paper", "accuracy"),
        ("TGeo robust", f"{_VARIANT} in likelihood (NLL).", "this package, not the paper", "nll"),
    ):
        shown, sentence = _versus(table, ours, ("KD 0.5", "WLS"), metric)
        claims.append(Claim(text, source, shown, sentence))
    return claims


def _clean_claim(table: Comparison) -> Claim:
    best = max((r for r in table.rows() if r["metric"] == "accuracy"), key=lambda r: r["mean"])
    rivals = [m for m in table.methods if m.startswith("KD") or m == "WLS"]
    rival = max(rivals, key=lambda m: np.mean(_values(table, m, "accuracy")))
    test = _test(table, "TGeo robust", rival, "accuracy")
    return Claim(
        "A learned ratio also helps when teacher and labels are clean.",
        "TGeo-KD, abstract (gains on standard benchmarks)",
        _clear(test, 1.0),
        f"TGeo robust - {rival}: accuracy {_words(test, 100, 2)} points; best mean here: {best['method']}. "
        "Without "
        "wrong teachers or labels there is little for the ratio to decide.",
    )


def _refit_claim(table: Comparison) -> Claim:
    test, nll = (_test(table, "TGeo refit", "WLS", metric) for metric in ("accuracy", "nll"))
    return Claim(
        "The gain is more than what the clean held-out rows are worth to everyone (our variant).",
        "this package",
        _clear(test, 1.0),
        "All methods may train on the held-out rows as well: TGeo refit - WLS: accuracy "
        f"{_words(test, 100, 2)} points, NLL {_words(nll)}.",
    )


def _fragile_claim(tables: dict[str, Comparison]) -> Claim:
    clean, spoilt = tables["clean"], tables["spoilt"]
    drop = {
        name: np.mean(_values(spoilt, name, "accuracy")) - np.mean(_values(clean, name, "accuracy"))
        for name in ("TGeo paper", "TGeo robust")
    }
    test = _test(spoilt, "TGeo robust", "TGeo paper", "accuracy")
    return Claim(
        "The bounded outer loss keeps working when 30 % of the held-out labels are wrong (our variant).",
        "this package",
        _clear(test, 1.0),
        f"With wrong held-out labels TGeo robust - TGeo paper: accuracy {_words(test, 100, 2)} points; "
        "change against "
        f"clean held-out labels: robust {100 * drop['TGeo robust']:+.2f}, paper "
        f"{100 * drop['TGeo paper']:+.2f}.",
    )


def _picture(bench: _Bench, out: Path) -> Figure:
    task, best = bench.drawn[bench.seeds[0]], bench.first["TGeo robust"]
    figure = new_figure(11.0, 7.4, "kd-trilateral", "demo")
    axes = figure.subplots(2, 2)
    plot_groups(best.trace.rows(), task.kind.numpy(), axes[0, 0], axes[0, 1], best.audit)
    clean_axes(axes[1, 0], "test NLL over training", "student step", "NLL (nats)")
    fixed = [name for name in bench.first if name.startswith("KD")]
    rival = min(fixed, key=lambda name: bench.first[name].metrics[-1]["nll"])
    for name, color in (
        ("student alone", "#7a8794"),
        (rival, "#c2410c"),
        ("WLS", "#15803d"),
        ("TGeo paper", "#7e22ce"),
        ("TGeo robust", "#1d4ed8"),
    ):
        if name in bench.first:
            rows = bench.first[name].metrics
            axes[1, 0].plot(
                [r["step"] for r in rows], [r["nll"] for r in rows], color=color, linewidth=1.6, label=name
            )
    axes[1, 0].set_ylim(0, 1.2)
    axes[1, 0].legend(fontsize=8, frameon=False)
    plot_lengths(best.audit, axes[1, 1])
    save_figure(figure, out / "alpha.png")
    count = int((task.kind == BOTH_WRONG).sum())
    return Figure(
        out / "alpha.png",
        "Four panels: final ratio of clean, teacher-wrong and label-wrong rows; its course; test NLL; "
        "ratio and ST.",
        f"TGeo robust on {bench.task}, seed {bench.seeds[0]}. Rows with a wrong teacher end at low alpha, "
        "rows with a "
        f"wrong label at high alpha; on clean rows both sources say the same and alpha is arbitrary. "
        f"{count} rows with both faults are left out of the upper panels.",
    )


def demo(
    out: Path,
    *,
    full: bool = False,
    seed: int = 0,
    task: str = "digits",
    noise: str | tuple[float, float] | None = None,
    val_noise: float = 0.0,
    seeds: int | None = None,
) -> Demo:
    """Train students with fixed, heuristic and learned ratios and say what shows.

    Args:
        out: gets the picture.
        full: five seeds, wrong held-out labels, and the cancer and click tasks as well.
        seed: first seed.
        task: ``digits``, ``cancer`` or ``ctr``.
        noise: shares of wrong teachers and wrong labels, in [0, 1), also as text; None = 0.3,0.3 (ctr: 0,0).
        val_noise: share of wrong held-out labels.
        seeds: how many; None = 3, with ``full`` 5.

    Raises:
        InputError: ``noise`` is not two shares.
    """
    run = list(range(seed, seed + (seeds or (5 if full else 3))))
    spoilt = ((0.0, 0.0) if task == "ctr" else (0.3, 0.3)) if noise is None else _shares(noise)
    with threads(), second_process(two := task == "digits" and any(spoilt)) as start:
        require_extra("sklearn.datasets", "demo", "kd-trilateral")  # meanwhile the other process loads torch
        require_extra("matplotlib.figure", "demo", "kd-trilateral")
        return _demo(out, full, task, spoilt, val_noise, run, start, two=two)


def _shares(noise: str | tuple[float, float]) -> tuple[float, float]:
    try:
        teacher, label = (float(part) for part in (noise.split(",") if isinstance(noise, str) else noise))
    except ValueError:
        teacher = label = math.nan
    if not (0.0 <= teacher < 1.0 and 0.0 <= label < 1.0):
        raise InputError(f"noise is {noise!r}, wanted two shares in [0, 1) such as 0.3,0.3")
    return teacher, label


def _title(task: str, noise: tuple[float, float], val_noise: float) -> str:
    faults = f"{noise[0]:.0%} wrong teacher, {noise[1]:.0%} wrong labels" if any(noise) else "clean"
    return f"{task}, {faults}" + (f", {val_noise:.0%} wrong held-out labels" if val_noise else "")


def _table(
    task: str, noise: tuple[float, float], val_noise: float, seeds: list[int], methods: Any, full: bool
) -> dict[str, Any]:
    """One table as plain values: what a second process computes."""
    bench = _Bench(task, noise, val_noise, seeds, full=full)
    return bench.run(methods, _title(task, noise, val_noise)).to_dict()


def _spoilt(bench: _Bench) -> list[Comparison]:
    """The methods on spoilt rows, and some of them where everyone trains on the held-out rows too."""
    title = _title(bench.task, bench.noise, bench.val_noise)
    rows = ("const:0.5", "wls", "tgeo:refit")
    return [
        bench.run(MORE if bench.full else NOISY, title, audit=True),
        bench.run(rows, f"{title}; everyone trains on the held-out rows too", all_rows=True),
    ]


def _spoilt_beside(
    task: str, noise: tuple[float, float], val_noise: float, seeds: list[int], full: bool
) -> tuple[list[dict[str, Any]], list[float]]:
    """The same in a second process, and the teacher's accuracy for each seed."""
    bench = _Bench(task, noise, val_noise, seeds, full=full)
    return [table.to_dict() for table in _spoilt(bench)], bench.teacher


def _demo(
    out: Path, full: bool, task: str, noise: tuple[float, float], val_noise: float, seeds: list[int],
    start: Start, *, two: bool,
) -> Demo:  # fmt: skip
    clean = (0.0, 0.0)
    tables: list[Comparison] = []
    claims: list[Claim] = []
    notes: list[str] = []
    # The other process takes the last seed of the spoilt rows and most that is not spoilt: half of the work.
    beside = seeds[-1:] if two and len(seeds) > 1 else []
    own = seeds[:1] if beside and not full else []
    main = _Bench(task, noise, val_noise, seeds[: len(seeds) - len(beside)], full=full)
    if not any(noise):
        tables.append(main.run(CLEAN, _title(task, noise, val_noise)))
        claims.append(_clean_claim(tables[0]))
        audited = False
    else:
        rest = start(_spoilt_beside, task, noise, val_noise, beside, full) if beside else None
        untouched = start(_table, task, clean, 0.0, seeds[len(own) :], CLEAN, full)
        more = full and task == "digits"
        few = ("alone", "const:0.5", "const:0.9", "wls", "tgeo")
        others = [
            (name, start(_table, name, faults, 0.0, seeds, few, full))
            for name, faults in (("cancer", (0.3, 0.3)), ("ctr", clean))
            if more
        ]
        tables += _spoilt(main)
        methods = ("const:0.5", "wls", "tgeo:paper", "tgeo")
        held = [_table(task, noise, 0.3, seeds, methods, full)] if more else []
        first = [_table(task, clean, 0.0, own, CLEAN, full)] if own else []
        if rest is not None:
            parts, teacher = rest()
            pairs = zip(tables, map(Comparison.from_dict, parts), strict=True)
            tables = [one.joined(other) for one, other in pairs]
            main.teacher += teacher
        audited = any(row["metric"] == "audit" for row in tables[0].rows())
        claims += _noisy_claims(tables[0]) if audited else []
        claims.append(_refit_claim(tables[1]))
        tables.append(reduce(Comparison.joined, map(Comparison.from_dict, [*first, untouched()])))
        claims.append(_clean_claim(tables[2]))
        for table in map(Comparison.from_dict, held):
            claims.append(_fragile_claim({"clean": tables[0], "spoilt": table}))
            tables.append(table)
        for name, table in others:
            tables.append(Comparison.from_dict(table()))
            notes.extend(f"{name}: {sentence}" for sentence in judge(tables[-1]))
    accuracy = 100 * float(np.mean(main.teacher))
    notes = [
        f"The clean teacher reaches {accuracy:.1f} % on the test rows; wrong rows are made by rolling its "
        "logits.",
        "audit = area under the ROC curve with which the final ratio separates wrong labels from a wrong "
        "teacher. "
        "WLS reads the given labels as well and separates them too; what it does not do is act on held-out "
        "rows.",
        "Small multilayer perceptrons on bundled data: differences between methods are a matter of a point "
        "or two, "
        "so each is tested in pairs over seeds. The published numbers (CIFAR-100, ImageNet, HIL) are not "
        "repeated here.",
        *notes,
    ]
    if not full:
        steps = f"{main.settings['steps']} student steps, the ratio network moves at every second"
        notes.append(
            f"Quick mode: {steps}; the recorded experiment (--full) takes 300, and moves it at each."
        )
    if task == "ctr" or full:
        notes.append("ctr is a faithful simulation of click logs, not real data: none ships in a wheel.")
    figures = [_picture(main, out)] if audited else []
    return Demo(tables, claims, figures, notes, {"task": task, "noise": noise, **main.settings}, seeds)


method = Method(
    name="kd-trilateral",
    package="kd-trilateral",
    title="TGeo-KD: per-sample distillation ratios from trilateral geometry",
    paper="Hu et al., Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation, "
    "ICLR 2024",
    url="https://arxiv.org/abs/2312.15112",
    summary="Learns, for each training sample, how much to trust the teacher and how much the label.",
    demo=demo,
)

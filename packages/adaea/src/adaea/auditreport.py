"""The result of an audit: tables with intervals, pictures, and the adversarial images themselves."""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from adaea.advset import AdversarialSet
from adaea.runs import AttackRun, file_key, save_run
from fusion_core.atomic import atomic_directory, atomic_write
from fusion_core.comparison import data_console
from fusion_core.errors import FusionWarning, InputError, MissingExtraError
from fusion_core.report import Figure, Page, Report, piece, print_rows
from fusion_core.results import dump_json, plain
from fusion_core.stats import Interval

SCHEMA = "adaea.audit/1"
SCOPE = (
    "For models that you own or may test. adaea attacks surrogates on your machine and asks the audited "
    "model for its answers; it ships no client for remote services."
)
READING = (
    "Strict: of the images named rightly before, the share named wrongly after, with 95 % Wilson intervals. "
    "Higher is worse for the model. A low rate is no proof of robustness: these attacks never see the model."
)
RATES = ("strict", "official", "fooling", "targeted")


@dataclass(frozen=True, kw_only=True)
class AuditReport(Report):
    """How exposed models are to transfer attacks; made by :func:`adaea.audit`.

    Attributes:
        tests: each attack against the first on the same images: strict successes of one alone, McNemar's p.
        runs: attack and budget -> adversarial set, weights, kept pixels and losses.
        targets: names of the audited models.
        surrogates: names of the surrogates.
        settings: of the audit, for the record.
        pictures: what the image grid shows.
    """

    tests: Sequence[Mapping[str, Any]] = ()
    runs: Mapping[tuple[str, float], AttackRun] = field(default_factory=dict[tuple[str, float], AttackRun])
    targets: Sequence[str] = ()
    surrogates: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    pictures: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks, in order."""
        return list(dict.fromkeys(row["attack"] for row in self.rows))

    @property
    def budgets(self) -> list[float]:
        """The budgets, ascending."""
        return sorted({row["eps"] for row in self.rows})

    def asr(
        self,
        attack: str,
        model: str,
        eps: float | None = None,
        *,
        rate: str = "strict",
        pixels: str = "exact",
    ) -> Interval:
        """The success rate of an attack against a model, with its 95 % interval.

        Args:
            attack: its name in the audit.
            model: name of an audited model or of a surrogate.
            eps: budget; None = the largest.
            rate: ``strict``, ``official``, ``fooling`` or ``targeted``.
            pixels: ``exact``, or ``uint8`` for the images as they are after rounding.

        Returns:
            value, low and high in [0, 1]; value NaN where no image was right before.

        Raises:
            InputError: no such cell; the message lists what there is.
        """
        if rate not in RATES:
            raise InputError(f"rate is {rate!r}, wanted one of {', '.join(RATES)}")
        wanted = self.budgets[-1] if eps is None else eps
        for row in self.rows:
            same = (row["attack"], row["model"], row["pixels"]) == (attack, model, pixels)
            if same and abs(row["eps"] - wanted) < 1e-9 and row[f"{rate}_low"] is not None:
                return Interval(row[rate], row[f"{rate}_low"], row[f"{rate}_high"])
        models = list(dict.fromkeys(row["model"] for row in self.rows))
        raise InputError(
            f"no {rate} rate of {attack!r} against {model!r} at eps {wanted:g} in {pixels!r} pixels; there "
            f"are the attacks {self.attacks}, models {models}, eps {[round(eps, 5) for eps in self.budgets]}"
        )

    def worst(self, model: str | None = None) -> dict[str, Any]:
        """The row of the attack with the highest strict rate against a model.

        Args:
            model: an audited model; None = any of them.

        Raises:
            InputError: no such model.
        """
        rows = [
            row for row in self.rows if row["model"] == model or (model is None and row["kind"] == "target")
        ]
        if not rows:
            raise InputError(f"model is {model!r}, wanted one of {list(self.targets)}")
        return dict(
            max(rows, key=lambda row: (row["strict"] == row["strict"], row["strict"], row["strict_high"]))
        )

    def above(self, max_asr: float) -> list[dict[str, Any]]:
        """The rows of audited models whose strict rate may exceed a limit (upper end of its interval)."""
        return [dict(row) for row in self.rows if row["kind"] == "target" and row["strict_high"] > max_asr]

    def set(self, attack: str, eps: float | None = None) -> AdversarialSet:
        """The adversarial images of an attack; ``eps`` None = the largest budget.

        Raises:
            InputError: no such attack or budget.
        """
        wanted = self.budgets[-1] if eps is None else eps
        for (name, budget), run in self.runs.items():
            if name == attack and abs(budget - wanted) < 1e-9:
                return run.set
        raise InputError(f"no set of {attack!r} at eps {wanted:g}; there are {sorted(self.runs)}")

    def matrix(self) -> list[dict[str, str]]:
        """Models down, attacks and budgets across: strict rate in percent with its interval."""
        models = [*self.targets, *self.surrogates]
        return [{"model": self._label(model), **self._line(model)} for model in models]

    def test_lines(self) -> list[dict[str, Any]]:
        """The paired tests as tables show them."""
        return [
            {**row, "eps": _budget(row).removeprefix("eps "), "p": f"{row['p']:.3g}"} for row in self.tests
        ]

    def _label(self, model: str) -> str:
        return model if model in self.targets else f"{model} (surrogate)"

    def _line(self, model: str) -> dict[str, str]:
        cells: dict[str, str] = {}
        for row in self.rows:
            if row["model"] == model and row["pixels"] == "exact":
                cells.setdefault("clean accuracy %", f"{100 * row['clean_accuracy']:.1f}")
                cells[f"{row['attack']}, {_budget(row)}"] = percent(
                    Interval(row["strict"], row["strict_low"], row["strict_high"])
                )
        return cells

    def print(self, console: Console | None = None) -> None:
        """Print the matrix, the paired tests and the scope of use."""
        console = console or data_console()
        console.print("Strict attack success %, with 95 % intervals", style="bold")
        print_rows(self.matrix(), console)
        if self.tests:
            console.print(f"Paired with {self.attacks[0]} on the same images (exact McNemar)", style="bold")
            print_rows(self.test_lines(), console)
        console.print(READING, style="dim", soft_wrap=True)
        console.print(SCOPE, style="dim", soft_wrap=True)

    def __str__(self) -> str:
        text = io.StringIO()
        self.print(Console(file=text, width=160))
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, schema ``adaea.audit/1``."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "rows": plain(self.rows),
            "tests": plain(self.tests),
            "settings": plain(self.settings),
            "scope": SCOPE,
        }

    def page(self) -> Page:
        """The report as a page with its pictures."""
        with tempfile.TemporaryDirectory() as folder:
            return self._page(self.draw(Path(folder)))

    def _page(self, figures: Sequence[Figure]) -> Page:
        worst = self.worst()
        page = Page(self.title)
        page.raw(
            piece(
                "facts", [f"{key}: {plain(value)}" for key, value in self.settings.items() if _short(value)]
            )
        )
        page.text(
            f"Most successful: {worst['attack']} at {_budget(worst)} against {worst['model']}, "
            f"{percent(Interval(worst['strict'], worst['strict_low'], worst['strict_high']))} % of the "
            "images that were named rightly before."
        )
        page.heading("Attack success").table(self.matrix(), "Strict attack success %, with 95 % intervals.")
        page.text(READING)
        if self.tests:
            page.heading("Is one attack better than another?").table(
                self.test_lines(),
                f"Against {self.attacks[0]} on the same images: strict successes of one alone, and p of "
                "McNemar's exact test. Many tests: read a single small p with care.",
            )
        if figures:
            page.heading("Pictures")
        for figure in figures:
            page.figure(figure)
        page.heading("Every rate").table(
            [printed_row(row) for row in self.rows], "uint8: after rounding to bytes."
        )
        page.raw(piece("details", "Settings", dump_json(self.settings), False))
        return page.heading("Scope of use").text(SCOPE)

    def draw(self, folder: Path) -> list[Figure]:
        """Write ``grid.png``, ``curves.png``, ``weights.png`` into a folder; none without matplotlib."""
        try:
            return self._draw(folder)
        except MissingExtraError as error:
            warnings.warn(f"the report has no pictures: {error}", FusionWarning, stacklevel=3)
            return []

    def _draw(self, folder: Path) -> list[Figure]:
        from adaea import figures

        found: list[Figure] = []
        shown = self.pictures
        if shown:
            found.append(figures.grid(folder / "grid.png", **shown))
        series = {
            model: {
                attack: {
                    eps: self.asr(attack, model, eps) for eps in self.budgets if (attack, eps) in self.runs
                }
                for attack in self.attacks
            }
            for model in self.targets
        }
        if self.runs:
            found.append(figures.curves(folder / "curves.png", series, rate="strict ASR"))
        adaptive = {
            f"{attack}, {_budget({'eps': eps, 'norm': run.set.norm})}": run.weights
            for (attack, eps), run in self.runs.items()
            if eps == self.budgets[-1] and run.weights.shape[1] > 1 and not _even(run)
        }
        if adaptive:
            first = dict(list(adaptive.items())[:3])
            found.append(figures.weights(folder / "weights.png", first, list(self.surrogates)))
        return found

    def save(self, directory: str | os.PathLike[str], *, png: bool = False) -> None:
        """Write ``report.html``, ``asr.csv``, ``asr.json``, the pictures and ``adv/*.safetensors``.

        A new directory appears whole or not at all; in one that is there already each file is replaced whole.

        Args:
            directory: where.
            png: also write each adversarial set as a folder of PNG files, ``png/NAME/``.

        Raises:
            InputError: the place cannot be written.
        """
        target = Path(directory)
        if target.is_dir() and any(target.iterdir()):
            with tempfile.TemporaryDirectory() as folder:
                self._write(Path(folder), target, png)
            return
        with atomic_directory(target) as place, tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), place, png)

    def _write(self, scratch: Path, place: Path, png: bool) -> None:
        drawn = self.draw(scratch)
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.rows[0]) if self.rows else ["attack"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        files = {Path(figure.path).name: Path(figure.path).read_bytes() for figure in drawn}
        files |= {"asr.csv": table.getvalue().encode(), "asr.json": dump_json(self).encode()}
        for (name, _), run in self.runs.items():
            key = file_key(name, run.set)
            if not (place / "adv" / f"{key}.safetensors").is_file():
                save_run(run, place / "adv", key)
            if png and not (place / "png" / key).is_dir():
                run.set.save(place / "png" / key)
        files["report.html"] = self._page(drawn).html().encode()
        for name, data in files.items():
            with atomic_write(place / name) as file:
                file.write(data)


def percent(interval: Interval) -> str:
    """A rate for a table, in percent with its interval.

    Example:
        >>> percent(Interval(0.25, 0.2, 0.31))
        '25.0 [20.0, 31.0]'
    """
    if interval.value != interval.value:
        return "- [no image right before]"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _budget(row: Mapping[str, Any]) -> str:
    eps = row["eps"]
    if not math.isfinite(eps):
        return "eps not said"
    top = eps * 255
    whole = row.get("norm", "linf") == "linf" and abs(top - round(top)) < 1e-6
    return f"eps {round(top)}/255" if whole else f"eps {eps:g}"


def _short(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and len(str(value)) < 40


def _even(run: AttackRun) -> bool:
    return bool(abs(run.weights - 1 / run.weights.shape[2]).max() < 1e-6)


def printed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table of scores as people read it: rates in percent with their intervals."""
    head = {"attack": row["attack"], "budget": _budget(row), "model": row["model"], "kind": row["kind"]}
    head["pixels"] = row["pixels"]
    head["adversarial accuracy %"] = f"{100 * row['adversarial_accuracy']:.1f}"
    for rate in RATES:
        if row[f"{rate}_low"] is not None:
            head[f"{rate} %"] = percent(Interval(row[rate], row[f"{rate}_low"], row[f"{rate}_high"]))
    return {**head, **{name: row[name] for name in ("linf", "l2", "psnr", "ssim")}}


def pick_columns(labels: Tensor, before: Tensor, after: Tensor, count: int = 6) -> Tensor:
    """Rows for the image grid: fooled images first, of different classes as far as there are."""
    fooled = (before == labels) & (after != labels)
    order = sorted(
        range(len(labels)), key=lambda i: (not bool(fooled[i]), not bool(before[i] == labels[i]), i)
    )
    chosen: list[int] = []
    seen: set[int] = set()
    for i in order:
        if int(labels[i]) not in seen and len(chosen) < count:
            chosen.append(i)
            seen.add(int(labels[i]))
    chosen += [i for i in order if i not in chosen][: count - len(chosen)]
    return torch.tensor(sorted(chosen, key=lambda i: int(labels[i])))

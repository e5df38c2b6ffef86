"""Methods compared over seeds: means with their spread, and paired differences to a named baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusion_core.errors import DataError, InputError
from fusion_core.stats import paired_t, summary

SCHEMA = "fusion.comparison/1"


class Metric(TypedDict):
    """How to read a metric: which way is better, and whether tables print it as percent."""

    better: Literal["higher", "lower"]
    percent: NotRequired[bool]


class Cell(TypedDict):
    """One printed entry: the number, the line under it, and whether it is its column's best."""

    text: str
    note: str
    best: bool


class Comparison:
    """Numbers of several methods on the same seeds.

    Args:
        metrics: name -> ``{"better": "higher" | "lower", "percent": bool}``.
        baseline: the method that the others are compared with.
        seeds: the runs; a method may lack some (a reference that was run once).
        title: printed over the table.

    Raises:
        InputError: no metrics or seeds, a repeated seed, or another ``better``.

    Example:
        >>> table = Comparison({"accuracy": {"better": "higher", "percent": True}}, "plain", [0, 1])
        >>> for seed, (plain, ours) in enumerate([(0.90, 0.92), (0.91, 0.94)]):
        ...     table.add("plain", "accuracy", seed, plain)
        ...     table.add("ours", "accuracy", seed, ours)
        >>> round(table.rows()[1]["difference"], 3)
        0.025
    """

    def __init__(
        self, metrics: Mapping[str, Metric], baseline: str, seeds: Sequence[int], title: str = ""
    ) -> None:
        if not metrics or not seeds or len(set(seeds)) < len(seeds):
            raise InputError(f"metrics is {dict(metrics)} and seeds {list(seeds)}, wanted some, none twice")
        for name, metric in metrics.items():
            if metric.get("better") not in ("higher", "lower"):
                raise InputError(f"metrics[{name!r}] is {metric}, wanted better = 'higher' or 'lower'")
        self.metrics: dict[str, Metric] = dict(metrics)
        self.baseline, self.seeds, self.title = baseline, list(seeds), title
        self._values: dict[tuple[str, str], dict[int, float]] = {}

    @property
    def methods(self) -> list[str]:
        """The methods in order of their first number."""
        return list(dict.fromkeys(method for method, _ in self._values))

    def add(self, method: str, metric: str, seed: int, value: float) -> None:
        """Record one number, a fraction where the metric is printed as percent.

        Raises:
            InputError: unknown metric or seed.
            DataError: the number was given before.
        """
        if metric not in self.metrics or seed not in self.seeds:
            known = f"metrics {sorted(self.metrics)} and seeds {self.seeds}"
            raise InputError(f"metric is {metric!r} and seed {seed!r}, wanted one of {known}")
        numbers = self._values.setdefault((method, metric), {})
        if seed in numbers:
            raise DataError(f"{method!r} has {metric!r} for seed {seed} already")
        numbers[seed] = float(value)

    def joined(self, other: Comparison) -> Comparison:
        """One comparison of two with different seeds, these ones first.

        Args:
            other: with this one's baseline; its metrics may be others.

        Raises:
            InputError: another baseline, or a seed that both have.
        """
        if other.baseline != self.baseline:
            raise InputError(f"baseline of other is {other.baseline!r}, wanted {self.baseline!r}")
        whole = Comparison(
            {**self.metrics, **other.metrics}, self.baseline, [*self.seeds, *other.seeds], self.title
        )
        for part in (self, other):
            for key, numbers in part._values.items():
                whole._values.setdefault(key, {}).update(numbers)
        return whole

    def rows(self) -> list[dict[str, Any]]:
        """One row per method and metric, as in the JSON document; ``values`` follow ``seeds``."""
        return [
            self._row(method, metric)
            for method in self.methods
            for metric in self.metrics
            if (method, metric) in self._values
        ]

    def _row(self, method: str, metric: str) -> dict[str, Any]:
        ours, base = self._values[method, metric], self._values.get((self.baseline, metric), {})
        mean, std, interval = summary(ours.values())
        row: dict[str, Any] = {
            "method": method,
            "metric": metric,
            "values": [_finite(ours.get(seed)) for seed in self.seeds],
            "mean": _finite(mean),
            "std": std,
            "low": interval and interval.low,
            "high": interval and interval.high,
        }
        both = [seed for seed in self.seeds if seed in ours and seed in base]
        paired = None
        if both and method != self.baseline:
            paired = paired_t([ours[seed] for seed in both], [base[seed] for seed in both])
        for key, name in (
            ("difference", "difference"),
            ("difference_low", "low"),
            ("difference_high", "high"),
        ):
            row[key] = _finite(getattr(paired, name, None))
        row["p"] = paired and paired.p
        return row

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, schema ``fusion.comparison/1``."""
        metrics = {
            name: {"better": m["better"], "percent": m.get("percent", False)}
            for name, m in self.metrics.items()
        }
        head = {"schema": SCHEMA, "title": self.title, "baseline": self.baseline, "seeds": self.seeds}
        return {**head, "metrics": metrics, "rows": self.rows()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Comparison:
        """The comparison that :meth:`to_dict` wrote.

        Raises:
            DataError: another schema, or a key is missing.
        """
        if document.get("schema") != SCHEMA:
            raise DataError(f"schema is {document.get('schema')!r}, wanted {SCHEMA!r}")
        try:
            made = cls(
                document["metrics"], document["baseline"], document["seeds"], document.get("title", "")
            )
            for row in document["rows"]:
                for seed, value in zip(made.seeds, row["values"], strict=True):
                    # null is a run that diverged where the mean is null too, else one that was not made.
                    if value is not None or row["mean"] is None:
                        made.add(row["method"], row["metric"], seed, math.nan if value is None else value)
        except (KeyError, TypeError) as error:
            raise DataError(f"the comparison document lacks {error}") from error
        return made

    def cells(self) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
        """The printed table: column heads, then each method with one cell per metric."""
        rows = {(row["method"], row["metric"]): row for row in self.rows()}
        columns: dict[str, dict[str, Cell]] = {}
        heads = ["method"]
        for metric, how in self.metrics.items():
            column = {method: rows[method, metric] for method in self.methods if (method, metric) in rows}
            means = [row["mean"] for row in column.values() if row["mean"] is not None]
            best = (max if how["better"] == "higher" else min)(means, default=None)
            scale = 100.0 if how.get("percent") else 1.0
            decimals = 2 if how.get("percent") else _decimals(means)
            columns[metric] = {
                method: {
                    "text": _spread(row, scale, decimals),
                    "note": _difference(row, scale, decimals)
                    if method != self.baseline
                    else "baseline"
                    if len(self.methods) > 1
                    else "",
                    "best": row["mean"] is not None and row["mean"] == best and len(column) > 1,
                }
                for method, row in column.items()
            }
            percent, arrow = " %" if how.get("percent") else "", "↑" if how["better"] == "higher" else "↓"
            heads.append(f"{metric.replace('_', ' ')}{percent} {arrow}")
        empty = Cell(text="-", note="", best=False)
        return heads, [(m, [columns[metric].get(m, empty) for metric in self.metrics]) for m in self.methods]

    def caption(self) -> str:
        """How to read the cells, in words."""
        if len(self.seeds) == 1:
            return f"One seed; below it the difference to {self.baseline}."
        return (
            f"Mean ± standard deviation over {len(self.seeds)} seeds; below it the paired difference to "
            f"{self.baseline} and the p of the paired t test."
        )

    def print(self, console: Console | None = None) -> None:
        """Print a table: mean ± std, the paired difference to the baseline and p; ``*`` marks the best."""
        heads, lines = self.cells()
        table = Table(title=escape(self.title) or None, title_justify="left")
        for i, head in enumerate(heads):
            table.add_column(escape(head), justify="right" if i else "left", no_wrap=bool(i))
        for method, cells in lines:
            table.add_row(escape(method), *(_markup(cell) for cell in cells))
        console = console or data_console()
        console.print(table)
        console.print(self.caption(), style="dim", markup=False, soft_wrap=True)


def data_console() -> Console:
    """A console on stdout that does not fold tables to 80 columns when they go to a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def number(value: float | None, decimals: int = 4, sign: str = "") -> str:
    """A number for a table: fixed decimals, a dash for None or NaN."""
    if value is None or not math.isfinite(value):
        return "-"
    if value and (abs(value) >= 1e7 or abs(value) < 10.0 ** -(decimals + 1)):
        return format(value, f"{sign}.2e")
    return format(value, f"{sign}.{decimals}f")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _decimals(values: Sequence[float]) -> int:
    largest = max(map(abs, values), default=0.0)
    return 3 if not largest else min(max(3 - math.floor(math.log10(largest)), 0), 6)


def _spread(row: dict[str, Any], scale: float, decimals: int) -> str:
    if row["mean"] is None:
        return "-"
    text = number(row["mean"] * scale, decimals)
    return text if row["std"] is None else f"{text} ± {number(row['std'] * scale, decimals)}"


def _difference(row: dict[str, Any], scale: float, decimals: int) -> str:
    if row["difference"] is None:
        return ""
    text = number(row["difference"] * scale, decimals, "+")
    if row["p"] is None:
        return text
    return f"{text}, p {'< 0.001' if row['p'] < 0.001 else number(row['p'], 3)}"


def _markup(cell: Cell) -> str:
    text = f"[bold green]{cell['text']} *[/]" if cell["best"] else f"{cell['text']}  "
    return f"{text}\n[dim]{cell['note']}[/]  " if cell["note"] else text

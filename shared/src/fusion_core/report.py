"""Reports and pages: tables, figures and plain sentences about claims, in one file that needs no other."""

from __future__ import annotations

import base64
import csv
import io
import mimetypes
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusion_core.atomic import atomic_directory, atomic_write
from fusion_core.comparison import Cell, Comparison, Metric, data_console
from fusion_core.errors import InputError, MissingExtraError
from fusion_core.results import dump_json, plain

__all__ = ["Cell", "Claim", "Comparison", "Figure", "Metric", "Page", "Report", "print_claims", "print_rows"]

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim of a paper and what this run says about it.

    Args:
        text: the claim, in one sentence.
        source: where the paper makes it, such as ``"section 4.2, table 3"``.
        shown: True, False, or None where this run does not test it.
        sentence: the evidence in numbers.
    """

    text: str
    source: str
    shown: bool | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture file with the words for those who cannot see it (``alt``) and for all (``caption``)."""

    path: Path | str
    alt: str
    caption: str = ""

    def data_url(self) -> str:
        """The picture as a ``data:`` URL.

        Raises:
            InputError: the file is missing or no picture.
        """
        kind = mimetypes.guess_type(str(self.path))[0] or ""
        if not kind.startswith("image/"):
            raise InputError(f"figure is {self.path}, wanted a picture file such as .png")
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise InputError(f"figure {self.path} cannot be read: {error.strerror}") from error
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@lru_cache(maxsize=1)
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("fusion_core", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def piece(name: str, *values: Any) -> Markup:
    """Render one of the pieces that pages are made of; every value is escaped."""
    return Markup(getattr(_templates().get_template("pieces.html").module, name)(*values))  # noqa: S704


class Page:
    """One self-contained HTML file: pictures inside, light and dark, no script, nothing from elsewhere.

    Every method returns the page, so that calls can be chained. Text is escaped; :meth:`raw` takes
    :class:`markupsafe.Markup` only.

    Example:
        >>> page = Page("Results").text("Is 1 < 2?").table([{"method": "plain", "loss": 0.5}])
        >>> "Is 1 &lt; 2?" in page.html()
        True
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._pieces: list[Markup] = []
        self._contents: list[tuple[str, str]] = []

    def _add(self, name: str, *values: Any) -> Page:
        return self.raw(piece(name, *values))

    def heading(self, text: str, level: int = 2, anchor: str = "") -> Page:
        """Add a heading; ``anchor`` is its id for links."""
        return self._add("heading", text, level, anchor)

    def text(self, text: str) -> Page:
        """Add a paragraph."""
        return self._add("text", text)

    def table(self, table: Comparison | Rows, caption: str = "") -> Page:
        """Add a comparison, or rows whose keys are the columns."""
        if isinstance(table, Comparison):
            return self._add("table", table.title, caption or table.caption(), *table.cells())
        header, numeric, lines = _columns(table)
        return self._add(
            "rows", caption, header, numeric, [list(zip(header, line, strict=True)) for line in lines]
        )

    def figure(self, figure: Figure) -> Page:
        """Add a picture; the file is read now."""
        return self._add("figure", figure.data_url(), figure.alt, figure.caption)

    def card(self, part: Page, anchor: str, label: str) -> Page:
        """Add another page as a framed section, with a link to it in the contents bar at the top.

        Args:
            part: its title becomes the heading, of level 2.
            anchor: id of the section.
            label: in the bar.
        """
        self._contents.append((anchor, label))
        return self._add("card", part.title, anchor, part.body())

    def claims(self, claims: Iterable[Claim]) -> Page:
        """Add claims, each with its badge: shown, not shown, not tested."""
        listed = list(claims)
        return self._add("claims", listed) if listed else self

    def raw(self, markup: Markup) -> Page:
        """Add markup as it is.

        Raises:
            InputError: a plain string, which may hold anything.
        """
        if not isinstance(markup, Markup):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"markup is {type(markup).__name__}, wanted markupsafe.Markup; use .text for text"
            )
        self._pieces.append(markup)
        return self

    def body(self) -> Markup:
        """The page's pieces without the document round them."""
        return Markup("\n").join(self._pieces)

    def html(self) -> str:
        """The whole document."""
        return (
            _templates()
            .get_template("page.html")
            .render(title=self.title, body=self.body(), contents=self._contents)
        )

    def fragment(self) -> str:
        """The page as a piece of another one (a notebook cell), with its style."""
        style = Markup(_templates().get_template("style.css").render())  # noqa: S704
        return str(piece("fragment", style, self.title, self.body()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the document; it appears whole or not at all."""
        document = self.html()
        with atomic_write(path, "w") as file:
            file.write(document)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A comparison or rows, with figures and claims; packages subclass it with fields of their own.

    Args:
        title: of the page.
        comparison: methods over seeds.
        rows: other tables, one mapping per line.
        figures: picture files.
        claims: of the paper, with what the numbers say.
    """

    title: str = "Report"
    comparison: Comparison | None = None
    rows: Rows = ()
    figures: Sequence[Figure] = ()
    claims: Sequence[Claim] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, schema ``fusion.report/1``."""
        return {
            "schema": "fusion.report/1",
            "title": self.title,
            "tables": [self.comparison.to_dict()] if self.comparison else [],
            "rows": plain(self.rows),
            "claims": plain(self.claims),
            "figures": [figure_entry(figure) for figure in self.figures],
        }

    def flat_rows(self) -> list[dict[str, Any]]:
        """One flat mapping per line of the table: the comparison's, or ``rows``."""
        if self.comparison is None:
            return [dict(row) for row in self.rows]
        named = [f"seed_{seed}" for seed in self.comparison.seeds]
        return [
            {key: value for key, value in row.items() if key != "values"}
            | dict(zip(named, row["values"], strict=True))
            for row in self.comparison.rows()
        ]

    def shown_rows(self) -> Rows:
        """``rows`` as people read them, on a page and on a terminal; the files hold all columns."""
        return self.rows

    def to_dataframe(self) -> Any:
        """The table as a ``pandas.DataFrame``.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return dataframe(self.flat_rows())

    def page(self) -> Page:
        """The report as a page; subclasses add to it."""
        page = Page(self.title).claims(self.claims)
        if self.comparison is not None:
            page.table(self.comparison)
        if self.rows:
            page.table(self.shown_rows())
        for figure in self.figures:
            page.figure(figure)
        return page

    def to_html(self) -> str:
        """One self-contained document."""
        return self.page().html()

    def _repr_html_(self) -> str:
        return self.page().fragment()

    def print(self, console: Console | None = None) -> None:
        """Print the tables and claims to the terminal."""
        console = console or data_console()
        if self.comparison is not None:
            self.comparison.print(console)
        if self.rows:
            print_rows(self.shown_rows(), console)
        print_claims(self.claims, console)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``report.html``, ``report.json``, ``table.csv`` and the pictures.

        A new directory appears whole or not at all; in one that is there already (a training run's) the
        files of the report are replaced one by one, each whole.

        Raises:
            InputError: a picture is missing, or the place cannot be written.
        """
        table = io.StringIO()
        lines = self.flat_rows()
        writer = csv.DictWriter(table, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)
        files = {figure_entry(figure)["file"]: Path(figure.path).read_bytes() for figure in self.figures}
        files |= {
            "table.csv": table.getvalue().encode(),
            "report.json": dump_json(self).encode(),
            "report.html": self.to_html().encode(),
        }
        target = Path(directory)
        if target.is_dir() and any(target.iterdir()):
            for name, data in files.items():
                with atomic_write(target / name) as file:
                    file.write(data)
            return
        with atomic_directory(target) as place:
            for name, data in files.items():
                (place / name).write_bytes(data)


def figure_entry(figure: Figure) -> dict[str, str]:
    """A figure in a JSON document: its file's name beside the document, and its words."""
    return {"file": Path(figure.path).name, "alt": figure.alt, "caption": figure.caption}


def _columns(rows: Rows) -> tuple[list[str], list[str], list[list[str]]]:
    """Header, numeric columns and printed cells of rows; a column's first appearance fixes its place."""
    header = list(dict.fromkeys(str(key) for row in rows for key in row))
    values = {name: [row.get(name) for row in rows] for name in header}
    numeric = [name for name, column in values.items() if all(_is_number(value) for value in column)]
    return header, numeric, [[_show(row.get(name)) for name in header] for row in rows]


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _show(value: Any) -> str:
    match plain(value):
        case None:
            return "-"
        case bool() as flag:
            return "yes" if flag else "no"
        case float() as decimal:
            return f"{decimal:.5g}"
        case list() as entries:
            return ", ".join(map(_show, entries)) or "-"
        case other:
            return str(other)


def dataframe(rows: Rows | Mapping[str, Any]) -> Any:
    """Mappings, or columns by name, as a ``pandas.DataFrame``.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'pandas is not installed; to_dataframe needs: pip install "pandas"'
        ) from error
    return pd.DataFrame(rows)


def print_rows(rows: Rows, console: Console | None = None) -> None:
    """Print mappings as a table, one column per key."""
    header, numeric, lines = _columns(rows)
    table = Table()
    for name in header:
        table.add_column(escape(name), justify="right" if name in numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(escape, line))
    (console or data_console()).print(table)


def print_claims(claims: Iterable[Claim], console: Console | None = None) -> None:
    """Print claims, one after the other, each with its verdict first."""
    words = {True: "[bold green]shown[/]", False: "[bold yellow]not shown[/]", None: "[dim]not tested[/]"}
    for claim in claims:
        source = f" [dim]({escape(claim.source)})[/]" if claim.source else ""
        line = f"{words[claim.shown]}: {escape(claim.text)}{source} {escape(claim.sentence)}"
        (console or data_console()).print(line, soft_wrap=True)

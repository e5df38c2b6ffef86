"""What a package's demo is, how it is run, and the result and page that it leaves behind."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from fusion_core.errors import DataError, FusionWarning, InputError

if TYPE_CHECKING:
    import typer

    from fusion_core.report import Claim, Comparison, Figure, Page

GROUP = "fusion_core.methods"
SCHEMA = "fusion.result/1"


@dataclass(frozen=True, slots=True)
class Demo:
    """What a demo found.

    Args:
        tables: the method beside its baselines, over seeds.
        claims: of the paper, each with what the numbers say at this scale.
        figures: pictures that the demo wrote into its ``out``.
        notes: plain sentences about scale and data.
        settings: what the numbers depend on, for the record.
        seeds: the runs behind the tables.
    """

    tables: Sequence[Comparison] = ()
    claims: Sequence[Claim] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seeds: Sequence[int] = ()


class DemoFunction(Protocol):
    """A package's demo: writes pictures into ``out`` and returns what it found."""

    def __call__(self, out: Path, *, full: bool = False, seed: int = 0) -> Demo:
        """Run quickly, or with ``full`` as the paper did."""
        ...


@dataclass(frozen=True, slots=True)
class Method:
    """A published method, as its package announces it in the entry-point group ``fusion_core.methods``.

    Args:
        name: what people type.
        package: the distribution.
        title: of the method, for headings.
        paper: authors, title, venue and year.
        url: of the paper.
        summary: one line.
        demo: see :class:`DemoFunction`; it may take further keyword options of its package.
    """

    name: str
    package: str
    title: str
    paper: str
    url: str
    summary: str
    demo: Callable[..., Demo]

    @property
    def version(self) -> str:
        """The installed version of the package."""
        return package_version(self.package)


def package_version(package: str) -> str:
    """The installed version of a distribution.

    Example:
        >>> package_version("no-such-distribution")
        'not installed'
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def method_names() -> list[str]:
    """The names of the installed methods, sorted; none is loaded."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def discover(broken: dict[str, str] | None = None, only: Collection[str] | None = None) -> dict[str, Method]:
    """The installed methods by name, sorted.

    Args:
        broken: takes name -> reason of entry points that do not load; without it they are warned of.
        only: load these and no others.

    Example:
        >>> all(isinstance(method, Method) for method in discover({}).values())
        True
    """
    found: dict[str, Method] = {}
    entries = [entry for entry in entry_points(group=GROUP) if only is None or entry.name in only]
    for entry in sorted(entries, key=lambda entry: entry.name):
        try:
            method = entry.load()
            if not isinstance(method, Method):
                raise TypeError(f"{entry.value} is {type(method).__name__}, wanted fusion_core.demo.Method")
            if method.name != entry.name:
                raise ValueError(f"{entry.value} is named {method.name!r}, its entry point {entry.name!r}")
            found[entry.name] = method
        except Exception as error:  # noqa: BLE001 - someone else's import may raise anything
            reason = f"{type(error).__name__}: {error}"
            if broken is None:
                warnings.warn(f"method {entry.name} cannot be loaded: {reason}", FusionWarning, stacklevel=2)
            else:
                broken[entry.name] = reason
    return found


def result_document(
    name: str,
    package: str,
    package_version: str,
    demo: Demo | None,
    *,
    full: bool,
    seed: int,
    seconds: float,
    error: str | None = None,
) -> dict[str, Any]:
    """The JSON document of a demo, schema ``fusion.result/1``; without ``demo`` that of a failure."""
    from fusion_core.device import environment
    from fusion_core.report import figure_entry
    from fusion_core.results import plain

    demo = demo or Demo()
    return plain(
        {
            "schema": SCHEMA,
            "method": name,
            "package": package,
            "version": package_version,
            "status": "failed" if error else "ok",
            "error": error,
            "mode": "full" if full else "quick",
            "seed": seed,
            "seeds": demo.seeds,
            "seconds": round(seconds, 3),
            "environment": environment(),
            "settings": demo.settings,
            "tables": [table.to_dict() for table in demo.tables],
            "claims": demo.claims,
            "figures": [figure_entry(figure) for figure in demo.figures],
            "notes": demo.notes,
        }
    )


def write_result(
    demo: Demo, out: Path, method: Method, *, full: bool = False, seed: int = 0, seconds: float = 0.0
) -> dict[str, Any]:
    """Write ``result.json`` and return what it holds.

    Args:
        demo: what the demo found; its pictures lie in ``out``.
        out: the demo's directory.
        method: whose demo it was.
        full: the long mode.
        seed: that it was run with.
        seconds: wall time.

    Raises:
        DataError: a picture is not in ``out``.
    """
    from fusion_core.atomic import atomic_write
    from fusion_core.results import dump_json

    for figure in demo.figures:
        if not (out / Path(figure.path).name).is_file():
            raise DataError(f"figure {figure.path} is not in {out}, where the demo's pictures belong")
    document = result_document(
        method.name, method.package, method.version, demo, full=full, seed=seed, seconds=seconds
    )
    with atomic_write(out / "result.json", "w") as file:
        file.write(dump_json(document))
    return document


def run_demo(
    method: Method,
    out: str | os.PathLike[str],
    *,
    full: bool = False,
    seed: int = 0,
    json: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run a method's demo, leave its result and page in ``out``, and print its tables and claims.

    Args:
        method: the package's :class:`Method`.
        out: gets ``result.json``, ``report.html`` and the pictures, all at once at the end; what an earlier
            run left there is replaced.
        full: repeat the recorded experiment instead of the quick one.
        seed: first seed.
        json: print the document of ``result.json`` instead of tables.
        **options: further keyword arguments of the package's demo.

    Returns:
        The document of ``result.json``.

    Raises:
        InputError: ``out`` holds something else.
    """
    from fusion_core.atomic import atomic_directory
    from fusion_core.results import dump_json

    check_own(out, SCHEMA)
    start = time.perf_counter()
    with atomic_directory(out, overwrite=True) as place:
        demo = method.demo(place, full=full, seed=seed, **options)
        seconds = time.perf_counter() - start
        document = write_result(demo, place, method, full=full, seed=seed, seconds=seconds)
        result_page(document, place, method).save(place / "report.html")
    if json:
        sys.stdout.write(dump_json(document))
    else:
        show(document)
        sys.stderr.write(f"{Path(out) / 'report.html'}\n")
    return document


def add_demo(app: typer.Typer, package: str, text: str, full: str, **own: tuple[Any, Any]) -> None:
    """Give a command line the verb ``demo``, with ``--out``, ``--full``, ``--seed`` and ``--json``.

    Args:
        app: of :func:`fusion_core.cli.new_app`.
        package: the distribution, whose module ``demo`` holds the :class:`Method` as ``method``.
        text: one sentence of what it shows.
        full: what ``--full`` does.
        **own: further options of the package's demo, name -> (``Annotated`` type, default).
    """
    import typer

    from fusion_core import cli

    def command(out: Path, full: bool, seed: int, json: bool, **options: Any) -> None:
        module = importlib.import_module(f"{package.replace('-', '_')}.demo")
        run_demo(module.method, out, full=full, seed=seed, json=json, **options)

    place = Annotated[Path, typer.Option("--out", "-o", help="Directory for the results.")]
    cli.show_options(
        command,
        {
            "out": (place, Path(f"{package}-demo")),
            **own,
            "full": (Annotated[bool, typer.Option("--full", help=full)], False),
            "seed": (cli.Seed, 0),
            "json": (cli.Json, False),
        },
    )
    app.command("demo", help=f"{text}\n\nExample: {package} demo --out results")(command)


def check_own(out: str | os.PathLike[str], schema: str) -> None:
    """Refuse a directory that holds something else than an earlier result.

    Raises:
        InputError: not empty, and no ``result.json`` of that schema.
    """
    place = Path(out)
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    try:
        found = json.loads((place / "result.json").read_text(encoding="utf-8"))["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found != schema:
        raise InputError(f"--out {place} is not empty and holds no earlier result; name another directory")


def show(document: Mapping[str, Any]) -> None:
    """Print a result's tables, claims and notes to the terminal."""
    from fusion_core.comparison import Comparison, data_console
    from fusion_core.report import Claim, print_claims

    console = data_console()
    for table in document["tables"]:
        Comparison.from_dict(table).print(console)
    print_claims((Claim(**claim) for claim in document["claims"]), console)
    for note in document["notes"]:
        console.print(note, style="dim", markup=False, soft_wrap=True)


def result_page(document: Mapping[str, Any], place: Path, method: Method | None, *, level: int = 2) -> Page:
    """A result as a page: facts, claims, tables, pictures, notes, settings.

    Args:
        document: a ``result.json``.
        place: the directory of its pictures.
        method: for title, summary and paper; None where it could not be loaded.
        level: of the headings inside; 3 where the page becomes a card of another.
    """
    from fusion_core.report import Claim, Comparison, Figure, Page, piece
    from fusion_core.results import dump_json

    page = Page(method.title if method else document["method"])
    facts = [piece("link", method.url, method.paper)] if method else []
    facts += [
        f"{document['package']} {document['version']}",
        f"{document['mode']} mode",
        f"seed {document['seed']}",
        f"{document['seconds']:.1f}\u00a0s",
    ]
    page.raw(piece("facts", facts))
    if method:
        page.text(method.summary)
    if document["status"] != "ok":
        page.raw(piece("badge", "bad", "✗ failed"))
        return page.raw(piece("details", "What it said", document["error"], True))
    if document["claims"]:
        page.heading("Claims of the paper", level)
        page.claims(Claim(**claim) for claim in document["claims"])
    if document["tables"]:
        page.heading("Numbers", level)
    for table in document["tables"]:
        page.table(Comparison.from_dict(table))
    if document["figures"]:
        page.heading("Pictures", level)
    for figure in document["figures"]:
        page.figure(Figure(place / Path(figure["file"]).name, figure["alt"], figure["caption"]))
    if document["notes"]:
        page.heading("Notes", level)
        page.raw(piece("notes", document["notes"]))
    record = {key: document[key] for key in ("settings", "seeds", "environment")}
    return page.raw(piece("details", "Settings and machine", dump_json(record), False))

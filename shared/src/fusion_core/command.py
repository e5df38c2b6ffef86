"""The ``fusion`` command: what is installed, what is missing, and every method's demo on one page."""

from __future__ import annotations

import json as jsonlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_core import __version__, cli
from fusion_core.demo import (
    GROUP,
    Method,
    check_own,
    discover,
    method_names,
    result_document,
    result_page,
    show,
)
from fusion_core.errors import InputError
from fusion_core.progress import track

SCHEMA = "fusion.demo/1"
NONE_INSTALLED = (
    "No method is installed yet. Each is a package of its own; with its demo: pip install PACKAGE[demo]"
)

app = cli.new_app(
    "fusion", "Fusion methods: what is installed, what is missing, and a demo of each.", __version__
)


@app.command("list")
def list_(json: cli.Json = False) -> None:
    """List the installed methods, one line each. Example: fusion list --json."""
    broken: dict[str, str] = {}
    rows = [
        {
            "name": name,
            "version": m.version,
            "summary": m.summary,
            "paper": m.paper,
            "url": m.url,
            "error": None,
        }
        for name, m in discover(broken).items()
    ]
    rows += [
        {"name": name, "version": None, "summary": None, "paper": None, "url": None, "error": reason}
        for name, reason in broken.items()
    ]
    if json:
        cli.emit({"methods": rows}, json=True)
    elif not rows:
        cli.emit(NONE_INSTALLED, json=False)
    else:
        shown = [
            {
                "name": row["name"],
                "version": row["version"],
                "summary": row["summary"] or f"broken: {row['error']}",
                "paper": row["paper"],
            }
            for row in rows
        ]
        cli.emit(shown, json=False)


@app.command()
def doctor(json: cli.Json = False) -> None:
    """Say what this machine has and what the installed packages lack. Example: fusion doctor."""
    from fusion_core.device import environment, memory_left, resolve_device

    broken: dict[str, str] = {}
    discover(broken)
    facts = environment()
    names = {entry.dist.name for entry in entry_points(group=GROUP) if entry.dist}
    packages = [_package(name) for name in sorted({"fusion-core", *names})]
    memory = {name: memory_left(resolve_device(name)) for name in facts["devices"]}
    document = {**facts, "memory_left": memory, "packages": packages, "broken": broken}
    if json:
        cli.emit(document, json=True)
        return
    lines = {key: value for key, value in facts.items() if key != "versions"} | facts["versions"]
    lines |= {
        f"free memory, {name}": "unknown" if left is None else f"{left / 2**30:.1f} GiB"
        for name, left in memory.items()
    }
    cli.emit(lines, json=False)
    cli.emit(
        [
            {"package": p["name"], "version": p["version"], "missing extras": sorted(p["missing"]) or "none"}
            for p in packages
        ],
        json=False,
    )
    for package in packages:
        for what in package["missing"].values():
            typer.echo(f"{what['install']}  # brings {', '.join(what['modules'])}")
    for name, reason in broken.items():
        typer.echo(f"{name} cannot be loaded: {reason}")
    if not names:
        typer.echo(NONE_INSTALLED)


def _package(name: str) -> dict[str, Any]:
    """A distribution's version and those of its extras that lack something, with the remedy."""
    found = distribution(name)
    missing: dict[str, dict[str, Any]] = {}
    for requirement in found.requires or []:
        wanted = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", requirement)
        if wanted and extra and not _installed(wanted[0]):
            remedy = {"install": f'pip install "{name}[{extra[1]}]"', "modules": []}
            missing.setdefault(extra[1], remedy)["modules"].append(wanted[0])
    return {"name": name, "version": found.version, "missing": missing}


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


@app.command()
def demo(
    names: Annotated[
        list[str] | None, typer.Argument(help="Methods to run; all that are installed if none.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for index.html and the results.")
    ] = Path("fusion-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Repeat the recorded experiments (minutes each).")
    ] = False,
    seed: cli.Seed = 0,
    quiet: cli.Quiet = False,
) -> None:
    """Run the demos, each in its own process, and put them on one page. Example: fusion demo -o results."""
    from fusion_core.atomic import atomic_directory
    from fusion_core.results import dump_json

    broken: dict[str, str] = {}
    known = method_names()
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise InputError(f"no method {', '.join(unknown)} is installed, only: {', '.join(known) or 'none'}")
    check_own(out, SCHEMA)
    methods = discover(broken, names or None)
    with atomic_directory(out, overwrite=True) as place:
        results: list[dict[str, Any]] = []
        for name in track(list(dict.fromkeys(names or known)), "demos", enabled=False if quiet else None):
            document = _run_child(
                name, methods.get(name), broken.get(name), place / name, full=full, seed=seed
            )
            results.append(document)
            if not quiet:
                sys.stderr.write(f"{name}: {document['status']}, {document['seconds']:.1f} s\n")
        failed = [document["method"] for document in results if document["status"] != "ok"]
        (place / "result.json").write_text(
            dump_json({"schema": SCHEMA, "failed": failed, "results": results}), encoding="utf-8"
        )
        _page(results, methods, place).save(place / "index.html")
    for document in results:
        typer.echo(f"\n{document['method']}")
        show(document)
        if document["error"]:
            sys.stderr.write(f"\n{document['method']} failed:\n{document['error']}\n")
    if not results:
        typer.echo(NONE_INSTALLED)
    typer.echo(str((out / "index.html").resolve()))
    if failed:
        sys.stderr.write(f"error: failed: {', '.join(failed)}\n")
        raise typer.Exit(1)


def _run_child(
    name: str, method: Method | None, broken: str | None, place: Path, *, full: bool, seed: int
) -> dict[str, Any]:
    start = time.perf_counter()
    error = broken
    if method is not None:
        words = [sys.executable, "-m", "fusion_core._run_demo", name, str(place), str(seed)]
        # run() kills the child when Ctrl-C or an error interrupts the wait.
        child = subprocess.run(  # noqa: S603
            [*words, "full" if full else "quick"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            check=False,
        )
        if child.returncode == 0 and (place / "result.json").is_file():
            return jsonlib.loads((place / "result.json").read_text(encoding="utf-8"))
        said = child.stderr.decode(errors="replace").strip()[-4000:]
        error = f"{said}\nexit code {child.returncode}".strip()
    return result_document(
        name,
        method.package if method else name,
        method.version if method else "unknown",
        None,
        full=full,
        seed=seed,
        seconds=time.perf_counter() - start,
        error=error,
    )


def _page(results: Iterable[dict[str, Any]], methods: dict[str, Method], place: Path) -> Any:
    from fusion_core.report import Page, piece

    page = Page("Fusion methods")
    listed = list(results)
    if not listed:
        return page.text(NONE_INSTALLED)
    page.text(
        "Each method was run beside its baselines on this machine. Under each stand the claims of its paper "
        "and whether these numbers show them at this scale."
    )
    machine = listed[0]["environment"]
    versions = [f"{name} {version}" for name, version in machine["versions"].items()]
    hardware = [machine["os"], f"{machine['cores']} cores", *machine["accelerators"]]
    page.raw(piece("facts", [*hardware, f"Python {machine['python']}", *versions]))
    page.raw(piece("tiles", [_tile(document, methods.get(document["method"])) for document in listed]))
    for document in listed:
        name = document["method"]
        part = result_page(document, place / name, methods.get(name), level=3)
        page.card(part, f"method-{name}", name)
    return page


def _tile(document: dict[str, Any], method: Method | None) -> dict[str, Any]:
    """What the overview says of one method."""
    verdicts = [claim["shown"] for claim in document["claims"]]
    kinds = (
        (True, "good", "✓", "shown"),
        (False, "bad", "✗", "not shown"),
        (None, "plain", "\u2013", "not tested"),
    )
    return {
        "name": document["method"],
        "anchor": f"method-{document['method']}",
        "error": document["status"] != "ok",
        "summary": method.summary if method else "It cannot be loaded.",
        "time": f"{document['seconds']:.1f}\u00a0s",
        "verdicts": [
            (kind, f"{sign} {verdicts.count(value)} {word}")
            for value, kind, sign, word in kinds
            if value in verdicts
        ],
    }


def main() -> None:
    """The console script ``fusion``."""
    cli.run(app)

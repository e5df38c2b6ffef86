"""Install ``tests/consumer`` with wheels of the workspace in a clean environment, run it, check its types.

Two checkers in strict mode look at it there, outside the tree, where they see of the packages what their
wheels show. They must find nothing in the project and every marked line of ``misuse.py``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from trial import Environment, require, wheels
from workspace import CORE, ROOT, members

PROJECT = ROOT / "tests" / "consumer"
CHECKERS = {
    "basedpyright": ("--pythonpath", r"^\s*(\S+?):(\d+):\d+ - error"),
    "mypy": ("--python-executable", r"^(\S+?):(\d+): error"),
}
"""Checker -> its option for the interpreter, and how it reports file and line."""


def install(environment: Environment, scratch: Path) -> Path:
    """A copy of the project outside the tree, installed with the wheels of what it depends on."""
    place = scratch / "project"
    shutil.copytree(PROJECT, place, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    text = (place / "pyproject.toml").read_text(encoding="utf-8")
    wanted = {entry.name: entry for entry in members() if f'"{entry.name}>=' in text}
    require(len(wanted) == 3, f"the consumer depends on {sorted(wanted)}, wanted three packages")
    built = wheels(wanted.values(), scratch)
    environment.install(place, *(built[name] for name in [CORE.name, *wanted]))
    return place


def check(checker: str, tools: Environment, environment: Environment, place: Path) -> None:
    """Compare what a checker reports with the lines that are marked as wrong."""
    option, pattern = CHECKERS[checker]
    files = sorted(path.name for path in place.glob("*.py"))
    done = subprocess.run(
        [tools.script(checker), option, environment.script("python"), *files],
        cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", timeout=900,
    )  # fmt: skip
    found = {(Path(name).name, int(line)) for name, line in re.findall(pattern, done.stdout, re.MULTILINE)}
    marked = {
        (name, number)
        for name in files
        for number, line in enumerate((place / name).read_text(encoding="utf-8").splitlines(), 1)
        if line.endswith("# wrong")
    }
    require(
        found == marked,
        f"{checker} misses {sorted(marked - found)} and reports {sorted(found - marked)}:\n"
        f"{done.stdout}{done.stderr}",
    )


def main() -> None:
    """Install, run, check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checker", choices=CHECKERS, action="append", help="only this one")
    chosen = parser.parse_args().checker or list(CHECKERS)
    with tempfile.TemporaryDirectory(prefix="fusion-consumer-") as scratch:
        environment = Environment(Path(scratch) / "environment").create()
        tools = Environment(Path(scratch) / "tools").create()
        place = install(environment, Path(scratch))
        tools.install("--group", f"{place / 'pyproject.toml'}:check")
        environment.run("fusion-consumer", "out")
        numbers = json.loads((environment.home / "out" / "numbers.json").read_text(encoding="utf-8"))
        require(len(numbers["refusals"]) == 6, f"not every mistake was refused: {numbers['refusals']}")
        require(numbers["mend"]["mended"] < numbers["mend"]["raw"], f"nothing was mended: {numbers['mend']}")
        require(numbers["join"]["gap"] < 1e-4, f"the alignment changed the function: {numbers['join']}")
        for checker in chosen:
            start = time.perf_counter()
            check(checker, tools, environment, place)
            seconds = time.perf_counter() - start
            print(f"{checker}: the consumer is clean, every mistake is found ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

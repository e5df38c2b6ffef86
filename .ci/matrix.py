"""Resolve every extra of a package, and try the package at both ends of what it accepts.

``python .ci/matrix.py extras`` resolves each extra alone, at the highest and the lowest versions, for every
system and Python that the package names; nothing is installed. ``python .ci/matrix.py versions adaea
--python 3.11 --resolution lowest-direct --tests fast`` installs the wheel with all its extras so, imports
whatever the extras are for and every module of the package, and runs tests of the package against it.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path

from trial import Environment, call, distribution, require, wheels
from workspace import CORE, ROOT, Member, member, members

RESOLUTIONS = ("highest", "lowest-direct")
TESTS = {"none": None, "golden": ["-k", "golden"], "fast": []}
_IMPORT = """
import importlib, json, pkgutil, sys
failed = {{}}
package = importlib.import_module({module!r})
inside = [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in [*{others!r}, *(name for name in inside if not name.endswith("__main__"))]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(failed))
"""


def extras_of(target: Member) -> list[str]:
    """The names of the member's extras."""
    return sorted(target.pyproject["project"]["optional-dependencies"])


def requirements(target: Member, extras: Iterable[str], built: dict[str, Path]) -> list[str]:
    """The wheels of a member and of the core, and every line of theirs that an install of them follows.

    ``lowest-direct`` takes the lowest versions of what is named and the highest of all else, so the lines
    that stand in the wheels have to be named too.
    """
    wanted = {target.name: set(extras), CORE.name: set(extras if target == CORE else ())}
    lines = _lines(target, wanted[target.name])
    for line in lines:
        if distribution(line) == CORE.name and (asked := re.search(r"\[(.*?)\]", line)):
            wanted[CORE.name] |= set(re.split(r"\s*,\s*", asked.group(1)))
    own = [
        f"{name}{'[' + ','.join(sorted(asked)) + ']' if asked else ''} @ {built[name].as_uri()}"
        for name, asked in wanted.items()
    ]
    lines += _lines(CORE, wanted[CORE.name])
    return [*own, *(line for line in dict.fromkeys(lines) if distribution(line) != CORE.name)]


def _lines(target: Member, extras: Iterable[str]) -> list[str]:
    project = target.pyproject["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in sorted(extras) for line in optional[extra])]


def resolve(target: Member, built: dict[str, Path], scratch: Path) -> int:
    """Resolve the member with each of its extras alone; how many resolutions that was."""
    done = 0
    for extra in extras_of(target):
        for resolution in RESOLUTIONS:
            listed = scratch / f"{target.name}-{extra}.txt"
            listed.write_text("\n".join(requirements(target, [extra], built)), encoding="utf-8")
            command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--universal"]
            found = call([*command, "--python-version", "3.11", "--resolution", resolution, listed]).stdout
            require(f"{target.name} @" in found, f"{target.name}[{extra}] at {resolution}: {found}")
            done += 1
    return done


def modules_of(environment: Environment, names: set[str]) -> list[str]:
    """The import packages that these installed distributions bring."""
    found: set[str] = set()
    for entry in distributions(path=[str(environment.packages)]):
        if distribution(entry.name) in names:
            files = [file.parts for file in entry.files or ()]
            found |= {parts[0] for parts in files if len(parts) == 2 and parts[1] == "__init__.py"}
            found |= {parts[0][:-3] for parts in files if len(parts) == 1 and parts[0].endswith(".py")}
    return sorted(found)


def try_versions(
    target: Member, built: dict[str, Path], scratch: Path, version: str, resolution: str, tests: str
) -> None:
    """Install the member with all its extras so, import all of it, and run its tests against the wheel."""
    environment = Environment(scratch / f"{target.name}-{version}-{resolution}", version).create()
    lines = requirements(target, extras_of(target), built)
    listed = environment.home / "requirements.txt"
    listed.write_text("\n".join(lines), encoding="utf-8")
    environment.install("--resolution", resolution, "-r", listed)
    others = modules_of(environment, {distribution(line) for line in lines} - {target.name, CORE.name})
    code = _IMPORT.format(module=target.module, others=others)
    failed = json.loads(environment.run("python", "-c", code).stdout)
    require(not failed, f"{target.name} on {version} at {resolution}: {json.dumps(failed, indent=1)}")
    shown = environment.run(target.script, "--help").stdout
    require("Usage" in shown, f"{target.script} --help shows no usage")
    if tests == "none":
        return
    frozen = environment.home / "frozen.txt"
    listed = call(["uv", "pip", "freeze", "--python", environment.script("python")]).stdout
    frozen.write_text(listed, encoding="utf-8")
    environment.install("--group", f"{ROOT / 'pyproject.toml'}:test", "--constraint", frozen)
    command = [environment.script("python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", target.path]
    call([*command, "-m", "not slow and not gpu", *TESTS[tests]], timeout=3600)


def main() -> None:
    """Resolve, or install and try, the named members or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("extras", "versions"):
        found = verbs.add_parser(verb)
        found.add_argument("names", nargs="*", metavar="PACKAGE")
    found.add_argument("--python", default="3.11", help="version or path of the interpreter")
    found.add_argument("--resolution", choices=RESOLUTIONS, default="lowest-direct")
    found.add_argument("--tests", choices=TESTS, default="none", help="which of the package's tests to run")
    arguments = parser.parse_args()
    chosen = [member(name) for name in arguments.names] or members()
    with tempfile.TemporaryDirectory(prefix="fusion-matrix-") as scratch:
        built = wheels(chosen, Path(scratch))
        for target in chosen:
            start = time.perf_counter()
            if arguments.verb == "extras":
                what = f"{resolve(target, built, Path(scratch))} resolutions of its extras"
            else:
                options = (arguments.python, arguments.resolution, arguments.tests)
                try_versions(target, built, Path(scratch), *options)
                what = f"works on {options[0]} at {options[1]}, tests: {options[2]}"
            print(f"{target.name}: {what} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

"""Install one package's wheel with the core's wheel, and nothing else of the workspace, and try it.

``python .ci/isolation.py`` tries every member, ``... kd-trilateral`` one, ``... X --dist dist`` the wheels
of ``dist/`` instead of fresh ones. Each gets a clean virtual environment outside the tree. Third-party
versions are those of the workspace's ``exclude-newer``, because uv reads the root's settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workspace import CORE, HEAVY, ROOT, Member, member, members

_PROBE = """
import importlib, importlib.metadata, json, sys
module = importlib.import_module({module!r})
heavy = [name for name in {heavy!r} if name in sys.modules]
print(json.dumps([module.__version__, importlib.metadata.version({name!r}), module.__file__, heavy]))
"""


def call(command: list[str | Path], *, expect: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command without stdin and without this environment's Python; stop where its status surprises."""
    inherited = {key: value for key, value in os.environ.items() if key not in {"VIRTUAL_ENV", "PYTHONPATH"}}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=900,
    )
    if done.returncode != expect:
        shown = " ".join(str(part) for part in command)
        raise SystemExit(
            f"{shown}\nended with {done.returncode}, wanted {expect}\n{done.stdout}{done.stderr}"
        )
    return done


def require(condition: bool, message: str) -> None:
    """Stop with a sentence unless the condition holds."""
    if not condition:
        raise SystemExit(message)


def wheel(target: Member, dist: Path | None, scratch: Path) -> Path:
    """The member's wheel: the one in ``dist`` if it is there, else a fresh one in ``scratch``."""
    pattern = f"{target.module}-{target.version}-*.whl"
    if dist is not None and (found := list(dist.glob(pattern))):
        return found[0].resolve()
    if not (found := list(scratch.glob(pattern))):
        call(["uv", "build", "--quiet", "--wheel", "--package", target.name, "--out-dir", scratch])
        found = list(scratch.glob(pattern))
    return found[0]


def probe(python: Path, target: Member, cwd: Path) -> None:
    """Import the package in a fresh process and compare what it says of itself."""
    code = _PROBE.format(module=target.module, name=target.name, heavy=HEAVY)
    out = call([python, "-c", code], cwd=cwd).stdout
    version, installed, file, heavy = json.loads(out)
    require(
        version == installed == target.version,
        f"{target.name}: __version__ {version}, installed {installed}, pyproject {target.version}",
    )
    require(not Path(file).is_relative_to(ROOT), f"{target.name} was imported from the checkout: {file}")
    require(not heavy, f"import {target.module} loads {', '.join(heavy)}")


def try_alone(target: Member, dist: Path | None, scratch: Path, *, demo: bool) -> None:
    """Install the member alone, look at it, then install its demo extra and run the demo once."""
    home = scratch / target.name
    home.mkdir()
    call(["uv", "venv", "--quiet", "--python", sys.executable, home / "venv"])
    scripts = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
    suffix = ".exe" if os.name == "nt" else ""
    python, script, fusion = (scripts / f"{name}{suffix}" for name in ("python", target.script, "fusion"))
    install: list[str | Path] = ["uv", "pip", "install", "--quiet", "--python", python]
    core = wheel(CORE, dist, scratch)
    own = wheel(target, dist, scratch)

    call([*install, *dict.fromkeys([core, own])])
    probe(python, target, home)
    require("Usage" in call([script, "--help"], cwd=home).stdout, f"{target.script} --help shows no usage")
    listed = call([fusion, "list"], cwd=home).stdout
    if target == CORE:
        others = [entry.name for entry in members() if entry.name in listed and entry != CORE]
        require(not others, f"fusion list names {others}, which are not installed")
        return
    require(target.name in listed, f"fusion list does not name {target.name}:\n{listed}")
    if not demo:
        return

    bare = call([script, "demo", "--out", home / "bare"], expect=2, cwd=home)
    require(
        f"{target.name}[demo]" in bare.stderr,
        f"{target.script} demo without its extra does not say how to install it:\n{bare.stderr}",
    )
    call([*install, core, f"{target.name}[demo] @ {own.as_uri()}"])
    probe(python, target, home)
    call([script, "demo", "--out", home / "out"], cwd=home)
    result = json.loads((home / "out" / "result.json").read_text(encoding="utf-8"))
    require(result["status"] == "ok", f"{target.script} demo: {result}")


def main() -> None:
    """Try the named members, or all, each in its own environment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="PACKAGE")
    parser.add_argument("--dist", type=Path, help="take the wheels that are here")
    parser.add_argument("--no-demo", dest="demo", action="store_false", help="stop before the demo")
    arguments = parser.parse_args()
    chosen = [member(name) for name in arguments.names] or members()
    with tempfile.TemporaryDirectory(prefix="fusion-isolation-") as scratch:
        for target in chosen:
            start = time.perf_counter()
            try_alone(target, arguments.dist, Path(scratch), demo=arguments.demo)
            seconds = time.perf_counter() - start
            print(f"{target.name} {target.version} works alone ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

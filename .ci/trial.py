"""Wheels, and environments outside the tree to try them in: what the scripts beside this one share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workspace import CORE, ROOT, Member


def call(
    command: list[str | Path], *, expect: int = 0, cwd: Path = ROOT, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run a command without stdin and without this environment's Python; stop where its status surprises."""
    own = {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}
    inherited = {key: value for key, value in os.environ.items() if key not in own}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
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


def distribution(requirement: str) -> str:
    """The name at the beginning of a requirement, as registries compare names."""
    found = re.match(r"[A-Za-z0-9][\w.-]*", requirement)
    return re.sub(r"[-_.]+", "-", found.group() if found else "").lower()


def wheels(targets: Iterable[Member], scratch: Path, dist: Path | None = None) -> dict[str, Path]:
    """The wheels of the core and the members, by name: those in ``dist``, else fresh ones in ``scratch``."""
    found: dict[str, Path] = {}
    for target in dict.fromkeys([CORE, *targets]):
        pattern = f"{target.module}-{target.version}-*.whl"
        if dist is not None and (given := list(dist.glob(pattern))):
            found[target.name] = given[0].resolve()
            continue
        call(["uv", "build", "--quiet", "--wheel", "--package", target.name, "--out-dir", scratch])
        found[target.name] = next(scratch.glob(pattern))
    return found


@dataclass(frozen=True)
class Environment:
    """A virtual environment outside the tree.

    Attributes:
        home: its directory; what is run in it runs there, the environment itself is ``home/venv``.
        version: a Python version or executable.
    """

    home: Path
    version: str = sys.executable

    def create(self) -> Environment:
        """Make it, empty."""
        self.home.mkdir(parents=True, exist_ok=True)
        call(["uv", "venv", "--quiet", "--python", self.version, self.home / "venv"])
        return self

    def script(self, name: str) -> Path:
        """The path of a console script, or of ``python``."""
        folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
        return self.home / "venv" / folder / f"{name}{suffix}"

    @property
    def packages(self) -> Path:
        """The directory of the installed packages."""
        venv = self.home / "venv"
        return next(venv.glob("lib/python*/site-packages"), venv / "Lib" / "site-packages")

    def install(self, *arguments: str | Path) -> None:
        """``uv pip install`` with these requirements and options, by the workspace's ``exclude-newer``."""
        call(["uv", "pip", "install", "--quiet", "--python", self.script("python"), *arguments])

    def run(
        self, name: str, *arguments: str | Path, expect: int = 0, timeout: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run a console script, or ``python``, in :attr:`home`."""
        return call([self.script(name), *arguments], expect=expect, cwd=self.home, timeout=timeout)

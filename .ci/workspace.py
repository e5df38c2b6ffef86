"""What the tree itself says about the members of the workspace; nothing here is a list to keep up to date."""

from __future__ import annotations

import re
import subprocess
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("cv2", "matplotlib", "pandas", "sklearn", "transformers")
"""What ``import package`` must not load; it is slow, and most users of a package never need it."""
SECTIONS = (
    "why",
    "install",
    "quickstart",
    "command line",
    "how it differs",
    "evidence",
    "benchmarks",
    "limits",
    "citation",
)
"""What every package's README tells, in this order."""


@dataclass(frozen=True)
class Member:
    """One distribution of the workspace, read from its directory."""

    directory: Path

    @cached_property
    def pyproject(self) -> dict[str, Any]:
        """The whole ``pyproject.toml``."""
        return tomllib.loads((self.directory / "pyproject.toml").read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        """The distribution's name."""
        return self.pyproject["project"]["name"]

    @property
    def module(self) -> str:
        """The import name."""
        return self.name.replace("-", "_")

    @property
    def version(self) -> str:
        """The version in ``pyproject.toml``."""
        return self.pyproject["project"]["version"]

    @property
    def source(self) -> Path:
        """The directory of the import package."""
        return self.directory / "src" / self.module

    @property
    def path(self) -> str:
        """The directory, relative to the root, with slashes."""
        return self.directory.relative_to(ROOT).as_posix()

    @property
    def script(self) -> str:
        """The console script that belongs to the member."""
        return next(iter(self.pyproject["project"]["scripts"]))

    def code_version(self) -> str:
        """``__version__`` as the source says it, without importing."""
        text = (self.source / "__init__.py").read_text(encoding="utf-8")
        found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
        return found.group(1) if found else ""

    def changelog_version(self) -> str:
        """The version of the topmost released entry of the changelog."""
        text = (self.directory / "CHANGELOG.md").read_text(encoding="utf-8")
        found = re.search(r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
        return found.group(1) if found else ""


CORE = Member(ROOT / "shared")


def packages() -> list[Member]:
    """The method packages, in the order of their names."""
    return [Member(path.parent) for path in sorted((ROOT / "packages").glob("*/pyproject.toml"))]


def members() -> list[Member]:
    """The core, then the method packages."""
    return [CORE, *packages()]


def member(name: str) -> Member:
    """The member of that name; ``SystemExit`` lists the names where there is none."""
    found = {entry.name: entry for entry in members()}
    if name not in found:
        raise SystemExit(f"no member is called {name!r}; there are {', '.join(found)}")
    return found[name]


def tracked_files() -> list[Path]:
    """Every file that git tracks or would track (new and not ignored)."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in sorted(set(listed.split("\0"))) if name and (path := ROOT / name).is_file()]

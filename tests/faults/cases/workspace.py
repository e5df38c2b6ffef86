"""The command ``fusion`` of the workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faults.cases.common import demonstrated, replay
from faults.kill import Command

PACKAGE = "kd-trilateral"


def _children(inputs: Path) -> None:
    """The processes that ``fusion demo`` starts, replaced by what they write: a demo that was run before."""
    from fusion_core import command
    from fusion_core.demo import result_document, write_result

    def run_child(name: str, method: Any, broken: str | None, place: Path, *, full: bool, seed: int) -> Any:
        place.mkdir(parents=True)
        found = replay(inputs, place)
        write_result(found, place, method, full=full, seed=seed, seconds=1.0)
        return result_document(name, method.package, method.version, found, full=full, seed=seed, seconds=1.0)

    command._run_child = run_child


COMMANDS = [
    Command(
        name="fusion demo",
        main="fusion_core.command:main",
        argv=("demo", PACKAGE, "-o", "demo", "-q"),
        make=demonstrated(PACKAGE),
        patch=_children,
        together=True,
    ),
]

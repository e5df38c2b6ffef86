"""Docstrings as the site shows them: a Griffe extension for roles and examples.

Docstrings name other objects by roles (``:class:`Config```), which are no Markdown. A role becomes a link
where its target has a place in the reference, and plain code elsewhere. ``Example:`` becomes ``Examples:``,
which Griffe shows as code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Readable(griffe.Extension):
    """Rewrites every docstring once.

    Args:
        known: full names that have a place in the reference; roles link to these.
    """

    def __init__(self, known: list[str]) -> None:
        super().__init__()
        self.known = set(known)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called when an object and its members are loaded."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(lambda found: self.shown(obj, found), text)

    def shown(self, obj: griffe.Object, found: re.Match[str]) -> str:
        """What stands for a role in an object's docstring."""
        short, target = found.groups()
        words = target.rpartition(".")[2] if short else target.removeprefix(".")
        for full in candidates(obj, target):
            if full in self.known:
                return f"[`{words}`][{full}]"
        return f"`{words}`"


def candidates(obj: griffe.Object, target: str) -> list[str]:
    """Full names that a role's target may mean in an object's docstring, nearest scope first.

    Example:
        >>> thing = griffe.Function("run", parent=griffe.Class("Loop", parent=griffe.Module("core")))
        >>> candidates(thing, "stop")
        ['core.Loop.run.stop', 'core.Loop.stop', 'core.stop', 'stop']
    """
    if target.startswith("."):
        return [f"{obj.package.path}{target}"]
    parts = obj.path.split(".")
    scopes = [".".join(parts[:stop]) for stop in range(len(parts), 0, -1)]
    return [*(f"{scope}.{target}" for scope in scopes), target]

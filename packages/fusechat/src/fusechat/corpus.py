"""The demo's texts: docstrings of Python's standard library."""

from __future__ import annotations

import ast
import json
import sysconfig
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from fusion_core.errors import DataError

__all__ = ["Corpus", "docstrings", "load_corpus", "split"]

HELD_OUT, TUNING, FIRST = 120, 140, 950


@dataclass(frozen=True)
class Corpus:
    """Texts by use: held out, for the pivot, for the first source, for the second source."""

    held_out: list[str]
    tuning: list[str]
    first: list[str]
    second: list[str]


def docstrings(shortest: int = 80, longest: int = 700) -> list[str]:
    """Docstrings of the standard library's modules, classes and functions, blanks collapsed.

    Args:
        shortest: fewer characters are left out.
        longest: the rest is cut.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) > shortest:
                    found[text[:longest]] = None
    return list(found)


def split(texts: list[str]) -> Corpus:
    """The recorded split: shuffled by PCG64 with seed 0.

    Raises:
        DataError: too few texts.
    """
    if len(texts) < HELD_OUT + TUNING + FIRST + 100:
        raise DataError(
            f"there are {len(texts)} docstrings, wanted about 2000: is the standard library complete?"
        )
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(texts))
    mixed = [texts[i] for i in order]
    a, b, c = HELD_OUT, HELD_OUT + TUNING, HELD_OUT + TUNING + FIRST
    return Corpus(mixed[:a], mixed[a:b], mixed[b:c], mixed[c:])


def load_corpus() -> Corpus:
    """The texts that ship with the package.

    Held out and for the pivot; the sources' own are not needed again.
    """
    found = json.loads((files("fusechat") / "checkpoints" / "corpus.json").read_text("utf-8"))
    return Corpus(found["held_out"], found["tuning"], [], [])

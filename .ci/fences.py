"""Fenced code blocks of a Markdown file: what the tests run, and what the site shows.

What follows the language on a fence's first line is ours: ```` ```python no-run REASON ```` is not run by the
tests, ```` ```text output ```` is what the block before it prints, and ```` ```text output within 0.02 ````
lets numbers with a decimal point differ by so much.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^( *)```(\w+)[ ]*([^\n]*)\n(.*?)^\1```[ ]*$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Fence:
    """One fenced block.

    Attributes:
        language: such as ``python``.
        note: what follows it on the line.
        text: inside, with its last newline.
        line: number of the fence's first line in the file, from 1.
    """

    language: str
    note: str
    text: str
    line: int

    @property
    def output(self) -> bool:
        """Whether it holds what the block before it prints."""
        return self.language == "text" and self.note.split(" ")[0] == "output"

    @property
    def tolerance(self) -> float | None:
        """By how much numbers of an output may differ; None: not at all."""
        words = self.note.split()
        return float(words[2]) if self.output and words[1:2] == ["within"] else None


def fences(text: str) -> Iterator[Fence]:
    """The blocks that name a language, in order."""
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Fence(found.group(2), found.group(3).strip(), found.group(4), line)


def plain_fences(text: str) -> str:
    """The text with nothing but the language on each fence; an output gets a title."""

    def replace(found: re.Match[str]) -> str:
        indent, language, note, block = found.groups()
        title = ' title="Output"' if language == "text" and note.startswith("output") else ""
        return f"{indent}```{language}{title}\n{block}{indent}```"

    return _FENCE.sub(replace, text)


def difference(said: str, wanted: str, tolerance: float | None = None) -> str | None:
    """How a block's output differs from what its page shows; None where it does not.

    Args:
        said: by the block.
        wanted: by the page; ``...`` stands for anything.
        tolerance: of numbers with a decimal point; None compares them as text.
    """
    said, wanted = (
        "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) for text in (said, wanted)
    )
    parts: list[str] = []
    for piece in re.split(r"(\.\.\.)", wanted):
        if piece == "...":
            parts.append(".*?")
        elif tolerance is None:
            parts.append(re.escape(piece))
        else:  # a padded column may lose or gain a blank where a number changes its sign
            words = (r"\s+".join(map(re.escape, re.split(r"\s+", text))) for text in _NUMBER.split(piece))
            parts.append(rf"({_NUMBER.pattern})".join(words))
    matched = re.fullmatch("".join(parts), said, re.DOTALL)
    if matched is None:
        return f"printed\n{said}\nthe page shows\n{wanted}"
    numbers = [float(number) for number in _NUMBER.findall(wanted)] if matched.groups() else []
    for shown, found in zip(numbers, map(float, matched.groups()), strict=True):
        if tolerance is None or not abs(shown - found) <= tolerance:
            return f"printed {found} where the page shows {shown} within {tolerance}:\n{said}"
    return None

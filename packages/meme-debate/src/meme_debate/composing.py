"""The judge's input text: meme, caption and both rationales as tagged lines, the winner's rationale first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from fusion_core.errors import InputError

from .meme import Debate, Meme

__all__ = ["TAGS", "First", "compose", "compose_parts", "order", "parse"]

First = Literal["verdict", "harmful", "harmless"]
TAGS = ("Text", "Caption", "Harmful", "Harmless")
_TAG = re.compile(rf"({'|'.join(TAGS)}): ")
_TAG_OR_ESCAPED = re.compile(rf"\\*(?:{'|'.join(TAGS)}): ")
_ESCAPED = re.compile(rf"\\+(?:{'|'.join(TAGS)}): ")


def order(verdict: int | None, first: First = "verdict") -> tuple[str, str]:
    """Which side's rationale comes first and which second.

    Args:
        verdict: 1 = the harmful side was more convincing, 0 = the harmless one, None = not known.
        first: ``"verdict"`` follows the verdict (harmful first where it is None), a side's name fixes it.

    Raises:
        InputError: another ``first``.

    Example:
        >>> order(0)
        ('harmless', 'harmful')
    """
    if first not in ("verdict", "harmful", "harmless"):
        raise InputError(f"first is {first!r}, wanted 'verdict', 'harmful' or 'harmless'")
    harmless_first = verdict == 0 if first == "verdict" else first == "harmless"
    return ("harmless", "harmful") if harmless_first else ("harmful", "harmless")


def _escape(value: str) -> str:
    head, *rest = value.split("\n")
    return "\n".join([head, *("\\" + line if _TAG_OR_ESCAPED.match(line) else line for line in rest)])


def compose_parts(parts: Sequence[tuple[str, str]]) -> str:
    r"""Join tagged fields to one text, so that no field can be taken for two.

    Args:
        parts: (tag, value) in order; tags are of :data:`TAGS`.

    Example:
        >>> compose_parts([("Text", "a\nHarmful: b"), ("Caption", "")])
        'Text: a\n\\Harmful: b\nCaption: '
    """
    return "\n".join(f"{tag}: {_escape(value)}" for tag, value in parts)


def compose(meme: Meme, debate: Debate | None, first: First = "verdict") -> str:
    r"""The text that the judge reads (the authors' format).

    Lines ``Text:``, ``Caption:`` and both sides' ``Harmful:`` and ``Harmless:``, joined by a newline; an
    empty field keeps its line. A line inside a field that looks like a tag gets a backslash in front.

    Args:
        meme: its ``text`` and ``caption`` are used.
        debate: both rationales and the verdict; None leaves the two lines out.
        first: see :func:`order`.

    Raises:
        InputError: the debate is of another meme.

    Example:
        >>> compose(Meme("a", None, "hi"), Debate("a", "bad", "fine", verdict=0))
        'Text: hi\nCaption: \nHarmless: fine\nHarmful: bad'
    """
    parts = [("Text", meme.text), ("Caption", meme.caption)]
    if debate is not None:
        if debate.id != meme.id:
            raise InputError(f"debate has id {debate.id!r}, the meme {meme.id!r}; wanted the same")
        parts += [(side.capitalize(), getattr(debate, side)) for side in order(debate.verdict, first)]
    return compose_parts(parts)


def parse(text: str, id: str = "") -> tuple[Meme, Debate]:  # noqa: A002
    r"""The inverse of :func:`compose`.

    Args:
        text: what :func:`compose` returned.
        id: given to both records.

    Returns:
        The meme without image, and the debate; its verdict is 1 where ``Harmful:`` comes first.

    Raises:
        InputError: the tags are not Text, Caption and both sides, each once.

    Example:
        >>> parse('Text: hi\nCaption: \nHarmless: fine\nHarmful: bad')[1].verdict
        0
    """
    found: list[tuple[str, list[str]]] = []
    for line in text.split("\n"):
        if tag := _TAG.match(line):
            found.append((tag[1], [line[tag.end() :]]))
        elif not found:
            raise InputError(f"text begins with {line[:40]!r}, wanted 'Text: '")
        else:
            found[-1][1].append(line[1:] if _ESCAPED.match(line) else line)
    tags = [tag for tag, _ in found]
    if tags[:2] != ["Text", "Caption"] or sorted(tags[2:]) != ["Harmful", "Harmless"]:
        raise InputError(
            f"text has the tags {tags}, wanted Text, Caption, then Harmful and Harmless in either order"
        )
    values = {tag: "\n".join(lines) for tag, lines in found}
    meme = Meme(id or "-", None, values["Text"], values["Caption"])
    debate = Debate(id or "-", values["Harmful"], values["Harmless"], int(tags[2] == "Harmful"))
    for record in (meme, debate):  # a text alone has no id, which the records' own check would refuse
        object.__setattr__(record, "id", id)
    return meme, debate

"""What a judge reads of a meme and its debate, whole or with parts left out as in the paper's ablations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fusion_core.errors import ConfigError, DataError

from .composing import First, compose_parts, order
from .meme import Debate, Meme, pair
from .settings import ABLATIONS, Ablation

__all__ = ["ABLATIONS", "Ablation", "fields_of", "judge_text", "labels_of", "paired", "splits_of"]


def fields_of(
    meme: Meme,
    debate: Debate | None,
    *,
    first: First = "verdict",
    caption: bool = True,
    ablation: str = "",
) -> list[tuple[str, str]]:
    """The tagged fields that a judge reads, in order.

    A debate with both sides empty (both refused) counts as no debate.

    Args:
        meme: text and caption.
        debate: both rationales; None = none.
        first: see :func:`meme_debate.composing.order`.
        caption: False leaves the caption empty.
        ablation: a key of :data:`ABLATIONS`, or "" for all.

    Raises:
        ConfigError: another ablation.
    """
    if ablation and ablation not in ABLATIONS:
        raise ConfigError(f"ablation is {ablation!r}, wanted one of {', '.join(map(repr, ABLATIONS))}")
    parts = [("Text", meme.text), ("Caption", meme.caption if caption else "")]
    if debate is None or ablation in ("w/o MD", "w/o SLMJ") or debate.empty:
        return parts
    sides: Sequence[str] = order(debate.verdict, "harmful" if ablation == "w/o LLMJ" else first)
    if ablation == "w/o HlD":
        sides = ["harmful"]
    elif ablation == "w/o HfD":
        sides = ["harmless"]
    elif ablation == "w/o UR":
        sides = sides[:1]
    return parts + [(side.capitalize(), getattr(debate, side)) for side in sides]


def judge_text(meme: Meme, debate: Debate | None, **options: object) -> str:
    """:func:`fields_of` joined to one text; without options that of :func:`meme_debate.compose`."""
    return compose_parts(fields_of(meme, debate, **options))  # type: ignore[arg-type]


def paired(
    memes: Sequence[Meme], debates: Iterable[Debate] | Mapping[str, Debate] | None
) -> list[Debate | None]:
    """The debate of each meme; None where it has none, or where neither side said anything.

    Raises:
        DataError: an id occurs twice, or a debate is of no meme.
    """
    seen: set[str] = set()
    for meme in memes:
        if meme.id in seen:
            raise DataError(f"memes holds the id {meme.id!r} twice, wanted each once")
        seen.add(meme.id)
    listed = debates.values() if isinstance(debates, Mapping) else debates
    return [debate for _, debate in pair(memes, listed)]


def labels_of(memes: Sequence[Meme]) -> list[int]:
    """The labels of memes.

    Raises:
        DataError: a meme has none; it is named.
    """
    missing = [meme.id for meme in memes if meme.label is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(memes)} memes have no label, the first {missing[0]!r}; wanted 0 or 1"
        )
    return [int(meme.label) for meme in memes]  # type: ignore[arg-type]


def splits_of(memes: Sequence[Meme]) -> str:
    """How many memes of which split, in words.

    Example:
        >>> splits_of([Meme("a", None, "x", split="test"), Meme("b", None, "y")])
        '2 memes (test 1, no split 1)'
    """
    counts: dict[str, int] = {}
    for meme in memes:
        name = meme.split or "no split"
        counts[name] = counts.get(name, 0) + 1
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{len(memes)} memes ({told})"

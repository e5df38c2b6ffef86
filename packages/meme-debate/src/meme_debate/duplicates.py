"""Memes that occur more than once, within a split or, worse, in two of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusion_core.results import Result

from .meme import Meme
from .pictures import picture_digest

__all__ = ["Duplicates", "drop_duplicates", "find_duplicates"]


@dataclass(frozen=True, slots=True)
class Duplicates(Result):
    """Groups of ids that are equal.

    Attributes:
        images: ids with the same picture file.
        texts: ids with the same text (case and blanks aside) and other pictures, or none.
        within: memes of ``images`` that repeat one of their own split.
        across: memes of ``images`` that repeat one of another split.
        texts_across: memes of ``texts`` that repeat one of another split.
    """

    images: tuple[tuple[str, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    within: int
    across: int
    texts_across: int

    def warning(self) -> str | None:
        """One line for people, or None where nothing repeats."""
        if not (self.within or self.across or self.texts_across):
            return None
        return (
            f"{self.within} pictures repeat within a split, {self.across} across splits; "
            f"{self.texts_across} texts "
            "repeat across splits: a judge's test may contain what it learned from"
        )


def _counts(groups: Iterable[Sequence[Meme]]) -> tuple[int, int]:
    within = across = 0
    for group in groups:
        seen: dict[str | None, int] = {}
        for meme in group:
            if meme.split in seen:
                within += 1
            elif seen:
                across += 1
            seen[meme.split] = 1
    return within, across


def find_duplicates(memes: Sequence[Meme]) -> Duplicates:
    """Compare pictures by their bytes, then texts.

    Raises:
        InputError: a picture cannot be read.

    Example:
        >>> memes = [Meme(name, None, "Hi  there", split=name) for name in ("a", "b")]
        >>> find_duplicates(memes).texts_across
        1
    """
    pictures: dict[str, list[Meme]] = {}
    texts: dict[str, list[Meme]] = {}
    digests: dict[str, str] = {}
    for meme in memes:
        digests[meme.id] = found = picture_digest(meme.image)
        if found:
            pictures.setdefault(found, []).append(meme)
        if words := " ".join(meme.text.lower().split()):
            texts.setdefault(words, []).append(meme)
    same = [group for group in pictures.values() if len(group) > 1]
    others: list[list[Meme]] = []
    for group in texts.values():
        distinct = list({digests[meme.id] or meme.id: meme for meme in reversed(group)}.values())[::-1]
        if len(distinct) > 1:
            others.append(distinct)
    within, across = _counts(same)
    return Duplicates(
        tuple(tuple(meme.id for meme in group) for group in same),
        tuple(tuple(meme.id for meme in group) for group in others),
        within,
        across,
        _counts(others)[1],
    )


def drop_duplicates(memes: Sequence[Meme], duplicates: Duplicates) -> tuple[list[Meme], tuple[str, ...]]:
    """The memes without the later ones of equal pictures, and of equal texts where there is no picture.

    Returns:
        What is left in order, and the ids that were dropped.
    """
    bare = {meme.id for meme in memes if meme.image is None}
    later = {name for group in duplicates.images for name in group[1:]}
    later |= {name for group in duplicates.texts for name in group[1:] if name in bare}
    dropped = tuple(meme.id for meme in memes if meme.id in later)
    return [meme for meme in memes if meme.id not in later], dropped

"""What moved a score: words of the fields, patches of the picture."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Explanation", "Patches", "Word", "strongest"]


@dataclass(frozen=True, slots=True)
class Word:
    """A word that moved the score.

    Args:
        field: ``text``, ``caption``, ``harmful`` or ``harmless``.
        start: character in the field.
        end: one past its last character.
        weight: share of the logit; above 0 speaks for harmful.
    """

    field: str
    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Patches:
    """What each patch of the (center square of the) picture did.

    Args:
        grid: rows and columns.
        weights: (rows, columns); above 0 speaks for harmful.
    """

    grid: tuple[int, int]
    weights: list[list[float]]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Words, the strongest first, and patches (None where the judge does not look at a picture)."""

    words: list[Word]
    patches: Patches | None


def strongest(words: list[Word], top: int) -> list[Word]:
    """The ``top`` words of largest weight, the strongest first; words without any weight are left out."""
    kept = [word for word in words if word.weight != 0.0]
    return sorted(kept, key=lambda word: -abs(word.weight))[:top]

"""Memes with similar words that people have decided, for the debaters to look at (as in ExplainHM++)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion_core.errors import DataError, check_range
from meme_debate.meme import Meme

__all__ = ["Neighbors"]

_SPARE = 8  # looked at beyond the wanted ones, since the meme itself may be among them


class Neighbors:
    """Finds, for a meme, the decided ones whose words and caption are most like its own.

    TF-IDF of words and word pairs, cosine (scikit-learn inside). A meme is never its own neighbor: one of the
    same id, or of the same words, caption and picture, is passed over, so that a debate does not read its
    label.

    Args:
        memes: with labels, such as those of the training split.
        count: neighbors of each meme, >= 1.

    Raises:
        DataError: no meme, one without a label, or none that has a word.
        ConfigError: ``count`` is below 1.

    Example:
        >>> known = [Meme("a", None, "a giant cat", label=1), Meme("b", None, "cold coffee", label=0)]
        >>> [meme.id for meme in Neighbors(known).find(Meme("c", None, "what a giant"))]
        ['a']
    """

    def __init__(self, memes: Sequence[Meme], count: int = 3) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.neighbors import NearestNeighbors

        self.count = int(check_range("count", count, 1, float("inf")))
        self._memes = list(memes)
        bare = [meme.id for meme in self._memes if meme.label is None]
        if bare or not self._memes:
            told = f"the first without a label is {bare[0]!r}" if bare else "it is empty"
            raise DataError(f"memes of the neighbors: {told}; wanted memes with labels")
        self._vectorizer: Any = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        try:
            matrix = self._vectorizer.fit_transform([words_of(meme) for meme in self._memes])
        except ValueError as error:
            raise DataError(f"memes of the neighbors have no words to compare: {error}") from error
        self._index: Any = NearestNeighbors(metric="cosine", algorithm="brute").fit(matrix)

    def find(self, meme: Meme) -> list[Meme]:
        """The neighbors of a meme, the most similar first; fewer where too few share a word with it."""
        row = self._vectorizer.transform([words_of(meme)])
        wanted = min(len(self._memes), self.count + _SPARE)
        distances, places = self._index.kneighbors(row, wanted)
        order = np.lexsort((places[0], distances[0].round(9)))
        found = [self._memes[int(places[0][i])] for i in order if distances[0][i] < 1 - 1e-9]
        return [each for each in found if not _same(each, meme)][: self.count]


def words_of(meme: Meme) -> str:
    """What is compared, and what a debater reads of a neighbor: the words, then the caption."""
    return f"{meme.text}\n{meme.caption}".strip()


def _same(one: Meme, other: Meme) -> bool:
    if one.id == other.id:
        return True
    return (one.text, one.caption, _place(one.image)) == (other.text, other.caption, _place(other.image))


def _place(image: Any) -> Any:
    """A picture that can be compared: its path, or which object it is."""
    return str(image) if isinstance(image, str | os.PathLike) else id(image)

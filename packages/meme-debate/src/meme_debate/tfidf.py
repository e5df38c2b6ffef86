"""TF-IDF of words and runs of words: the numbers of scikit-learn, counted by sorting integers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import DataError

__all__ = ["WORD", "TfIdf"]

WORD = re.compile(r"(?u)\b\w\w+\b")
"""What counts as a word: scikit-learn's default."""
Ints = NDArray[np.int64]


class TfIdf:
    """Weights of words and runs of up to ``ngrams`` words, smoothed idf, rows of length one.

    A run is a number: that of its beginning, times the number of words, plus its last word. A run is in no
    more texts than its beginning, so what ``min_df`` drops can be dropped before longer runs are made.

    Args:
        ngrams: longest run of words.
        min_df: texts that a word or run must occur in.

    Attributes:
        terms: words and runs, sorted; the columns.
        idf: weight of each column, (V,).
    """

    def __init__(self, ngrams: int = 2, min_df: int = 1) -> None:
        self.ngrams, self.min_df = ngrams, min_df
        self.terms: list[str] = []
        self.idf = np.zeros(0)
        self._by_term: dict[str, int] = {}
        self._words: dict[str, int] = {}
        self._codes: list[Ints] = []  # of each length from two on: sorted codes of its runs
        self._columns: list[Ints] = []  # of each length: the column of a run

    @classmethod
    def of(cls, terms: Sequence[str], idf: NDArray[np.float64], ngrams: int = 2) -> Self:
        """The one with these columns.

        Args:
            terms: words and runs, one a column.
            idf: (V,).
            ngrams: longest run of words.

        Raises:
            DataError: a term twice, one that is too long, or one whose beginning or last word is no term.
        """
        made = cls(ngrams)
        made.terms, made.idf = list(terms), np.asarray(idf, np.float64)
        columns = made.columns
        if len(columns) < len(terms):
            raise DataError("a term stands there twice")
        if longer := [term for term in terms if term.count(" ") >= ngrams]:
            raise DataError(f"{longer[0]!r} has more than {ngrams} words")
        made._words = {term: at for at, term in enumerate(term for term in terms if " " not in term)}
        made._columns = [np.array([columns[word] for word in made._words], np.int64)]
        place = dict(made._words)  # of a run among those of its length
        for size in range(2, made.ngrams + 1):
            runs = [term for term in terms if term.count(" ") + 1 == size]
            try:
                split = [
                    (place[head], made._words[last]) for head, _, last in (t.rpartition(" ") for t in runs)
                ]
            except KeyError as error:
                raise DataError(f"{error.args[0]!r} is part of a run and no term itself") from None
            codes = np.array([head * len(made._words) + last for head, last in split], np.int64)
            order = np.argsort(codes)
            place = {runs[int(at)]: rank for rank, at in enumerate(order)}
            made._codes.append(codes[order])
            made._columns.append(np.array([columns[run] for run in runs], np.int64)[order])
        return made

    @property
    def columns(self) -> dict[str, int]:
        """Word or run -> its column."""
        if len(self._by_term) != len(self.terms):
            self._by_term = {term: column for column, term in enumerate(self.terms)}
        return self._by_term

    def fit_transform(self, texts: Sequence[str]) -> Any:
        """Learn the columns from texts; their rows, as a sparse matrix (N, V).

        Raises:
            DataError: no word is in ``min_df`` texts.
        """
        seen: defaultdict[str, int] = defaultdict()
        seen.default_factory = seen.__len__
        ids, owners = _read(texts, seen.__getitem__)
        kept, ranks = self._enough(ids, owners, len(seen), len(texts))
        words = [word for word, keep in zip(seen, kept, strict=True) if keep]
        if not words:
            raise DataError(
                f"texts cannot be learned from: no word of two letters is in {self.min_df} of {len(texts)}"
            )
        self._words = {word: at for at, word in enumerate(words)}
        ids = ranks[ids]
        runs, terms, lengths = ids, list(words), [len(words)]
        found = [(owners, runs)]
        self._codes = []
        for _ in range(2, self.ngrams + 1):
            codes, at = self._longer(runs, ids, owners)
            values, places = np.unique(codes, return_inverse=True)
            kept, ranks = self._enough(places, owners[at], len(values), len(texts))
            heads = terms[len(terms) - lengths[-1] :]
            values = values[kept]
            self._codes.append(values)
            pairs = zip(*(part.tolist() for part in np.divmod(values, len(words))), strict=True)
            terms += [f"{heads[head]} {words[last]}" for head, last in pairs]
            lengths.append(len(values))
            runs = np.full(len(ids), -1, np.int64)
            runs[at] = ranks[places]
            found.append((owners, runs))
        order = sorted(range(len(terms)), key=terms.__getitem__)
        self.terms, self._by_term = [terms[at] for at in order], {}
        columns = np.empty(len(terms), np.int64)
        columns[order] = np.arange(len(terms))
        self._columns = np.split(columns, np.cumsum(lengths)[:-1])
        counts = self._counts(found, len(texts))
        inside = np.bincount(counts.indices, minlength=len(terms))
        self.idf = np.log((1 + len(texts)) / (1 + inside)) + 1
        return self._weighed(counts)

    def transform(self, texts: Sequence[str]) -> Any:
        """Rows of texts, as a sparse matrix (N, V); words that were not learned count for nothing."""
        known = self._words.get
        ids, owners = _read(texts, lambda word: known(word, -1))
        found = [(owners, ids)]
        runs = ids
        for values in self._codes:
            codes, at = self._longer(runs, ids, owners)
            places = np.searchsorted(values, codes)
            places[places == len(values)] = 0
            same = values[places] == codes if len(values) else np.zeros(len(codes), bool)
            runs = np.full(len(ids), -1, np.int64)
            runs[at[same]] = places[same]
            found.append((owners, runs))
        return self._weighed(self._counts(found, len(texts)))

    def _longer(self, runs: Ints, ids: Ints, owners: Ints) -> tuple[Ints, Ints]:
        """Codes of the runs that are one word longer, and where they end."""
        last = np.arange(1, len(ids))
        whole = (runs[:-1] >= 0) & (ids[1:] >= 0) & (owners[:-1] == owners[1:])
        at = last[whole]
        return runs[at - 1] * len(self._words) + ids[at], at

    def _enough(self, places: Ints, owners: Ints, size: int, count: int) -> tuple[NDArray[np.bool_], Ints]:
        """Which of ``size`` values are in enough texts, and their ranks among those, -1 for the others."""
        if self.min_df == 1:
            return np.ones(size, bool), np.arange(size)
        matrix = _count(owners, places, (count, size))
        kept = np.bincount(matrix.indices, minlength=size) >= self.min_df
        return kept, np.where(kept, np.cumsum(kept) - 1, -1)

    def _counts(self, found: Iterable[tuple[Ints, Ints]], count: int) -> Any:
        owners: list[Ints] = []
        columns: list[Ints] = []
        for (owner, runs), column in zip(found, self._columns, strict=True):
            there = runs >= 0
            owners.append(owner[there])
            columns.append(column[runs[there]])
        return _count(np.concatenate(owners), np.concatenate(columns), (count, len(self.terms)))

    def _weighed(self, counts: Any) -> Any:
        counts.data *= self.idf[counts.indices]
        lengths = np.sqrt(np.add.reduceat(np.append(counts.data**2, 0.0), counts.indptr[:-1]))
        sizes = np.diff(counts.indptr)
        counts.data /= np.repeat(np.where(sizes > 0, lengths, 1.0), sizes)
        return counts


def _read(texts: Sequence[str], number: Any) -> tuple[Ints, Ints]:
    """The words of all texts as numbers, and the text of each."""
    numbers: list[int] = []
    sizes: list[int] = []
    for text in texts:
        words = WORD.findall(text.lower())
        sizes.append(len(words))
        numbers += map(number, words)
    return np.array(numbers, np.int64), np.repeat(np.arange(len(texts)), sizes)


def _count(rows: Ints, columns: Ints, shape: tuple[int, int]) -> Any:
    """A sparse matrix of how often each pair occurs."""
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    return matrix

"""Which token of the source answers to which token of the pivot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusechat.align.dynamic import Tie, warp
from fusion_core.errors import InputError, ShapeError
from fusion_core.results import Result


@dataclass(frozen=True, slots=True)
class Pairs(Result):
    """Positions that belong together, in ascending order.

    Attributes:
        pivot: (pairs,) int64 positions in the pivot's tokens.
        source: (pairs,) int64 positions in the source's tokens.
        lengths: number of the pivot's and of the source's tokens.
        cost: of the path, for dynamic time warping; 0 for spans.
    """

    pivot: NDArray[np.int64]
    source: NDArray[np.int64]
    lengths: tuple[int, int]
    cost: float = 0.0

    def __len__(self) -> int:
        return len(self.pivot)

    @property
    def pivot_to_source(self) -> list[list[int]]:
        """For each position of the pivot the ascending positions of the source."""
        return _partners(self.pivot, self.source, self.lengths[0])

    @property
    def source_to_pivot(self) -> list[list[int]]:
        """For each position of the source the ascending positions of the pivot."""
        return _partners(self.source, self.pivot, self.lengths[1])


def _partners(own: NDArray[np.int64], other: NDArray[np.int64], length: int) -> list[list[int]]:
    order = np.lexsort((other, own))
    bounds = np.searchsorted(own[order], np.arange(1, length))
    return [part.tolist() for part in np.split(other[order], bounds)] if length else []


def span(pivot_ends: ArrayLike, source_ends: ArrayLike) -> Pairs:
    """Pair the positions at which both tokenizers have covered exactly the same text (section 2.3).

    There both models condition on the same prefix, so their next-token distributions speak of the same thing.
    Of several tokens with one end (bytes of one character, zero-width tokens) the last is taken.

    Args:
        pivot_ends: (pivot tokens,) non-negative integers that never fall: characters covered so far.
        source_ends: (source tokens,) likewise.

    Returns:
        Strictly increasing pairs, at most one per position.

    Raises:
        ShapeError: not one-dimensional.
        InputError: negative or falling ends.

    Example:
        >>> pairs = span([0, 3, 5, 9], [0, 5, 7, 9])
        >>> pairs.pivot.tolist(), pairs.source.tolist()
        ([0, 2, 3], [0, 1, 3])
    """
    ends = [_ends(name, value) for name, value in (("pivot_ends", pivot_ends), ("source_ends", source_ends))]
    first, second = ends
    lengths = (len(first), len(second))
    if not len(first) or not len(second):
        empty = np.zeros(0, np.int64)
        return Pairs(empty, empty, lengths)
    table = np.full(max(int(first[-1]), int(second[-1])) + 1, -1, np.int64)
    table[second] = np.arange(len(second))  # of equal ends the last stays
    last = np.flatnonzero(np.append(first[1:] != first[:-1], True))
    partner = table[first[last]]
    kept = partner >= 0
    return Pairs(last[kept], partner[kept], lengths)


def _ends(name: str, value: ArrayLike) -> NDArray[np.int64]:
    ends = np.asarray(value)
    if ends.ndim != 1 or (ends.size and ends.dtype.kind not in "iu"):
        raise ShapeError(f"{name} is {ends.dtype} of shape {ends.shape}, wanted integers of shape (tokens,)")
    if len(ends) and (ends[0] < 0 or (ends[1:] < ends[:-1]).any()):
        raise InputError(f"{name} is negative or falls somewhere, wanted ends that never fall")
    return ends


def dtw(
    source_tokens: Sequence[str],
    pivot_tokens: Sequence[str],
    *,
    tie: Tie = "fusechat",
    source_mark: str = "",
    pivot_mark: str = "",
    compiled: bool | None = None,
) -> Pairs:
    """Pair token strings by dynamic time warping over Levenshtein distances, as published (section 2.3).

    Args:
        source_tokens: strings of the source's tokens, decoded one by one (FuseChat) or raw (FuseLLM).
        pivot_tokens: strings of the pivot's tokens.
        tie: order of equally cheap steps: ``"fusechat"`` or ``"fusellm"``.
        source_mark: for raw strings, the mark of a blank in them, such as ``"Ġ"``; it is removed before the
            comparison. Where nothing is left of a token, that pair is compared with the marks.
        pivot_mark: likewise for the pivot, such as ``"▁"``.
        compiled: as in :func:`fusechat.align.dynamic.warp`.

    Returns:
        The path's pairs; every position occurs at least once.

    Raises:
        InputError: a side without tokens.

    Example:
        >>> pairs = dtw(["hell", "o", "you"], ["hello", "you"])
        >>> pairs.pivot_to_source  # "o" is nearer to "you" than to "hello": spans know better
        [[0], [1, 2]]
    """
    for name, tokens in (("source_tokens", source_tokens), ("pivot_tokens", pivot_tokens)):
        if not len(tokens):
            raise InputError(f"{name} is empty, wanted at least one token")
    cost = token_costs(source_tokens, pivot_tokens, source_mark=source_mark, pivot_mark=pivot_mark)
    path, total = warp(cost, tie, compiled=compiled)
    return Pairs(path[:, 1], path[:, 0], (len(pivot_tokens), len(source_tokens)), total)


def token_costs(
    source_tokens: Sequence[str], pivot_tokens: Sequence[str], *, source_mark: str = "", pivot_mark: str = ""
) -> NDArray[Any]:
    """Levenshtein distances of all pairs; each distinct pair is computed once.

    Returns:
        (source tokens, pivot tokens) int32.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    def distances(rows: list[str], columns: list[str]) -> NDArray[Any]:
        return cdist(rows, columns, scorer=Levenshtein.distance, dtype=np.int32, workers=1)

    rows, row_of = _unique(source_tokens)
    columns, column_of = _unique(pivot_tokens)
    bare = [token.replace(source_mark, "") if source_mark else token for token in rows]
    bare_pivot = [token.replace(pivot_mark, "") if pivot_mark else token for token in columns]
    cost = distances(bare, bare_pivot)
    if source_mark or pivot_mark:
        empty = np.array([not token for token in bare])[:, None] | np.array([not t for t in bare_pivot])
        if empty.any():
            kept = [token.replace(source_mark, pivot_mark) if source_mark else token for token in rows]
            cost = np.where(empty, distances(kept, columns), cost)
    return cost[row_of][:, column_of]


def _unique(tokens: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    place: dict[str, int] = {}
    index = np.fromiter((place.setdefault(token, len(place)) for token in tokens), np.int64, len(tokens))
    return list(place), index

"""How often a token of the source lies on a token of the pivot, as sorted keys and counts."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusechat.align.pairs import Pairs
from fusion_core.errors import ConfigError, InputError

Ints = NDArray[np.int64]
_HELD = 1 << 22  # keys kept before they are merged


class PairCounts:
    """A sparse matrix of counts F[pivot id, source id].

    Args:
        pivot_size: number of pivot tokens.
        source_size: number of source tokens.

    Example:
        >>> counts = PairCounts(4, 4)
        >>> counts.add([1, 1, 2], [3, 3, 0])
        >>> counts.nonzero()[2].tolist()
        [2, 1]
    """

    def __init__(self, pivot_size: int, source_size: int) -> None:
        self.shape = (int(pivot_size), int(source_size))
        self._keys = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._waiting: list[Ints] = []
        self._held = 0

    def add(self, pivot_ids: ArrayLike, source_ids: ArrayLike) -> None:
        """Count pairs of ids, one of each per place.

        Raises:
            InputError: an id outside its vocabulary.
        """
        pivot, source = np.asarray(pivot_ids, np.int64), np.asarray(source_ids, np.int64)
        for name, ids, size in zip(("pivot", "source"), (pivot, source), self.shape, strict=True):
            if ids.size and (ids.min() < 0 or ids.max() >= size):
                raise InputError(f"{name}_ids hold {int(ids.max())}, wanted ids of 0 to {size - 1}")
        self._waiting.append(pivot * self.shape[1] + source)
        self._held += len(pivot)
        if self._held > _HELD:
            self._merge()

    def add_pairs(
        self, pairs: Pairs, pivot_ids: Any, source_ids: Any, count: Literal["all", "distinct"] = "all"
    ) -> None:
        """Count the aligned tokens of one text.

        Args:
            pairs: of positions.
            pivot_ids: (pivot tokens,) ids.
            source_ids: (source tokens,) ids.
            count: ``"distinct"`` counts a source id that occurs twice at one pivot position once, as
                published.
        """
        if count not in ("all", "distinct"):
            raise ConfigError(f"count is {count!r}, wanted 'all' or 'distinct'")
        place, ids = pairs.pivot, np.asarray(source_ids, np.int64)[pairs.source]
        if count == "distinct":
            kept = np.unique(place * self.shape[1] + ids)
            place, ids = kept // self.shape[1], kept % self.shape[1]
        self.add(np.asarray(pivot_ids, np.int64)[place], ids)

    def _merge(self) -> None:
        keys, counts = np.unique(np.concatenate([*self._waiting, self._keys[:0]]), return_counts=True)
        joined, place = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        total = np.zeros(len(joined), np.int64)
        np.add.at(total, place, np.concatenate([self._counts, counts]))
        self._keys, self._counts, self._waiting, self._held = joined, total, [], 0

    def nonzero(self) -> tuple[Ints, Ints, Ints]:
        """Pivot ids, source ids and counts, sorted by pivot and then source id."""
        self._merge()
        return self._keys // self.shape[1], self._keys % self.shape[1], self._counts

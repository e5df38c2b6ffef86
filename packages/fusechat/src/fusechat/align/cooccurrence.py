"""FuseLLM's tie-break of equally near tokens: the neighbours that tokens have in texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Cooccurrence:
    """Counts of common tokens near each token, of the source and of the pivot.

    Attributes:
        source: source id -> {common token: count}.
        pivot: pivot id -> {common token: count}; a common token carries its pivot id.
    """

    source: dict[int, dict[int, int]]
    pivot: dict[int, dict[int, int]]

    @classmethod
    def of(
        cls,
        source_sequences: Sequence[Sequence[int]],
        pivot_sequences: Sequence[Sequence[int]],
        exact: Ints,
        window: int = 5,
    ) -> Cooccurrence:
        """Count neighbours at most ``window`` tokens away.

        Args:
            source_sequences: ids of the texts.
            pivot_sequences: ids of the same texts.
            exact: (source tokens,) pivot id of the same string or -1: the common tokens.
            window: reach to either side.
        """
        common = {int(number) for number in exact if number >= 0}
        return cls(
            _count(source_sequences, {b: int(a) for b, a in enumerate(exact) if a >= 0}, window),
            _count(pivot_sequences, {number: number for number in common}, window),
        )

    def closest(self, source_id: int, candidates: Ints) -> int:
        """The candidate whose neighbours are most like the source token's; the first of equals."""
        own = self.source.get(source_id, {})
        scores = [_cosine(own, self.pivot.get(int(number), {})) for number in candidates]
        return int(candidates[int(np.argmax(scores))])


def _count(
    sequences: Sequence[Sequence[int]], common: dict[int, int], window: int
) -> dict[int, dict[int, int]]:
    table: dict[int, dict[int, int]] = {}
    for sequence in sequences:
        for place, token in enumerate(sequence):
            row = table.setdefault(int(token), {})
            near = [*sequence[max(place - window, 0) : place], *sequence[place + 1 : place + window + 1]]
            for other in near:
                key = common.get(int(other))
                if key is not None:
                    row[key] = row.get(key, 0) + 1
    return table


def _cosine(first: dict[int, int], second: dict[int, int]) -> float:
    dot = sum(count * second.get(key, 0) for key, count in first.items())
    norms = [sum(count * count for count in row.values()) ** 0.5 for row in (first, second)]
    return dot / ((norms[0] + _EPSILON) * (norms[1] + _EPSILON))

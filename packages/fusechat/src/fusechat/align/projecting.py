"""Top-k distributions of a source, said in the pivot's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusechat.align.mapping import NONE, VocabularyMap
from fusechat.align.pairs import Pairs
from fusion_core.errors import ConfigError, InputError, NonFiniteError, ShapeError
from fusion_core.results import Result

Collide = Literal["sum", "first"]
Usable = Literal["shared_end", "equal", "equal_or_mapped"]


@dataclass(frozen=True, slots=True)
class Projected(Result):
    """Entries per position in the pivot's vocabulary.

    Attributes:
        ids: (positions, k) int64 pivot ids, -1 where an entry was dropped. With ``collide="sum"`` an id may
            stand several times; its probabilities add up.
        logits: (positions, k) as the source gave them, -inf where dropped.
    """

    ids: NDArray[np.int64]
    logits: NDArray[Any]

    def probabilities(self, temperature: float = 1.0) -> NDArray[np.float64]:
        """(positions, k) softmax over the kept entries; rows without any are 0."""
        values = np.where(self.ids >= 0, self.logits.astype(np.float64) / temperature, -np.inf)
        top = values.max(1, initial=-np.inf, keepdims=True)
        powers = np.exp(values - np.where(np.isfinite(top), top, 0.0))
        return powers / np.maximum(powers.sum(1, keepdims=True), np.finfo(np.float64).tiny)

    def dense(self, size: int, temperature: float = 1.0) -> NDArray[np.float64]:
        """(positions, size) probabilities over the whole vocabulary."""
        full = np.zeros((len(self.ids), size))
        rows = np.broadcast_to(np.arange(len(self.ids))[:, None], self.ids.shape)
        kept = self.ids >= 0
        np.add.at(full, (rows[kept], self.ids[kept]), self.probabilities(temperature)[kept])
        return full


def project(
    logits: ArrayLike, indices: ArrayLike, mapping: VocabularyMap | ArrayLike, *, collide: Collide = "sum"
) -> Projected:
    """Rewrite the ids of top-k entries by a vocabulary map (section 2.5).

    Args:
        logits: (positions, k) in descending order; entries of -inf are dropped.
        indices: (positions, k) source ids.
        mapping: the map, or its table.
        collide: what happens to entries that meet in one pivot token: ``"sum"`` adds their probabilities,
            ``"first"`` keeps the largest logit, as published.

    Returns:
        Entries in the same order.

    Raises:
        ShapeError: shapes that differ or are not (positions, k).
        NonFiniteError: a logit is NaN or +inf; the row is named.
        InputError: a source id outside the map.
        ConfigError: unknown ``collide``.

    Example:
        >>> made = project([[2.0, 1.0, 0.0]], [[5, 3, 1]], [-1, 7, -1, 7, -1, 4])
        >>> made.ids.tolist(), made.dense(8).round(3)[0, [4, 7]].tolist()
        ([[4, 7, 7]], [0.665, 0.335])
    """
    if collide not in ("sum", "first"):
        raise ConfigError(f"collide is {collide!r}, wanted 'sum' or 'first'")
    values, places = np.asarray(logits), np.asarray(indices)
    if values.ndim != 2 or values.shape != places.shape:
        raise ShapeError(f"logits have shape {values.shape}, indices {places.shape}, wanted (positions, k)")
    bad = np.isnan(values) | (values == np.inf)
    if bad.any():
        raise NonFiniteError(
            f"logits hold NaN or +inf in row {int(bad.any(1).argmax())}, wanted numbers or -inf"
        )
    table = mapping.table if isinstance(mapping, VocabularyMap) else np.asarray(mapping, np.int64)
    if places.size and (int(places.max()) >= len(table) or int(places.min()) < 0):
        raise InputError(
            f"indices hold {int(places.max())}, but the vocabulary map has {len(table)} source tokens; "
            "give size= to vocabulary_map where the model is wider than its tokenizer"
        )
    ids = table[places] if places.size else places.astype(np.int64)
    ids = np.where(np.isneginf(values), NONE, ids)
    if collide == "first":
        for column in range(1, ids.shape[1]):
            again = (ids[:, :column] == ids[:, column : column + 1]).any(1)
            ids[again, column] = NONE
    return Projected(ids, np.where(ids == NONE, -np.inf, values))


@dataclass(frozen=True, slots=True)
class Published:
    """Which of the published rules of section 2.5 to follow.

    Attributes:
        usable: when a pair may be used: ``"shared_end"`` (one string ends with the other), ``"equal"``, or
            ``"equal_or_mapped"`` (also where the map of the source token is the pivot token).
        several: a pivot position with several partners may be used: the first with a shared end.
        onehot: where the fallback puts its single entry: at the ``"next"`` token or the ``"current"`` one.
    """

    usable: Usable = "shared_end"
    several: bool = True
    onehot: Literal["next", "current"] = "next"


def published_rows(
    pairs: Pairs,
    pivot_strings: Sequence[str],
    source_strings: Sequence[str],
    source_map: ArrayLike,
    source_ids: ArrayLike,
    pivot_ids: ArrayLike,
    rules: Published,
) -> NDArray[np.int64]:
    """The source position that each pivot position takes by the published rules, -1 for the fallback.

    Args:
        pairs: of positions.
        pivot_strings: (pivot tokens,) decoded, or raw.
        source_strings: (source tokens,) decoded, or raw with the mark rewritten as the pivot's.
        source_map: (source vocabulary,) map for ``"equal_or_mapped"``.
        source_ids: (source tokens,).
        pivot_ids: (pivot tokens,).
        rules: which.
    """
    table, own, ids = np.asarray(source_map), np.asarray(source_ids), np.asarray(pivot_ids)

    def shared(u: str, v: str) -> bool:
        return u.endswith(v) or v.endswith(u)

    rows = np.full(len(pivot_strings), NONE, np.int64)
    for place, partners in enumerate(pairs.pivot_to_source):
        v = pivot_strings[place]
        if len(partners) == 1:
            j = partners[0]
            u = source_strings[j]
            fits = shared(u, v) if rules.usable == "shared_end" else u == v
            if rules.usable == "equal_or_mapped":
                fits = fits or int(table[own[j]]) == int(ids[place])
            rows[place] = j if fits else NONE
        elif rules.several:
            rows[place] = next((j for j in partners if shared(source_strings[j], v)), NONE)
    return rows


def published_onehot(pivot_ids: ArrayLike, onehot: Literal["next", "current"]) -> NDArray[np.int64]:
    """The token of the fallback at each position; the last position's next token is its own."""
    ids = np.asarray(pivot_ids, np.int64)
    return ids if onehot == "current" else np.append(ids[1:], ids[-1:])

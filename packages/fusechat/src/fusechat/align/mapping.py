"""Maps from the source's vocabulary to the pivot's: exact, nearest string, statistics, longest prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusechat.align.cooccurrence import Cooccurrence
from fusechat.align.counting import PairCounts
from fusechat.align.pairs import dtw, span
from fusechat.align.vocabulary import Vocabulary, decode_each
from fusion_core.errors import ConfigError, InputError, ShapeError
from fusion_core.results import Result

Ints = NDArray[np.int64]
Method = Literal["ms", "ms-official", "em", "mined", "prefix"]
METHODS = ("ms", "ms-official", "em", "mined", "prefix")
_BLOCK = 512
NONE = -1


@dataclass(frozen=True, slots=True)
class VocabularyMap(Result):
    """Source id -> pivot id.

    Attributes:
        table: (source tokens,) int64 pivot ids, -1 where a source token has none.
        method: how it was made.
        pivot_size: number of pivot tokens.
    """

    table: Ints
    method: str
    pivot_size: int

    def __post_init__(self) -> None:
        table = self.table
        if table.ndim != 1 or (table.size and (table.min() < NONE or table.max() >= self.pivot_size)):
            raise ShapeError(
                f"table has shape {table.shape}, wanted (source tokens,) of pivot ids below {self.pivot_size}"
            )

    def __len__(self) -> int:
        return len(self.table)

    @property
    def coverage(self) -> float:
        """Share of the source tokens that have a pivot token."""
        return float((self.table >= 0).mean()) if len(self.table) else 0.0


def exact_table(source: Vocabulary, pivot: Vocabulary) -> Ints:
    """EM: the pivot token of the same string, the mark rewritten; else -1."""
    place: dict[str, int] = {}
    for number, token in enumerate(pivot.tokens):
        place.setdefault(token, number)
    return np.array([place.get(token, NONE) for token in source.written(pivot.mark)], np.int64)


def nearest_table(
    source: Vocabulary, pivot: Vocabulary, cooccurrence: Cooccurrence | None = None, *, num_workers: int = 1
) -> Ints:
    """MinED: the exact token, else the one of least Levenshtein distance, the first of equals.

    Args:
        source: whose ids are mapped.
        pivot: where to.
        cooccurrence: takes, of equally near tokens, the one with the most similar neighbours.
        num_workers: threads.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    table = exact_table(source, pivot)
    open_ids = np.flatnonzero(table == NONE)
    words = source.written(pivot.mark)
    for start in range(0, len(open_ids), _BLOCK):
        block = open_ids[start : start + _BLOCK]
        distance = cdist(
            [words[number] for number in block],
            pivot.tokens,
            scorer=Levenshtein.distance,
            dtype=np.int32,
            workers=num_workers,
        )
        table[block] = distance.argmin(1)
        if cooccurrence is not None:
            least = distance == distance.min(1, keepdims=True)
            for row in np.flatnonzero(least.sum(1) > 1):
                table[block[row]] = cooccurrence.closest(int(block[row]), np.flatnonzero(least[row]))
    return table


def prefix_table(source: Vocabulary, pivot: Vocabulary) -> Ints:
    """The exact token, else the longest pivot token that begins the source token; else -1."""
    table = exact_table(source, pivot)
    place = {token: number for number, token in reversed(list(enumerate(pivot.tokens))) if token}
    words = source.written(pivot.mark)
    for number in np.flatnonzero(table == NONE):
        word = words[number]
        cuts = (word[:length] for length in range(len(word) - 1, 0, -1))
        table[number] = next((place[cut] for cut in cuts if cut in place), NONE)
    return table


def statistics_table(
    counts: PairCounts, source: Vocabulary, pivot: Vocabulary, choice: Literal["frequency", "official"]
) -> Ints:
    """MS: of the pivot tokens that a source token was aligned with, one.

    Args:
        counts: of aligned pairs.
        source: whose ids are mapped.
        pivot: where to.
        choice: ``"frequency"`` takes the most frequent (then the smaller Levenshtein distance of the strings
            without marks, then the smaller id); ``"official"`` the least sigmoid(count) * w * distance with
            w = 0.1 where one string holds the other (then the smaller id).

    Returns:
        The table; tokens never seen go to the pivot's unknown token (the closing one where it has none), the
        opening and closing tokens to their own.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cpdist

    pivot_ids, source_ids, seen = counts.nonzero()
    fallback = pivot.unk if pivot.unk is not None else pivot.eos
    table = np.full(len(source), NONE if fallback is None else fallback, np.int64)
    if len(seen):
        ours, theirs = source.bare(), pivot.bare()
        left, right = [ours[b] for b in source_ids], [theirs[a] for a in pivot_ids]
        distance = cpdist(left, right, scorer=Levenshtein.distance, dtype=np.int32, workers=1)
        if choice == "frequency":
            order = np.lexsort((pivot_ids, distance, -seen, source_ids))
        else:
            held = [0.1 if u in v or v in u else 1.0 for u, v in zip(left, right, strict=True)]
            score = 1.0 / (1.0 + np.exp(-seen.astype(np.float64))) * np.array(held) * distance
            order = np.lexsort((pivot_ids, score, source_ids))
        first = np.append(True, np.diff(source_ids[order]) != 0)
        table[source_ids[order][first]] = pivot_ids[order][first]
    for own, other in ((source.bos, pivot.bos), (source.eos, pivot.eos)):
        if own is not None and other is not None:
            table[own] = other
    return table


def vocabulary_map(
    source_tokenizer: Any,
    pivot_tokenizer: Any,
    method: Method = "ms",
    *,
    texts: Iterable[str] | None = None,
    counts: PairCounts | None = None,
    align: Literal["span", "dtw"] = "span",
    count: Literal["all", "distinct"] = "all",
    tie: Literal["fusechat", "fusellm"] = "fusechat",
    cooccurrence: bool = False,
    size: tuple[int, int] | None = None,
) -> VocabularyMap:
    """Map every token of the source to a token of the pivot (section 2.4).

    Args:
        source_tokenizer: a tokenizer of transformers (or a :class:`Vocabulary` where no texts are needed).
        pivot_tokenizer: likewise.
        method: ``"ms"`` (the exact string, else the most frequent aligned token), ``"ms-official"`` (the
            published choice instead of the most frequent), ``"em"`` (exact strings only), ``"mined"`` (least
            edit distance), ``"prefix"`` (longest pivot token that begins the source token).
        texts: for the statistics of ``"ms"``, ``"ms-official"`` and ``cooccurrence``.
        counts: statistics counted before, instead of texts.
        align: how the texts are aligned for the statistics.
        count: ``"distinct"`` as published, see :meth:`PairCounts.add_pairs`.
        tie: of ``align="dtw"``.
        cooccurrence: for ``"mined"``, resolve ties by neighbouring tokens.
        size: of the pivot's and source's vocabularies, where the models' are wider than the tokenizers'.

    Returns:
        The map. ``"ms"`` and ``"ms-official"`` try the exact string first, as FuseChat does.

    Raises:
        ConfigError: unknown method, or neither texts nor counts for one that needs them.

    Example:
        >>> source = Vocabulary(["a", "\u0120the", "ing"], "\u0120")
        >>> pivot = Vocabulary(["\u2581the", "i", "a"], "\u2581")
        >>> vocabulary_map(source, pivot, "prefix").table.tolist()
        [2, 0, 1]
    """
    if method not in METHODS:
        raise ConfigError(f"vocab method is {method!r}, wanted one of {list(METHODS)}")
    source, pivot = Vocabulary.of(source_tokenizer), Vocabulary.of(pivot_tokenizer)
    statistical = method in ("ms", "ms-official")
    if ((statistical and counts is None) or cooccurrence) and texts is None:
        raise ConfigError(f"vocab method {method!r} needs texts to align, got none; give texts= or counts=")
    kept: Sequence[str] = list(texts) if texts is not None else []
    neighbours = None
    if method == "mined" and cooccurrence:
        encoded = [
            [t(text, add_special_tokens=False)["input_ids"] for text in kept]
            for t in (source_tokenizer, pivot_tokenizer)
        ]
        neighbours = Cooccurrence.of(encoded[0], encoded[1], exact_table(source, pivot))
    if statistical:
        table = exact_table(source, pivot)
        found = counts if counts is not None else count_texts(
            source_tokenizer, pivot_tokenizer, kept, align=align, count=count, tie=tie
        )  # fmt: skip
        choice = "frequency" if method == "ms" else "official"
        table = np.where(table == NONE, statistics_table(found, source, pivot, choice), table)
    elif method == "mined":
        table = nearest_table(source, pivot, neighbours)
    else:
        table = exact_table(source, pivot) if method == "em" else prefix_table(source, pivot)
    pivot_size = len(pivot)
    if size is not None:
        pivot_size = max(size[0], pivot_size)
        table = np.append(table, np.full(max(size[1] - len(table), 0), NONE, np.int64))
    return VocabularyMap(table, method, pivot_size)


def count_texts(
    source_tokenizer: Any,
    pivot_tokenizer: Any,
    texts: Iterable[str],
    *,
    align: Literal["span", "dtw"] = "span",
    count: Literal["all", "distinct"] = "all",
    tie: Literal["fusechat", "fusellm"] = "fusechat",
) -> PairCounts:
    """Align texts and count which tokens meet.

    Raises:
        ConfigError: unknown ``align``.
        InputError: no text.
    """
    from fusechat.spans import encode
    from fusechat.texts import Text

    if align not in ("span", "dtw"):
        raise ConfigError(f"align is {align!r}, wanted 'span' or 'dtw'")
    counts = PairCounts(len(Vocabulary.of(pivot_tokenizer)), len(Vocabulary.of(source_tokenizer)))
    seen = False
    for text in texts:
        seen = True
        if align == "span":
            plain = Text(text, (), whole=True)
            source, pivot = encode(source_tokenizer, plain), encode(pivot_tokenizer, plain)
            counts.add_pairs(span(pivot.ends, source.ends), pivot.ids, source.ids, count)
            continue
        ids = [np.asarray(t(text)["input_ids"]) for t in (source_tokenizer, pivot_tokenizer)]
        if len(ids[0]) and len(ids[1]):
            strings = [
                decode_each(t, i) for t, i in zip((source_tokenizer, pivot_tokenizer), ids, strict=True)
            ]
            counts.add_pairs(dtw(strings[0], strings[1], tie=tie), ids[1], ids[0], count)
    if not seen:
        raise InputError("texts is empty, wanted at least one text to align")
    return counts

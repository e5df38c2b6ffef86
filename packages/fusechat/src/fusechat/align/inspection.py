"""What an alignment covers, before any training: shares, kept mass, and one text cut by both tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from markupsafe import Markup, escape

from fusechat.align.mapping import VocabularyMap, vocabulary_map
from fusechat.align.pairs import dtw, span
from fusechat.align.projecting import project
from fusechat.align.vocabulary import Vocabulary, decode_each
from fusechat.spans import Encoded, encode
from fusechat.store import TopKStore
from fusion_core.errors import ConfigError, DataError
from fusion_core.report import Page, Report

_COLORS = ("#7aa6c255", "#c2a67a55")
_WRONG = "#d0404088"
_NOTHING = Markup("")


@dataclass(frozen=True, kw_only=True)
class AlignmentReport(Report):
    """How two tokenizers meet on the texts of a store.

    Args:
        strip: both segmentations of one text as HTML.
        worst: pivot tokens that most often have no partner, with counts.
    """

    strip: Markup = _NOTHING
    worst: tuple[tuple[str, int, int], ...] = ()

    def page(self) -> Page:
        """The report as a page."""
        page = super().page().heading("Tokens that most often have no partner")
        page.table([{"token": token, "without partner": n, "seen": seen} for token, n, seen in self.worst])
        return page.heading("One text, cut by both").raw(self.strip)


def inspect(
    store: TopKStore | str,
    pivot_tokenizer: Any,
    *,
    source_tokenizer: Any = None,
    method: Literal["span", "dtw"] = "span",
    vocab: str | VocabularyMap = "ms",
    tie: Literal["fusechat", "fusellm"] = "fusechat",
    limit: int | None = 200,
    shown: int = 0,
) -> AlignmentReport:
    """Report how much of a store reaches the pivot.

    Args:
        store: of a source, or its folder.
        pivot_tokenizer: a fast tokenizer.
        source_tokenizer: the store's; None loads it by the model's name in the store.
        method: ``"span"`` or ``"dtw"``.
        vocab: method of the vocabulary map, or a map that is made already.
        tie: of ``"dtw"``.
        limit: use the first rows only.
        shown: row whose text is drawn.

    Returns:
        Shares in [0, 1]: of the pivot's positions with a partner, of the pairs whose texts end at the same
        character, of the source's probability that is among the stored entries and has a pivot token.

    Raises:
        ConfigError: unknown ``method``.
        DataError: the rows hold no tokens.
    """
    if method not in ("span", "dtw"):
        raise ConfigError(f"method is {method!r}, wanted 'span' or 'dtw'")
    store = store if isinstance(store, TopKStore) else TopKStore(store)
    if source_tokenizer is None and (method == "dtw" or isinstance(vocab, str)):
        source_tokenizer = store.tokenizer()
    rows = range(len(store) if limit is None else min(limit, len(store)))
    table = _map(store, pivot_tokenizer, source_tokenizer, vocab, rows)
    vocabulary = Vocabulary.of(pivot_tokenizer)
    seen, alone = np.zeros(len(vocabulary), np.int64), np.zeros(len(vocabulary), np.int64)
    positions = paired = exact = supervised = covered = used = 0
    mass: list[Any] = []
    strip = Markup("")
    for row in rows:
        stored = store[row]
        if not len(stored.encoded):
            continue
        used += 1
        one = encode(pivot_tokenizer, stored.text)
        pairs = span(one.ends, stored.encoded.ends)
        if method == "dtw":
            theirs, ours = (
                decode_each(t, e.ids) for t, e in ((source_tokenizer, stored.encoded), (pivot_tokenizer, one))
            )
            pairs = dtw(theirs, ours, tie=tie)
        has = np.zeros(len(one), np.bool_)
        has[pairs.pivot] = True
        positions, paired = positions + len(one), paired + int(has.sum())
        exact += int((one.ends[pairs.pivot] == stored.encoded.ends[pairs.source]).sum())
        learned = np.append(one.supervised[1:], False)
        supervised, covered = supervised + int(learned.sum()), covered + int((learned & has).sum())
        np.add.at(seen, one.ids, 1)
        np.add.at(alone, one.ids[~has], 1)
        at = pairs.source
        made = project(stored.logits[at], stored.indices[at], table)
        mass.append(np.exp(made.logits.astype(np.float64) - stored.lse[at, None]).sum(1))
        links = len(pairs)
        if row == shown or not strip:
            strip = _strip(stored.text.text, one, stored.encoded, pairs.pivot, pairs.source)
        mass[-1] = mass[-1][:links]
    if not used:
        raise DataError(f"none of the first {len(rows)} rows of {store.folder} holds tokens")
    order = np.argsort(-alone, kind="stable")[:10]
    worst = tuple((str(vocabulary.tokens[n]), int(alone[n]), int(seen[n])) for n in order if alone[n])
    pair_count = sum(len(part) for part in mass)
    line = {
        "dialogues": used,
        "skipped": len(rows) - used,
        "positions": positions,
        "coverage": paired / max(positions, 1),
        "supervised_coverage": covered / max(supervised, 1),
        "same_end": exact / max(pair_count, 1),
        "kept_mass": float(np.minimum(np.concatenate(mass), 1.0).mean()) if pair_count else 0.0,
        "mapped_tokens": table.coverage,
        "bytes_per_token": store.nbytes
        / max(1, sum(len(store[row].encoded) for row in rows) * len(store) // len(rows)),
    }
    return AlignmentReport(title="Alignment", rows=[line], strip=strip, worst=worst)


def _map(store: TopKStore, pivot: Any, source: Any, vocab: str | VocabularyMap, rows: range) -> VocabularyMap:
    if isinstance(vocab, VocabularyMap):
        return vocab
    method: Any = vocab
    texts = [store.text(row).text for row in rows] if "ms" in vocab else None
    return vocabulary_map(source, pivot, method, texts=texts, size=(0, store.vocab_size))


def _strip(text: str, pivot: Encoded, source: Encoded, places: Any, partners: Any, most: int = 400) -> Markup:
    """Two lines of colored tokens; aligned ends are joined by a bar, pairs with unlike ends are red."""
    good = {
        int(pivot.ends[p]) for p, s in zip(places, partners, strict=True) if pivot.ends[p] == source.ends[s]
    }
    bad = {
        int(pivot.ends[p]) for p, s in zip(places, partners, strict=True) if pivot.ends[p] != source.ends[s]
    }
    lines: list[Markup] = []
    for name, side in (("pivot", pivot), ("source", source)):
        cells: list[Markup] = []
        start = 0
        for number, end in enumerate(side.ends):
            stop = min(int(end), len(text), most)
            if stop <= start:
                continue
            wrong = name == "pivot" and int(end) in bad
            color = _WRONG if wrong else _COLORS[number % 2]
            edge = "2px solid currentColor" if int(end) in good else "none"
            style = f"background:{color};border-right:{edge};white-space:pre-wrap"
            cells.append(Markup('<span style="{}">{}</span>').format(style, text[start:stop]))
            start = stop
        lines.append(Markup("<p><b>{}</b><br><code>{}</code></p>").format(name, Markup("").join(cells)))
    return Markup("").join(lines) + Markup("<p>{}</p>").format(
        escape("A bar marks an end that both share; red marks a pair whose ends differ.")
    )

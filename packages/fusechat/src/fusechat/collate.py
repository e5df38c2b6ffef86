"""Batches for training: the pivot's tokens, and each source's distributions aligned on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from fusechat.align.mapping import VocabularyMap, vocabulary_map
from fusechat.align.pairs import dtw, span
from fusechat.align.projecting import Collide, Published, project, published_rows
from fusechat.align.vocabulary import Vocabulary, decode_each
from fusechat.spans import Encoded, check_tokenizer, encode
from fusechat.store import StoredRow, TopKStore, check_same_texts
from fusechat.targets import FusionBatch, Targets
from fusechat.texts import Dialogue, Text, render
from fusion_core.errors import ConfigError, DataError, InputError

Unaligned = Literal["skip", "onehot", "pivot"]
_CHOICES = {
    "align": ("span", "dtw"),
    "unaligned": ("skip", "onehot", "pivot"),
    "onehot_at": ("next", "current"),
    "tie": ("fusechat", "fusellm"),
    "collide": ("sum", "first"),
}


class FusionCollator:
    """Make a :class:`FusionBatch` of dialogues and the stores that hold them.

    The stores know nothing of the pivot: alignment and vocabulary map are made here, so that another pivot
    needs no new collection.

    Args:
        pivot_tokenizer: a fast tokenizer.
        sources: stores, or their folders, of the same texts.
        tokenizers: the sources' own, one per source; ``vocab`` maps and ``align="dtw"`` need them. None loads
            each by the model's name in its store.
        pivot: the pivot's own store, for the choice between pivot and source.
        mask: ``"assistant"`` labels the assistant's tokens, ``"all"`` every token of the text.
        vocab: how vocabularies are mapped, as in :func:`fusechat.align.vocabulary_map`; maps that are made
            already; or ``"none"`` to leave the sources' ids as they are (for the loss ``"uld"``).
        align: ``"span"`` or, as published, ``"dtw"``.
        tie: of ``"dtw"``.
        unaligned: positions without a partner are left out (``"skip"``), take the labels (``"onehot"``) or
            the pivot's own distribution (``"pivot"``).
        onehot_at: the token of ``"onehot"``: the ``"next"`` one, or FuseLLM's ``"current"``.
        collide: entries that meet in one pivot token, see :func:`fusechat.align.project`.
        max_length: most tokens of a dialogue.
        map_texts: texts of the stores that the statistics of ``vocab="ms"`` are counted on, at most.
        pivot_size: width of the pivot's logits, where it is wider than the tokenizer.

    Raises:
        ConfigError: a word outside of these, or ``unaligned="pivot"`` without ``pivot``.
        InputError: no source.
        AlignmentError: stores of different texts.
        UnsupportedTokenizer: a slow tokenizer.
    """

    def __init__(
        self,
        pivot_tokenizer: Any,
        sources: Sequence[TopKStore | str | Any],
        *,
        tokenizers: Sequence[Any] | None = None,
        pivot: TopKStore | str | None = None,
        mask: Literal["assistant", "all"] = "assistant",
        vocab: str | Sequence[VocabularyMap] = "ms",
        align: Literal["span", "dtw"] = "span",
        tie: Literal["fusechat", "fusellm"] = "fusechat",
        unaligned: Unaligned = "skip",
        onehot_at: Literal["next", "current"] = "next",
        collide: Collide = "sum",
        max_length: int = 2048,
        map_texts: int = 2000,
        pivot_size: int | None = None,
    ) -> None:
        check_tokenizer(pivot_tokenizer)
        given = {
            "align": align,
            "unaligned": unaligned,
            "onehot_at": onehot_at,
            "tie": tie,
            "collide": collide,
        }
        for name, value in given.items():
            if value not in _CHOICES[name]:
                raise ConfigError(f"{name} is {value!r}, wanted one of {list(_CHOICES[name])}")
        if mask not in ("assistant", "all"):
            raise ConfigError(f"mask is {mask!r}, wanted 'assistant' or 'all'")
        if unaligned == "pivot" and pivot is None:
            raise ConfigError('unaligned is "pivot", but no pivot store is given; wanted pivot=')
        if not len(sources):
            raise InputError("sources is empty, wanted at least one store")
        self.tokenizer, self.mask = pivot_tokenizer, mask
        self.align: Literal["span", "dtw"] = align
        self.tie: Literal["fusechat", "fusellm"] = tie
        self.onehot_at: Literal["next", "current"] = onehot_at
        self.collide: Collide = collide
        self.unaligned, self.max_length = unaligned, max_length
        self.sources = [source if isinstance(source, TopKStore) else TopKStore(source) for source in sources]
        self.pivot = TopKStore(pivot) if pivot is not None and not isinstance(pivot, TopKStore) else pivot
        stores = [*self.sources, *([self.pivot] if self.pivot is not None else [])]
        for store in stores[1:]:
            check_same_texts(stores[0], store)
        if tokenizers is None and (align == "dtw" or (isinstance(vocab, str) and vocab != "none")):
            tokenizers = [store.tokenizer() for store in self.sources]
        if tokenizers is not None and len(tokenizers) != len(self.sources):
            raise InputError(
                f"tokenizers are {len(tokenizers)}, wanted one for each of {len(self.sources)} sources"
            )
        self.tokenizers = list(tokenizers or [])
        self.maps = self._maps(vocab, map_texts, pivot_size)

    def _maps(self, vocab: Any, most: int, pivot_size: int | None) -> list[VocabularyMap]:
        width = pivot_size or len(Vocabulary.of(self.tokenizer))
        if not isinstance(vocab, str):
            if len(vocab) != len(self.sources):
                raise InputError(
                    f"vocab holds {len(vocab)} maps, wanted one for each of {len(self.sources)} sources"
                )
            return list(vocab)
        if vocab == "none":
            sizes = [store.vocab_size for store in self.sources]
            return [VocabularyMap(np.arange(size), "none", size) for size in sizes]
        maps: list[VocabularyMap] = []
        for store, tokenizer in zip(self.sources, self.tokenizers, strict=True):
            texts = [store.text(row).text for row in range(min(len(store), most))] if "ms" in vocab else None
            method: Any = vocab
            maps.append(
                vocabulary_map(
                    tokenizer,
                    self.tokenizer,
                    method,
                    texts=texts,
                    align=self.align,
                    tie=self.tie,
                    size=(width, store.vocab_size),
                )
            )
        return maps

    def __call__(self, dialogues: Sequence[Dialogue]) -> FusionBatch:
        """Render, tokenize and align a batch.

        Raises:
            AlignmentError: a dialogue that a store does not hold.
            DataError: no dialogue of the batch has anything to learn.
        """
        found = [(n, self.text(dialogue)) for n, dialogue in enumerate(dialogues)]
        encoded = [(n, text, encode(self.tokenizer, text, max_length=self.max_length)) for n, text in found]
        kept = [entry for entry in encoded if entry[2].supervised[1:].any()]
        if not kept:
            raise DataError(
                f"none of the batch's {len(dialogues)} dialogues has an assistant's token "
                f"within {self.max_length}"
            )
        width = max(len(e) for _, _, e in kept)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        ids = torch.full((len(kept), width), 0 if pad is None else int(pad))
        seen, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        rows: list[int] = []
        for place, (number, text, one) in enumerate(kept):
            own = torch.from_numpy(one.ids.astype(np.int64))
            ids[place, : len(one)], seen[place, : len(one)] = own, 1
            labels[place, : len(one)] = torch.where(torch.from_numpy(one.supervised), own, -100)
            rows.append(self.sources[0].find(text, number))
        sides = [(one, row) for (_, _, one), row in zip(kept, rows, strict=True)]
        sources = tuple(self._targets(n, sides, width) for n in range(len(self.sources)))
        pivot = self._own(sides, width)
        return FusionBatch(
            {"input_ids": ids, "attention_mask": seen}, labels, sources, pivot, torch.tensor(rows)
        )

    def text(self, dialogue: Dialogue) -> Text:
        """The rendered dialogue as the pivot sees it."""
        text = render(dialogue, self.tokenizer)
        return Text(text.text, ((0, len(text.text)),), whole=True) if self.mask == "all" else text

    def learnable(self, dialogue: Dialogue) -> bool:
        """Whether a dialogue has a token to learn within ``max_length``."""
        return bool(
            encode(self.tokenizer, self.text(dialogue), max_length=self.max_length).supervised[1:].any()
        )

    def _own(self, sides: list[tuple[Encoded, int]], width: int) -> Targets | None:
        """The pivot's own distributions; its tokens are the same, so position answers to position."""
        if self.pivot is None:
            return None
        parts: list[tuple[Any, ...]] = []
        for one, row in sides:
            stored = self.pivot[row]
            pairs = span(one.ends, stored.encoded.ends)
            same = project(
                stored.logits[pairs.source], stored.indices[pairs.source], np.arange(self.pivot.vocab_size)
            )
            parts.append(
                (
                    pairs.pivot,
                    same.ids,
                    same.logits,
                    stored.lse[pairs.source],
                    stored.token_ce[pairs.source],
                    stored.ce,
                )
            )
        return _padded(parts, len(sides), width, self.pivot.k)

    def _targets(self, number: int, sides: list[tuple[Encoded, int]], width: int) -> Targets:
        store = self.sources[number]
        parts: list[tuple[Any, ...]] = []
        for one, row in sides:
            stored = store[row]
            place, partner = self._aligned(number, one, stored)
            made = project(
                stored.logits[partner], stored.indices[partner], self.maps[number], collide=self.collide
            )
            part = (place, made.ids, made.logits, stored.lse[partner], stored.token_ce[partner], stored.ce)
            parts.append(part if self.unaligned == "skip" else self._fallback(part, one, store.k))
        return _padded(parts, len(sides), width, store.k)

    def _aligned(self, number: int, one: Encoded, stored: StoredRow) -> tuple[Any, Any]:
        """Positions of the pivot that have a partner, and the partners."""
        if self.align == "span" or not len(stored.encoded):
            pairs = span(one.ends, stored.encoded.ends)
            return pairs.pivot, pairs.source
        theirs = decode_each(self.tokenizers[number], stored.encoded.ids)
        ours = decode_each(self.tokenizer, one.ids)
        pairs = dtw(theirs, ours, tie=self.tie)
        table = self.maps[number].table
        usable = "equal" if self.maps[number].method == "em" else "shared_end"
        rules = Published(usable, self.maps[number].method.startswith("ms"), self.onehot_at)
        rows = published_rows(pairs, ours, theirs, table, stored.encoded.ids, one.ids, rules)
        place = np.flatnonzero(rows >= 0)
        return place, rows[place]

    def _fallback(self, part: tuple[Any, ...], one: Encoded, k: int) -> tuple[Any, ...]:
        place, ids, logits, lse, ce, mean = part
        rest = np.setdiff1d(np.arange(len(one)), place)
        more = np.full((len(rest), k), -1, np.int64)
        values = np.full((len(rest), k), -np.inf, logits.dtype)
        if self.unaligned == "onehot":
            shifted = np.append(one.ids[1:], one.ids[-1:]) if self.onehot_at == "next" else one.ids
            more[:, 0], values[:, 0] = shifted[rest], 1.0
        one_lse = np.ones(len(rest), lse.dtype)  # the single entry has all the mass
        unknown = np.full(len(rest), np.nan, ce.dtype)
        return (
            np.concatenate([place, rest]),
            np.concatenate([ids, more]),
            np.concatenate([logits, values]),
            np.concatenate([lse, one_lse]),
            np.concatenate([ce, unknown]),
            mean,
        )


def _padded(parts: list[tuple[Any, ...]], batch: int, width: int, k: int) -> Targets:
    ids = torch.full((batch, width, k), -1)
    logits = torch.full((batch, width, k), -torch.inf)
    mask = torch.zeros(batch, width, dtype=torch.bool)
    lse, ce = torch.zeros(batch, width), torch.full((batch, width), torch.nan)
    for row, (place, own, values, sums, losses, _) in enumerate(parts):
        at = torch.from_numpy(np.asarray(place, np.int64))
        ids[row, at] = torch.from_numpy(own.astype(np.int64))
        logits[row, at] = torch.from_numpy(values.astype(np.float32))
        lse[row, at], ce[row, at] = torch.from_numpy(sums), torch.from_numpy(losses)
        mask[row, at] = True
    return Targets(ids, logits, mask, torch.tensor([part[-1] for part in parts]), lse, ce)

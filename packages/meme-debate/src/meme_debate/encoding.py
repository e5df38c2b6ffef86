"""From memes to tensors: lower-cased, tokenized, truncated texts, and normalized pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusion_core.errors import CheckpointError, InputError
from fusion_core.images import read_image

from .composing import compose_parts
from .meme import MAX_PIXELS
from .pixels import normalized_square
from .truncate import keep

__all__ = ["Encoded", "collate", "encode_fields", "locate", "pixels_of", "stack_pixels"]


Parts = Sequence[tuple[str, str]]


class Encoded:
    """One text as tokens.

    Args:
        ids: the tokens that are kept.
        fields: for each token the number of its field among the parts, -1 for special ones.
        spans: (L, 2) character offsets of each token within its field's value, as it was before lower-casing.
        cut: tokens that were dropped.
    """

    __slots__ = ("cut", "fields", "ids", "spans")

    def __init__(self, ids: list[int], fields: NDArray[np.int64], spans: NDArray[np.int64], cut: int) -> None:
        self.ids, self.fields, self.spans, self.cut = ids, fields, spans, cut

    def __len__(self) -> int:
        return len(self.ids)


def _lower(text: str) -> str:
    """Lower case of the same length, so that offsets stay."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)


def encode_fields(tokenizer: Any, parts: Sequence[Parts], *, max_length: int, truncate: str) -> list[Encoded]:
    """Tokenize composed texts, lower-cased, and keep at most ``max_length`` tokens of each.

    The text is tokenized once and whole; each token belongs to the field in which it begins, a newline to the
    field after it. What is dropped is dropped at a field's end.

    Args:
        tokenizer: a fast tokenizer of transformers.
        parts: the tagged fields of each text; see :func:`meme_debate.ablations.fields_of`.
        max_length: most tokens, special ones included.
        truncate: ``"balanced"`` or ``"tail"``.

    Raises:
        CheckpointError: no tokenizer, or one that does not tell where its tokens are.
    """
    if tokenizer is None:
        raise CheckpointError("the judge has no tokenizer; set judge.tokenizer, such as that of its T5")
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(f"the tokenizer is {type(tokenizer).__name__}, wanted a fast one with offsets")
    texts = [_lower(compose_parts(each)) for each in parts]
    if not texts:
        return []
    made = tokenizer(
        texts,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        split_special_tokens=True,  # "</s>" in a meme is five characters, not the end
    )
    return [
        _fit(each, ids, np.asarray(offsets), np.asarray(special, bool), max_length, truncate)
        for each, ids, offsets, special in zip(
            parts,
            made["input_ids"],
            made["offset_mapping"],
            made["special_tokens_mask"],
            strict=True,
        )
    ]


def _fit(
    parts: Parts,
    ids: list[int],
    offsets: NDArray[np.int64],
    special: NDArray[np.bool_],
    max_length: int,
    truncate: str,
) -> Encoded:
    fields, spans = locate(parts, offsets.reshape(-1, 2))
    fields = np.where(special, -1, fields)
    places = {"Text": 0, "Caption": 1}
    columns = [
        places.get(tag, 2 + sum(t not in places for t, _ in parts[:i])) for i, (tag, _) in enumerate(parts)
    ]
    lengths = np.zeros((1, 4), np.int64)
    for number, column in enumerate(columns):
        lengths[0, column] = int((fields == number).sum())
    kept = keep(lengths, max(max_length - int(special.sum()), 0), truncate)[0]  # type: ignore[arg-type]
    chosen = special.copy()
    for number, column in enumerate(columns):
        chosen[np.flatnonzero(fields == number)[: int(kept[column])]] = True
    rows = np.flatnonzero(chosen)
    return Encoded([ids[i] for i in rows], fields[rows], spans[rows], len(ids) - len(rows))


def locate(parts: Parts, offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where places of the composed text lie within the fields.

    Args:
        parts: the tagged fields.
        offsets: (L, 2) start and end in :func:`meme_debate.composing.compose_parts`'s text.

    Returns:
        (L,) the field in which each place starts, a newline between two counting to the second; and (L, 2)
        start and end in that field's value, without the backslashes that compose puts in; a place inside a
        tag is empty.
    """
    sizes = [len(compose_parts([part])) + 1 for part in parts]
    ends = np.cumsum(sizes) - 1
    fields = np.searchsorted(ends, offsets[:, 0], side="right").clip(max=len(parts) - 1)
    starts = np.array(
        [end + 1 - size + len(tag) + 2 for end, size, (tag, _) in zip(ends, sizes, parts, strict=True)]
    )
    spans = offsets - starts[fields][:, None]
    for number, (tag, value) in enumerate(parts):
        escaped = compose_parts([(tag, value)])[len(tag) + 2 :]
        here = fields == number
        if len(escaped) != len(value):
            added, at = list[int](), 0
            for before, after in zip(value.split("\n"), escaped.split("\n"), strict=True):
                if len(after) > len(before):
                    added.append(at)
                at += len(after) + 1
            spans[here] -= np.searchsorted(np.array(added), spans[here], side="left")
        spans[here] = spans[here].clip(0, len(value))
    return fields, spans


def collate(
    rows: Sequence[Sequence[int]], pad: int, labels: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Token rows as one right-padded batch: ``input_ids``, ``attention_mask``, and ``labels`` where given.

    Raises:
        InputError: no rows, or one without a token.
    """
    if not rows or not all(len(row) for row in rows):
        raise InputError("rows holds a text without tokens, wanted at least one token each")
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch if labels is None else {**batch, "labels": torch.tensor(labels, dtype=torch.long)}


def pixels_of(source: Any, size: int, normalize: str = "clip") -> Float[Tensor, "3 size size"]:
    """One picture as CLIP takes it: shorter side to ``size`` (bicubic), center square, normalized.

    Args:
        source: whatever :func:`fusion_core.images.read_image` reads; None gives a plain gray picture.
        size: of the square.
        normalize: a key of :data:`meme_debate.pixels.NORMALIZE`.

    Raises:
        InputError: unreadable, cut off, or over 50 million pixels; the file is named.
    """
    image = None if source is None else Image.fromarray(read_image(source, max_pixels=MAX_PIXELS))
    return torch.from_numpy(normalized_square(image, size, normalize))


def stack_pixels(sources: Sequence[Any], size: int, normalize: str = "clip") -> Tensor:
    """Several pictures as one tensor (N, 3, size, size); see :func:`pixels_of`."""
    return torch.stack([pixels_of(source, size, normalize) for source in sources])

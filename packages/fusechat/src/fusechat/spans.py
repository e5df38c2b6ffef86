"""Token ids with the characters that they cover, and which of them the assistant wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusechat.errors import UnsupportedTokenizer
from fusechat.texts import Text
from fusion_core import tokenizers
from fusion_core.errors import reading

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One text as one tokenizer sees it.

    Attributes:
        ids: (tokens,) int32.
        ends: (tokens,) int32, characters of the text that the tokens up to here cover; 0 at the opening
            special tokens and the length of the text + 1 at the closing ones.
        supervised: (tokens,) bool, whether the assistant wrote the token (or its end-of-turn token).
    """

    ids: Ints
    ends: Ints
    supervised: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub name or folder.

    Raises:
        InputError: it has none, or a damaged one.
    """
    with reading(name, "has no tokenizer"):
        return tokenizers.load_tokenizer(name)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise unless the tokenizer tells character offsets.

    Raises:
        UnsupportedTokenizer: a slow tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedTokenizer(
            f"tokenizer is {type(tokenizer).__name__}, which tells no character offsets; load it with "
            'use_fast=True, or align its token strings with align="dtw"'
        )


def encode(tokenizer: Any, text: Text, *, max_length: int | None = None) -> Encoded:
    """Tokenize a text and keep the character offsets.

    Special tokens are added unless the text begins with the tokenizer's own opening token, as templates
    write it. A text that is longer is cut at the right, its closing token included.

    Args:
        tokenizer: a fast tokenizer.
        text: the rendered dialogue.
        max_length: most tokens to keep.

    Returns:
        Ids, character ends and the mask of the assistant's tokens.

    Raises:
        UnsupportedTokenizer: a slow tokenizer.
    """
    check_tokenizer(tokenizer)
    opening = getattr(tokenizer, "bos_token", None)
    made = tokenizer(
        text.text,
        add_special_tokens=not (opening and text.text.startswith(opening)),
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    ids = np.asarray(made["input_ids"], np.int32)
    if not len(ids):
        return Encoded(ids, ids.copy(), np.zeros(0, np.bool_))
    offsets = np.asarray(made["offset_mapping"], np.int32).reshape(-1, 2)
    starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
    # Tokens that the post-processor adds have the offsets (0, 0); in the text they have their own.
    added = (np.asarray(made["special_tokens_mask"]) == 1) & (ends == 0)
    inside = np.flatnonzero(~added)
    first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (len(ids), -1)
    closing = added & (np.arange(len(ids)) > (last if last >= 0 else 0))
    starts[closing] = len(text.text)
    ends[closing] = len(text.text) + 1
    between = added & (np.arange(len(ids)) > first) & ~closing
    if between.any():
        ends = np.where(between, 0, ends)
        ends = np.maximum.accumulate(ends).astype(np.int32)
    supervised = _inside(text, starts, ends) & ~added
    if text.whole:
        supervised |= closing
    cut = slice(0, max_length)
    return Encoded(ids[cut], ends[cut], supervised[cut])


def _inside(text: Text, starts: Ints, ends: Ints) -> NDArray[np.bool_]:
    """Whether the first character of a token that is no blank lies in a span."""
    size = len(text.text)
    marks = np.zeros(size + 1, np.bool_)
    for start, stop in text.spans:
        marks[start:stop] = True
    letters = np.frombuffer(text.text.encode("utf-32-le", "surrogatepass"), np.uint32)
    solid = np.flatnonzero(~np.isin(letters, (9, 10, 11, 12, 13, 32, 0xA0, 0x2581)))
    place = np.searchsorted(solid, starts)
    nearest = np.append(solid, size)[place]
    return marks[np.where(nearest < ends, nearest, np.minimum(starts, size))]

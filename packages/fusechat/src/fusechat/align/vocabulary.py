"""The tokens of a tokenizer as strings, raw and decoded, with the mark that stands for a blank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_core.errors import InputError

MARKS = ("\u2581", "\u0120")  # SentencePiece and byte-level BPE


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A list of tokens by id.

    Attributes:
        tokens: raw strings; index = id.
        mark: what stands for a blank in them, ``""`` where nothing does.
        unk: id of the unknown token, or None.
        bos: id of the opening token, or None.
        eos: id of the closing token, or None.
        decoded: what decoding each id alone gives; the raw strings where it is not told.
    """

    tokens: Sequence[str]
    mark: str = ""
    unk: int | None = None
    bos: int | None = None
    eos: int | None = None
    decoded: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def written(self, mark: str) -> list[str]:
        """The raw strings with the mark rewritten as another one."""
        if not self.mark or self.mark == mark:
            return list(self.tokens)
        return [token.replace(self.mark, mark) for token in self.tokens]

    def bare(self) -> list[str]:
        """The raw strings without marks."""
        return [token.replace(self.mark, "") if self.mark else token for token in self.tokens]

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """The vocabulary of a tokenizer.

        Raises:
            InputError: no tokenizer.
        """
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        if not hasattr(tokenizer, "get_vocab"):
            raise InputError(f"tokenizer is {type(tokenizer).__name__}, wanted one of transformers")
        table: dict[str, int] = tokenizer.get_vocab()
        size = max(table.values(), default=-1) + 1
        tokens = [""] * size
        for token, number in table.items():
            tokens[number] = token
        found = {mark: sum(mark in token for token in tokens) for mark in MARKS}
        mark = max(found, key=lambda name: found[name])
        ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        return cls(tokens, mark if found[mark] else "", *ids)


def decode_each(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Decode ids one by one, each distinct id once (FuseChat's strings for dynamic time warping)."""
    known: dict[int, str] = {}
    strings: list[str] = []
    for number in ids:
        key = int(number)
        if key not in known:
            known[key] = tokenizer.decode([key], clean_up_tokenization_spaces=False)
        strings.append(known[key])
    return strings

"""Do the members speak of the same tokens? Shared sizes, padded ids, and matching by strings.

Models of one family often differ in the width of their logits only: an embedding padded to a multiple of 64,
or a token added by a fine-tune. Those ids carry nothing to compare, so the shared vocabulary ends before
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from fusion_core.report import Report
from logit_fusion.errors import VocabularyMismatchError

__all__ = ["Vocabulary", "check_vocabulary"]

LARGE = "large"
_EXAMPLES = 10


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What the members share.

    Attributes:
        size: ids below it mean the same token to every member, or are matched by strings.
        widths: member -> width of its logits.
        padded: what becomes of the large model's ids from ``size`` on.
        gather: member -> its own id for each of the large model's first ``size`` ids, -1 where it has none;
            members whose ids agree are not in it.
        feed: member -> the id it reads for each of the large model's ids, where that is not the same id or
            it has fewer of them: its unknown, padding or end token stands for what it lacks.
        rows: one line per member, for :meth:`report`.
    """

    size: int
    widths: dict[str, int]
    padded: Literal["forbid", "keep"] = "forbid"
    gather: dict[str, Int64[Tensor, "size"]] = field(default_factory=dict[str, Tensor])
    feed: dict[str, Int64[Tensor, "width"]] = field(default_factory=dict[str, Tensor])
    rows: tuple[dict[str, Any], ...] = ()
    _moved: dict[Any, Tensor] = field(default_factory=dict[Any, Tensor], repr=False)

    @property
    def partial(self) -> bool:
        """Whether some of the large model's tokens are kept although a small member lacks them."""
        unknown = any(bool((index < 0).any()) for index in self.gather.values())
        return unknown or (self.padded == "keep" and self.size < self.widths[LARGE])

    def _on(self, table: str, name: str, device: torch.device) -> Tensor:
        key = (table, name, device)
        if key not in self._moved:
            self._moved[key] = getattr(self, table)[name].to(device)
        return self._moved[key]

    def ids(self, name: str, input_ids: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """A member's own ids for the large model's."""
        if name not in self.feed:
            return input_ids
        return self._on("feed", name, input_ids.device)[input_ids]

    def logits(self, name: str, logits: Tensor) -> Tensor:
        """A member's logits in the large model's ids, (..., V); -inf where the member lacks the token.

        V is ``size``, or the width of the large model's logits with ``padded="keep"``.
        """
        if name in self.gather:
            index = self._on("gather", name, logits.device)
            logits = logits.index_select(-1, index.clamp(min=0)).masked_fill(index < 0, -torch.inf)
        elif logits.shape[-1] > self.size and not (name == LARGE and self.padded == "keep"):
            logits = logits[..., : self.size]
        wanted = self.widths[LARGE] if self.padded == "keep" else self.size
        if logits.shape[-1] < wanted:
            logits = nn.functional.pad(logits, (0, wanted - logits.shape[-1]), value=-torch.inf)
        return logits

    def widen(self, log_probs: Tensor) -> Tensor:
        """Fused log-probabilities at the width of the large model's logits; forbidden ids get -inf."""
        missing = self.widths[LARGE] - log_probs.shape[-1]
        return nn.functional.pad(log_probs, (0, missing), value=-torch.inf) if missing else log_probs

    def report(self) -> Report:
        """The table that ``logit-fusion check`` prints."""
        return Report(title=f"Vocabulary: {self.size} shared ids", rows=self.rows)


def check_vocabulary(
    tokenizers: Mapping[str, Any],
    widths: Mapping[str, int],
    *,
    align: Literal["id", "string"] = "id",
    padded: Literal["forbid", "keep"] = "forbid",
    min_overlap: float = 0.95,
) -> Vocabulary:
    """Compare the members' vocabularies with the large model's.

    The shared range ends at the smallest tokenizer or logits; tokens that were added to all members lie
    inside it, those that only some have do not.

    Args:
        tokenizers: member -> tokenizer (anything with ``get_vocab()``); one of them is ``"large"``. A member
            without an entry, or with None, has only the width of its logits compared.
        widths: member -> width of its logits.
        align: ``"id"`` wants equal ids for equal strings; ``"string"`` matches tokens by their strings.
        padded: the large model's ids above the shared range are forbidden, or kept without a shift.
        min_overlap: least share of the large model's token strings that a member must have, in [0, 1].

    Raises:
        VocabularyMismatchError: other ids for the same strings with ``align="id"``, too small an overlap, or
            no tokenizer for ``align="string"``; with counts and up to ten examples.

    Example:
        >>> class Words:
        ...     def __init__(self, *words): self.words = words
        ...     def get_vocab(self): return {word: i for i, word in enumerate(self.words)}
        >>> words = Words("a", "b")
        >>> check_vocabulary({"large": words, "base": words}, {"large": 64, "base": 2}).size
        2
    """
    strings = {name: _strings(found) for name, found in tokenizers.items() if found is not None}
    if align == "string":
        return _by_string(strings, tokenizers, widths, padded, min_overlap)
    ends = [
        min(widths[name], max(strings[name]) + 1 if strings.get(name) else widths[name]) for name in widths
    ]
    size = min(ends)
    whole = {i: s for i, s in strings.get(LARGE, {}).items() if i < widths[LARGE]}
    rows: list[dict[str, Any]] = []
    for name in widths:
        own = strings.get(name)
        row: dict[str, Any] = {"member": name, "logits": widths[name], "tokens": own and len(own)}
        if own is not None and whole:
            common = len(set(whole.values()) & set(own.values())) / len(whole)
            differ = [i for i in range(size) if i in whole and i in own and whole[i] != own[i]]
            row |= {"common strings": common, "ids that differ": len(differ)}
            if differ:
                raise VocabularyMismatchError(
                    f"member {name!r} has another token for {len(differ)} of {size} shared ids "
                    f"({common:.1%} of the large model's strings are common), such as "
                    + _examples((f"{i}: {whole[i]!r} / {own[i]!r}") for i in differ)
                    + '; align="string" matches tokens by their strings'
                )
            if common < min_overlap:
                missing = sorted(set(whole.values()) - set(own.values()))
                raise _too_few(name, common, min_overlap, len(whole), missing)
        rows.append(row)
    feed: dict[str, Tensor] = {}
    for name, width in widths.items():
        if width < widths[LARGE]:  # what a member cannot read is replaced, in prompts and outputs
            own = torch.arange(widths[LARGE])
            feed[name] = torch.where(own < width, own, _fallback(tokenizers.get(name)))
    return Vocabulary(size, dict(widths), padded, feed=feed, rows=tuple(rows))


def _fallback(tokenizer: Any) -> int:
    """The id that stands for a token that a member lacks."""
    kinds = ("unk_token_id", "pad_token_id", "eos_token_id")
    return next((i for kind in kinds if (i := getattr(tokenizer, kind, None)) is not None), 0)


def _by_string(
    strings: Mapping[str, dict[int, str]],
    tokenizers: Mapping[str, Any],
    widths: Mapping[str, int],
    padded: Literal["forbid", "keep"],
    min_overlap: float,
) -> Vocabulary:
    if lacking := [name for name in widths if name not in strings]:
        raise VocabularyMismatchError(
            f'align="string" needs a tokenizer of every member; {lacking} have none'
        )
    whole = {i: s for i, s in strings[LARGE].items() if i < widths[LARGE]}
    size = min(widths[LARGE], max(whole) + 1)
    gather: dict[str, Tensor] = {}
    feed: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name in widths:
        back = {s: i for i, s in strings[name].items() if i < widths[name]}
        missing = [s for s in whole.values() if s not in back]
        common = 1 - len(missing) / len(whole)
        if common < min_overlap:
            raise _too_few(name, common, min_overlap, len(whole), missing)
        index = torch.tensor([back.get(whole[i], -1) if i in whole else -1 for i in range(size)])
        rows.append(
            {
                "member": name,
                "logits": widths[name],
                "tokens": len(strings[name]),
                "common strings": common,
                "ids that differ": int(((index != torch.arange(size)) & (index >= 0)).sum()),
            }
        )
        if name == LARGE or torch.equal(index, torch.arange(size)):
            continue
        gather[name] = index
        wide = nn.functional.pad(index, (0, widths[LARGE] - size), value=-1)
        feed[name] = torch.where(wide < 0, _fallback(tokenizers[name]), wide)
    return Vocabulary(size, dict(widths), padded, gather, feed, tuple(rows))


def _strings(tokenizer: Any) -> dict[int, str]:
    return {int(i): s for s, i in tokenizer.get_vocab().items()}


def _examples(found: Any) -> str:
    return ", ".join(islice(found, _EXAMPLES))


def _too_few(
    name: str, common: float, wanted: float, count: int, missing: list[str]
) -> VocabularyMismatchError:
    return VocabularyMismatchError(
        f"member {name!r} has {common:.1%} of the large model's {count} tokens, wanted at least "
        f"{wanted:.1%}; "
        f"it lacks {len(missing)}, such as {_examples(map(repr, missing))}"
    )

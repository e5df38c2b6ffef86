"""Fusion inside somebody else's ``generate``: a logits processor that runs the small members itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from fusion_core.errors import InputError
from logit_fusion.cache import FusedCache
from logit_fusion.config import FusionConfig
from logit_fusion.engine import Engine
from logit_fusion.fuse import FusionStep
from logit_fusion.member import Expert, check_pairing, load_members
from logit_fusion.vocab import check_vocabulary

__all__ = ["FusionLogitsProcessor"]


class FusionLogitsProcessor(LogitsProcessor):
    """Shifts the scores of any ``large.generate(..., logits_processor=[this])``.

    It keeps the small members' caches from call to call; a new prompt starts anew. It cannot follow beams,
    which ``generate`` reorders without telling: :class:`FusedModel` can.

    Args:
        base: the small base: a model, a name, or an :class:`Expert`.
        experts: one or several models, or a mapping by name.
        settings: of the fusion.
        tokenizer: of the large model; with it ``align`` and the vocabulary checks work as in FusedModel.
        pad_token_id: padding on the left of the prompts, left out by the members. None: there is none.
        attention_mask: of the prompts, (rows, tokens), where the padding's id also stands inside them.
        on_reorder: what to do when rows change places: ``"error"``, or ``"prefill"`` (reads everything
            anew at
            every step of a beam search).
        **changes: fields of :class:`FusionConfig`.

    Example:
        >>> FusionLogitsProcessor.__name__  # large.generate(ids, logits_processor=[processor])
        'FusionLogitsProcessor'
    """

    def __init__(
        self,
        base: Any,
        experts: Any,
        settings: FusionConfig | None = None,
        *,
        tokenizer: Any = None,
        pad_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        on_reorder: str = "error",
        **changes: Any,
    ) -> None:
        if on_reorder not in ("error", "prefill"):
            raise InputError(f"on_reorder is {on_reorder!r}, wanted 'error' or 'prefill'")
        listed = experts if isinstance(experts, Mapping) else _numbered(experts)
        if not listed:
            raise InputError("experts is empty, wanted at least one")
        found = {"base": base, **listed}
        named = {name: x if isinstance(x, Expert) else Expert(x) for name, x in found.items()}
        self.settings = (
            (settings or FusionConfig()).replace(**changes) if changes else settings or FusionConfig()
        )
        self.members = load_members(named, device_map={})
        check_pairing(self.members[0], self.members[1:])
        self.tokenizer, self.pad_token_id = tokenizer, pad_token_id
        self.attention_mask, self.on_reorder = attention_mask, on_reorder
        self.step: FusionStep | None = None
        self._engine: Engine | None = None
        self._cache: FusedCache | None = None
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None

    def reset(self) -> None:
        """Forget what was read."""
        self._cache = self._ids = self._mask = None

    def _small(self, width: int) -> Engine:
        """An engine of the small members alone; they stand for the large one too, whose logits come in."""
        if self._engine is None:
            known = {m.name: m.tokenizer for m in self.members if m.tokenizer is not None}
            if self.tokenizer is not None:
                known = {"large": self.tokenizer, **known}
            vocabulary = check_vocabulary(
                known if "large" in known else {},
                {"large": width, **{member.name: member.width for member in self.members}},
                align=self.settings.align,
                padded=self.settings.padded,
                min_overlap=self.settings.min_overlap,
            )
            self._engine = Engine(self.members, vocabulary, getattr(self.tokenizer, "bos_token_id", None))
        return self._engine

    def _masked(self, ids: Tensor) -> Tensor | None:
        if self.attention_mask is not None:
            given = self.attention_mask.to(ids.device)
            rows = ids.shape[0] // max(given.shape[0], 1)
            if given.shape[0] * rows != ids.shape[0] or given.shape[1] > ids.shape[1]:
                raise InputError(
                    f"attention_mask has shape {tuple(given.shape)}, the prompts {tuple(ids.shape)}; it "
                    "belongs to "
                    "another batch"
                )
            grown = given.new_ones(ids.shape[0], ids.shape[1] - given.shape[1])
            return torch.cat([given.repeat_interleave(rows, 0), grown], 1)
        if self.pad_token_id is None:
            return None
        return (ids != self.pad_token_id).cummax(1).values.long()

    def _continues(self, ids: Tensor) -> bool:
        """Whether the ids are the last ones and one token more.

        Raises:
            InputError: the rows changed places, and ``on_reorder="error"``.
        """
        before = self._ids
        if before is None or ids.shape[0] != before.shape[0] or ids.shape[1] != before.shape[1] + 1:
            return False
        if torch.equal(ids[:, :-1], before):
            return True
        moved = (ids[:, None, :-1] == before[None]).all(-1).any(1)
        if ids.shape[0] > 1 and self.on_reorder == "error" and bool(moved.all()):
            raise InputError(
                "the rows changed places, as in beam search, which a logits processor cannot follow; use "
                "FusedModel, or on_reorder='prefill'"
            )
        return False

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Fused log-probabilities in place of the scores, (rows, vocab).

        Raises:
            InputError: beams changed places.
            ContextLengthError: a member cannot read as much.
            NonFiniteLogitsError, EmptySupportError: the logits cannot be used (looked at for each prompt).
        """
        engine = self._small(scores.shape[-1])
        with torch.no_grad():
            if self._continues(input_ids) and self._cache is not None:
                new = input_ids[:, -1:]
                if self._mask is not None:
                    self._mask = torch.cat([self._mask, self._mask.new_ones(len(new), 1)], 1)
                first = False
            else:
                self._cache, self._mask, new = engine.cache(), self._masked(input_ids), input_ids
                first = True
            self._ids = input_ids.clone()
            logits, weights = engine.read(self.settings, new, self._mask, None, self._cache, 1)
            rows = [x[:, -1].to(scores.device) for x in logits]
            if isinstance(weights, Tensor):
                weights = weights[:, -1].to(scores.device)
            large = engine.vocabulary.logits("large", scores)
            self.step = engine.fuse(self.settings, [large, *rows], weights).step
        if first:
            self.step.check(["large", *engine.names])
        return engine.vocabulary.widen(self.step.log_probs).to(scores.dtype)


def _numbered(experts: Any) -> dict[str, Any]:
    if not isinstance(experts, Sequence):
        experts = [experts]
    return {f"expert{number}": expert for number, expert in enumerate(experts)}

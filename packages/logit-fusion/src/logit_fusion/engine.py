"""One fused pass: every member reads, the evidence is brought up to date, the logits are fused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fusion_core.errors import InputError
from logit_fusion.cache import FusedCache
from logit_fusion.config import FusionConfig
from logit_fusion.evidence import evidence_weights, scan_evidence, token_log_probs
from logit_fusion.fuse import FusionStep, fuse_logits
from logit_fusion.member import Member, lead
from logit_fusion.schedule import Lane, Reading, lanes_of, overlapped
from logit_fusion.vocab import Vocabulary

__all__ = ["Engine", "Passed", "Prompts"]

_TRAIL = 64  # longest pass that `crop` can take back token by token


@dataclass(frozen=True, eq=False)
class Prompts:
    """What differs between the members' prompts in one call of ``generate``.

    Args:
        length: tokens of the shared prompt, padding included.
        given: member -> ids and mask, each (rows, tokens), padded on the left, read in place of the prompt.
        apart: every member has a lane of its own, so that one can read ahead.
    """

    length: int
    given: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    apart: bool = False


@dataclass(frozen=True, eq=False)
class Passed:
    """What a pass found: the fused step and the aligned logits behind it, (rows, keep, vocab) each."""

    step: FusionStep
    large: Tensor
    base: Tensor
    experts: list[Tensor]


class Engine:
    """The members, their lanes and their shared vocabulary.

    Args:
        members: large, base, experts; without a large one its logits come from elsewhere.
        vocabulary: of them.
        bos: the prompt's beginning-of-sequence id, hidden behind a member's own prefix.
    """

    def __init__(self, members: Sequence[Member], vocabulary: Vocabulary, bos: int | None) -> None:
        self.members, self.vocabulary, self.bos = list(members), vocabulary, bos
        self.first = 1 if self.members[0].name == "large" else 0  # of the small members
        self.together = lanes_of(self.members)
        self.apart = [Lane([member]) for member in self.members], [(n, 0) for n in range(len(self.members))]

    @property
    def names(self) -> list[str]:
        """Of the members."""
        return [member.name for member in self.members]

    def plan(self, prompts: Prompts | None) -> tuple[list[Lane], list[tuple[int, int]]]:
        """Lanes and places; members with prompts of their own run apart."""
        return self.apart if prompts is not None and (prompts.given or prompts.apart) else self.together

    def cache(self, prompts: Prompts | None = None) -> FusedCache:
        """An empty cache."""
        lanes = self.plan(prompts)[0]
        return FusedCache([lane.members[0].config for lane in lanes], [lane.copies for lane in lanes])

    def step(
        self,
        settings: FusionConfig,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: FusedCache | None,
        keep: int,
        prompts: Prompts | None = None,
    ) -> Passed:
        """Let all members read new tokens and fuse their logits at the last ``keep`` positions.

        Arguments and errors are those of :meth:`read`.
        """
        aligned, weights = self.read(settings, input_ids, mask, positions, cache, keep, prompts)
        return self.fuse(settings, aligned, weights)

    def read(
        self,
        settings: FusionConfig,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: FusedCache | None,
        keep: int,
        prompts: Prompts | None = None,
        known: Mapping[int, Tensor] | None = None,
    ) -> tuple[list[Tensor], Any]:
        """Let all members read new tokens.

        Args:
            settings: of the fusion.
            input_ids: (rows, tokens) in the large model's ids; the new ones only, if ``cache`` holds the
                rest.
            mask: (rows, past + tokens), 0 for padding, None for none.
            positions: (rows or 1, tokens) of the shared tokens, None to derive them.
            cache: of the members; brought up to date.
            keep: how many positions, at least 1.
            prompts: what differs between the members' prompts.
            known: lane -> logits (rows, keep, vocab) of what it has read already.

        Returns:
            Each member's logits (rows, keep, vocab) in the large model's ids, and the experts' weights.

        Raises:
            ContextLengthError: a member cannot read as much.
            InputError: more positions than a member with a prompt of its own has in common with the others.
        """
        lanes, places = self.plan(prompts)
        evident = settings.weights == "evidence" and settings.alpha is None
        past = 0 if cache is None else cache.length
        readings = [
            self._reading(number, lane, input_ids, mask, positions, cache, keep, prompts)
            for number, lane in enumerate(lanes)
        ]
        # A prompt that is not the others' says nothing about who fits: then only new tokens are evidence.
        apart = bool(prompts and prompts.given) or any(member.suffix_ids for member in self.members)
        scored = evident and not (past == 0 and apart)
        if (
            evident
            and apart
            and cache is None
            and prompts is not None
            and input_ids.shape[1] > prompts.length
        ):
            raise InputError('weights="evidence" with prompts of their own needs use_cache=True')
        small = {lane for lane, _ in places[self.first :]}

        def job(number: int) -> Any:
            lane, reading = lanes[number], readings[number]
            score = scored and number in small
            if known is not None and number in known:
                logits = known[number]
                return [logits], [token_log_probs(logits[:, :-1], reading.ids[:, 1:])] if score else []
            reading = replace(reading, score=score)
            width = self.vocabulary.widths[lane.members[0].name]
            return lane.run(reading, None if cache is None else cache.lanes[number], width)

        found = overlapped([(lane.device, lambda n=n: job(n)) for n, lane in enumerate(lanes)])
        target = found[places[0][0]][0][0].device
        aligned: list[Tensor] = []
        for member, (number, block) in zip(self.members, places, strict=True):
            logits = found[number][0][block].to(target, non_blocking=True)
            aligned.append(self.vocabulary.logits(member.name, logits))
        weights: Any = settings.weights
        if evident:
            scores = [found[n][1][block] for n, block in places[self.first :]] if scored else None
            raw = [found[n][0][block] for n, block in places[self.first :]]
            weights = self._evidence(settings, input_ids, mask, cache, keep, scores, raw).to(target)
        if cache is not None:
            cache.length += input_ids.shape[1]
            cache.rows = input_ids.shape[0]
        return aligned, weights

    def read_ahead(
        self,
        lane: int,
        input_ids: Tensor,
        mask: Tensor | None,
        cache: FusedCache,
        ahead: int,
        prompts: Prompts,
    ) -> Tensor:
        """Let one member alone read one token more than the others.

        Args:
            lane: of the member, in the plan with ``apart``.
            input_ids: (rows, 1) the token.
            mask: (rows, past + ahead + 1), None for no padding.
            cache: of all; only this lane's grows.
            ahead: tokens it has read before the others.
            prompts: as in :meth:`read`.

        Returns:
            Its logits (rows, 1, vocab), in its own ids.
        """
        runner = self.apart[0][lane]
        cache.length += ahead  # for this lane
        try:
            reading = self._reading(lane, runner, input_ids, mask, None, cache, 1, prompts)
        finally:
            cache.length -= ahead
        return runner.run(reading, cache.lanes[lane], self.vocabulary.widths[runner.members[0].name])[0][0]

    def fuse(self, settings: FusionConfig, aligned: Sequence[Tensor], weights: Any) -> Passed:
        """Fuse aligned logits of large, base and experts.

        Args:
            settings: of the fusion.
            aligned: (rows, keep, vocab) each.
            weights: of the experts: a rule, numbers, or the evidence's (rows, keep, T).
        """
        arguments: dict[str, Any] = settings.fuse_arguments() | {"weights": weights, "validate": "lazy"}
        large, base, *experts = aligned
        # One dtype: the widest of the members, at least float32 inside.
        kind = torch.float64 if any(x.dtype == torch.float64 for x in aligned) else torch.float32
        if self.vocabulary.partial:
            arguments["outside"] = "large"
        if settings.plausibility > 0:
            top = large.amax(-1, keepdim=True)
            arguments["mask"] = large >= top + torch.log(top.new_tensor(settings.plausibility))
        step = fuse_logits(large, base, experts, compute_dtype=kind, **arguments)
        if settings.validate == "eager":
            step.check(["large", *self.names[self.first :]])
        return Passed(step, large, base, experts)

    def _reading(
        self,
        number: int,
        lane: Lane,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: FusedCache | None,
        keep: int,
        prompts: Prompts | None,
    ) -> Reading:
        """What one lane reads in this pass."""
        member = lane.members[0]
        rows, tokens = ids.shape
        past = 0 if cache is None else cache.length
        given = None if prompts is None else prompts.given.get(member.name)
        whole = mask
        if given is None and member.reads_prompt:
            member.check_length(past + tokens)
            if positions is None:
                positions = _positions(mask, past, tokens, ids.device)
            own = self.vocabulary.ids(member.name, ids)
            return Reading(own, mask, positions[:, -tokens:], keep)
        if whole is None:
            whole = ids.new_ones(rows, past + tokens)
        if past == 0:
            length = min(tokens, tokens if prompts is None else prompts.length)
            own_prompt = given is not None or bool(member.suffix_ids)
            if own_prompt and prompts is not None and prompts.length > tokens:
                raise InputError("prefill_chunk_size cannot cut the prompt where a member reads another one")
            front, front_mask, drop = self._front(member, ids[:, :length], whole[:, :length], given)
            if cache is not None:
                cache.leads[number] = (front_mask, drop)
            rest = self.vocabulary.ids(member.name, ids[:, drop:])
            ids = torch.cat([front, rest], 1)
            common = tokens - drop + 1 if own_prompt else tokens
            if keep > common:
                raise InputError(
                    f"logits_to_keep asks for {keep} positions, but member {member.name!r} reads a prompt "
                    "of its "
                    f"own and has {common} in common with the others"
                )
        else:
            assert cache is not None
            front_mask, drop = cache.leads[number]
            ids = self.vocabulary.ids(member.name, ids)
        whole = torch.cat([front_mask, whole[:, drop:].to(front_mask.dtype)], 1)
        member.check_length(whole.shape[1])
        return Reading(ids, whole, _positions(whole, 0, ids.shape[1], ids.device), keep)

    def _front(
        self, member: Member, prompt: Tensor, mask: Tensor, given: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, int]:
        """What stands in place of the first ``drop`` shared tokens: ids, mask, and ``drop``."""
        if given is not None:
            front, front_mask = (part.to(prompt.device) for part in given)
            repeats = prompt.shape[0] // front.shape[0]  # beams and returned sequences stand side by side
            return (
                front.repeat_interleave(repeats, 0),
                front_mask.repeat_interleave(repeats, 0),
                prompt.shape[1],
            )
        own = self.vocabulary.ids(member.name, prompt)
        bos = (
            None if self.bos is None else int(self.vocabulary.ids(member.name, prompt.new_tensor([self.bos])))
        )
        front, front_mask = lead(member, own, mask, bos)
        return front, front_mask, prompt.shape[1]

    def _evidence(
        self,
        settings: FusionConfig,
        ids: Tensor,
        mask: Tensor | None,
        cache: FusedCache | None,
        keep: int,
        scores: list[Tensor] | None,
        logits: list[Tensor],
    ) -> Tensor:
        """The experts' weights at the last ``keep`` positions, (rows, keep, T)."""
        device = logits[0].device
        rows, tokens = ids.shape
        before = cache.evidence if cache is not None else None
        kind = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
        start = torch.zeros(rows, len(logits), dtype=kind, device=device) if before is None else before
        real = torch.ones(rows, tokens, dtype=torch.bool, device=device)
        if mask is not None:
            real = mask[:, -tokens:].to(device) > 0
        if scores is None:  # nothing is comparable yet
            history = start[:, None].expand(-1, tokens, -1)
        else:
            # A prefix of one member comes before the shared tokens.
            inner = torch.stack([part[:, part.shape[1] - tokens + 1 :].to(device) for part in scores], -1)
            last, seen = (None, None) if cache is None else (cache.last_logits, cache.seen)
            first = inner.new_zeros(rows, 1, len(logits))
            previous = torch.zeros_like(real[:, :1])
            if last is not None and seen is not None:
                names = self.names[self.first :]
                own = [
                    self.vocabulary.ids(name, ids[:, 0]).to(x.device)
                    for name, x in zip(names, last, strict=True)
                ]
                found = [token_log_probs(x, i).to(device) for x, i in zip(last, own, strict=True)]
                first, previous = torch.stack(found, -1)[:, None], seen[:, None]
            whole = torch.cat([first.to(inner.dtype), inner], 1)
            usable = real & torch.cat([previous, real[:, :-1]], 1)
            whole = whole.masked_fill(~usable[..., None], 0.0)
            history = scan_evidence(whole.to(kind), gamma=settings.evidence_decay, mask=usable, initial=start)
        if cache is not None:
            self._remember(cache, start, history, real, logits, tokens)
        return evidence_weights(history[:, -keep:])

    @staticmethod
    def _remember(
        cache: FusedCache, start: Tensor, history: Tensor, real: Tensor, logits: list[Tensor], tokens: int
    ) -> None:
        current = (history[:, -1], [x[:, -1] for x in logits], real[:, -1])
        trail: list[tuple[Tensor, list[Tensor], Tensor]] = [current]
        if tokens <= _TRAIL and logits[0].shape[1] == tokens and cache.last_logits is not None:
            assert cache.seen is not None
            trail = [(start, cache.last_logits, cache.seen)]
            trail += [(history[:, i], [x[:, i] for x in logits], real[:, i]) for i in range(tokens)]
        cache.trail = trail
        cache.evidence, cache.last_logits, cache.seen = current


def _positions(mask: Tensor | None, past: int, tokens: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.arange(past, past + tokens, device=device)[None]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]

"""Lossless speculative decoding: an expert drafts, all members verify in one pass, the law stays.

The spec's own scheme (section 5.1). Per token, the large model's cost falls from one pass to one pass per
round
of 1 + (accepted tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from fusion_core.errors import InputError, check_range
from fusion_core.seeding import generator as make_generator
from logit_fusion.acceptance import accept_greedy, accept_sampled
from logit_fusion.cache import FusedCache
from logit_fusion.engine import Passed, Prompts
from logit_fusion.generating import left_padded, own_prompts
from logit_fusion.recording import Guard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from logit_fusion.model import FusedModel

__all__ = ["SpeculativeOutput", "speculative_generate"]


@dataclass(frozen=True, slots=True, eq=False)
class SpeculativeOutput:
    """What :func:`speculative_generate` found.

    Attributes:
        sequences: (rows, tokens) prompt and output.
        rounds: passes of the large model after the prompt.
        drafted: tokens drafted, per row.
        accepted: of them kept, per row.
    """

    sequences: Tensor
    rounds: int
    drafted: int
    accepted: int


def speculative_generate(
    model: FusedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    gamma: int = 4,
    draft: str | None = None,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    stopping_criteria: Any = None,
    logits_processor: Any = None,
    streamer: Any = None,
    prompts: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    return_dict_in_generate: bool = False,
    **unknown: Any,
) -> Any:
    """Generate with the law of ``generate`` on the same fusion, in fewer passes of the large model.

    Rows of a batch go on together: a round ends at the first token that some row did not accept, which leaves
    every row's law as it is, because what a row keeps does not depend on the others' tokens.

    Args:
        model: a fusion.
        input_ids: (rows, tokens), padded on the left.
        attention_mask: 0 for padding.
        gamma: tokens drafted per round, at least 1.
        draft: the expert that drafts; None takes the one with the greatest alpha in the last round.
        max_new_tokens: most tokens of the output.
        do_sample: draw instead of taking the likeliest.
        temperature: divides the scores before drawing, > 0.
        top_k: draw among so many tokens only; 0 for all.
        top_p: draw among the likeliest tokens of this mass only, in (0, 1].
        eos_token_id: ends a row; by default the generation configuration's.
        pad_token_id: fills finished rows; by default the configuration's, or the end's.
        stop_strings: end a row too; needs the model's tokenizer.
        stopping_criteria: of transformers.
        logits_processor: of transformers; applied to draft and fusion alike.
        streamer: of transformers, for one row.
        prompts: as in ``generate``.
        seed: of the draws.
        generator: of the draws instead, on the large model's device.
        return_dict_in_generate: return a :class:`SpeculativeOutput`.
        **unknown: refused.

    Returns:
        Ids (rows, prompt + output), as ``generate`` would.

    Raises:
        InputError: a wrong setting, or caches that cannot be cropped.
    """
    if unknown:
        raise InputError(f"speculative_generate does not know {sorted(unknown)}; use generate")
    if gamma < 1 or max_new_tokens < 1:
        raise InputError(f"gamma is {gamma} and max_new_tokens {max_new_tokens}, wanted at least 1")
    names = model.engine.names[2:]
    if draft is not None and draft not in names:
        raise InputError(f"draft is {draft!r}, the experts are {names}")
    left_padded(input_ids, attention_mask)
    config = model.generation_config
    ends = eos_token_id if eos_token_id is not None else getattr(config, "eos_token_id", None)
    listed = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = pad_token_id if pad_token_id is not None else getattr(config, "pad_token_id", None)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if stop_strings is not None:
        from transformers import StopStringCriteria

        if model.tokenizer is None:
            raise InputError("stop_strings needs the model's tokenizer")
        criteria.append(StopStringCriteria(model.tokenizer, stop_strings))  # pyright: ignore
    device = input_ids.device
    draws = generator
    if draws is None and do_sample:
        draws = make_generator(seed, "speculative", device=device)
    shared = Prompts(input_ids.shape[1], own_prompts(model, prompts, len(input_ids)), apart=True)
    run = _Run(
        model=model,
        prompts=shared,
        cache=model.engine.cache(shared),
        warp=_warp(logits_processor, do_sample, temperature, top_k, top_p),
        draws=draws,
        guard=Guard(model.engine.names),
        padded=attention_mask is not None and bool((attention_mask == 0).any()),
    )
    with torch.no_grad():
        output = _loop(
            run, input_ids, attention_mask, gamma, draft, max_new_tokens, listed, pad, criteria, streamer
        )
    run.guard.check()
    return output if return_dict_in_generate else output.sequences


Warp = Callable[[Tensor, Tensor], Tensor]


def _warp(processors: Any, do_sample: bool, temperature: float, top_k: int, top_p: float) -> Warp:
    """Scores to scores, (rows, vocab), the same for draft and fusion."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    check_range("temperature", temperature, 0.0, float("inf"), open=True)
    found = LogitsProcessorList(processors or [])
    if do_sample:
        if temperature != 1.0:
            found.append(TemperatureLogitsWarper(temperature))
        if top_k:
            found.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            found.append(TopPLogitsWarper(top_p))
    return lambda ids, scores: found(ids, scores)  # pyright: ignore[reportArgumentType, reportReturnType]


@dataclass(eq=False)
class _Run:
    """What stays the same over the rounds of one call."""

    model: FusedModel
    prompts: Prompts
    cache: FusedCache
    warp: Warp
    draws: torch.Generator | None
    guard: Guard
    padded: bool

    def pick(self, scores: Tensor) -> Tensor:
        """A token of each row, (rows)."""
        if self.draws is None:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.draws)[:, 0]

    def passed(self, ids: Tensor, mask: Tensor | None, keep: int, known: Any = None) -> Passed:
        """One pass of all members."""
        engine = self.model.engine
        aligned, weights = engine.read(
            self.model.settings, ids, mask, None, self.cache, keep, self.prompts, known
        )
        found = engine.fuse(self.model.settings, aligned, weights)
        self.guard.add(found.step)
        return found

    def draft(
        self, member: int, ids: Tensor, mask: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (rows, count) of one member, their warped log-probabilities, its raw logits (count + 1)."""
        engine = self.model.engine
        name = engine.names[member]
        new, tokens, laws, raw = ids[:, -1:], [], [], []
        for ahead in range(count + 1):
            logits = engine.read_ahead(member, new, mask, self.cache, ahead, self.prompts)
            raw.append(logits)
            if ahead == count:
                break
            scores = engine.vocabulary.widen(engine.vocabulary.logits(name, logits[:, -1]).to(ids.device))
            scores = self.warp(ids, scores.float() if scores.dtype != torch.float64 else scores)
            new = self.pick(scores)[:, None]
            tokens.append(new)
            laws.append(scores.log_softmax(-1))
            ids = torch.cat([ids, new], 1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return torch.cat(tokens, 1), torch.stack(laws, 1), torch.cat(raw, 1)


def _grown(mask: Tensor | None, by: int) -> Tensor | None:
    return None if mask is None else torch.cat([mask, mask.new_ones(len(mask), by)], 1)


def _loop(
    run: _Run,
    ids: Tensor,
    mask: Tensor | None,
    gamma: int,
    draft: str | None,
    budget: int,
    ends: list[int],
    pad: int | None,
    criteria: StoppingCriteriaList,
    streamer: Any,
) -> SpeculativeOutput:
    model, prompt = run.model, ids.shape[1]
    if not run.padded:
        mask = None
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    stop = torch.tensor(ends, device=ids.device)
    fill = pad if pad is not None else ends[0] if ends else 0
    run.cache.activate_past_recording()
    found = run.passed(ids, mask, 1)
    if not run.cache.is_croppable:
        raise InputError("a member's cache cannot be cropped, so a draft cannot be taken back; use generate")
    if streamer is not None:
        streamer.put(ids.cpu())
    scores = run.warp(ids, model.vocabulary.widen(found.step.log_probs[:, -1]).to(ids.device))
    new = run.pick(scores)[:, None]
    # Where the search has spoken, the expert that it trusts drafts.
    leader = int(found.step.alpha[:, -1].sum(0).argmax())
    rounds = drafted = accepted = 0
    while True:
        for place in range(new.shape[1]):
            column = torch.where(finished, torch.full_like(new[:, place], fill), new[:, place])
            ids = torch.cat([ids, column[:, None]], 1)
            mask = _grown(mask, 1)
            if streamer is not None:
                streamer.put(column.cpu())
            over = torch.isin(column, stop)
            if criteria:
                over = over | criteria(ids, None)  # pyright: ignore[reportArgumentType]
            finished = finished | over
            if bool(finished.all()):
                break
        left = budget - (ids.shape[1] - prompt)
        if left <= 0 or bool(finished.all()):
            break
        count = min(gamma, left - 1)
        member = 2 + (leader if draft is None else model.engine.names[2:].index(draft))
        if count:
            tokens, laws, raw = run.draft(member, ids, mask, count)
            known = {member: raw}
        else:
            tokens, laws, known = ids[:, :0], None, None
        read = torch.cat([ids[:, -1:], tokens], 1)
        found = run.passed(read, _grown(mask, count), count + 1, known)
        fused = model.vocabulary.widen(found.step.log_probs).to(ids.device)
        whole = torch.cat([ids, tokens], 1)
        target = torch.stack(
            [run.warp(whole[:, : ids.shape[1] + i], fused[:, i]) for i in range(count + 1)], 1
        )
        if laws is None:
            new, kept = run.pick(target[:, 0])[:, None], 0
        else:
            if run.draws is None:
                verdict = accept_greedy(tokens, target)
            else:
                verdict = accept_sampled(tokens, laws, target.log_softmax(-1), generator=run.draws)
            # Rows go on together: to the first token that some row that still decodes did not accept.
            kept = int(torch.where(finished, count, verdict.count).min())
            new = verdict.tokens[:, : kept + 1].clamp(min=0)
        leader = int(found.step.alpha[:, : kept + 1].sum((0, 1)).argmax())
        run.cache.crop(kept - count)
        rounds, drafted, accepted = rounds + 1, drafted + count, accepted + kept
    if streamer is not None:
        streamer.end()
    return SpeculativeOutput(ids, rounds, drafted, accepted)

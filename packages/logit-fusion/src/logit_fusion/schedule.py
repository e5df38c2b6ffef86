"""Running the members: one pass per module, adapters of one base together, streams side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logit_fusion.member import BASE_ROWS, Member

__all__ = ["Lane", "Reading", "lanes_of", "overlapped"]

_CHUNK_ELEMENTS = 1 << 25  # of the logits that one pass over a long prompt may hold


@dataclass(frozen=True)
class Reading:
    """What one pass reads: ids, mask and positions of a lane (one block of rows), and what is asked for.

    Args:
        ids: (rows, tokens) new ones.
        mask: (rows, past + tokens), None for no padding.
        positions: (rows or 1, tokens).
        keep: how many of the last positions' logits to return.
        score: whether the tokens' log-probabilities are asked for.
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor
    keep: int
    score: bool = False


class Lane:
    """One module and the members that run through it.

    Args:
        members: of one module; several if they differ by adapter and all read the same.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.module = members[0].module
        self.copies = len(members)
        inner = self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module
        self._takes = set(inspect.signature(inner.forward).parameters)
        self._names = [member.adapter for member in members]

    @property
    def device(self) -> torch.device:
        """Where it takes ids."""
        return self.members[0].device

    @property
    def reads_prompt(self) -> bool:
        """Whether its members read the shared prompt as it is."""
        return self.members[0].reads_prompt

    def _call(self, reading: Reading, cache: Any, keep: int) -> list[Tensor]:
        """One pass; (rows, keep, vocab) for each member."""
        device, many = self.device, self.copies
        ids, mask, positions = (
            None if part is None else part.to(device)
            for part in (reading.ids, reading.mask, reading.positions)
        )
        assert ids is not None
        if many > 1:
            ids = ids.repeat(many, 1)
            mask = None if mask is None else mask.repeat(many, 1)
            positions = positions if positions is None or len(positions) == 1 else positions.repeat(many, 1)
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": cache is not None}
        if "position_ids" in self._takes:
            options["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            options["logits_to_keep"] = keep
        if cache is not None:
            options["past_key_values"] = cache
        if self._names[0] is not None:
            rows = ids.shape[0] // many
            options["adapter_names"] = [name or BASE_ROWS for name in self._names for _ in range(rows)]
        logits = self.module(input_ids=ids, return_dict=True, **options).logits
        if keep and logits.shape[1] > keep:
            logits = logits[:, -keep:]
        return list(logits.chunk(many)) if many > 1 else [logits]

    def run(self, reading: Reading, cache: Any, width: int) -> tuple[list[Tensor], list[Tensor]]:
        """Read tokens.

        Args:
            reading: what.
            cache: the lane's own, None for none.
            width: of the logits; a long scored prompt is read in pieces of bounded memory.

        Returns:
            Each member's logits (rows, keep, vocab), and with ``reading.score`` each member's
            log-probabilities (rows, tokens - 1) of the tokens from the second on.
        """
        from logit_fusion.evidence import token_log_probs

        tokens = reading.ids.shape[1]
        if not reading.score:
            return self._call(reading, cache, reading.keep), []
        piece = max(_CHUNK_ELEMENTS // (reading.ids.shape[0] * self.copies * width), 16)
        if tokens <= max(piece, reading.keep):
            kept = self._call(reading, cache, tokens)
            following = reading.ids[:, 1:].to(kept[0].device)
            return (
                [logits[:, tokens - reading.keep :] for logits in kept],
                [token_log_probs(logits[:, :-1], following) for logits in kept],
            )
        if cache is None:
            from transformers.cache_utils import DynamicCache

            cache = DynamicCache(config=self.members[0].config)
        past = 0 if reading.mask is None else reading.mask.shape[1] - tokens
        scored: list[list[Tensor]] = [[] for _ in self.members]
        tail: list[list[Tensor]] = [[] for _ in self.members]
        for start in range(0, tokens, piece):
            stop = min(start + piece, tokens)
            mask = None if reading.mask is None else reading.mask[:, : past + stop]
            positions = reading.positions[:, start:stop]
            part = Reading(reading.ids[:, start:stop], mask, positions, stop - start)
            following = reading.ids[:, start + 1 : stop + 1]
            for number, logits in enumerate(self._call(part, cache, stop - start)):
                wanted = following.to(logits.device)
                scored[number].append(token_log_probs(logits[:, : wanted.shape[1]], wanted))
                if stop > tokens - reading.keep:
                    tail[number].append(logits[:, max(tokens - reading.keep - start, 0) :])
        return [torch.cat(parts, 1) for parts in tail], [torch.cat(parts, 1) for parts in scored]


def lanes_of(members: Sequence[Member]) -> tuple[list[Lane], list[tuple[int, int]]]:
    """Lanes, and for each member its lane and its block of rows there.

    Adapters of one base that read the shared prompt go through it together; so does a member that is another
    one by weights and view, which then costs nothing.
    """
    groups: list[list[Member]] = []
    places: list[tuple[int, int]] = []
    for member in members:
        for number, group in enumerate(groups):
            first = group[0]
            if first.module is not member.module or first.view != member.view:
                continue
            twin = next((n for n, other in enumerate(group) if other.adapter == member.adapter), None)
            if twin is None and member.adapter is None:
                continue
            if twin is None:
                group.append(member)
            places.append((number, len(group) - 1 if twin is None else twin))
            break
        else:
            groups.append([member])
            places.append((len(groups) - 1, 0))
    return [Lane(group) for group in groups], places


def overlapped(jobs: Sequence[tuple[torch.device, Callable[[], Any]]]) -> list[Any]:
    """Run jobs, each launching work on its device; on one CUDA device they go on streams side by side.

    On several devices the launches alone overlap; on a CPU the jobs run in order, each with all threads.

    Args:
        jobs: device and function of each.
    """
    devices = [device for device, _ in jobs]
    if len(set(devices)) > 1 or devices[0].type != "cuda":
        return [job() for _, job in jobs]
    current = torch.cuda.current_stream(devices[0])
    found: list[Any] = []
    used = _streams(devices[0], len(jobs))
    for stream, (_, job) in zip(used, jobs, strict=True):
        # Waiting both ways also keeps memory safe: a block freed here is reused on its own stream only after.
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            found.append(job())
    for stream in used:
        current.wait_stream(stream)
    return found


_POOL: dict[torch.device, list[Any]] = {}


def _streams(device: torch.device, count: int) -> list[Any]:
    pool = _POOL.setdefault(device, [])
    while len(pool) < count:
        pool.append(torch.cuda.Stream(device))
    return pool[:count]

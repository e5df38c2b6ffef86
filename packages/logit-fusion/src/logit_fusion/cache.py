"""One cache for all members: their keys and values, what each reads in its own prompt, and the evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from fusion_core.errors import InputError

__all__ = ["FusedCache"]


class FusedCache(Cache):
    """The members' caches, moved together by ``generate``: reordered with beams, cropped, repeated, selected.

    Its length counts the shared tokens; a member's own cache is longer by what its view adds. Only public
    methods of the members' caches are called.

    Args:
        configs: one configuration per lane (a module that some members run through).
        copies: how many blocks of rows each lane has: 1, or the number of adapters that share its pass.
    """

    def __init__(self, configs: Sequence[Any], copies: Sequence[int]) -> None:
        super().__init__(layers=[])
        self._configs = list(configs)
        self.lanes: list[Cache] = [DynamicCache(config=config) for config in configs]
        self.copies = list(copies)
        self.length = 0
        self.rows = 0
        # Per lane: the mask of what the member read in place of the first `dropped` shared tokens.
        self.leads: dict[int, tuple[Tensor, int]] = {}
        # Running log-likelihoods (rows, 1 + experts), the small members' last logits, and whether a token
        # stands before the next one; `trail` holds them for every position of the last pass, for `crop`.
        self.evidence: Tensor | None = None
        self.last_logits: list[Tensor] | None = None
        self.seen: Tensor | None = None
        self.trail: list[tuple[Tensor, list[Tensor], Tensor]] = []

    def __repr__(self) -> str:
        return f"FusedCache(length={self.length}, lanes={len(self.lanes)})"

    def __len__(self) -> int:
        return sum(len(lane) for lane in self.lanes)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Number of shared tokens read so far."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """-1: it grows."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """-1: it grows (the name that transformers had before 5.23)."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: its shapes change at every step."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.length > 0

    @property
    def is_croppable(self) -> bool:
        """Whether every member's cache can be put back."""
        return all(getattr(lane, "is_croppable", True) for lane in self.lanes)

    @property
    def is_sliding(self) -> list[bool]:
        """One entry per layer of every lane."""
        return [entry for lane in self.lanes for entry in lane.is_sliding]

    def activate_past_recording(self) -> None:
        """Tell the members' caches that they may be cropped."""
        for lane in self.lanes:
            if hasattr(lane, "activate_past_recording"):
                lane.activate_past_recording()

    def _state(self, change: Callable[[Tensor], Tensor]) -> None:
        self.leads = {n: (change(mask), drop) for n, (mask, drop) in self.leads.items()}
        if self.evidence is not None:
            self.evidence = change(self.evidence)
        if self.seen is not None:
            self.seen = change(self.seen)
        if self.last_logits is not None:
            self.last_logits = [change(entry) for entry in self.last_logits]
        self.trail = []

    def _blocks(self, indices: Tensor, copies: int) -> Tensor:
        """Row numbers of a lane with several blocks of rows."""
        return torch.cat([indices + block * self.rows for block in range(copies)]) if copies > 1 else indices

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue what row ``beam_idx[i]`` has read."""
        plans = [self._blocks(beam_idx, copies) for copies in self.copies]
        for lane, plan in zip(self.lanes, plans, strict=True):
            lane.reorder_cache(plan)  # pyright: ignore[reportArgumentType]
        self.rows = len(beam_idx)
        self._state(lambda entry: entry.index_select(0, beam_idx.to(entry.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        indices = torch.where(indices < 0, indices + self.rows, indices)
        plans = [self._blocks(indices, copies) for copies in self.copies]
        for lane, plan in zip(self.lanes, plans, strict=True):
            lane.batch_select_indices(plan)
        self.rows = len(indices)
        self._state(lambda entry: entry.index_select(0, indices.to(entry.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies side by side."""
        for lane in self.lanes:
            lane.batch_repeat_interleave(repeats)
        self.rows *= repeats
        self._state(lambda entry: entry.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back tokens of the last pass.

        Args:
            tokens_to_remove: a negative number takes that many away (as in every release of transformers 5);
                a positive one is the length to keep (as before 5.23).

        Raises:
            InputError: evidence that was gathered before the last pass would have to come back.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.length - tokens_to_remove, 0)
        if count == 0:
            return
        if self.evidence is not None:
            if count >= len(self.trail):
                raise InputError(
                    f"crop takes {count} tokens away, but evidence goes back {max(len(self.trail) - 1, 0)}"
                )
            self.trail = self.trail[: len(self.trail) - count]
            self.evidence, self.last_logits, self.seen = self.trail[-1]
        for lane in self.lanes:
            lane.crop(-count)
        self.length -= count

    def reset(self) -> None:
        """Forget everything."""
        # New ones: before transformers 5.23 a cache that was reset kept its length.
        self.lanes = [DynamicCache(config=config) for config in self._configs]
        self.length, self.rows, self.leads, self.trail = 0, 0, {}, []
        self.evidence = self.last_logits = self.seen = None

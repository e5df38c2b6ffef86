"""Distributions to learn from, as the few entries that are kept of each, and the batch that carries them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fusion_core.errors import ConfigError, ShapeError

Tail = Literal["none", "uniform"]


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """One model's distributions over the pivot's vocabulary for a batch of dialogues.

    Attributes:
        ids: (batch, tokens, k) pivot ids, -1 where there is no entry; one id may stand several times.
        logits: (batch, tokens, k) of the entries.
        mask: (batch, tokens) bool, True where the model has a distribution for the position.
        ce: (batch,) the model's mean cross-entropy in nats on each dialogue, NaN where it is not known.
        lse: (batch, tokens) logsumexp over the model's whole vocabulary, for ``tail="uniform"``.
        token_ce: (batch, tokens) cross-entropy at each position, for the choice per token.

    Raises:
        ShapeError: shapes that do not fit each other.
    """

    ids: Int64[Tensor, "batch tokens k"]
    logits: Float[Tensor, "batch tokens k"]
    mask: Bool[Tensor, "batch tokens"]
    ce: Float[Tensor, "batch"]
    lse: Float[Tensor, "batch tokens"] | None = None
    token_ce: Float[Tensor, "batch tokens"] | None = None

    def __post_init__(self) -> None:
        shapes = {
            f.name: tuple(getattr(self, f.name).shape)
            for f in fields(self)
            if getattr(self, f.name) is not None
        }
        head = shapes["mask"]
        wrong = shapes["ids"] != shapes["logits"] or shapes["ids"][:2] != head or shapes["ce"] != head[:1]
        if wrong or any(shapes.get(name, head) != head for name in ("lse", "token_ce")):
            raise ShapeError(
                f"targets have shapes {shapes}, wanted ids and logits (batch, tokens, k), mask, lse and "
                "token_ce (batch, tokens), ce (batch,)"
            )

    @classmethod
    def from_dense(cls, probs: Float[Tensor, "batch tokens classes"], ce: Float[Tensor, "batch"]) -> Self:
        """Targets that hold every class of dense probabilities.

        Example:
            >>> Targets.from_dense(torch.full((1, 2, 4), 0.25), torch.zeros(1)).ids.shape
            torch.Size([1, 2, 4])
        """
        ids = torch.arange(probs.shape[-1], device=probs.device).expand(probs.shape)
        mask = torch.ones(probs.shape[:2], dtype=torch.bool, device=probs.device)
        return cls(ids, probs.log(), mask, ce, torch.zeros_like(probs[..., 0]))

    def to(self, device: Any, *, non_blocking: bool = False) -> Self:
        """The same on another device."""
        moved = {f.name: _moved(getattr(self, f.name), device, non_blocking) for f in fields(self)}
        return replace(self, **moved)

    def filled(self, pivot: Targets | None) -> Targets:
        """Positions without any entry take the pivot's distribution, or are left out where there is none."""
        empty = self.mask & ~(self.ids >= 0).any(-1)
        if pivot is None:
            return replace(self, mask=self.mask & ~empty)
        a, b = padded((self, pivot))
        rows = empty[..., None]
        lse = None if a.lse is None or b.lse is None else torch.where(empty, b.lse, a.lse)
        return replace(
            a,
            ids=torch.where(rows, b.ids, a.ids),
            logits=torch.where(rows, b.logits, a.logits),
            mask=torch.where(empty, b.mask, a.mask),
            lse=lse,
        )

    def probabilities(
        self, temperature: float = 1.0, tail: Tail = "none"
    ) -> tuple[Float[Tensor, "batch tokens k"], Float[Tensor, "batch tokens"]]:
        """Probabilities of the entries, and the mass that belongs to none of them.

        Args:
            temperature: divides the logits, > 0.
            tail: ``"none"`` renormalizes over the entries; ``"uniform"`` keeps their true probabilities (by
                ``lse``) and tells how much is left for the rest of the vocabulary.

        Returns:
            (batch, tokens, k), 0 where there is no entry, and (batch, tokens). Rows without any entry are 0.

        Raises:
            ConfigError: ``tail="uniform"`` without ``lse`` or with a temperature other than 1.
        """
        kept = self.ids >= 0
        values = (self.logits / temperature).masked_fill(~kept, -torch.inf)
        if tail == "none":
            some = kept.any(-1, keepdim=True)
            probs = values.masked_fill(~some, 0.0).softmax(-1).masked_fill(~kept, 0.0)
            return probs, torch.zeros_like(probs[..., 0])
        if self.lse is None or temperature != 1.0:
            raise ConfigError(
                f'tail="uniform" with temperature {temperature} and lse '
                f"{'missing' if self.lse is None else 'given'}, wanted temperature 1 and the stored lse"
            )
        probs = (values - self.lse[..., None].to(values.dtype)).exp()
        mass = probs.sum(-1)
        probs = probs / mass.clamp(min=1.0)[..., None]  # logits in half precision may claim too much
        return probs, (1.0 - mass).clamp(min=0.0)


def padded(targets: tuple[Targets, ...]) -> tuple[Targets, ...]:
    """The same targets with equal numbers of entries, in the widest of their dtypes."""
    k = max(t.ids.shape[-1] for t in targets)
    dtype = targets[0].logits.dtype
    for t in targets:
        dtype = torch.promote_types(dtype, t.logits.dtype)
    more = torch.nn.functional.pad
    return tuple(
        replace(
            t,
            ids=more(t.ids, (0, k - t.ids.shape[-1]), value=-1),
            logits=more(t.logits.to(dtype), (0, k - t.ids.shape[-1]), value=-torch.inf),
        )
        for t in targets
    )


def coalesce(
    ids: Int64[Tensor, "... k"], probs: Float[Tensor, "... k"]
) -> tuple[Int64[Tensor, "... k"], Float[Tensor, "... k"]]:
    """Add up the probabilities of equal ids; what is freed becomes id -1 with probability 0.

    Example:
        >>> ids, probs = coalesce(torch.tensor([[4, 2, 4]]), torch.tensor([[0.5, 0.25, 0.25]]))
        >>> ids.tolist(), probs.tolist()
        ([[2, 4, -1]], [[0.25, 0.75, 0.0]])
    """
    order = torch.where(ids < 0, torch.iinfo(ids.dtype).max, ids).argsort(dim=-1, stable=True)
    ids, probs = ids.gather(-1, order), probs.gather(-1, order)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[..., 1:] = ids[..., 1:] != ids[..., :-1]
    place = new.long().cumsum(-1) - 1
    merged = torch.zeros_like(probs).scatter_add(-1, place, probs)
    return torch.full_like(ids, -1).scatter(-1, place, ids), merged


@dataclass(frozen=True, slots=True, eq=False)
class FusionBatch:
    """What the model takes, and what the loss compares its logits with.

    Attributes:
        inputs: for the model: ``input_ids`` and ``attention_mask``, (batch, tokens) int64.
        labels: (batch, tokens) int64, the token itself where the assistant wrote it, else -100.
        sources: one per source.
        pivot: the pivot's own distributions, or None.
        rows: (batch,) int64, place of each dialogue in the stores.
    """

    inputs: dict[str, Tensor]
    labels: Int64[Tensor, "batch tokens"]
    sources: tuple[Targets, ...]
    pivot: Targets | None = None
    rows: Int64[Tensor, "batch"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Targets]:
        return iter(self.candidates)

    @property
    def candidates(self) -> tuple[Targets, ...]:
        """The pivot, where it is there, and the sources."""
        return (*(() if self.pivot is None else (self.pivot,)), *self.sources)

    def to(self, device: Any, *, non_blocking: bool = False) -> FusionBatch:
        """The same on another device."""
        return FusionBatch(
            {name: _moved(value, device, non_blocking) for name, value in self.inputs.items()},
            _moved(self.labels, device, non_blocking),
            tuple(source.to(device, non_blocking=non_blocking) for source in self.sources),
            None if self.pivot is None else self.pivot.to(device, non_blocking=non_blocking),
            _moved(self.rows, device, non_blocking),
        )


def _moved(value: Any, device: Any, non_blocking: bool) -> Any:
    return None if value is None else value.to(device, non_blocking=non_blocking)

"""Which relabellings of a space keep a model's function: the table of symmetry groups.

A map is exact when applying it to every axis of its space leaves the function unchanged. The spec of a model
says which tensors those are; this file says which relabellings are allowed.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ot_fusion.errors import SpecError

__all__ = ["Blocks", "Frozen", "Full", "Group", "Heads", "heads_element"]


class Group(ABC):
    """The relabellings of a space that leave the function unchanged.

    An element is a dict from view to an index vector: with ``index = element[view]``, the relabelled axis is
    ``axis[index]``, so coordinate ``j`` of the new order is coordinate ``index[j]`` of the old one. Where
    more than relabelling is exact (a common rotation of a rotary pair), the entry is an orthogonal matrix
    ``R`` and the axis becomes ``axis @ R``.
    """

    @abstractmethod
    def views(self) -> dict[str, int]:
        """Each view of the space and its size."""

    @abstractmethod
    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A random element."""

    def identity(self) -> dict[str, Tensor]:
        """The element that changes nothing."""
        return {view: torch.arange(size) for view, size in self.views().items()}

    def contains(self, element: dict[str, Tensor]) -> bool:
        """Whether index vectors, one per view, form an element."""
        return all(
            len(element[view]) == size and bool((element[view].sort().values == torch.arange(size)).all())
            for view, size in self.views().items()
        )


@dataclass(frozen=True, slots=True)
class Full(Group):
    """All permutations of ``size`` coordinates: hidden layers, residual streams, channels, gated units.

    Example:
        >>> Full(3).contains({"": torch.tensor([2, 0, 1])})
        True
    """

    size: int

    def views(self) -> dict[str, int]:
        """Each view of the space and its size."""
        return {"": self.size}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A uniformly random permutation."""
        return {"": torch.randperm(self.size, generator=generator)}


@dataclass(frozen=True, slots=True)
class Frozen(Group):
    """Coordinates that stay where they are: classes, vocabulary, pixels, positions.

    Example:
        >>> Frozen(2).contains({"": torch.tensor([1, 0])})
        False
    """

    size: int

    def views(self) -> dict[str, int]:
        """Each view of the space and its size."""
        return {"": self.size}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ARG002
        """The identity."""
        return self.identity()

    def contains(self, element: dict[str, Tensor]) -> bool:
        """Whether it is the identity."""
        return bool((element[""] == torch.arange(self.size)).all())


@dataclass(frozen=True, slots=True)
class Blocks(Group):
    """``count`` blocks of ``size``.

    Blocks change places, and coordinates within each (grouped convolutions, GroupNorm).

    Example:
        >>> Blocks(2, 2).contains({"": torch.tensor([3, 2, 0, 1])})
        True
        >>> Blocks(2, 2).contains({"": torch.tensor([0, 2, 1, 3])})
        False
    """

    count: int
    size: int

    def views(self) -> dict[str, int]:
        """Each view of the space and its size."""
        return {"": self.count * self.size}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A random order of blocks and a random order within each."""
        blocks = torch.randperm(self.count, generator=generator)
        inner = torch.stack([torch.randperm(self.size, generator=generator) for _ in range(self.count)])
        return {"": (blocks[:, None] * self.size + inner).flatten()}

    def contains(self, element: dict[str, Tensor]) -> bool:
        """Whether blocks stay together."""
        blocks = element[""].view(self.count, self.size) // self.size
        return Full(self.count * self.size).contains(element) and bool((blocks == blocks[:, :1]).all())


@dataclass(frozen=True, slots=True)
class Heads(Group):
    """The channels of an attention layer.

    Key-value groups, the query heads of each, and channels inside a head.

    Views: ``q`` and ``k`` (rows of the query and key projections), ``v`` (rows of the value projection),
    ``o`` (columns of the output projection) and, where queries and keys are normalised per head, ``qk_norm``.

    Attributes:
        kv: key-value heads; as many as query heads without grouping.
        ratio: query heads per key-value head.
        dim: channels of a query or key head.
        value_dim: channels of a value head; ``dim`` where None.
        qk: ``full``: any order inside a head; ``rotary``: none, but common rotations of the pairs that turn
            together; ``frozen``: none at all.
        rotary: how many leading channels turn (partial rotary embeddings); the others are free. None: all.
        layout: pairs are ``half`` (i, i + rotary/2) or ``interleaved`` (2i, 2i+1).
        norm: queries and keys are normalised per ``head`` by one weight of size ``dim`` (so one order for all
            heads and no rotation), over ``all`` channels (no rotation), or not (``none``).
        heads: ``frozen`` where heads have constants of their own (ALiBi).
    """

    kv: int
    ratio: int
    dim: int
    value_dim: int | None = None
    qk: Literal["full", "rotary", "frozen"] = "full"
    rotary: int | None = None
    layout: Literal["half", "interleaved"] = "half"
    norm: Literal["none", "head", "all"] = "none"
    heads: Literal["free", "frozen"] = "free"

    def __post_init__(self) -> None:
        if min(self.kv, self.ratio, self.dim) < 1 or self.turning % 2:
            raise SpecError(
                f"heads have kv={self.kv}, ratio={self.ratio}, dim={self.dim}, rotary={self.rotary}; wanted "
                "positive numbers and an even number of rotary channels"
            )

    @property
    def width(self) -> int:
        """Channels of a value head."""
        return self.dim if self.value_dim is None else self.value_dim

    @property
    def turning(self) -> int:
        """Channels of a head that rotary embeddings turn."""
        return 0 if self.qk == "full" else (self.dim if self.rotary is None else self.rotary)

    def views(self) -> dict[str, int]:
        """Each view of the space and its size."""
        sizes = {
            "q": self.kv * self.ratio * self.dim,
            "k": self.kv * self.dim,
            "v": self.kv * self.width,
            "o": self.kv * self.ratio * self.width,
        }
        return sizes | ({"qk_norm": self.dim} if self.norm == "head" else {})

    def inner_orders(self, generator: torch.Generator) -> Tensor:
        """Random legal orders of the channels of each query-key head, ``(kv, dim)``."""
        fixed = torch.arange(self.turning)

        def one() -> Tensor:
            rest = self.turning + torch.randperm(self.dim - self.turning, generator=generator)
            return torch.cat([fixed, rest])

        return (
            one().expand(self.kv, -1) if self.norm == "head" else torch.stack([one() for _ in range(self.kv)])
        )

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A random order of groups, heads and channels; rotary pairs are turned where that is exact."""
        free = self.heads == "free"
        groups = torch.randperm(self.kv, generator=generator) if free else torch.arange(self.kv)
        queries = torch.stack(
            [
                torch.randperm(self.ratio, generator=generator) if free else torch.arange(self.ratio)
                for _ in range(self.kv)
            ]
        )
        values = torch.stack([torch.randperm(self.width, generator=generator) for _ in range(self.kv)])
        element = heads_element(self, groups, queries, self.inner_orders(generator), values)
        if self.qk == "rotary" and self.norm == "none":
            angles = (
                torch.rand(self.kv, self.turning // 2, generator=generator, dtype=torch.float64)
                * 2
                * torch.pi
            )
            turn = self.rotation(angles)
            for view, repeat in (("q", self.ratio), ("k", 1)):
                blocks = turn.repeat_interleave(repeat, 0)
                size = len(element[view])
                order = torch.zeros(size, size, dtype=torch.float64)
                order[element[view], torch.arange(size)] = 1
                element[view] = order @ torch.block_diag(*blocks)
        return element

    def rotation(self, angles: Tensor) -> Tensor:
        """Rotations of each key-value head, ``(kv, dim, dim)``, from angles ``(kv, turning / 2)``."""
        half = self.turning // 2
        pairs = torch.arange(half)
        first, second = (pairs, pairs + half) if self.layout == "half" else (2 * pairs, 2 * pairs + 1)
        turn = torch.eye(self.dim, dtype=angles.dtype).repeat(self.kv, 1, 1)
        turn[:, first, first] = turn[:, second, second] = angles.cos()
        turn[:, first, second], turn[:, second, first] = angles.sin(), -angles.sin()
        return turn

    def contains(self, element: dict[str, Tensor]) -> bool:
        """Whether heads stay whole, views agree, and rotary channels keep their places."""
        k, q = element["k"].view(self.kv, self.dim), element["q"].view(self.kv, self.ratio, self.dim)
        v, o = element["v"].view(self.kv, self.width), element["o"].view(self.kv, self.ratio, self.width)
        groups, inner, values = k[:, 0] // self.dim, k % self.dim, v % self.width
        queries = (q[:, :, 0] // self.dim) - groups[:, None] * self.ratio
        try:
            wanted = heads_element(self, groups, queries, inner, values)
        except IndexError:
            return False
        fixed = torch.arange(self.turning)
        return (
            Full(self.kv).contains({"": groups})
            and all(Full(self.ratio).contains({"": row}) for row in queries)
            and all(bool((wanted[view] == element[view]).all()) for view in self.views())
            and bool((inner[:, : self.turning] == fixed).all())
            and (
                self.heads == "free"
                or bool(
                    (groups == torch.arange(self.kv)).all() and (queries == torch.arange(self.ratio)).all()
                )
            )
            and (self.norm != "head" or bool((inner == inner[:1]).all()))
            and o.numel() == wanted["o"].numel()
        )


def heads_element(
    group: Heads, groups: Tensor, queries: Tensor, inner: Tensor, values: Tensor
) -> dict[str, Tensor]:
    """The index vectors of an attention layer from its orders.

    Args:
        group: the layer.
        groups: old key-value head of each new one, ``(kv,)``.
        queries: old query head, within its group, of each new one, ``(kv, ratio)``.
        inner: old query-key channel of each new one, ``(kv, dim)``.
        values: old value channel of each new one, ``(kv, value_dim)``.

    Example:
        >>> layer = Heads(kv=2, ratio=1, dim=2)
        >>> keep = torch.arange(2).expand(2, -1)
        >>> heads_element(layer, torch.tensor([1, 0]), torch.zeros(2, 1, dtype=torch.long), keep, keep)["q"]
        tensor([2, 3, 0, 1])
    """
    heads = groups[:, None] * group.ratio + queries
    element = {
        "q": (heads[:, :, None] * group.dim + inner[:, None, :]).flatten(),
        "k": (groups[:, None] * group.dim + inner).flatten(),
        "v": (groups[:, None] * group.width + values).flatten(),
        "o": (heads[:, :, None] * group.width + values[:, None, :]).flatten(),
    }
    return element | ({"qk_norm": inner[0].clone()} if group.norm == "head" else {})

"""The merging methods over a whole checkpoint: what each has to measure first, and how it joins a chunk.

Sums run in float64 over fixed blocks of 2^16 elements, added in order, so results do not depend on chunks or
workers.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fusechat.merge import formulas
from fusechat.merge.formulas import Measure, Variant
from fusion_core.errors import InputError
from fusion_core.seeding import rng

__all__ = [
    "BLOCK",
    "Chunk",
    "Dare",
    "Level",
    "Linear",
    "Rule",
    "Sce",
    "TaskArithmetic",
    "Ties",
    "Varm",
]

BLOCK = 1 << 16
ROW = 1 << 10
Level = Literal["matrix", "module", "layer", "model", "element"]
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.(.*)$")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one tensor of all checkpoints, flat, in the working dtype.

    Attributes:
        start: place of its first element in the flat tensor; a whole number of blocks.
        base: the pivot's entries.
        targets: the targets', ``(targets, entries)``.
    """

    start: int
    base: Tensor
    targets: Tensor
    _made: list[Tensor] = field(default_factory=list[Tensor], repr=False)

    @property
    def deltas(self) -> Tensor:
        """Differences of the targets to the pivot, made once."""
        if not self._made:
            self._made.append(self.targets - self.base)
        return self._made[0]

    def only_deltas(self) -> Chunk:
        """The same without the targets, which give their memory to the differences."""
        return Chunk(self.start, self.base, self.targets[:0], [self.targets.sub_(self.base)])


Chunks = Callable[[], Iterator[Chunk]]


def block_sums(values: Tensor) -> Tensor:
    """Sums along the last axis, in float64, block by block in order: ``(..., entries)`` -> ``(...)``."""
    total = torch.zeros(values.shape[:-1], dtype=torch.float64)
    for part in values.split(BLOCK, -1):
        total = total + part.double().sum(-1)
    return total


def square_sums(values: Tensor) -> Tensor:
    """Sums of squares of each block along the last axis, in float64 but for rows of ``ROW`` entries.

    Args:
        values: (..., entries), whole blocks but for the last.

    Returns:
        (blocks, ...) float64.
    """
    count = values.shape[-1]
    whole = count // BLOCK * BLOCK
    norms = torch.linalg.vector_norm(values[..., :whole].unflatten(-1, (-1, BLOCK // ROW, ROW)), dim=-1)
    blocks = norms.double().square_().sum(-1).movedim(-1, 0)
    if whole == count:
        return blocks
    rest = torch.linalg.vector_norm(values[..., whole:], dim=-1, dtype=torch.float64)
    return torch.cat([blocks, rest.square().unsqueeze(0)])


def _vector(weights: Sequence[float] | None, count: int) -> Tensor:
    return (
        torch.full((count,), 1.0, dtype=torch.float64)
        if weights is None
        else torch.tensor(weights, dtype=torch.float64)
    )


class Rule(ABC):
    """A merging method."""

    name: str
    needs_base = True
    needs_targets = True
    """Whether the targets themselves are looked at, not only their differences to the pivot."""

    def check(self, count: int) -> None:
        """Refuse settings that do not fit the number of targets.

        Raises:
            InputError: weights of another number.
        """
        weights = getattr(self, "weights", None)
        if weights is not None and len(weights) != count:
            raise InputError(f"weights has {len(weights)} entries, wanted one for each of {count} targets")
        if weights is not None and not all(math.isfinite(w) for w in weights):
            raise InputError(f"weights is {list(weights)}, wanted finite numbers")

    def prepare(self, chunks: Mapping[str, Chunks], sizes: Mapping[str, int]) -> None:  # noqa: B027
        """Measure over several tensors, where the method needs it."""

    @abstractmethod
    def measure(self, key: str, chunks: Chunks, size: int, count: int) -> Any:
        """What :meth:`join` needs to know of a whole tensor."""

    @abstractmethod
    def join(self, key: str, state: Any, chunk: Chunk) -> Tensor:
        """The merged entries of a chunk."""

    def told(self, state: Any) -> list[float] | None:
        """The weights of a tensor, for the report."""
        return state.tolist() if isinstance(state, Tensor) else None


@dataclass
class Linear(Rule):
    """``sum w_j theta_j / sum w_j``."""

    weights: Sequence[float] | None = None
    normalize: bool = True
    name = "linear"
    needs_base = False

    def measure(self, key: str, chunks: Chunks, size: int, count: int) -> Tensor:  # noqa: ARG002
        """The weights."""
        return _vector(self.weights, count)

    def join(self, key: str, state: Tensor, chunk: Chunk) -> Tensor:  # noqa: ARG002
        """The weighted mean."""
        return formulas.linear(chunk.targets, state, normalize=self.normalize)


@dataclass
class TaskArithmetic(Rule):
    """``theta + lam sum w_j delta_j``."""

    weights: Sequence[float] | None = None
    lam: float = 1.0
    normalize: bool = False
    name = "task_arithmetic"
    needs_targets = False

    def measure(self, key: str, chunks: Chunks, size: int, count: int) -> Tensor:  # noqa: ARG002
        """The weights."""
        return _vector(self.weights, count)

    def join(self, key: str, state: Tensor, chunk: Chunk) -> Tensor:  # noqa: ARG002
        """The pivot and the scaled sum."""
        return formulas.task_arithmetic(
            chunk.base, chunk.deltas, state, lam=self.lam, normalize=self.normalize
        )


@dataclass
class Varm(Rule):
    """Variation-ratio merging at one of five levels."""

    level: Level = "matrix"
    measure_of: Measure = "square"
    softmax: bool = False
    temperature: float = 1.0
    outside: Literal["matrix", "uniform"] = "matrix"
    zero: Literal["ratio", "uniform"] = "ratio"
    floor: float | None = None
    name = "varm"
    groups: dict[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    def group(self, key: str) -> str:
        """The group of a tensor: itself, its module, its layer, or the whole model."""
        if self.level == "model":
            return "model"
        found = LAYER.search(key)
        if found is None or self.level in ("matrix", "element"):
            return key
        if self.level == "layer":
            return f"layer {found[1]}"
        return f"layer {found[1]}.{found[2].partition('.')[0]}"

    def prepare(self, chunks: Mapping[str, Chunks], sizes: Mapping[str, int]) -> None:
        """Sum the changes of the tensors of every group."""
        if self.level in ("matrix", "element"):
            return
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for key, read in chunks.items():
            group = self.group(key)
            total = _changes(read, self.measure_of)
            part = total if self.level == "model" else total / max(sizes[key], 1)
            sums[group] = sums[group] + part if group in sums else part
            counts[group] = counts.get(group, 0) + sizes[key]
        if self.level == "model":
            sums = {group: total / max(counts[group], 1) for group, total in sums.items()}
        self.groups = sums

    def measure(self, key: str, chunks: Chunks, size: int, count: int) -> Tensor | None:
        """The weights of the tensor's group; None at the level of elements."""
        if self.level == "element":
            return None
        group = self.group(key)
        alone = group == key and self.level in ("layer", "module")
        if alone and self.outside == "uniform":
            return torch.full((count,), 1 / count, dtype=torch.float64)
        means = self.groups.get(group) if not (alone or self.level == "matrix") else None
        if means is None:
            means = _changes(chunks, self.measure_of) / max(size, 1)
        if self.zero == "uniform" and bool((means == 0).any()):
            return torch.full((count,), 1 / count, dtype=torch.float64)
        return formulas.varm_weights(means, softmax=self.softmax, temperature=self.temperature)

    def join(self, key: str, state: Tensor | None, chunk: Chunk) -> Tensor:  # noqa: ARG002
        """The weighted mean of the targets."""
        if state is None:
            return formulas.varm_element(
                chunk.targets, chunk.deltas, measure=self.measure_of, floor=self.floor
            )
        return formulas.linear(chunk.targets, state, normalize=False)


def _changes(chunks: Chunks, measure: Measure) -> Tensor:
    total: Tensor | None = None
    for chunk in chunks():
        for start in range(0, chunk.base.numel(), BLOCK):
            piece = chunk.deltas[:, start : start + BLOCK].double()
            part = formulas.change(piece, measure).sum(-1)
            total = part if total is None else total + part
    return torch.zeros(0, dtype=torch.float64) if total is None else total


@dataclass
class Sce(Rule):
    """Select, calculate, erase, in four forms."""

    tau: float = 0.1
    variant: Variant = "paper"
    normalize: bool = True
    name = "sce"
    needs_targets = False

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise InputError(f"tau is {self.tau}, wanted a kept share > 0; 1 keeps all")
        if self.variant not in ("paper", "fusechat", "mergekit"):
            raise InputError(f"variant is {self.variant!r}, wanted paper, fusechat or mergekit")

    def measure(self, key: str, chunks: Chunks, size: int, count: int) -> tuple[Tensor, Tensor | None, bool]:  # noqa: ARG002
        """Weights, what is kept, and whether anything is."""
        keep, some = self._selected(chunks, size)
        squares = torch.zeros(count, dtype=torch.float64)
        for chunk in chunks():
            deltas = chunk.deltas
            if keep is not None:
                deltas = deltas * keep[chunk.start : chunk.start + chunk.base.numel()]
            for part in square_sums(deltas):  # in this order under any chunking
                squares = squares + part
        return formulas.sce_weights(squares, variant=self.variant, count=max(size, 1)), keep, some

    def _selected(self, chunks: Chunks, size: int) -> tuple[Tensor | None, bool]:
        if self.tau >= 1:
            return None, True
        sigma: Tensor | None = None
        for chunk in chunks():
            part = formulas.variance(chunk.deltas)
            if sigma is None:
                sigma = torch.empty(size, dtype=part.dtype)
            sigma[chunk.start : chunk.start + len(part)] = part
        if sigma is None:
            return None, True
        varying = int((sigma > 0).sum())
        if varying == 0:
            return None, True
        kept = math.floor(self.tau * varying + 1e-9)
        return formulas.largest(sigma, kept), kept > 0

    def join(self, key: str, state: tuple[Tensor, Tensor | None, bool], chunk: Chunk) -> Tensor:  # noqa: ARG002
        """The pivot and the agreeing deltas."""
        weights, keep, some = state
        if not some and self.variant != "fusechat":
            return chunk.base
        part = None if keep is None else keep[chunk.start : chunk.start + chunk.base.numel()]
        return formulas.sce_merge(
            chunk.base, chunk.deltas, weights, part, variant=self.variant, normalize=self.normalize
        )

    def told(self, state: tuple[Tensor, Tensor | None, bool]) -> list[float]:
        """The weights."""
        return state[0].tolist()


def _checked_density(density: float) -> None:
    if not 0 < density <= 1:
        raise InputError(f"density is {density}, wanted a kept share in (0, 1]")


@dataclass
class Ties(Rule):
    """Trim, elect sign, disjoint mean."""

    density: float = 0.6
    weights: Sequence[float] | None = None
    lam: float = 1.0
    normalize: bool = True
    name = "ties"

    def __post_init__(self) -> None:
        _checked_density(self.density)

    def measure(self, key: str, chunks: Chunks, size: int, count: int) -> tuple[Tensor, list[Tensor] | None]:  # noqa: ARG002
        """Weights, and what each target keeps."""
        weights = _vector(self.weights, count)
        if self.density >= 1:
            return weights, None
        masks: list[Tensor] = []
        for number in range(count):  # one target at a time: one magnitude per element is held
            size_of = torch.empty(size, dtype=torch.float32)
            for chunk in chunks():
                part = (chunk.targets[number] - chunk.base).abs()
                size_of[chunk.start : chunk.start + len(part)] = part
            masks.append(formulas.largest(size_of, math.floor(self.density * size + 1e-9)))
        return weights, masks

    def join(self, key: str, state: tuple[Tensor, list[Tensor] | None], chunk: Chunk) -> Tensor:  # noqa: ARG002
        """The pivot and the agreeing mean."""
        weights, masks = state
        deltas = chunk.deltas
        if masks is not None:
            place = slice(chunk.start, chunk.start + chunk.base.numel())
            deltas = deltas * torch.stack([mask[place] for mask in masks])
        return formulas.ties_merge(chunk.base, deltas, weights, lam=self.lam, normalize=self.normalize)

    def told(self, state: tuple[Tensor, list[Tensor] | None]) -> list[float]:
        """The weights."""
        return state[0].tolist()


@dataclass
class Dare(Rule):
    """Drop and rescale, then a linear sum or TIES' election.

    The mask hangs on seed, tensor and target alone.
    """

    density: float = 0.6
    weights: Sequence[float] | None = None
    lam: float = 1.0
    normalize: bool = True
    rescale: Literal["density", "l1"] = "density"
    consensus: Literal["linear", "ties"] = "ties"
    seed: int = 0
    name = "dare"
    needs_targets = False

    def __post_init__(self) -> None:
        _checked_density(self.density)
        if self.rescale not in ("density", "l1") or self.consensus not in ("linear", "ties"):
            raise InputError(
                f"rescale is {self.rescale!r} and consensus {self.consensus!r}, wanted density or l1, linear "
                "or ties"
            )

    def mask(self, key: str, target: int, start: int, count: int) -> Tensor:
        """What a target keeps of some entries, which begin at a block."""
        blocks = range(start // BLOCK, (start + count - 1) // BLOCK + 1)
        parts = [rng(self.seed, key, target, block).random(BLOCK) < self.density for block in blocks]
        return torch.from_numpy(np.concatenate(parts)[:count]) if parts else torch.zeros(0, dtype=torch.bool)

    def _dropped(self, key: str, chunk: Chunk, norms: list[tuple[float, float]] | None) -> Tensor:
        deltas = chunk.deltas
        return torch.stack(
            [
                formulas.dare_rescale(
                    delta,
                    self.mask(key, j, chunk.start, len(delta)),
                    self.density,
                    rescale=self.rescale,
                    norms=None if norms is None else norms[j],
                )
                for j, delta in enumerate(deltas)
            ]
        )

    def measure(
        self,
        key: str,
        chunks: Chunks,
        size: int,  # noqa: ARG002
        count: int,
    ) -> tuple[Tensor, list[tuple[float, float]] | None]:
        """Weights, and the norms that the rescaling keeps."""
        weights = _vector(self.weights, count)
        if self.rescale == "density":
            return weights, None
        whole, left = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for chunk in chunks():
            sizes = chunk.deltas.abs()
            masks = torch.stack([self.mask(key, j, chunk.start, sizes.shape[1]) for j in range(count)])
            for part, mask in zip(sizes.split(BLOCK, -1), masks.split(BLOCK, -1), strict=True):
                whole, left = whole + part.double().sum(-1), left + (part.double() * mask).sum(-1)
        return weights, list(zip(whole.tolist(), left.tolist(), strict=True))

    def join(self, key: str, state: tuple[Tensor, list[tuple[float, float]] | None], chunk: Chunk) -> Tensor:
        """The pivot and what is left."""
        weights, norms = state
        deltas = self._dropped(key, chunk, norms)
        if self.consensus == "ties":
            return formulas.ties_merge(chunk.base, deltas, weights, lam=self.lam, normalize=self.normalize)
        return formulas.task_arithmetic(chunk.base, deltas, weights, lam=self.lam, normalize=self.normalize)

    def told(self, state: tuple[Tensor, Any]) -> list[float]:
        """The weights."""
        return state[0].tolist()

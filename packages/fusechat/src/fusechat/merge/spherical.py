"""Spherical interpolation over a checkpoint, with shares that may run over the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusechat.merge import formulas
from fusechat.merge.rules import BLOCK, LAYER, Chunk, Chunks, Rule
from fusion_core.errors import InputError

__all__ = ["Gradient", "Slerp"]

Gradient = float | Sequence[float] | Mapping[str, float | Sequence[float]]


@dataclass
class Slerp(Rule):
    """Spherical interpolation of two targets; ``t`` may run over the depth, by filters on names."""

    t: Gradient = 0.5
    layers: int | None = None
    name = "slerp"
    needs_base = False

    def check(self, count: int) -> None:
        """Refuse another number of targets than two, or ``t`` outside [0, 1].

        Raises:
            InputError: names what was given.
        """
        if count != 2:
            raise InputError(f"slerp interpolates two targets, got {count}")
        entries = list(self.t.values()) if isinstance(self.t, Mapping) else [self.t]
        numbers = [x for entry in entries for x in (entry if isinstance(entry, Sequence) else [entry])]
        if not numbers or not all(0 <= float(x) <= 1 for x in numbers):
            raise InputError(f"t is {self.t}, wanted numbers in [0, 1]")

    def prepare(self, chunks: Mapping[str, Chunks], sizes: Mapping[str, int]) -> None:  # noqa: ARG002
        """Count the layers."""
        found = [int(match[1]) for key in chunks if (match := LAYER.search(key))]
        self.layers = max(found) + 1 if found else 1

    def at(self, key: str) -> float:
        """``t`` of a tensor: the first filter that its name holds, then its layer on the gradient."""
        value: Any = self.t
        if isinstance(value, Mapping):
            value = next(
                (v for k, v in value.items() if k and k != "default" and k in key),
                value.get("default", value.get("", 0.5)),
            )
        if not isinstance(value, Sequence):
            return float(value)
        found = LAYER.search(key)
        places = np.linspace(0, 1, len(value))
        depth = int(found[1]) / max((self.layers or 1) - 1, 1) if found else 0.5
        return float(np.interp(depth, places, value))

    def measure(self, key: str, chunks: Chunks, size: int, count: int) -> tuple[float, list[float]]:  # noqa: ARG002
        """``t`` and the products of the whole tensors."""
        products = torch.zeros(3, dtype=torch.float64)
        for chunk in chunks():
            for part in chunk.targets.split(BLOCK, -1):
                a, b = part.double()
                products = products + torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum()])
        return self.at(key), products.tolist()

    def join(self, key: str, state: tuple[float, list[float]], chunk: Chunk) -> torch.Tensor:  # noqa: ARG002
        """The interpolated entries."""
        return formulas.slerp(chunk.targets[0], chunk.targets[1], state[0], products=state[1])

    def told(self, state: tuple[float, list[float]]) -> list[float]:
        """Shares of both."""
        return [1 - state[0], state[0]]

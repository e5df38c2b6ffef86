"""Which relabellings of a space keep a model's function: the table of symmetry groups."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Full", "Group"]


class Group(ABC):
    """The relabellings of a space that leave the function unchanged.

    An element is a dict from view to an index vector: with ``index = element[view]``, the relabelled axis is
    ``axis[index]``, so coordinate ``i`` of the new order is coordinate ``index[i]`` of the old one.
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


@dataclass(frozen=True, slots=True)
class Full(Group):
    """All permutations of ``size`` coordinates (hidden layers, residual streams, channels)."""

    size: int

    def views(self) -> dict[str, int]:
        """Each view of the space and its size."""
        return {"": self.size}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A uniformly random permutation."""
        return {"": torch.randperm(self.size, generator=generator)}

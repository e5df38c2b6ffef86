"""Every random number of an attack, from one generator of its own, in a fixed order; or from a record.

Order of a run: start noise; random targets; then per step the partners of Admix, for each surrogate in turn
r, top, left and u of the resize, again for the candidates where these are transformed, and the neighbours of
the variance term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Resize = tuple[int, int, int, float]


def proportional(side: int, height: int, width: int) -> int:
    """The width that goes with another height: ``side * width / height``, rounded, at least 1.

    Example:
        >>> proportional(20, 24, 48)
        40
    """
    return side if height == width else max(1, round(side * width / height))


class Draws:
    """Draws from a generator.

    Args:
        generator: on any device; one on the CPU never stalls an accelerator.

    Example:
        >>> draws = Draws(torch.Generator().manual_seed(0))
        >>> r, top, left, u = draws.resize((21, 23), 24, (24, 24), step=0, surrogate=0)
        >>> 21 <= r <= 23 and 0 <= top <= 24 - r - 1 + (r == 24) and 0 <= u < 1
        True
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def _integer(self, low: int, high: int) -> int:
        """Uniform in [low, high]; low where the interval is empty."""
        if high <= low:
            return low
        place = self.generator.device
        return int(torch.randint(low, high + 1, (1,), generator=self.generator, device=place).item())

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape, dtype and device of ``like``: the start noise."""
        made, place = self.generator, self.generator.device
        return torch.randn(like.shape, generator=made, dtype=like.dtype, device=place).to(like.device)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers in [-1, 1): the start of a projected gradient run."""
        made, place = self.generator, self.generator.device
        unit = torch.rand(like.shape, generator=made, dtype=like.dtype, device=place)
        return unit.to(like.device) * 2 - 1

    def resize(
        self,
        sides: tuple[int, int],
        canvas: int,
        shape: tuple[int, int],
        *,
        step: int,  # noqa: ARG002 - for records
        surrogate: int,  # noqa: ARG002
    ) -> Resize:
        """One draw of the input diversity: r in ``sides``, then top, left in what is free, then u in [0, 1).

        Args:
            sides: least and largest height to resize to.
            canvas: height after padding.
            shape: height and width of the image; a width differs from the height in proportion.
            step: number of the step, for records.
            surrogate: number of the surrogate, for records.
        """
        height, width = shape
        r = self._integer(*sides)
        wide, room = proportional(r, height, width), proportional(canvas, height, width)
        top = self._integer(0, canvas - r - 1)
        left = self._integer(0, room - wide - 1)
        place = self.generator.device
        return r, top, left, float(torch.rand(1, generator=self.generator, device=place).item())

    def partners(self, batch: int, count: int) -> Int64[Tensor, "count batch"]:
        """For each image ``count`` other images of the batch; itself where it is alone."""
        place = self.generator.device
        shift = torch.zeros(count, batch, dtype=torch.int64, device=place)
        if batch > 1:
            shift = torch.randint(1, batch, (count, batch), generator=self.generator, device=place)
        return (torch.arange(batch, device=place) + shift) % batch

    def neighbour(
        self,
        like: Tensor,
        radius: float,
        *,
        step: int,  # noqa: ARG002 - for records
        number: int,  # noqa: ARG002
    ) -> Tensor:
        """Uniform offsets in [-radius, radius) of the shape of ``like``."""
        return self.uniform(like) * radius


class Recorded(Draws):
    """Draws that were written down, for repeating a run; those that were not come from the generator.

    Args:
        generator: for what was not recorded.
        noise: start noise of the images' shape.
        resizes: ``(steps, surrogates, 4)`` of r, top, left, u.
        neighbours: ``(steps, neighbours, batch, channels, height, width)`` offsets.
    """

    def __init__(
        self,
        generator: torch.Generator,
        *,
        noise: Float[Tensor, "batch channels height width"] | None = None,
        resizes: Sequence[Sequence[Sequence[float]]] | None = None,
        neighbours: Float[Tensor, "steps count batch channels height width"] | None = None,
    ) -> None:
        super().__init__(generator)
        self.noise, self.resizes, self.neighbours = noise, resizes, neighbours

    def normal(self, like: Tensor) -> Tensor:
        """The recorded noise."""
        return super().normal(like) if self.noise is None else self.noise.to(like)

    def resize(
        self, sides: tuple[int, int], canvas: int, shape: tuple[int, int], *, step: int, surrogate: int
    ) -> Resize:
        """The recorded draw of that step and surrogate."""
        if self.resizes is None:
            return super().resize(sides, canvas, shape, step=step, surrogate=surrogate)
        r, top, left, u = self.resizes[step][surrogate]
        return int(r), int(top), int(left), float(u)

    def neighbour(self, like: Tensor, radius: float, *, step: int, number: int) -> Tensor:
        """The recorded offsets of that step."""
        if self.neighbours is None:
            return super().neighbour(like, radius, step=step, number=number)
        return self.neighbours[step, number].to(like)

"""The paper's grid of alphas."""

from __future__ import annotations

import math
from typing import NamedTuple


class Grid(NamedTuple):
    """Nodes at which the objective is evaluated.

    Attributes:
        places: the alphas, growing.
        spacing: between them; the last cell may be narrower.
        even: whether it is not.
    """

    places: tuple[float, ...]
    spacing: float
    even: bool


def make_grid(low: float, high: float, step: float) -> Grid:
    """``low + j * step`` up to ``high``, which is always the last node.

    Args:
        low: first node.
        high: last node; where it is no multiple of the step the last cell is narrower.
        step: spacing.

    Example:
        >>> make_grid(0.0, 0.5, 0.2)
        Grid(places=(0.0, 0.2, 0.4, 0.5), spacing=0.2, even=False)
    """
    count = math.floor((high - low) / step + 1e-6)
    places = [min(low + j * step, high) for j in range(count + 1)]
    even = high - places[-1] <= 1e-6 * step
    if not even:
        places.append(high)
    return Grid(tuple(places), step, even)

"""Which tokens of a text that is too long are kept: fairly shared, or the authors' cut of the end."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusion_core.errors import ConfigError, ShapeError

__all__ = ["balanced", "keep", "share", "tail"]

Ints = NDArray[np.int64]


def share(first: Ints, second: Ints, budget: Ints) -> tuple[Ints, Ints]:
    """Split a budget between two equally; what one does not need goes to the other.

    Args:
        first: (N,) tokens that the first has.
        second: (N,) tokens that the second has.
        budget: (N,) tokens for both.

    Returns:
        (N,) and (N,): tokens kept of each; their sum is min(first + second, budget).

    Example:
        >>> [int(x[0]) for x in share(np.array([3]), np.array([20]), np.array([10]))]
        [3, 7]
    """
    half = (budget + 1) // 2
    one = np.minimum(first, np.maximum(half, budget - second))
    return one, np.minimum(second, budget - one)


def balanced(lengths: ArrayLike, limit: int) -> Ints:
    """Tokens kept of text, caption, first and second rationale.

    The text and the caption stay whole, unless they take more than half of the length and the rationales need
    the rest; the rationales share what is left.

    Args:
        lengths: (N, 4) tokens of each field; 0 where there is none.
        limit: most tokens of all four.

    Returns:
        (N, 4), each at most its length; rows sum to min(sum of lengths, limit).

    Example:
        >>> balanced([[10, 10, 100, 50]], 100).tolist()
        [[10, 10, 40, 40]]
    """
    size = _lengths(lengths, limit)
    head, debate = size[:, :2].sum(1), size[:, 2:].sum(1)
    for_head = np.minimum(head, np.maximum(limit // 2, limit - debate))
    text, caption = share(size[:, 0], size[:, 1], for_head)
    one, two = share(size[:, 2], size[:, 3], limit - for_head)
    return np.stack([text, caption, one, two], 1)


def tail(lengths: ArrayLike, limit: int) -> Ints:
    """Tokens kept when the end is cut, as the authors do: the losing side's rationale goes first.

    Args:
        lengths: (N, 4) tokens of each field.
        limit: most tokens of all four.

    Example:
        >>> tail([[10, 10, 100, 50]], 100).tolist()
        [[10, 10, 80, 0]]
    """
    size = _lengths(lengths, limit)
    before = np.cumsum(size, 1) - size
    return np.clip(limit - before, 0, size)


def keep(lengths: ArrayLike, limit: int, how: Literal["balanced", "tail"]) -> Ints:
    """:func:`balanced` or :func:`tail` by name.

    Raises:
        ConfigError: another name.
    """
    if how not in ("balanced", "tail"):
        raise ConfigError(f"truncate is {how!r}, wanted 'balanced' or 'tail'")
    return (balanced if how == "balanced" else tail)(lengths, limit)


def _lengths(lengths: ArrayLike, limit: int) -> Ints:
    size = np.asarray(lengths, np.int64)
    if size.ndim != 2 or size.shape[1] != 4 or (size < 0).any():
        raise ShapeError(f"lengths has shape {size.shape}, wanted (N, 4) of counts")
    if limit < 0:
        raise ConfigError(f"limit is {limit}, wanted at least 0")
    return size

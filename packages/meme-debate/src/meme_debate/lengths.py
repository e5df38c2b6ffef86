"""Batches of texts of like length, so that little is padded, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusion_core.errors import ConfigError
from fusion_core.seeding import rng

__all__ = ["padding_share", "window_batches"]

WINDOW = 8


def window_batches(
    lengths: ArrayLike, batch_size: int, *, seed: int = 0, epoch: int = 0, window: int = WINDOW
) -> list[NDArray[np.int64]]:
    """A shuffled epoch, sorted by length inside windows of a few batches, the batches shuffled again.

    Args:
        lengths: (N,) tokens of each text.
        batch_size: texts a batch; the last may have fewer.
        seed: of the order.
        epoch: another order each.
        window: batches that are sorted together; 1 sorts nothing across batches.

    Returns:
        Rows of each batch; together every row once.

    Raises:
        ConfigError: a size below 1.
    """
    if batch_size < 1 or window < 1:
        raise ConfigError(f"batch_size is {batch_size} and window {window}, wanted at least 1")
    size = np.asarray(lengths, np.int64)
    draws = rng(seed, "batches", epoch)
    order = draws.permutation(len(size))
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), batch_size * window):
        part = order[start : start + batch_size * window]
        part = part[np.argsort(size[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in draws.permutation(len(batches))]


def padding_share(lengths: ArrayLike, batches: Sequence[NDArray[np.int64]]) -> float:
    """The share of a batch's places that hold padding, over all batches.

    Example:
        >>> padding_share([2, 4], [np.array([0, 1])])
        0.25
    """
    size = np.asarray(lengths, np.int64)
    places = sum(int(size[batch].max()) * len(batch) for batch in batches if len(batch))
    return 1 - sum(int(size[batch].sum()) for batch in batches) / places if places else 0.0

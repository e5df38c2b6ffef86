"""Hypothesis strategies for what the packages take: logits, probabilities, labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Sizes = int | st.SearchStrategy[int]
_BATCH = st.integers(1, 6)
_CLASSES = st.integers(2, 6)


def _rows(batch: Sizes, classes: Sizes, numbers: st.SearchStrategy[float]) -> st.SearchStrategy[NDArray[Any]]:
    @st.composite
    def draw_rows(draw: st.DrawFn) -> NDArray[Any]:
        shape = (_size(draw, batch), _size(draw, classes))
        flat = draw(st.lists(numbers, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
        return np.asarray(flat, dtype=np.float64).reshape(shape)

    return draw_rows()


def _size(draw: st.DrawFn, size: Sizes) -> int:
    return size if isinstance(size, int) else draw(size)


def logits(
    batch: Sizes = _BATCH, classes: Sizes = _CLASSES, *, bound: float = 30.0
) -> st.SearchStrategy[NDArray[np.float64]]:
    """Logits (batch, classes), float64, in [-bound, bound]; sizes are numbers or strategies."""
    return _rows(batch, classes, st.floats(-bound, bound, allow_subnormal=False))


def probabilities(
    batch: Sizes = _BATCH, classes: Sizes = _CLASSES, *, low: float = 0.0
) -> st.SearchStrategy[NDArray[np.float64]]:
    """Distributions (batch, classes) whose rows sum to 1; zeros and one-hot rows occur unless ``low`` > 0."""
    positive = st.one_of(st.sampled_from([low, 1.0]), st.floats(low, 1.0, allow_subnormal=False))

    def normalise(raw: NDArray[np.float64]) -> NDArray[np.float64]:
        raw[raw.sum(axis=1) < 1e-9] = 1.0
        return raw / raw.sum(axis=1, keepdims=True)

    return _rows(batch, classes, positive).map(normalise)


def labels(batch: int, classes: int) -> st.SearchStrategy[NDArray[np.int64]]:
    """Class indices (batch,), int64, in [0, classes)."""
    rows = st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch)
    return rows.map(lambda values: np.asarray(values, dtype=np.int64))


def batches(
    batch: Sizes = _BATCH, classes: Sizes = _CLASSES, *, heads: int = 1
) -> st.SearchStrategy[tuple[NDArray[Any], ...]]:
    """``heads`` logits arrays (batch, classes) of one shape, then labels (batch,) that fit them."""

    @st.composite
    def draw_batch(draw: st.DrawFn) -> tuple[NDArray[Any], ...]:
        shape = (_size(draw, batch), _size(draw, classes))
        return (*(draw(logits(*shape)) for _ in range(heads)), draw(labels(*shape)))

    return draw_batch()

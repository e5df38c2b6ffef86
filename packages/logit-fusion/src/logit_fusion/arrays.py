"""Scalars of a search, one or a few per row: NumPy on the CPU, where a call costs a third of a tensor's.

The solver is written in what both libraries share, so that the same lines run on a device, in a compiled
graph and under automatic differentiation.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numpy as np
import torch

Array = Any  # a torch.Tensor, or a numpy.ndarray of float64


def library(values: Array) -> ModuleType:
    """The module whose functions take these values: torch or numpy."""
    return torch if isinstance(values, torch.Tensor) else np


def positive(values: Array) -> Array:
    """The values, 0 where they are negative; NaN stays."""
    if isinstance(values, torch.Tensor):
        return values.clamp(min=0.0)
    return np.maximum(values, 0.0)  # a third of what the method ``clip`` costs


def within(values: Array, low: float, high: float) -> Array:
    """The values, moved to the ends where they lie beyond."""
    if isinstance(values, torch.Tensor):
        return values.clamp(low, high)
    return np.minimum(np.maximum(values, low), high)


def pick(values: Array, index: Array) -> Array:
    """``values[n, index[n]]`` for each row n; with an index (N, M) M values a row."""
    if isinstance(values, torch.Tensor):
        place = index if index.ndim > 1 else index.unsqueeze(-1)
        return values.gather(-1, place).view(index.shape)
    if index.ndim > 1:
        return np.take_along_axis(values, index, -1)
    return values[np.arange(len(index)), index]


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers as a tensor, copied to a device once, so that a step waits for no transfer."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return _copied(values, dtype, device)


@functools.lru_cache(maxsize=64)
def _copied(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Outside of inference mode: a tensor born there could not be used for gradients later.
    with torch.inference_mode(mode=False):
        return torch.tensor(values, dtype=dtype, device=device)


def as_tensor(values: Array) -> torch.Tensor:
    """The values as a tensor; NumPy's share their memory."""
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))


def as_array(values: Array) -> np.ndarray:
    """The values, which are on the CPU, as NumPy's; a tensor's share their memory."""
    return values.numpy() if isinstance(values, torch.Tensor) else values

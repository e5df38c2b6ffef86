"""Functions that take numpy arrays or torch tensors and give back the same kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mantis_photoz.errors import DataError

__all__ = ["Array", "as_tensor", "either_kind", "interpolate", "quantile", "to_numpy", "wide"]

Array: TypeAlias = Tensor | NDArray[Any]


def as_tensor(value: Any, name: str = "value") -> Tensor:
    """A tensor of numbers; arrays in another byte order (FITS) are taken too.

    Raises:
        DataError: no array of numbers.

    Example:
        >>> as_tensor(np.array([1.0, 2.0], dtype=">f4"))
        tensor([1., 2.])
    """
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(array.dtype)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype == np.float16 or array.dtype.itemsize > 8:
            array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
        if not array.flags.writeable:  # torch warns of arrays that it could write to; nothing here writes
            array = array.copy()
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is {type(value).__name__} ({error}), wanted an array of numbers") from error


def to_numpy(value: Any) -> Any:
    """Tensors as arrays (a float for a single number), inside mappings and tuples too; else the value."""
    if isinstance(value, Tensor):
        found = value.detach().cpu()
        found = found.float() if found.dtype == torch.bfloat16 else found
        return found.item() if found.ndim == 0 else found.numpy()
    if isinstance(value, dict):
        named = cast("dict[Any, Any]", value)
        return {key: to_numpy(entry) for key, entry in named.items()}
    if isinstance(value, tuple):
        return tuple(to_numpy(entry) for entry in cast("tuple[Any, ...]", value))
    return value


def either_kind(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of tensors take arrays: tensors give tensors, arrays alone give arrays (or floats).

    Every positional argument is converted; keyword arguments are settings and pass as they are.

    Example:
        >>> either_kind(torch.exp)(np.zeros(2))
        array([1., 1.])
    """

    @functools.wraps(function)
    def wrapped(*arrays: Any, **settings: Any) -> Any:
        result = function(*(as_tensor(array) for array in arrays), **settings)
        return result if any(isinstance(array, Tensor) for array in arrays) else to_numpy(result)

    return wrapped


def wide(x: Tensor) -> Tensor:
    """The tensor in float64 (float32 on devices without): sums over bins and objects lose no digits."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def interpolate(x: Tensor, knots_x: Tensor, knots_y: Tensor) -> Tensor:
    """Linear interpolation with the ends held, as :func:`numpy.interp`, over shared or per-row knots.

    Args:
        x: (..., n) places.
        knots_x: (knots,) or (..., knots) places of the knots, not decreasing.
        knots_y: the knots' values, of the same shape.

    Returns:
        (..., n) values; differentiable in all three.

    Example:
        >>> interpolate(torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 4.0]))
        tensor([0., 2.])
    """
    batch = x.shape[:-1]
    knots_x = knots_x.expand(*batch, knots_x.shape[-1]).contiguous()
    knots_y = knots_y.expand_as(knots_x)
    right = torch.searchsorted(knots_x, x.detach().contiguous(), right=True).clamp(1, knots_x.shape[-1] - 1)
    left = right - 1
    x0, x1 = knots_x.gather(-1, left), knots_x.gather(-1, right)
    y0, y1 = knots_y.gather(-1, left), knots_y.gather(-1, right)
    flat = x1 <= x0
    share = ((x - x0) / torch.where(flat, torch.ones_like(x0), x1 - x0)).clamp(0, 1)
    share = torch.where(flat, (x >= x0).to(x.dtype), share)
    return y0 + share * (y1 - y0)


def quantile(x: Tensor, levels: Tensor) -> Tensor:
    """Quantiles over the last dimension, linear between order statistics; no limit on the size.

    Args:
        x: (..., n) values.
        levels: (levels,) in [0, 1].

    Returns:
        (..., levels); NaN where x has NaN or is empty.

    Example:
        >>> quantile(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.5, 0.75]))
        tensor([1., 2.])
    """
    count = x.shape[-1]
    if not count:
        return x.new_full((*x.shape[:-1], len(levels)), torch.nan)
    ordered = x.sort(dim=-1).values
    place = levels.to(x) * (count - 1)
    low = place.floor().long().clamp(0, count - 1)
    high = (low + 1).clamp(max=count - 1)
    below, above = ordered[..., low], ordered[..., high]
    found = below + (above - below) * (place - low)
    bad = torch.isnan(x).any(dim=-1, keepdim=True)
    return found.masked_fill(bad, torch.nan)

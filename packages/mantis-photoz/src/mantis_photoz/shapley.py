"""Who contributed how much (section 2.10): exact Shapley values of surveys or bands, interactions, shares.

A game is a table of values, one row per coalition: player i takes part in row r where bit i of r is set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import check_range
from mantis_photoz.arrays import Array, as_tensor, either_kind, wide
from mantis_photoz.errors import ConfigError, ShapeError

__all__ = [
    "Baseline",
    "coalitions",
    "interactions",
    "leave_one_out",
    "mask_channels",
    "mm_shares",
    "play",
    "shapley_values",
    "shares",
]

Baseline = Literal["zero", "mean", "marginal"]
_MAX_PLAYERS = 12


def coalitions(players: int) -> NDArray[np.bool_]:
    """(2^players, players) who takes part in each row of a game.

    Example:
        >>> coalitions(2).astype(int).tolist()
        [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    check_range("players", players, 1, _MAX_PLAYERS)
    return (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)


def _players(table: Tensor) -> int:
    count = len(table).bit_length() - 1
    if table.ndim < 1 or len(table) != 2**count or not 1 <= count <= _MAX_PLAYERS:
        raise ShapeError(
            f"values have {len(table) if table.ndim else 0} rows, wanted 2^players (2 to {2**_MAX_PLAYERS})"
        )
    return count


@lru_cache(maxsize=8)
def _single_weights(players: int) -> NDArray[np.float64]:
    """(players, 2^players): phi = W v. |S|! (N - |S| - 1)! / N! with the sign of S + i and of S."""
    member = coalitions(players)
    size = member.sum(1)
    fact = [math.factorial(k) for k in range(players + 1)]
    found = np.zeros((players, 2**players))
    for i in range(players):
        with_i = member[:, i]
        s = size - with_i  # the size without i
        weight = np.array([fact[k] * fact[players - k - 1] / fact[players] for k in s])
        found[i] = np.where(with_i, weight, -weight)
    return found


@lru_cache(maxsize=8)
def _pair_weights(players: int) -> NDArray[np.float64]:
    """(players, players, 2^players): off-diagonal phi_ij = W v, zeros on the diagonal."""
    member = coalitions(players)
    size = member.sum(1)
    fact = [math.factorial(k) for k in range(players + 1)]
    found = np.zeros((players, players, 2**players))
    for i in range(players):
        for j in range(i + 1, players):
            s = size - member[:, i] - member[:, j]
            weight = np.array([fact[k] * fact[players - k - 2] / fact[players - 1] / 2 for k in s])
            found[i, j] = found[j, i] = np.where(member[:, i] == member[:, j], weight, -weight)
    return found


@either_kind
def shapley_values(values: Array) -> Any:
    """Exact Shapley values: ``phi_i = sum_S |S|! (N-|S|-1)! / N! [v(S+i) - v(S)]``.

    Args:
        values: (2^players, ...) value of each coalition, for any number of objects at once.

    Returns:
        (players, ...); their sum is the value of all less the value of none.

    Raises:
        ShapeError: the number of rows is no power of two.

    Example:
        >>> shapley_values(np.array([0.0, 1.0, 2.0, 5.0]))
        array([2., 3.])
    """
    v = wide(as_tensor(values, "values"))
    weights = torch.as_tensor(_single_weights(_players(v)), dtype=v.dtype, device=v.device)
    return torch.tensordot(weights, v, 1)


@either_kind
def interactions(values: Array) -> Any:
    """Pairwise interaction indices; the diagonal is what is left of each player's value.

    Args:
        values: (2^players, ...).

    Returns:
        (players, players, ...) symmetric; each row adds up to the player's Shapley value.

    Example:
        >>> interactions(np.array([0.0, 1.0, 2.0, 5.0]))
        array([[1., 1.],
               [1., 2.]])
    """
    v = wide(as_tensor(values, "values"))
    players = _players(v)
    weights = torch.as_tensor(_pair_weights(players), dtype=v.dtype, device=v.device)
    found = torch.tensordot(weights, v, 1)
    single = torch.tensordot(torch.as_tensor(_single_weights(players), dtype=v.dtype, device=v.device), v, 1)
    rest = single - found.sum(1)
    diagonal = torch.arange(players, device=v.device)
    found[diagonal, diagonal] = rest
    return found


@either_kind
def leave_one_out(values: Array) -> Any:
    """(players, ...): the value of all less the value of all but one."""
    v = wide(as_tensor(values, "values"))
    full = len(v) - 1
    without = [full ^ (1 << player) for player in range(_players(v))]
    return v[full] - v[without]


@either_kind
def shares(phi: Array) -> Any:
    """(players, ...) ``|phi| / sum |phi|``; even where all are 0."""
    size = wide(as_tensor(phi, "phi")).abs()
    total = size.sum(0)
    even = torch.full_like(size, 1 / len(size))
    return torch.where(total > 0, size / torch.where(total > 0, total, torch.ones_like(total)), even)


def mm_shares(attribution: Array, groups: Sequence[Sequence[int]]) -> Any:
    """Multimodal shares of a pixel attribution: ``sum |a|`` over a group of channels, over the whole sum.

    Args:
        attribution: (batch, channels, height, width).
        groups: the channels of each survey or band.

    Returns:
        (batch, groups) that sum to 1 where the groups hold every channel once; even where all are 0.

    Raises:
        ConfigError: a channel that is not there, or an empty group.
    """

    def found(a: Tensor) -> Tensor:
        if a.ndim != 4 or any(not g or min(g) < 0 or max(g) >= a.shape[1] for g in groups):
            raise ConfigError(
                f"groups are {groups} of a map {tuple(a.shape)}, wanted channels of its second axis"
            )
        channels = wide(a).abs().sum((-2, -1))
        parts = torch.stack([channels[:, list(group)].sum(-1) for group in groups])
        return shares(parts).T

    return either_kind(found)(attribution)


def mask_channels(
    planes: Tensor,
    absent: Sequence[int],
    *,
    baseline: Baseline = "zero",
    mean: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Planes with some channels taken away.

    Args:
        planes: (batch, channels, height, width).
        absent: their numbers.
        baseline: ``"zero"``; ``"mean"`` = a training-mean plane; ``"marginal"`` = another object,
            the same one for all channels that are taken.
        mean: (channels, height, width) of ``"mean"``.
        generator: of ``"marginal"``.

    Returns:
        A new tensor.

    Raises:
        ConfigError: an unknown baseline, or ``"mean"`` without a mean.
    """
    if baseline == "zero":
        other = torch.zeros((), dtype=planes.dtype, device=planes.device).expand_as(planes)
    elif baseline == "mean":
        if mean is None:
            raise ConfigError("baseline is 'mean' without mean, wanted the training-mean planes")
        other = mean.to(planes).expand_as(planes)
    elif baseline == "marginal":
        step = torch.randint(1, max(len(planes), 2), (1,), generator=generator).item()
        other = planes.roll(int(step), 0)
    else:
        raise ConfigError(f"baseline is {baseline!r}, wanted 'zero', 'mean' or 'marginal'")
    gone = torch.zeros(planes.shape[1], dtype=torch.bool, device=planes.device)
    gone[list(absent)] = True
    return torch.where(gone[:, None, None], other, planes)


def play(value: Callable[[tuple[bool, ...]], Tensor], players: int) -> Tensor:
    """The table of a game: ``value`` of each coalition.

    Args:
        value: who takes part -> (...) values, such as -CRPS of each object.
        players: how many there are; ``value`` is called 2^players times.

    Returns:
        (2^players, ...).
    """
    return torch.stack([wide(value(tuple(row))) for row in coalitions(players).tolist()])

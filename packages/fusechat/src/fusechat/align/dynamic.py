"""Exact dynamic time warping with both published orders of ties; compiled where numba is there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import ConfigError, NonFiniteError, ShapeError

Tie = Literal["fusechat", "fusellm"]
TIES = ("fusechat", "fusellm")
_DIAGONAL, _UP, _LEFT = 0, 1, 2


def warp(cost: NDArray[Any], tie: Tie = "fusechat", *, compiled: bool | None = None) -> tuple[Any, float]:
    """The cheapest monotone path through a matrix of costs, from its first cell to its last.

    Equally cheap predecessors are resolved diagonal first; then ``"fusechat"`` goes left (one column back)
    before up, ``"fusellm"`` up before left.

    Args:
        cost: (rows, columns) finite numbers.
        tie: which publication's order.
        compiled: True needs numba, False does without; None takes it where it is installed.

    Returns:
        The path, (steps, 2) int64 of (row, column), and its cost.

    Raises:
        ConfigError: unknown ``tie``.
        ShapeError: no matrix, or an empty one.
        NonFiniteError: a cost is NaN or infinite.

    Example:
        >>> path, cost = warp(np.array([[0, 1, 2], [1, 0, 1]]))
        >>> path.tolist(), cost
        ([[0, 0], [1, 1], [1, 2]], 1.0)
    """
    if tie not in TIES:
        raise ConfigError(f"tie is {tie!r}, wanted one of {list(TIES)}")
    cost = np.asarray(cost)
    if cost.ndim != 2 or not cost.size:
        raise ShapeError(f"cost has shape {cost.shape}, wanted (rows, columns) of at least one each")
    if cost.dtype.kind not in "iu":
        cost = cost.astype(np.float64)
        if not np.isfinite(cost).all():
            raise NonFiniteError("cost holds NaN or infinity, wanted finite numbers")
    elif int(cost.max()) * sum(cost.shape) < 2**31:
        cost = cost.astype(np.int32, copy=False)
    else:
        cost = cost.astype(np.int64)
    cost = np.ascontiguousarray(cost)
    solver = _solver(compiled)
    moves, total = solver(cost, tie == "fusellm")
    return _trace(moves), float(total)


def _trace(moves: NDArray[np.uint8]) -> NDArray[np.int64]:
    row, column = moves.shape[0] - 1, moves.shape[1] - 1
    path = [(row, column)]
    table = moves  # plain indexing of bytes: a path has few cells
    while row or column:
        move = table[row, column]
        row -= move != _LEFT
        column -= move != _UP
        path.append((row, column))
    return np.array(path[::-1], np.int64)


@functools.lru_cache(maxsize=4)
def _solver(compiled: bool | None) -> Callable[[Any, bool], tuple[NDArray[np.uint8], Any]]:
    if compiled is False:
        return _by_diagonals
    try:
        import numba
    except ImportError:
        if compiled:
            from fusion_core.errors import require_extra

            require_extra("numba", "dtw", "fusechat")
        return _by_diagonals
    return numba.njit(nogil=True)(_by_cells)


def _by_cells(cost: Any, up_first: bool) -> Any:  # pragma: no cover - compiled
    rows, columns = cost.shape
    moves = np.empty((rows, columns), np.uint8)
    above = np.empty(columns, cost.dtype)
    above[0] = cost[0, 0]
    moves[0, 0] = 0
    for j in range(1, columns):
        above[j] = above[j - 1] + cost[0, j]
        moves[0, j] = 2
    for i in range(1, rows):
        corner = above[0]
        left = corner + cost[i, 0]
        above[0] = left
        moves[i, 0] = 1
        for j in range(1, columns):
            up = above[j]
            best = corner
            move = 0
            if up_first:
                if up < best:
                    best, move = up, 1
                if left < best:
                    best, move = left, 2
            else:
                if left < best:
                    best, move = left, 2
                if up < best:
                    best, move = up, 1
            corner = up
            left = best + cost[i, j]
            above[j] = left
            moves[i, j] = move
    return moves, above[columns - 1]


def _by_diagonals(cost: NDArray[Any], up_first: bool) -> tuple[NDArray[np.uint8], Any]:
    """All cells of an anti-diagonal at once."""
    rows, columns = cost.shape
    if rows == 1 or columns == 1:
        moves = np.full(cost.shape, _LEFT if rows == 1 else _UP, np.uint8)
        return moves, cost.cumsum()[-1]
    moves = np.empty(cost.shape, np.uint8)
    flat, flat_moves, step = cost.reshape(-1), moves.reshape(-1), columns - 1
    infinite = np.iinfo(cost.dtype).max // 2 if cost.dtype.kind == "i" else np.inf
    # before[i + 1] is row i of the last anti-diagonal, before2 that of the one before it.
    before2 = np.full(rows + 1, infinite, cost.dtype)
    before = before2.copy()
    before[1] = flat[0]
    moves[0, 0] = _DIAGONAL
    for d in range(1, rows + columns - 1):
        low, high = max(0, d - columns + 1), min(rows - 1, d)
        cells = slice(low * step + d, high * step + d + 1, step)
        corner, up, left = before2[low : high + 1], before[low : high + 1], before[low + 1 : high + 2]
        side = np.where(up <= left, _UP, _LEFT) if up_first else np.where(left <= up, _LEFT, _UP)
        beside = np.minimum(up, left)
        flat_moves[cells] = np.where(corner <= beside, _DIAGONAL, side)
        now = np.full(rows + 1, infinite, cost.dtype)
        now[low + 1 : high + 2] = np.minimum(corner, beside) + flat[cells]
        before2, before = before, now
    return moves, before[rows]

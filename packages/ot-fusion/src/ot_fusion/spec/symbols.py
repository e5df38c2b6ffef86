"""Symbols for tensor axes.

Which of them are one and the same, which are products of others, which must not move.

Source: ours; union-find with splitting, so that a view from ``h * d`` channels to heads names both factors.
"""

from collections.abc import Iterable, Sequence
from math import prod

__all__ = ["Axes", "SymbolAxis"]

SymbolAxis = tuple[int, ...]  # the factors of an axis, outermost first; empty for a size of 1


class Axes:
    """A growing set of symbols.

    Example:
        >>> axes = Axes()
        >>> channels, heads, inner = axes.new(12), axes.new(3), axes.new(4)
        >>> axes.unify(channels, heads + inner)
        >>> axes.leaves(channels) == axes.leaves(heads + inner)
        True
    """

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.size: list[int] = []
        self.frozen: list[bool] = []
        self.split: list[SymbolAxis | None] = []

    def new(self, size: int, *, frozen: bool = False) -> SymbolAxis:
        """An axis of its own."""
        if size == 1:
            return ()
        self.parent.append(len(self.parent))
        self.size.append(size)
        self.frozen.append(frozen)
        self.split.append(None)
        return (len(self.parent) - 1,)

    def find(self, symbol: int) -> int:
        """The symbol that stands for all that are the same."""
        while self.parent[symbol] != symbol:
            self.parent[symbol] = self.parent[self.parent[symbol]]
            symbol = self.parent[symbol]
        return symbol

    def leaves(self, axis: SymbolAxis) -> SymbolAxis:
        """An axis by its smallest factors."""
        found: list[int] = []
        for symbol in axis:
            root = self.find(symbol)
            parts = self.split[root]
            found += [root] if parts is None else self.leaves(parts)
        return tuple(found)

    def length(self, axis: SymbolAxis) -> int:
        """Entries of an axis."""
        return prod(self.size[self.find(symbol)] for symbol in axis)

    def is_frozen(self, axis: SymbolAxis) -> bool:
        """Whether no factor may move."""
        return all(self.frozen[leaf] for leaf in self.leaves(axis))

    def freeze(self, axis: SymbolAxis) -> None:
        """Forbid every factor to move."""
        for leaf in self.leaves(axis):
            self.frozen[leaf] = True

    def _cut(self, leaf: int, inner: int) -> SymbolAxis:
        """Split a factor into an outer one and an inner one of a given size."""
        outer = self.new(self.size[leaf] // inner, frozen=self.frozen[leaf])
        parts = outer + self.new(inner, frozen=self.frozen[leaf])
        self.split[leaf] = parts
        return parts

    def _union(self, first: int, second: int) -> None:
        if first == second:
            return
        low, high = sorted((first, second))
        self.parent[high] = low
        self.frozen[low] = self.frozen[low] or self.frozen[high]

    def unify(self, first: SymbolAxis, second: SymbolAxis) -> None:
        """Say that two axes are the same coordinates; where their factors do not fit, they are frozen."""
        left, right = list(self.leaves(first)), list(self.leaves(second))
        while left and right:
            a, b = left.pop(), right.pop()
            if a == b:
                continue
            if self.size[a] == self.size[b]:
                self._union(a, b)
                continue
            small, large = sorted((a, b), key=lambda leaf: self.size[leaf])
            if self.size[large] % self.size[small]:
                self.freeze((*left, *right, a, b))
                return
            outer_inner = self._cut(large, self.size[small])
            inner = outer_inner[-1]
            self._union(self.find(small), self.find(inner))
            rest = list(outer_inner[:-1])
            if large == a:
                left += rest
            else:
                right += rest
        if left or right:
            self.freeze((*left, *right))

    def take(self, axis: SymbolAxis, size: int) -> tuple[SymbolAxis, SymbolAxis] | None:
        """Cut an axis into (outer, inner) with ``size`` inner entries; None where factors do not fit."""
        parts, taken, need = list(self.leaves(axis)), list[int](), size
        while need > 1:
            if not parts:
                return None
            leaf = parts.pop()
            if need % self.size[leaf] == 0:
                taken.insert(0, leaf)
                need //= self.size[leaf]
            elif self.size[leaf] % need == 0:
                pieces = self._cut(leaf, need)
                parts += pieces[:-1]
                taken.insert(0, pieces[-1])
                need = 1
            else:
                return None
        return tuple(parts), tuple(taken)

    def reshape(self, axes: Sequence[SymbolAxis], shape: Iterable[int]) -> list[SymbolAxis]:
        """The axes of a view; what cannot be followed is frozen."""
        left: SymbolAxis = tuple(symbol for axis in axes for symbol in axis)
        out: list[SymbolAxis] = []
        for size in reversed(list(shape)):
            cut = self.take(left, size)
            if cut is None:
                self.freeze(left)
                return [self.new(n, frozen=True) for n in shape]
            left, inner = cut
            out.insert(0, inner)
        return out

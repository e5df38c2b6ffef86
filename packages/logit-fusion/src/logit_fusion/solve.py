"""Search of alpha on one direction: the paper's grid, the exact minimum, and Newton's steps alone.

All row-wise, with a fixed number of steps, without a branch on data and without a host synchronisation.
Shifts have mean 0 under the large model, so R = A.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64

from logit_fusion.arrays import Array, as_tensor, constant, library, pick, within
from logit_fusion.certificate import certify_rows
from logit_fusion.config import Solver
from logit_fusion.family import Tilted, divergences
from logit_fusion.grid import Grid, make_grid
from logit_fusion.hermite import Hermite
from logit_fusion.objective import Target, loss, slope

# Of the exact solver: on the interpolated family (scalars only), then on the vocabulary.
SCALAR_STEPS = 2
STEPS = {torch.float32: 2, torch.float64: 6}
# A step below this share of the spacing ends the search where a look costs nothing: the next would change
# nothing.
SETTLED = {torch.float32: 1e-3, torch.float64: 1e-8}
# A root of one divergence alone: steep where a shift is huge, so every other step may have to bisect.
ROOT_STEPS = {torch.float32: 12, torch.float64: 40}
NEWTON_STEPS = 6


class Family(Protocol):
    """Statistics of N one-parameter families: float64 arrays on the CPU, tensors elsewhere."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vocabulary."""
        ...

    def nodes(self, places: tuple[float, ...]) -> tuple[Array, Array]:
        """A and its slope at evenly spaced alphas, (N, K) each."""
        ...

    def moments(self, alpha: Array) -> Tilted:
        """All statistics at one alpha per row."""
        ...

    def normalizer(self, alpha: Array) -> tuple[Array, Array]:
        """A and its slope at one alpha per row."""
        ...


class Nodes(NamedTuple):
    """The family and the objective at the grid's alphas."""

    alphas: Float[Array, "nodes"]
    log_norm: Float[Array, "rows nodes"]
    mean: Float[Array, "rows nodes"]
    forward: Float[Array, "rows nodes"]
    reverse: Float[Array, "rows nodes"]
    loss: Float[Array, "rows nodes"]


class Solution(NamedTuple):
    """What a search found, row by row.

    Attributes:
        alpha: (N) the place.
        log_norm: (N) A there.
        forward: (N) F there, nats.
        reverse: (N) R there, nats.
        loss: (N) the objective there.
        certified: (N) whether the global minimum is proven.
    """

    alpha: Float[Array, "rows"]
    log_norm: Float[Array, "rows"]
    forward: Float[Array, "rows"]
    reverse: Float[Array, "rows"]
    loss: Float[Array, "rows"]
    certified: Bool[Array, "rows"]


def solve(
    family: Family,
    target: Target,
    alpha_range: tuple[float, float],
    step: float,
    solver: Solver,
    *,
    certify: bool = False,
    differentiable: bool = False,
) -> Solution:
    """Find alpha on one direction per row.

    Args:
        family: N rows.
        target: of the same rows.
        alpha_range: (low, high).
        step: the grid's spacing.
        solver: ``"grid"``, ``"exact"`` or ``"newton"``.
        certify: prove the global minimum row by row (``"exact"`` only).
        differentiable: let the result depend on the family and the target in the graph, alpha of ``"exact"``
            and ``"newton"`` by the implicit function theorem.

    Returns:
        The solution; ``"grid"`` is never certified.
    """
    with torch.no_grad():
        if library(target.forward) is np:
            with np.errstate(all="ignore"):
                found = _search(family, target, alpha_range, step, solver, certify=certify)
        else:
            found = _search(family, target, alpha_range, step, solver, certify=certify)
    return _attach(family, target, alpha_range, solver, found) if differentiable else found


def _search(
    family: Family,
    target: Target,
    alpha_range: tuple[float, float],
    step: float,
    solver: Solver,
    *,
    certify: bool,
) -> Solution:
    if solver == "newton":
        return solve_newton(family, target, alpha_range)
    grid = make_grid(*alpha_range, step)
    nodes = evaluate_nodes(family, target, grid)
    if solver == "grid":
        return solve_grid(target, nodes)
    return solve_exact(family, target, nodes, grid, certify=certify)


def evaluate_nodes(family: Family, target: Target, grid: Grid) -> Nodes:
    """A, its slope, F, R and the objective at every node."""
    places = grid.places if grid.even else grid.places[:-1]
    log_norm, mean = family.nodes(places)
    xp = library(log_norm)
    if xp is torch:
        alphas = constant(grid.places, log_norm.dtype, log_norm.device)
    else:
        alphas = np.array(grid.places)
    if not grid.even:
        last = family.normalizer(0.0 * log_norm[:, 0] + grid.places[-1])
        log_norm = xp.concatenate((log_norm, last[0][:, None]), -1)
        mean = xp.concatenate((mean, last[1][:, None]), -1)
    forward, reverse = divergences(Tilted(log_norm, mean, mean, mean), alphas, 0.0)
    return Nodes(alphas, log_norm, mean, forward, reverse, loss(target, forward, reverse))


def choose_node(target: Target, nodes: Nodes) -> tuple[Int64[Array, "rows"], Bool[Array, "rows"]]:
    """The node of least loss, the first of several, and whether the objective is flat in the row.

    Flat means that no alpha changes anything; by convention the first node is taken then.
    """
    total = nodes.forward[:, -1] + nodes.reverse[:, -1]
    aim = target.forward + target.reverse
    small = aim < target.tiny
    gap = nodes.forward + nodes.reverse - aim[:, None]
    xp = library(gap)
    key = xp.where(small[:, None], gap * gap, nodes.loss)
    low, high = xp.amin(nodes.loss, -1), xp.amax(nodes.loss, -1)
    still = (high - low <= 1e-24 * (1.0 + high)) & ~(small & (total > 0.0))
    flat = still | (aim <= target.nothing)
    return xp.where(flat, 0, key.argmin(-1)), flat


def _at_node(nodes: Nodes, index: Int64[Array, "rows"]) -> Solution:
    return Solution(
        nodes.alphas[index],
        pick(nodes.log_norm, index),
        pick(nodes.forward, index),
        pick(nodes.reverse, index),
        pick(nodes.loss, index),
        index < 0,
    )


def solve_grid(target: Target, nodes: Nodes) -> Solution:
    """The paper's search: the best node."""
    return _at_node(nodes, choose_node(target, nodes)[0])


class _Bracket(NamedTuple):
    low: Array
    high: Array
    tried: Array  # whether the high end, or a place below it that became the end, has been looked at

    def step(self, target: Target, alpha: Array, stats: Tilted) -> tuple[_Bracket, Array]:
        """One Newton step; beyond the bracket its end, and if that was tried before its middle."""
        g, bend = slope(target, alpha, stats)
        below = g < 0.0
        xp = library(g)
        low, high = xp.where(below, alpha, self.low), xp.where(below, self.high, alpha)
        new = alpha - g / bend
        inside = (new >= low) & (
            new <= high
        )  # closed: an iterate that has converged is an end of its own bracket
        beyond = (new > high) & ~self.tried
        new = xp.where(inside, new, xp.where(beyond, high, (low + high) / 2.0))
        return _Bracket(low, high, self.tried | beyond | ~below), new


def solve_exact(
    family: Family, target: Target, nodes: Nodes, grid: Grid, *, certify: bool = False
) -> Solution:
    """The minimum itself: Newton steps in the bracket round the best node.

    The first steps run on the family as interpolated between the nodes, which costs scalars only, the others
    on the vocabulary; the last one ends in the Taylor series of the cumulants.

    Args:
        family: N rows.
        target: of the same rows.
        nodes: of the grid.
        grid: the nodes' places.
        certify: prove the global minimum row by row.
    """
    index, flat = choose_node(target, nodes)
    best = _at_node(nodes, index)
    xp, last = library(index), len(grid.places) - 1
    ends, middle = _ends(target, nodes, index)
    bracket = _Bracket(nodes.alphas[ends[0]], nodes.alphas[ends[1]], index >= 0)
    alpha = _start(target, nodes, nodes.alphas[middle], bracket)
    steps = (STEPS if target.objective == "paper" else ROOT_STEPS)[family.dtype]
    if grid.even and last >= 2:
        middle = within(middle, 1, last - 1)
        curve = Hermite.around(nodes.alphas, grid.spacing, nodes.log_norm, nodes.mean, middle)
        for _ in range(SCALAR_STEPS):
            bracket, alpha = bracket.step(target, alpha, curve.at(alpha))
        # What interpolation and rounding did to the bracket is taken back.
        bracket = _Bracket(nodes.alphas[ends[0]], nodes.alphas[ends[1]], index >= 0)
    else:
        steps += SCALAR_STEPS
    limit = SETTLED[family.dtype] * grid.spacing
    stats = family.moments(alpha)
    tighter, new = bracket.step(target, alpha, stats)
    for turn in range(1, steps):
        if xp is np and (abs(new - alpha) <= limit).all():
            break
        if target.objective != "paper" and turn % 2 == 0:
            slow = tighter.high - tighter.low > 0.5 * (bracket.high - bracket.low)
            # Not near a root: there one end stays, and Newton's step is small.
            reach = 1e-3 * (bracket.high - bracket.low)
            slow = slow & (xp.minimum(new - tighter.low, tighter.high - new) > reach)
            new = xp.where(slow, (tighter.low + tighter.high) / 2.0, new)
        bracket, alpha = tighter, new
        stats = family.moments(alpha)
        tighter, new = bracket.step(target, alpha, stats)
    reach = 0.05 * grid.spacing  # where the series is as good as the statistics
    delta = within(new - alpha, -reach, reach)
    found = _evaluate(target, alpha + delta, stats.shifted(delta), best.certified)
    # Where rounding errors cannot decide, the minimum is taken, not the node.
    eps = torch.finfo(family.dtype).eps
    error = 16.0 * eps * (1.0 + found.forward + found.reverse)
    worse = found.loss > best.loss + error * (2.0 * found.loss**0.5 + error)
    found = _choose(flat | worse, best, found)
    if certify:
        found = found._replace(certified=_certify(target, nodes, grid, found, flat))
    return found


def _ends(target: Target, nodes: Nodes, index: Array) -> tuple[tuple[Array, Array], Array]:
    """First and last node of the bracket, and the node between or on them where the steps start."""
    last = nodes.alphas.shape[0] - 1
    if target.objective == "paper":
        return (within(index - 1, 0, last), within(index + 1, 0, last)), index
    value, aim = {
        "forward": (nodes.forward, target.forward),
        "reverse": (nodes.reverse, target.reverse),
        "jeffreys": (nodes.forward + nodes.reverse, target.forward + target.reverse),
    }[target.objective]
    # Monotone: the root lies where the values cross the aim, wherever the nearest value is.
    above = (value < aim[:, None]).sum(-1)
    low, high = within(above - 1, 0, last), within(above, 0, last)
    gap = abs(value - aim[:, None])
    return (low, high), library(gap).where(pick(gap, low) <= pick(gap, high), low, high)


def _start(target: Target, nodes: Nodes, alpha: Array, bracket: _Bracket) -> Array:
    # alpha = 0 is a local maximum of the objective, where Newton would stay.
    spread = (nodes.mean[:, 1] - nodes.mean[:, 0]) / (nodes.alphas[1] - nodes.alphas[0])
    aim = ((target.forward + target.reverse) / spread.clip(1e-300)) ** 0.5
    xp = library(aim)
    return xp.where(alpha == 0.0, xp.minimum(aim, bracket.high), alpha)


def _evaluate(target: Target, alpha: Array, stats: Tilted, certified: Array) -> Solution:
    forward, reverse = divergences(stats, alpha, 0.0)
    return Solution(alpha, stats.log_norm, forward, reverse, loss(target, forward, reverse), certified)


def _choose(rows: Array, yes: Solution, no: Solution) -> Solution:
    xp = library(rows)
    return Solution(*(xp.where(rows, a, b) for a, b in zip(yes, no, strict=True)))


def _certify(target: Target, nodes: Nodes, grid: Grid, found: Solution, flat: Array) -> Array:
    small = target.forward + target.reverse < target.tiny
    if target.objective != "paper":  # each of them has one root at most
        return flat | True
    if not grid.even or len(grid.places) < 3:
        return flat | small
    proven = certify_rows(
        target.tensors(),
        as_tensor(nodes.alphas),
        grid.spacing,
        as_tensor(nodes.log_norm),
        as_tensor(nodes.mean),
        as_tensor(found.loss),
    )
    return flat | small | (proven if library(flat) is torch else proven.numpy())


def solve_newton(family: Family, target: Target, alpha_range: tuple[float, float]) -> Solution:
    """Newton steps from alpha = 1 on the whole range: the cheapest, without a guarantee.

    Args:
        family: N rows.
        target: of the same rows.
        alpha_range: (low, high).
    """
    low, high = (0.0 * target.forward + end for end in alpha_range)
    alpha = within(0.0 * low + 1.0, *alpha_range)
    bracket = _Bracket(low, high, low > high)
    limit = 0.1 * SETTLED[family.dtype]
    for _ in range(NEWTON_STEPS):
        before = alpha
        bracket, alpha = bracket.step(target, alpha, family.moments(alpha))
        if library(alpha) is np and (abs(alpha - before) <= limit).all():
            break
    aim = target.forward + target.reverse
    # NaN: neither the objective nor its bound moves, as in a flat row.
    alpha = library(alpha).where((aim <= target.nothing) | (alpha != alpha), low, alpha)
    log_norm, mean = family.normalizer(alpha)
    return _evaluate(target, alpha, Tilted(log_norm, mean, mean, mean), alpha < low)


def _attach(
    family: Family, target: Target, alpha_range: tuple[float, float], solver: Solver, found: Solution
) -> Solution:
    alpha = found.alpha
    if solver != "grid":
        g, bend = slope(target, alpha, family.moments(alpha))
        low, high = alpha_range
        free = (alpha > low) & (alpha < high) & (bend > 0.0)
        # Of value 0; its gradient is that of the root of g.
        move = torch.where(free, (g - g.detach()) / torch.where(free, bend.detach(), 1.0), 0.0)
        alpha = alpha - move
    return _evaluate(target, alpha, family.moments(alpha), found.certified)

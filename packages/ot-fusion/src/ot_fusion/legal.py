"""Legal maps of attention layers: heads assigned first, then the channels inside each pair of heads.

Source: ours; the table of symmetry groups is :mod:`ot_fusion.groups`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ot_fusion.errors import IllegalMapError, ShapeError
from ot_fusion.groups import Blocks, Frozen, Full, Group, Heads
from ot_fusion.plan import Plan

__all__ = ["check_legal", "is_legal", "plan_group", "plan_heads"]

Solve = Callable[[Tensor], Plan]


def _tiles(cost: Tensor, rows: int, columns: int) -> Tensor:
    """``(rows, columns, n0 / rows, n1 / columns)`` blocks of a matrix."""
    n0, n1 = cost.shape
    return cost.view(rows, n0 // rows, columns, n1 // columns).transpose(1, 2)


def _inner(cost: Tensor, fixed: int, solve: Solve) -> Tensor:
    """A plan of mass 1 inside a head whose first ``fixed`` channels keep their places."""
    n0, n1 = cost.shape
    if fixed == 0:
        return _unit(solve(cost).matrix)
    plan = cost.new_zeros(n0, n1)
    keep = torch.arange(min(fixed, n0, n1), device=cost.device)
    plan[keep, keep] = 1 / n0
    if n0 > fixed:
        plan[fixed:, fixed:] = _unit(solve(cost[fixed:, fixed:]).matrix) * (n0 - fixed) / n0
    return plan


def _unit(matrix: Tensor) -> Tensor:
    return matrix / matrix.sum()


def plan_heads(costs: Mapping[str, Tensor], group0: Heads, group1: Heads, solve: Solve) -> dict[str, Plan]:
    """Plans of all views of an attention layer that respect its symmetries.

    Heads are matched first, by the cost of the best plan inside each pair; under grouped queries key-value
    groups are matched, and query heads inside each pair of groups. Soft head plans are mixtures of legal
    maps.

    Args:
        costs: ``q``, ``k`` and ``v`` costs between channels, ``(n0, n1)`` each, on one scale.
        group0: the source's heads.
        group1: the anchor's.
        solve: gives the plan of a cost; exact solvers give one-to-one heads, entropic ones mixtures.

    Returns:
        Plans for ``q``, ``k``, ``v``, ``o`` and, with a norm per head, ``qk_norm``.

    Raises:
        ShapeError: rotary channels or norms that differ between the models.
    """
    if (
        group0.turning != group1.turning
        or group0.norm != group1.norm
        or (group0.turning and group0.dim != group1.dim)
    ):
        raise ShapeError(
            f"heads of {group0.dim} channels ({group0.turning} rotary, norm {group0.norm}) cannot be matched "
            "with "
            f"heads of {group1.dim} ({group1.turning} rotary, norm {group1.norm})"
        )
    kv0, kv1, r0, r1 = group0.kv, group1.kv, group0.ratio, group1.ratio
    queries = _tiles(costs["q"], kv0 * r0, kv1 * r1)
    keys, values = _tiles(costs["k"], kv0, kv1), _tiles(costs["v"], kv0, kv1)
    fixed = group0.turning
    shared = group0.norm == "head" and fixed < group0.dim
    price = keys.new_zeros(kv0, kv1)
    inner_qk: dict[tuple[int, int], Tensor] = {}
    inner_q: dict[tuple[int, int], Tensor] = {}
    inner_v: dict[tuple[int, int], Tensor] = {}
    for i in range(kv0):
        for j in range(kv1):
            block = queries[i * r0 : (i + 1) * r0, j * r1 : (j + 1) * r1]
            whole = block.mean((0, 1)) + keys[i, j]
            channels = _inner(whole, fixed, solve)
            per_head = (block * channels).sum((-1, -2))
            heads = _head_plan(per_head, solve, group0)
            if not shared:
                channels = _inner((block * heads[:, :, None, None]).sum((0, 1)) + keys[i, j], fixed, solve)
            inner_q[i, j], inner_qk[i, j] = heads, channels
            inner_v[i, j] = _unit(solve(values[i, j]).matrix)
            price[i, j] = (
                (per_head * heads).sum()
                + (keys[i, j] * channels).sum()
                + (values[i, j] * inner_v[i, j]).sum()
            )
    outer = _head_plan(price, solve, group0)
    if shared:
        pairs = [(i, j) for i in range(kv0) for j in range(kv1) if float(outer[i, j]) > 0]
        total = keys.new_zeros(keys.shape[-2:])
        for i, j in pairs:
            block = queries[i * r0 : (i + 1) * r0, j * r1 : (j + 1) * r1]
            total += outer[i, j] * ((block * inner_q[i, j][:, :, None, None]).sum((0, 1)) + keys[i, j])
        one = _inner(total, fixed, solve)
        inner_qk = dict.fromkeys(inner_qk, one)
    plans = {view: costs["k"].new_zeros(n0, n1) for view, n0, n1 in _sizes(group0, group1)}
    for (i, j), channels in inner_qk.items():
        weight = outer[i, j]
        if float(weight) == 0:
            continue
        heads = inner_q[i, j]
        _put(plans["k"], i, j, weight * channels)
        _put(plans["v"], i, j, weight * inner_v[i, j])
        _put(plans["q"], i, j, weight * torch.kron(heads, channels))
        _put(plans["o"], i, j, weight * torch.kron(heads, inner_v[i, j]))
    if group0.norm == "head":
        plans["qk_norm"] = next(iter(inner_qk.values()))
    like = solve(costs["k"].new_zeros(1, 1))
    return {view: Plan(matrix, like.normalization) for view, matrix in plans.items()}


def _sizes(group0: Heads, group1: Heads) -> list[tuple[str, int, int]]:
    v0, v1 = group0.views(), group1.views()
    return [(view, v0[view], v1[view]) for view in ("q", "k", "v", "o")]


def _put(matrix: Tensor, i: int, j: int, block: Tensor) -> None:
    h, w = block.shape
    matrix[i * h : (i + 1) * h, j * w : (j + 1) * w] = block


def _head_plan(price: Tensor, solve: Solve, group: Heads) -> Tensor:
    if group.heads == "frozen":
        return Plan.identity(*price.shape).matrix.to(price)
    top = price.abs().max()
    return _unit(solve(price / top if float(top) > 0 else price).matrix)


def plan_group(costs: Mapping[str, Tensor], group0: Group, group1: Group, solve: Solve) -> dict[str, Plan]:
    """Legal plans of any space.

    Args:
        costs: by view.
        group0: the source's group.
        group1: the anchor's, of the same kind.
        solve: gives the plan of a cost.

    Raises:
        ShapeError: frozen spaces of different sizes, or groups of different kinds.
    """
    if isinstance(group0, Heads) and isinstance(group1, Heads):
        return plan_heads(costs, group0, group1, solve)
    if isinstance(group0, Frozen) or isinstance(group1, Frozen):
        n0, n1 = group0.views()[""], group1.views()[""]
        if n0 != n1:
            raise ShapeError(f"a fixed axis has {n0} entries in the source and {n1} in the anchor")
        return {"": Plan.identity(n0)}
    if isinstance(group0, Blocks) and isinstance(group1, Blocks):
        tiles = _tiles(costs[""], group0.count, group1.count)
        inner = [[_unit(solve(tiles[i, j]).matrix) for j in range(group1.count)] for i in range(group0.count)]
        price = torch.stack(
            [
                torch.stack([(p * t).sum() for p, t in zip(*row, strict=True)])
                for row in zip(inner, tiles, strict=True)
            ]
        )
        found = solve(price)
        outer, plan = _unit(found.matrix), torch.zeros_like(costs[""])
        for i, row in enumerate(inner):
            for j, block in enumerate(row):
                _put(plan, i, j, outer[i, j] * block)
        return {"": Plan(plan, found.normalization)}
    if isinstance(group0, Full) and isinstance(group1, Full):
        return {"": solve(costs[""])}
    raise ShapeError(
        f"a space is {type(group0).__name__} in the source and {type(group1).__name__} in the anchor"
    )


def is_legal(plan: Plan, group0: Group, group1: Group, view: str = "") -> bool:
    """Whether a plan of one view is a mixture of legal maps, as far as its own entries show.

    Example:
        >>> is_legal(Plan.from_index(torch.tensor([2, 1, 0, 3])), Heads(2, 1, 2), Heads(2, 1, 2), "q")
        False
    """
    if isinstance(group0, Frozen):
        n0, n1 = plan.matrix.shape
        return n0 == n1 and bool((plan.matrix - plan.matrix.diagonal().diag()).abs().max() == 0)
    if isinstance(group0, Full) or not isinstance(group0, Blocks | Heads):
        return True
    index = plan.permutation()
    if isinstance(group0, Blocks):
        return index is not None and group0.contains({"": index})
    if not isinstance(group1, Heads):
        return False
    heads0, heads1 = ((g.kv * (g.ratio if view in ("q", "o") else 1)) for g in (group0, group1))
    tiles = _tiles(plan.matrix, heads0, heads1)
    mass = tiles.sum((-1, -2))
    # A hard map sends whole heads to whole heads; a soft one shares a head's mass evenly among its channels.
    shares = tiles.sum(-2) * tiles.shape[-1]
    even = bool(torch.allclose(shares, mass[..., None].expand_as(shares), atol=1e-9))
    if view in ("q", "k") and group0.turning:
        turning = tiles[..., : group0.turning, : group0.turning]
        off = turning - torch.diag_embed(turning.diagonal(dim1=-2, dim2=-1))
        even = even and float(off.abs().max()) == 0
    return even


def check_legal(name: str, plan: Plan, group0: Group, group1: Group, view: str = "") -> None:
    """Refuse an illegal map.

    Raises:
        IllegalMapError: names the space, its group and how to allow it.
    """
    if not is_legal(plan, group0, group1, view):
        raise IllegalMapError(
            f"the map of {name} (view {view!r}) is not in its group {group0}; use legal='enforce' to have "
            "legal maps "
            "computed, or legal='off' to allow it"
        )

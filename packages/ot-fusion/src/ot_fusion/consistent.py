"""One plan per space: hard and legal plans give the same function in the anchor's coordinates.

Source: weight matching of Git Re-Basin (arXiv 2209.04836), with spaces, costs and plans generalised;
activations as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_core.seeding import rng
from ot_fusion.apply import map_axis
from ot_fusion.config import FusionConfig
from ot_fusion.cost import finish_cost
from ot_fusion.errors import InputError, ShapeError, SpecError
from ot_fusion.groups import Frozen, Group
from ot_fusion.hooks import Statistics
from ot_fusion.layers import absolute_clip, plan_of_cost
from ot_fusion.legal import plan_group
from ot_fusion.plan import Plan
from ot_fusion.relabel import axis_parts, axis_size, map_state
from ot_fusion.spec.types import AlignmentSpec, Axis

__all__ = ["check_spaces", "consistent_pair", "match_activations", "match_weights"]

Plans = dict[tuple[str, str], Plan]
_SWEEPS = 100


def consistent_pair(
    source: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    spec0: AlignmentSpec,
    spec1: AlignmentSpec,
    stats: Statistics | None,
    config: FusionConfig,
) -> tuple[dict[str, Tensor], dict[str, Plan], dict[str, dict[str, Any]]]:
    """Align a source with an anchor by one plan per space.

    Args:
        source: the source's tensors.
        anchor: the anchor's.
        spec0: the source's specification.
        spec1: the anchor's, of the same spaces.
        stats: activations, for features ``acts``; spaces without any are matched by weights.
        config: costs and solver; hard solvers keep the function.

    Returns:
        The aligned tensors, the plans by "space" or "space.view", and their costs.

    Raises:
        SpecError: specifications of different spaces.
        ShapeError: fixed axes of different sizes.
    """
    check_spaces(spec0, spec1)
    plans: Plans = {}
    costs: dict[str, dict[str, Any]] = {}
    if config.features == "acts":
        if stats is None:
            raise InputError("features='acts' needs data; features='wts' needs none")
        plans = match_activations(spec0, spec1, stats, config, costs)
    left = [space for space in spec1.spaces if not any(key[0] == space for key in plans)]
    if left:
        plans |= match_weights(source, anchor, spec0, spec1, config, left, plans, costs)
    named = {space if not view else f"{space}.{view}": plan for (space, view), plan in plans.items()}
    return map_state(source, spec0, plans), named, costs


def check_spaces(spec0: AlignmentSpec, spec1: AlignmentSpec) -> None:
    """Refuse specifications that do not declare the same spaces and kinds of tensors.

    Raises:
        SpecError: names both.
    """

    def shape(spec: AlignmentSpec) -> list[Any]:
        return [list(spec.spaces), *(tensor.axes for tensor in spec.tensors.values())]

    if shape(spec0) != shape(spec1):
        raise SpecError(
            f"the specs {spec0.name!r} and {spec1.name!r} have different spaces or tensors; align models of "
            "unequal "
            "depth with layer_map, and only models of one architecture"
        )


def _solver(config: FusionConfig) -> Any:
    return lambda cost: plan_of_cost(cost, config)


def _space_plans(
    space: str,
    costs: Mapping[str, Tensor],
    group0: Group,
    group1: Group,
    config: FusionConfig,
    notes: dict[str, dict[str, Any]],
) -> Plans:
    found = plan_group(costs, group0, group1, _solver(config.at(space)))
    for view, plan in found.items():
        name = f"{space}.{view}" if view else space
        notes[name] = dict(plan.info)
        if view in costs:
            notes[name]["cost"] = float((plan.matrix * costs[view]).sum())
    return {(space, view): plan for view, plan in found.items()}


def match_activations(
    spec0: AlignmentSpec,
    spec1: AlignmentSpec,
    stats: Statistics,
    config: FusionConfig,
    notes: dict[str, dict[str, Any]] | None = None,
) -> Plans:
    """Plans of all spaces that have activations; a space's points are compared side by side."""
    plans: Plans = {}
    notes = {} if notes is None else notes
    for name, space in spec1.spaces.items():
        by_view: dict[str, list[str]] = {}
        for op in spec1.ops:
            if op.space == name and stats.has([op.output]) and op.view != "qk_norm":
                by_view.setdefault(op.view, []).append(op.output)
        group0, group1 = spec0.spaces[name].group, space.group
        needed = [view for view in group1.views() if view not in ("o", "qk_norm")]
        if any(view not in by_view for view in needed):
            continue
        local = config.at(name)
        costs = {view: stats.cost(by_view[view], local) for view in needed}
        plans |= _space_plans(name, costs, group0, group1, config, notes)
    return plans


class _Tensors:
    """The source's tensors with all axes moved by the plans that are known."""

    def __init__(
        self,
        source: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor],
        spec0: AlignmentSpec,
        spec1: AlignmentSpec,
    ) -> None:
        # Tensors are read when they are needed: the states may lie on disk.
        self.source, self.anchor = source, anchor
        self.spec0, self.spec1 = spec0, spec1
        self.on: dict[str, list[tuple[str, str]]] = {}
        for (key1, tensor1), (key0, _) in zip(spec1.tensors.items(), spec0.tensors.items(), strict=True):
            if key1 not in self.anchor:
                continue
            for axis in tensor1.axes:
                for part in axis_parts(axis) if axis is not None else ():
                    pairs = self.on.setdefault(part.space, [])
                    if (key0, key1) not in pairs:
                        pairs.append((key0, key1))

    def squared(self, space: str, view: str, plans: Plans, *, only_matched: bool) -> Tensor | None:
        """Squared distances between the slices of all tensors along a view of a space, ``(n0, n1)``.

        Args:
            space: which.
            view: of the space.
            plans: what the other axes are moved by.
            only_matched: leave out tensors of which another axis is not yet matched.
        """
        total: Tensor | None = None
        for key0, key1 in self.on.get(space, ()):
            axes0, axes1 = self.spec0.tensors[key0].axes, self.spec1.tensors[key1].axes
            if only_matched and not self._ready(axes1, space, plans):
                continue
            for number, axis in enumerate(axes1):
                for start0, start1, part0, part1 in self._parts(axes0[number], axis):
                    if part1.space != space or part1.view != view:
                        continue
                    n0, n1 = axis_size(self.spec0, part0), axis_size(self.spec1, part1)
                    rows0 = self._moved(key0, number, plans).movedim(number, 0)[start0 : start0 + n0]
                    rows1 = self.anchor[key1].double().movedim(number, 0)[start1 : start1 + n1]
                    found = _slices(rows0, rows1, part1.inner)
                    total = found if total is None else total + found
        return total

    def _parts(self, axis0: Any, axis1: Any) -> list[tuple[int, int, Axis, Axis]]:
        if axis0 is None or axis1 is None:
            return []
        found: list[tuple[int, int, Axis, Axis]] = []
        start0 = start1 = 0
        for part0, part1 in zip(axis_parts(axis0), axis_parts(axis1), strict=True):
            found.append((start0, start1, part0, part1))
            start0, start1 = start0 + axis_size(self.spec0, part0), start1 + axis_size(self.spec1, part1)
        return found

    def _ready(self, axes: tuple[Any, ...], space: str, plans: Plans) -> bool:
        return all(
            part.space == space or (part.space, part.view) in plans
            for axis in axes
            if axis is not None
            for part in axis_parts(axis)
        )

    def _moved(self, key: str, keep: int, plans: Plans) -> Tensor:
        """A source tensor with every axis but one moved; axes on the same space elsewhere are moved too."""
        tensor = self.source[key].double()
        for number, axis in enumerate(self.spec0.tensors[key].axes):
            if axis is None or number == keep:
                continue
            parts = axis_parts(axis)
            pieces = tensor.split([axis_size(self.spec0, part) for part in parts], dim=number)
            moved = []
            for piece, part in zip(pieces, parts, strict=True):
                plan = plans.get((part.space, part.view))
                matrix = None if plan is None else plan.out_map() if part.side == "out" else plan.in_map()
                moved.append(map_axis(piece, matrix, number, inner=part.inner))
            tensor = moved[0] if len(moved) == 1 else torch.cat(moved, number)
        return tensor


def _slices(rows0: Tensor, rows1: Tensor, inner: int) -> Tensor:
    """Squared distances between slices; where a neuron has ``inner`` positions they belong together."""
    flat0, flat1 = (rows.unflatten(0, (-1, inner)).flatten(1) for rows in (rows0, rows1))
    if flat0.shape[1] != flat1.shape[1]:
        raise ShapeError(f"slices have {flat0.shape[1]} and {flat1.shape[1]} entries: fixed axes differ")
    cross = flat0 @ flat1.T
    return (flat0.square().sum(1)[:, None] + flat1.square().sum(1)[None, :] - 2 * cross).clamp_(min=0)


def match_weights(
    source: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    spec0: AlignmentSpec,
    spec1: AlignmentSpec,
    config: FusionConfig,
    spaces: list[str] | None = None,
    known: Plans | None = None,
    notes: dict[str, dict[str, Any]] | None = None,
) -> Plans:
    """Plans of spaces by coordinate ascent on the distance between all tensors.

    The first sweep goes forward and compares only tensors whose other axes are fixed or matched, which
    recovers a pure relabelling for certain; later sweeps take all tensors in random order until nothing
    changes.

    Args:
        source: the source's tensors.
        anchor: the anchor's.
        spec0: the source's specification.
        spec1: the anchor's.
        config: solver, and ``seed`` of the order.
        spaces: which; all by default.
        known: plans that stay.
        notes: gets the costs.

    Returns:
        Plans by (space, view).
    """
    tensors = _Tensors(source, anchor, spec0, spec1)
    plans: Plans = dict(known or {})
    notes = {} if notes is None else notes
    todo = [name for name in spec1.spaces if spaces is None or name in spaces]
    mine = list(todo)
    while todo:
        done = [name for name in todo if _match_one(name, tensors, plans, config, notes, only_matched=True)]
        if not done:  # nothing hangs on fixed axes alone: start somewhere
            _match_one(todo[0], tensors, plans, config, notes, only_matched=False)
            done = todo[:1]
        todo = [name for name in todo if name not in done]
    hard = config.solver in ("emd", "lsa")
    draws = rng(config.seed, "weight matching")
    for _ in range(_SWEEPS if hard else 1):
        changed = False
        for name in (mine[i] for i in draws.permutation(len(mine))):
            before = {key: plan.matrix for key, plan in plans.items() if key[0] == name}
            held = dict(plans)
            _match_one(name, tensors, plans, config, notes, only_matched=False)
            same = all(torch.equal(plans[key].matrix, matrix) for key, matrix in before.items())
            if not same and hard and not _better(name, tensors, held, plans):
                plans.update({key: held[key] for key in before})
                same = True
            changed |= not same
        if not changed:
            break
    return {key: plan for key, plan in plans.items() if key[0] in mine}


def _better(name: str, tensors: _Tensors, old: Plans, new: Plans) -> bool:
    """Whether a space's new plans really lower the distance (ties and heads could go back and forth)."""

    def distance(plans: Plans) -> float:
        total = 0.0
        for view in tensors.spec1.spaces[name].group.views():
            squared = tensors.squared(name, view, plans, only_matched=False)
            if squared is not None and (name, view) in plans:
                total += float((plans[name, view].matrix * squared).sum() * len(squared))
        return total

    before, after = distance(old), distance(new)
    return after < before - 1e-9 * max(abs(before), 1.0)


def _match_one(
    name: str,
    tensors: _Tensors,
    plans: Plans,
    config: FusionConfig,
    notes: dict[str, dict[str, Any]],
    *,
    only_matched: bool,
) -> bool:
    group0, group1 = tensors.spec0.spaces[name].group, tensors.spec1.spaces[name].group
    if isinstance(group1, Frozen):
        plans.update(_space_plans(name, {}, group0, group1, config, notes))
        return True
    costs: dict[str, Tensor] = {}
    for view in group1.views():
        if view in ("o", "qk_norm"):
            continue
        squared = tensors.squared(name, view, plans, only_matched=only_matched)
        if squared is None:
            if only_matched:
                return False
            squared = torch.zeros(group0.views()[view], group1.views()[view], dtype=torch.float64)
        costs[view] = squared
    if "o" in group1.views():  # the columns of the output projection say more of the values
        _add_outputs(name, tensors, plans, costs, only_matched=only_matched)
    local = config.at(name)
    options: dict[str, Any] = {
        "squared_cost": True,
        "normalize": local.normalize,
        "clip": absolute_clip(local),
    }
    if local.solver in ("emd", "lsa"):
        options |= {"normalize": "none", "clip": None}
    scaled = {view: finish_cost(value, **options) for view, value in costs.items()}
    plans.update(_space_plans(name, scaled, group0, group1, config, notes))
    return True


def _add_outputs(
    name: str, tensors: _Tensors, plans: Plans, costs: dict[str, Tensor], *, only_matched: bool
) -> None:
    from ot_fusion.groups import Heads

    squared = tensors.squared(name, "o", plans, only_matched=only_matched)
    group0, group1 = tensors.spec0.spaces[name].group, tensors.spec1.spaces[name].group
    if squared is None or not isinstance(group0, Heads) or not isinstance(group1, Heads):
        return
    if group0.ratio == group1.ratio == 1:
        costs["v"] = costs["v"] + squared
        return
    tiles = squared.view(group0.kv, group0.ratio, group0.width, group1.kv, group1.ratio, group1.width)
    costs["v"] = costs["v"] + tiles.mean((1, 4)).reshape(costs["v"].shape)

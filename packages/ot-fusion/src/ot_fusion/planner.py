"""Finding the plans of a flow: from activations, from weights, or from an earlier run.

Source: section 4 of the paper.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fusion_core.errors import FusionWarning
from ot_fusion.apply import map_axis
from ot_fusion.config import FusionConfig
from ot_fusion.cost import ground_cost
from ot_fusion.errors import InputError, SpecError
from ot_fusion.groups import Heads
from ot_fusion.hooks import Statistics
from ot_fusion.layers import (
    absolute_clip,
    feature_plan,
    importance_masses,
    plan_of_cost,
    query_key_plan,
    row_features,
)
from ot_fusion.legal import is_legal, plan_heads
from ot_fusion.plan import Plan
from ot_fusion.spec.types import AlignmentSpec, Axis, Concat, Op

__all__ = ["FlowResult", "Planner", "Weights"]


@dataclass
class FlowResult:
    """The source in the anchor's coordinates.

    Attributes:
        aligned: its tensors; those that are not fused are absent.
        maps: the plan of every activation that has one.
        costs: by activation, what the solver said.
    """

    aligned: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    maps: dict[str, Plan] = field(default_factory=dict[str, Plan])
    costs: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


class Weights:
    """Reads and writes the part of a tensor that an operation owns, as ``(out, in, ...)``."""

    def __init__(self, state: Mapping[str, Tensor], spec: AlignmentSpec) -> None:
        self.state, self.spec = state, spec

    def in_axis(self, key: str) -> Axis | None:
        """The declared input axis."""
        for axis in self.spec.tensors[key].axes:
            if isinstance(axis, Axis) and axis.side == "in":
                return axis
        return None

    def transposed(self, key: str) -> bool:
        """Whether the input axis comes first, as in GPT-2's Conv1D."""
        axes = self.spec.tensors[key].axes
        first = axes[0]
        if isinstance(first, Axis) and first.side == "in":
            return True
        return isinstance(axes[-1], Concat) and len(axes) > 1

    def read(self, op: Op, key: str) -> Tensor:
        """This operation's rows."""
        tensor = self.state[key]
        if tensor.ndim > 1 and self.transposed(key):
            tensor = tensor.transpose(0, 1)
        return tensor if op.part is None else tensor[op.part[0] : op.part[1]]


class Planner:
    """Holds both models and the maps found so far, and finds the next one."""

    def __init__(
        self,
        source: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor],
        spec0: AlignmentSpec,
        spec1: AlignmentSpec,
        stats: Statistics | None,
        config: FusionConfig,
        known: Mapping[str, Plan] | None = None,
    ) -> None:
        self.w0, self.w1 = Weights(source, spec0), Weights(anchor, spec1)
        self.spec0, self.spec1, self.stats, self.config = spec0, spec1, stats, config
        self.pairs = {b.output: (a, b) for a, b in zip(spec0.ops, spec1.ops, strict=True)}
        self.maps: dict[str, Plan | None] = {}
        self.joint: dict[str, Tensor] = {}  # activation -> map of queries and keys that is no plan
        self.held: dict[str, tuple[Op, Op, Tensor]] = {}
        self.norm_plans: dict[str, Plan] = {}
        self.parts: dict[str, dict[tuple[int, int] | None, Tensor]] = {}
        self.known = known or {}
        self.result = FlowResult()
        self.fixed_nodes: set[str] = set()
        self.gates = {node: op.inputs for op in spec1.ops if op.kind == "gate" for node in op.inputs}
        self.attentions = {node: op for op in spec1.ops if op.kind == "attention" for node in op.inputs[:3]}

    def _input(self, op: Op, number: int = 0) -> Plan | None:
        if not op.inputs:
            return None
        if op.inputs[number] not in self.maps:
            raise SpecError(f"{op.output} reads {op.inputs[number]}, which no earlier operation makes")
        return self.maps[op.inputs[number]]

    def _moved_input(self, op0: Op, op1: Op) -> Tensor:
        weight = self.w0.read(op0, str(op0.weight))
        plan = self._input(op1)
        if plan is None:
            return weight
        axis = self.w0.in_axis(str(op0.weight))
        return map_axis(weight, plan.in_map(), 1, inner=axis.inner if axis else 1)

    def _table_plan(self, op: Op, t0: Tensor, t1: Tensor) -> Plan:
        if op.output in self.known:
            return self._noted(op, self.known[op.output])
        config = self.config.at(op.output)
        rows = [t.flatten(0, -2).T.double() for t in (t0, t1)]
        if rows[0].shape[1] != rows[1].shape[1]:
            raise InputError(
                f"the tables of {op.output} have {rows[0].shape[1]} and {rows[1].shape[1]} rows, wanted "
                "equal "
                "vocabularies and positions"
            )
        if config.features == "wts" and config.row_norm:
            rows = [r / (r.norm(dim=1, keepdim=True) + 1e-9) for r in rows]
        return self._noted(op, feature_plan(rows[0], rows[1], config))

    # Plans.

    def _find_plan(self, op: Op) -> None:
        node = op.output
        if node in self.known:
            self._take_known(op)
            return
        groups = self._groups(op)
        if groups is not None and self.config.legal == "enforce" and node in self.attentions:
            self._legal_plans(self.attentions[node], groups)
            return
        attention = self.attentions.get(node)
        if attention is not None and self.config.qk != "separate" and node in attention.inputs[:2]:
            self._query_key_plan(attention)
            return
        members = [self.pairs[name][1] for name in self.gates.get(node, (node,))]
        plan = self._plan_of(members)
        for member in members:
            self.maps[member.output] = plan
        if groups is not None and self.config.legal == "warn" and not is_legal(plan, *groups, op.view):
            warnings.warn(
                f"the map of {node} mixes attention heads, which changes the function; legal='enforce' keeps "
                f"to {groups[0]}",
                FusionWarning,
                stacklevel=5,
            )

    def _take_known(self, op: Op) -> None:
        """A plan of an earlier run; with legal heads the layer's other plans come with it."""
        self.maps[op.output] = self._noted(op, self.known[op.output])
        attention = self.attentions.get(op.output)
        if attention is not None and attention.output in self.known:
            self.maps[attention.output] = self.known[attention.output]
            norm = f"{attention.output}.qk_norm"
            if norm in self.known:
                self.norm_plans[str(attention.space)] = self.result.maps[norm] = self.known[norm]

    def _groups(self, op: Op) -> tuple[Heads, Heads] | None:
        if op.space is None:
            return None
        pair = self.spec0.spaces[str(self.pairs[op.output][0].space)].group, self.spec1.spaces[op.space].group
        return (pair[0], pair[1]) if isinstance(pair[0], Heads) and isinstance(pair[1], Heads) else None

    def _features(self, op: Op) -> tuple[Tensor, Tensor]:
        """Weight rows of source (inputs aligned) and anchor, not yet divided."""
        op0, op1 = self.pairs[op.output]
        moved = self._moved_input(op0, op1)
        anchor = self.w1.read(op1, str(op1.weight))
        parts = [moved.flatten(1), anchor.flatten(1)]
        if self.config.wts_bias and op0.bias is not None and op1.bias is not None:
            biases = self.w0.read(op0, op0.bias), self.w1.read(op1, op1.bias)
            parts = [torch.cat([part, bias[:, None]], 1) for part, bias in zip(parts, biases, strict=True)]
        return parts[0], parts[1]

    def _masses(self, op: Op, config: FusionConfig) -> tuple[Tensor | None, Tensor | None]:
        op0, op1 = self.pairs[op.output]
        weights = self.w0.read(op0, str(op0.weight)), self.w1.read(op1, str(op1.weight))
        return importance_masses(weights[0], config.importance), importance_masses(
            weights[1], config.importance
        )

    def _plan_of(self, ops: list[Op], *, last: bool = False) -> Plan:
        config = self.config.at(ops[0].output)
        masses = self._masses(ops[0], config)
        names = [op.output for op in ops]
        if config.features == "acts":
            if self.stats is None or not self.stats.has(names):
                where = "the last layer" if last else ", ".join(names)
                raise InputError(f"there are no activations of {where}; give data, or use features='wts'")
            plan = self.stats.plan(names, config, masses)
        else:
            rows = [self._features(op) for op in ops]
            sides = [torch.cat([pair[side] for pair in rows], 1).double() for side in (0, 1)]
            rows0, rows1 = (row_features(side, _no_bias(config)) for side in sides)
            plan = feature_plan(rows0, rows1, config, masses)
        return self._noted(ops[0], plan)

    def _noted(self, op: Op, plan: Plan) -> Plan:
        self.result.costs[op.output] = dict(plan.info)
        return plan

    def _query_key_plan(self, attention: Op) -> None:
        names = (attention.inputs[0], attention.inputs[1])
        config = self.config.at(attention.output)
        label = names[0] if config.qk == "shared" else f"{attention.output}.qk"
        if label in self.known:
            plan = self.known[label]
        elif config.features == "acts":
            wanted = list(names) if config.qk == "shared" else [label]
            if self.stats is None or not self.stats.has(wanted):
                raise InputError(
                    f"there are no activations of {', '.join(wanted)}; give data, or use features='wts'"
                )
            plan = self.stats.plan(wanted, config)
            if config.qk == "joint" and config.official_side("joint_order"):
                plan = _swapped(plan)
        else:
            rows = {name: self._features(self.pairs[name][1]) for name in names}
            plan = query_key_plan({n: (a.double(), b.double()) for n, (a, b) in rows.items()}, config, names)
        self.result.costs[label] = dict(plan.info)
        for name in names:
            if config.qk == "shared":
                self.maps[name] = plan
            else:
                self.joint[name] = plan.out_map()
        if config.qk == "joint":
            self.result.maps[label] = plan

    def _legal_plans(self, attention: Op, groups: tuple[Heads, Heads]) -> None:
        costs: dict[str, Tensor] = {}
        config = self.config.at(attention.output)
        for view, node in zip(("q", "k", "v"), attention.inputs[:3], strict=True):
            op = self.pairs[node][1]
            if config.features == "acts":
                if self.stats is None or not self.stats.has([node]):
                    raise InputError(f"there are no activations of {node}; give data, or use features='wts'")
                costs[view] = self.stats.cost([node], config)
            else:
                sides = [row_features(side.double(), _no_bias(config)) for side in self._features(op)]
                costs[view] = ground_cost(
                    sides[0], sides[1], config.metric, config.squared, config.normalize, absolute_clip(config)
                )
        plans = plan_heads(costs, *groups, lambda cost: plan_of_cost(cost, config))
        for view, node in zip(("q", "k", "v"), attention.inputs[:3], strict=True):
            self.maps[node] = self._noted(self.pairs[node][1], plans[view])
            self.result.costs[node]["cost"] = float((plans[view].matrix * costs[view]).sum())
        self.maps[attention.output] = plans["o"]
        if groups[0].norm == "head":
            self.norm_plans[str(attention.space)] = plans["qk_norm"]
            self.result.maps[f"{attention.output}.qk_norm"] = plans["qk_norm"]


def _no_bias(config: FusionConfig) -> FusionConfig:
    return config if not config.wts_bias else config.replace(wts_bias=False)


def _swapped(plan: Plan) -> Plan:
    """The authors' plan of (keys, queries), which their code applies to (queries, keys)."""
    n0, n1 = plan.matrix.shape
    return replace(plan, matrix=plan.matrix.roll((n0 // 2, n1 // 2), (0, 1)))

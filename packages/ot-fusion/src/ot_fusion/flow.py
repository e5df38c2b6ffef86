"""The paper's strategy: maps flow through the network, each layer is aligned with the map of its inputs.

Source: section 4 of the paper (transportation-map flow graph); the authors' deviations where the config asks for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    apply_query_key,
    feature_plan,
    importance_masses,
    plan_of_cost,
    query_key_map,
    row_features,
)
from ot_fusion.legal import is_legal, plan_heads
from ot_fusion.plan import Plan
from ot_fusion.policies import branch_shares, merge_maps
from ot_fusion.spec.types import AlignmentSpec, Axis, Concat, Op

__all__ = ["FlowResult", "flow_pair", "in_block"]


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


def in_block(op: Op) -> bool:
    """Whether an operation belongs to a transformer block (the authors' code averages those half and half)."""
    return op.output.startswith("blocks.")


def flow_pair(
    source: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    spec0: AlignmentSpec,
    spec1: AlignmentSpec,
    stats: Statistics | None,
    config: FusionConfig,
) -> FlowResult:
    """Align a source with an anchor, operation by operation.

    Args:
        source: the source's tensors.
        anchor: the anchor's.
        spec0: the source's specification.
        spec1: the anchor's, with the same operations; sizes may differ.
        stats: activations, for features ``acts``; None for ``wts``.
        config: costs, solvers, policies.

    Raises:
        SpecError: specifications of different operations.
        InputError: activations that are missing.
    """
    if [(op.kind, op.output) for op in spec0.ops] != [(op.kind, op.output) for op in spec1.ops]:
        raise SpecError(
            f"the specs {spec0.name!r} and {spec1.name!r} have different operations; align models of unequal depth "
            "with layer_map"
        )
    if not spec1.ops:
        raise SpecError(
            f"the spec {spec1.name!r} has no operations, which strategy='flow' walks; use 'consistent'"
        )
    return _Flow(source, anchor, spec0, spec1, stats, config).run()


class _Weights:
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


class _Flow:
    def __init__(
        self,
        source: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor],
        spec0: AlignmentSpec,
        spec1: AlignmentSpec,
        stats: Statistics | None,
        config: FusionConfig,
    ) -> None:
        self.w0, self.w1 = _Weights(source, spec0), _Weights(anchor, spec1)
        self.spec0, self.spec1, self.stats, self.config = spec0, spec1, stats, config
        self.pairs = {b.output: (a, b) for a, b in zip(spec0.ops, spec1.ops, strict=True)}
        self.maps: dict[str, Plan | None] = {}
        self.joint: dict[str, Tensor] = {}  # activation -> map of queries and keys that is no plan
        self.held: dict[str, tuple[Op, Op, Tensor]] = {}
        self.norm_plans: dict[str, Plan] = {}
        self.parts: dict[str, dict[tuple[int, int] | None, Tensor]] = {}
        self.result = FlowResult()
        self.gates = {node: op.inputs for op in spec1.ops if op.kind == "gate" for node in op.inputs}
        self.attentions = {node: op for op in spec1.ops if op.kind == "attention" for node in op.inputs[:3]}
        self.fixed_nodes = self._fixed_nodes()

    def _fixed_nodes(self) -> set[str]:
        """The authors' code gives the last branch no map where the classifier is not fused."""
        heads = [op for op in self.spec1.ops if op.kind == "linear" and op.space is None and op.weight]
        last = [op for op in self.spec1.ops if op.kind == "add" and in_block(op)]
        if self.config.faithful != "official" or not heads or not last:
            return set()
        return set() if self.config.fuses(str(heads[-1].weight)) else {last[-1].inputs[1], last[-1].output}

    def run(self) -> FlowResult:
        """Walk the operations."""
        for output, (op0, op1) in self.pairs.items():
            step = getattr(self, f"_{op1.kind}")
            step(op0, op1)
            plan = self.maps.get(output)
            if plan is not None and (op1.kind in ("linear", "embed", "add")):
                self.result.maps[output] = plan
        self._assemble()
        return self.result

    def _input(self, op: Op, number: int = 0) -> Plan | None:
        if not op.inputs:
            return None
        if op.inputs[number] not in self.maps:
            raise SpecError(f"{op.output} reads {op.inputs[number]}, which no earlier operation makes")
        return self.maps[op.inputs[number]]

    # One method per kind of operation.

    def _embed(self, op0: Op, op1: Op) -> None:
        if op0.weight is None or op1.weight is None:
            raise SpecError(f"the table of {op1.output} has no weight")
        t0, t1 = self.w0.state[op0.weight], self.w1.state[op1.weight]
        feeds_join = any(op.kind == "join" and op1.output in op.inputs[1:] for op in self.spec1.ops)
        if feeds_join and self.config.class_token_rule == "stream":
            self.maps[op1.output] = None  # the token takes the stream's map at the join
            return
        plan = self._table_plan(op1, t0, t1)
        self.maps[op1.output] = plan
        self._write(op1.weight, None, map_axis(t0, plan.out_map(), -1))

    def _table_plan(self, op: Op, t0: Tensor, t1: Tensor) -> Plan:
        config = self.config.at(op.output)
        rows = [t.flatten(0, -2).T.double() for t in (t0, t1)]
        if rows[0].shape[1] != rows[1].shape[1]:
            raise InputError(
                f"the tables of {op.output} have {rows[0].shape[1]} and {rows[1].shape[1]} rows, wanted equal "
                "vocabularies and positions"
            )
        if config.features == "wts" and config.row_norm:
            rows = [r / (r.norm(dim=1, keepdim=True) + 1e-9) for r in rows]
        return self._noted(op, feature_plan(rows[0], rows[1], config))

    def _linear(self, op0: Op, op1: Op) -> None:
        if op0.weight is None or op1.weight is None:
            raise SpecError(f"the layer {op1.output} has no weight")
        moved = self._moved_input(op0, op1)
        node = op1.output
        joint = None
        if op1.space is None or node in self.fixed_nodes:
            self.maps[node] = None
            if self.config.transport_last and op1.space is None and op1 is self.spec1.ops[-1]:
                self.maps[node] = self._plan_of([op1], last=True)
        else:
            if node not in self.maps and node not in self.joint:
                self._find_plan(op1)
            joint = self.joint.get(node)
        plan = self.maps.get(node)
        if joint is not None:
            self._joint_rows(op0, op1, moved)
            return
        out_map = None if plan is None else plan.out_map()
        self._write(op1.weight, op1.part, map_axis(moved, out_map, 0))
        if op0.bias is not None and op1.bias is not None:
            self._write(op1.bias, op1.part, map_axis(self.w0.read(op0, op0.bias), out_map, 0))

    def _moved_input(self, op0: Op, op1: Op) -> Tensor:
        weight = self.w0.read(op0, str(op0.weight))
        plan = self._input(op1)
        if plan is None:
            return weight
        axis = self.w0.in_axis(str(op0.weight))
        return map_axis(weight, plan.in_map(), 1, inner=axis.inner if axis else 1)

    def _joint_rows(self, op0: Op, op1: Op, moved: Tensor) -> None:
        """Keep queries until the keys are there, then move both through their one map."""
        attention = self.attentions[op1.output]
        held = self.held
        held[op1.output] = (op0, op1, moved)
        names = attention.inputs[:2]
        if not all(name in held for name in names):
            return
        whole = self.joint[op1.output]
        both = [held[name] for name in names]
        for (_, target, _), rows in zip(
            both, apply_query_key([moved for _, _, moved in both], whole, self.config), strict=True
        ):
            self._write(str(target.weight), target.part, rows)
        if all(first.bias is not None and second.bias is not None for first, second, _ in both):
            biases = [self.w0.read(first, str(first.bias)) for first, _, _ in both]
            for (_, target, _), rows in zip(both, apply_query_key(biases, whole, self.config), strict=True):
                self._write(str(target.bias), target.part, rows)
        for name in names:
            self.maps[name] = None

    def _norm(self, op0: Op, op1: Op) -> None:
        plan = self._input(op1)
        if self.config.official_side("post_norm") and op1.kind == "norm" and "post_norm" in self.spec1.notes:
            plan = self._official_post_norm(op1, plan)
        if op1.view == "fixed":
            plan = None
        if op1.view == "qk_norm":  # one weight for all heads
            plan = self.norm_plans.get(str(op1.space))
        matrix = None if plan is None else plan.out_map()
        keys0 = [op0.weight, op0.bias, *op0.buffers]
        keys1 = [op1.weight, op1.bias, *op1.buffers]
        for key0, key1 in zip(keys0, keys1, strict=True):
            if key0 is not None and key1 is not None:
                self._write(key1, None, map_axis(self.w0.state[key0], matrix, 0))
        self.maps[op1.output] = self._input(op1)

    def _official_post_norm(self, op: Op, plan: Plan | None) -> Plan | None:
        """The authors average a block's second norm with the branch's map, before the maps are merged."""
        before = self.pairs[op.inputs[0]][1]
        is_second = op.output.endswith(".out")
        return self.maps[before.inputs[1]] if before.kind == "add" and is_second else plan

    def _elementwise(self, _op0: Op, op1: Op) -> None:
        self.maps[op1.output] = self._input(op1)

    _flatten = _elementwise

    def _gate(self, _op0: Op, op1: Op) -> None:
        self.maps[op1.output] = self._input(op1)

    def _join(self, op0: Op, op1: Op) -> None:
        plan = self._input(op1)
        if self.config.class_token_rule == "stream":
            matrix = None if plan is None else plan.out_map()
            for token in op1.inputs[1:]:
                first, second = self.pairs[token]
                self._write(str(second.weight), None, map_axis(self.w0.state[str(first.weight)], matrix, -1))
        self.maps[op1.output] = plan

    def _attention(self, _op0: Op, op1: Op) -> None:
        if op1.output in self.maps:
            return
        plan = self._input(op1, 2)
        if plan is not None and op1.space is not None:
            groups = self._groups(op1)
            if groups is not None and (groups[0].ratio > 1 or groups[1].ratio > 1):
                plan = _repeat_groups(plan, *groups)
        self.maps[op1.output] = plan

    def _add(self, _op0: Op, op1: Op) -> None:
        resid, branch = (self._input(op1, number) for number in (0, 1))
        if op1.output in self.fixed_nodes:
            self.maps[op1.output] = None
            return
        first = self.pairs[op1.inputs[0]][1]
        if self.config.official_side("identity_skip") and resid is None:
            self.maps[op1.output] = branch
            return
        if (
            self.config.official_side("shortcut")
            and first.kind != "add"
            and first.output.endswith("shortcut")
        ):
            # The predecessor averages the two maps where a 3 x 3 convolution follows, else it takes the shortcut's.
            plan = self._official_shortcut(op1, resid, branch)
            self.maps[op1.output] = plan
            return
        if self.config.official_side("shortcut") and self.config.map_rule.startswith("otfusion"):
            self.maps[op1.output] = branch  # identity skips are ignored
            return
        known = resid or branch
        if known is None:
            self.maps[op1.output] = None
            return
        policy = self.config.residual
        if policy.startswith("weighted"):
            sizes = self.stats.sizes.get(op1.output) if self.stats is not None else None
            if sizes is None:
                raise InputError(
                    f"residual={policy!r} weighs by activations; give data, with features='acts'"
                )
            share = branch_shares(policy, *sizes)
            eye = Plan.identity(*known.matrix.shape, dtype=known.matrix.dtype).matrix.to(known.matrix)
            first_matrix, second_matrix = (eye if p is None else p.matrix for p in (resid, branch))
            share = share.to(known.matrix) if isinstance(share, Tensor) else share
            merged = share * first_matrix + (1 - share) * second_matrix
        else:
            merged = merge_maps(
                policy, *(None if p is None else p.matrix for p in self._filled(resid, branch))
            )
            if policy == "resid_as_identity":
                n0, n1 = known.matrix.shape
                merged = torch.eye(n0, n1, dtype=known.matrix.dtype, device=known.matrix.device) / n0
        self.maps[op1.output] = None if merged is None else Plan(merged, known.normalization)

    def _official_shortcut(self, op: Op, resid: Plan | None, branch: Plan | None) -> Plan | None:
        names = {op.output}
        for later in self.spec1.ops:
            if names & set(later.inputs):
                if later.kind == "linear" and later.weight is not None:
                    kernel = self.w1.state[later.weight].shape[2:]
                    if tuple(kernel) != (3, 3) or resid is None or branch is None:
                        return resid
                    return Plan((resid.matrix + branch.matrix) / 2, resid.normalization)
                names.add(later.output)
        return resid

    def _filled(self, resid: Plan | None, branch: Plan | None) -> tuple[Plan | None, Plan | None]:
        """Identities as plans, so that masses agree."""
        known = resid or branch
        if known is None:
            return resid, branch
        eye = Plan.identity(*known.matrix.shape, normalization=known.normalization, dtype=known.matrix.dtype)
        return resid or eye, branch or eye

    # Plans.

    def _find_plan(self, op: Op) -> None:
        node = op.output
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
                f"the map of {node} mixes attention heads, which changes the function; legal='enforce' keeps to {groups[0]}",
                FusionWarning,
                stacklevel=5,
            )

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
            plan = feature_plan(*(row_features(side, _no_bias(config)) for side in sides), config, masses)
        return self._noted(ops[0], plan)

    def _noted(self, op: Op, plan: Plan) -> Plan:
        self.result.costs[op.output] = dict(plan.info)
        return plan

    def _query_key_plan(self, attention: Op) -> None:
        names = (attention.inputs[0], attention.inputs[1])
        config = self.config.at(attention.output)
        if config.features == "acts":
            wanted = list(names) if config.qk == "shared" else [f"{attention.output}.qk"]
            if self.stats is None or not self.stats.has(wanted):
                raise InputError(
                    f"there are no activations of {', '.join(wanted)}; give data, or use features='wts'"
                )
            plan = self.stats.plan(wanted, config)
            whole = plan.out_map()
            if config.qk == "joint" and config.official_side("joint_order"):
                whole = _swapped(whole)
        else:
            rows = {name: self._features(self.pairs[name][1]) for name in names}
            whole = query_key_map({n: (a.double(), b.double()) for n, (a, b) in rows.items()}, config, names)
            plan = None
        for name in names:
            if config.qk == "shared" and plan is not None:
                self.maps[name] = plan
            else:
                self.joint[name] = whole

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

    # Writing.

    def _write(self, key: str, part: tuple[int, int] | None, rows: Tensor) -> None:
        self.parts.setdefault(key, {})[part] = rows

    def _assemble(self) -> None:
        for key, pieces in self.parts.items():
            ordered = [pieces[part] for part in sorted(pieces, key=lambda part: part or (0, 0))]
            tensor = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
            if tensor.ndim > 1 and self.w1.transposed(key):
                tensor = tensor.transpose(0, 1)
            self.result.aligned[key] = tensor.contiguous()


def _no_bias(config: FusionConfig) -> FusionConfig:
    return config if not config.wts_bias else config.replace(wts_bias=False)


def _swapped(whole: Tensor) -> Tensor:
    """The authors' map of (keys, queries), which their code applies to (queries, keys)."""
    n0, n1 = whole.shape
    return whole.roll((n0 // 2, n1 // 2), (0, 1))


def _repeat_groups(plan: Plan, group0: Heads, group1: Heads) -> Plan:
    """The plan of the query heads' outputs from that of the key-value heads."""
    if group0.ratio != group1.ratio:
        raise InputError(
            f"{group0.ratio} query heads per group cannot take the map of {group1.ratio}; use legal='enforce'"
        )
    r, d0, d1 = group0.ratio, group0.width, group1.width
    tiles = plan.matrix.view(group0.kv, d0, group1.kv, d1)
    eye = torch.eye(r, dtype=tiles.dtype, device=tiles.device) / r
    whole = torch.einsum("iajb,rs->irajsb", tiles, eye)
    return Plan(whole.reshape(group0.kv * r * d0, group1.kv * r * d1), plan.normalization)

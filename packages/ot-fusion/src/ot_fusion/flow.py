"""The paper's strategy: maps flow through the network, each layer is aligned with the map of its inputs.

Source: section 4 of the paper (transportation-map flow graph); the authors' deviations where the config asks
for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ot_fusion.apply import map_axis
from ot_fusion.config import FusionConfig
from ot_fusion.errors import InputError, SpecError
from ot_fusion.groups import Heads
from ot_fusion.hooks import Statistics
from ot_fusion.layers import (
    apply_query_key,
)
from ot_fusion.plan import Plan
from ot_fusion.planner import FlowResult, Planner
from ot_fusion.policies import branch_shares, merge_maps
from ot_fusion.spec.types import AlignmentSpec, Op

__all__ = ["FlowResult", "flow_pair", "in_block"]


def in_block(op: Op) -> bool:
    """Whether an operation is in a transformer block; the authors' code averages those half and half."""
    return op.output.startswith("blocks.")


def flow_pair(
    source: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    spec0: AlignmentSpec,
    spec1: AlignmentSpec,
    stats: Statistics | None,
    config: FusionConfig,
    known: Mapping[str, Plan] | None = None,
) -> FlowResult:
    """Align a source with an anchor, operation by operation.

    Args:
        source: the source's tensors.
        anchor: the anchor's.
        spec0: the source's specification.
        spec1: the anchor's, with the same operations; sizes may differ.
        stats: activations, for features ``acts``; None for ``wts``.
        config: costs, solvers, policies.
        known: plans of an earlier run, which are taken instead of solving.

    Raises:
        SpecError: specifications of different operations.
        InputError: activations that are missing.
    """
    if [(op.kind, op.output) for op in spec0.ops] != [(op.kind, op.output) for op in spec1.ops]:
        raise SpecError(
            f"the specs {spec0.name!r} and {spec1.name!r} have different operations; align models of unequal "
            "depth "
            "with layer_map"
        )
    if not spec1.ops:
        raise SpecError(
            f"the spec {spec1.name!r} has no operations, which strategy='flow' walks; use 'consistent'"
        )
    return _Flow(source, anchor, spec0, spec1, stats, config, known).run()


class _Flow(Planner):
    """Walks the operations, writes aligned tensors, hands maps on."""

    def _closed_nodes(self) -> set[str]:
        """The authors' code gives the last branch no map where the classifier is not fused."""
        heads = [op for op in self.spec1.ops if op.kind == "linear" and op.space is None and op.weight]
        last = [op for op in self.spec1.ops if op.kind == "add" and in_block(op)]
        if self.config.faithful != "official" or not heads or not last:
            return set()
        return set() if self.config.fuses(str(heads[-1].weight)) else {last[-1].inputs[1], last[-1].output}

    def run(self) -> FlowResult:
        """Walk the operations."""
        self.fixed_nodes = self._closed_nodes()
        for output, (op0, op1) in self.pairs.items():
            step = getattr(self, f"_{op1.kind}")
            step(op0, op1)
            plan = self.maps.get(output)
            own = op1.kind in ("linear", "embed", "add")
            own = own or (op1.kind == "attention" and plan is not self.maps.get(op1.inputs[2]))
            if plan is not None and own:
                self.result.maps[output] = plan
        self._assemble()
        return self.result

    # One method per kind of operation.

    def _embed(self, op0: Op, op1: Op) -> None:
        if op0.weight is None or op1.weight is None:
            raise SpecError(f"the table of {op1.output} has no weight")
        t0, t1 = self.w0.state[op0.weight], self.w1.state[op1.weight]
        feeds_join = any(op.kind == "join" and op1.output in op.inputs[1:] for op in self.spec1.ops)
        if feeds_join and self.config.token_on_stream:
            self.maps[op1.output] = None  # the token takes the stream's map at the join
            return
        plan = self._table_plan(op1, t0, t1)
        self.maps[op1.output] = plan
        self._write(op1.weight, None, map_axis(t0, plan.out_map(), -1))

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

    def _join(self, _op0: Op, op1: Op) -> None:
        plan = self._input(op1)
        if self.config.token_on_stream:
            matrix = None if plan is None else plan.out_map()
            for token in op1.inputs[1:]:
                first, second = self.pairs[token]
                self._write(str(second.weight), None, map_axis(self.w0.state[str(first.weight)], matrix, -1))
        self.maps[op1.output] = plan

    def _attention(self, _op0: Op, op1: Op) -> None:
        if op1.output in self.maps:
            return
        if op1.output in self.known:
            self.maps[op1.output] = self.known[op1.output]
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
        if op1.output in self.known:
            self.maps[op1.output] = self.known[op1.output]
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
            # The predecessor averages the two maps where a 3 x 3 convolution follows, else it takes the
            # shortcut's.
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

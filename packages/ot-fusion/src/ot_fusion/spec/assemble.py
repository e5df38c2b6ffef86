"""From the axes of a traced program to a specification: spaces, tensors and the operations of the flow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn

from ot_fusion.errors import SpecError
from ot_fusion.groups import Blocks, Full, Heads
from ot_fusion.spec.symbols import Axes, SymbolAxis
from ot_fusion.spec.types import AlignmentSpec, Axis, Op, Space, TensorSpec

__all__ = ["assemble"]

_LAYERS = {"linear", "conv1d", "conv2d", "conv3d", "convolution", "addmm"}
_NORMS = {"batch_norm", "layer_norm", "rms_norm", "group_norm"}


def assemble(trace: Any, model: nn.Module) -> AlignmentSpec:
    """Spaces from the free symbols of the parameters, tensors on them, operations in order.

    Raises:
        SpecError: an axis whose factors form no known group.
    """
    axes: Axes = trace.axes
    state = model.state_dict()
    by_key = {key: trace.of[node] for node, key in trace.params.items() if node in trace.of and key in state}
    tied = _tied(state, by_key)
    alias = {key: group[0] for group in tied for key in group[1:]}
    by_key = {key: own for key, own in by_key.items() if key not in alias}
    heads = _attention_heads(trace, axes)
    spaces, names = dict[str, Space](), dict[int, tuple[str, str]]()
    inputs, outputs = _sides(trace)
    for key, own in by_key.items():  # a free factor is a space, named after the first layer that writes it
        for place, axis in enumerate(own):
            leaves = [leaf for leaf in axes.leaves(axis) if not axes.frozen[leaf]]
            fresh = [leaf for leaf in leaves if leaf not in names]
            if not fresh or (key, place) in inputs:
                continue
            _declare(key, axes, axes.leaves(axis), heads, spaces, names)
    for key, own in by_key.items():
        for axis in own:
            if any(not axes.frozen[leaf] and leaf not in names for leaf in axes.leaves(axis)):
                _declare(key, axes, axes.leaves(axis), heads, spaces, names)
    tensors = {
        key: TensorSpec(
            key,
            tuple(
                _axis(
                    key,
                    place,
                    axis,
                    axes,
                    names,
                    heads,
                    spaces,
                    "in" if (key, place) in inputs else "out",
                    outputs,
                )
                for place, axis in enumerate(own)
            ),
        )
        for key, own in by_key.items()
    }
    known = set(tensors) | {key for group in tied for key in group}
    copied = tuple(key for key in state if key not in known)
    for key in [key for key in tensors if not state[key].is_floating_point()]:
        del tensors[key]
        copied = (*copied, key)
    ops = _Ops(trace, tensors, alias).run()
    return AlignmentSpec(spaces, tensors, ops, tied, copied, f"inferred from {type(model).__name__}")


def _tied(state: dict[str, torch.Tensor], by_key: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for key, value in state.items():
        if value.numel() > 0:
            groups.setdefault((value.data_ptr(), tuple(value.shape)), []).append(key)
    found = []
    for group in groups.values():
        if len(group) > 1 and any(key in by_key for key in group):
            first = next(key for key in group if key in by_key)
            found.append((first, *(key for key in group if key != first)))
    return tuple(found)


def _sides(trace: Any) -> tuple[set[tuple[str, int]], dict[str, str]]:
    """Which axes of weights read activations; and the role of each attention projection."""
    inputs: set[tuple[str, int]] = set()
    for node in trace.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        if name in _LAYERS:
            weight = trace.params.get(node.args[2 if name == "addmm" else 1].name)
            if weight is not None:
                inputs.add((weight, 0 if name == "addmm" else 1))
    return inputs, {}


def _attention_heads(trace: Any, axes: Axes) -> dict[int, dict[str, Any]]:
    """Per free head symbol: its channels, query groups and frozen parts."""
    found: dict[int, dict[str, Any]] = {}
    softmax = [n for n in trace.nodes if n.op == "call_function" and "softmax" in str(n.target)]
    calls: list[tuple[list[SymbolAxis], list[SymbolAxis], list[SymbolAxis]]] = []
    fused = (n for n in trace.nodes if n.op == "call_function" and "scaled_dot_product" in str(n.target))
    calls += [(trace.of[n.args[0].name], trace.of[n.args[1].name], trace.of[n.args[2].name]) for n in fused]
    for node in softmax:
        scores = _back_to_matmul(node)
        later = _forward_to_matmul(node)
        if scores is not None and later is not None:
            query, key = (trace.of[arg.name] for arg in scores.args[:2])
            calls.append((query, [*key[:-2], key[-1], key[-2]], trace.of[later.args[1].name]))
    for query, key, value in calls:
        group = axes.leaves(key[-3])
        if len(group) != 1 or axes.frozen[group[0]]:
            continue
        extra = axes.leaves(query[-3])[1:]
        found[group[0]] = {
            "ratio": prod(axes.size[leaf] for leaf in extra),
            "queries": extra,
            "qk": axes.leaves(query[-1]),
            "v": axes.leaves(value[-1]),
        }
    return found


def _back_to_matmul(node: Any) -> Any:
    seen = node.args[0]
    for _ in range(8):
        if "matmul" in str(seen.target) or "bmm" in str(seen.target):
            return seen
        parents = [arg for arg in seen.args if hasattr(arg, "op") and arg.op == "call_function"]
        if not parents:
            return None
        seen = parents[0]
    return None


def _forward_to_matmul(node: Any) -> Any:
    seen = node
    for _ in range(8):
        users = list(seen.users)
        if not users:
            return None
        seen = users[0]
        if "matmul" in str(seen.target) or "bmm" in str(seen.target):
            return seen
    return None


def _declare(
    key: str,
    axes: Axes,
    leaves: SymbolAxis,
    heads: dict[int, dict[str, Any]],
    spaces: dict[str, Space],
    names: dict[int, tuple[str, str]],
) -> None:
    """A space for the free factors of an axis."""
    base = key.rpartition(".")[0] or key
    name = base
    number = 2
    while name in spaces:
        name, number = f"{base}#{number}", number + 1
    free = [leaf for leaf in leaves if not axes.frozen[leaf]]
    head = next((leaf for leaf in free if leaf in heads), None)
    if head is not None:
        entry = heads[head]
        qk_free = [leaf for leaf in entry["qk"] if not axes.frozen[leaf]]
        dim = prod(axes.size[leaf] for leaf in entry["qk"])
        width = prod(axes.size[leaf] for leaf in entry["v"])
        if any(axes.frozen[leaf] for leaf in entry["v"]) or (qk_free and len(entry["qk"]) > 1):
            raise SpecError(
                f"the heads of {key} have channels that are only partly free; write the spec by hand"
            )
        entry["group"] = Heads(
            axes.size[head],
            entry["ratio"],
            dim,
            None if width == dim else width,
            qk="full" if qk_free else "frozen",
        )
        entry["space"] = name
        spaces[name] = Space(name, entry["group"])
        for leaf in (head, *entry["queries"], *entry["qk"], *entry["v"]):
            names[leaf] = (name, "heads")
        return
    if len(free) == 1 and axes.leaves(leaves)[: leaves.index(free[0])] == ():
        spaces[name] = Space(name, Full(axes.size[free[0]]))
        names[free[0]] = (name, "")
        return
    if len(free) == 2 and len(leaves) == 2:
        spaces[name] = Space(name, Blocks(axes.size[free[0]], axes.size[free[1]]))
        names[free[0]] = names[free[1]] = (name, "")
        return
    raise SpecError(
        f"an axis of {key} is a product of {[axes.size[leaf] for leaf in leaves]}, of which the factors "
        f"{[axes.size[leaf] for leaf in free]} are free; write the spec by hand"
    )


def _axis(
    key: str,
    place: int,
    axis: SymbolAxis,
    axes: Axes,
    names: dict[int, tuple[str, str]],
    heads: dict[int, dict[str, Any]],
    spaces: dict[str, Space],
    side: str,
    _roles: dict[str, str],
) -> Axis | None:
    leaves = axes.leaves(axis)
    free = [leaf for leaf in leaves if not axes.frozen[leaf]]
    if not free:
        return None
    space, kind = names[free[0]]
    if kind != "heads":
        group = spaces[space].group.views()[""]
        inner = prod(axes.size[leaf] for leaf in leaves) // group
        return Axis(space, "", inner, "in" if side == "in" else "out")
    entry = next(entry for entry in heads.values() if entry.get("space") == space)
    reads = side == "in"
    tail = leaves[-1:] if len(leaves) > 1 else ()
    values = bool(tail) and tail == entry["v"][-1:]
    if entry["v"] == entry["qk"]:
        raise SpecError(f"queries and values of {space} share their channels; write the spec by hand")
    if reads:
        return Axis(space, "o", 1, "in")
    if values:
        return Axis(space, "v")
    grouped = len([leaf for leaf in leaves if leaf in entry["queries"]]) > 0
    roles = entry.setdefault("roles", {})
    base = key.rpartition(".")[0]
    if entry["ratio"] > 1:
        return Axis(space, "q" if grouped else "k")
    view = roles.setdefault(base, "q" if not roles else "k")
    del place
    return Axis(space, view)


class _Ops:
    """The operations of the flow strategy, by walking the traced program."""

    def __init__(self, trace: Any, tensors: dict[str, TensorSpec], alias: dict[str, str]) -> None:
        self.trace, self.tensors, self.alias = trace, tensors, alias
        self.ops: list[Op] = []
        self.at: dict[str, str] = {}  # node -> activation
        self.order: dict[str, int] = {}
        self.tokens: dict[str, list[str]] = {}  # activation -> tables waiting to join it
        self.scores: dict[str, tuple[str, str]] = {}
        self.used: set[str] = set()

    def run(self) -> tuple[Op, ...]:
        """The operations; none where a layer is called twice."""
        try:
            for node in self.trace.nodes:
                if node.op == "call_function":
                    self._step(node)
        except _CalledTwiceError:
            return ()
        return tuple(self.ops)

    def _key(self, node: Any) -> str | None:
        key = self.trace.params.get(getattr(node, "name", ""))
        return None if key is None else self.alias.get(key, key)

    def _place(self, op: Op, node: Any) -> None:
        self.order[op.output] = len(self.ops)
        self.ops.append(op)
        self.at[node.name] = op.output

    def _where(self, axis: Any) -> tuple[str | None, str]:
        return (axis.space, axis.view) if isinstance(axis, Axis) else (None, "")

    def _carried(self, node: Any) -> str | None:
        found = self.at.get(getattr(node, "name", ""))
        return None if found is None else self._joined(found)

    def _joined(self, activation: str) -> str:
        """Let waiting tables join before something else reads the activation."""
        tables = self.tokens.pop(activation, [])
        if not tables:
            return activation
        source = self.ops[self.order[activation]]
        output = f"{activation}+tokens"
        op = Op("join", output, (activation, *tables), space=source.space, view=source.view)
        self.order[output] = len(self.ops)
        self.ops.append(op)
        for name, value in self.at.items():
            if value == activation:
                self.at[name] = output
        return output

    def _step(self, node: Any) -> None:
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        args = [arg for arg in node.args if hasattr(arg, "op")]
        if name in _LAYERS:
            self._layer(node, name)
        elif name in _NORMS:
            self._norm(node, name)
        elif name == "embedding":
            self._table(node, node.args[0])
        elif name in ("add", "add_", "mul", "mul_") and len(args) == 2:
            self._pair(node, name, args)
        elif "scaled_dot_product_attention" in name:
            self._attend(node, [self._carried(arg) for arg in node.args[:3]])
        elif name in ("matmul", "bmm"):
            self._matmul(node, args)
        elif name == "cat":
            self._cat(node)
        elif args:
            source = next((self.at[arg.name] for arg in args if arg.name in self.at), None)
            if source is not None:
                self.at[node.name] = source
                for arg in args:
                    if arg.name in self.scores:
                        self.scores[node.name] = self.scores[arg.name]
                if name in (
                    "relu",
                    "relu_",
                    "gelu",
                    "silu",
                    "tanh",
                    "sigmoid",
                    "elu",
                    "leaky_relu",
                    "hardswish",
                    "mish",
                ):
                    op = self.ops[self.order[source]]
                    activation = replace(
                        op,
                        kind="elementwise",
                        output=node.name,
                        inputs=(self._joined(source),),
                        weight=None,
                        bias=None,
                        buffers=(),
                        hook=None,
                    )
                    self._place(activation, node)
            elif name in ("expand", "unsqueeze", "squeeze", "view", "reshape") and self._key(args[0]):
                self._table(node, args[0])

    def _layer(self, node: Any, name: str) -> None:
        x, weight, bias = (
            (node.args[1], node.args[2], node.args[0])
            if name == "addmm"
            else (node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None)
        )
        key = self._key(weight)
        if key is None:
            return
        if key in self.used and key in self.alias.values():
            return  # an output table that is the input table
        if key in self.used:
            raise _CalledTwiceError
        self.used.add(key)
        axes = self.tensors[key].axes
        reads = next((n for n, axis in enumerate(axes) if isinstance(axis, Axis) and axis.side == "in"), None)
        out = axes[0] if reads != 0 else axes[1]
        space, view = self._where(out)
        source = self._carried(x)
        path = self.trace.path(node)
        depthwise = (
            reads is None
            and source is not None
            and space == self.ops[self.order[source]].space
            and axes[1] is None
            and space is not None
        )
        hook = path if path and space is not None and f"{path}.weight" == key else None
        op = Op(
            "norm" if depthwise else "linear",
            path or node.name,
            (source,) if source is not None and (reads is not None or depthwise) else (),
            key,
            self._key(bias) if bias is not None else None,
            hook=None if depthwise else hook,
            space=space,
            view=view,
        )
        self._place(op, node)

    def _norm(self, node: Any, name: str) -> None:
        source = self._carried(node.args[0])
        if source is None:
            return
        rest = node.args[1:5] if name == "batch_norm" else node.args[2:4]
        keys = [self._key(arg) if arg is not None else None for arg in rest]
        origin = self.ops[self.order[source]]
        buffers = tuple(key for key in keys[2:] if key is not None)
        op = Op(
            "norm",
            self.trace.path(node) or node.name,
            (source,),
            keys[0],
            keys[1] if len(keys) > 1 else None,
            buffers=buffers,
            space=origin.space,
            view=origin.view,
        )
        if op.output in self.order:
            raise _CalledTwiceError
        self._place(op, node)

    def _table(self, node: Any, parameter: Any) -> None:
        key = self._key(parameter)
        if key is None:
            return
        if key in self.used:
            raise _CalledTwiceError
        space, view = self._where(self.tensors[key].axes[-1])
        if space is None:
            return
        self.used.add(key)
        self._place(Op("embed", key, (), key, space=space, view=view), node)

    def _pair(self, node: Any, name: str, args: list[Any]) -> None:
        for arg in args:
            if self._key(arg) and arg.name not in self.at and name.startswith("add"):
                self._table(arg, arg)
        found = [self.at.get(arg.name) for arg in args]
        if any(part is None for part in found):
            source = next((part for part in found if part is not None), None)
            if source is not None:
                self.at[node.name] = source
                keyed = next((self._key(arg) for arg in args if self._key(arg)), None)
                if keyed is not None and name.startswith("mul"):  # a scale written out
                    origin = self.ops[self.order[source]]
                    self.used.add(keyed)
                    self._place(
                        replace(
                            origin,
                            kind="norm",
                            output=node.name,
                            inputs=(source,),
                            weight=keyed,
                            bias=None,
                            buffers=(),
                            hook=None,
                            part=None,
                        ),
                        node,
                    )
            return
        first, second = (str(part) for part in found)
        waiting = [table for part in (first, second) for table in self.tokens.pop(part, [])]
        tables = [part for part in (first, second) if self.ops[self.order[part]].kind == "embed"]
        if len(tables) == 1:
            skip = tables[0]
            branch = second if skip == first else first
        else:
            skip, branch = sorted((first, second), key=lambda part: self.order[part])
        origin = self.ops[self.order[branch]]
        kind = "add" if name.startswith("add") else "gate"
        if skip == branch:
            self.at[node.name] = skip
            return
        output = node.name
        self._place(Op(kind, output, (skip, branch), space=origin.space, view=origin.view), node)
        if waiting:
            self.tokens[output] = waiting

    def _cat(self, node: Any) -> None:
        found = [self.at.get(arg.name) for arg in node.args[0]]
        known = [part for part in found if part is not None]
        tables = [part for part in known if self.ops[self.order[part]].kind == "embed"]
        streams = [part for part in known if part not in tables]
        if len(streams) == 1:
            self.at[node.name] = streams[0]
            if tables:
                self.tokens.setdefault(streams[0], []).extend(tables)

    def _matmul(self, node: Any, args: list[Any]) -> None:
        parts = [self.at.get(arg.name) for arg in args]
        if any(arg.name in self.scores for arg in args[:1]) and parts[1] is not None:
            self._attend(node, [*self.scores[args[0].name], parts[1]])
        elif all(part is not None for part in parts):
            self.scores[node.name] = (str(parts[0]), str(parts[1]))
            self.at[node.name] = str(parts[0])

    def _attend(self, node: Any, parts: Iterable[str | None]) -> None:
        inputs = tuple(str(part) for part in parts)
        space = self.ops[self.order[inputs[2]]].space
        self._place(Op("attention", node.name, inputs, space=space, view="o" if space else ""), node)


class _CalledTwiceError(Exception):
    """A layer is called twice, so the flow has no single map for it."""

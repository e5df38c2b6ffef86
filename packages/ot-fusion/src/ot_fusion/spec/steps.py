"""The operations of the flow strategy, read from a traced program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ot_fusion.spec.types import Axis, Op, TensorSpec

__all__ = ["Steps"]

_LAYERS = {"linear", "conv1d", "conv2d", "conv3d", "convolution", "addmm"}
_NORMS = {"batch_norm", "layer_norm", "rms_norm", "group_norm"}


class Steps:
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

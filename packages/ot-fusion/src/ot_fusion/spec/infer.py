"""Deriving a specification from a model by tracing it.

Source: ours; the idea of following axes through a traced graph is that of rebasin and ZipIt, which trace
modules instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.modules import untouched
from ot_fusion.errors import SpecError
from ot_fusion.spec.assemble import assemble
from ot_fusion.spec.symbols import Axes, SymbolAxis
from ot_fusion.spec.types import AlignmentSpec

__all__ = ["Trace", "infer_spec"]

_POINTWISE = {
    "relu", "relu_", "gelu", "silu", "silu_", "tanh", "sigmoid", "elu", "leaky_relu", "hardswish",
    "hardtanh", "hardtanh_", "hardsigmoid", "softplus", "mish", "dropout", "dropout_",
    "feature_dropout", "clone", "contiguous", "_to_copy", "to", "alias", "detach", "detach_", "neg",
    "exp", "log", "sqrt", "rsqrt", "pow", "abs", "clamp", "clamp_min", "clamp_max", "cos", "sin", "erf",
    "square", "reciprocal", "bitwise_not", "logical_not", "lift_fresh_copy", "type_as", "relu6",
    "log1p",
}  # fmt: skip
_BINARY = {
    "add", "add_", "sub", "rsub", "mul", "mul_", "div", "where", "masked_fill", "maximum", "minimum",
    "ge", "gt", "le", "lt", "eq", "ne", "bitwise_and", "logical_and", "bitwise_or",
}  # fmt: skip
_POOLS = {
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d",
}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std"}


def infer_spec(model: nn.Module, example_inputs: Any) -> AlignmentSpec:
    """Derive a model's specification: every axis gets a symbol, and every operation says which are the same.

    Linear layers, convolutions, norms, attention, sums, products, views and reductions are followed; what
    mixes a free axis in another way is refused by name. ``verify_spec`` proves the result.

    Args:
        model: any module that ``torch.export`` can trace; it comes back untouched.
        example_inputs: a tensor, a tuple of positional inputs, or a mapping of keyword inputs; two rows at
            least, so that the batch is told from axes of size 1.

    Returns:
        The specification, with the operations of the flow strategy where every layer is called once.

    Raises:
        SpecError: an operation that cannot be followed (named, with its module), or a model that cannot be
            traced.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> spec = infer_spec(net, torch.zeros(2, 4))
        >>> spec.tensors["0.weight"].axes, [op.kind for op in spec.ops]
        ((Axis(space='0', view='', inner=1, side='out'), None), ['linear', 'elementwise', 'linear'])
    """
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
        if getattr(getattr(model, "config", None), "use_cache", False):
            kwargs.setdefault("use_cache", False)
    else:
        args, kwargs = (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}
    with untouched(model, rng=True), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, args, kwargs)
        except Exception as error:  # whatever the tracer raises
            line = " ".join(str(error).split())[:200]
            raise SpecError(
                f"{type(model).__name__} cannot be traced ({type(error).__name__}: {line}); use a written "
                "spec, "
                "ot_fusion.spec.spec_for"
            ) from error
    trace = Trace(program, model)
    trace.run()
    return assemble(trace, model)


def _name(node: Any) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


class Trace:
    """Axes of every value of a traced program.

    Attributes:
        axes: the symbols.
        of: per node its axes; a list of such lists for nodes with several outputs.
        params: node -> key of a parameter or buffer.
    """

    def __init__(self, program: Any, model: nn.Module) -> None:
        self.program, self.model, self.axes = program, model, Axes()
        signature = program.graph_signature
        named: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        saved = set(model.state_dict())
        self.params = {node: key for node, key in named.items() if key in saved}
        self.of: dict[str, Any] = {}
        self.nodes = list(program.graph.nodes)

    def run(self) -> None:
        """Follow every node."""
        state = self.model.state_dict()
        for node in self.nodes:
            if node.op == "placeholder":
                value = node.meta.get("val")
                known = node.name in self.params
                if isinstance(value, Tensor):
                    free = known and value.is_floating_point()
                    twin = self._twin(node.name, state)
                    if twin is not None:  # tied tensors are one
                        self.of[node.name] = self.of[twin]
                        continue
                    self.of[node.name] = [self.axes.new(int(n), frozen=not free) for n in value.shape]
            elif node.op == "call_function":
                if not _name(node).startswith(("_assert", "sym_", "assert_")):
                    self._call(node)
            elif node.op == "output":
                for parts in _arguments(node):
                    for axis in self._axes(parts):
                        self.axes.freeze(axis)

    def _twin(self, name: str, state: Mapping[str, Tensor]) -> str | None:
        """An earlier placeholder that is the same tensor."""
        own = state.get(self.params.get(name, ""))
        for other in self.of if own is not None else ():
            found = state.get(self.params.get(other, ""))
            if (
                found is not None
                and own is not None
                and found.data_ptr() == own.data_ptr()
                and found.shape == own.shape
            ):
                return other
        return None

    def _axes(self, node: Any) -> list[SymbolAxis]:
        found = self.of.get(getattr(node, "name", ""), [])
        return found if not found or isinstance(found[0], tuple) else []

    def shape(self, node: Any) -> list[int]:
        """Sizes of a value."""
        return [int(n) for n in node.meta["val"].shape]

    def _fresh(self, node: Any) -> Any:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return [self.axes.new(int(n), frozen=True) for n in value.shape]
        return []

    def _call(self, node: Any) -> None:
        name = _name(node)
        rule: Callable[[Any], Any] | None = getattr(self, f"_op_{name.strip('_')}", None)
        if name in _POINTWISE:
            rule = self._pointwise
        elif name in _BINARY:
            rule = self._binary
        elif name in _POOLS:
            rule = self._pool
        elif name in _REDUCTIONS:
            rule = self._reduce
        inputs = [arg for arg in _arguments(node) if getattr(arg, "name", None) in self.of]
        if rule is None or not inputs:
            moving = [
                arg
                for arg in inputs
                if any(not self.axes.is_frozen(axis) for axis in self._axes(arg) if axis)
            ]
            if moving:
                raise self.refusal(node, f"reads {', '.join(arg.name for arg in moving)}")
            self.of[node.name] = self._fresh(node)
            return
        self.of[node.name] = rule(node)

    def refusal(self, node: Any, why: str) -> SpecError:
        """What to say of an operation that cannot be followed."""
        return SpecError(
            f"{node.target} ({node.name}, in module {self.path(node) or 'the model itself'!r}) cannot be "
            f"followed: it {why}, whose "
            "axes could move; write the spec by hand, or use spec_for"
        )

    def path(self, node: Any) -> str:
        """The module that a node belongs to."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]) if stack else ""

    # Rules: each returns the axes of the output.

    def _pointwise(self, node: Any) -> list[SymbolAxis]:
        return list(self._axes(node.args[0]))

    def _binary(self, node: Any) -> list[SymbolAxis]:
        shape = self.shape(node)
        out: list[SymbolAxis] = [()] * len(shape)
        for arg in _arguments(node):
            found = self._axes(arg)
            for place, axis in enumerate(reversed(found), 1):
                if not axis or self.axes.length(axis) == 1:
                    continue
                if out[-place]:
                    self.axes.unify(out[-place], axis)
                else:
                    out[-place] = axis
        return [
            axis if axis or n == 1 else self.axes.new(n, frozen=True)
            for axis, n in zip(out, shape, strict=True)
        ]

    def _op_linear(self, node: Any) -> list[SymbolAxis]:
        x, weight = self._axes(node.args[0]), self._axes(node.args[1])
        self.axes.unify(x[-1], weight[1])
        if len(node.args) > 2 and node.args[2] is not None:
            self.axes.unify(self._axes(node.args[2])[0], weight[0])
        return [*x[:-1], weight[0]]

    def _op_addmm(self, node: Any) -> list[SymbolAxis]:
        bias, x, weight = (self._axes(arg) for arg in node.args[:3])
        self.axes.unify(x[-1], weight[0])
        self.axes.unify(bias[-1], weight[1])
        return [x[0], weight[1]]

    def _op_matmul(self, node: Any) -> list[SymbolAxis]:
        left, right = self._axes(node.args[0]), self._axes(node.args[1])
        if len(left) < 2 or len(right) < 2:
            raise self.refusal(node, "multiplies a vector")
        self.axes.unify(left[-1], right[-2])
        out: list[SymbolAxis] = []
        wide, narrow = (left, right) if len(left) >= len(right) else (right, left)
        lead = len(wide) - len(narrow)
        for place, axis in enumerate(wide[:-2]):
            if place >= lead and narrow[place - lead]:
                if axis:
                    self.axes.unify(axis, narrow[place - lead])
                else:
                    axis = narrow[place - lead]
            out.append(axis)
        return [*out, left[-2], right[-1]]

    _op_bmm = _op_mm = _op_matmul

    def _conv(self, node: Any) -> list[SymbolAxis]:
        x, weight = self._axes(node.args[0]), self._axes(node.args[1])
        places = {"conv1d": 6, "conv2d": 6, "conv3d": 6, "convolution": 8}
        place = places[_name(node)]
        groups = node.args[place] if len(node.args) > place else node.kwargs.get("groups", 1)
        for axis in weight[2:]:
            self.axes.freeze(axis)
        if groups == 1:
            self.axes.unify(x[1], weight[1])
        elif self.axes.length(weight[0]) == groups and self.axes.length(x[1]) == groups:
            self.axes.unify(x[1], weight[0])
        else:
            raise self.refusal(node, f"is a convolution in {groups} groups over {node.args[0].name}")
        if len(node.args) > 2 and node.args[2] is not None:
            self.axes.unify(self._axes(node.args[2])[0], weight[0])
        spatial = [self.axes.new(n, frozen=True) for n in self.shape(node)[2:]]
        return [x[0], weight[0], *spatial]

    _op_conv1d = _op_conv2d = _op_conv3d = _op_convolution = _conv

    def _op_batch_norm(self, node: Any) -> list[SymbolAxis]:
        x = self._axes(node.args[0])
        for arg in node.args[1:5]:
            if arg is not None and self._axes(arg):
                self.axes.unify(self._axes(arg)[0], x[1])
        return list(x)

    def _op_layer_norm(self, node: Any) -> list[SymbolAxis]:
        x, shape = self._axes(node.args[0]), node.args[1]
        for arg in node.args[2:4]:
            for axis, own in zip(
                reversed(x), reversed(self._axes(arg) if arg is not None else []), strict=False
            ):
                self.axes.unify(own, axis)
        del shape
        return list(x)

    _op_rms_norm = _op_layer_norm

    def _op_group_norm(self, node: Any) -> list[SymbolAxis]:
        x, groups = self._axes(node.args[0]), int(node.args[1])
        self.axes.take(x[1], self.axes.length(x[1]) // groups)
        for arg in node.args[2:4]:
            if arg is not None:
                self.axes.unify(self._axes(arg)[0], x[1])
        return list(x)

    def _op_softmax(self, node: Any) -> list[SymbolAxis]:
        x = self._axes(node.args[0])
        self.axes.freeze(x[int(node.args[1])])
        return list(x)

    _op_log_softmax = _op_safe_softmax = _op_softmax

    def _op_scaled_dot_product_attention(self, node: Any) -> list[SymbolAxis]:
        query, key, value = (self._axes(arg) for arg in node.args[:3])
        self.axes.unify(query[-1], key[-1])
        self.axes.unify(key[-3], value[-3])
        if self.axes.length(query[-3]) == self.axes.length(key[-3]):
            self.axes.unify(query[-3], key[-3])
        else:
            cut = self.axes.take(query[-3], self.axes.length(query[-3]) // self.axes.length(key[-3]))
            if cut is None:
                raise self.refusal(node, "groups query heads unevenly")
            self.axes.unify(cut[0], key[-3])
        return [*query[:-1], value[-1]]

    def _op_view(self, node: Any) -> list[SymbolAxis]:
        return self.axes.reshape(self._axes(node.args[0]), self.shape(node))

    _op_reshape = _op_unsafe_view = _op_flatten = _op_unflatten = _op_view

    def _op_permute(self, node: Any) -> list[SymbolAxis]:
        x = self._axes(node.args[0])
        return [x[int(place)] for place in node.args[1]]

    def _op_transpose(self, node: Any) -> list[SymbolAxis]:
        x = list(self._axes(node.args[0]))
        a, b = int(node.args[1]), int(node.args[2])
        x[a], x[b] = x[b], x[a]
        return x

    def _op_t(self, node: Any) -> list[SymbolAxis]:
        return list(reversed(self._axes(node.args[0])))

    def _op_unsqueeze(self, node: Any) -> list[SymbolAxis]:
        x = list(self._axes(node.args[0]))
        place = int(node.args[1])
        x.insert(place if place >= 0 else len(x) + 1 + place, ())
        return x

    def _op_squeeze(self, node: Any) -> list[SymbolAxis]:
        x, shape = self._axes(node.args[0]), self.shape(node)
        kept = [axis for axis in x if axis]
        ones = iter(kept)
        return [() if n == 1 else next(ones) for n in shape]

    def _op_expand(self, node: Any) -> list[SymbolAxis]:
        x, shape = self._axes(node.args[0]), self.shape(node)
        padded: list[SymbolAxis] = [()] * (len(shape) - len(x)) + list(x)
        return [
            a if a or n == 1 else self.axes.new(n, frozen=True) for a, n in zip(padded, shape, strict=True)
        ]

    def _op_cat(self, node: Any) -> list[SymbolAxis]:
        parts = [self._axes(arg) for arg in node.args[0]]
        place = int(node.args[1]) if len(node.args) > 1 else 0
        place %= len(parts[0])
        out = list(parts[0])
        for part in parts:
            self.axes.freeze(part[place])
            for number, axis in enumerate(part):
                if number != place and axis:
                    if out[number]:
                        self.axes.unify(out[number], axis)
                    else:
                        out[number] = axis
        out[place] = self.axes.new(self.shape(node)[place], frozen=True)
        return out

    def _op_slice(self, node: Any) -> list[SymbolAxis]:
        x = list(self._axes(node.args[0]))
        place = int(node.args[1]) if len(node.args) > 1 else 0
        size = self.shape(node)[place]
        if size != self.axes.length(x[place]):
            self.axes.freeze(x[place])
            x[place] = self.axes.new(size, frozen=True)
        return x

    def _op_select(self, node: Any) -> list[SymbolAxis]:
        x = list(self._axes(node.args[0]))
        self.axes.freeze(x.pop(int(node.args[1])))
        return x

    def _op_embedding(self, node: Any) -> list[SymbolAxis]:
        table, index = self._axes(node.args[0]), self._axes(node.args[1])
        self.axes.freeze(table[0])
        return [*index, table[1]]

    def _pool(self, node: Any) -> list[SymbolAxis]:
        x, shape = self._axes(node.args[0]), self.shape(node)
        return [*x[:2], *(self.axes.new(n, frozen=True) for n in shape[2:])]

    def _reduce(self, node: Any) -> list[SymbolAxis]:
        x, shape = self._axes(node.args[0]), self.shape(node)
        places = node.args[1] if len(node.args) > 1 and node.args[1] is not None else list(range(len(x)))
        gone = {int(place) % len(x) for place in (places if isinstance(places, list | tuple) else [places])}
        kept: list[SymbolAxis] = [() if n in gone else axis for n, axis in enumerate(x)]
        return kept if len(shape) == len(x) else [axis for n, axis in enumerate(x) if n not in gone]


def _arguments(node: Any) -> list[Any]:
    found: list[Any] = []

    def add(value: Any) -> None:
        if isinstance(value, list | tuple):
            for part in value:
                add(part)
        elif hasattr(value, "op"):
            found.append(value)

    add(list(node.args))
    add(list(node.kwargs.values()))
    return found

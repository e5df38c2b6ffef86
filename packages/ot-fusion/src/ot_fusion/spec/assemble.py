"""From the axes of a traced program to a specification: spaces, tensors and the operations of the flow."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from ot_fusion.errors import SpecError
from ot_fusion.groups import Blocks, Full, Heads
from ot_fusion.spec.steps import Steps
from ot_fusion.spec.symbols import Axes, SymbolAxis
from ot_fusion.spec.types import AlignmentSpec, Axis, Space, TensorSpec

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
    ops = Steps(trace, tensors, alias).run()
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

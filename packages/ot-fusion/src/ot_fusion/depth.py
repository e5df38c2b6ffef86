"""Models of unequal depth: an explicit map from the anchor's blocks to the source's."""

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from ot_fusion.errors import InputError, ShapeError
from ot_fusion.spec.types import AlignmentSpec, Op

__all__ = ["block_count", "with_layer_map"]

_BLOCK = re.compile(r"^blocks\.(\d+)\.")


def _number(name: str) -> int | None:
    found = _BLOCK.match(name)
    return int(found[1]) if found else None


def block_count(spec: AlignmentSpec) -> int:
    """How many blocks a specification has."""
    return len({number for op in spec.ops if (number := _number(op.output)) is not None})


def _renamed(name: str, table: Mapping[int, int]) -> str:
    number = _number(name)
    return name if number is None else _BLOCK.sub(f"blocks.{table[number]}.", name)


def _taken(spec: AlignmentSpec, kept: Mapping[int, int]) -> AlignmentSpec:
    """The operations and spaces of some blocks, renumbered; a dropped block hands its input on."""
    ops: list[Op] = []
    alias: dict[str, str] = {}
    last: str | None = None
    for op in spec.ops:
        number = _number(op.output)
        if number is not None and number not in kept:
            if op.kind == "add" or op.output.endswith((".out", ".norm2")):
                alias[op.output] = last if last is not None else op.inputs[0]
            continue
        inputs = tuple(_renamed(alias.get(name, name), kept) for name in op.inputs)
        output = _renamed(op.output, kept)
        space = None if op.space is None else _renamed(op.space, kept)
        ops.append(replace(op, output=output, inputs=inputs, space=space))
        if (op.kind in ("add", "join", "norm", "embed", "elementwise") and number is None) or (
            number is not None and op.output.endswith((".out", ".norm2"))
        ):
            last = op.output
    spaces = {}
    for name, space in spec.spaces.items():
        number = _number(name)
        if number is None or number in kept:
            new = _renamed(name, kept)
            spaces[new] = replace(space, name=new)
    keys = {key for op in ops for key in (op.weight, op.bias, *op.buffers) if key}
    tensors = {}
    for key, tensor in spec.tensors.items():
        if key in keys:
            axes = tuple(_renamed_axis(axis, kept) for axis in tensor.axes)
            tensors[key] = replace(tensor, axes=axes)
    nodes = [n for n in spec.notes.get("cls_nodes", "").split() if _number(n) is None or _number(n) in kept]
    notes = spec.notes | {"cls_nodes": " ".join(_renamed(name, kept) for name in nodes)}
    dropped = tuple(key for key in spec.tensors if key not in keys)
    return replace(
        spec, spaces=spaces, tensors=tensors, ops=tuple(ops), copied=(*spec.copied, *dropped), notes=notes
    )


def _renamed_axis(axis: object, table: Mapping[int, int]) -> object:
    from ot_fusion.spec.types import Axis, Concat

    if isinstance(axis, Axis):
        return replace(axis, space=_renamed(axis.space, table))
    if isinstance(axis, Concat):
        return Concat(tuple(replace(part, space=_renamed(part.space, table)) for part in axis.parts))
    return axis


def with_layer_map(
    spec0: AlignmentSpec, spec1: AlignmentSpec, layer_map: Mapping[int, int] | None
) -> tuple[AlignmentSpec, AlignmentSpec]:
    """Specifications of the matched blocks only.

    Args:
        spec0: the source's.
        spec1: the anchor's.
        layer_map: block of the anchor -> block of the source, both rising; None where depths agree.

    Returns:
        Both with the same blocks, numbered from 0; the tensors of the others are left alone.

    Raises:
        ShapeError: unequal depth without a map.
        InputError: blocks that are not there, or an order that is not kept.
    """
    depth0, depth1 = block_count(spec0), block_count(spec1)
    if layer_map is None:
        if depth0 != depth1:
            raise ShapeError(
                f"the source has {depth0} blocks and the anchor {depth1}; give layer_map, such as "
                f"{{{', '.join(f'{i}: {i}' for i in range(min(depth0, depth1, 2)))}}} (anchor block: source "
                "block)"
            )
        return spec0, spec1
    pairs = sorted((int(a), int(s)) for a, s in layer_map.items())
    wrong = [(a, s) for a, s in pairs if not (0 <= a < depth1 and 0 <= s < depth0)]
    if wrong or not pairs:
        raise InputError(
            f"layer_map names the pairs {wrong or 'of no block'}, but the anchor has {depth1} blocks and the "
            f"source {depth0}"
        )
    if any(s1 <= s0 for (_, s0), (_, s1) in pairwise(pairs)):
        raise InputError(f"layer_map is {dict(pairs)}, wanted source blocks that rise with the anchor's")
    first = _taken(spec0, {s: number for number, (_, s) in enumerate(pairs)})
    second = _taken(spec1, {a: number for number, (a, _) in enumerate(pairs)})
    both = set(first.notes.get("cls_nodes", "").split()) & set(second.notes.get("cls_nodes", "").split())
    notes = {"cls_nodes": " ".join(sorted(both))}
    return replace(first, notes=first.notes | notes), replace(second, notes=second.notes | notes)

"""Moving a whole state dict: by plans between two models, or by an element of its symmetry group."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ot_fusion.apply import map_axis
from ot_fusion.errors import DataError, ShapeError, SpecError
from ot_fusion.plan import Plan
from ot_fusion.spec.types import AlignmentSpec, Axis, Concat, TensorSpec

__all__ = ["axis_parts", "axis_size", "check_states", "map_key", "map_state", "map_tensor", "relabel"]

Mover = Callable[[Tensor, int, Axis], Tensor]


def axis_parts(axis: Axis | Concat) -> tuple[Axis, ...]:
    """The axes that follow one another on a packed axis; one for a plain one."""
    return axis.parts if isinstance(axis, Concat) else (axis,)


def axis_size(spec: AlignmentSpec, axis: Axis) -> int:
    """How many entries an axis has.

    Raises:
        SpecError: its space or view is not declared.
    """
    if axis.space not in spec.spaces:
        raise SpecError(
            f"an axis names the space {axis.space!r}, which {spec.name or 'the spec'} does not declare"
        )
    views = spec.spaces[axis.space].group.views()
    if axis.view not in views:
        raise SpecError(f"space {axis.space} has no view {axis.view!r}, only {', '.join(map(repr, views))}")
    return views[axis.view] * axis.inner


def check_states(spec: AlignmentSpec, state: Mapping[str, Tensor], who: str = "the model") -> None:
    """Compare a specification with a model's tensors.

    Raises:
        SpecError: tensors that the spec does not cover or that the model lacks (all are named).
        ShapeError: an axis of another size.
        DataError: a tensor that is to be mixed but holds no floating-point numbers.
    """
    known = set(spec.tensors) | set(spec.copied) | {key for group in spec.tied for key in group}
    missing, extra = sorted(set(state) - known), sorted(set(spec.tensors) - set(state))
    tied = {key for group in spec.tied for key in group}
    extra = [key for key in extra if key not in tied]
    if missing or extra:
        words = [f"it does not cover {', '.join(missing)}"] if missing else []
        words += [f"{who} lacks {', '.join(extra)}"] if extra else []
        raise SpecError(f"the spec {spec.name!r} does not fit {who}: {'; '.join(words)}")
    for key, tensor_spec in spec.tensors.items():
        if key not in state:
            continue
        tensor = state[key]
        if not tensor.is_floating_point():
            raise DataError(f"{key} of {who} has dtype {tensor.dtype}; dequantise the model before fusing it")
        if tensor.is_meta:
            raise DataError(
                f"{key} of {who} lies on the meta device and has no values; load the weights first"
            )
        if tensor.ndim != len(tensor_spec.axes):
            raise SpecError(
                f"{key} of {who} has shape {tuple(tensor.shape)}, the spec {len(tensor_spec.axes)} axes"
            )
        for number, axis in enumerate(tensor_spec.axes):
            if axis is None:
                continue
            wanted = sum(axis_size(spec, part) for part in axis_parts(axis))
            if tensor.shape[number] != wanted:
                names = " and ".join(part.space for part in axis_parts(axis))
                raise ShapeError(
                    f"{key} of {who} has shape {tuple(tensor.shape)}; axis {number} lies on {names}, "
                    f"which has {wanted} entries"
                )


def map_tensor(tensor: Tensor, tensor_spec: TensorSpec, move: Mover, sizes: Callable[[Axis], int]) -> Tensor:
    """Move every declared axis of a tensor.

    Args:
        tensor: the source's.
        tensor_spec: its axes.
        move: what to do with one axis.
        sizes: entries of an axis in the source.
    """
    for number, axis in enumerate(tensor_spec.axes):
        if axis is None:
            continue
        parts = axis_parts(axis)
        if len(parts) == 1:
            tensor = move(tensor, number, parts[0])
            continue
        pieces = tensor.split([sizes(part) for part in parts], dim=number)
        tensor = torch.cat(
            [move(piece, number, part) for piece, part in zip(pieces, parts, strict=True)], number
        )
    return tensor


def map_key(tensor: Tensor, key: str, spec: AlignmentSpec, plans: Mapping[tuple[str, str], Plan]) -> Tensor:
    """One of a source's tensors in the anchor's coordinates; arguments as :func:`map_state`."""

    def move(piece: Tensor, number: int, axis: Axis) -> Tensor:
        plan = plans.get((axis.space, axis.view))
        if plan is None:
            return piece
        index = plan.permutation()
        if index is not None and axis.inner == 1:
            return piece.index_select(number, index.to(piece.device))
        matrix = plan.out_map() if axis.side == "out" else plan.in_map()
        return map_axis(piece, matrix, number, inner=axis.inner)

    return map_tensor(tensor, spec.tensors[key], move, lambda axis: axis_size(spec, axis))


def map_state(
    state: Mapping[str, Tensor], spec: AlignmentSpec, plans: Mapping[tuple[str, str], Plan]
) -> dict[str, Tensor]:
    """A source's tensors in the anchor's coordinates, given a plan for each space and view.

    Args:
        state: the source's tensors.
        spec: its specification.
        plans: by (space, view); a missing one leaves the axis alone.
    """
    return {key: map_key(tensor, key, spec, plans) for key, tensor in state.items() if key in spec.tensors}


def relabel(
    state: Mapping[str, Tensor], spec: AlignmentSpec, elements: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The same network in another order of its neurons.

    Args:
        state: all tensors; those that the spec does not name are kept.
        spec: of the model.
        elements: by space, an element of its group.
    """

    def move(tensor: Tensor, number: int, axis: Axis) -> Tensor:
        element = elements.get(axis.space)
        if element is None:
            return tensor
        order = element[axis.view]
        if order.is_floating_point():
            return map_axis(tensor, order, number, inner=axis.inner)
        if axis.inner > 1:
            order = (order[:, None] * axis.inner + torch.arange(axis.inner)).flatten()
        return tensor.index_select(number, order.to(tensor.device))

    return {
        key: map_tensor(tensor, spec.tensors[key], move, lambda axis: axis_size(spec, axis))
        if key in spec.tensors
        else tensor
        for key, tensor in state.items()
    }

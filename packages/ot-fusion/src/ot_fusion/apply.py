"""Applying maps to weights: a map of None is the identity.

Source: section 4 of the paper (linear layers, convolutions, norms, embeddings).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ot_fusion.errors import DataError, ShapeError

__all__ = ["align_conv", "align_embedding", "align_linear", "align_vector", "expand_map", "map_axis"]


def expand_map(matrix: Tensor, inner: int) -> Tensor:
    """The map of an axis on which every neuron has ``inner`` positions: ``T (x) I``.

    Example:
        >>> expand_map(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 2).argmax(0)
        tensor([2, 3, 0, 1])
    """
    if inner == 1:
        return matrix
    return torch.kron(matrix, torch.eye(inner, dtype=matrix.dtype, device=matrix.device))


def map_axis(tensor: Tensor, matrix: Tensor | None, axis: int, *, inner: int = 1) -> Tensor:
    """Re-express one axis: ``out[..., j, ...] = sum_i tensor[..., i, ...] matrix[i, j]``.

    Sums run in float32 or better, and the result has the tensor's dtype.

    Args:
        tensor: any shape.
        matrix: ``(n0, n1)``, or None for the identity.
        axis: which axis has ``n0 * inner`` entries.
        inner: fixed positions behind each coordinate.

    Raises:
        ShapeError: the axis is of another length.
        DataError: the tensor is no floating-point one.

    Example:
        >>> map_axis(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1)
        tensor([[2., 1.]])
    """
    if matrix is None:
        return tensor
    if not tensor.is_floating_point():
        raise DataError(f"a tensor of dtype {tensor.dtype} cannot be mixed; dequantise the model first")
    n0 = matrix.shape[0]
    if tensor.shape[axis] != n0 * inner:
        raise ShapeError(
            f"axis {axis} of a tensor of shape {tuple(tensor.shape)} has {tensor.shape[axis]} entries, "
            f"the map takes {n0 * inner}"
        )
    work = torch.promote_types(tensor.dtype, torch.float32)
    moved = tensor.movedim(axis, -1)
    flat = moved.to(work)
    if inner > 1:
        flat = flat.unflatten(-1, (n0, inner)).mT
    flat = flat @ matrix.to(device=tensor.device, dtype=work)
    if inner > 1:
        flat = flat.mT.flatten(-2)
    return flat.to(tensor.dtype).movedim(-1, axis)


def align_linear(
    weight: Float[Tensor, "out0 in0"],
    bias: Float[Tensor, "out0"] | None = None,
    t_in: Float[Tensor, "in0 in1"] | None = None,
    t_out: Float[Tensor, "out0 out1"] | None = None,
) -> tuple[Float[Tensor, "out1 in1"], Float[Tensor, "out1"] | None]:
    """A linear layer in the anchor's coordinates: ``t_out' W t_in`` and ``t_out' b``.

    Args:
        weight: ``(out0, in0)`` as PyTorch stores it.
        bias: ``(out0,)`` or None.
        t_in: map of the inputs, None where they are as in the anchor.
        t_out: map of the outputs.

    Raises:
        ShapeError: a map of another size.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> align_linear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 6.0]), None, swap)
        (tensor([[3., 4.],
                [1., 2.]]), tensor([6., 5.]))
    """
    weight = map_axis(map_axis(weight, t_in, 1), t_out, 0)
    return weight, None if bias is None else map_axis(bias, t_out, 0)


def align_conv(
    weight: Float[Tensor, "out0 in0 *kernel"],
    bias: Float[Tensor, "out0"] | None = None,
    t_in: Float[Tensor, "in0 in1"] | None = None,
    t_out: Float[Tensor, "out0 out1"] | None = None,
) -> tuple[Float[Tensor, "out1 in1 *kernel"], Float[Tensor, "out1"] | None]:
    """A convolution in the anchor's coordinates; the input map acts at every kernel position.

    Args:
        weight: ``(out0, in0, *kernel)``.
        bias: ``(out0,)`` or None.
        t_in: map of the input channels.
        t_out: map of the output channels.

    Example:
        >>> align_conv(torch.ones(4, 3, 3, 3), t_in=torch.full((3, 2), 0.5))[0].shape
        torch.Size([4, 2, 3, 3])
    """
    return align_linear(weight, bias, t_in, t_out)


def align_vector(vector: Float[Tensor, "n0"], t: Float[Tensor, "n0 n1"] | None) -> Float[Tensor, "n1"]:
    """A vector on the stream (norm weights, biases, running means): ``v t``.

    Example:
        >>> align_vector(torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([2., 1.])
    """
    return map_axis(vector, t, 0)


def align_embedding(
    table: Float[Tensor, "rows n0"], t: Float[Tensor, "n0 n1"] | None
) -> Float[Tensor, "rows n1"]:
    """A table whose columns are neurons (tokens, positions, class token): ``E t``.

    Example:
        >>> align_embedding(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[2., 1.]])
    """
    return map_axis(table, t, -1)

"""The merging rules as pure functions of one tensor.

Theta is the pivot, theta_j a target, delta_j their difference.

Source: VaRM (arXiv 2402.16107), SCE (arXiv 2408.07990), TIES (arXiv 2306.01708), DARE (arXiv 2311.03099),
task arithmetic (arXiv 2212.04089).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_core.errors import InputError, ShapeError

__all__ = [
    "Measure",
    "Variant",
    "change",
    "dare_rescale",
    "elect_sign",
    "largest",
    "linear",
    "sce_merge",
    "sce_select",
    "sce_weights",
    "slerp",
    "task_arithmetic",
    "ties_merge",
    "variance",
    "varm_element",
    "varm_weights",
]

Variant = Literal["paper", "fusechat", "mergekit"]
Measure = Literal["square", "abs", "signed"]
_MERGEKIT_FLOOR = 1e-6
_COLINEAR = 0.9995


def _columns(values: Tensor, like: Tensor) -> Tensor:
    """Weights of targets, ready to multiply ``(targets, ...)``."""
    return values.to(like).reshape(-1, *([1] * (like.ndim - 1)))


def linear(
    targets: Float[Tensor, "targets *shape"], weights: Float[Tensor, "targets"], *, normalize: bool = True
) -> Float[Tensor, "*shape"]:
    """``sum w_j theta_j / sum w_j``.

    Args:
        targets: the targets' tensors, stacked.
        weights: one each.
        normalize: divide by the sum of the weights.

    Example:
        >>> linear(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 3.0]))
        tensor([2.5000])
    """
    total = weights.sum() if normalize else torch.ones(())
    return (_columns(weights, targets) * targets).sum(0) / total.to(targets)


def task_arithmetic(
    base: Float[Tensor, "*shape"],
    deltas: Float[Tensor, "targets *shape"],
    weights: Float[Tensor, "targets"],
    *,
    lam: float = 1.0,
    normalize: bool = False,
) -> Float[Tensor, "*shape"]:
    """``theta + lam sum w_j delta_j``.

    Args:
        base: the pivot.
        deltas: differences of the targets.
        weights: one each.
        lam: scale of the sum.
        normalize: divide by the sum of the weights (1 where that is below 1e-8).

    Example:
        >>> task_arithmetic(torch.zeros(1), torch.tensor([[1.0], [2.0]]), torch.tensor([0.5, 0.5]), lam=2.0)
        tensor([3.])
    """
    total = (_columns(weights, deltas) * deltas).sum(0)
    if normalize:
        whole = weights.sum()
        total = total / torch.where(whole.abs() < 1e-8, 1.0, whole).to(total)
    return base + lam * total


def change(
    delta: Float[Tensor, "targets *shape"], measure: Measure = "square"
) -> Float[Tensor, "targets *shape"]:
    """What counts as change: the square, the absolute value, or the signed difference itself.

    Raises:
        InputError: another measure.
    """
    if measure == "square":
        return delta.square()
    if measure == "abs":
        return delta.abs()
    if measure == "signed":
        return delta
    raise InputError(f"measure is {measure!r}, wanted square, abs or signed")


def varm_weights(
    means: Float[Tensor, "targets"], *, softmax: bool = False, temperature: float = 1.0
) -> Float[Tensor, "targets"]:
    """VaRM's weights of one group: the targets' mean change over the sum; uniform where nothing changed.

    Args:
        means: mean change of each target in the group (at coarser levels a sum of them).
        softmax: softmax of the means instead of their ratio.
        temperature: of that softmax.

    Example:
        >>> varm_weights(torch.tensor([1.0, 3.0]))
        tensor([0.2500, 0.7500])
    """
    if softmax:
        return torch.softmax(means / temperature, 0)
    total = means.sum()
    return torch.where(total == 0, 1.0 / len(means), means / torch.where(total == 0, 1.0, total))


def varm_element(
    targets: Float[Tensor, "targets *shape"],
    deltas: Float[Tensor, "targets *shape"],
    *,
    measure: Measure = "square",
    floor: float | None = None,
) -> Float[Tensor, "*shape"]:
    """VaRM at the level of elements.

    Args:
        targets: the targets' tensors.
        deltas: their differences to the pivot.
        measure: of change.
        floor: the published code divides by ``max(sum, 1e-13)``, so that weights sum to less than 1 where
            nothing changed; None takes the exact ratio, uniform where nothing changed.

    Example:
        >>> varm_element(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]]))
        tensor([2.8000])
    """
    parts = change(deltas, measure)
    total = parts.sum(0)
    if floor is not None:
        weights = parts / total.clamp(min=floor)
    else:
        weights = torch.where(total == 0, 1.0 / len(parts), parts / torch.where(total == 0, 1.0, total))
    return (weights * targets).sum(0)


def sce_select(deltas: Float[Tensor, "targets *shape"], tau: float) -> tuple[Bool[Tensor, "*shape"], int]:
    """SCE's selection: the ``floor(tau nz)`` elements whose deltas vary most between the targets.

    Args:
        deltas: differences of the targets.
        tau: kept share of the elements that vary, in (0, 1]; 1 keeps all elements.

    Returns:
        What is kept, and how many elements vary (``nz``). Equal variances are kept in the order of their flat
        index.

    Example:
        >>> sce_select(torch.tensor([[1.0, 0.0, 5.0], [1.0, 1.0, 1.0]]), 0.5)
        (tensor([False, False,  True]), 2)
    """
    sigma = variance(deltas)
    varying = int((sigma > 0).sum())
    if tau >= 1 or varying == 0:
        return torch.ones_like(sigma, dtype=torch.bool), varying
    kept = math.floor(tau * varying + 1e-9)
    return largest(sigma.flatten(), kept).view(sigma.shape), varying


def variance(deltas: Tensor) -> Tensor:
    """Population variance over the targets, exactly 0 where all are equal."""
    same = deltas.amax(0) == deltas.amin(0)
    return torch.where(same, 0.0, deltas.var(0, unbiased=False))


def largest(values: Tensor, count: int) -> Tensor:
    """Which entries are the ``count`` largest; of equal ones the first in order."""
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if count >= len(values):
        return torch.ones_like(values, dtype=torch.bool)
    limit = values.kthvalue(len(values) - count + 1).values
    above = values > limit
    ties = values == limit
    room = count - int(above.sum())
    return above | (ties & (ties.cumsum(0) <= room))


def sce_weights(
    squares: Float[Tensor, "targets"], *, variant: Variant = "paper", count: int = 1
) -> Float[Tensor, "targets"]:
    """SCE's weights: the targets' sums of squared kept deltas over the whole; uniform where all are zero.

    Args:
        squares: sums of squares.
        variant: ``mergekit`` falls back to uniform weights where the summed MEAN squares are below 1e-6.
        count: elements of the tensor, for those means.
    """
    total = squares.sum()
    small = total / count < _MERGEKIT_FLOOR if variant == "mergekit" else total == 0
    return torch.where(small, 1.0 / len(squares), squares / torch.where(total == 0, 1.0, total))


def elect_sign(total: Tensor) -> Tensor:
    """The majority's sign of summed deltas: +1 where the sum is not negative, else -1."""
    return torch.copysign(torch.ones((), dtype=total.dtype), total + 0.0)  # -0.0 + 0.0 is 0.0


def sce_merge(
    base: Float[Tensor, "*shape"],
    deltas: Float[Tensor, "targets *shape"],
    weights: Float[Tensor, "targets"],
    keep: Bool[Tensor, "*shape"] | None = None,
    *,
    variant: Variant = "paper",
    normalize: bool = True,
) -> Float[Tensor, "*shape"]:
    """SCE's erase and sum: what goes against the majority's sign is dropped, the rest averaged.

    Args:
        base: the pivot.
        deltas: differences of the targets.
        weights: of :func:`sce_weights`.
        keep: of :func:`sce_select`; None keeps all.
        variant: ``paper`` and ``mergekit`` erase and sum kept deltas; ``fusechat`` (the published fork) the
            raw ones.
        normalize: divide by the sum of the weights that agree (1 where none does).

    Example:
        >>> sce_merge(torch.zeros(2), torch.tensor([[1.0, 1.0], [3.0, -2.0]]), torch.tensor([0.5, 0.5]))
        tensor([ 2., -2.])
    """
    if keep is not None and variant != "fusechat":
        deltas = deltas * keep
    # A sum of -0.0 is one of zeros, none of which agrees with anything: its sign does not matter.
    sign = torch.copysign(torch.ones((), dtype=deltas.dtype), reduce(torch.add, deltas))
    total = whole = None
    for weight, delta in zip(weights.to(deltas).tolist(), deltas, strict=True):  # few targets, few passes
        agreeing = (delta * sign).clamp_(min=0)  # the size of what agrees, 0 elsewhere
        total = agreeing * weight if total is None else total.add_(agreeing, alpha=weight)
        if normalize:
            agreeing.sign_()
            whole = agreeing.mul_(weight) if whole is None else whole.add_(agreeing, alpha=weight)
    if total is None:
        return base.clone()
    total *= sign
    if whole is None:
        return total.add_(base)
    # Where nothing agrees total is 0.
    return torch.addcdiv(base, total, whole.clamp_(min=torch.finfo(whole.dtype).tiny))


def ties_merge(
    base: Float[Tensor, "*shape"],
    trimmed: Float[Tensor, "targets *shape"],
    weights: Float[Tensor, "targets"],
    *,
    lam: float = 1.0,
    normalize: bool = True,
) -> Float[Tensor, "*shape"]:
    """TIES: elect the sign of the weighted sum, sum what agrees, over the weights that agree.

    Args:
        base: the pivot.
        trimmed: deltas, of which each target keeps its largest and 0 elsewhere.
        weights: one each.
        lam: scale of the sum.
        normalize: divide by the sum of the weights that agree (1 where that is 0).

    Example:
        >>> ties_merge(torch.zeros(1), torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 1.0]))
        tensor([2.])
    """
    weighted = _columns(weights, trimmed) * trimmed
    agree = trimmed.sign() == elect_sign(weighted.sum(0))
    total = (weighted * agree).sum(0)
    if normalize:
        whole = (_columns(weights, trimmed) * agree).sum(0)
        total = total / torch.where(whole.abs() < 1e-8, 1.0, whole)
    return base + lam * total


def dare_rescale(
    delta: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    density: float,
    *,
    rescale: Literal["density", "l1"] = "density",
    norms: tuple[float, float] | None = None,
) -> Float[Tensor, "*shape"]:
    """DARE: what the mask keeps, scaled up.

    Args:
        delta: a target's difference.
        mask: True with probability ``density``.
        density: kept share, in (0, 1].
        rescale: divide by the density (the paper), or keep the tensor's L1 norm (mergekit).
        norms: L1 norms of delta and of what is kept, where the tensor is a part of a larger one.

    Example:
        >>> dare_rescale(torch.tensor([1.0, 3.0]), torch.tensor([True, False]), 0.5)
        tensor([2., 0.])
    """
    kept = delta * mask
    if rescale == "density":
        return kept / density
    whole, left = norms if norms is not None else (float(delta.abs().sum()), float(kept.abs().sum()))
    return kept * (whole / left) if left > 0 else kept


def slerp(
    first: Float[Tensor, "*shape"],
    second: Float[Tensor, "*shape"],
    t: float,
    *,
    products: Sequence[float] | None = None,
) -> Float[Tensor, "*shape"]:
    """Spherical interpolation of two tensors as whole vectors.

    A straight line where they are nearly colinear.

    Args:
        first: at t = 0.
        second: at t = 1.
        t: in [0, 1].
        products: squared norms of both and their inner product, where the tensors are parts of larger ones.

    Raises:
        ShapeError: tensors of different shapes.

    Example:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
        tensor([0.7071, 0.7071])
    """
    if first.shape != second.shape:
        raise ShapeError(
            f"tensors have shapes {tuple(first.shape)} and {tuple(second.shape)}, wanted equal ones"
        )
    if products is None:
        a, b = first.double(), second.double()
        products = float((a * a).sum()), float((b * b).sum()), float((a * b).sum())
    lengths = [math.sqrt(value) for value in products[:2]]
    cosine = products[2]
    for length in lengths:
        cosine /= length if length > 1e-8 else 1.0
    if abs(cosine) > _COLINEAR:
        return (1 - t) * first + t * second
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return (
        math.sin((1 - t) * angle) / math.sin(angle) * first + math.sin(t * angle) / math.sin(angle) * second
    )

"""Ground costs: how different two neurons are.

Source: "Transformer Fusion with Optimal Transport" (ICLR 2024), section 4, and its predecessor (arXiv
1910.05653).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ot_fusion.errors import InputError, ShapeError, SolverError

__all__ = ["Metric", "Normalize", "finish_cost", "ground_cost", "normalize_cost", "squared_distances"]

Metric = Literal["euclidean", "cosine", "angular"]
Normalize = Literal["none", "max", "mean", "median", "log1p"]

# Below this many multiplications differences are formed one by one, which is exact for equal rows.
_SMALL = 1 << 21


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances between the rows of two matrices.

    Small problems take differences; large ones one matrix product, exact to rounding of the largest entry.

    Args:
        x: ``(n0, samples)``.
        y: ``(n1, samples)``.

    Returns:
        ``(n0, n1)``, not negative.
    """
    if x.shape[0] * y.shape[0] * x.shape[1] <= _SMALL:
        return (x[:, None, :] - y[None, :, :]).square().sum(-1)
    center = y.mean(0)
    x, y = x - center, y - center
    return torch.addmm(x.square().sum(1)[:, None] + y.square().sum(1)[None, :], x, y.T, alpha=-2).clamp_(
        min=0
    )


def _unit_rows(features: Tensor) -> Tensor:
    length = features.norm(dim=1, keepdim=True)
    return features / torch.where(length > 0, length, 1.0)


def normalize_cost(cost: Tensor, normalize: Normalize) -> Tensor:
    """Bring a cost to a common scale; a cost that is zero everywhere stays zero.

    Args:
        cost: ``(..., n0, n1)``.
        normalize: divide by the largest entry, the mean or the (lower) median; ``log1p`` of the entries;
            ``none``.
    """
    if normalize == "none":
        return cost
    if normalize == "log1p":
        return torch.log1p(cost)
    flat = cost.flatten(-2)
    if normalize == "max":
        scale = flat.amax(-1)
    elif normalize == "mean":
        scale = flat.mean(-1)
    elif normalize == "median":
        scale = flat.median(-1).values
    else:
        raise InputError(f"normalize is {normalize!r}, wanted none, max, mean, median or log1p")
    return cost / torch.where(scale > 0, scale, 1.0)[..., None, None]


def finish_cost(
    squared: Tensor,
    *,
    squared_cost: bool = False,
    normalize: Normalize = "max",
    clip: tuple[float, float] | None = None,
) -> Tensor:
    """From squared distances to the cost that a solver takes: root, scale, clip, in this order.

    Args:
        squared: ``(..., n0, n1)`` squared distances.
        squared_cost: keep the square.
        normalize: see :func:`normalize_cost`.
        clip: lowest and highest cost, after the normalisation.

    Raises:
        InputError: the lower end of ``clip`` is above the upper one.
    """
    cost = normalize_cost(squared if squared_cost else squared.clamp(min=0).sqrt(), normalize)
    if clip is None:
        return cost
    low, high = clip
    if low > high:
        raise InputError(f"clip is ({low}, {high}), wanted a lower end that is not above the upper one")
    return cost.clamp(low, high)


def ground_cost(
    x: Float[Tensor, "n0 samples"],
    y: Float[Tensor, "n1 samples"],
    metric: Metric = "euclidean",
    squared: bool = False,
    normalize: Normalize = "max",
    clip: tuple[float, float] | None = None,
) -> Float[Tensor, "n0 n1"]:
    """The cost of moving each source neuron onto each anchor neuron (section 4 of the paper).

    Args:
        x: the source's features, one row per neuron.
        y: the anchor's features of the same samples.
        metric: ``euclidean`` distance, ``cosine`` (1 - cosine, not below 0; a row of zeros is like none) or
            ``angular`` (angle / pi).
        squared: the squared distance; for ``euclidean`` only.
        normalize: what the matrix is divided by: its ``max``, ``mean``, lower ``median``, or ``none``;
            ``log1p`` takes the logarithm of 1 + cost. A cost of zeros stays zero.
        clip: lowest and highest cost after the normalisation.

    Returns:
        ``(n0, n1)`` in the dtype of ``x``.

    Raises:
        ShapeError: features that are no matrices, or of different numbers of samples.
        SolverError: features that are not finite.
        InputError: an unknown metric or normalisation, or a clip whose lower end is the higher.

    Example:
        >>> ground_cost(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([[0.],
                [1.]])
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ShapeError(
            f"features have shapes {tuple(x.shape)} and {tuple(y.shape)}, wanted (n0, samples) and "
            "(n1, samples) of the same samples"
        )
    if metric == "euclidean":
        cost = finish_cost(squared_distances(x, y), squared_cost=squared, normalize=normalize, clip=clip)
    elif metric in ("cosine", "angular"):
        cosine = _unit_rows(x) @ _unit_rows(y).T
        angle = (
            (1 - cosine).clamp(min=0) if metric == "cosine" else torch.acos(cosine.clamp(-1, 1)) / torch.pi
        )
        cost = finish_cost(angle, squared_cost=True, normalize=normalize, clip=clip)
    else:
        raise InputError(f"metric is {metric!r}, wanted euclidean, cosine or angular")
    if not cost.requires_grad and not bool(torch.isfinite(cost).all()):
        raise SolverError("the cost has NaN or infinite entries: the features are not finite")
    return cost

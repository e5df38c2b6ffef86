"""Which model's distributions to follow: the least cross-entropy, or an average by rewards (section 2.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fusion_core.errors import ConfigError, ShapeError

Rewards = Literal["exact", "bf16"]
UNKNOWN = 1e5  # the published stand-in for a cross-entropy of NaN


def rewards(ce: Float[Tensor, "models batch"], precision: Rewards = "exact") -> Float[Tensor, "models batch"]:
    """exp(-CE); a cross-entropy of NaN counts as 1e5.

    Args:
        ce: mean cross-entropies in nats.
        precision: ``"bf16"`` rounds CE, exp(CE) and its reciprocal to bfloat16, as published.

    Example:
        >>> rewards(torch.tensor([[1.0], [1.001]]), "bf16").tolist()
        [[0.3671875], [0.3671875]]
    """
    if precision not in ("exact", "bf16"):
        raise ConfigError(f"rewards is {precision!r}, wanted 'exact' or 'bf16'")
    ce = torch.nan_to_num(ce, nan=UNKNOWN, posinf=UNKNOWN)
    if precision == "exact":
        return (-ce).exp()
    return 1.0 / ce.to(torch.bfloat16).exp()


def min_ce(ce: Float[Tensor, "models batch"], precision: Rewards = "exact") -> Int64[Tensor, "batch"]:
    """The model of least cross-entropy; of equals the first, so the pivot where it stands first.

    Args:
        ce: (models, batch) mean cross-entropies, NaN counts as 1e5.
        precision: ``"bf16"`` compares the published rewards, in which near values tie.

    Example:
        >>> min_ce(torch.tensor([[1.0, 2.0], [1.0, 1.5]])).tolist()
        [0, 1]
    """
    _check(ce)
    if precision == "bf16":
        score = -rewards(ce, precision).float()
    else:
        rewards(ce[:, :0], precision)  # the check of the word
        score = torch.nan_to_num(ce, nan=UNKNOWN, posinf=UNKNOWN)
    least = score.min(0).values
    return (score == least).to(torch.int8).argmax(0)


def avg_ce_weights(
    ce: Float[Tensor, "models batch"], precision: Rewards = "exact"
) -> Float[Tensor, "models batch"]:
    """FuseLLM's weights: the softmax over the models of exp(-CE).

    Example:
        >>> avg_ce_weights(torch.tensor([[1.0], [1.0]])).tolist()
        [[0.5], [0.5]]
    """
    _check(ce)
    return rewards(ce, precision).softmax(0).to(ce.dtype)


def replace_better(best: Float[Tensor, "batch"], new: Float[Tensor, "batch"]) -> Tensor:
    """Where a source that is added later replaces the best so far: strictly smaller cross-entropies only.

    Example:
        >>> replace_better(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 3.0])).tolist()
        [False, True]
    """
    return torch.nan_to_num(new, nan=UNKNOWN) < torch.nan_to_num(best, nan=UNKNOWN)


def stack_ce(values: Sequence[Tensor]) -> Float[Tensor, "models batch"]:
    """Cross-entropies of several models in one tensor of at least float32."""
    return torch.stack([value.to(torch.promote_types(value.dtype, torch.float32)) for value in values])


def _check(ce: Tensor) -> None:
    if ce.ndim < 1 or not len(ce):
        raise ShapeError(f"ce has shape {tuple(ce.shape)}, wanted (models, batch) of at least one model")

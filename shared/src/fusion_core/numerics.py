"""Pure functions on tensors that several methods share: means under a mask, divergences, top-k rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fusion_core.errors import ConfigError, DataError, ShapeError


def _wide(dtype: torch.dtype) -> torch.dtype:
    # Sums over many entries lose digits, or overflow, in half precision.
    return torch.promote_types(dtype, torch.float32)


def masked_mean(
    x: Tensor, mask: Bool[Tensor, "..."], dim: int | tuple[int, ...] | None = None
) -> Float[Tensor, "..."]:
    """Mean of the entries where the mask is True; an empty mask gives 0 that still has a gradient (of 0).

    Args:
        x: (...) any values; those outside the mask count neither in value nor in gradient, NaN included.
        mask: (...) bool, broadcast to the shape of ``x``; True takes part.
        dim: dimensions to average over; None means all.

    Returns:
        The mean in the dtype of ``x`` (float32 where ``x`` is no float), summed in float32 or wider.

    Raises:
        DataError: the mask is not bool.
        ShapeError: the mask does not broadcast to ``x``.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    if mask.dtype != torch.bool:
        raise DataError(f"mask is {mask.dtype}, wanted torch.bool (True = takes part)")
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.ndim > x.ndim or any(m not in (1, n) for m, n in sizes):
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)}, wanted one that broadcasts to x, {tuple(x.shape)}"
        )
    wide = _wide(x.dtype)
    dims = tuple(range(x.ndim)) if dim is None else dim
    kept = torch.where(mask, x.to(wide), torch.zeros((), dtype=wide, device=x.device))
    count = mask.expand_as(x).to(wide).sum(dims)
    return (kept.sum(dims) / count.clamp(min=1)).to(x.dtype if x.is_floating_point() else wide)


def kl_divergence(
    log_p: Float[Tensor, "... classes"], log_q: Float[Tensor, "... classes"], dim: int = -1
) -> Float[Tensor, "..."]:
    r"""Kullback-Leibler divergence :math:`\sum p (\log p - \log q)` of log-probabilities, per row.

    Where p is 0 the term is 0, whatever q is, in value and gradient; where only q is 0 it is infinite.

    Args:
        log_p: (..., classes) log-probabilities, -inf allowed.
        log_q: the same, of as many classes.
        dim: the dimension of the classes.

    Returns:
        The divergence in nats, without the dimension ``dim``; computed in float32 or wider.

    Raises:
        ShapeError: different numbers of classes.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
        >>> kl_divergence(p.log(), q.log())
        tensor(0.6931)
    """
    if log_p.shape[dim] != log_q.shape[dim]:
        raise ShapeError(f"log_q has {log_q.shape[dim]} classes, wanted those of log_p, {log_p.shape[dim]}")
    dtype = torch.promote_types(log_p.dtype, log_q.dtype)
    log_p, log_q = torch.broadcast_tensors(log_p.to(_wide(dtype)), log_q.to(_wide(dtype)))
    gone = log_p.exp() == 0
    # Masked before the product as well: a where() after it would send 0 * inf = NaN back.
    safe_p, safe_q = log_p.masked_fill(gone, 0.0), log_q.masked_fill(gone, 0.0)
    terms = (safe_p.exp() * (safe_p - safe_q)).masked_fill(gone, 0.0)
    return terms.sum(dim).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The ``k`` largest logits of each row, and what is needed to know their share of the whole.

    Attributes:
        values: (..., k) logits, largest first.
        indices: (..., k) their classes, int64.
        lse: (...) logsumexp over all classes of the row, in float32 or wider.

    Raises:
        ShapeError: the three shapes do not fit each other.

    Example:
        >>> top = TopK.from_logits(torch.tensor([[2.0, 0.0, 1.0, 0.0]]), k=2)
        >>> top.indices
        tensor([[0, 2]])
        >>> top.log_probs(4, tail="uniform").exp()
        tensor([[0.6103, 0.0826, 0.2245, 0.0826]])
    """

    values: Float[Tensor, "... k"]
    indices: Int64[Tensor, "... k"]
    lse: Float[Tensor, "..."]

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape or self.values.shape[:-1] != self.lse.shape:
            shapes = [tuple(t.shape) for t in (self.values, self.indices, self.lse)]
            raise ShapeError(
                f"values, indices and lse have shapes {shapes}, wanted (..., k), (..., k) and (...)"
            )

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "... classes"], k: int) -> TopK:
        """Keep the ``k`` largest logits of each row.

        Raises:
            ConfigError: ``k`` is not between 1 and the number of classes.
        """
        if not 1 <= k <= logits.shape[-1]:
            raise ConfigError(f"k is {k}, wanted 1 to the number of classes, {logits.shape[-1]}")
        values, indices = logits.topk(k, dim=-1)
        return cls(values, indices, logits.to(_wide(logits.dtype)).logsumexp(-1))

    def log_probs(self, size: int, tail: Literal["none", "uniform"] = "none") -> Float[Tensor, "... classes"]:
        """Log-probabilities over all classes; each row sums to 1.

        Args:
            size: the number of classes.
            tail: ``"none"`` gives the other classes nothing (-inf) and the kept ones all, as a softmax over
                them; ``"uniform"`` keeps the true probabilities and spreads what is left over evenly.

        Returns:
            (..., size) log-probabilities in the dtype of ``lse``.

        Raises:
            ConfigError: unknown ``tail``, or ``size`` below k.
        """
        k = self.values.shape[-1]
        if size < k:
            raise ConfigError(f"size is {size}, wanted at least the {k} kept classes")
        if tail not in ("none", "uniform"):
            raise ConfigError(f"tail is {tail!r}, wanted 'none' or 'uniform'")
        values = self.values.to(self.lse.dtype)
        if tail == "none" or size == k:
            kept = values.log_softmax(-1)
            rest = torch.full_like(self.lse, -math.inf)
        else:
            kept = values - self.lse[..., None]
            # Values stored in half precision may claim more than there is.
            mass = kept.logsumexp(-1)
            kept = kept - mass.clamp(min=0.0)[..., None]
            whole = mass >= 0
            rest = torch.log(-torch.expm1(mass.masked_fill(whole, -1.0))) - math.log(size - k)
            rest = rest.masked_fill(whole, -math.inf)
        spread = rest[..., None].expand(*rest.shape, size)
        return spread.scatter(-1, self.indices, kept)

"""Second moments of paired activations, streamed.

All that a cost between neurons needs, whatever the number of samples.

Source: ours; pairwise updates of mean and comoment (Chan, Golub, LeVeque 1979).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ot_fusion.cost import Metric, Normalize, finish_cost
from ot_fusion.errors import DataError, InputError, ShapeError

__all__ = ["Moments", "Transform"]

Transform = Literal["std", "center", "norm", "none"]
_TINY = 1e-9


class Moments:
    """Counts, means and second moments of a source's and an anchor's activations of the same samples.

    Memory is ``n0 * n1`` numbers, however many samples are read; they are kept in float64 (on a GPU each
    batch is multiplied in float32 and merged in float64).

    Example:
        >>> z = torch.randn(50, 3, dtype=torch.float64)
        >>> moments = Moments()
        >>> for part in z.split(20):
        ...     moments.update(part, part)
        >>> bool(moments.squared_cost("std").diagonal().abs().max() < 1e-10)
        True
    """

    def __init__(self) -> None:
        self.count = 0
        self._parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def update(self, z0: Float[Tensor, "samples n0"], z1: Float[Tensor, "samples n1"]) -> None:
        """Add samples.

        Args:
            z0: the source's activations.
            z1: the anchor's, of the same samples in the same order.

        Raises:
            ShapeError: different numbers of samples, or other neurons than before.
        """
        if z0.ndim != 2 or z1.ndim != 2 or len(z0) != len(z1):
            raise ShapeError(
                f"activations have shapes {tuple(z0.shape)} and {tuple(z1.shape)}, wanted (samples, n0) and "
                "(samples, n1) of the same inputs"
            )
        if len(z0) == 0:
            return
        fine = torch.float32 if z0.is_cuda else torch.float64
        z0, z1 = z0.detach().to(fine), z1.detach().to(z0.device, fine)
        mean0, mean1 = z0.mean(0), z1.mean(0)
        z0, z1 = z0 - mean0, z1 - mean1
        own = (mean0, mean1, z0.square().sum(0), z1.square().sum(0), z0.T @ z1)
        self._join(len(z0), tuple(part.double() for part in own))

    def merge(self, other: "Moments") -> None:
        """Add the samples that another object has seen.

        Raises:
            ShapeError: it has seen other neurons.
        """
        if other._parts is not None:
            self._join(other.count, other._parts)

    def _join(self, count: int, parts: tuple[Tensor, ...]) -> None:
        if self._parts is None:
            self.count, self._parts = count, tuple(part.clone() for part in parts)  # pyright: ignore[reportAttributeAccessIssue]
            return
        if self._parts[4].shape != parts[4].shape:
            raise ShapeError(
                f"activations have {tuple(parts[4].shape)} neurons, the earlier ones "
                f"{tuple(self._parts[4].shape)}"
            )
        total = self.count + count
        d0, d1 = parts[0] - self._parts[0], parts[1] - self._parts[1]
        share, both = count / total, self.count * count / total
        for own, delta in zip(self._parts[:2], (d0, d1), strict=True):
            own.add_(delta, alpha=share)
        self._parts[2].add_(parts[2]).add_(d0.square(), alpha=both)
        self._parts[3].add_(parts[3]).add_(d1.square(), alpha=both)
        self._parts[4].add_(parts[4]).addr_(d0, d1, alpha=both)
        self.count = total

    def _state(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self._parts is None:
            raise DataError("there are no activations: data give no samples")
        return self._parts

    def inner(self, transform: Transform = "std") -> tuple[Tensor, Tensor, Tensor]:
        """Squared norms of both sides' features and their inner products, after a transform.

        Args:
            transform: ``std`` (mean removed, divided by the unbiased deviation + 1e-9), ``center``, ``norm``
                (divided by the L2 norm over samples) or ``none``.

        Returns:
            ``(n0,)``, ``(n1,)`` and ``(n0, n1)``, float64.

        Raises:
            DataError: no samples, or fewer than 2 for ``std``.
        """
        mean0, mean1, s0, s1, cross = self._state()
        if transform == "center":
            return s0, s1, cross
        if transform == "std":
            if self.count < 2:
                raise DataError(f"data give {self.count} samples, standardising takes at least 2")
            d0, d1 = ((s / (self.count - 1)).sqrt() + _TINY for s in (s0, s1))
            return s0 / d0.square(), s1 / d1.square(), cross / d0[:, None] / d1[None, :]
        raw0, raw1 = s0 + self.count * mean0.square(), s1 + self.count * mean1.square()
        raw = torch.addr(cross, mean0, mean1, alpha=self.count)
        if transform == "none":
            return raw0, raw1, raw
        if transform != "norm":
            raise InputError(f"transform is {transform!r}, wanted std, center, norm or none")
        l0, l1 = (torch.where(r > 0, r.sqrt(), 1.0) for r in (raw0, raw1))
        return raw0 / l0.square(), raw1 / l1.square(), raw / l0[:, None] / l1[None, :]

    def squared_cost(self, transform: Transform = "std") -> Float[Tensor, "n0 n1"]:
        """Squared distances between the transformed activations, exact to rounding of the largest."""
        s0, s1, cross = self.inner(transform)
        return (s0[:, None] + s1[None, :]).sub_(cross, alpha=2).clamp_(min=0)

    def cost(
        self,
        transform: Transform = "std",
        metric: Metric = "euclidean",
        *,
        squared: bool = False,
        normalize: Normalize = "max",
        clip: tuple[float, float] | None = None,
    ) -> Float[Tensor, "n0 n1"]:
        """The ground cost of :func:`ground_cost` on the transformed activations."""
        if metric == "euclidean":
            return finish_cost(
                self.squared_cost(transform), squared_cost=squared, normalize=normalize, clip=clip
            )
        s0, s1, cross = self.inner(transform)
        lengths = torch.outer(s0.sqrt(), s1.sqrt())
        cosine = torch.where(lengths > 0, cross / torch.where(lengths > 0, lengths, 1.0), 0.0)
        if metric == "cosine":
            angle = (1 - cosine).clamp(min=0)
        elif metric == "angular":
            angle = torch.acos(cosine.clamp(-1, 1)) / torch.pi
        else:
            raise InputError(f"metric is {metric!r}, wanted euclidean, cosine or angular")
        return finish_cost(angle, squared_cost=True, normalize=normalize, clip=clip)

    def anchor_scale(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, unbiased standard deviation and L2 norm of each anchor channel."""
        _, mean1, _, s1, _ = self._state()
        deviation = (s1 / max(self.count - 1, 1)).sqrt()
        return mean1, deviation, (s1 + self.count * mean1.square()).sqrt()

    def finite(self) -> bool:
        """Whether every sum is finite."""
        return all(bool(torch.isfinite(part).all()) for part in self._state())

    def correlation(self) -> Tensor:
        """Correlations between source and anchor channels, ``(n0, n1)``; 0 for constant channels."""
        _, _, s0, s1, cross = self._state()
        lengths = torch.outer(s0.sqrt(), s1.sqrt())
        return torch.where(lengths > 0, cross / torch.where(lengths > 0, lengths, 1.0), 0.0)

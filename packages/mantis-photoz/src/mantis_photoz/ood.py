"""Is an object like the training set? (section 8): Mahalanobis, neighbours, energy, disagreement of views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import check_range
from mantis_photoz.arrays import Array, as_tensor, quantile, to_numpy, wide
from mantis_photoz.errors import CheckpointError, DataError
from mantis_photoz.pdf import BinnedPDF

__all__ = ["OutOfDistribution", "energy_score", "neighbour_distance", "neighbour_rank", "view_disagreement"]

_RANKS = 1001  # training distances are kept as this many quantiles


def energy_score(logits: Float[Tensor, "batch bins"]) -> Float[Tensor, " batch"]:
    """``-logsumexp(logits)``; higher is stranger."""
    return -wide(logits).logsumexp(-1)


def neighbour_distance(
    features: Float[Tensor, "batch features"], training: Float[Tensor, "n features"], k: int = 10
) -> Float[Tensor, " batch"]:
    """Distance to the k-th nearest training object in feature space; higher is stranger."""
    check_range("k", k, 1, max(len(training), 1))
    return torch.cdist(wide(features), wide(training)).kthvalue(k, dim=-1).values


def neighbour_rank(
    features: Float[Tensor, "batch features"], training: Float[Tensor, "n features"], k: int = 10
) -> Float[Tensor, " batch"]:
    """Share of training objects nearer to their own k-th neighbour; 1 = stranger than all of them."""
    check_range("k", k, 1, max(len(training) - 1, 1))
    own = (
        neighbour_distance(training, training, k + 1).sort().values
    )  # the first neighbour is the object itself
    found = neighbour_distance(features, training, k)
    return torch.searchsorted(own, found, right=True).to(found) / len(own)


def view_disagreement(views: list[BinnedPDF]) -> Any:
    """(batch,) standard deviation of the mean redshift over views of the same objects."""
    if len(views) < 2:
        raise DataError(f"views has {len(views)} sets of densities, wanted two or more")
    means = torch.stack([as_tensor(view.mean()) for view in views])
    found = means.std(0, correction=0)
    return found if views[0].is_torch else to_numpy(found)


@dataclass(frozen=True, slots=True, eq=False)
class OutOfDistribution:
    """Mahalanobis distance of penultimate features, as a rank among the training objects.

    Args:
        center: (features,).
        precision: (features, features) inverse of the shrunk covariance.
        distances: quantiles of the training objects' own distances, increasing.
        level: of the flag: 0.99.

    Example:
        >>> made = OutOfDistribution.fit(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)))
        >>> score, flagged = made(torch.tensor([[0.0, 0.0, 0.0], [9.0, 9.0, 9.0]]))
        >>> score[1].item(), flagged.tolist()
        (1.0, [False, True])
    """

    center: Tensor
    precision: Tensor
    distances: Tensor
    level: float = 0.99

    @classmethod
    def fit(cls, features: Array, *, level: float = 0.99) -> OutOfDistribution:
        """Learn from the training objects' features; the covariance is shrunk as Ledoit and Wolf (2004) do.

        Raises:
            DataError: fewer than two objects, or features that are not finite.
        """
        check_range("level", level, 0.0, 1.0, open=True)
        x = wide(as_tensor(features, "features")).detach()
        if x.ndim != 2 or len(x) < 2 or not bool(torch.isfinite(x).all()):
            raise DataError(f"features have shape {tuple(x.shape)}, wanted finite (n, features), n >= 2")
        center = x.mean(0)
        covariance = _ledoit_wolf(x - center)
        precision = torch.linalg.inv(covariance)
        made = cls(center, precision, x.new_zeros(1), level)
        own = quantile(made.distance(x), torch.linspace(0, 1, _RANKS))
        return cls(center, precision, own, level)

    def distance(self, features: Array) -> Tensor:
        """(batch,) Mahalanobis distances.

        Raises:
            DataError: another number of features.
        """
        x = wide(as_tensor(features, "features"))
        if x.ndim != 2 or x.shape[1] != len(self.center):
            raise DataError(f"features have shape {tuple(x.shape)}, wanted (batch, {len(self.center)})")
        away = x - self.center.to(x)
        return ((away @ self.precision.to(x)) * away).sum(-1).clamp(min=0).sqrt()

    def __call__(self, features: Array) -> tuple[Any, Any]:
        """Rank among the training distances in [0, 1], and whether it is above the flag's level."""
        distance = self.distance(features)
        known = self.distances.to(distance)
        rank = torch.searchsorted(known, distance, right=True).to(distance) / len(known)
        flagged = distance > quantile(known, torch.tensor([self.level]))[0]
        return (rank, flagged) if isinstance(features, Tensor) else to_numpy((rank, flagged))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        level = torch.tensor([self.level], dtype=torch.float64)
        return {
            "center": self.center,
            "precision": self.precision,
            "distances": self.distances,
            "level": level,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> OutOfDistribution:
        """What :meth:`state_dict` gave.

        Raises:
            CheckpointError: entries are missing.
        """
        missing = {"center", "precision", "distances", "level"} - set(state)
        if missing:
            raise CheckpointError(f"the out-of-distribution statistics lack {sorted(missing)}")
        parts = (state["center"], state["precision"], state["distances"])
        return cls(*parts, float(state["level"][0]))


def _ledoit_wolf(centered: Float[Tensor, "n features"]) -> Float[Tensor, "features features"]:
    """The covariance pulled towards a multiple of the identity, by the share that is best on average."""
    count, size = centered.shape
    covariance = centered.T @ centered / count
    level = covariance.trace() / size
    identity = torch.eye(size, dtype=centered.dtype, device=centered.device)
    spread = (covariance - level * identity).square().sum()
    squares = centered.square().sum(1)
    noise = (squares.square().sum() / count - covariance.square().sum()) / count
    share = (noise / spread.clamp(min=1e-300)).clamp(0, 1)
    floor = level.clamp(min=1e-12) * 1e-8
    return (1 - share) * covariance + (share * level + floor) * identity

"""A transport plan between the neurons of two models, and the maps that it gives.

Source: "Transformer Fusion with Optimal Transport" (ICLR 2024), section 4; the pair of maps for unequal
widths is ours.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_core.results import Result
from ot_fusion.errors import InputError, ShapeError

__all__ = ["Normalization", "Plan"]

Normalization = Literal["paper", "exact", "official", "otfusion", "otfusion_proper"]

# What the predecessor's code adds to its divisors.
_OTFUSION_EPS = 1e-7


def _safe(sums: Tensor) -> Tensor:
    return torch.where(sums > 0, sums, 1.0)


@dataclass(frozen=True)
class Plan(Result):
    """How much of each source neuron goes to each anchor neuron.

    Attributes:
        matrix: ``(n0, n1)``, not negative; rows are source neurons, columns anchor neurons.
        normalization: how maps come of it. ``paper``: columns sum to 1, on both sides. ``exact``: columns sum
            to 1 on output axes, rows on input axes, which keeps the function of a network whose neurons were
            duplicated. ``official``: n0 times the plan, on both sides, as in the authors' code. ``otfusion``
            and ``otfusion_proper``: the predecessor's code.
        info: what the solver said (cost, iterations, marginal error, converged).

    Raises:
        ShapeError: the matrix is none.

    Example:
        >>> Plan(torch.eye(3) / 3).out_map()
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """

    matrix: Float[Tensor, "n0 n1"]
    normalization: Normalization = "paper"
    info: dict[str, Any] = field(default_factory=dict[str, Any], compare=False)

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise ShapeError(f"a plan has shape {tuple(self.matrix.shape)}, wanted (n0, n1)")

    def __repr__(self) -> str:
        n0, n1 = self.matrix.shape
        return f"Plan({n0} -> {n1}, {self.normalization}, identity share {self.identity_share():.3g})"

    @classmethod
    def identity(
        cls,
        n0: int,
        n1: int | None = None,
        *,
        normalization: Normalization = "paper",
        dtype: Any = torch.float64,
    ) -> "Plan":
        """The plan that keeps the order; for unequal sizes the north-west corner plan.

        Example:
            >>> Plan.identity(2, 3).matrix.sum(0)
            tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64)
        """
        n1 = n0 if n1 is None else n1
        rows = torch.arange(n0, dtype=torch.float64)[:, None]
        columns = torch.arange(n1, dtype=torch.float64)[None, :]
        # The overlap of the intervals [i/n0, (i+1)/n0] and [j/n1, (j+1)/n1], in whole numbers of 1/(n0 n1).
        low = torch.maximum(rows * n1, columns * n0)
        high = torch.minimum((rows + 1) * n1, (columns + 1) * n0)
        return cls(((high - low).clamp(min=0) / (n0 * n1)).to(dtype), normalization)

    @classmethod
    def from_index(
        cls, index: Int[Tensor, "n1"], *, normalization: Normalization = "paper", dtype: Any = torch.float64
    ) -> "Plan":
        """The hard plan that gives anchor neuron ``j`` the source neuron ``index[j]``.

        Example:
            >>> Plan.from_index(torch.tensor([1, 0])).matrix
            tensor([[0.0000, 0.5000],
                    [0.5000, 0.0000]], dtype=torch.float64)
        """
        n = len(index)
        matrix = torch.zeros(n, n, dtype=dtype, device=index.device)
        matrix[index, torch.arange(n, device=index.device)] = 1 / n
        return cls(matrix, normalization)

    def out_map(self) -> Float[Tensor, "n0 n1"]:
        """The map of output axes: each anchor neuron as a mixture of source neurons."""
        match self.normalization:
            case "paper" | "exact":
                return self.matrix / _safe(self.matrix.sum(0))
            case "official":
                return self.official_map()
            case "otfusion":
                return self.matrix / (1 / self.matrix.shape[0] + _OTFUSION_EPS)
            case "otfusion_proper":
                return self.matrix / (self.matrix.sum(0) + _OTFUSION_EPS)
        raise InputError(
            f"normalization is {self.normalization!r}, wanted paper, exact, official, otfusion or "
            "otfusion_proper"
        )

    def in_map(self) -> Float[Tensor, "n0 n1"]:
        """The map of input axes.

        For ``exact`` each source neuron's weight is split, else as :meth:`out_map`.
        """
        if self.normalization == "exact":
            return self.matrix / _safe(self.matrix.sum(1, keepdim=True))
        return self.out_map()

    def official_map(self) -> Float[Tensor, "n0 n1"]:
        """n0 times the plan, whatever the normalisation."""
        return self.matrix * self.matrix.shape[0]

    def identity_share(self) -> float:
        """The share of mass that stays on its own index; 1 for the identity plan of equal sizes."""
        return float(self.matrix.diagonal().sum() / _safe(self.matrix.sum()))

    def entropy(self) -> float:
        """Entropy in nats above that of a hard plan, scaled to [0, 1].

        0 is a permutation, 1 the product plan.
        """
        p = self.matrix / _safe(self.matrix.sum())
        n0, n1 = p.shape
        low, high = torch.tensor(max(n0, n1)).log(), torch.tensor(n0 * n1).log()
        found = -torch.special.xlogy(p, p).sum().cpu()
        return float(((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)) if min(n0, n1) > 1 else 0.0

    def permutation(self) -> Int[Tensor, "n1"] | None:
        """For a hard plan of equal sizes the source index of each anchor neuron, else None."""
        n0, n1 = self.matrix.shape
        top = self.matrix.argmax(0)
        hard = n0 == n1 and int((self.matrix > 0).sum()) == n0 and len(top.unique()) == n0
        return top if hard else None

    def with_normalization(self, normalization: Normalization) -> "Plan":
        """The same plan, read by another rule."""
        return replace(self, normalization=normalization)

    def transpose(self) -> "Plan":
        """The plan from the anchor to the source."""
        return replace(self, matrix=self.matrix.T)

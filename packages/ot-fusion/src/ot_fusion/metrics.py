"""Proofs and pictures of alignment.

Equal functions, barriers between models, similarity of representations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fusion_core.modules import untouched
from fusion_core.plotting import axes_or_new
from fusion_core.results import Result
from ot_fusion.errors import InputError, ShapeError
from ot_fusion.spec.verify import outputs_of

__all__ = ["Curve", "Equivalence", "check_equivalence", "interpolate", "linear_cka"]


@dataclass(frozen=True, slots=True)
class Equivalence(Result):
    """How far apart the outputs of two models are.

    Attributes:
        max_abs: largest difference.
        max_rel: of the largest output.
    """

    max_abs: float
    max_rel: float


def check_equivalence(first: nn.Module, second: nn.Module, inputs: Any) -> Equivalence:
    """Compare two models' outputs on the same inputs.

    Args:
        first: a model; both come back untouched.
        second: another, with outputs of the same shape.
        inputs: a tensor or keyword arguments.

    Raises:
        ShapeError: outputs of different shapes.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> check_equivalence(net, net, torch.randn(4, 3)).max_abs
        0.0
    """
    with untouched(first, second, rng=True), torch.no_grad():
        one, two = outputs_of(first, inputs), outputs_of(second, inputs)
    if [part.shape for part in one] != [part.shape for part in two]:
        raise ShapeError(
            f"outputs have shapes {[tuple(p.shape) for p in one]} and {[tuple(p.shape) for p in two]}"
        )
    gap = max(
        (float((a.double() - b.double()).abs().max()) for a, b in zip(one, two, strict=True)), default=0.0
    )
    size = max((float(a.abs().max()) for a in one), default=0.0)
    return Equivalence(gap, gap / size if size > 0 else gap)


@dataclass(frozen=True)
class Curve(Result):
    """Values along the straight line between two models.

    Attributes:
        t: share of the second model, 0 to 1.
        values: what the evaluation said at each point; empty before :meth:`evaluate`.
        models: the two ends.
    """

    t: Float[np.ndarray, "steps"]
    values: Float[np.ndarray, "steps"] = field(default_factory=lambda: np.empty(0))
    models: tuple[nn.Module, nn.Module] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Points, values and barrier."""
        found: dict[str, Any] = {"t": self.t.tolist(), "values": self.values.tolist()}
        return found | ({"barrier": self.barrier} if len(self.values) else {})

    def evaluate(self, function: Callable[[nn.Module], float]) -> Curve:
        """The curve with a value at every point.

        Args:
            function: takes a model, returns a number such as a loss.
        """
        if self.models is None:
            raise InputError("the curve has no models to evaluate")
        first, second = (dict(model.state_dict()) for model in self.models)
        work = copy.deepcopy(self.models[1])
        values: list[float] = []
        for t in self.t:
            mixed = {
                key: torch.lerp(first[key].to(value), value, float(t)) if value.is_floating_point() else value
                for key, value in second.items()
            }
            work.load_state_dict(mixed)
            with torch.no_grad():
                values.append(float(function(work)))
        return replace(self, values=np.asarray(values))

    @property
    def barrier(self) -> float:
        """The largest excess of the value over the line between the ends (for a loss: the barrier)."""
        if not len(self.values):
            raise InputError("the curve has no values yet; call evaluate(loss)")
        line = (1 - self.t) * self.values[0] + self.t * self.values[-1]
        return float((self.values - line).max())

    def plot(self, ax: Any = None, **style: Any) -> Any:
        """Draw the values over ``t``.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        ax = axes_or_new(ax, "ot-fusion")
        ax.plot(self.t, self.values, **({"marker": "o"} | style))
        ax.set_xlabel("share of the anchor")
        return ax


def interpolate(first: nn.Module, second: nn.Module, steps: int = 11) -> Curve:
    """The straight line between two models of one shape.

    Args:
        first: at t = 0; align it first, or the line runs over a barrier.
        second: at t = 1.
        steps: points, with both ends.

    Returns:
        A curve without values; ``.evaluate(loss)`` gives them.

    Raises:
        InputError: fewer than 2 steps.
        ShapeError: tensors of other names or shapes.

    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> curve = interpolate(a, b, steps=3).evaluate(lambda model: float(model.bias.detach()))
        >>> bool(abs(curve.barrier) < 1e-6)
        True
    """
    if steps < 2:
        raise InputError(f"steps is {steps}, wanted at least 2")
    shapes = [
        {key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (first, second)
    ]
    if shapes[0] != shapes[1]:
        wrong = sorted(key for key in {*shapes[0], *shapes[1]} if shapes[0].get(key) != shapes[1].get(key))
        raise ShapeError(f"the models differ in {', '.join(wrong[:5])}; align one to the other first")
    return Curve(np.linspace(0, 1, steps), models=(first, second))


def linear_cka(x: Float[Tensor, "samples n0"], y: Float[Tensor, "samples n1"]) -> float:
    """Linear centred kernel alignment of two representations, in [0, 1] (arXiv 1905.00414).

    Args:
        x: activations of one model.
        y: of another on the same samples.

    Raises:
        ShapeError: different numbers of samples.

    Example:
        >>> z = torch.randn(20, 4, dtype=torch.float64)
        >>> round(linear_cka(z, 3 * z.flip(1)), 6)
        1.0
    """
    if len(x) != len(y):
        raise ShapeError(f"x has {len(x)} samples and y {len(y)}, wanted the same inputs")
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    top = (x.T @ y).norm().square()
    low = (x.T @ x).norm() * (y.T @ y).norm()
    return float(top / low) if float(low) > 0 else 0.0


def state_distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor], keys: Sequence[str]) -> float:
    """Distance of two states relative to the second's norm; infinite where shapes differ."""
    top = low = 0.0
    for key in keys:
        if key not in first or key not in second or first[key].shape != second[key].shape:
            return float("inf")
        a, b = first[key].double(), second[key].double()
        top, low = top + float((a - b).square().sum()), low + float(b.square().sum())
    return (top / low) ** 0.5 if low > 0 else 0.0

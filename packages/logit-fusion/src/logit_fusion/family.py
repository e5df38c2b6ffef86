r"""The one-parameter family that a shift spans: :math:`P_\alpha \propto P\,e^{\alpha d}`, and its statistics.

Along any direction d it is an exponential family. With :math:`A(\alpha) = \log \sum P e^{\alpha d}`, its mean
:math:`\mu = A'`, variance :math:`v = A''` and third cumulant :math:`\kappa = A'''`, the two divergences that
the method matches are :math:`F = KL(P_\alpha \| P) = \alpha\mu - A` and :math:`R = KL(P \| P_\alpha) = A -
\alpha\mu(0)`; both grow with alpha >= 0, and only R is convex.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from logit_fusion.arrays import Array, positive


class Tilted(NamedTuple):
    """Statistics of the family at one alpha per row, natural logarithms.

    Attributes:
        log_norm: (...) A, the logarithm of the normaliser.
        mean: (...) mean of d under the tilted distribution.
        var: (...) its variance.
        skew: (...) its third central moment.
    """

    log_norm: Float[Array, "*batch"]
    mean: Float[Array, "*batch"]
    var: Float[Array, "*batch"]
    skew: Float[Array, "*batch"]

    def shifted(self, delta: Float[Array, "*batch"]) -> Tilted:
        """The statistics at alpha + delta, by the Taylor series that the cumulants give (error delta**4)."""
        a, mean, var, skew = self
        return Tilted(
            a + delta * (mean + delta * (var / 2 + delta * skew / 6)),
            mean + delta * (var + delta * skew / 2),
            var + delta * skew,
            skew,
        )


def normalized(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """Log-softmax whose exponentials sum to 1 more closely than ``torch.log_softmax``'s in float32.

    Args:
        logits: (..., vocab), -inf allowed.

    Example:
        >>> import torch
        >>> normalized(torch.tensor([0.0, 0.0])).exp()
        tensor([0.5000, 0.5000])
    """
    top = logits.detach().amax(-1, keepdim=True)
    shifted = logits - top
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def tilted(
    log_p: Float[Tensor, "*batch vocab"],
    shift: Float[Tensor, "*batch vocab"],
    alpha: Float[Tensor, "*batch"] | float,
) -> Tilted:
    """Statistics of ``softmax(log_p + alpha * shift)`` with respect to the shift.

    Args:
        log_p: (..., vocab) log-probabilities, -inf allowed.
        shift: (..., vocab) d, finite everywhere.
        alpha: (...) or a number.

    Returns:
        A, mean, variance and third central moment, (...) each; differentiable.

    Example:
        >>> import torch
        >>> log_p = torch.tensor([0.5, 0.5]).log()
        >>> stats = tilted(log_p, torch.tensor([1.0, -1.0]), 0.0)
        >>> round(float(stats.mean), 6), round(float(stats.var), 6)
        (0.0, 1.0)
    """
    if isinstance(alpha, Tensor):
        alpha = alpha.to(shift.dtype).unsqueeze(-1)
    exponent = log_p + alpha * shift
    log_norm = exponent.logsumexp(-1)
    weight = (exponent - log_norm.unsqueeze(-1)).exp()
    mean = (weight * shift).sum(-1)
    centered = shift - mean.unsqueeze(-1)
    square = weight * centered * centered
    return Tilted(log_norm, mean, square.sum(-1), (square * centered).sum(-1))


def divergences(
    stats: Tilted, alpha: Float[Array, "*batch"] | float, mean0: Float[Array, "*batch"] | float
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """F = KL(tilted, P) and R = KL(P, tilted) in nats, >= 0.

    Args:
        stats: at ``alpha``.
        alpha: (...) or a number.
        mean0: mean of the shift under P itself.

    Example:
        >>> import torch
        >>> stats = tilted(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, -1.0]), 1.0)
        >>> [round(float(x), 4) for x in divergences(stats, 1.0, 0.0)]
        [0.3278, 0.4338]
    """
    forward = alpha * stats.mean - stats.log_norm
    reverse = stats.log_norm - alpha * mean0
    return positive(forward), positive(reverse)

r"""What alpha is to make equal: the paper's two divergences at once, or one of them, or their sum.

:math:`L(\alpha) = \sum_t (F - f_t)^2 + (R - r_t)^2` depends on the experts' targets only through their means,
but for a constant, so a target is two means, a constant and a count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float

from logit_fusion.arrays import Array, as_tensor, library
from logit_fusion.config import Objective, Pairing
from logit_fusion.family import Tilted, divergences


class Target(NamedTuple):
    """What F and R are to reach, row by row.

    Attributes:
        forward: (N) mean of the values that F is compared with, nats.
        reverse: (N) the same for R.
        rest: (N) sum over experts of the squared deviations from these means: no alpha can reach less.
        experts: how many there are.
        objective: which divergences count.
        tiny: forward + reverse below which only F + R can be told from rounding errors, nats.
        nothing: forward + reverse that is a rounding error itself, nats.
    """

    forward: Float[Array, "rows"]
    reverse: Float[Array, "rows"]
    rest: Float[Array, "rows"]
    experts: int
    objective: Objective
    tiny: float
    nothing: float

    def tensors(self) -> Target:
        """The same with tensors in place of NumPy's arrays."""
        return self._replace(
            forward=as_tensor(self.forward), reverse=as_tensor(self.reverse), rest=as_tensor(self.rest)
        )


def make_target(
    f: Float[Array, "rows experts"],
    r: Float[Array, "rows experts"],
    objective: Objective,
    pairing: Pairing,
    dtype: torch.dtype,
) -> Target:
    """The target of one search.

    Args:
        f: (N, T) KL(expert, base), nats.
        r: (N, T) KL(base, expert), nats.
        objective: which divergences count.
        pairing: ``"swapped"`` compares F with r and R with f, as the paper's appendix does.
        dtype: that the vocabulary was summed in; it sets what is tiny.
    """
    if pairing == "swapped":
        f, r = r, f
    if f.shape[-1] == 1:
        forward, reverse = f[:, 0], r[:, 0]
        rest = 0.0 * forward
    else:
        forward, reverse = f.mean(-1), r.mean(-1)
        off, away = f - forward[:, None], r - reverse[:, None]
        match objective:
            case "paper":
                rest = (off * off + away * away).sum(-1)
            case "forward":
                rest = (off * off).sum(-1)
            case "reverse":
                rest = (away * away).sum(-1)
            case "jeffreys":
                rest = ((off + away) * (off + away)).sum(-1)
    # F and R come with an error of about eps, F + R with one relative to itself; beyond eps**(2/3) the
    # difference between F, R and half their sum is smaller than that.
    eps = torch.finfo(dtype).eps
    tiny = eps ** (2.0 / 3.0) / 2.0
    return Target(forward, reverse, rest, f.shape[-1], objective, tiny, (8.0 * eps) ** 2)


def loss(
    target: Target, forward: Float[Array, "rows *nodes"], reverse: Float[Array, "rows *nodes"]
) -> Float[Array, "rows *nodes"]:
    """The objective where F and R have these values: summed over the experts, >= 0.

    Args:
        target: of N rows.
        forward: (N) or (N, K) F, nats.
        reverse: the same for R.
    """
    f, r, rest = target.forward, target.reverse, target.rest
    if forward.ndim > 1:
        f, r, rest = f[:, None], r[:, None], rest[:, None]
    match target.objective:
        case "paper":
            over, above = forward - f, reverse - r
            return target.experts * (over * over + above * above) + rest
        case "forward":
            gap = forward - f
        case "reverse":
            gap = reverse - r
        case "jeffreys":
            gap = forward + reverse - f - r
    return target.experts * (gap * gap) + rest


def curvature(target: Target, alpha: Float[Array, "*nodes"], stats: Tilted) -> Float[Array, "rows nodes"]:
    """Half the second derivative of the paper's objective per expert, at several alphas a row.

    Args:
        target: of N rows.
        alpha: (K) or (N, K).
        stats: (N, K), of shifts with mean 0 at alpha = 0.
    """
    forward, reverse = divergences(stats, alpha, 0.0)
    over, above = forward - target.forward[:, None], reverse - target.reverse[:, None]
    _, mean, var, skew = stats
    pull = alpha * var
    return pull * pull + mean * mean + over * (var + alpha * skew) + above * var


def slope(
    target: Target, alpha: Float[Array, "rows"], stats: Tilted
) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    """The equation that the best alpha solves, g = 0, and its derivative, kept positive.

    Half the objective's derivative per expert for ``"paper"``, F - f, R - r or F + R - f - r else; where the
    second derivative is not positive the Gauss-Newton term stands for it.

    Args:
        target: of N rows.
        alpha: (N).
        stats: of shifts with mean 0 at alpha = 0.
    """
    _, mean, var, skew = stats
    forward, reverse = divergences(stats, alpha, 0.0)
    pull = alpha * var
    total = alpha * mean - target.forward - target.reverse
    match target.objective:
        case "paper":
            over, above = forward - target.forward, reverse - target.reverse
            g = over * pull + above * mean
            gauss = pull * pull + mean * mean
            full = gauss + over * (var + alpha * skew) + above * var
            small = target.forward + target.reverse < target.tiny
            xp = library(g)
            g = xp.where(small, total, g)
            gauss = xp.where(small, pull + mean, gauss)
            return g, xp.where((full > 0.0) & ~small, full, gauss)
        case "forward":
            return forward - target.forward, pull
        case "reverse":
            return reverse - target.reverse, mean
        case "jeffreys":
            return total, pull + mean

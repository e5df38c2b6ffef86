r"""What alpha is to make equal: the paper's two divergences at once, or one of them, or their sum.

:math:`L(\alpha) = \sum_t (F - f_t)^2 + (R - r_t)^2` depends on the experts' targets only through their means, but
for a constant (section 2.5), so a target is two means, a constant and a count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from logit_fusion.config import Objective, Pairing
from logit_fusion.family import Tilted, divergences


class Target(NamedTuple):
    """What F and R are to reach, row by row.

    Attributes:
        forward: (N) mean of the values that F is compared with, nats.
        reverse: (N) the same for R.
        rest: (N) sum over experts of the squared deviations from these means: no alpha can reach less.
        count: how many experts there are.
        objective: which divergences count.
        tiny: forward + reverse below which only F + R can be told from rounding errors, nats.
        nothing: forward + reverse that is a rounding error itself, nats.
    """

    forward: Float[Tensor, "rows"]
    reverse: Float[Tensor, "rows"]
    rest: Float[Tensor, "rows"]
    count: int
    objective: Objective
    tiny: float
    nothing: float


def make_target(
    f: Float[Tensor, "rows experts"],
    r: Float[Tensor, "rows experts"],
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
    forward, reverse = f.mean(-1), r.mean(-1)
    apart = {
        "paper": (f - forward.unsqueeze(-1)).square() + (r - reverse.unsqueeze(-1)).square(),
        "forward": (f - forward.unsqueeze(-1)).square(),
        "reverse": (r - reverse.unsqueeze(-1)).square(),
        "jeffreys": (f + r - (forward + reverse).unsqueeze(-1)).square(),
    }[objective].sum(-1)
    # F and R come with an error of about eps, F + R with one relative to itself; beyond eps**(2/3) the
    # difference between F, R and half their sum is smaller than that.
    eps = torch.finfo(dtype).eps
    tiny = eps ** (2.0 / 3.0) / 2.0
    return Target(forward, reverse, apart, f.shape[-1], objective, tiny, (8.0 * eps) ** 2)


def loss(
    target: Target, forward: Float[Tensor, "rows *nodes"], reverse: Float[Tensor, "rows *nodes"]
) -> Float[Tensor, "rows *nodes"]:
    """The objective where F and R have these values: summed over the experts, >= 0.

    Args:
        target: of N rows.
        forward: (N) or (N, K) F, nats.
        reverse: the same for R.
    """
    add = (lambda x: x.unsqueeze(-1)) if forward.ndim > 1 else (lambda x: x)
    f, r = add(target.forward), add(target.reverse)
    match target.objective:
        case "paper":
            part = (forward - f).square() + (reverse - r).square()
        case "forward":
            part = (forward - f).square()
        case "reverse":
            part = (reverse - r).square()
        case "jeffreys":
            part = (forward + reverse - f - r).square()
    return target.count * part + add(target.rest)


def curvature(
    target: Target, alpha: Float[Tensor, "*nodes"], stats: Tilted
) -> Float[Tensor, "rows nodes"]:
    """Half the second derivative of the paper's objective per expert, at several alphas a row.

    Args:
        target: of N rows.
        alpha: (K) or (N, K).
        stats: (N, K), of shifts with mean 0 at alpha = 0.
    """
    forward, reverse = divergences(stats, alpha, 0.0)
    over, above = forward - target.forward.unsqueeze(-1), reverse - target.reverse.unsqueeze(-1)
    _, mean, var, skew = stats
    pull = alpha * var
    return pull * pull + mean * mean + over * (var + alpha * skew) + above * var


def slope(
    target: Target, alpha: Float[Tensor, "rows"], stats: Tilted
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
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
            g = torch.where(small, total, g)
            gauss = torch.where(small, pull + mean, gauss)
            return g, torch.where((full > 0.0) & ~small, full, gauss)
        case "forward":
            return forward - target.forward, pull
        case "reverse":
            return reverse - target.reverse, mean
        case "jeffreys":
            return total, pull + mean

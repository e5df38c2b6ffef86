"""Monotone cubic interpolation (PCHIP, Fritsch and Carlson 1980), batched and differentiable."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["pchip", "pchip_slopes"]


def pchip_slopes(x: Float[Tensor, " knots"], y: Float[Tensor, "... knots"]) -> Float[Tensor, "... knots"]:
    """The derivative at each knot: harmonic means inside, the three-point formula at the ends.

    Args:
        x: (knots,) increasing, at least two.
        y: (..., knots).

    Returns:
        (..., knots), as ``scipy.interpolate.PchipInterpolator(x, y).derivative()(x)``.

    Example:
        >>> pchip_slopes(torch.arange(3.0), torch.tensor([0.0, 1.0, 4.0]))
        tensor([0.0000, 1.5000, 4.0000])
    """
    h = x.diff()
    delta = y.diff(dim=-1) / h
    if delta.shape[-1] == 1:
        return torch.cat([delta, delta], -1)
    d0, d1 = delta[..., :-1], delta[..., 1:]
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    same = d0 * d1 > 0
    one = torch.ones_like(d0)
    inner = (w1 + w2) / (w1 / torch.where(same, d0, one) + w2 / torch.where(same, d1, one))
    inner = torch.where(same, inner, torch.zeros_like(inner))
    first = _end(h[0], h[1], delta[..., 0], delta[..., 1])
    last = _end(h[-1], h[-2], delta[..., -1], delta[..., -2])
    return torch.cat([first[..., None], inner, last[..., None]], -1)


def _end(h0: Tensor, h1: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    slope = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
    slope = torch.where(slope.sign() != d0.sign(), torch.zeros_like(slope), slope)
    steep = (d0.sign() != d1.sign()) & (slope.abs() > 3 * d0.abs())
    return torch.where(steep, 3 * d0, slope)


def pchip(
    at: Float[Tensor, "... places"], x: Float[Tensor, " knots"], y: Float[Tensor, "... knots"]
) -> Float[Tensor, "... places"]:
    """Values of the interpolant; outside the knots the end pieces go on.

    Args:
        at: (..., places).
        x: (knots,).
        y: (knots,) or (..., knots) as many rows as ``at``.
    """
    slopes = pchip_slopes(x, y)
    left = (torch.searchsorted(x, at.detach().contiguous(), right=True) - 1).clamp(0, len(x) - 2)
    h = x.diff()[left]
    t = (at - x[left]) / h

    def pick(values: Tensor, index: Tensor) -> Tensor:
        return values.expand(*index.shape[:-1], len(x)).gather(-1, index)

    y0, y1, s0, s1 = (pick(v, i) for v, i in ((y, left), (y, left + 1), (slopes, left), (slopes, left + 1)))
    c2 = (3 * (y1 - y0) / h - 2 * s0 - s1) / h
    c3 = (2 * (y0 - y1) / h + s0 + s1) / h.square()
    u = t * h
    return y0 + u * (s0 + u * (c2 + u * c3))

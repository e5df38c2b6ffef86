"""Entropic transport in torch, for batches of problems of one size.

Multiplicative, stabilised and in the log domain.

Source: Sinkhorn's iterations (arXiv 1306.0895) with the stopping rule of POT; stabilised by absorption (arXiv
1610.06519).
"""

import torch
from torch import Tensor

__all__ = ["choose_kernel", "sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"]

# exp(-x) stays well inside the dtype's range up to here.
_SAFE = {torch.float64: 600.0, torch.float32: 80.0}
_CHECK = 10


def choose_kernel(cost: Tensor, reg: float) -> str:
    """The steps that are safe for a cost: multiplicative ones unless the kernel could underflow."""
    if float(cost.max()) / reg < _SAFE.get(cost.dtype, 80.0):
        return "sinkhorn"
    return "sinkhorn_log" if cost.is_cuda else "sinkhorn_stabilized"


def _error(plan_columns: Tensor, nu: Tensor) -> Tensor:
    return (plan_columns - nu).norm(dim=-1)


def sinkhorn(
    cost: Tensor, mu: Tensor, nu: Tensor, reg: float, max_iter: int = 1000, tol: float = 1e-9
) -> tuple[Tensor, int, Tensor]:
    """Multiplicative Sinkhorn: ``v = nu / K'u``, then ``u = mu / Kv``.

    Args:
        cost: ``(..., n0, n1)``.
        mu: ``(..., n0)`` source masses.
        nu: ``(..., n1)`` anchor masses.
        reg: weight of the entropy.
        max_iter: most iterations.
        tol: stop when the L2 error of the column sums is below it, looked at in iterations 0, 10, 20, ...

    Returns:
        The plans, the iterations made, and the error of each problem. A problem that has converged is not
        changed by its companions.
    """
    kernel = torch.exp(cost / -reg)
    u = torch.full_like(mu, 1.0) / mu.shape[-1]
    v = torch.full_like(nu, 1.0) / nu.shape[-1]
    active = torch.ones(cost.shape[:-2], dtype=torch.bool, device=cost.device)[..., None]
    error = torch.full(cost.shape[:-2], float("inf"), dtype=cost.dtype, device=cost.device)
    iteration = 0
    single = cost.ndim == 2
    for iteration in range(max_iter):
        new_v = nu / (kernel.mT @ u[..., None])[..., 0]
        new_u = mu / (kernel @ new_v[..., None])[..., 0]
        u, v = (new_u, new_v) if single else (torch.where(active, new_u, u), torch.where(active, new_v, v))
        if iteration % _CHECK == 0:
            error = _error(v * (kernel.mT @ u[..., None])[..., 0], nu)
            active = (error >= tol)[..., None]
            if not bool(active.any()):
                break
    plan = u[..., None] * kernel * v[..., None, :]
    return plan, iteration + 1, error


def sinkhorn_log(
    cost: Tensor, mu: Tensor, nu: Tensor, reg: float, max_iter: int = 1000, tol: float = 1e-9
) -> tuple[Tensor, int, Tensor]:
    """Sinkhorn on the logarithms: slower, and safe for any regularisation. Arguments as :func:`sinkhorn`."""
    score = cost / -reg
    log_mu, log_nu = mu.log(), nu.log()
    f, g = torch.zeros_like(mu), torch.zeros_like(nu)
    active = torch.ones(cost.shape[:-2], dtype=torch.bool, device=cost.device)[..., None]
    error = torch.full(cost.shape[:-2], float("inf"), dtype=cost.dtype, device=cost.device)
    iteration = 0
    for iteration in range(max_iter):
        new_g = log_nu - torch.logsumexp(score + f[..., None], -2)
        new_f = log_mu - torch.logsumexp(score + new_g[..., None, :], -1)
        f, g = torch.where(active, new_f, f), torch.where(active, new_g, g)
        if iteration % _CHECK == 0:
            error = _error(torch.exp(torch.logsumexp(score + f[..., None], -2) + g), nu)
            active = (error >= tol)[..., None]
            if not bool(active.any()):
                break
    return torch.exp(score + f[..., None] + g[..., None, :]), iteration + 1, error


def sinkhorn_stabilized(
    cost: Tensor, mu: Tensor, nu: Tensor, reg: float, max_iter: int = 1000, tol: float = 1e-9
) -> tuple[Tensor, int, Tensor]:
    """Multiplicative steps whose scalings are absorbed into dual potentials before they grow too large.

    Arguments as :func:`sinkhorn`. The start comes of a few log-domain steps, so that the first kernel does
    not underflow.
    """
    score = cost / -reg
    g = torch.zeros_like(nu)
    f = mu.log() - torch.logsumexp(score + g[..., None, :], -1)
    g = nu.log() - torch.logsumexp(score + f[..., None], -2)
    kernel = torch.exp(score + f[..., None] + g[..., None, :])
    u, v = torch.ones_like(mu), torch.ones_like(nu)
    limit = 1e50 if cost.dtype == torch.float64 else 1e10
    error = torch.full(cost.shape[:-2], float("inf"), dtype=cost.dtype, device=cost.device)
    active = torch.ones(cost.shape[:-2], dtype=torch.bool, device=cost.device)[..., None]
    iteration = 0
    for iteration in range(max_iter):
        new_v = nu / (kernel.mT @ u[..., None])[..., 0]
        new_u = mu / (kernel @ new_v[..., None])[..., 0]
        u, v = torch.where(active, new_u, u), torch.where(active, new_v, v)
        if iteration % _CHECK == 0:
            error = _error(v * (kernel.mT @ u[..., None])[..., 0], nu)
            active = (error >= tol)[..., None]
            if not bool(active.any()):
                break
            if float(torch.maximum(u.amax(), v.amax())) > limit or iteration == 0:
                f, g = f + u.log(), g + v.log()
                kernel = torch.exp(score + f[..., None] + g[..., None, :])
                u, v = torch.ones_like(mu), torch.ones_like(nu)
    return u[..., None] * kernel * v[..., None, :], iteration + 1, error

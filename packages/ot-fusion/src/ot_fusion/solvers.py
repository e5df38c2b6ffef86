"""Transport plans from costs: exact, entropic and unbalanced.

Source: section 4 of the paper; the exact solvers are those of POT and SciPy, the entropic ones
:mod:`ot_fusion.sinkhorn`.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fusion_core.errors import FusionWarning
from ot_fusion.errors import InputError, ShapeError, SolverError
from ot_fusion.plan import Normalization, Plan
from ot_fusion.sinkhorn import choose_kernel, sinkhorn, sinkhorn_log, sinkhorn_stabilized

__all__ = ["Solver", "assignment", "gromov", "solve", "solve_batch"]

Solver = Literal["emd", "lsa", "sinkhorn", "sinkhorn_stabilized", "sinkhorn_log", "unbalanced"]

_ENTROPIC = {"sinkhorn": sinkhorn, "sinkhorn_log": sinkhorn_log, "sinkhorn_stabilized": sinkhorn_stabilized}
_ACCEPT = 1e-2
_QUIET = 1e-5  # errors of the column sums that nobody has to hear of


def assignment(cost: Tensor) -> Tensor:
    """The cheapest one-to-one assignment of a square cost: the row that each column takes, ``(n,)``.

    Example:
        >>> assignment(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([1, 0])
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.detach().double().cpu().numpy())
    index = np.empty(len(columns), dtype=np.int64)
    index[columns] = rows
    return torch.from_numpy(index).to(cost.device)


def _masses(name: str, value: Tensor | None, n: int, cost: Tensor) -> Tensor | None:
    if value is None:
        return None
    if value.shape != (n,):
        raise ShapeError(f"{name} has shape {tuple(value.shape)}, wanted ({n},) as the cost")
    if not bool(torch.isfinite(value).all()) or float(value.min()) <= 0:
        raise SolverError(
            f"{name} has masses that are not positive numbers, the least is {float(value.min())}"
        )
    return value.to(cost)


def _check(cost: Tensor, mu: Tensor | None, nu: Tensor | None, solver: str, reg: float) -> None:
    if not cost.is_floating_point() or cost.ndim != 2 or 0 in cost.shape:
        raise ShapeError(f"cost has shape {tuple(cost.shape)} and dtype {cost.dtype}, wanted floats (n0, n1)")
    if solver not in get_args(Solver):
        raise InputError(f"solver is {solver!r}, wanted one of {', '.join(get_args(Solver))}")
    if not bool(torch.isfinite(cost).all()):
        raise SolverError("cost has NaN or infinite entries")
    if solver not in ("emd", "lsa") and not reg > 0:
        raise SolverError(f"reg is {reg}, wanted a positive number for the {solver} solver")
    if (
        mu is not None
        and nu is not None
        and solver != "unbalanced"
        and abs(float(mu.sum() - nu.sum())) > 1e-6
    ):
        raise SolverError(
            f"mu sums to {float(mu.sum()):.9g} and nu to {float(nu.sum()):.9g}, wanted equal sums; the "
            "unbalanced solver takes unequal ones"
        )


def _lsa(cost: Tensor) -> Tensor:
    """The exact plan of uniform masses whose sizes divide each other, by one assignment."""
    n0, n1 = cost.shape
    if n0 < n1:
        return _lsa(cost.T).T
    copies = n0 // n1
    columns = torch.arange(n1, device=cost.device).repeat_interleave(copies)
    rows = assignment(cost[:, columns])
    plan = torch.zeros(n0, n1, dtype=cost.dtype, device=cost.device)
    plan[rows, columns] = 1 / n0
    return plan


def _emd(cost: Tensor, mu: Tensor, nu: Tensor) -> tuple[Tensor, dict[str, Any]]:
    import ot

    n0, n1 = cost.shape
    host = np.ascontiguousarray(cost.detach().cpu().double().numpy())
    a, b = (m.detach().cpu().double().numpy() for m in (mu, nu))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan, log = ot.emd(
            a, b * (a.sum() / b.sum()), host, numItermax=max(1_000_000, 50 * n0 * n1), log=True
        )
    if log.get("warning"):
        raise SolverError(f"the exact solver stopped: {' '.join(str(log['warning']).split())}")
    return torch.from_numpy(np.asarray(plan)).to(cost), {"solver": "emd"}


def _unbalanced(
    cost: Tensor, mu: Tensor, nu: Tensor, reg: float, reg_m: float, max_iter: int, tol: float
) -> tuple[Tensor, dict[str, Any]]:
    import ot

    a, b, host = (value.detach().cpu().double().numpy() for value in (mu, nu, cost))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = ot.unbalanced.sinkhorn_unbalanced(
            a, b, host, reg, reg_m, reg_type="kl", numItermax=max_iter, stopThr=tol
        )
    return torch.from_numpy(np.asarray(plan)).to(cost), {"solver": "unbalanced"}


def _entropic(
    cost: Tensor, mu: Tensor, nu: Tensor, solver: str, reg: float, max_iter: int, tol: float
) -> tuple[Tensor, dict[str, Any]]:
    name = choose_kernel(cost, reg) if solver == "sinkhorn" else solver
    if cost.dtype == torch.float32:
        tol = max(tol, 1e-7)
    plan, iterations, error = _ENTROPIC[name](cost, mu, nu, reg, max_iter, tol)
    worst = float(error.max())
    if not worst <= _ACCEPT:
        raise SolverError(
            f"{name} did not converge: after {iterations} iterations the column sums are wrong by "
            f"{worst:.3g}; "
            "raise reg or max_iter"
        )
    if worst > max(100 * tol, _QUIET):
        warnings.warn(
            f"{name} stopped after {iterations} iterations with an error of {worst:.3g} in the column sums; "
            "raise reg or max_iter for a sharper plan",
            FusionWarning,
            stacklevel=4,
        )
    return plan, {"solver": name, "iterations": iterations, "marginal_error": worst}


def solve(
    cost: Float[Tensor, "n0 n1"],
    mu: Float[Tensor, "n0"] | None = None,
    nu: Float[Tensor, "n1"] | None = None,
    solver: Solver = "emd",
    reg: float = 0.08,
    *,
    reg_m: float = 1.0,
    max_iter: int = 1000,
    tol: float = 1e-9,
    normalization: Normalization = "paper",
) -> Plan:
    """The transport plan of a cost: the least ``<P, cost>`` with row sums ``mu`` and column sums ``nu``.

    Args:
        cost: ``(n0, n1)``, finite.
        mu: source masses, positive; None is uniform.
        nu: anchor masses of the same sum; None is uniform.
        solver: ``emd`` (exact; by assignment where masses are uniform and one size divides the other),
            ``lsa`` (that assignment, or an error), ``sinkhorn`` (minus ``reg`` times the entropy; goes over
            to the stabilised or log-domain steps where the kernel would underflow), ``sinkhorn_stabilized``,
            ``sinkhorn_log``, ``unbalanced`` (marginals held by a KL penalty only).
        reg: weight of the entropy, > 0, relative to the cost's scale.
        reg_m: weight of the marginals of ``unbalanced``.
        max_iter: most iterations of an entropic solver.
        tol: its stop: L2 error of the column sums, looked at every tenth iteration.
        normalization: of the plan's maps, see :class:`Plan`.

    Returns:
        The plan in the cost's dtype and device; ``info`` has cost, solver, iterations and marginal error. A
        constant cost gives the identity (the north-west corner plan for unequal sizes) from the exact
        solvers.

    Raises:
        SolverError: costs or masses that are no finite, positive numbers; sums that differ; ``reg`` not
            positive; no convergence.
        ShapeError: masses of the wrong length.

    Example:
        >>> solve(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)).matrix
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """
    n0, n1 = cost.shape if cost.ndim == 2 else (0, 0)
    _check(cost, None, None, solver, reg)
    mu, nu = _masses("mu", mu, n0, cost), _masses("nu", nu, n1, cost)
    uniform = mu is None and nu is None
    total = next((float(m.sum()) for m in (mu, nu) if m is not None), 1.0)
    mu = cost.new_full((n0,), total / n0) if mu is None else mu
    nu = cost.new_full((n1,), total / n1) if nu is None else nu
    _check(cost, mu, nu, solver, reg)
    divides = max(n0, n1) % min(n0, n1) == 0
    info: dict[str, Any]
    if solver == "lsa" and not (uniform and divides):
        raise SolverError(
            f"lsa assigns one to one, but the masses are not uniform or the sizes are {n0} and {n1}; use emd"
        )
    if solver in ("emd", "lsa") and uniform and bool((cost == cost[0, 0]).all()):
        plan, info = Plan.identity(n0, n1).matrix.to(cost), {"solver": "constant"}
    elif solver in ("emd", "lsa") and uniform and divides:
        plan, info = _lsa(cost), {"solver": "lsa"}
    elif solver == "emd":
        plan, info = _emd(cost, mu, nu)
    elif solver == "unbalanced":
        plan, info = _unbalanced(cost, mu, nu, reg, reg_m, max_iter, tol)
    else:
        plan, info = _entropic(cost, mu, nu, solver, reg, max_iter, tol)
    info["cost"] = float((plan * cost).sum())
    return Plan(plan, normalization, info)


def solve_batch(
    costs: Sequence[Tensor],
    solver: Solver = "emd",
    reg: float = 0.08,
    *,
    max_iter: int = 1000,
    tol: float = 1e-9,
    reg_m: float = 1.0,
    normalization: Normalization = "paper",
) -> list[Plan]:
    """Plans of several costs with uniform masses; entropic ones of one size are solved together.

    Args:
        costs: matrices of any sizes.
        solver: as in :func:`solve`.
        reg: as there.
        max_iter: as there.
        tol: as there.
        reg_m: as there.
        normalization: as there.

    Example:
        >>> [plan.matrix.shape for plan in solve_batch([torch.rand(3, 2), torch.rand(4, 4)], "sinkhorn")]
        [torch.Size([3, 2]), torch.Size([4, 4])]
    """
    options: dict[str, Any] = {"max_iter": max_iter, "tol": tol, "normalization": normalization}
    found: dict[int, Plan] = {}
    if solver in _ENTROPIC:
        groups: dict[Any, list[int]] = {}
        for number, cost in enumerate(costs):
            _check(cost, None, None, solver, reg)
            groups.setdefault((tuple(cost.shape), cost.dtype, cost.device), []).append(number)
        for (shape, _, _), members in groups.items():
            if len(members) == 1:
                continue
            stack = torch.stack([costs[number] for number in members])
            mu = stack.new_full((len(members), shape[0]), 1 / shape[0])
            nu = stack.new_full((len(members), shape[1]), 1 / shape[1])
            plans, info = _entropic(stack, mu, nu, solver, reg, max_iter, tol)
            for number, plan in zip(members, plans, strict=True):
                cost = float((plan * costs[number]).sum())
                found[number] = Plan(plan, normalization, {**info, "cost": cost})
    return [
        found[number] if number in found else solve(cost, None, None, solver, reg, reg_m=reg_m, **options)
        for number, cost in enumerate(costs)
    ]


def gromov(
    x: Float[Tensor, "n0 s0"],
    y: Float[Tensor, "n1 s1"],
    *,
    epsilon: float = 0.05,
    normalization: Normalization = "paper",
) -> Plan:
    """Entropic Gromov-Wasserstein plan between the distances within each model.

    Args:
        x: the source's features; the samples need not be the anchor's.
        y: the anchor's features.
        epsilon: weight of the entropy.
        normalization: of the plan's maps.
    """
    import ot

    inner = [finish.div(finish.max().clamp(min=1e-300)) for finish in (_within(x), _within(y))]
    a, b = (np.full(len(part), 1 / len(part)) for part in inner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = ot.gromov.entropic_gromov_wasserstein(
            inner[0].numpy(), inner[1].numpy(), a, b, "square_loss", epsilon=epsilon
        )
    return Plan(torch.from_numpy(np.asarray(plan)).to(x), normalization, {"solver": "gromov"})


def _within(features: Tensor) -> Tensor:
    host = features.detach().cpu().double()
    return torch.cdist(host, host, compute_mode="donot_use_mm_for_euclid_dist")

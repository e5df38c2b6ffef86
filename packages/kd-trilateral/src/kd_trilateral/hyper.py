"""From c to the gradient of the ratio network, and the directions v that need second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusion_core.errors import check_range
from fusion_core.numerics import masked_mean
from kd_trilateral.directional import Batch, Terms
from kd_trilateral.forward import Forward, RNGState
from kd_trilateral.losses import generalized_ce, mix
from kd_trilateral.tensors import dot, gradients

Values = Sequence[Tensor]
Apply = Callable[[Values], list[Tensor]]
OuterLoss = Callable[[Tensor, Tensor], Tensor]

OUTER_LOSSES: dict[str, OuterLoss] = {
    "ce": torch.nn.functional.cross_entropy,
    "gce": generalized_ce,
}


def outer_objective(
    alpha: Float[Tensor, " batch"],
    c: Float[Tensor, " batch"],
    *,
    normalize: bool = False,
    center: bool = False,
    mask: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """The scalar whose gradient in omega is the hypergradient: ``-(1/B) sum_i c_i alpha_i``, c held fixed.

    Args:
        alpha: with graph to omega.
        c: per-sample directional derivatives.
        normalize: divide c by the batch mean of abs(c), so that the inner step size drops out; all c zero
            stays zero.
        center: subtract the batch mean of c first, so that the mean ratio is not pushed.
        mask: True where a row takes part.
    """
    c = c.detach().to(alpha.dtype)
    mask = torch.ones_like(c, dtype=torch.bool) if mask is None else mask
    if center:
        c = c - masked_mean(c, mask)
    if normalize:
        scale = masked_mean(c.abs(), mask)
        c = c / torch.where(scale > 0, scale, 1.0)
    return -masked_mean(c * alpha, mask)


def hypergradient(
    alpha: Float[Tensor, " batch"],
    c: Float[Tensor, " batch"],
    omega: Sequence[Tensor],
    *,
    eta: float = 1.0,
    normalize: bool = False,
    center: bool = False,
) -> list[Tensor]:
    """``d L_val / d omega = -(eta/B) sum_i c_i d alpha_i / d omega``, one backward through the ratio network.

    Args:
        alpha: ``(batch,)`` with graph to omega.
        c: ``(batch,)`` from :func:`~kd_trilateral.directional.per_sample_directional`.
        omega: parameters of the ratio network.
        eta: inner step size where v was the bare gradient; 1 where v was preconditioned, Neumann's or
            implicit.
        normalize: see :func:`outer_objective`.
        center: see :func:`outer_objective`.

    Returns:
        One gradient per entry of ``omega``.

    Example:
        >>> omega = torch.zeros(1, requires_grad=True)
        >>> hypergradient(torch.sigmoid(omega).expand(2), torch.tensor([1.0, 3.0]), [omega])
        [tensor([-0.5000])]
    """
    check_range("eta", eta, 0.0, float("inf"))
    objective = eta * outer_objective(alpha, c, normalize=normalize, center=center)
    return list(torch.autograd.grad(objective, list(omega), retain_graph=True))


def training_loss(
    forward: Forward,
    values: Values,
    batch: Batch,
    terms: Terms,
    alpha: Tensor,
    mask: Tensor,
    rng: RNGState | None = None,
) -> Tensor:
    """The inner loss L(theta, alpha) as a function of the parameters."""
    kl, ce = terms(forward(batch.inputs, values, rng=rng), batch.teacher_logits, batch.labels)
    return masked_mean(mix(alpha, kl, ce), mask)


def unrolled_directional(
    forward: Forward,
    theta: Values,
    theta_next: Values,
    batch: Batch,
    terms: Terms,
    alpha: Tensor,
    mask: Tensor,
    preconditioner: Apply,
    held_out: Callable[[Values], Tensor],
    rng: RNGState | None = None,
) -> Tensor:
    """C by double backward through the inner step: slow, kept as the reference for the other engines.

    The virtual step is written as ``theta_next - P (g(alpha) - g)``: its value is the step that the optimiser
    really took, its derivative that of any optimiser whose statistics are held fixed.

    Returns:
        c of the *preconditioned* v, ``(batch,)``: ``-B dL_val/dalpha``.
    """
    # Fused attention kernels have no second derivative; the plain one has.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        at = [p.detach().requires_grad_() for p in theta]
        ratio = alpha.detach().clone().requires_grad_()
        loss = training_loss(forward, at, batch, terms, ratio, mask, rng)
        g = gradients(loss, at, create_graph=True)
        step = preconditioner([x - x.detach() for x in g])
        moved = [p.detach() - s for p, s in zip(theta_next, step, strict=True)]
        (slope,) = gradients(held_out(moved), [ratio])
    return -mask.sum().clamp_min(1) * slope


def hessian_product(loss: Tensor, at: Values) -> Apply:
    """``x -> H x`` for the Hessian of a scalar, by a second backward pass over a graph that is kept."""
    used = [(i, g) for i, g in enumerate(gradients(loss, at, create_graph=True)) if g.requires_grad]

    def product(x: Values) -> list[Tensor]:
        if not used:
            return [torch.zeros_like(p) for p in at]
        return gradients([g for _, g in used], at, [x[i] for i, _ in used], retain_graph=True)

    return product


def neumann_direction(gradient: Values, hessian: Apply, preconditioner: Apply, terms: int) -> list[Tensor]:
    """``v = sum_{j<J} (I - P H)^j P g``: with SGD ``eta sum_j (I - eta H)^j g``; J = 1 is one-step.

    Args:
        gradient: of the held-out loss at the same theta as the Hessian.
        hessian: ``x -> H x`` of the training loss.
        preconditioner: ``x -> P x``.
        terms: J >= 1; costs J - 1 Hessian products.
    """
    check_range("neumann_terms", terms, 1, float("inf"))
    power = preconditioner(list(gradient))
    total = [p.clone() for p in power]
    for _ in range(terms - 1):
        pulled = preconditioner(hessian(power))
        power = [p - q for p, q in zip(power, pulled, strict=True)]
        total = [a + b for a, b in zip(total, power, strict=True)]
    return total


def implicit_direction(
    gradient: Values, hessian: Apply, *, damping: float = 0.1, steps: int = 50, tolerance: float = 1e-10
) -> list[Tensor]:
    """V with ``(H + damping I) v = g`` by conjugate gradients: the hypergradient of a converged student.

    Args:
        gradient: of the held-out loss.
        hessian: ``x -> H x`` of the training loss; damping must lift its lowest eigenvalue above 0.
        damping: > 0.
        steps: most Hessian products.
        tolerance: of the residual's norm relative to the gradient's; looked at on the device, so that later
            steps change nothing instead of stopping.
    """
    check_range("damping", damping, 0.0, float("inf"), open=True)
    solution = [torch.zeros_like(g) for g in gradient]
    residual = [g.clone() for g in gradient]
    search = [r.clone() for r in residual]
    rho = dot(residual, residual)
    floor = rho * tolerance**2
    on_host = gradient[0].device.type == "cpu"
    for _ in range(steps):
        if on_host and not bool(rho > floor):
            break
        image = [h + damping * s for h, s in zip(hessian(search), search, strict=True)]
        curvature = dot(search, image)
        going = (rho > floor) & (curvature > 0)
        length = torch.where(going, rho / torch.where(going, curvature, 1.0), 0.0)
        solution = [x + length * s for x, s in zip(solution, search, strict=True)]
        residual = [r - length * w for r, w in zip(residual, image, strict=True)]
        fresh = dot(residual, residual)
        ratio = torch.where(going, fresh / torch.where(rho > 0, rho, 1.0), 0.0)
        search = [r + ratio * s for r, s in zip(residual, search, strict=True)]
        rho = fresh
    return solution

"""The two signals of distillation per sample: the teacher's (KL) and the label's (cross-entropy).

``L = mean_i alpha_i * tau^2 * KL_i + (1 - alpha_i) * CE_i`` with alpha the weight of the TEACHER.
Source: Hinton et al. 2015 for the two terms, TGeo-KD (ICLR 2024) for the convex mix per sample.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fusion_core.errors import ConfigError, ShapeError, check_range
from fusion_core.numerics import kl_divergence, masked_mean

Task = Literal["multiclass", "binary"]
CEOn = Literal["logits", "probs"]
TASKS = ("multiclass", "binary")


def as_pair(logits: Tensor) -> Tensor:
    """The two-class logits ``(batch, 2)`` = (0, u) of a single binary logit u ``(batch,)`` or ``(batch, 1)``.

    Logits that already are pairs come back as they are.

    Raises:
        ShapeError: any other shape.

    Example:
        >>> import torch
        >>> as_pair(torch.tensor([1.5, -2.0])).tolist()
        [[0.0, 1.5], [0.0, -2.0]]
    """
    if logits.dim() == 2 and logits.shape[1] == 2:
        return logits
    if logits.dim() == 2 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if logits.dim() != 1:
        raise ShapeError(
            f"logits have shape {tuple(logits.shape)}, wanted (batch,), (batch, 1) or (batch, 2) in a "
            "binary task"
        )
    return torch.stack([torch.zeros_like(logits), logits], dim=-1)


def standardize(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Logits of mean 0 and standard deviation 1 per row: ``(z - mean) / (std + 1e-7)`` (Sun et al. 2024)."""
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def _centered(student: Tensor, teacher: Tensor, q: Tensor, tau: float) -> Tensor:
    """X = D - E_q D with D = (z_T - z_S) / tau: what is left of the logits' difference under the teacher."""
    difference = (teacher - student) / tau
    return difference - (q * difference).sum(-1, keepdim=True)


class _TemperedKL(torch.autograd.Function):
    """``tau^2 KL(softmax(z_T/tau) || softmax(z_S/tau))`` per row, with its gradients in closed form.

    With x as above the divergence is log E_q exp(-x). Rows where all |x| < 1/2 are computed as
    log1p(E_q [expm1(-x) + x]), exact to rounding even when it is far below 1 (large tau):
    expm1(-x) + x = 2 sinh(x/2)^2 - (sinh(x) - x), the last bracket by its series. The gradients are
    ``tau (p - q)`` in z_S and ``tau q x`` in z_T; written in torch, so that they can be differentiated again.
    """

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, tau: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        log_q = F.log_softmax(teacher / tau, dim=-1)
        direct = kl_divergence(log_q, F.log_softmax(student / tau, dim=-1))
        q = log_q.exp()
        x = _centered(student, teacher, q, tau)
        small = x.abs().amax(-1) < 0.5
        square = x.square().clamp_max(0.25)  # rows that are not small are not read
        series = torch.ones_like(x)
        for divisor in (156.0, 110.0, 72.0, 42.0, 20.0):
            series = 1.0 + square / divisor * series
        excess = 2.0 * torch.sinh(0.5 * x.clamp(-0.5, 0.5)).square() - x * square / 6.0 * series
        return tau**2 * torch.where(small, torch.log1p((q * excess).sum(-1)), direct)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:  # noqa: ARG004
        student, teacher, ctx.tau = inputs
        ctx.save_for_backward(student, teacher)
        ctx.save_for_forward(student, teacher)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        student, teacher = ctx.saved_tensors
        scale = ctx.tau * gradient.unsqueeze(-1)
        q = F.softmax(teacher / ctx.tau, dim=-1)
        to_student = to_teacher = None
        if ctx.needs_input_grad[0]:
            to_student = scale * (F.softmax(student / ctx.tau, dim=-1) - q)
        if ctx.needs_input_grad[1]:
            to_teacher = scale * q * _centered(student, teacher, q, ctx.tau)
        return to_student, to_teacher, None

    @staticmethod
    def jvp(ctx: Any, d_student: Tensor | None, d_teacher: Tensor | None, _tau: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        student, teacher = ctx.saved_tensors
        q = F.softmax(teacher / ctx.tau, dim=-1)
        out = torch.zeros_like(student[..., 0])
        if d_student is not None:
            out = out + ((F.softmax(student / ctx.tau, dim=-1) - q) * d_student).sum(-1)
        if d_teacher is not None:
            out = out + (q * _centered(student, teacher, q, ctx.tau) * d_teacher).sum(-1)
        return ctx.tau * out


def kd_terms(
    student_logits: Float[Tensor, "batch classes"] | Float[Tensor, " batch"],
    teacher_logits: Float[Tensor, "batch classes"] | Float[Tensor, " batch"],
    labels: Int[Tensor, " batch"],
    temperature: float,
    task: Task = "multiclass",
    ce_on: CEOn = "logits",
    *,
    ignore_index: int = -100,
    class_weight: Float[Tensor, " classes"] | None = None,
    label_smoothing: float = 0.0,
    standardize_logits: bool = False,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Both terms per sample.

    Args:
        student_logits: ``(batch, classes)``; in a binary task also ``(batch,)`` or ``(batch, 1)``.
        teacher_logits: likewise; its gradient is not cut here.
        labels: int64 ``(batch,)`` in ``[0, classes)``; rows with ``ignore_index`` get 0 in both terms.
        temperature: tau > 0 of the KL term.
        task: ``"binary"`` reads a single logit u as the pair (0, u), so that both terms are the Bernoulli
            ones.
        ce_on: ``"probs"`` feeds softmax probabilities to the cross-entropy, a defect of the authors' code
            (bounded below by log(1 + (K-1)/e)), kept for reproduction.
        ignore_index: label of rows that take no part.
        class_weight: scales the cross-entropy of each label's rows.
        label_smoothing: of the cross-entropy only.
        standardize_logits: z-score both logits in the KL term.

    Returns:
        ``(kl, ce)``, each ``(batch,)`` in nats; ``kl`` is already times tau^2, so that its gradient in the
        student logits is ``tau * (p - q)``.

    Raises:
        ShapeError: the logits differ in shape.
        ConfigError: unknown task or ``ce_on``, or a temperature that is not positive and finite.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> kl, ce = kd_terms(z, z + 3.0, torch.tensor([0]), 4.0)
        >>> round(float(kl), 6), round(float(ce), 4)
        (0.0, 0.1269)
    """
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}, wanted one of {TASKS}")
    check_range("temperature", temperature, 0.0, float("inf"), open=True)
    if task == "binary":
        student_logits, teacher_logits = as_pair(student_logits), as_pair(teacher_logits)
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ShapeError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits "
            f"{tuple(teacher_logits.shape)} differ; "
            "wanted both (batch, classes)"
        )
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    if ce_on == "probs":
        targets = F.softmax(student, dim=-1)
    elif ce_on == "logits":
        targets = student
    else:
        raise ConfigError(f"ce_on is {ce_on!r}, wanted 'logits' or 'probs'")
    weight = None if class_weight is None else class_weight.to(student)
    ce = F.cross_entropy(
        targets, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    if standardize_logits:
        student, teacher = standardize(student), standardize(teacher)
    kl = cast(Tensor, _TemperedKL.apply(student, teacher, temperature))
    return torch.where(labels == ignore_index, 0.0, kl), ce


def mix(
    alpha: Float[Tensor, "..."], kl: Float[Tensor, "..."], ce: Float[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """The weight of the TEACHER at work, per sample: ``alpha * kl + (1 - alpha) * ce``.

    Args:
        alpha: ``(batch,)`` in [0, 1], or one number ``()``.
        kl: ``(batch,)``, already times tau^2.
        ce: ``(batch,)``.

    Returns:
        ``(batch,)``.

    Raises:
        ShapeError: any other shape, such as alpha ``(batch, 1)``, which would broadcast to (batch, batch) and
            silently average the ratios.
    """
    if kl.shape != ce.shape or alpha.shape not in (kl.shape, torch.Size([])):
        raise ShapeError(
            f"alpha has shape {tuple(alpha.shape)}, kl {tuple(kl.shape)}, ce {tuple(ce.shape)}; "
            "wanted all (batch,), or alpha ()"
        )
    return alpha * kl + (1.0 - alpha) * ce


def taking_part(labels: Int[Tensor, " batch"], ignore_index: int = -100) -> Bool[Tensor, " batch"]:
    """True where a row takes part in the loss."""
    return labels != ignore_index


def generalized_ce(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    q: float = 0.7,
    *,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Bounded cross-entropy ``mean (1 - p_y^q) / q`` (Zhang & Sabuncu 2018): robust to wrong labels.

    Args:
        logits: ``(batch, classes)``.
        labels: ``(batch,)``.
        q: in (0, 1]; the limit 0 is cross-entropy, 1 is 1 - p_y.
        ignore_index: label of rows that take no part.

    Returns:
        Scalar in [0, 1/q].
    """
    mask = taking_part(labels, ignore_index)
    safe = torch.where(mask, labels, 0)
    log_p = F.log_softmax(logits, dim=-1).gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    return masked_mean(-torch.expm1(q * log_p) / q, mask)

"""Per-sample ratios that need no learned network; each gives the weight of the TEACHER in [0, 1]."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_core.errors import check_range


def const(like: Float[Tensor, " batch"], alpha: float = 0.5) -> Float[Tensor, " batch"]:
    """The same weight for every sample: vanilla distillation (Hinton et al. 2015)."""
    return torch.full_like(like, check_range("alpha", alpha, 0.0, 1.0))


def anl(like: Float[Tensor, " batch"], step: int, total_steps: int) -> Float[Tensor, " batch"]:
    """Annealing: linear from 1 to 0 over training (Clark et al. 2019).

    Args:
        like: any ``(batch,)`` tensor; gives shape, dtype and device.
        step: steps done, >= 0.
        total_steps: length of training, > 0.

    Example:
        >>> import torch
        >>> anl(torch.zeros(1), step=25, total_steps=100).item()
        0.75
    """
    check_range("total_steps", total_steps, 1, float("inf"))
    return torch.full_like(like, min(max(1.0 - step / total_steps, 0.0), 1.0))


def ada(t: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Adaptive: the teacher's confidence in the label over chance, ``max(t_y - (1 - t_y)/(K-1), 0)``.

    Args:
        t: teacher probabilities.
        labels: ``(batch,)`` in ``[0, classes)``.
    """
    t_y = t.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (t_y - (1.0 - t_y) / (t.shape[-1] - 1)).clamp_min(0.0)


def wls(student_ce: Float[Tensor, " batch"], teacher_ce: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Weighted soft labels (Zhou et al. 2021): ``1 - exp(-CE_S / max(CE_T, 1e-12))``.

    Args:
        student_ce: cross-entropy of the student per sample, at temperature 1.
        teacher_ce: that of the teacher.
    """
    return -torch.expm1(-student_ce / teacher_ce.clamp_min(1e-12))

"""How an optimiser's step answers to its gradient: P = -d(theta')/d(grad), statistics held fixed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_core.errors import FusionWarning, ShapeError

_ADAM = (torch.optim.Adam, torch.optim.AdamW)


def _sgd(group: dict[str, Any], v: Tensor, first_step: bool) -> Tensor:
    momentum = group["momentum"]
    if not momentum:
        return v * group["lr"]
    # A parameter's first step copies the gradient into the buffer; later it enters times 1 - dampening.
    share = 1.0 if first_step else 1.0 - group["dampening"]
    return v * (group["lr"] * ((1.0 + momentum * share) if group["nesterov"] else share))


def _adam(group: dict[str, Any], state: dict[str, Any], v: Tensor) -> Tensor:
    if not state:  # had no gradient so far: it never moved
        return torch.zeros_like(v)
    beta1, beta2 = group["betas"]
    step = state["step"]
    if isinstance(step, Tensor) and step.device.type == "cpu":
        step = float(step)  # a host value in float32, whose powers are wanted in float64
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    denominator = (second / (1.0 - beta2**step)).sqrt_().add_(group["eps"])
    return v * (group["lr"] * (1.0 - beta1) / (1.0 - beta1**step)) / denominator


def precondition(
    v: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor] | None = None,
    *,
    first_step: bool = False,
) -> list[Tensor]:
    """Replace the gradient v of the held-out loss by P v, as the inner optimiser's step has it.

    Call it AFTER ``optimizer.step()``, since Adam's statistics of that step are used:

    * SGD: ``lr``; with momentum ``lr (1 - dampening)`` except on the first step; Nesterov ``lr (1 + mu)``.
    * Adam, AdamW: ``lr (1 - beta1)/(1 - beta1^k) / (sqrt(vhat_k) + eps)`` elementwise, ``vhat`` the second
      moment (amsgrad: its running maximum) over ``1 - beta2^k``. Weight decay shifts theta' and leaves P as
      it is.

    Args:
        v: one tensor per parameter, of its shape.
        optimizer: torch's SGD, Adam or AdamW; of any other P = lr, with a warning.
        parameters: the parameters that v belongs to; None = the optimiser's, in its order.
        first_step: the step just taken was the first (only momentum with dampening needs to know).

    Returns:
        P v in the same order; zero for a parameter that the optimiser does not hold, since it never moves.

    Raises:
        ShapeError: another number of tensors than parameters.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> precondition([torch.ones(2)], torch.optim.SGD([w], lr=0.5))
        [tensor([0.5000, 0.5000])]
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    if parameters is None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(v) != len(parameters):
        raise ShapeError(f"v holds {len(v)} tensors for {len(parameters)} parameters; wanted one each")
    known = isinstance(optimizer, (torch.optim.SGD, *_ADAM))
    if not known:
        warnings.warn(
            f"no preconditioner is known for {type(optimizer).__name__}: its step is taken as lr times the "
            "gradient (SGD, Adam and AdamW are exact)",
            FusionWarning,
            stacklevel=2,
        )
    out: list[Tensor] = []
    for raw, parameter in zip(v, parameters, strict=True):
        group = groups.get(id(parameter))
        value = -raw if group is not None and group.get("maximize") else raw
        if group is None:
            out.append(torch.zeros_like(value))
        elif isinstance(optimizer, torch.optim.SGD):
            out.append(_sgd(group, value, first_step))
        elif isinstance(optimizer, _ADAM):
            out.append(_adam(group, optimizer.state.get(parameter, {}), value))
        else:
            out.append(value * group["lr"])
    return out

"""How much each sample's "teacher minus label" loss changes along a direction in parameter space.

The mixed loss is affine in alpha, so the one-step hypergradient needs no second-order graph: with
``d_i = tau^2 KL_i - CE_i`` and v the held-out gradient, ``c_i = <v, grad_theta d_i(theta)>`` is a directional
derivative, and ``d L_val / d alpha_i = -(eta/B) c_i``. Since d_i sees theta through the logits alone,
``c_i = <d d_i / d z_i, dz_i>`` with dz the tangent of the logits along v: forward-mode AD gives it exactly,
differences of the *logits* (not of the losses: four times less rounding error) give it for any module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusion_core.errors import ConfigError, ShapeError
from kd_trilateral.forward import Forward, RNGState
from kd_trilateral.losses import kd_terms
from kd_trilateral.normtangent import FastNormTangent
from kd_trilateral.tensors import add_, mul_, norm

DirectionalEngine = Literal["jvp", "fd", "fd1", "head"]
Terms = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(student_logits, teacher_logits, labels) -> (kl, ce), each (batch,)."""


class Batch(NamedTuple):
    """Inputs of the student, the teacher's logits ``(batch, classes)`` and labels ``(batch,)``."""

    inputs: Any
    teacher_logits: Tensor
    labels: Tensor


def logit_gradient(terms: Terms, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """D d_i / d z_i, in the plain case the closed form ``tau (p - q) - (s - g)``; shape of the logits."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        kl, ce = terms(leaf, teacher_logits, labels)
        return torch.autograd.grad((kl - ce).sum(), leaf)[0]


def contract(gradient: Tensor, tangent: Tensor) -> Tensor:
    """``<d d_i / d z_i, dz_i>`` per sample, in float32 or better."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (
        (gradient.to(wide) * tangent.to(wide)).flatten(1).sum(1) if gradient.dim() > 1 else gradient * tangent
    )


def jvp_tangent(
    forward: Forward, theta: Sequence[Tensor], v: Sequence[Tensor], inputs: Any, rng: RNGState | None = None
) -> tuple[Tensor, Tensor]:
    """Logits at theta and their exact tangent along v, by one forward-mode pass."""
    # Fused attention kernels have no forward-mode formula; the plain one has.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), FastNormTangent():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(theta, v, strict=True)]
        primal, tangent = forward_ad.unpack_dual(forward(inputs, duals, rng=rng))
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def difference_tangent(
    forward: Forward,
    theta: Sequence[Tensor],
    v: Sequence[Tensor],
    inputs: Any,
    *,
    epsilon: float | None = None,
    logits: Tensor | None = None,
    rng: RNGState | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits at theta and the tangent along v by finite differences.

    Args:
        forward: the student.
        theta: where the tangent is taken.
        v: direction, one tensor per parameter.
        inputs: the batch.
        epsilon: length of the step in parameter space; 1e-3 in float32, 1e-4 in float64.
        logits: those at theta, which makes the difference one-sided (one forward); None takes a central one
            (two forwards, whose mean stands for the logits at theta).
        rng: state for the random layers, the same in every pass.
        in_place: ``theta`` and ``v`` may be overwritten, which saves two copies of the parameters.
    """
    double = theta[0].dtype == torch.float64
    step = epsilon or (1e-4 if double else 1e-3)
    length = norm(v)
    if not in_place:
        theta, v = [p.clone() for p in theta], [p.clone() for p in v]
    mul_(v, torch.where(length > 0, step / length, 0.0))
    add_(theta, v)
    with torch.no_grad():
        ahead = forward(inputs, theta, rng=rng).to(torch.promote_types(theta[0].dtype, torch.float32))
        if logits is not None:
            return logits, (ahead - logits.to(ahead.dtype)) * (length / step)
        add_(theta, v, -2.0)
        behind = forward(inputs, theta, rng=rng).to(ahead.dtype)
    return (ahead + behind) / 2.0, (ahead - behind) * (length / (2.0 * step))


def head_directional(
    gradient: Float[Tensor, "batch classes"],
    hidden: Float[Tensor, "batch hidden"],
    v_weight: Float[Tensor, "classes hidden"],
    v_bias: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, " batch"]:
    """``c_i = <d d_i/dz, V_W h_i + V_b>``: the direction restricted to the last Linear layer."""
    tangent = hidden.to(v_weight.dtype) @ v_weight.T
    return contract(gradient, tangent if v_bias is None else tangent + v_bias)


def find_head(
    student: nn.Module, num_classes: int | None = None, name: str | None = None
) -> tuple[str, nn.Linear]:
    """The Linear layer that makes the logits: the one named, else the last with that many outputs.

    Raises:
        ConfigError: there is none; the message lists the student's Linear layers.
    """
    linear = {n: m for n, m in student.named_modules() if isinstance(m, nn.Linear)}
    fitting = [n for n, m in linear.items() if num_classes is None or m.out_features == num_classes]
    if (name is None and not fitting) or (name is not None and name not in linear):
        listed = ", ".join(f"{n} ({m.in_features}->{m.out_features})" for n, m in linear.items()) or "none"
        wanted = f"named {name!r}" if name is not None else f"with {num_classes} outputs"
        raise ConfigError(f"hypergradient 'head' needs a Linear layer {wanted}; the student's are: {listed}")
    chosen = fitting[-1] if name is None else name
    return chosen, linear[chosen]


class Captured:
    """Keeps the input and output of one layer during the block."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    def _hook(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.input, self.output = args[0].detach(), output

    def __enter__(self) -> Captured:
        self._handle = self.layer.register_forward_hook(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def per_sample_directional(
    student: nn.Module,
    theta: Mapping[str, Tensor] | None,
    v: Mapping[str, Tensor],
    batch: Batch | tuple[Any, Tensor, Tensor],
    engine: DirectionalEngine = "jvp",
    *,
    temperature: float = 4.0,
    terms: Terms | None = None,
    epsilon: float | None = None,
    logits_from: Callable[[Any], Tensor] | None = None,
    head: str | None = None,
) -> Float[Tensor, " batch"]:
    """``c_i = <v, grad_theta (tau^2 KL_i - CE_i)>`` for every sample of a batch.

    Args:
        student: the module; it comes back untouched.
        theta: trainable parameters by name at which the derivative is taken; None = the student's own.
        v: direction by name, of the parameters' shapes; a name left out counts as zero.
        batch: inputs, teacher logits ``(batch, classes)``, labels ``(batch,)``.
        engine: ``"jvp"`` exact, ``"fd"`` central difference, ``"fd1"`` one-sided, ``"head"`` the last Linear
            layer's share (exact where the student is that layer).
        temperature: tau of the KL term; ignored where ``terms`` is given.
        terms: another pair of terms than :func:`~kd_trilateral.losses.kd_terms`.
        epsilon: length of the differences' step; 1e-3 in float32, 1e-4 in float64.
        logits_from: finds the logits in the student's output.
        head: name of the last Linear layer, found by itself otherwise.

    Returns:
        c ``(batch,)``; positive where more teacher lowers the held-out loss.

    Raises:
        ConfigError: unknown engine, or no Linear head for ``"head"``.
        ShapeError: a direction of another shape than its parameter.

    Example:
        >>> student = torch.nn.Linear(2, 2)
        >>> v = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
        >>> batch = (torch.ones(3, 2), torch.zeros(3, 2), torch.tensor([0, 1, 0]))
        >>> per_sample_directional(student, None, v, batch)
        tensor([0., 0., 0.])
    """
    inputs, teacher_logits, labels = batch

    def plain(zs: Tensor, zt: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return kd_terms(zs, zt, y, temperature)

    forward = Forward(student, logits_from)
    own = dict(zip(forward.names, (p.detach() for p in forward.parameters), strict=True))
    at = own if theta is None else {**own, **theta}
    values = [at[name].detach() for name in forward.names]
    direction = [v[name].detach() if name in v else torch.zeros_like(at[name]) for name in forward.names]
    for name, p, d in zip(forward.names, values, direction, strict=True):
        if p.shape != d.shape:
            raise ShapeError(
                f"v[{name!r}] has shape {tuple(d.shape)}, wanted {tuple(p.shape)} like the parameter"
            )
    use = terms or plain
    if engine == "jvp":
        z, tangent = jvp_tangent(forward, values, direction, inputs)
    elif engine in ("fd", "fd1"):
        with torch.no_grad():
            base = forward(inputs, values) if engine == "fd1" else None
        z, tangent = difference_tangent(forward, values, direction, inputs, epsilon=epsilon, logits=base)
    elif engine == "head":
        name, layer = find_head(student, teacher_logits.shape[-1], head)
        with torch.no_grad(), Captured(layer) as seen:
            z = forward(inputs, values)
        assert seen.input is not None
        along = dict(zip(forward.names, direction, strict=True))
        prefix = f"{name}." if name else ""  # the student may be that layer itself
        weight = along.get(f"{prefix}weight", torch.zeros_like(layer.weight))
        gradient = logit_gradient(use, z, teacher_logits, labels)
        return head_directional(gradient, seen.input, weight, along.get(f"{prefix}bias"))
    else:
        raise ConfigError(f"engine is {engine!r}, wanted 'jvp', 'fd', 'fd1' or 'head'")
    return contract(logit_gradient(use, z, teacher_logits, labels), tangent)

"""The engines that compute c: how a little more teacher on each sample would move the held-out loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusion_core.errors import ConfigError, FusionWarning
from kd_trilateral.directional import (
    Batch,
    Captured,
    contract,
    difference_tangent,
    find_head,
    head_directional,
    jvp_tangent,
    logit_gradient,
)
from kd_trilateral.forward import Forward, RNGState, rng_snapshot, rows
from kd_trilateral.heldout import HeldOutBatch
from kd_trilateral.hyper import (
    OuterLoss,
    hessian_product,
    implicit_direction,
    neumann_direction,
    training_loss,
    unrolled_directional,
)
from kd_trilateral.module import Output, TrilateralKD
from kd_trilateral.preconditioner import precondition
from kd_trilateral.tensors import copy_, gradients

Engine = Literal["jvp", "fd", "fd1", "head", "unrolled", "neumann", "implicit", "joint", "val_mix", "frozen"]
ENGINES = ("jvp", "fd", "fd1", "head", "unrolled", "neumann", "implicit", "joint", "val_mix", "frozen")
WITH_HESSIAN = ("neumann", "implicit")
WITHOUT_THETA = ("joint", "val_mix", "head", *WITH_HESSIAN)


class CEngine:
    """Computes c for one student; holds what a training forward leaves for it (RNG, hidden features, theta).

    Args:
        name: the engine; ``jvp`` turns into ``fd`` by itself where the student has no forward-mode
            derivative.
        forward: the student as a function.
        loss: its terms define d_i.
        optimizer: the inner optimiser, for P.
        outer_loss: ``(logits, labels) -> scalar``.
        use_precondition: False takes the bare held-out gradient as v.
        subsample: share or number of the batch's rows to look at.
        epsilon: step of the differences.
        neumann_terms: J of ``neumann``.
        damping: of ``implicit``.
        implicit_steps: most Hessian products of ``implicit``.
        autocast: dtype of the held-out gradient's autocast.
        head: name of the last Linear layer for ``head``.
    """

    def __init__(
        self,
        name: Engine,
        forward: Forward,
        loss: TrilateralKD,
        optimizer: torch.optim.Optimizer,
        *,
        outer_loss: OuterLoss,
        use_precondition: bool,
        subsample: float | int,
        epsilon: float | None,
        neumann_terms: int,
        damping: float,
        implicit_steps: int,
        autocast: torch.dtype | None,
        head: str | None,
    ) -> None:
        self.name: Engine = name
        self.forward, self.loss, self.optimizer = forward, loss, optimizer
        self.outer_loss = outer_loss
        self.use_precondition = use_precondition
        self.subsample = subsample
        self.epsilon = epsilon
        self.neumann_terms, self.damping, self.implicit_steps = neumann_terms, damping, implicit_steps
        self.autocast = autocast
        self.head: tuple[str, nn.Linear] | None = None
        if name == "head":
            self.head = find_head(forward.student, None if loss.task == "binary" else loss.num_classes, head)
        self.rng: RNGState | None = None
        self._cast = False
        self._hidden: Tensor | None = None
        self._theta: list[Tensor] | None = None

    # ---------------------------------------------------------------- what the training forward leaves

    def note_rng(self) -> None:
        """Keep the RNG state that the training forward starts from."""
        device = self.forward.device
        self.rng, self._cast = rng_snapshot(device), torch.is_autocast_enabled(device.type)

    def note_hidden(self, hidden: Tensor) -> None:
        """Keep the head's input of the training forward."""
        self._hidden = hidden.detach()

    def note_theta(self) -> None:
        """Keep theta before the optimiser moves it."""
        if self._theta is None:
            self._theta = [torch.empty_like(p) for p in self.forward.parameters]
        copy_(self._theta, self.forward.parameters)

    def forget(self) -> None:
        """Drop what one training forward left; theta's buffer is kept for the next."""
        self.rng = self._hidden = None

    def window(self, size: int, outer_step: int) -> tuple[int, int]:
        """The rows [start, stop) to look at: a window that moves on with each outer step."""
        if self.name in WITH_HESSIAN or not size:
            return 0, size
        share = self.subsample
        count = min(max(round(share * size) if isinstance(share, float) else share, 1), size)
        start = (outer_step % (size // count)) * count
        return start, start + count

    # ---------------------------------------------------------------- pieces

    def held_out_loss(self, batch: HeldOutBatch, values: Sequence[Tensor] | None = None) -> Tensor:
        """The outer loss at the student's present parameters, or at others."""
        with torch.enable_grad():
            logits = self.forward(batch.inputs, values, autocast=self.autocast)
            return self._outer(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch.labels)

    def _outer(self, logits: Tensor, labels: Tensor) -> Tensor:
        ignored = labels == self.loss.ignore_index
        return self.outer_loss(logits, torch.where(ignored, -100, labels))  # the word of torch's losses

    def held_out_gradient(self, batch: HeldOutBatch) -> list[Tensor]:
        """V before preconditioning, one tensor per trainable parameter."""
        own = self.forward.parameters
        found = gradients(self.held_out_loss(batch), own)
        return [g.to(p.dtype) for g, p in zip(found, own, strict=True)]

    def _stepped(
        self, v: Sequence[Tensor], first: bool, parameters: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        if not self.use_precondition:
            return list(v)
        return precondition(v, self.optimizer, parameters or self.forward.parameters, first_step=first)

    # ---------------------------------------------------------------- c

    def after_step(
        self, x: Any, out: Output, held_out: HeldOutBatch, outer_step: int, *, first: bool
    ) -> Tensor:
        """C at the old theta with v at the new one, for the rows of the window.

        Args:
            x: inputs of the training batch.
            out: its output.
            held_out: the batch that v is taken on.
            outer_step: moves the window.
            first: the optimiser's step just taken was its first.
        """
        context = out.context
        size = context.labels.shape[0]
        start, stop = self.window(size, outer_step)
        whole = stop - start == size
        logits, zt, y = (
            t[start:stop] for t in (context.student_logits, context.teacher_logits, context.labels)
        )
        if self.name == "head":
            gradient = logit_gradient(self.loss.terms, logits, zt, y)
            return self._by_head(held_out, gradient, start, stop, first)
        inputs = x if whole else rows(x, start, stop)
        if self.name == "unrolled":
            assert self._theta is not None
            return unrolled_directional(
                self.forward,
                self._theta,
                [p.detach() for p in self.forward.parameters],
                Batch(inputs, zt, y),
                self.loss.terms,
                out.alpha.detach()[start:stop],
                context.mask[start:stop],
                lambda v: self._stepped(v, first),
                lambda values: self.held_out_loss(held_out, values),
                self.rng,
            )
        v = self._stepped(self.held_out_gradient(held_out), first)
        # The training logits serve only where these passes compute the same function: part of a batch has
        # other batch-norm statistics and random draws, random layers may be off, autocast rounds.
        drops = self.forward.has_random_layers
        same = whole or not (self.forward.has_batch_norm or drops)
        same = same and not self._cast and not (drops and self.forward.stochastic == "off")
        z, tangent = self._tangent(inputs, v, logits if same else None)
        return contract(logit_gradient(self.loss.terms, z, zt, y), tangent)

    def _tangent(self, inputs: Any, v: list[Tensor], logits: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self._theta is not None
        if self.name == "jvp":
            try:
                return jvp_tangent(self.forward, self._theta, v, inputs, self.rng)
            except RuntimeError as error:  # NotImplementedError included
                words = str(error).lower()
                if not any(word in words for word in ("forward ad", "forward mode", "forward-mode", "jvp")):
                    raise
                warnings.warn(
                    f"the student has no forward-mode derivative ({str(error).splitlines()[0][:120]}); the "
                    "hypergradient falls back to central differences ('fd')",
                    FusionWarning,
                    stacklevel=5,
                )
                self.name = "fd"
        base = None
        if self.name == "fd1":
            with torch.no_grad():
                base = logits if logits is not None else self.forward(inputs, self._theta, rng=self.rng)
        z, tangent = difference_tangent(
            self.forward,
            self._theta,
            v,
            inputs,
            epsilon=self.epsilon,
            logits=base,
            rng=self.rng,
            in_place=True,
        )
        return (z if logits is None else logits), tangent

    def _by_head(
        self, held_out: HeldOutBatch, gradient: Tensor, start: int, stop: int, first: bool
    ) -> Tensor:
        assert self.head is not None
        name, layer = self.head
        if self._hidden is None:
            raise ConfigError(
                f"hypergradient 'head': the layer {name!r} took no part in the training forward"
            )
        with torch.no_grad(), Captured(layer) as seen:
            logits = self.forward(held_out.inputs, autocast=self.autocast)
        assert seen.input is not None
        with torch.enable_grad():
            leaf = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
            slope = torch.autograd.grad(self._outer(leaf, held_out.labels), leaf)[0].to(layer.weight.dtype)
        if layer.out_features == 1:  # the pair (0, u) of one logit u
            slope, gradient = slope[:, 1:], gradient[:, 1:]
        held = list(layer.parameters())  # weight, and bias if it has one
        v = [slope.T @ seen.input.to(slope.dtype), slope.sum(0)][: len(held)]
        v = self._stepped(v, first, held)
        return head_directional(gradient, self._hidden[start:stop], v[0], v[1] if len(v) == 2 else None)

    def before_step(self, x: Any, out: Output, held_out: HeldOutBatch) -> Tensor:
        """C by an engine that needs the Hessian of the training loss at the old theta (neumann, implicit)."""
        batch = Batch(x, out.context.teacher_logits, out.context.labels)
        theta = [p.detach().requires_grad_() for p in self.forward.parameters]
        gradient = self.held_out_gradient(held_out)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = training_loss(
                self.forward, theta, batch, self.loss.terms, out.alpha.detach(), out.context.mask, self.rng
            )
            hessian = hessian_product(loss, theta)
            if self.name == "implicit":
                v = implicit_direction(gradient, hessian, damping=self.damping, steps=self.implicit_steps)
            else:
                step = lambda u: precondition(u, self.optimizer, self.forward.parameters)
                v = neumann_direction(gradient, hessian, step, self.neumann_terms)
        del hessian, loss
        z, tangent = jvp_tangent(self.forward, [p.detach() for p in theta], v, x, self.rng)
        return contract(logit_gradient(self.loss.terms, z, batch.teacher_logits, batch.labels), tangent)

"""The bilevel engine: moves the student and, every few steps, the ratio network by its hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fusion_core.errors import ConfigError, DataError, check_range
from fusion_core.modules import logits_of
from fusion_core.numerics import masked_mean
from kd_trilateral.directional import Batch
from kd_trilateral.engines import ENGINES, WITH_HESSIAN, WITHOUT_THETA, CEngine, Engine
from kd_trilateral.forward import Forward, Stochastic
from kd_trilateral.heldout import HeldOut, ValBatches
from kd_trilateral.hyper import OUTER_LOSSES, OuterLoss, outer_objective, training_loss
from kd_trilateral.losses import as_pair, mix
from kd_trilateral.module import Output, TrilateralKD
from kd_trilateral.outer import OuterStep
from kd_trilateral.tensors import copy_, same_version


class Bilevel:
    """Takes the optimiser's step and, when due, one step of the ratio network on held-out data.

    Call order: ``out = loss(student(x), teacher_logits, y)``, ``optimizer.zero_grad()``,
    ``out.loss.backward()``, ``engine.step(x, out)``. Training loops that call the optimiser themselves use
    :meth:`before_optimizer_step` and :meth:`after_optimizer_step` around it.

    An outer step leaves the student's parameters, gradients, buffers and mode, the inner optimiser and the
    RNG as they were.

    Args:
        student: the module itself, not a DDP or compiled wrapper.
        loss: holds the ratio network.
        optimizer: the student's.
        val_batches: held-out batches ``(x, y)`` or ``(x, y, teacher_logits)`` or mappings with ``labels``
            (and ``teacher_logits``): an iterable, run through again and again, or a callable of the outer
            step.
        hypergradient: the engine. Exact: ``jvp``, ``unrolled`` (slow reference). Differences: ``fd``,
            ``fd1``. ``head``: the last Linear layer's share. ``neumann``, ``implicit``: directions with the
            Hessian. ``joint``: omega descends the training loss, at every step; ``val_mix``: the mixed loss
            on held-out rows; ``frozen``: omega stays.
        every: student steps per outer step; 0 = frozen.
        warmup_steps: student steps before the first outer step.
        order: ``"inner_first"``, or ``"outer_first"`` (omega moves at the virtual step, then the student
            really moves with the new ratios; call :meth:`backward` instead of ``out.loss.backward()`` to
            save a forward).
        subsample: share (a float in (0, 1]) or number (an int) of the batch's rows that the hypergradient
            looks at.
        outer_loss: ``"ce"``, ``"gce"`` or a callable ``(logits, labels) -> scalar``; None = the loss's
            preset.
        normalize: divide c by its batch mean of abs(c).
        center: subtract the batch mean of c.
        precondition: use the inner optimiser's P (exact); False = the bare held-out gradient.
        outer_optimizer: None = AdamW(lr ``outer_lr``, no weight decay).
        outer_lr: of the default outer optimiser.
        max_grad_norm: clips the hypergradient; None = no clipping.
        epsilon: step of the differences.
        neumann_terms: J of ``neumann``.
        damping: of ``implicit``.
        implicit_steps: most Hessian products of ``implicit``.
        stochastic: random layers ``"replay"`` the training forward or are ``"off"`` in hypergradient passes.
        autocast: dtype of the held-out gradient's autocast; c is in the parameters' own dtype.
        logits_from: finds the logits in the student's output.
        head: name of the last Linear layer for ``head``.

    Raises:
        ConfigError: a setting that cannot be used, or a student without what the engine needs.
        DataError: held-out data that are empty or lack what the engine needs.

    Example:
        >>> student = nn.Linear(4, 3)
        >>> loss = TrilateralKD(3, tbar="none")
        >>> x, y, zt = torch.randn(8, 4), torch.arange(8) % 3, torch.randn(8, 3)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> engine = Bilevel(student, loss, optimizer, [(x, y)], every=1)
        >>> out = loss(student(x), zt, y)
        >>> out.loss.backward()
        >>> engine.step(x, out)
        >>> engine.outer_steps
        1
    """

    def __init__(
        self,
        student: nn.Module,
        loss: TrilateralKD,
        optimizer: torch.optim.Optimizer,
        val_batches: ValBatches | None = None,
        *,
        hypergradient: Engine = "jvp",
        every: int = 4,
        warmup_steps: int = 0,
        order: Literal["inner_first", "outer_first"] = "inner_first",
        subsample: float | int = 1.0,
        outer_loss: Literal["ce", "gce"] | OuterLoss | None = None,
        normalize: bool = True,
        center: bool = False,
        precondition: bool = True,
        outer_optimizer: torch.optim.Optimizer | None = None,
        outer_lr: float = 1e-2,
        max_grad_norm: float | None = 1.0,
        epsilon: float | None = None,
        neumann_terms: int = 3,
        damping: float = 0.1,
        implicit_steps: int = 50,
        stochastic: Stochastic = "replay",
        autocast: torch.dtype | None = None,
        logits_from: Callable[[Any], Tensor] | None = None,
        head: str | None = None,
    ) -> None:
        if hypergradient not in ENGINES:
            raise ConfigError(f"hypergradient is {hypergradient!r}, wanted one of {ENGINES}")
        if order not in ("inner_first", "outer_first"):
            raise ConfigError(f"order is {order!r}, wanted 'inner_first' or 'outer_first'")
        if order == "outer_first" and hypergradient in ("joint", "val_mix"):
            raise ConfigError(f"order 'outer_first' needs a hypergradient; {hypergradient!r} has none")
        chosen = loss.outer_loss if outer_loss is None else outer_loss
        if not callable(chosen) and chosen not in OUTER_LOSSES:
            raise ConfigError(f"outer_loss is {chosen!r}, wanted one of {tuple(OUTER_LOSSES)} or a callable")
        check_range("every", every, 0, float("inf"))
        check_range("warmup_steps", warmup_steps, 0, float("inf"))
        low, high = (1e-9, 1.0) if isinstance(subsample, float) else (1, float("inf"))
        check_range("subsample", subsample, low, high)
        find = logits_from or logits_of
        pair = (lambda output: as_pair(find(output))) if loss.task == "binary" else find
        self.forward = Forward(student, pair, stochastic)
        self.student, self.loss, self.optimizer = student, loss, optimizer
        omega = [p for p in loss.parameters() if p.requires_grad]
        name: Engine = "joint" if loss.free_logit is not None else hypergradient
        if every == 0 or not omega:  # a heuristic ratio has nothing to learn
            name = "frozen"
        loss.detach_alpha = name != "joint"
        if name not in ("joint", "frozen") and val_batches is None:
            raise DataError(f"hypergradient {name!r} needs held-out data; pass val_batches")
        self.every, self.warmup_steps, self.order = every, warmup_steps, order
        self.normalize, self.center = normalize, center
        check = lambda labels: loss.check_labels(labels, "held-out labels")
        self.held_out = None if val_batches is None else HeldOut(val_batches, self.forward.device, check)
        self.c_engine = CEngine(
            name,
            self.forward,
            loss,
            optimizer,
            outer_loss=chosen if callable(chosen) else OUTER_LOSSES[chosen],
            use_precondition=precondition,
            subsample=subsample,
            epsilon=epsilon,
            neumann_terms=neumann_terms,
            damping=damping,
            implicit_steps=implicit_steps,
            autocast=autocast,
            head=head,
        )
        self.outer: OuterStep | None = None
        if omega:
            moves = outer_optimizer or torch.optim.AdamW(omega, lr=outer_lr, weight_decay=0.0)
            self.outer = OuterStep(omega, moves, self.forward.device, max_grad_norm)
        self.steps = 0
        self.last_c: Tensor | None = None
        self._early_c: Tensor | None = None
        self._retained: Output | None = None
        self._handles = [student.register_forward_pre_hook(self._before_forward)]
        if self.c_engine.head is not None:
            self._handles.append(self.c_engine.head[1].register_forward_hook(self._after_head))

    def close(self) -> None:
        """Take the hooks off the student."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _in_training(self) -> bool:
        return not self.forward.active and self.student.training and torch.is_grad_enabled() and self.due

    def _before_forward(self, _module: nn.Module, _args: Any) -> None:
        if self._in_training():
            self.c_engine.note_rng()

    def _after_head(self, _module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        if self._in_training():
            self.c_engine.note_hidden(args[0])

    # ---------------------------------------------------------------- the loop's side

    @property
    def engine(self) -> Engine:
        """The engine at work; ``jvp`` becomes ``fd`` where the student has no forward-mode derivative."""
        return self.c_engine.name

    @property
    def outer_steps(self) -> int:
        """Outer steps so far, skipped ones included."""
        return 0 if self.outer is None else self.outer.taken

    @property
    def due(self) -> bool:
        """Whether the coming student step is followed by an outer step."""
        if self.engine == "frozen" or self.steps < self.warmup_steps:
            return False
        return self.engine == "joint" or (self.steps - self.warmup_steps) % self.every == 0

    def backward(self, out: Output) -> None:
        """``out.loss.backward()``, keeping the graph where ``outer_first`` will go through it again."""
        again = self.order == "outer_first" and self.due
        out.loss.backward(retain_graph=again)
        self._retained = out if again else None

    def step(self, x: Any, out: Output, scaler: torch.amp.GradScaler | None = None) -> None:
        """The optimiser's step and, when due, the outer step.

        Args:
            x: the inputs that ``out`` was computed from: a tensor, a sequence or a mapping.
            out: the loss's output, after its backward.
            scaler: steps the optimiser through it; a skipped step skips the outer one.

        Raises:
            DivergedError: 20 outer steps in a row had a non-finite hypergradient.
        """
        if self.order == "outer_first" and self.due:
            if scaler is not None:
                raise ConfigError("order 'outer_first' takes no GradScaler; use bfloat16 or 'inner_first'")
            self._outer_first(x, out)
            return
        self.before_optimizer_step(x, out)
        if scaler is None:
            self.optimizer.step()
            self.after_optimizer_step(x, out)
            return
        scale = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        if self.outer is not None and self.engine == "joint":  # omega's gradient came with the student's
            self.outer.divide(scale)
        if scaler.get_scale() < scale:
            self.skip_optimizer_step()
        else:
            self.after_optimizer_step(x, out)

    def before_optimizer_step(self, x: Any, out: Output) -> None:
        """Keep what the outer step needs of theta before the optimiser moves it, where one is due."""
        if not self.due:
            return
        if self.engine in WITH_HESSIAN:
            assert self.held_out is not None
            self._early_c = self.c_engine.before_step(x, out, self.held_out.draw(self.outer_steps))
        elif self.engine not in WITHOUT_THETA:
            self.c_engine.note_theta()

    def after_optimizer_step(self, x: Any, out: Output) -> None:
        """The outer step, where one is due; call it right after the optimiser's step."""
        due, first = self.due, self.steps == 0
        self.steps += 1
        if due:
            assert self.outer is not None
            if self.engine == "joint":
                self.outer.descend(None)
            elif self.engine == "val_mix":
                self.outer.descend(self._val_mix())
            else:
                self._outer_step(x, out, first)
        self._forget()

    def skip_optimizer_step(self) -> None:
        """Call it in place of :meth:`after_optimizer_step` where a gradient scaler skipped the step."""
        self._forget()
        self.steps += 1

    def _forget(self) -> None:
        self.c_engine.forget()
        if self.outer is not None and self.engine == "joint":  # nothing of a step without an outer one stays
            self.outer.optimizer.zero_grad(set_to_none=True)
        self._early_c = self._retained = None

    # ---------------------------------------------------------------- moving omega

    def _outer_step(self, x: Any, out: Output, first: bool) -> None:
        assert self.outer is not None
        assert self.held_out is not None
        number = self.outer_steps
        c = self._early_c
        if c is None:
            if not out.context.labels.numel():
                return
            c = self.c_engine.after_step(x, out, self.held_out.draw(number), number, first=first)
        self.last_c = c
        start, stop = self.c_engine.window(out.alpha.shape[0], number)
        finite = torch.isfinite(c).all()
        objective = outer_objective(
            out.alpha[start:stop],
            torch.where(finite, c, 0.0),
            normalize=self.normalize,
            center=self.center,
            mask=out.context.mask[start:stop],
        )
        self.outer.descend(objective, finite)

    def _val_mix(self) -> Tensor:
        assert self.held_out is not None
        inputs, labels, teacher = self.held_out.draw(self.outer_steps)
        if teacher is None:
            raise DataError(
                "hypergradient 'val_mix' needs the teacher's logits of held-out rows: (x, y, teacher_logits)"
            )
        with torch.no_grad():
            logits = self.forward(inputs, autocast=self.c_engine.autocast)
        training = self.loss.training
        self.loss.eval()
        try:
            out = self.loss(logits, teacher, labels)
        finally:
            self.loss.train(training)
        return masked_mean(mix(out.alpha, out.kl.detach(), out.ce.detach()), out.context.mask)

    def _outer_first(self, x: Any, out: Output) -> None:
        """Virtual step, outer step, then the real step from the old theta with the new ratios."""
        kept, rng = self._retained is out, self.c_engine.rng
        theta = [p.detach().clone() for p in self.forward.parameters]
        state = {
            p: {k: t.clone() if isinstance(t, Tensor) else t for k, t in s.items()}
            for p, s in self.optimizer.state.items()
        }
        # Theta comes back bit for bit, so the graph of a kept training pass stays true to it.
        with same_version(self.forward.parameters):
            self.before_optimizer_step(x, out)
            self.optimizer.step()
            self.after_optimizer_step(x, out)
            copy_(self.forward.parameters, theta)
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        self.optimizer.zero_grad(set_to_none=True)
        alpha = self.loss.alpha_of(out.context).detach()
        if kept:
            loss = masked_mean(mix(alpha.to(out.kl.dtype), out.kl, out.ce), out.context.mask)
        else:
            batch = Batch(x, out.context.teacher_logits, out.context.labels)
            values = cast("list[Tensor]", self.forward.parameters)
            loss = training_loss(self.forward, values, batch, self.loss.terms, alpha, out.context.mask, rng)
        loss.backward()
        self.optimizer.step()

    # ---------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Counters and the outer optimiser; the ratio network and T-bar are in the loss's own state dict."""
        return {
            "steps": self.steps,
            "engine": self.engine,
            "drawn": 0 if self.held_out is None else self.held_out.drawn,
            "outer": None if self.outer is None else self.outer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; an iterable of held-out batches is run forward to where it was."""
        self.steps = int(state["steps"])
        self.c_engine.name = state["engine"]
        if self.outer is not None and state["outer"] is not None:
            self.outer.load_state_dict(state["outer"])
        if self.held_out is not None:
            self.held_out.skip_to(int(state["drawn"]))

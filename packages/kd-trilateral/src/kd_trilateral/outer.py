"""The outer optimiser's step: clipped, undone where it is not finite, and counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kd_trilateral.errors import DivergedError

PATIENCE = 20


class OuterStep:
    """Moves omega by gradients that may be unsound.

    On the CPU an unsound step is simply not taken. On an accelerator asking would stall the queue, so the
    step is taken and undone by a ``where`` on the device, and the count of failures is read every 20 steps.

    Args:
        omega: parameters of the ratio network.
        optimizer: theirs.
        device: where they live.
        max_grad_norm: clips the gradient; None = no clipping.
    """

    def __init__(
        self,
        omega: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        max_grad_norm: float | None,
    ) -> None:
        self.omega = omega
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.taken = 0
        self._host = device.type == "cpu"
        self._device = device
        self._unsound = torch.zeros((), device=device)

    @property
    def skipped(self) -> int:
        """Unsound steps in a row."""
        return int(self._unsound)

    def descend(self, objective: Tensor | None, finite: Tensor | None = None) -> None:
        """One step down an objective, or along the gradients that omega holds already.

        Args:
            objective: scalar with graph to omega; None = ``.grad`` is filled.
            finite: boolean scalar, False where the objective's making was unsound.

        Raises:
            DivergedError: 20 unsound steps in a row.
        """
        self.taken += 1
        if objective is not None:
            self.optimizer.zero_grad(set_to_none=True)
            if not objective.requires_grad:
                return
            objective.backward(inputs=self.omega)
        grads = [p.grad for p in self.omega if p.grad is not None]
        if not grads:
            return
        sound = torch.stack([torch.isfinite(g).all() for g in grads]).all()
        if finite is not None:
            sound = sound & finite
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.omega, self.max_grad_norm)
        self._unsound = torch.where(sound, 0.0, self._unsound + 1.0)
        if self._host:
            if bool(sound):
                self.optimizer.step()
            else:
                self._check()
        else:
            before = [t.clone() for t in self._tensors()]
            self.optimizer.step()
            # State made by a first step has no older value; zero is what it starts from.
            after = self._tensors()
            before += [torch.zeros_like(t) for t in after[len(before) :]]
            for old, new in zip(before, after, strict=True):
                new.copy_(torch.where(sound, new, old))
            if self.taken % PATIENCE == 0:
                self._check()
        self.optimizer.zero_grad(set_to_none=True)

    def divide(self, scale: float) -> None:
        """Take a GradScaler's factor off the gradients that omega holds."""
        for p in self.omega:
            if p.grad is not None:
                p.grad.div_(scale)

    def _tensors(self) -> list[Tensor]:
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return [p.detach() for p in self.omega] + [t for t in state if t.device == self._device]

    def _check(self) -> None:
        if self.skipped >= PATIENCE:
            raise DivergedError(
                f"{self.skipped} outer steps in a row had a non-finite hypergradient; lower the student's "
                "learning "
                "rate, or look at the held-out loss"
            )

    def state_dict(self) -> dict[str, Any]:
        """Counters and the optimiser's state."""
        return {"taken": self.taken, "unsound": self.skipped, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.taken = int(state["taken"])
        self._unsound.fill_(float(state["unsound"]))
        self.optimizer.load_state_dict(state["optimizer"])

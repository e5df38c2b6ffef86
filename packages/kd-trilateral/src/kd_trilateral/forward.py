"""The student as a function of its parameters, leaving the module itself as it was."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusion_core.errors import ConfigError
from fusion_core.modules import logits_of

Stochastic = Literal["replay", "off"]
RNGState = tuple[Tensor, Tensor | None]
_STOCHASTIC_NAMES = ("drop", "stochasticdepth")


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How inputs are handed to a module: a mapping by keyword, a sequence by position, else alone."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def rows(inputs: Any, start: int, stop: int) -> Any:
    """The rows [start, stop) of every tensor in a batch's inputs, as views."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {name: rows(value, start, stop) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(rows(value, start, stop) for value in inputs)
    return inputs


def rng_snapshot(device: torch.device) -> RNGState:
    """The state of torch's CPU generator and of the device's."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


class Forward:
    """Evaluates a student at given parameters: its buffers, mode, gradients and the RNG stay untouched.

    Batch normalisation runs in the mode that the student is in, on *cloned* buffers: forward-mode
    differentiation and ``torch.func`` refuse the in-place update of the real ones.

    Args:
        student: any module whose output :func:`fusion_core.modules.logits_of` understands.
        logits_from: finds the logits in another kind of output.
        stochastic: dropout and stochastic depth ``"replay"`` the RNG state they are given, or are switched
            ``"off"``.
    """

    def __init__(
        self,
        student: nn.Module,
        logits_from: Callable[[Any], Tensor] | None = None,
        stochastic: Stochastic = "replay",
    ) -> None:
        if stochastic not in ("replay", "off"):
            raise ConfigError(f"stochastic is {stochastic!r}, wanted 'replay' or 'off'")
        named = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if not named:
            raise ConfigError(
                "the student has no parameter that requires a gradient; nothing can be distilled"
            )
        self.student = student
        self.names = list(named)
        self.parameters: list[nn.Parameter] = list(named.values())
        self.device = self.parameters[0].device
        self.logits_from = logits_from or logits_of
        self.stochastic: Stochastic = stochastic
        self.active = False

    @contextmanager
    def _stochastic(self, rng: RNGState | None) -> Generator[None, None, None]:
        off = self.stochastic == "off"
        drops = self._random_layers() if off else []
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            if rng is not None and not off:
                torch.set_rng_state(rng[0])
                if rng[1] is not None:
                    torch.cuda.set_rng_state(rng[1], self.device)
            for module in drops:
                module.training = False
            self.active = True
            try:
                yield
            finally:
                self.active = False
                for module in drops:
                    module.training = True

    def _random_layers(self) -> list[nn.Module]:
        names = [(m, type(m).__name__.lower()) for m in self.student.modules() if m.training]
        return [m for m, name in names if any(word in name for word in _STOCHASTIC_NAMES)]

    @property
    def has_random_layers(self) -> bool:
        """Whether a dropout or stochastic-depth layer is at work."""
        return bool(self._random_layers())

    def __call__(
        self,
        inputs: Any,
        values: Sequence[Tensor] | None = None,
        *,
        rng: RNGState | None = None,
        autocast: torch.dtype | None = None,
    ) -> Tensor:
        """Logits of a batch.

        Args:
            inputs: what the student takes: a tensor, a sequence or a mapping.
            values: one tensor per trainable parameter; None = the student's own.
            rng: state that the random layers start from; None = the present one (which comes back
                afterwards).
            autocast: dtype to autocast to; None computes in the parameters' own dtype even inside a caller's
                autocast.
        """
        tensors: dict[str, Tensor] = {name: b.detach().clone() for name, b in self.student.named_buffers()}
        if values is not None:
            tensors |= dict(zip(self.names, values, strict=True))
        args, kwargs = call_arguments(inputs)
        cast = torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None)
        with self._stochastic(rng), cast:
            output = functional_call(self.student, tensors, args, kwargs)
        return self.logits_from(output)

    @property
    def has_batch_norm(self) -> bool:
        """Whether a layer mixes the samples of a batch in the mode that it is in."""
        norms = (nn.modules.batchnorm._BatchNorm,)  # pyright: ignore[reportPrivateUsage]
        return any(isinstance(m, norms) and m.training for m in self.student.modules())

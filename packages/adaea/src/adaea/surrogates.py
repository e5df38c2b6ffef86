"""The models that an attack may look into: frozen for the run, each on its device and in its dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaea.losses import wide
from fusion_core.device import resolve_device
from fusion_core.errors import ConfigError, DataError, InputError, NonFiniteError, ShapeError
from fusion_core.modules import logits_of, untouched

Model = Callable[[Tensor], Any]
Surrogates = Mapping[str, Model] | Sequence[Model] | nn.Module
Devices = Mapping[str, str | torch.device]


def name_surrogates(surrogates: Any) -> dict[str, Model]:
    """Names for the surrogates, in order.

    Args:
        surrogates: a mapping by name, a sequence (named ``"0:ClassName"``), or one module.

    Raises:
        InputError: none, or something that cannot be called.

    Example:
        >>> list(name_surrogates([nn.Identity(), nn.ReLU()]))
        ['0:Identity', '1:ReLU']
    """
    if surrogates is None:
        raise InputError("surrogates is None, wanted at least one model, at construction or at the call")
    if isinstance(surrogates, Mapping | nn.ModuleDict):
        named = {str(name): model for name, model in surrogates.items()}
    elif isinstance(surrogates, Sequence | nn.ModuleList) and not isinstance(surrogates, str):
        listed = cast("Sequence[Any]", surrogates)
        named = {f"{i}:{type(model).__name__}": model for i, model in enumerate(listed)}
    else:
        named = {f"0:{type(surrogates).__name__}": surrogates}
    if not named:
        raise InputError("surrogates is empty, wanted at least one model")
    for name, model in named.items():
        if not callable(model):
            raise InputError(
                f"surrogate {name!r} is {model!r}, wanted a module or function; load_model reads names"
            )
    return cast("dict[str, Model]", named)


class Surrogate:
    """One model, called on images and answering with logits.

    Args:
        name: for messages.
        model: takes ``(batch, channels, height, width)``.
        device: where it runs; by default where its first parameter lies.
    """

    def __init__(self, name: str, model: Model, device: torch.device | None = None) -> None:
        self.name, self.model = name, model
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        self.device = device if device is not None else tensors[0].device if tensors else None
        floats = [t.dtype for t in tensors if t.is_floating_point()]
        self.dtype = floats[0] if floats else None
        # On a CPU networks of depthwise convolutions run a fifth faster channels-last; dense ones run slower.
        parts = model.modules() if isinstance(model, nn.Module) else ()
        depthwise = any(isinstance(p, nn.Conv2d) and 1 < p.groups == p.in_channels for p in parts)
        last = depthwise and self.device is not None and self.device.type == "cpu"
        self.layout = torch.channels_last if last else torch.preserve_format

    def __call__(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits in float32 or wider on the device of the images; the graph leads back to them.

        Raises:
            ShapeError: no logits, or not two-dimensional.
            DataError: labels instead of logits.
        """
        output = self.model(images.to(device=self.device, dtype=self.dtype, memory_format=self.layout))
        try:
            logits = logits_of(output)
        except ShapeError as error:
            raise ShapeError(f"surrogate {self.name!r}: {error}") from error
        if not logits.is_floating_point():
            raise DataError(
                f"surrogate {self.name!r} returned {logits.dtype}, wanted float logits; a model that answers "
                "with labels can be audited, but not be a surrogate"
            )
        if logits.dim() != 2 or logits.shape[0] != images.shape[0]:
            raise ShapeError(
                f"surrogate {self.name!r} returned shape {tuple(logits.shape)}, wanted (batch, classes) with "
                f"batch={images.shape[0]}"
            )
        return wide(logits).to(images.device)


@contextlib.contextmanager
def prepared(models: Mapping[str, Model], devices: Devices | None) -> Generator[list[Surrogate], None, None]:
    """The surrogates in evaluation mode, frozen and placed; modes, flags, gradients and places come back.

    Args:
        models: by name, in order.
        devices: name -> device for those that are to run elsewhere than where they lie; a model is moved for
            the run, so it is quicker to place it once beforehand.

    Raises:
        ConfigError: ``devices`` names no surrogate.
    """
    wanted = {name: resolve_device(place) for name, place in (devices or {}).items()}
    if unknown := sorted(wanted.keys() - models.keys()):
        raise ConfigError(f"devices names {unknown}, wanted surrogates among {list(models)}")
    modules = [model for model in models.values() if isinstance(model, nn.Module)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(*modules, rng=True))
        for name, place in wanted.items():
            stack.enter_context(_moved(models[name], place))
        yield [Surrogate(name, model, wanted.get(name)) for name, model in models.items()]


@contextlib.contextmanager
def _moved(model: Model, place: torch.device) -> Generator[None, None, None]:
    if not isinstance(model, nn.Module):
        yield
        return
    home = next((t.device for t in (*model.parameters(), *model.buffers())), place)
    if home == place:
        yield
        return
    try:
        model.to(place)
        yield
    finally:
        model.to(home)


def check_classes(surrogates: Sequence[Surrogate], logits: Sequence[Tensor], labels: Tensor) -> int:
    """The number of classes that all surrogates share and that covers the labels.

    Raises:
        ShapeError: two surrogates disagree; both counts are named.
        DataError: a label that no class has.
    """
    counts = [z.shape[-1] for z in logits]
    for surrogate, count in zip(surrogates, counts, strict=True):
        if count != counts[0]:
            raise ShapeError(
                f"surrogate {surrogates[0].name!r} has {counts[0]} classes and {surrogate.name!r} has "
                f"{count}, wanted the same number"
            )
    if labels.numel() and int(labels.max()) >= counts[0]:
        raise DataError(
            f"labels go up to {int(labels.max())}, wanted 0 to {counts[0] - 1}, the surrogates' classes"
        )
    return counts[0]


def check_connected(surrogate: Surrogate, gradient: Tensor | None) -> Tensor:
    """The gradient of a surrogate's logits to its input, after a look at it.

    Raises:
        InputError: there is none.
        NonFiniteError: it is not finite.
    """
    if gradient is None:
        raise InputError(
            f"surrogate {surrogate.name!r} gives no gradient to its input (no_grad, detach, a cast to "
            "integers or argmax inside); wanted surrogates that are differentiable from image to logits"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError(
            f"surrogate {surrogate.name!r} gave a gradient that is not finite, wanted finite numbers"
        )
    return gradient

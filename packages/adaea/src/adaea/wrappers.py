"""Small modules round a classifier, so that every model takes images in [0, 1] and returns logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.device import autocast, resolve_dtype
from fusion_core.errors import ConfigError, InputError
from fusion_core.modules import logits_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalized(nn.Module):
    """A classifier with its own preprocessing in front: images in [0, 1] go in, logits come out.

    Args:
        model: takes preprocessed images.
        mean: per channel, subtracted; None = 0.
        std: per channel, > 0, divided by; None = 1.
        size: ``(height, width)`` that the model wants; other images are resized (bilinear, antialiased).

    Raises:
        InputError: mean and std of different lengths, or a std that is not positive.

    Example:
        >>> model = Normalized(nn.Flatten(), mean=[0.5], std=[0.25])
        >>> model(torch.full((1, 1, 1, 2), 1.0))
        tensor([[2., 2.]])
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        shift = [float(value) for value in (mean if mean is not None else [0.0] * len(std or [0.0]))]
        scale = [float(value) for value in (std if std is not None else [1.0] * len(shift))]
        if len(shift) != len(scale) or min(scale) <= 0:
            raise InputError(f"mean is {shift} and std {scale}, wanted one each per channel, std > 0")
        self.model, self.size = model, size
        self.register_buffer("mean", torch.tensor(shift).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Any:
        """What the model returns for images ``(batch, channels, height, width)`` in [0, 1]."""
        if self.size is not None and tuple(images.shape[-2:]) != tuple(self.size):
            images = F.interpolate(images, self.size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return self.model((images - mean.to(images)) / std.to(images))

    def extra_repr(self) -> str:
        """Mean, std and size."""
        mean, std = (self.get_buffer(name).flatten().tolist() for name in ("mean", "std"))
        return f"mean={mean}, std={std}, size={self.size}"


def half_precision(device: torch.device, dtype: str | torch.dtype) -> AbstractContextManager[Any]:
    """Autocast for the half dtypes; nothing for ``"auto"`` and float32.

    Raises:
        ConfigError: another dtype.
    """
    if str(dtype) == "auto":
        return nullcontext()
    found = resolve_dtype(dtype, device)
    if found is torch.float64:
        raise ConfigError("dtype is 'float64', wanted auto, float32, bfloat16 or float16")
    return autocast(device, found)


def predict(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """The classes that any model or callable names, int64 ``(batch,)`` on the CPU.

    Args:
        model: returns logits ``(batch, classes)`` in any common form, or integer labels ``(batch,)``.
        images: ``(batch, channels, height, width)`` in [0, 1].

    Raises:
        InputError: something else came back.

    Example:
        >>> predict(lambda x: x.flatten(1), torch.tensor([[[[0.0, 1.0]]]]))
        tensor([1])
    """
    with torch.no_grad():
        output = model(images)
    found = output
    if not isinstance(output, Tensor):
        # numpy arrays and lists are what clients of other frameworks return
        try:
            found = torch.as_tensor(output)
        except (TypeError, ValueError, RuntimeError):
            found = logits_of(output)
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype is torch.bool)
    if integers and found.shape == (len(images),):
        return found.detach().cpu().long()
    if found.is_floating_point() and found.ndim == 2 and len(found) == len(images):
        return found.detach().float().cpu().argmax(1)
    raise InputError(
        f"the model returned {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}, wanted logits "
        f"({len(images)}, classes) or integer labels ({len(images)},)"
    )

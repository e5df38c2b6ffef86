"""What an attack takes at its border, checked once per call, before anything is computed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaea.drf import filter_bound
from adaea.settings import AdaptiveSettings
from adaea.transforms import DI, TI, Admix
from fusion_core.errors import DataError, FusionWarning, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from adaea.trace import AttackState

_SLACK = 1e-6


def check_inputs(images: Any, labels: Any, bounds: tuple[float, float]) -> None:
    """Check images and labels.

    Args:
        images: float ``(batch, channels, height, width)`` in ``bounds``.
        labels: integer ``(batch,)``, >= 0.
        bounds: least and largest value of a pixel; 1e-6 beyond is let through.

    Raises:
        DataError: no tensors of these dtypes, or values out of range.
        ShapeError: other dimensions, or another number of labels.
        NonFiniteError: NaN or infinity in the images.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"images are {found}, wanted a float tensor with values in {list(bounds)}")
    if images.dim() != 4:
        raise ShapeError(f"images have shape {tuple(images.shape)}, wanted (batch, channels, height, width)")
    integer = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if not isinstance(labels, Tensor) or labels.dtype not in integer:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"labels are {found}, wanted an integer tensor of class indices")
    if labels.dim() != 1 or labels.shape[0] != images.shape[0]:
        raise ShapeError(
            f"labels have shape {tuple(labels.shape)}, wanted ({images.shape[0]},), one per image"
        )
    if not len(images):
        return
    low, high = (float(v) for v in images.detach().aminmax())  # NaN wins either
    if not (torch.isfinite(torch.tensor([low, high]))).all():
        raise NonFiniteError("images hold NaN or infinity, wanted finite numbers")
    if low < bounds[0] - _SLACK or high > bounds[1] + _SLACK:
        raise DataError(
            f"images have values from {low:.4g} to {high:.4g}, wanted {bounds[0]:g} to {bounds[1]:g}: pass "
            "images that are not normalised, and let the surrogates apply mean and std themselves"
        )
    if int(labels.min()) < 0:
        raise DataError(f"labels go down to {int(labels.min())}, wanted class indices of at least 0")


def check_geometry(settings: AdaptiveSettings, images: Tensor) -> None:
    """Check that the transforms fit the images' size.

    Raises:
        ShapeError: a TI kernel larger than the image, or an oblong image where DI wants square ones.
        ConfigError: DI has nothing to draw from.
    """
    height, width = (int(side) for side in images.shape[-2:])
    ti: TI | None = settings.part(TI)
    if ti is not None and ti.size > min(height, width):
        raise ShapeError(
            f"TI kernel has {ti.size} x {ti.size} pixels, wanted at most those of the image, {height} x "
            f"{width}"
        )
    di: DI | None = settings.part(DI)
    if di is not None:
        di.plan(height, width)


def check_state(state: AttackState, images: Tensor, count: int) -> None:
    """Check that a state belongs to a batch of this shape and to so many surrogates.

    Raises:
        ShapeError: it does not.
    """
    if state.images.shape != images.shape:
        raise ShapeError(
            f"state holds images of shape {tuple(state.images.shape)}, wanted those of images, "
            f"{tuple(images.shape)}"
        )
    if state.weights.shape[0] != count:
        raise ShapeError(f"state holds weights of {state.weights.shape[0]} surrogates, wanted {count}")


def warn_inactive(settings: AdaptiveSettings, count: int, images: Tensor, stacklevel: int = 3) -> None:
    """Warn of settings that do nothing, or not what they seem to, with these surrogates and images."""

    def warn(words: str) -> None:
        warnings.warn(words, FusionWarning, stacklevel=stacklevel + 1)

    if settings.drf != "off" and count > 1:
        bound = filter_bound(count, "official" if settings.drf == "official" else "symmetric")
        if settings.eta <= bound:
            warn(
                f"the filter is inactive: eta is {settings.eta:g}, and with {count} surrogates the map "
                f"({settings.drf}) cannot fall below {bound:.4g}"
            )
        if images.shape[1] == 1:
            warn(
                "images have one channel, so cosines between gradients are -1, 0 or 1 and the filter's map "
                "takes few values"
            )
    if settings.part(Admix) and len(images) == 1:
        warn("Admix mixes nothing into a batch of one image")

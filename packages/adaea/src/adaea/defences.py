"""Defences as wrappers round a model: what the audit sees if you put one in front of your classifier.

They are meant as targets of an audit, forward only. As a surrogate a defence masks its gradient; with
``straight_through=True`` the gradient passes as if the defence were the identity (BPDA), and ``eot=n``
averages the logits over n draws. Every draw follows from the seed and its own number, and is shared by the
batch: an image's answer does not depend on its neighbours.
"""

from __future__ import annotations

import io
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.errors import ConfigError, FusionWarning, check_range
from fusion_core.modules import logits_of
from fusion_core.seeding import generator


class Defence(nn.Module, ABC):
    """Base of the defences: changes the images, then asks the model.

    Args:
        model: takes images in [0, 1], returns logits.
        seed: of the random defences.
        straight_through: let gradients pass as if the images were unchanged (BPDA).
        eot: draws whose logits are averaged, at least 1.

    Raises:
        ConfigError: ``eot`` below 1.
    """

    differentiable = False

    def __init__(
        self, model: nn.Module, *, seed: int = 0, straight_through: bool = False, eot: int = 1
    ) -> None:
        super().__init__()
        check_range("eot", eot, 1, math.inf)
        self.model, self.seed, self.straight_through, self.eot = model, seed, straight_through, eot
        self._warned = False

    @abstractmethod
    def transform(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The images as the model gets them, ``(batch, channels, height, width)`` in [0, 1]."""

    def changed(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The changed images, with the gradient that the settings give them."""
        if self.straight_through:
            with torch.no_grad():
                found = self.transform(images, draw)
            if found.shape != images.shape:
                raise ConfigError(
                    f"straight_through needs images of the same size, {type(self).__name__} changes "
                    f"{tuple(images.shape)} to {tuple(found.shape)}"
                )
            return images + (found - images).detach()
        if images.requires_grad and not self.differentiable and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} masks its gradient; pass straight_through=True to attack through it",
                FusionWarning,
                stacklevel=3,
            )
        return self.transform(images, draw)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of images in [0, 1], averaged over ``eot`` draws."""
        found = [
            logits_of(self.model(self.changed(images, generator(self.seed, "defence", i))))
            for i in range(self.eot)
        ]
        return found[0] if len(found) == 1 else torch.stack(found).mean(0)


class JPEG(Defence):
    """JPEG compression by Pillow, chroma halved in both directions (4:2:0).

    Args:
        model: see :class:`Defence`.
        quality: 1 to 100.
        **options: of :class:`Defence`.

    Raises:
        ConfigError: quality out of range, or images of neither 1 nor 3 channels.
    """

    def __init__(self, model: nn.Module, quality: int = 75, **options: Any) -> None:
        super().__init__(model, **options)
        self.quality = int(check_range("quality", quality, 1, 100))

    def transform(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The images after compression."""
        del draw
        from PIL import Image

        channels = images.shape[1]
        if channels not in (1, 3):
            raise ConfigError(f"JPEG takes images of 1 or 3 channels, these have {channels}")
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        found = np.empty_like(pixels)
        for i, picture in enumerate(pixels):
            file = io.BytesIO()
            flat = picture[..., 0] if channels == 1 else picture
            Image.fromarray(flat).save(file, "JPEG", quality=self.quality, subsampling=2)
            with Image.open(file) as opened:
                found[i] = np.asarray(opened).reshape(picture.shape)
        return torch.from_numpy(found).permute(0, 3, 1, 2).to(images) / 255


class BitDepth(Defence):
    """Fewer grey levels: round to ``2**bits`` of them.

    Args:
        model: see :class:`Defence`.
        bits: 1 to 8.
        **options: of :class:`Defence`.

    Raises:
        ConfigError: bits out of range.

    Example:
        >>> BitDepth(nn.Flatten(), bits=1)(torch.tensor([[[[0.2, 0.7]]]]))
        tensor([[0., 1.]])
    """

    def __init__(self, model: nn.Module, bits: int = 4, **options: Any) -> None:
        super().__init__(model, **options)
        self.bits = int(check_range("bits", bits, 1, 8))

    def transform(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The images on the coarser grid."""
        del draw
        levels = 2**self.bits - 1
        return (images.clamp(0, 1) * levels).round() / levels


class _Window(Defence):
    def __init__(self, model: nn.Module, size: int = 3, **options: Any) -> None:
        super().__init__(model, **options)
        if size < 1 or size % 2 == 0:
            raise ConfigError(f"size is {size}, wanted an odd number of pixels, at least 1")
        self.size = size

    def _padded(self, images: Tensor) -> Tensor:
        reach = self.size // 2
        if reach >= min(images.shape[-2:]):
            raise ConfigError(
                f"size is {self.size}, too large for images of {tuple(images.shape[-2:])} pixels"
            )
        return F.pad(images, (reach,) * 4, mode="reflect")


class MedianBlur(_Window):
    """The median of each channel over a square window.

    Args:
        model: see :class:`Defence`.
        size: odd, in pixels.
        **options: of :class:`Defence`.

    Raises:
        ConfigError: an even size.
    """

    def transform(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The blurred images."""
        del draw
        windows = self._padded(images).unfold(2, self.size, 1).unfold(3, self.size, 1)
        return windows.flatten(-2).median(-1).values


class BoxBlur(_Window):
    """The mean of each channel over a square window.

    Args:
        model: see :class:`Defence`.
        size: odd, in pixels.
        **options: of :class:`Defence`.

    Raises:
        ConfigError: an even size.
    """

    differentiable = True

    def transform(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The blurred images."""
        del draw
        return F.avg_pool2d(self._padded(images), self.size, 1)


class GaussianBlur(_Window):
    """A Gaussian blur; the window reaches three standard deviations.

    Args:
        model: see :class:`Defence`.
        sigma: in pixels, > 0.
        **options: of :class:`Defence`.

    Raises:
        ConfigError: sigma not positive.
    """

    differentiable = True

    def __init__(self, model: nn.Module, sigma: float = 1.0, **options: Any) -> None:
        self_sigma = check_range("sigma", sigma, 0.0, math.inf, open=True)
        super().__init__(model, 2 * math.ceil(3 * sigma) + 1, **options)
        self.sigma = self_sigma

    def transform(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The blurred images."""
        del draw
        place = torch.arange(self.size, dtype=images.dtype, device=images.device) - self.size // 2
        window = torch.exp(-(place**2) / (2 * self.sigma**2))
        window = window / window.sum()
        channels = images.shape[1]
        found = F.conv2d(
            self._padded(images), window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels
        )
        return F.conv2d(found, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


class RandomResizePad(Defence):
    """Shrink by a random factor and pad with zeros at a random place (Xie et al., 2018), size unchanged.

    Args:
        model: see :class:`Defence`.
        rate: least factor, in (0, 1].
        **options: of :class:`Defence`.

    Raises:
        ConfigError: rate out of range.
    """

    differentiable = True

    def __init__(self, model: nn.Module, rate: float = 0.85, **options: Any) -> None:
        super().__init__(model, **options)
        if not 0 < rate <= 1:
            raise ConfigError(f"rate is {rate!r}, wanted a number in (0, 1]")
        self.rate = rate

    def transform(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The shrunk and padded images."""
        height, width = images.shape[-2:]
        factor, down, across = torch.rand(3, generator=draw).tolist()
        factor = self.rate + (1 - self.rate) * factor
        rows, columns = max(1, round(factor * height)), max(1, round(factor * width))
        small = F.interpolate(images, (rows, columns), mode="bilinear", align_corners=False)
        top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
        return F.pad(small, (left, width - columns - left, top, height - rows - top))


class RandomizedSmoothing(Defence):
    """Gaussian noise, and the logarithm of the mean probability over several draws of it.

    Args:
        model: see :class:`Defence`.
        sigma: of the noise, >= 0, in units of [0, 1].
        draws: how many, at least 1.
        **options: of :class:`Defence`.

    Raises:
        ConfigError: sigma or draws out of range.
    """

    differentiable = True

    def __init__(self, model: nn.Module, sigma: float = 0.25, draws: int = 16, **options: Any) -> None:
        super().__init__(model, **options)
        self.sigma = check_range("sigma", sigma, 0.0, math.inf)
        self.draws = int(check_range("draws", draws, 1, math.inf))

    def transform(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The noisy images."""
        noise = torch.randn(images.shape[1:], generator=draw, dtype=torch.float32)
        return images + self.sigma * noise.to(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms of the mean probabilities, ``(batch, classes)``."""
        total: Tensor | None = None
        for i in range(self.draws):
            logits = logits_of(self.model(self.changed(images, generator(self.seed, "smoothing", i))))
            term = logits.log_softmax(1)
            total = term if total is None else torch.logaddexp(total, term)
        assert total is not None
        return total - math.log(self.draws)


class Purifier(Defence):
    """A purifier of your own in front of the model: NRP, HGD, a diffusion model.

    Args:
        model: see :class:`Defence`.
        purify: images in [0, 1] -> images in [0, 1].
        **options: of :class:`Defence`.
    """

    def __init__(self, model: nn.Module, purify: Callable[[Tensor], Tensor], **options: Any) -> None:
        super().__init__(model, **options)
        self.purify = purify

    def transform(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """The purified images."""
        del draw
        return self.purify(images)


_WORDS: dict[str, tuple[type[Defence], tuple[tuple[str, Callable[[str], float]], ...]]] = {
    "jpeg": (JPEG, (("quality", int),)),
    "bits": (BitDepth, (("bits", int),)),
    "median": (MedianBlur, (("size", int),)),
    "box": (BoxBlur, (("size", int),)),
    "gaussian": (GaussianBlur, (("sigma", float),)),
    "resize-pad": (RandomResizePad, (("rate", float),)),
    "smoothing": (RandomizedSmoothing, (("sigma", float), ("draws", int))),
}


def parse_defence(words: str) -> Callable[..., Defence]:
    """The defence that a word of the command line names, as a function of the model.

    Args:
        words: ``jpeg:75``, ``bits:4``, ``median:3``, ``box:3``, ``gaussian:1.0``, ``resize-pad:0.85`` or
            ``smoothing:0.25:16``; the numbers may be left out.

    Returns:
        ``(model, seed=0, straight_through=False, eot=1) -> Defence``.

    Raises:
        ConfigError: another word, or a number that does not fit.

    Example:
        >>> parse_defence("bits:3")(nn.Flatten()).bits
        3
    """
    name, *numbers = words.strip().split(":")
    if name not in _WORDS or len(numbers) > len(_WORDS[name][1]):
        raise ConfigError(f"defence is {words!r}, wanted {', '.join(_WORDS)}, with numbers such as jpeg:75")
    kind, takes = _WORDS[name]
    values: dict[str, float] = {}
    for (key, read), number in zip(takes, numbers, strict=False):
        try:
            values[key] = read(number)
        except ValueError as error:
            raise ConfigError(f"defence is {words!r}: {key} is {number!r}, wanted a number") from error

    def build(model: nn.Module, **options: Any) -> Defence:
        return kind(model, **values, **options)

    return build

"""Input transforms that make an attack transfer, and the smoothing of its gradient.

Sources: DI, Xie et al. 2019; SI, Lin et al. 2020; Admix, Wang et al. 2021; TI, Dong et al. 2019; the draws
and the rounding as in the official code of AdaEA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from adaea.draws import Resize, proportional
from fusion_core.errors import ConfigError, ShapeError, check_range

Images = Float[Tensor, "batch channels height width"]
Kind = Literal["gaussian", "linear", "uniform"]
KINDS = ("gaussian", "linear", "uniform")


@dataclass(frozen=True, slots=True)
class DI:
    """Input diversity: with some probability the image is resized to a random side and padded at random.

    Attributes:
        rate: least side as a share of the image's; above 1 the image grows instead, onto a canvas of
            ``int(rate * side)`` pixels, and the surrogates must take that size.
        probability: of being applied, in [0, 1].
        sides: ``"each"`` resizes the sides of an oblong image in proportion; ``"square"`` refuses it, as the
            official code would.

    Raises:
        ConfigError: a rate that is not positive, or a probability outside [0, 1].
    """

    rate: float = 0.9
    probability: float = 0.5
    sides: Literal["each", "square"] = "each"

    def __post_init__(self) -> None:
        check_range("DI rate", self.rate, 0.0, float("inf"), open=True)
        check_range("DI probability", self.probability, 0.0, 1.0)
        if self.sides not in ("each", "square"):
            raise ConfigError(f"DI sides is {self.sides!r}, wanted 'each' or 'square'")

    def plan(self, height: int, width: int) -> tuple[tuple[int, int], int]:
        """Least and largest side to resize the height to, and the height of the canvas.

        Raises:
            ShapeError: an oblong image with ``sides="square"``.
            ConfigError: the rate leaves nothing to draw from at this size.

        Example:
            >>> DI(0.9).plan(24, 24)
            ((21, 23), 24)
        """
        if self.sides == "square" and height != width:
            raise ShapeError(
                f"DI got images of {height} x {width}, wanted square ones; sides='each' resizes each side"
            )
        other = int(self.rate * height)
        if other == height or other < 1:
            raise ConfigError(
                f"DI rate {self.rate:g} makes {other} of {height} pixels, wanted another size; take a rate "
                f"of at most {(height - 1) / height:.3g} or at least {(height + 1) / height:.3g}"
            )
        low, canvas = (other, height) if other < height else (height, other)
        return (low, canvas - 1), canvas

    def apply(self, images: Images, draw: Resize) -> Images:
        """The images after one draw ``(r, top, left, u)``; unchanged where u reaches the probability.

        Example:
            >>> DI(0.5, 1.0).apply(torch.ones(1, 1, 4, 4), (2, 1, 0, 0.3))[0, 0]
            tensor([[0., 0., 0., 0.],
                    [1., 1., 0., 0.],
                    [1., 1., 0., 0.],
                    [0., 0., 0., 0.]])
        """
        r, top, left, u = draw
        if not u < self.probability:
            return images
        height, width = images.shape[-2:]
        _, canvas = self.plan(height, width)
        wide, room = proportional(r, height, width), proportional(canvas, height, width)
        small = F.interpolate(images, size=(r, wide), mode="bilinear", align_corners=False)
        return F.pad(small, (left, room - wide - left, top, canvas - r - top))


@dataclass(frozen=True, slots=True)
class SI:
    """Scale invariance: gradients and losses are means over the image at 1, 1/2, 1/4, ...

    Attributes:
        scales: how many, >= 1.

    Raises:
        ConfigError: fewer than one.
    """

    scales: int = 5

    def __post_init__(self) -> None:
        check_range("SI scales", self.scales, 1, float("inf"))


@dataclass(frozen=True, slots=True)
class Admix:
    """Admix: scale invariance on the image with a little of other images of the batch mixed in.

    Attributes:
        strength: share of the other image that is added, >= 0.
        others: how many random other images, each mixed in by itself.
        scales: as in :class:`SI`.

    Raises:
        ConfigError: out of these ranges.
    """

    strength: float = 0.2
    others: int = 3
    scales: int = 5

    def __post_init__(self) -> None:
        check_range("Admix strength", self.strength, 0.0, float("inf"))
        check_range("Admix others", self.others, 1, float("inf"))
        check_range("Admix scales", self.scales, 1, float("inf"))


@dataclass(frozen=True, slots=True)
class TI:
    """Translation invariance: the filtered gradient is smoothed before it enters the momentum.

    Attributes:
        size: of the kernel in pixels.
        kind: ``"gaussian"``, ``"linear"`` or ``"uniform"``.
        nsig: standard deviations that half a gaussian kernel spans.
        rounded: round the kernel to float32, as the official code does; only float64 runs see a difference.

    Raises:
        ConfigError: a size below 1, an ``nsig`` that is not positive, or another kind.
    """

    size: int = 15
    kind: Kind = "gaussian"
    nsig: float = 3.0
    rounded: bool = True

    def __post_init__(self) -> None:
        check_range("TI size", self.size, 1, float("inf"))
        check_range("TI nsig", self.nsig, 0.0, float("inf"), open=True)
        if self.kind not in KINDS:
            raise ConfigError(f"TI kind is {self.kind!r}, wanted one of {list(KINDS)}")

    def kernel(self) -> Float[Tensor, "size size"]:
        """The kernel in float64; see :func:`smoothing_kernel`."""
        return smoothing_kernel(self.size, self.kind, nsig=self.nsig, rounded=self.rounded)


def scaled(images: Images, scales: int) -> Float[Tensor, "scales batch channels height width"]:
    """The images divided by 1, 2, 4, ...

    Example:
        >>> scaled(torch.ones(1, 1, 1, 1), 3).flatten()
        tensor([1.0000, 0.5000, 0.2500])
    """
    divisors = 2.0 ** torch.arange(scales, dtype=images.dtype, device=images.device)
    return images.unsqueeze(0) / divisors.view(-1, 1, 1, 1, 1)


def mixed(
    images: Images, partners: Float[Tensor, "others batch"], strength: float
) -> Float[Tensor, "others batch channels height width"]:
    """Each image plus a share of each of its partners, which count as constants.

    Args:
        images: ``(batch, channels, height, width)``.
        partners: int64 ``(others, batch)``, numbers of images in the batch.
        strength: the share.

    Example:
        >>> mixed(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([[1, 0]]), 0.2).flatten()
        tensor([0.2000, 1.0000])
    """
    return images.unsqueeze(0) + strength * images.detach()[partners.to(images.device)]


def smoothing_kernel(
    size: int, kind: Kind = "gaussian", *, nsig: float = 3.0, rounded: bool = True
) -> Float[Tensor, "size size"]:
    """A smoothing kernel that sums to 1.

    Args:
        size: of a side.
        kind: ``"gaussian"``: outer product of the normal density at ``linspace(-nsig, nsig, size)``;
            ``"linear"``: of ``1 - |i| * 2 / (size + 1)``; ``"uniform"``.
        nsig: see above.
        rounded: round the entries to float32.

    Returns:
        float64 ``(size, size)``.

    Raises:
        ConfigError: another kind.

    Example:
        >>> smoothing_kernel(3, "linear")[1]
        tensor([0.1250, 0.2500, 0.1250], dtype=torch.float64)
    """
    if kind == "gaussian":
        line = (-0.5 * torch.linspace(-nsig, nsig, size, dtype=torch.float64).square()).exp()
    elif kind == "linear":
        half = (size - 1) / 2
        line = 1 - torch.linspace(-half, half, size, dtype=torch.float64).abs() * 2 / (size + 1)
    elif kind == "uniform":
        line = torch.ones(size, dtype=torch.float64)
    else:
        raise ConfigError(f"kind is {kind!r}, wanted one of {list(KINDS)}")
    square = torch.outer(line, line)
    kernel = square / square.sum()
    return kernel.float().double() if rounded else kernel


def smooth(gradient: Images, kernel: Float[Tensor, "size size"]) -> Images:
    """The gradient convolved channel by channel, zeros outside, of the same size.

    Raises:
        ShapeError: the kernel is larger than the image.

    Example:
        >>> smooth(torch.ones(1, 1, 3, 3), smoothing_kernel(3, "uniform"))[0, 0, 1]
        tensor([0.6667, 1.0000, 0.6667])
    """
    size, (height, width) = kernel.shape[-1], gradient.shape[-2:]
    if size > min(height, width):
        raise ShapeError(
            f"TI kernel has {size} x {size} pixels, wanted at most those of the image, {height} x {width}"
        )
    channels = gradient.shape[-3]
    weight = kernel.to(gradient).expand(channels, 1, size, size)
    return F.conv2d(gradient, weight, padding="same", groups=channels)

"""What an attack achieved: accuracies, three success rates with intervals, and how large the change was.

Everything here takes predictions or images, never a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion_core.errors import DataError, ShapeError, check_shape
from fusion_core.results import Result
from fusion_core.stats import Interval, wilson


def _vectors(**named: Tensor) -> list[Tensor]:
    count: int | None = None
    for name, vector in named.items():
        if vector.dtype.is_floating_point or vector.dtype.is_complex or vector.dtype is torch.bool:
            raise DataError(f"{name} is {vector.dtype}, wanted class indices of an integer type")
        check_shape(name, vector, "images")
        count = len(vector) if count is None else count
        if len(vector) != count:
            raise ShapeError(f"{name} has {len(vector)} entries, wanted {count}, one per image")
    return [vector.detach().cpu() for vector in named.values()]


def accuracy(labels: Tensor, predictions: Tensor) -> Interval:
    """Share of right predictions with its 95 % Wilson interval.

    Args:
        labels: class indices ``(images,)``.
        predictions: likewise.

    Returns:
        In [0, 1]; NaN with [0, 1] without images.

    Raises:
        ShapeError: different lengths.
        DataError: no integers.

    Example:
        >>> accuracy(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])).value
        0.75
    """
    y, predicted = _vectors(labels=labels, predictions=predictions)
    return wilson(int((predicted == y).sum()), len(y))


def strict_success(labels: Tensor, clean: Tensor, adversarial: Tensor) -> Tensor:
    """Which images were right before and are wrong after (strict success), bool ``(images,)``.

    Args:
        labels: class indices ``(images,)``.
        clean: predictions on the clean images.
        adversarial: predictions on the adversarial images.

    Raises:
        ShapeError: different lengths.
        DataError: no integers.
    """
    y, before, after = _vectors(labels=labels, clean=clean, adversarial=adversarial)
    return (before == y) & (after != y)


def strict_asr(labels: Tensor, clean: Tensor, adversarial: Tensor) -> Interval:
    """Strict attack success rate: of the images that were right before, the share that is wrong after.

    Args:
        labels: class indices ``(images,)``.
        clean: predictions on the clean images.
        adversarial: predictions on the adversarial images.

    Returns:
        The rate with its 95 % Wilson interval; NaN with [0, 1] where no image was right before.

    Raises:
        ShapeError: different lengths.
        DataError: no integers.

    Example:
        >>> y = torch.tensor([0, 0, 0])
        >>> strict_asr(y, torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1])).value
        0.5
    """
    success = strict_success(labels, clean, adversarial)
    return wilson(int(success.sum()), int((clean == labels).sum()))


def official_asr(labels: Tensor, clean: Tensor, adversarial: Tensor) -> Interval:
    """The authors' rate, 1 - adversarial accuracy / clean accuracy: aggregate, negative where images mend.

    Args:
        labels: class indices ``(images,)``.
        clean: predictions on the clean images.
        adversarial: predictions on the adversarial images.

    Returns:
        The rate; the interval is that of the adversarial accuracy, carried over with the clean accuracy taken
        as given. NaN with [0, 1] where no image was right before.

    Raises:
        ShapeError: different lengths.
        DataError: no integers.

    Example:
        >>> y = torch.tensor([0, 0, 0])
        >>> official_asr(y, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])).value
        -1.0
    """
    before, after = accuracy(labels, clean), accuracy(labels, adversarial)
    if not before.value > 0:
        return Interval(math.nan, 0.0, 1.0)
    rate = lambda share: 1 - share / before.value
    return Interval(rate(after.value), rate(after.high), rate(after.low))


def fooling_rate(labels: Tensor, adversarial: Tensor) -> Interval:
    """Share of wrong predictions after the attack, whatever they were before (TransferAttack's rate).

    Args:
        labels: class indices ``(images,)``.
        adversarial: predictions on the adversarial images.

    Returns:
        1 - adversarial accuracy, with its 95 % Wilson interval.

    Raises:
        ShapeError: different lengths.
        DataError: no integers.
    """
    y, after = _vectors(labels=labels, adversarial=adversarial)
    return wilson(int((after != y).sum()), len(y))


def targeted_success(labels: Tensor, adversarial: Tensor, targets: Tensor) -> Interval:
    """Of the images whose target is not their label, the share that is taken for the target.

    Args:
        labels: class indices ``(images,)``.
        adversarial: predictions on the adversarial images.
        targets: target classes.

    Returns:
        The rate with its 95 % Wilson interval.

    Raises:
        ShapeError: different lengths.
        DataError: no integers.
    """
    y, after, wanted = _vectors(labels=labels, adversarial=adversarial, targets=targets)
    asked = wanted != y
    return wilson(int(((after == wanted) & asked).sum()), int(asked.sum()))


def paired_counts(labels: Tensor, clean: Tensor, first: Tensor, second: Tensor) -> tuple[int, int]:
    """How many images only the first and only the second attack wins, for McNemar's test.

    Args:
        labels: class indices ``(images,)``.
        clean: predictions on the clean images.
        first: predictions after the first attack.
        second: predictions after the second.

    Returns:
        Strict successes of the first alone, of the second alone.

    Raises:
        ShapeError: different lengths.
        DataError: no integers.

    Example:
        >>> y = torch.zeros(3, dtype=torch.long)
        >>> paired_counts(y, y, torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0]))
        (1, 0)
    """
    a, b = strict_success(labels, clean, first), strict_success(labels, clean, second)
    return int((a & ~b).sum()), int((b & ~a).sum())


@dataclass(frozen=True, slots=True)
class Scores(Result):
    """The rates of one attack against one model, each with a 95 % interval, in [0, 1].

    Attributes:
        images: how many.
        clean: accuracy before.
        adversarial: accuracy after.
        strict: of those right before, wrong after; the default meaning of attack success here.
        official: 1 - adversarial / clean accuracy.
        fooling: wrong after.
        targeted: taken for the target; None for untargeted attacks.
    """

    images: int
    clean: Interval
    adversarial: Interval
    strict: Interval
    official: Interval
    fooling: Interval
    targeted: Interval | None = None


def score(labels: Tensor, clean: Tensor, adversarial: Tensor, targets: Tensor | None = None) -> Scores:
    """All rates of one attack against one model.

    Args:
        labels: class indices ``(images,)``.
        clean: predictions on the clean images.
        adversarial: predictions on the adversarial images.
        targets: target classes of a targeted attack.

    Raises:
        ShapeError: different lengths.
        DataError: no integers.

    Example:
        >>> y = torch.tensor([0, 1])
        >>> score(y, y, torch.tensor([0, 0])).strict.value
        0.5
    """
    return Scores(
        len(labels),
        accuracy(labels, clean),
        accuracy(labels, adversarial),
        strict_asr(labels, clean, adversarial),
        official_asr(labels, clean, adversarial),
        fooling_rate(labels, adversarial),
        None if targets is None else targeted_success(labels, adversarial, targets),
    )


@dataclass(frozen=True, slots=True)
class Perturbation(Result):
    """Size of a perturbation, mean over the images; images in [0, 1].

    Attributes:
        linf: largest change of a channel value.
        l2: Euclidean norm over the image.
        psnr: peak signal-to-noise ratio in dB, over the images that changed; NaN if none did.
        ssim: structural similarity in [-1, 1], 1 = equal.
    """

    linf: float
    l2: float
    psnr: float
    ssim: float


def perturbation(clean: Tensor, adversarial: Tensor, *, chunk: int = 64) -> Perturbation:
    """How far adversarial images are from the clean ones.

    Args:
        clean: ``(images, channels, height, width)`` in [0, 1].
        adversarial: likewise.
        chunk: images computed at a time.

    Raises:
        ShapeError: different shapes, or no NCHW.

    Example:
        >>> x = torch.full((2, 3, 16, 16), 0.5)
        >>> found = perturbation(x, x + 0.1)
        >>> round(found.linf, 3), round(found.psnr, 1)
        (0.1, 20.0)
    """
    check_shape("clean", clean, "images channels height width")
    if adversarial.shape != clean.shape:
        raise ShapeError(f"adversarial has shape {tuple(adversarial.shape)}, wanted {tuple(clean.shape)}")
    if not len(clean):
        return Perturbation(math.nan, math.nan, math.nan, math.nan)
    parts: list[Tensor] = []
    for x, changed in zip(clean.split(chunk), adversarial.split(chunk), strict=True):
        x, changed = x.detach().cpu().double(), changed.detach().cpu().double()
        flat = (changed - x).flatten(1)
        parts.append(
            torch.stack(
                [
                    flat.abs().amax(1),
                    torch.linalg.vector_norm(flat, dim=1),
                    -10 * torch.log10((flat**2).mean(1)),
                    ssim(x, changed),
                ]
            )
        )
    linf, l2, psnr, similar = torch.cat(parts, 1)
    finite = psnr[torch.isfinite(psnr)]
    return Perturbation(float(linf.mean()), float(l2.mean()), float(finite.mean()), float(similar.mean()))


def ssim(clean: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of each pair of images, ``(images,)`` (Wang et al., 2004).

    Args:
        clean: ``(images, channels, height, width)`` floats in [0, 1].
        other: likewise.

    Returns:
        Mean over channels and over the places where the window fits: Gaussian, 11 pixels (or the largest odd
        number that fits), sigma 1.5.

    Raises:
        ShapeError: no NCHW.
    """
    sizes = check_shape("clean", clean, "images channels height width")
    side = min(11, sizes["height"], sizes["width"])
    side -= 1 - side % 2
    place = torch.arange(side, dtype=clean.dtype, device=clean.device) - side // 2
    window = torch.exp(-(place**2) / (2 * 1.5**2))
    window = window / window.sum()

    def smooth(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1).unsqueeze(1)
        flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return flat.view(*x.shape[:2], *flat.shape[2:])

    mean_x, mean_y = smooth(clean), smooth(other)
    var_x = smooth(clean * clean) - mean_x**2
    var_y = smooth(other * other) - mean_y**2
    both = smooth(clean * other) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3))

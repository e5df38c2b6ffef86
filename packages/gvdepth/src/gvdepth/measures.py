"""The eleven depth metrics, their crops and caps, in one pass over the valid pixels (section 2.9).

The order is fixed: the prediction is clipped to [min_depth, max_depth] FIRST, then the mask is taken from
the ground truth. Every valid pixel is visited once: one boolean indexing, one logarithm, and sums in double
precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import ConfigError, DataError, NonFiniteError, ShapeError

__all__ = ["CROPS", "METRICS", "Crop", "Pooling", "crop_window", "error_sums", "from_sums", "metrics", "pool"]

Array = NDArray[Any] | Tensor
Crop = Literal["garg", "eigen", "none"] | Sequence[float] | None
Pooling = Literal["image", "pixel"]
METRICS = (
    "abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "log10", "irmse", "mae", "d1", "d2", "d3",
)  # fmt: skip
CROPS: dict[str, tuple[float, float, float, float]] = {
    "none": (0.0, 1.0, 0.0, 1.0),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
_THRESHOLDS = (1.25, 1.25**2, 1.25**3)
# count, |e|/g, e^2/g, e^2, log^2, log, |log|, (1/p - 1/g)^2, |e|, three counts
_SUMS = 12
_BLOCK = 1 << 13  # pixels; BLAS would start threads for more than 10,000


def crop_window(crop: Crop, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that a crop keeps, ``[int(top H), int(bottom H))`` and likewise for columns.

    Args:
        crop: ``"garg"``, ``"eigen"``, ``"none"`` or None, or fractions ``(top, bottom, left, right)`` in [0,
            1].
        size: ``(height, width)``, pixels.

    Raises:
        ConfigError: unknown name, or fractions out of order.

    Example:
        >>> crop_window("garg", (375, 1242))
        (slice(153, 371, None), slice(44, 1197, None))
    """
    if crop is None:
        crop = "none"
    if isinstance(crop, str):
        if crop not in CROPS:
            raise ConfigError(f"crop is {crop!r}, wanted {', '.join(CROPS)} or (top, bottom, left, right)")
        crop = CROPS[crop]
    values = [float(value) for value in crop]
    if len(values) != 4 or not (0 <= values[0] < values[1] <= 1 and 0 <= values[2] < values[3] <= 1):
        raise ConfigError(
            f"crop is {values}, wanted fractions (top, bottom, left, right) in increasing pairs"
        )
    top, bottom, left, right = values
    return slice(int(top * size[0]), int(bottom * size[0])), slice(int(left * size[1]), int(right * size[1]))


def error_sums(
    prediction: Array,
    target: Array,
    *,
    max_depth: float = 80.0,
    min_depth: float = 1e-3,
    crop: Crop = None,
    mask: Array | None = None,
    bins: Sequence[float] | None = None,
    backend: Literal["auto", "numpy", "torch"] = "auto",
) -> NDArray[np.float64]:
    """Sums over the valid pixels of every image, from which :func:`from_sums` makes the metrics.

    Args:
        prediction: (height, width), (batch, height, width) or (batch, 1, height, width), metres.
        target: the same shape, metres; <= min_depth, NaN or infinite is a hole.
        max_depth: cap, metres; a target at the cap counts.
        min_depth: metres.
        crop: see :func:`crop_window`.
        mask: bool, True takes part.
        bins: edges of distance bins, metres, increasing: target in (low, high] falls into a bin.
        backend: ``"torch"`` computes on the tensors' device; ``"auto"`` takes it for tensors of an
            accelerator.

    Returns:
        (batch, 12) or, with bins, (batch, bins, 12), float64.

    Raises:
        ShapeError: different shapes.
        ConfigError: a cap, bin or crop that makes no sense.
        NonFiniteError: the prediction is NaN at a valid pixel.
    """
    shape = tuple(target.shape)
    if tuple(prediction.shape) != shape:
        raise ShapeError(f"prediction has shape {tuple(prediction.shape)}, wanted that of target, {shape}")
    if len(shape) not in (2, 3, 4) or (len(shape) == 4 and shape[1] != 1):
        raise ShapeError(f"target has shape {shape}, wanted (h, w), (batch, h, w) or (batch, 1, h, w)")
    if not 0 < min_depth < max_depth:
        raise ConfigError(
            f"min_depth is {min_depth!r} and max_depth {max_depth!r}, wanted 0 < min_depth < max_depth"
        )
    edges = None if bins is None else [float(edge) for edge in bins]
    if edges is not None and (len(edges) < 2 or any(a >= b for a, b in pairwise(edges))):
        raise ConfigError(f"bins is {bins!r}, wanted at least two increasing edges in metres")
    rows, columns = crop_window(crop, (shape[-2], shape[-1]))
    flat = (-1, *shape[-2:])
    p, g, m = (None if x is None else x.reshape(flat)[:, rows, columns] for x in (prediction, target, mask))
    tensors = [x for x in (prediction, target) if isinstance(x, Tensor)]
    use_torch = backend == "torch" or (backend == "auto" and any(x.device.type != "cpu" for x in tensors))
    if backend not in ("auto", "numpy", "torch"):
        raise ConfigError(f"backend is {backend!r}, wanted 'auto', 'numpy' or 'torch'")
    compute = _torch_sums if use_torch else _numpy_sums
    sums = compute(p, g, m, max_depth, min_depth, edges)
    if np.isnan(sums).any():
        image = int(np.isnan(sums).reshape(len(sums), -1).any(1).argmax())
        raise NonFiniteError(f"prediction is NaN at valid pixels of image {image}; it takes metres")
    return sums


def _as_numpy(x: Any) -> NDArray[Any]:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
    return np.asarray(x)


def _numpy_sums(
    prediction: Any, target: Any, mask: Any, max_depth: float, min_depth: float, bins: list[float] | None
) -> NDArray[np.float64]:
    prediction, target = _as_numpy(prediction), _as_numpy(target)
    valid = (target > min_depth) & (target <= max_depth)
    if math.isinf(max_depth):
        valid &= np.isfinite(target)
    if mask is not None:
        mask = _as_numpy(mask)
        if mask.dtype != np.bool_:
            raise DataError(f"mask is {mask.dtype}, wanted bool (True = takes part)")
        valid &= mask
    g = target[valid]
    g = g.astype(np.promote_types(g.dtype, np.float32), copy=False)
    p = prediction[valid].astype(g.dtype, copy=False)
    images = len(target)
    if images == 1 and bins is None:
        return _one_sum(p, g, min_depth, max_depth)[None]
    p = np.clip(p, min_depth, max_depth)
    group = np.repeat(np.arange(images), valid.reshape(images, -1).sum(1))
    total = images if bins is None else images * (len(bins) + 1)
    if bins is not None:
        group = group * (len(bins) + 1) + np.searchsorted(np.asarray(bins), g, side="left")
    weights = [None, *_terms(p, g), *_hits(p, g)]
    table = np.stack([np.bincount(group, w, minlength=total).astype(np.float64) for w in weights], -1)
    if bins is None:
        return table
    return table.reshape(images, len(bins) + 1, _SUMS)[:, 1:-1]  # the ends are outside all bins


def _one_sum(p: NDArray[Any], g: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    """The sums of one image, in blocks that stay in the cache: no temporary is as long as the image."""
    total = np.zeros(_SUMS)
    total[0] = g.size
    buffers = [np.empty(min(g.size, _BLOCK), g.dtype) for _ in range(5)]
    flags = np.empty(min(g.size, _BLOCK), np.bool_)
    for start in range(0, g.size, _BLOCK):
        truth = g[start : start + _BLOCK]
        guess, inverse, error, work, ratio = (buffer[: len(truth)] for buffer in buffers)
        np.maximum(p[start : start + _BLOCK], low, out=guess)
        np.minimum(guess, high, out=guess)
        np.divide(1.0, truth, out=inverse)
        np.subtract(guess, truth, out=error)
        np.multiply(error, error, out=work)
        total[2] += work @ inverse
        total[3] += error @ error
        np.abs(error, out=error)
        total[1] += error @ inverse
        total[8] += error.sum(dtype=np.float64)
        np.divide(1.0, guess, out=work)
        work -= inverse
        total[7] += work @ work
        np.divide(guess, truth, out=ratio)
        np.divide(truth, guess, out=work)
        np.maximum(ratio, work, out=work)
        for k, threshold in enumerate(_THRESHOLDS):
            total[9 + k] += np.count_nonzero(np.less(work, threshold, out=flags[: len(truth)]))
        np.log(ratio, out=ratio)
        total[4] += ratio @ ratio
        total[5] += ratio.sum(dtype=np.float64)
        np.abs(ratio, out=ratio)
        total[6] += ratio.sum(dtype=np.float64)
    return total


def _terms(p: NDArray[Any], g: NDArray[Any]) -> Any:
    error = p - g
    size, inverse = np.abs(error), 1.0 / g
    yield size * inverse
    error *= error
    yield error * inverse
    yield error
    ratio = np.log(p / g)
    yield ratio * ratio
    yield ratio
    yield np.abs(ratio)
    gap = 1.0 / p - inverse
    yield gap * gap
    yield size


def _hits(p: NDArray[Any], g: NDArray[Any]) -> Any:
    worse = np.maximum(p / g, g / p)
    for threshold in _THRESHOLDS:
        yield worse < threshold


def _torch_sums(
    prediction: Any, target: Any, mask: Any, max_depth: float, min_depth: float, bins: list[float] | None
) -> NDArray[np.float64]:
    target = torch.as_tensor(target)
    prediction = torch.as_tensor(prediction).detach().to(target.device)
    valid = (target > min_depth) & (target <= max_depth) & torch.isfinite(target)
    if mask is not None:
        mask = torch.as_tensor(mask).to(target.device)
        if mask.dtype != torch.bool:
            raise DataError(f"mask is {mask.dtype}, wanted torch.bool (True = takes part)")
        valid = valid & mask
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    one = torch.ones((), dtype=wide, device=target.device)
    g = torch.where(valid, target.to(wide), one)
    p = torch.where(valid, prediction.to(wide).clamp(min_depth, max_depth), one)
    error, ratio = p - g, (p / g).log()
    worse = torch.maximum(p / g, g / p)
    squares = error * error
    terms = [
        torch.ones_like(g), error.abs() / g, squares / g, squares, ratio * ratio, ratio, ratio.abs(),
        (1.0 / p - 1.0 / g) ** 2, error.abs(), *((worse < t).to(wide) for t in _THRESHOLDS),
    ]  # fmt: skip
    total = torch.float32 if target.device.type == "mps" else torch.float64
    parts = [valid] if bins is None else [
        valid & (g > low) & (g <= high) for low, high in pairwise(bins)
    ]  # fmt: skip

    def summed(part: Tensor) -> Tensor:
        kept = (torch.where(part, x, torch.zeros_like(x)) for x in terms)
        return torch.stack([x.flatten(1).sum(1, dtype=total) for x in kept], -1)

    sums = torch.stack([summed(part) for part in parts], 1)
    found = sums.double().cpu().numpy()
    return found[:, 0] if bins is None else found


def from_sums(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The metrics of sums: a mapping of name to array (...), with ``valid``, the count.

    Args:
        sums: (..., 12) of :func:`error_sums`; sums of several images add up to pooled pixels.

    Returns:
        NaN where there is no valid pixel.
    """
    count = sums[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(count > 0, 1.0 / np.maximum(count, 1.0), np.nan)[..., None] * sums
    spread = np.maximum(mean[..., 4] - mean[..., 5] ** 2, 0.0)
    return {
        "abs_rel": mean[..., 1],
        "sq_rel": mean[..., 2],
        "rmse": np.sqrt(mean[..., 3]),
        "rmse_log": np.sqrt(mean[..., 4]),
        "silog": 100.0 * np.sqrt(spread),
        "log10": mean[..., 6] / math.log(10.0),
        "irmse": 1000.0 * np.sqrt(mean[..., 7]),
        "mae": mean[..., 8],
        "d1": mean[..., 9],
        "d2": mean[..., 10],
        "d3": mean[..., 11],
        "valid": count,
    }


def pool(sums: NDArray[np.float64], pooling: Pooling = "image") -> dict[str, Any]:
    """One number per metric of many images.

    Args:
        sums: (images, ..., 12) of :func:`error_sums`.
        pooling: ``"image"``, the mean over images that have valid pixels, or ``"pixel"``, over all valid
            pixels.

    Returns:
        Arrays (...), or floats where there is one number; ``valid`` is the number of pixels.

    Raises:
        ConfigError: unknown pooling.
    """
    if pooling not in ("image", "pixel"):
        raise ConfigError(f"pooling is {pooling!r}, wanted 'image' or 'pixel'")
    # Exactly rounded sums: the same whatever the order of the images, so that shards add up bit by bit.
    whole = _exact_sum(sums)
    if pooling == "pixel":
        found = from_sums(whole)
    else:
        seen = sums[..., 0] > 0
        images = seen.sum(0)
        per_image = from_sums(sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = {
                name: np.where(images > 0, _exact_sum(np.where(seen, value, 0.0)) / images, np.nan)
                for name, value in per_image.items()
            }
        found["valid"] = whole[..., 0]
    made: dict[str, Any] = {n: float(v) if np.ndim(v) == 0 else v for n, v in found.items()}
    if isinstance(made["valid"], float):
        made["valid"] = int(made["valid"])
    return made


def _exact_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    columns = values.reshape(len(values), -1).T.tolist()
    return np.array([math.fsum(column) for column in columns]).reshape(values.shape[1:])


def metrics(
    prediction: Array,
    target: Array,
    *,
    max_depth: float = 80.0,
    min_depth: float = 1e-3,
    crop: Crop = None,
    mask: Array | None = None,
    pooling: Pooling = "image",
    backend: Literal["auto", "numpy", "torch"] = "auto",
) -> dict[str, Any]:
    """The eleven depth metrics and ``valid``, the number of pixels they are made of (section 2.9).

    Args:
        prediction: (height, width), (batch, height, width) or (batch, 1, height, width), metres.
        target: the same shape, metres; 0, NaN or infinite is a hole.
        max_depth: cap, metres: predictions are clipped to it, targets beyond it are left out.
        min_depth: metres.
        crop: ``"garg"``, ``"eigen"`` or ``(top, bottom, left, right)`` as fractions.
        mask: bool, True takes part.
        pooling: of several images: ``"image"`` (mean of the images' metrics) or ``"pixel"``.
        backend: ``"torch"`` computes on the tensors' device; ``"auto"`` does so for an accelerator's.

    Returns:
        ``abs_rel``, ``sq_rel``, ``rmse`` (m), ``rmse_log``, ``silog`` (x 100), ``log10``, ``irmse`` (1/km),
        ``mae`` (m), ``d1 d2 d3`` (shares) and ``valid``. Without valid pixels NaN, and ``valid`` 0.

    Raises:
        ShapeError: different shapes.
        ConfigError: a cap or crop that makes no sense.
        NonFiniteError: the prediction is NaN at a valid pixel.

    Example:
        >>> found = metrics(np.array([[11.0, 20.0]]), np.array([[10.0, 0.0]]))
        >>> round(found["abs_rel"], 6), found["d1"], found["valid"]
        (0.1, 1.0, 1)
    """
    options: dict[str, Any] = {"max_depth": max_depth, "min_depth": min_depth, "crop": crop, "mask": mask}
    return pool(error_sums(prediction, target, backend=backend, **options), pooling)

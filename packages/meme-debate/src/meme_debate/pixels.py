"""A picture's pixels as CLIP takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NORMALIZE", "normalized_square"]

NORMALIZE = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
GRAY = 128  # stands in for a picture that is not there


def normalized_square(image: Any, size: int, normalize: str = "clip") -> NDArray[np.float32]:
    """Shorter side to ``size`` (bicubic), center square, normalized: float32 (3, size, size).

    Args:
        image: a PIL image in RGB; None gives a plain gray one.
        size: of the square.
        normalize: a key of :data:`NORMALIZE`.
    """
    from PIL import Image

    if image is None:
        image = Image.new("RGB", (size, size), (GRAY, GRAY, GRAY))
    width, height = image.size
    scale = size / min(width, height)
    long = max(size, int(max(width, height) * scale))
    target = (size, long) if width <= height else (long, size)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    square = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    mean, deviation = (np.array(each, np.float32) for each in NORMALIZE[normalize])
    return np.ascontiguousarray(((square - mean) / deviation).transpose(2, 0, 1), np.float32)

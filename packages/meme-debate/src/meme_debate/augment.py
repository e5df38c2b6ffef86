"""Random changes of the training pictures, as the authors make them (extra ``augment``: torchvision)."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from fusion_core.errors import require_extra
from fusion_core.images import read_image
from fusion_core.seeding import generator

from .meme import MAX_PIXELS

__all__ = ["RandAugment"]

CHANGES, MAGNITUDE = 2, 9


class RandAugment:
    """Two random changes of strength 9 to a picture; the same key gives the same changes.

    Args:
        seed: of all draws; the global stream is left as it is.

    Raises:
        MissingExtraError: torchvision is not installed.
    """

    def __init__(self, seed: int) -> None:
        transforms: Any = require_extra("torchvision.transforms", "augment", "meme-debate")
        self.seed = seed
        self._change = transforms.RandAugment(CHANGES, MAGNITUDE)

    def __call__(self, source: Any, *key: int | str) -> Image.Image | None:
        """The picture, changed; None (no picture) stays None.

        Args:
            source: whatever :func:`fusion_core.images.read_image` reads.
            *key: such as epoch and number of the meme.

        Raises:
            InputError: the picture cannot be read.
        """
        if source is None:
            return None
        image = Image.fromarray(read_image(source, max_pixels=MAX_PIXELS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.seed, "augment", *key).initial_seed())
            return self._change(image)

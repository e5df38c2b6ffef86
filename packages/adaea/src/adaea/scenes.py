"""Ten photographs as ten classes: which scene was this 32x32 crop cut from?

The test crops ship with the package, so that nothing is downloaded and no photograph library is needed. They
were made by :func:`make_scenes` from photographs inside the wheels of scikit-image and scikit-learn.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_core.errors import CheckpointError, InputError, require_extra
from fusion_core.seeding import rng

FOLDER = Path(__file__).parent / "checkpoints"
SCENES = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "ihc",
    "rocket",
    "retina",
    "motorcycle_left",
    "china",
    "flower",
)
CAPTIONS = (
    "astronaut",
    "cat",
    "coffee",
    "galaxies",
    "tissue",
    "rocket",
    "retina",
    "motorcycle",
    "temple",
    "flower",
)
SIZE = 32
_SHORT_SIDE = 160
_TRAIN_SHARE = 0.65


@lru_cache(maxsize=1)
def _shipped() -> tuple[Tensor, Tensor]:
    path = FOLDER / "scenes.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays["images"].copy()), torch.from_numpy(
                arrays["labels"].astype(np.int64)
            )
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; install the package again") from error


def load_scenes(limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The shipped test crops; every run of the demo takes its images from these.

    Args:
        limit: the first so many; None = all 600.

    Returns:
        Images ``(n, 3, 32, 32)`` float32 in [0, 1], on the grid of k/255; labels ``(n,)`` int64 into
        :data:`SCENES`.

    Raises:
        InputError: ``limit`` is below 1.
        CheckpointError: the file is not there.

    Example:
        >>> images, labels = load_scenes(20)
        >>> tuple(images.shape), labels.unique().numel()
        ((20, 3, 32, 32), 10)
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, wanted at least 1")
    images, labels = _shipped()
    return images[:limit].float() / 255, labels[:limit].clone()


def photographs() -> list[np.ndarray[Any, Any]]:
    """The ten photographs ``(height, width, 3)`` uint8, short side 160 pixels, in :data:`SCENES`' order.

    Raises:
        MissingExtraError: scikit-image, scikit-learn or a photograph of theirs is not installed.
    """
    from PIL import Image

    folders = [
        Path(str(require_extra("skimage", "demo", "adaea").__file__)).parent / "data",
        Path(str(require_extra("sklearn", "demo", "adaea").__file__)).parent / "datasets" / "images",
    ]
    found: list[np.ndarray[Any, Any]] = []
    for name in SCENES:
        files = [path for folder in folders for path in sorted(folder.glob(f"{name}.*"))]
        if not files:
            raise InputError(f"no photograph {name!r} in the installed scikit-image and scikit-learn")
        with Image.open(files[0]) as opened:
            picture = opened.convert("RGB")
        scale = _SHORT_SIDE / min(picture.size)
        size = (max(round(picture.width * scale), SIZE), max(round(picture.height * scale), SIZE))
        found.append(np.asarray(picture.resize(size, Image.Resampling.BICUBIC)))
    return found


def make_scenes(count: int, part: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cut random crops from the photographs: position, mirror image and the gain of each channel are drawn.

    The left 65 % of the columns serve training, the others testing, so no pixel is in both.

    Args:
        count: crops; the classes take turns.
        part: ``"train"`` (gain in [0.6, 1.4]) or ``"test"`` ([0.7, 1.3]).
        seed: of all draws.

    Returns:
        Images ``(count, 3, 32, 32)`` uint8 and labels ``(count,)`` int64.

    Raises:
        InputError: another part.
        MissingExtraError: the photographs' packages are not installed.
    """
    if part not in ("train", "test"):
        raise InputError(f"part is {part!r}, wanted 'train' or 'test'")
    reach = 0.4 if part == "train" else 0.3
    draw = rng(seed, "scenes", part)
    areas: list[np.ndarray[Any, Any]] = []
    for picture in photographs():
        edge = int(_TRAIN_SHARE * picture.shape[1])
        areas.append(picture[:, :edge] if part == "train" else picture[:, edge:])
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    labels = np.arange(count) % len(SCENES)
    for i, label in enumerate(labels):
        area = areas[label]
        top = draw.integers(0, area.shape[0] - SIZE + 1)
        left = draw.integers(0, area.shape[1] - SIZE + 1)
        crop = area[top : top + SIZE, left : left + SIZE].astype(np.float64)
        crop = crop[:, ::-1] if draw.random() < 0.5 else crop
        gained = np.clip(crop * draw.uniform(1 - reach, 1 + reach, 3), 0, 255)
        images[i] = np.round(gained).astype(np.uint8).transpose(2, 0, 1)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))

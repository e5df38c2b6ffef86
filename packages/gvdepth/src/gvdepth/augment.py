"""Geometric and photometric augmentation; the camera follows every step (section 2.7).

A view is a crop, resized, perhaps mirrored: ``[x0, y0, w, h, new_w, new_h, hflip]``. Metric depth does not
change
under any of them: only pixels move. Every draw comes from a generator that the caller names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fusion_core.images import to_tensor
from gvdepth.camera import Camera, rotation_homography
from gvdepth.config import AugmentConfig
from gvdepth.data.base import Sample

View = tuple[float, float, float, float, int, int, int]
_SMOOTH = 1.15  # neighbours whose depths differ by less lie on one surface
_MULTIPLE = 2


@dataclass(frozen=True, slots=True)
class Augmented:
    """What the network gets of one view.

    Args:
        pixel_values: (3, h, w) RGB in [0, 1].
        camera: (7,), angles in radians.
        labels: (h, w) metres, 0 where unknown.
        view: (7,), see :data:`View`.
    """

    pixel_values: Tensor
    camera: Tensor
    labels: Tensor
    view: Tensor


def view_camera(camera: Camera, view: View) -> Camera:
    """The camera of a view: crop, resize, mirror."""
    x0, y0, width, height, new_width, new_height, flip = view
    # A camera's size is whole; a crop's need not be, so crop and resize are done in one step.
    sx, sy = new_width / width, new_height / height
    moved = camera.computed(
        fx=camera.fx * sx,
        fy=camera.fy * sy,
        cx=(camera.cx - x0 + 0.5) * sx - 0.5,
        cy=(camera.cy - y0 + 0.5) * sy - 0.5,
        width=new_width,
        height=new_height,
    )
    return moved.flip() if flip else moved


def resize_image(image: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    """The pixels of a view: bilinear, averaging where it shrinks."""
    x0, y0, width, height, new_width, new_height, flip = view
    box = (x0, y0, x0 + width, y0 + height)
    found = np.asarray(
        Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR, box=box)
    )
    return found[:, ::-1] if flip else found


def _places(
    start: float, length: float, new: int, last: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    place = ((np.arange(new) + 0.5) * (length / new) + start - 0.5).clip(0, last)
    low = np.minimum(np.floor(place).astype(np.int64), max(last - 1, 0))
    return low, place - low


def resize_depth(depth: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    """The depth of a view at its pixels' centres.

    Between four known neighbours on one surface the INVERSE depth is interpolated, which is exact on planes;
    elsewhere the nearest pixel is taken, so that no depth between two objects is invented and sparse maps
    stay
    sparse.

    Args:
        depth: (H, W) metres, 0 where unknown.
        view: the crop, resized, perhaps mirrored.

    Returns:
        (new_h, new_w) metres, 0 where unknown.
    """
    x0, y0, width, height, new_width, new_height, flip = view
    left, a = _places(x0, width, new_width, depth.shape[1] - 1)
    top, b = _places(y0, height, new_height, depth.shape[0] - 1)
    right, bottom = np.minimum(left + 1, depth.shape[1] - 1), np.minimum(top + 1, depth.shape[0] - 1)
    corners = np.stack([depth[np.ix_(r, c)] for r in (top, bottom) for c in (left, right)])
    low, high = corners.min(0), corners.max(0)
    smooth = (low > 0) & (high < _SMOOTH * low)
    inverse = 1.0 / np.where(smooth, corners, 1.0)
    upper = inverse[0] * (1 - a) + inverse[1] * a
    lower = inverse[2] * (1 - a) + inverse[3] * a
    between = 1.0 / (upper * (1 - b[:, None]) + lower * b[:, None])
    rows, columns = np.where(b < 0.5, top, bottom), np.where(a < 0.5, left, right)
    found = np.where(smooth, between, depth[np.ix_(rows, columns)]).astype(np.float32)
    return np.ascontiguousarray(found[:, ::-1]) if flip else found


def turn(sample: Sample, pitch_deg: float, roll_deg: float) -> Sample:
    """The sample as if the camera had been turned in place: image and depth warped by ``K R K^-1``.

    Args:
        sample: the picture.
        pitch_deg: degrees, > 0 looks further up.
        roll_deg: degrees, > 0 dips the right side.

    Returns:
        The same size; pixels that were not seen are black, their depth unknown.
    """
    camera = sample.camera.rotate(pitch_deg, roll_deg)
    homography = rotation_homography(sample.camera, camera)
    rows, columns = sample.depth.shape
    u, v = np.arange(columns, dtype=np.float64), np.arange(rows, dtype=np.float64)[:, None]
    x, y, w = (homography[i, 0] * u + homography[i, 1] * v + homography[i, 2] for i in range(3))
    ahead = w > 1e-6
    safe = np.where(ahead, w, 1.0)
    x, y = x / safe, y / safe
    inside = ahead & (x >= -0.5) & (x <= columns - 0.5) & (y >= -0.5) & (y <= rows - 0.5)
    grid = torch.from_numpy(np.stack([2 * (x + 0.5) / columns - 1, 2 * (y + 0.5) / rows - 1], -1)).float()
    picture = torch.nn.functional.grid_sample(
        to_tensor(sample.image)[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    image = (picture.mul(255).round().byte().permute(1, 2, 0).numpy()) * inside[..., None]
    row = np.clip(np.rint(y), 0, rows - 1).astype(np.int64)
    column = np.clip(np.rint(x), 0, columns - 1).astype(np.int64)
    # The same point, seen along the turned axis: its depth is the old one over w.
    depth = np.where(inside, sample.depth[row, column] / safe, 0.0).astype(np.float32)
    return Sample(image.astype(np.uint8), depth, depth > 0, camera, sample.id)


def color_jitter(image: Tensor, strength: float, draws: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation by factors in [1 - strength, 1 + strength].

    Args:
        image: (3, h, w) in [0, 1].
        strength: in [0, 1].
        draws: where the factors come from.
    """
    if strength == 0:
        return image
    brightness, contrast, saturation = draws.uniform(1 - strength, 1 + strength, 3)
    image = image * brightness
    mean = image.mean()
    image = (image - mean) * contrast + mean
    gray = image.mean(0, keepdim=True)
    return (gray + (image - gray) * saturation).clamp(0.0, 1.0)


def draw_size(config: AugmentConfig, aspect: float, draws: np.random.Generator) -> tuple[int, int]:
    """``(height, width)`` of the views of one step, even numbers of pixels.

    Args:
        config: ``size``, or the range of heights.
        aspect: width over height of the images.
        draws: one stream per step, the same on every rank.
    """
    if config.size is not None:
        return config.size
    height = int(draws.integers(config.min_height, config.max_height + 1))
    return _even(height), _even(height * aspect)


def _even(length: float) -> int:
    return max(_MULTIPLE, round(length / _MULTIPLE) * _MULTIPLE)


def draw_view(
    size: tuple[int, int], new: tuple[int, int], config: AugmentConfig, draws: np.random.Generator
) -> View:
    """A random crop with free offset, resized to ``new``.

    Args:
        size: ``(height, width)`` of the image.
        new: ``(height, width)`` of the view; the crop's aspect is the view's, times the jitter.
        config: areas, jitter, flip.
        draws: of this sample.
    """
    height, width = size
    aspect = new[1] / new[0]
    if not config.keep_aspect:
        aspect *= math.exp(draws.uniform(-1, 1) * math.log1p(config.aspect_jitter))
    share = draws.uniform(*config.crop_area)
    wide = min(math.sqrt(share * height * width * aspect), width, height * aspect)
    tall = wide / aspect
    x0, y0 = draws.uniform(0, width - wide), draws.uniform(0, height - tall)
    flip = int(draws.random() < config.flip)
    return (x0, y0, wide, tall, new[1], new[0], flip)


def augment(
    sample: Sample, new: tuple[int, int], config: AugmentConfig, draws: np.random.Generator
) -> Augmented:
    """One random view of a sample.

    Args:
        sample: the picture.
        new: ``(height, width)`` of the view.
        config: what is drawn, and how far.
        draws: of this sample and view.

    Returns:
        Tensors; the camera is that of the view, with the calibration noise on it.
    """
    if config.pitch_deg or config.roll_deg:
        pitch = draws.uniform(-config.pitch_deg, config.pitch_deg) if config.pitch_deg else 0.0
        roll = draws.uniform(-config.roll_deg, config.roll_deg) if config.roll_deg else 0.0
        sample = turn(sample, pitch, roll)
    view = draw_view(sample.image.shape[:2], new, config, draws)
    return apply(sample, view, config, draws)


def apply(sample: Sample, view: View, config: AugmentConfig, draws: np.random.Generator) -> Augmented:
    """The tensors of a given view, with colour jitter and calibration noise."""
    image = color_jitter(to_tensor(resize_image(sample.image, view)), config.color, draws)
    camera = view_camera(sample.camera, view).tensor()
    noise = draws.normal(size=2)
    camera[4] *= 1.0 + config.noise_height * float(np.clip(noise[0], -3, 3))
    camera[5] += math.radians(config.noise_pitch_deg * float(np.clip(noise[1], -3, 3)))
    labels = torch.from_numpy(resize_depth(sample.depth, view))
    return Augmented(image, camera, labels, torch.tensor(view, dtype=torch.float64))


def collate(items: list[Any]) -> dict[str, Tensor]:
    """Views of one size as a batch: ``pixel_values``, ``camera``, ``labels``, ``view``."""
    names = ("pixel_values", "camera", "labels", "view")
    return {name: torch.stack([getattr(item, name) for item in items]) for name in names}

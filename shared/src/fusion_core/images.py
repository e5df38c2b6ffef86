"""Images of any origin as one kind of array, and arrays as PNG files, by Pillow (extra ``image``)."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fusion_core.atomic import PathLike, atomic_write, is_file
from fusion_core.errors import DataError, InputError, NonFiniteError, ShapeError, require_extra

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""What :func:`list_images` takes for an image, in lower case."""

Array = np.ndarray[Any, Any]


def read_image(source: Any, *, max_pixels: int = 200_000_000, exif: bool = True) -> Array:
    """Read one image, whatever holds it.

    Gray becomes RGB, an alpha channel is dropped, 16 bits are divided by 257, floats in [0, 1] multiplied by
    255. Of an animation the first frame is taken.

    Args:
        source: a path, the bytes of a file, a PIL image, an array ``(height, width[, 1 | 3 | 4])`` in RGB
            order, or a tensor ``(1 | 3 | 4, height, width)`` or ``(height, width)``; arrays and tensors are
            uint8, uint16, bool, or floats in [0, 1].
        max_pixels: refuse larger images before they are decoded.
        exif: turn the picture as its EXIF orientation says.

    Returns:
        ``(height, width, 3)`` uint8, RGB, contiguous; never a view of ``source``.

    Raises:
        InputError: no such file, no image, a cut file, too many pixels, or a type of another kind.
        ShapeError: an array or tensor of another shape, or empty.
        DataError: values outside the range, or another dtype.
        NonFiniteError: NaN or infinity.

    Example:
        >>> read_image(np.zeros((2, 5), np.uint8)).shape
        (2, 5, 3)
    """
    if isinstance(source, str | os.PathLike):
        path = Path(cast("PathLike", source))
        if not is_file(path):
            there = os.path.isdir(path)  # noqa: PTH112 - as in is_file
            raise InputError(f"image {str(path)!r} is {'a folder' if there else 'not there'}")
        return _decode(path, f"image {str(path)!r}", max_pixels, exif)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(bytes(source)), f"image of {len(source)} bytes", max_pixels, exif)
    if isinstance(source, Tensor):
        array = source.detach().to("cpu")
        array = (array.float() if array.dtype in (torch.bfloat16, torch.float16) else array).numpy()
        if array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
        return _from_array(array, "image tensor", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, "image array", max_pixels)
    if hasattr(source, "getbands") and hasattr(source, "convert"):
        return _from_pil(source, "PIL image", max_pixels, exif)
    raise InputError(
        f"image is a {type(source).__name__}, wanted a path, bytes, a PIL image, an array or a tensor"
    )


def _decode(file: Path | io.BytesIO, name: str, max_pixels: int, exif: bool) -> Array:
    image_module = require_extra("PIL.Image", "image", "fusion-core")
    try:
        with warnings.catch_warnings():  # the limit is ours, and a broken file is an error or it is not
            warnings.simplefilter("ignore")
            with image_module.open(file) as image:
                return _from_pil(image, name, max_pixels, exif)
    except image_module.DecompressionBombError as error:
        raise InputError(f"{name} is larger than max_pixels={max_pixels}") from error
    except InputError:
        raise
    except image_module.UnidentifiedImageError as error:
        raise InputError(f"{name} is no image that can be read") from error
    except Exception as error:
        raise InputError(f"{name} is broken or cut off: {error}") from error


def _from_pil(image: Any, name: str, max_pixels: int, exif: bool) -> Array:
    width, height = image.size
    _check_size(height, width, name, max_pixels)
    if exif:
        image = require_extra("PIL.ImageOps", "image", "fusion-core").exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _from_array(np.asarray(image).astype(np.uint16), name, max_pixels)
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        deep = image.mode == "I" and values.size > 0 and values.min() >= 0 and values.max() <= 65535
        return _from_array(values.astype(np.uint16) if deep else values, name, max_pixels)
    if image.mode in ("LA", "PA", "La"):
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ShapeError(f"{name} is empty ({height} x {width})")
    if height * width > max_pixels:
        raise InputError(f"{name} has {height} x {width} pixels, more than max_pixels={max_pixels}")


def _from_array(array: Array, name: str, max_pixels: int) -> Array:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise ShapeError(
            f"{name} has shape {array.shape}, wanted height, width and 1, 3 or 4 channels "
            "(last in an array, first in a tensor)"
        )
    _check_size(array.shape[0], array.shape[1], name, max_pixels)
    array = array[..., :3]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise NonFiniteError(f"{name} holds NaN or infinity")
        low, high = float(array.min()), float(array.max())
        if low < 0 or high > 1:
            raise DataError(f"{name} has floats from {low:g} to {high:g}, wanted [0, 1]; divide by 255?")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise DataError(f"{name} has dtype {array.dtype}, wanted uint8, uint16, bool or floats in [0, 1]")
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), order="C")


def list_images(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    """The image files that paths name: files as they are, folders as the images below them, sorted.

    Args:
        paths: one path or several.

    Returns:
        Each file once, in the order of the arguments.

    Raises:
        InputError: a path that is not there, or a folder without images.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: dict[Path, None] = {}
    for path in map(Path, several):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise InputError(f"folder {str(path)!r} holds no image ({', '.join(SUFFIXES)})")
            found.update(dict.fromkeys(inside))
        elif path.is_file():
            found[path] = None
        else:
            raise InputError(f"image {str(path)!r} is not there")
    return list(found)


def to_tensor(image: Array) -> Tensor:
    """An image as a network takes it.

    Args:
        image: ``(height, width, channels)`` uint8.

    Returns:
        ``(channels, height, width)`` float32 in [0, 1], contiguous.

    Example:
        >>> to_tensor(np.full((1, 1, 3), 255, np.uint8)).flatten()
        tensor([1., 1., 1.])
    """
    if image.ndim != 3 or image.dtype != np.uint8:
        raise ShapeError(
            f"image is {image.dtype} of shape {image.shape}, wanted uint8 (height, width, channels)"
        )
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0))).float().div_(255)


def save_png(path: PathLike, image: Array) -> Path:
    """Write a PNG, whole or not at all.

    Args:
        path: the file; its suffix is not changed.
        image: uint8 ``(height, width[, 1 | 3 | 4])``, or uint16 ``(height, width)`` for 16-bit gray.

    Returns:
        The path.

    Raises:
        ShapeError: another shape or dtype.
        InputError: the place cannot be written.
    """
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    deep = image.dtype == np.uint16 and image.ndim == 2
    flat = image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4)))
    if not (deep or flat) or image.size == 0:
        raise ShapeError(
            f"image is {image.dtype} of shape {image.shape}, wanted uint8 gray, RGB or RGBA, or uint16 gray"
        )
    picture = require_extra("PIL.Image", "image", "fusion-core").fromarray(np.ascontiguousarray(image))
    with atomic_write(path) as file:
        picture.save(file, format="PNG")
    return Path(path)

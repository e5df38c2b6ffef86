"""Labelled images from loaders, folders (``labels.csv`` or one folder per class) and files."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fusion_core.checkpoint import load_tensors
from fusion_core.errors import DataError, InputError, ShapeError, check_finite, check_shape, reading

PathLike = str | os.PathLike[str]
_LARGEST_LABEL = 2**31 - 1
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")


def load_data(source: Any, limit: int | None = None, *, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels from whatever holds them.

    Args:
        source: ``(images, labels)``, a ``DataLoader`` or other iterable of such batches, ``"zoo:scenes"``, an
            ``.npz`` or ``.safetensors`` file with ``images`` and ``labels``, or a folder with ``labels.csv``
            (filename, label) or one subfolder per class (classes are numbered in the order of their names).
        limit: the first so many; None = all.
        size: resize image files to squares of so many pixels.

    Returns:
        Images ``(n, channels, height, width)`` float in [0, 1], uint8 divided by 255; labels int64 ``(n,)``.

    Raises:
        InputError: a source of none of these kinds, no images, or ``limit`` below 1.
        DataError: labels that are no integers, or values outside [0, 1].
        ShapeError: not NCHW, or lengths that differ.
        NonFiniteError: NaN or infinity in the images.

    Example:
        >>> images, labels = load_data("zoo:scenes", limit=4)
        >>> images.shape, labels.tolist()
        (torch.Size([4, 3, 32, 32]), [0, 1, 2, 3])
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, wanted at least 1")
    if isinstance(source, str | os.PathLike):
        name = os.fspath(cast("PathLike", source))
        images, labels = _from_path(name, limit, size)
        with reading(name, error=DataError):
            return checked(images[:limit], labels[:limit])
    elif (
        isinstance(source, tuple | list)
        and len(cast("tuple[Any, ...]", source)) == 2
        and _is_array(source[0])
    ):
        images, labels = _tensor(source[0]), _tensor(source[1])
    elif hasattr(source, "__iter__"):
        images, labels = _from_batches(cast("Iterable[Any]", source), limit)
    else:
        raise InputError(
            f"data is a {type(source).__name__}, wanted (images, labels), a loader, a folder or a file"
        )
    return checked(images[:limit], labels[:limit])


def checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images as floats in [0, 1] and labels as int64, or an error that says what is wrong with them.

    Raises:
        InputError: no images.
        DataError: labels that are no integers or negative, or values outside [0, 1].
        ShapeError: not NCHW, or lengths that differ.
        NonFiniteError: NaN or infinity.
    """
    count = check_shape("images", images, "images channels height width")["images"]
    if images.dtype is torch.uint8:
        images = images.float() / 255
    if not images.is_floating_point():
        raise DataError(f"images are {images.dtype}, wanted floats in [0, 1] or uint8")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise DataError(f"labels are {labels.dtype}, wanted class indices of an integer type")
    if tuple(labels.shape) != (count,):
        raise ShapeError(f"labels has shape {tuple(labels.shape)}, wanted ({count},), one per image")
    if not count:
        raise InputError("data holds no images")
    check_finite("images", images)
    low, high = float(images.min()), float(images.max())
    if low < -1e-6 or high > 1 + 1e-6:
        raise DataError(
            f"images lie in [{low:g}, {high:g}], wanted [0, 1]; pass un-normalized images, give mean and std "
            "to the model (load_model(..., mean=, std=) or adaea.wrappers.Normalized)"
        )
    labels = labels.detach().long()
    if int(labels.min()) < 0:
        raise DataError(f"labels holds {int(labels.min())}, wanted class indices >= 0")
    return images.detach(), labels


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def _from_batches(batches: Iterable[Any], limit: int | None) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    have = 0
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(cast("tuple[Any, ...]", batch)) < 2:
            raise InputError(f"data gave a {type(batch).__name__}, wanted batches (images, labels)")
        images.append(_tensor(batch[0]))
        labels.append(_tensor(batch[1]))
        have += len(images[-1])
        if limit is not None and have >= limit:
            break
    if not images:
        raise InputError("data holds no images")
    return torch.cat(images), torch.cat(labels)


def _from_path(source: str, limit: int | None, size: int | None) -> tuple[Tensor, Tensor]:
    if source == "zoo:scenes":
        from adaea.scenes import load_scenes

        return load_scenes(limit)
    path = Path(source)
    if path.is_dir():
        images, labels, _, _ = read_labelled(path, limit, size)
        return images, labels
    if path.suffix == ".npz" and path.is_file():
        names = ("images", "labels")
        with reading(path, error=DataError), np.load(path, allow_pickle=False) as arrays:
            if missing := [name for name in names if name not in arrays]:
                raise DataError(f"{path} lacks {missing[0]!r}; wanted the arrays images and labels")
            images, labels = (torch.from_numpy(arrays[name]) for name in names)
        return images, labels
    if path.suffix == ".safetensors":
        tensors = load_tensors(path)
        names = ("images", "labels") if "images" in tensors else ("clean", "label")
        if missing := [name for name in names if name not in tensors]:
            raise DataError(
                f"{path} lacks {missing[0]!r}; wanted images and labels, or a set with clean images"
            )
        return tensors[names[0]], tensors[names[1]]
    raise InputError(
        f"data is {source!r}, wanted a folder of images, an .npz or .safetensors file, or zoo:scenes"
    )


def read_labelled(
    folder: Path, limit: int | None = None, size: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None, list[str]]:
    """The images of a folder: float32 NCHW, labels, targets if there are any, and file names.

    Raises:
        DataError: no images, a file that cannot be read, sizes that differ, or a bad ``labels.csv``.
    """
    targets: list[int] = []
    if (folder / "labels.csv").is_file():
        rows = _csv(folder / "labels.csv")[:limit]
        files = [(row["filename"], _whole(row, "label", folder)) for row in rows]
        if rows and rows[0].get("targeted_label") not in (None, ""):
            targets = [_whole(row, "targeted_label", folder) for row in rows]
    else:
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        files = [
            (f"{name}/{path.name}", label)
            for label, name in enumerate(classes)
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in _SUFFIXES
        ]
        if limit is not None and classes:  # the first images of every class, not of the first class
            files = _in_turn(files, len(classes))[:limit]
    if not files:
        raise DataError(f"{folder} holds no images; wanted labels.csv, or one folder of images per class")
    arrays = [_read(folder / name, size) for name, _ in files]
    odd = next((i for i, array in enumerate(arrays) if array.shape != arrays[0].shape), None)
    if odd is not None:
        (height, width, channels), (rows_odd, columns, planes) = arrays[0].shape, arrays[odd].shape
        same = (height, width) == (rows_odd, columns)
        kinds = (f"{channels} channels", f"{planes} channels; wanted all gray or all in color")
        sizes = (f"{width}x{height} pixels", f"{columns}x{rows_odd}; pass size=, --size")
        first, other = kinds if same else sizes
        raise DataError(f"{folder}: {files[0][0]} has {first}, {files[odd][0]} {other}")
    stacked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    wanted = torch.tensor(targets) if targets else None
    return (
        stacked.contiguous(),
        torch.tensor([label for _, label in files]),
        wanted,
        [name for name, _ in files],
    )


def _in_turn(files: list[tuple[str, int]], classes: int) -> list[tuple[str, int]]:
    queues = [[entry for entry in files if entry[1] == label] for label in range(classes)]
    longest = max(map(len, queues))
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


def _csv(path: Path) -> list[dict[str, str]]:
    with reading(path, error=DataError), path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"filename", "label"} <= rows[0].keys():
        raise DataError(f"{path} has the columns {str(list(rows[0]))[:200]}, wanted filename and label")
    if nameless := [number for number, row in enumerate(rows, 2) if not row["filename"]]:
        raise DataError(f"{path}, line {nameless[0]}: no filename")
    return rows


def _whole(row: dict[str, str], key: str, folder: Path) -> int:
    try:
        found = int(row[key])
    except (ValueError, TypeError):
        found = -1
    if not 0 <= found <= _LARGEST_LABEL:
        wanted = f"wanted 0 to {_LARGEST_LABEL}"
        raise DataError(f"{folder / 'labels.csv'}: {key} of {row['filename']} is {row[key]!r:.100}, {wanted}")
    return found


def _read(path: Path, size: int | None) -> Any:
    from PIL import Image

    with reading(path, "cannot be read as an image", DataError), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as opened:
            picture = opened if opened.mode in ("L", "RGB") else opened.convert("RGB")
            if size is not None and picture.size != (size, size):
                picture = picture.resize((size, size), Image.Resampling.BICUBIC)
            array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array

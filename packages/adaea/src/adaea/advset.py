"""Adversarial images kept with what they were made from: one safetensors file, or a folder of PNG files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaea.quantize import to_uint8
from fusion_core.checkpoint import (
    ShardReader,
    atomic_directory,
    atomic_write,
    digest,
    load_tensors,
    save_tensors,
)
from fusion_core.errors import (
    LARGEST,
    CheckpointError,
    DataError,
    InputError,
    ShapeError,
    check_shape,
    reading,
)
from fusion_core.results import dump_json, plain

SCHEMA = "adaea.set/1"
PathLike = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class AdversarialSet:
    """Adversarial images of one attack, with labels and the record of how they were made.

    Args:
        adversarial: ``(images, channels, height, width)`` floats in [0, 1].
        labels: the true classes, int64 ``(images,)``.
        clean: the images before, of the same shape; needed for PNG files.
        targets: classes that a targeted attack wanted, int64 ``(images,)``.
        index: row of each image in the data it was taken from; 0, 1, ... by default.
        info: attack, config, eps, norm, surrogates, versions; JSON values.

    Raises:
        ShapeError: lengths or shapes that do not fit.

    Example:
        >>> import tempfile
        >>> x = torch.full((2, 3, 8, 8), 0.5)
        >>> made = AdversarialSet(x + 0.02, torch.tensor([0, 1]), clean=x, info={"eps": 8 / 255})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made.save(f"{folder}/set.safetensors")
        ...     AdversarialSet.load(f"{folder}/set.safetensors").digest() == made.digest()
        True
    """

    adversarial: Tensor
    labels: Tensor
    clean: Tensor | None = None
    targets: Tensor | None = None
    index: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        count = check_shape("adversarial", self.adversarial, "images channels height width")["images"]
        for name in ("labels", "targets", "index"):
            vector = getattr(self, name)
            if vector is not None:
                check_shape(name, vector, "images", images=count)
        if self.clean is not None and self.clean.shape != self.adversarial.shape:
            raise ShapeError(
                f"clean has shape {tuple(self.clean.shape)}, wanted {tuple(self.adversarial.shape)}"
            )
        if "eps" in self.info:
            _radius(self.info["eps"])

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = tuple(self.adversarial.shape)
        return f"AdversarialSet({shape}, attack={self.info.get('attack')!r}, eps={self.info.get('eps')!r})"

    @property
    def eps(self) -> float:
        """Radius of the budget, in units of [0, 1].

        Raises:
            DataError: the record lacks it.
        """
        if "eps" not in self.info:
            raise DataError("the set does not say its eps; give info={'eps': ...}")
        return _radius(self.info["eps"])

    @property
    def norm(self) -> str:
        """Norm of the budget, linf unless the record says otherwise."""
        return str(self.info.get("norm", "linf"))

    def digest(self) -> str:
        """Sha256 of the images, labels, targets and row numbers; the record is not part of it."""
        return digest(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        index = torch.arange(len(self)) if self.index is None else self.index
        found = {"adv": self.adversarial, "label": self.labels.long(), "index": index.long()}
        if self.clean is not None:
            found["clean"] = self.clean
        if self.targets is not None:
            found["target"] = self.targets.long()
        return {key: value.detach().cpu() for key, value in found.items()}

    def rounded(self) -> AdversarialSet:
        """The same images on the grid of k/255, inside the budget, as PNG files hold them.

        Raises:
            DataError: the set has no clean images or no eps.
        """
        images, outside = self.to_uint8()
        info = {**self.info, "rounded": True, "values_without_byte": outside}
        exact = images.to(self.adversarial.dtype) / 255
        return AdversarialSet(exact, self.labels, self.clean, self.targets, self.index, info)

    def to_uint8(self) -> tuple[Tensor, int]:
        """The images as bytes, and how many values have no byte inside the budget.

        Raises:
            DataError: the set has no clean images or no eps.
        """
        if self.clean is None:
            raise DataError(
                "the set has no clean images, without which it cannot be rounded inside the budget"
            )
        return to_uint8(self.adversarial, self.clean, self.eps, norm="l2" if self.norm == "l2" else "linf")

    def save(self, path: PathLike, *, overwrite: bool = False) -> None:
        """Write the set, whole or not at all.

        Args:
            path: ``NAME.safetensors`` (with a readable ``NAME.json`` beside it), or a new folder for PNG
                files and ``labels.csv`` (filename, label, targeted_label) as TransferAttack reads them.
            overwrite: replace a folder that holds a set; a file is replaced in any case.

        Raises:
            InputError: another suffix, or a folder that holds something, with ``overwrite`` else than a set.
            DataError: PNG files without clean images, or not 1 or 3 channels.
        """
        target = Path(path)
        if target.suffix == ".safetensors":
            tensors = self._tensors()
            record = self._record(digest(tensors))
            with atomic_write(target.with_suffix(".json"), "w") as file:
                file.write(dump_json(record))
            save_tensors(target, tensors, {"adaea": json.dumps(record)})
        elif target.suffix == "":
            self._save_png(target, overwrite and is_png_set(target))
        else:
            raise InputError(f"path is {path}, wanted NAME.safetensors or a folder without suffix")

    def _record(self, checked: str) -> dict[str, Any]:
        head = {"schema": SCHEMA, "images": len(self), "digest": checked}
        return {**head, "info": plain(dict(self.info))}

    def _save_png(self, folder: Path, overwrite: bool) -> None:
        from PIL import Image

        images, outside = self.to_uint8()
        channels = images.shape[1]
        if channels not in (1, 3):
            raise DataError(f"adversarial has {channels} channels, PNG files take 1 or 3")
        index = self._tensors()["index"].tolist()
        heads = ["filename", "label"] + (["targeted_label"] if self.targets is not None else [])
        with atomic_directory(folder, overwrite=overwrite) as place:
            lines = io.StringIO()
            writer = csv.writer(lines, lineterminator="\n")
            writer.writerow(heads)
            for i, image in enumerate(images.cpu().numpy()):
                name = f"{index[i]:06d}.png"
                pixels = image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
                Image.fromarray(pixels).save(place / name)
                row = [name, int(self.labels[i])]
                writer.writerow(row if self.targets is None else [*row, int(self.targets[i])])
            (place / "labels.csv").write_text(lines.getvalue(), encoding="utf-8")
            kept = images.cpu()
            record = self._record(digest({"adv": kept, "label": self.labels.long().cpu()}))
            record["values_without_byte"] = outside
            (place / "set.json").write_text(dump_json(record), encoding="utf-8")

    @classmethod
    def load(cls, path: PathLike) -> AdversarialSet:
        """Read a set and compare it with its digest.

        Args:
            path: ``NAME.safetensors`` or a folder of PNG files with ``labels.csv`` (others' folders, too).

        Raises:
            CheckpointError: missing, damaged or changed.
            DataError: a folder whose files do not fit ``labels.csv``.
        """
        source = Path(path)
        if source.is_dir():
            return _load_png(source)
        with reading(source, "is no adversarial set of adaea", CheckpointError):
            record = json.loads(ShardReader(source).metadata["adaea"])
            tensors = load_tensors(source)
            if digest(tensors) != record["digest"]:
                raise CheckpointError(f"{path} does not have the digest it was saved with")
            return cls(
                tensors["adv"],
                tensors["label"],
                tensors.get("clean"),
                tensors.get("target"),
                tensors["index"],
                _mapping(record["info"]),
            )


def _mapping(info: Any) -> dict[str, Any]:
    if not isinstance(info, dict):
        raise CheckpointError(f"its record is a {type(info).__name__}, wanted settings by name")
    if "eps" in info:
        _radius(info["eps"])
    return info


def _radius(eps: Any) -> float:
    known = isinstance(eps, int | float | np.number) and not isinstance(eps, bool)
    radius = float(eps) if known else float("nan")
    if not 0 <= radius <= LARGEST:
        raise DataError(f"the set's eps is {eps!r}, wanted a number >= 0 such as 8/255")
    return radius


def is_png_set(folder: Path) -> bool:
    """Whether a folder holds what :meth:`AdversarialSet.save` writes there."""
    return (folder / "set.json").is_file() and (folder / "labels.csv").is_file()


def _load_png(folder: Path) -> AdversarialSet:
    from adaea.images import read_labelled

    images, labels, targets, names = read_labelled(folder)
    index = [int(Path(name).stem) if Path(name).stem.isdecimal() else i for i, name in enumerate(names)]
    info: dict[str, Any] = {"rounded": True}
    if (folder / "set.json").is_file():
        with reading(folder / "set.json", "is damaged", CheckpointError):
            record = json.loads((folder / "set.json").read_text("utf-8"))
            info |= _mapping(record["info"])
            checked = record["digest"]
        bytes_ = (images * 255).round().to(torch.uint8)
        if digest({"adv": bytes_, "label": labels}) != checked:
            raise CheckpointError(f"{folder} does not have the digest it was saved with")
    return AdversarialSet(images, labels, None, targets, torch.tensor(index), info)

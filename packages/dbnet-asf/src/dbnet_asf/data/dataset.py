"""Data sets of annotated pictures, and the training set that augments, labels and normalizes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dbnet_asf.config import AugmentConfig, DBConfig, LabelConfig
from dbnet_asf.geometry import Array
from dbnet_asf.targets import Targets, make_targets
from fusion_core.atomic import PathLike, is_file
from fusion_core.errors import InputError, reading
from fusion_core.images import SUFFIXES, read_image
from fusion_core.seeding import rng

from . import formats
from .augment import augment
from .formats import Sample, Words

UNFINISHED = ".partial"
"""The suffix of a file that marks a folder as one that is still being filled."""


class Example(NamedTuple):
    """An annotated picture that has been read.

    Attributes:
        image: uint8 RGB (height, width, 3).
        polygons: one (points, 2) outline a word, pixels.
        ignore: bool (words,), True = don't care.
        name: what it is called in reports.
    """

    image: Array
    polygons: list[Array]
    ignore: Array
    name: str


class TextDataset(Dataset[Example]):
    """Annotated pictures, read when they are asked for.

    Args:
        samples: the pictures.
        name: of the data set.

    Raises:
        InputError: no pictures.
    """

    def __init__(self, samples: Sequence[Sample], name: str = "") -> None:
        if not samples:
            raise InputError(f"data set {name!r} has no pictures")
        self.samples, self.name = list(samples), name

    def __len__(self) -> int:
        """How many pictures there are."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        """Read a picture.

        Raises:
            InputError: it cannot be read.
        """
        sample = self.samples[index]
        image = read_image(sample.image, exif=sample.exif)
        return Example(image, list(sample.polygons), sample.ignore, sample.image.name)

    def __iter__(self) -> Iterator[Example]:
        """The pictures in order."""
        return (self[index] for index in range(len(self)))

    def limit(self, count: int | None) -> TextDataset:
        """The first ``count`` pictures; all for None."""
        return TextDataset(self.samples[:count], self.name)


class Rendered(Dataset[Example]):
    """Synthetic scenes with known words, rendered when they are asked for.

    Args:
        count: how many.
        seed: of the series.
        size: side, or (height, width), in pixels.
        first: index of the first scene.
        options: ``photos``, ``backgrounds`` of :func:`dbnet_asf.data.synth.render`.

    Example:
        >>> len(Rendered(3, size=96))
        3
    """

    def __init__(
        self,
        count: int,
        seed: int = 0,
        size: int | Sequence[int] = 640,
        *,
        first: int = 0,
        **options: Any,
    ) -> None:
        if count < 1:
            raise InputError(f"count is {count!r}, wanted at least 1")
        self.count, self.seed, self.size, self.first, self.options = count, seed, size, first, options
        self.name = "rendered"

    def __len__(self) -> int:
        """How many scenes there are."""
        return self.count

    def __getitem__(self, index: int) -> Example:
        """Render a scene."""
        from .synth import render

        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = render(self.first + index, self.seed, self.size, **self.options)
        return Example(scene.image, scene.polygons, scene.ignore, f"scene-{self.first + index}")

    def __iter__(self) -> Iterator[Example]:
        """The scenes in order."""
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes the network's input and its labels.

    Attributes:
        crop: side of the square crops.
        labels: of the label maps.
        augment: of the augmentation.
        network: mean, std and color order are used.
        seed: of the augmentation.
    """

    crop: int = 640
    labels: LabelConfig = dataclasses.field(default_factory=LabelConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    network: DBConfig = dataclasses.field(default_factory=DBConfig)
    seed: int = 0


class TrainingSet(Dataset[tuple[Tensor, Targets]]):
    """Augmented crops with their label maps.

    The augmentation of a picture depends on seed, epoch and index only, so it is the same for any number of
    workers and processes, and no epoch repeats another.

    Args:
        examples: a data set of :class:`Example`.
        preparation: how they are prepared.
    """

    def __init__(self, examples: Any, preparation: Preparation | None = None) -> None:
        self.examples, self.preparation, self.epoch = examples, preparation or Preparation(), 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, other draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        """As many as pictures."""
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Targets]:
        """A normalized crop float32 (3, crop, crop) and its targets."""
        how = self.preparation
        image, polygons, ignore, _ = self.examples[index]
        random = rng(how.seed, "augment", self.epoch, index)
        image, polygons, ignore = augment(random, image, polygons, ignore, size=how.crop, config=how.augment)
        targets = make_targets(polygons, ignore, (how.crop, how.crop), how.labels)
        return normalize(image, how.network), targets

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, Targets]]) -> tuple[Tensor, Targets]:
        """A batch: images (batch, 3, height, width) and stacked targets."""
        return torch.stack([image for image, _ in items]), Targets.stack([targets for _, targets in items])


def normalize(image: Array, config: DBConfig) -> Tensor:
    """A uint8 RGB image as the network takes it: its color order, less its mean, over its std."""
    pixels = image[..., ::-1] if config.color == "bgr" else image
    values = (pixels.astype(np.float32) - np.array(config.mean, np.float32)) / np.array(
        config.std, np.float32
    )
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _pictures(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"folder {str(folder)!r} holds no pictures")
    return found


def _folders(root: PathLike, labels: PathLike | None) -> tuple[Path, Path]:
    """Where pictures and annotations are: as said, ``*_images`` beside ``*_gts``, or one folder."""
    base = Path(root)
    if not base.is_dir():
        raise InputError(f"root is {str(root)!r}, wanted a folder")
    if any(base.glob(f"*{UNFINISHED}")):
        raise InputError(f"{root} is unfinished; call what makes it again, and it goes on where it stopped")
    images = next((path for path in sorted(base.glob("*images*")) if path.is_dir()), base)
    if labels is not None:
        return images, Path(labels)
    pairs = (
        images.name.replace("images", "gts"),
        images.name.replace("images", "labels"),
        "gt",
        "gts",
        "labels",
    )
    return images, next(
        (base / name for name in pairs if (base / name).is_dir() and base / name != images), images
    )


def find_annotation(picture: Path, labels: Path) -> Path:
    """The annotation of a picture in a folder, under one of the usual names.

    Raises:
        InputError: there is none.
    """
    stem = picture.stem
    names = (
        f"gt_{stem}.txt",
        f"{stem}.txt",
        f"{picture.name}.txt",
        f"poly_gt_{stem}.txt",
        f"gt_{picture.name}.txt",
    )
    for name in names:
        if (labels / name).is_file():
            return labels / name
    raise InputError(
        f"picture {picture.name!r} has no annotation in {str(labels)!r}; wanted one of {names[:4]}"
    )


def _per_picture(
    root: PathLike, labels: PathLike | None, read: Callable[[Path], Words], name: str, *, exif: bool
) -> TextDataset:
    images, annotations = _folders(root, labels)
    pictures = _pictures(images)
    samples = [read(find_annotation(picture, annotations)).sample(picture, exif=exif) for picture in pictures]
    return TextDataset(samples, name)


def icdar2015(root: PathLike, labels: PathLike | None = None) -> TextDataset:
    """ICDAR 2015 incidental scene text.

    Args:
        root: a folder with the pictures ``img_N.jpg``, or one with ``*_images`` and ``*_gts`` inside.
        labels: the folder of ``gt_img_N.txt``, if it is another.

    Raises:
        InputError: no such folder, no pictures, a picture without annotation.
        AnnotationError: a line of another form; file and line are named.
    """
    return _per_picture(root, labels, formats.icdar2015, "icdar2015", exif=True)


def totaltext(root: PathLike, labels: PathLike | None = None, *, exif: bool = False) -> TextDataset:
    """Total-Text, in its original or its converted form.

    Args:
        root: a folder with the pictures, or one with ``*_images`` and ``*_gts`` inside.
        labels: the folder of the annotations, if it is another.
        exif: turn pictures as their EXIF data say; the annotation of img651 is made without.

    Raises:
        InputError: no such folder, no pictures, a picture without annotation.
        AnnotationError: a line of another form; file and line are named.
    """
    return _per_picture(root, labels, formats.totaltext, "totaltext", exif=exif)


def _listed(found: Iterable[tuple[str, Words]], roots: Sequence[Path], name: str) -> TextDataset:
    samples: list[Sample] = []
    for written, words in found:
        place = next((root / written for root in roots if is_file(root / written)), None)
        if place is None:
            raise InputError(
                f"picture {written!r} is not in {' or '.join(repr(str(root)) for root in roots)}"
            )
        samples.append(words.sample(place))
    return TextDataset(samples, name)


def paddleocr(label_file: PathLike, root: PathLike | None = None) -> TextDataset:
    """A label file of PaddleOCR.

    Args:
        label_file: the file.
        root: folder that its paths start from; by default the file's own, then the one above.

    Raises:
        AnnotationError: a line of another form; file and line are named.
        InputError: a picture that is not there.
    """
    place = Path(label_file).parent
    roots = [Path(root)] if root is not None else [place, place.parent]
    return _listed(formats.paddleocr(label_file), roots, "paddleocr")


def synthtext(root: PathLike, gt: PathLike | None = None) -> TextDataset:
    """SynthText in the wild.

    Args:
        root: the folder with ``gt.mat`` and the numbered folders of pictures.
        gt: the ``.mat`` file, if it is another.

    Raises:
        AnnotationError: the file cannot be used.
        InputError: a picture that is not there.
        MissingExtraError: scipy is not installed (extra ``eval``).
    """
    path = Path(gt) if gt is not None else Path(root) / "gt.mat"
    return _listed(formats.synthtext(path), [Path(root)], "synthtext")


def rendered(count: int, seed: int = 0, size: int | Sequence[int] = 640, **options: Any) -> Rendered:
    """Synthetic scenes: see :class:`Rendered`."""
    return Rendered(count, seed, size, **options)


def load(place: str, *, format: str | None = None) -> TextDataset | Rendered:  # noqa: A002
    """A data set by what a command line says.

    Args:
        place: a folder or file, ``FORMAT:PATH``, or ``rendered:COUNT[:SEED]`` for held-out synthetic scenes.
        format: one of ``formats.FORMATS``; without it and without a prefix: a ``.mat`` is SynthText, another
            file PaddleOCR's, a folder is ICDAR 2015 where its first annotation reads so, else Total-Text.

    Raises:
        InputError: an unknown format, or a place that is not there.
        AnnotationError: its contents cannot be read.
    """
    head, colon, rest = place.partition(":")
    if colon and head == "rendered":
        numbers = rest.split(":")
        if not all(part.isdecimal() for part in numbers) or not 1 <= len(numbers) <= 2:
            raise InputError(f"data set is {place!r}, wanted rendered:COUNT or rendered:COUNT:SEED")
        seed = int(numbers[1]) if len(numbers) > 1 else 1
        return Rendered(int(numbers[0]), seed, 640, backgrounds="test")
    if colon and head in formats.FORMATS:
        format, place = head, rest  # noqa: A001
    path = Path(place)
    if not path.exists():
        raise InputError(f"data set {place!r} is not there")
    if format is None:
        format = _guess(path)  # noqa: A001
    readers: dict[str, Callable[[Path], TextDataset]] = {
        "icdar2015": icdar2015,
        "totaltext": totaltext,
        "paddleocr": paddleocr,
        "synthtext": synthtext,
    }
    read = readers[formats.check_format(format)]
    with reading(path):
        return read(path)


def _guess(path: Path) -> str:
    if path.is_file():
        return "synthtext" if path.suffix == ".mat" else "paddleocr"
    if (path / "gt.mat").is_file():
        return "synthtext"
    images, labels = _folders(path, None)
    first = [find_annotation(picture, labels) for picture in _pictures(images)[:20]]
    lines = [line for path in first for line in formats.read_text(path).splitlines() if line.strip()]
    return "icdar2015" if all(formats.has_four_points(line) for line in lines) else "totaltext"

"""Annotation formats of public data sets, each as plain functions on text (section 5.6)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dbnet_asf.errors import AnnotationError
from dbnet_asf.geometry import Array
from fusion_core.atomic import PathLike
from fusion_core.errors import InputError, require_extra

IGNORED_TEXTS = frozenset({"###", "*", "#"})


@dataclass(frozen=True, slots=True)
class Sample:
    """An annotated image.

    Attributes:
        image: path of the picture.
        polygons: one float64 (points, 2) outline a word, pixels.
        ignore: bool (words,), True = don't care; the same in training and evaluation.
        texts: transcriptions.
        exif: whether the picture's EXIF rotation belongs to the annotation.
    """

    image: Path
    polygons: tuple[Array, ...]
    ignore: Array
    texts: tuple[str, ...] = ()
    exif: bool = True


@dataclass(slots=True)
class Words:
    """The words of one picture while its annotation is being read."""

    polygons: list[Array] = field(default_factory=list[Array])
    ignore: list[bool] = field(default_factory=list[bool])
    texts: list[str] = field(default_factory=list[str])

    def add(self, points: Array, text: str, *, ignore: bool | None = None) -> None:
        """Append a word; its text decides whether it is ignored, unless that is said."""
        self.polygons.append(points)
        self.texts.append(text)
        self.ignore.append(text in IGNORED_TEXTS if ignore is None else ignore)

    def sample(self, image: Path, *, exif: bool = True) -> Sample:
        """The picture with these words."""
        return Sample(image, tuple(self.polygons), np.array(self.ignore, np.bool_), tuple(self.texts), exif)


def read_text(path: PathLike) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        AnnotationError: not there, or no UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise AnnotationError(f"annotation {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"annotation {str(path)!r} is no UTF-8 text: {error}") from error


def _lines(path: PathLike) -> Iterator[tuple[str, str]]:
    """Non-empty lines, each with the words that name it."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def _points(where: str, values: list[Any]) -> Array:
    try:
        numbers = np.array([float(value) for value in values], np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise AnnotationError(f"{where}: {str(values)[:200]} are no coordinates") from error
    if len(numbers) < 6 or len(numbers) % 2 or not np.isfinite(numbers).all():
        raise AnnotationError(f"{where}: {len(numbers)} coordinates, wanted x and y of at least 3 points")
    return numbers.reshape(-1, 2)


def icdar2015(path: PathLike) -> Words:
    """ICDAR 2015: ``x1,y1,...,x4,y4,text``; the text ``###`` means don't care, commas may stand in it.

    Raises:
        AnnotationError: a line of another form; file and line are named.
    """
    words = Words()
    for where, line in _lines(path):
        fields = line.split(",", 8)
        if len(fields) != 9:
            raise AnnotationError(f"{where}: {len(fields)} fields, wanted x1,y1,...,x4,y4,text")
        words.add(_points(where, fields[:8]), fields[8].strip())
    return words


_KEY = re.compile(
    r"(x|y|ornt|transcriptions)\s*:\s*(\[\[.*?\]\]|\[.*?\])\s*(?:,\s*(?=[a-z]+\s*:)|$)", re.DOTALL
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def totaltext(path: PathLike) -> Words:
    """Total-Text: the original form, or lines of 2K numbers and the text.

    The original form is ``x: [[..]], y: [[..]], ornt: [..], transcriptions: [..]``; ``#`` and ``###``
    mean don't care.

    Raises:
        AnnotationError: a line of another form; file and line are named.
    """
    words = Words()
    text = read_text(path)
    if re.match(r"\s*x\s*:", text):
        for where, record in _records(path, text):
            found = dict(_KEY.findall(record))
            if not {"x", "y"} <= set(found):
                raise AnnotationError(
                    f"{where}: wanted x: [[..]], y: [[..]], ornt: [..], transcriptions: [..]"
                )
            x, y = (_NUMBER.findall(found[axis]) for axis in "xy")
            if len(x) != len(y):
                raise AnnotationError(
                    f"{where}: {len(x)} x and {len(y)} y coordinates, wanted as many of each"
                )
            quoted = re.search(r"u?'(.*)'|u?\"(.*)\"", found.get("transcriptions", ""), re.DOTALL)
            spoken = next((part for part in quoted.groups() if part is not None), "") if quoted else ""
            words.add(_points(where, [value for pair in zip(x, y, strict=True) for value in pair]), spoken)
        return words
    for where, line in _lines(path):
        points, spoken = _leading_numbers(line)
        words.add(_points(where, points), spoken)
    return words


def _records(path: PathLike, text: str) -> Iterator[tuple[str, str]]:
    """The original form breaks long records over lines; each begins with ``x:``."""
    starts = [match.start() for match in re.finditer(r"(?m)^\s*x\s*:", text)]
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        yield f"{path}, line {text.count(chr(10), 0, start) + 1}", text[start:stop].strip()


def _leading_numbers(line: str) -> tuple[list[str], str]:
    """As many pairs of numbers as lead the line, at most all fields but the last, which is the text."""
    fields = line.split(",")
    count = 0
    while count < len(fields) - 1 and _NUMBER.fullmatch(fields[count].strip()):
        count += 1
    count -= count % 2
    return fields[:count], ",".join(fields[count:]).strip()


def has_four_points(line: str) -> bool:
    """Whether a line begins with exactly the eight numbers of a quadrilateral."""
    return len(_leading_numbers(line)[0]) == 8


def paddleocr(path: PathLike) -> list[tuple[str, Words]]:
    """PaddleOCR's label file: per line a picture's path, a tab and JSON of ``transcription`` and ``points``.

    ``###`` and ``*`` mean don't care.

    Returns:
        The path as written, and the words, per line.

    Raises:
        AnnotationError: a line of another form; file and line are named.
    """
    found: list[tuple[str, Words]] = []
    for where, line in _lines(path):
        picture, tab, text = line.partition("\t")
        try:
            entries = json.loads(text) if tab else None
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"{where}: no JSON after the tab ({error})") from error
        if not isinstance(entries, list):
            raise AnnotationError(f"{where}: wanted a path, a tab and a JSON list of words")
        words = Words()
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("points"), list):
                raise AnnotationError(f"{where}: {str(entry)[:60]} has no points")
            flat = [
                value for pair in entry["points"] for value in (pair if isinstance(pair, list) else [pair])
            ]
            words.add(_points(where, flat), str(entry.get("transcription", "")))
        found.append((picture.strip(), words))
    return found


def synthtext(path: PathLike) -> list[tuple[str, Words]]:
    """SynthText's ``gt.mat``: ``imnames``, ``wordBB`` (2 x 4 x words) and ``txt``; by scipy (extra ``eval``).

    Returns:
        The path as written, and the words, per picture.

    Raises:
        AnnotationError: no such file, or other contents.
        MissingExtraError: scipy is not installed.
    """
    require_extra("scipy.io", "eval", "dbnet-asf")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "words.npz"
        done = subprocess.run(  # noqa: S603 - our own script, in a process that a damaged file may end
            [sys.executable, "-P", Path(__file__).with_name("matfile.py"), path, out],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            crash = f"scipy's reader ended with code {done.returncode}"
            reason = done.stdout.strip() if done.returncode == 1 and done.stdout else crash
            raise AnnotationError(f"annotation {str(path)!r} is no gt.mat of SynthText: {reason}")
        with np.load(out, allow_pickle=False) as arrays:
            boxes = np.split(arrays["boxes"], np.cumsum(arrays["counts"]))[:-1]
            names, texts = (json.loads(arrays[key].tobytes()) for key in ("names", "words"))
    found: list[tuple[str, Words]] = []
    for name, box, spoken in zip(names, boxes, texts, strict=True):
        words = Words()
        for number, points in enumerate(box):
            words.add(points, spoken[number] if number < len(spoken) else "", ignore=False)
        found.append((name, words))
    return found


FORMATS = ("icdar2015", "totaltext", "paddleocr", "synthtext")


def check_format(name: str) -> str:
    """The name itself.

    Raises:
        InputError: no such format; the message lists them.
    """
    if name not in FORMATS:
        raise InputError(f"format is {name!r}, wanted one of {list(FORMATS)}")
    return name

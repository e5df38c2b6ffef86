"""From the folders of published data sets to one JSON Lines schema; nothing is downloaded."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusion_core.atomic import is_file
from fusion_core.errors import ConfigError, DataError, InputError, reading
from fusion_core.results import Result

from .duplicates import Duplicates, drop_duplicates, find_duplicates
from .meme import Debate, Meme, save_memes

__all__ = ["FORMATS", "ConvertReport", "convert", "load_official_debates"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Raw:
    """One record as the data set has it.

    Args:
        id: of the meme.
        image: path relative to the data set's folder.
        text: on the meme.
        labels: as the data set writes them; empty where it does not tell.
        split: its name in the data set.
    """

    id: str
    image: str
    text: str
    labels: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Format:
    """A data set that can be read.

    Args:
        title: as people know it.
        page: its official page, by name.
        expects: the files of its folder.
        positive: labels that count as class 1 where the caller names none.
        negative: labels that count as class 0.
        read: the folder -> its records.
        versions: (training memes, the first positive label among them) -> the version that has so many.
    """

    title: str
    page: str
    expects: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    read: Callable[[Path], Iterator[Raw]]
    versions: dict[tuple[int, int], str] = field(default_factory=dict[tuple[int, int], str])


@dataclass(frozen=True, slots=True)
class ConvertReport(Result):
    """What a conversion did.

    Attributes:
        format: the data set's name.
        version: as the counts of its training part tell, or "" where they are of no known one.
        positive: labels that count as class 1.
        memes: that were written.
        splits: split -> label -> number; the label is 0, 1 or null.
        raw_labels: label as the data set writes it -> number.
        missing: pictures that the annotation names and the folder lacks.
        duplicates: groups of equal pictures or texts, within and across splits.
        dropped: ids left out as duplicates.
    """

    format: str
    version: str
    positive: tuple[str, ...]
    memes: int
    splits: dict[str, dict[str, int]]
    raw_labels: dict[str, int]
    missing: tuple[str, ...]
    duplicates: Duplicates
    dropped: tuple[str, ...]


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            with reading(f"{path}, line {number}", "is no JSON", DataError):
                row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} holds a {type(row).__name__}, wanted an object")
            yield row


def _table(path: Path) -> Iterator[Row]:
    """Rows of a ``.csv``, ``.tsv`` or ``.json`` table; the separator is the one that the head has."""
    text = _text(path)
    with reading(path, error=DataError):
        if path.suffix == ".json":
            rows: Any = json.loads(text)
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise DataError("it holds no list of objects")
            yield from rows
            return
        head = text.partition("\n")[0]
        yield from csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in head else ",")


def _text(path: Path) -> str:
    with reading(path, error=DataError):
        return path.read_text("utf-8-sig")


def _key(path: Path, row: Row, *names: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise DataError(f"{path} has the columns {sorted(map(str, row))}, wanted {names[0]!r}")


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _harm(folder: Path) -> Iterator[Raw]:
    place = _first(folder, "annotations", ".") or folder
    for split in ("train", "val", "test"):
        path = place / f"{split}.jsonl"
        if not path.is_file():
            continue
        for row in _json_lines(path):
            name, image = str(_key(path, row, "id")), str(_key(path, row, "image"))
            named = _key(path, row, "labels")
            if not isinstance(named, list):
                raise DataError(f"{path}: the labels of {name} are a {type(named).__name__}, wanted a list")
            labels = tuple(str(label) for label in named[:1])
            yield Raw(name, f"images/{image}", str(row.get("text") or ""), labels, split)


def _fhm(folder: Path) -> Iterator[Raw]:
    for split in ("train", "dev_seen", "dev_unseen", "test_seen", "test_unseen"):
        path = folder / f"{split}.jsonl"
        if not path.is_file():
            continue
        for row in _json_lines(path):
            labels = () if row.get("label") is None else (str(row["label"]),)
            # dev_unseen repeats memes of dev_seen: the split is part of the id
            yield Raw(
                f"{split}/{_key(path, row, 'id')}", str(_key(path, row, "img")), str(row.get("text") or ""),
                labels, split,
            )  # fmt: skip


def _mami(folder: Path) -> Iterator[Raw]:
    for split in ("training", "trial", "validation", "test"):
        path = next(
            (
                found
                for suffix in (".tsv", ".csv", ".json")
                for stem in (split, split.title(), f"{split.upper()}/{split}", f"MAMI_{split}")
                if (found := folder / f"{stem}{suffix}").is_file()
            ),
            None,
        )
        if path is None:
            continue
        known: dict[str, str] = {}
        truth = _first(folder, f"{split}_labels.txt", f"{split}_labels.tsv")
        if truth is not None:
            for line in _text(truth).splitlines():
                name, _, rest = line.partition("\t")
                known[name] = rest.partition("\t")[0].strip()
        for row in _table(path):
            name = str(_key(path, row, "file_name", "image"))
            label = row.get("misogynous", known.get(name))
            image = next((f"{d}{name}" for d in (f"{split.upper()}/", f"{split}/", "images/", "")
                          if is_file(folder / f"{d}{name}")), name)  # fmt: skip
            labels = () if label in (None, "") else (str(label),)
            text = str(_key(path, row, "Text Transcription", "text") or "")
            yield Raw(f"{split}/{name}", image, text, labels, split)


def _multioff(folder: Path) -> Iterator[Raw]:
    tables = {"train": "Training", "val": "Validation", "test": "Testing"}
    place = _first(folder, "Split Dataset", ".") or folder
    for split, word in tables.items():
        path = place / f"{word}_meme_dataset.csv"
        if not path.is_file():
            continue
        for row in _table(path):
            image = str(_key(path, row, "image_name"))
            label = str(_key(path, row, "label")).strip()
            text = str(_key(path, row, "sentence") or "")
            yield Raw(f"{split}/{image}", f"Labelled Images/{image}", text, (label,), split)


def _pridemm(folder: Path) -> Iterator[Raw]:
    path = folder / "PrideMM.csv"
    if not path.is_file():
        return
    for row in _table(path):
        name = str(_key(path, row, "name"))
        label = str(_key(path, row, "hate"))
        image = f"Images/{name}"
        yield Raw(
            name, image, str(row.get("text") or ""), (label,) if label else (), str(row.get("split") or "all")
        )


_HARM = ("very harmful", "somewhat harmful")
FORMATS: dict[str, Format] = {
    "harmc": Format(
        "Harm-C", "LCS2-IIITD/MOMENTA on GitHub", "annotations/{train,val,test}.jsonl and images/", _HARM,
        ("not harmful",), _harm,
    ),
    "harmp": Format(
        "Harm-P", "LCS2-IIITD/MOMENTA on GitHub", "annotations/{train,val,test}.jsonl and images/", _HARM,
        ("not harmful",), _harm, {(3020, 116): "v0", (3020, 216): "the paper's table"},
    ),
    "fhm": Format(
        "Facebook Hateful Memes", "the Hateful Memes Challenge of DrivenData",
        "train.jsonl, dev_seen.jsonl, test_seen.jsonl ... and img/", ("1",), ("0",), _fhm,
    ),
    "mami": Format(
        "MAMI", "SemEval-2022 task 5", "training.csv (or .tsv, .json), test.csv, test_labels.txt and the "
        "pictures",
        ("1",), ("0",), _mami,
    ),
    "multioff": Format(
        "MultiOFF",
        "bharathichezhiyan/Multimodal-Meme-Classification-Identifying-Offensive-Content-in-Image-and-Text"
        " on GitHub",
        "'Split Dataset'/{Training,Validation,Testing}_meme_dataset.csv and 'Labelled Images'/",
        ("offensive",), ("Non-offensiv", "Non-offensive"), _multioff,
    ),
    "pridemm": Format(
        "PrideMM", "SiddhantBikram/MemeCLIP on GitHub", "PrideMM.csv and Images/", ("1",), ("0",), _pridemm
    ),
}  # fmt: skip


def convert(
    name: str,
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    positive: Sequence[str] | None = None,
    drop: bool = False,
) -> ConvertReport:
    """Write a data set as ``memes.jsonl``.

    Args:
        name: a key of :data:`FORMATS`.
        folder: that its authors' archive unpacks to.
        out: the file; pictures stay where they are, their paths are relative to it.
        positive: labels that count as class 1; the others that occur count as 0. None takes the data set's
            own.
        drop: leave out all but the first of equal pictures (and of equal texts without a picture).

    Returns:
        Counts by split and label, pictures that are missing (their memes are left out), and duplicates.

    Raises:
        ConfigError: no such format, or a positive label that never occurs.
        InputError: the folder lacks the annotation; the message says what it takes and where it comes from.
        DataError: a label that is neither positive nor negative, or a damaged file.
    """
    known = FORMATS.get(name)
    if known is None:
        raise ConfigError(f"format is {name!r}, wanted one of {', '.join(FORMATS)}")
    place = Path(folder)
    records = list(known.read(place)) if place.is_dir() else []
    if not records:
        raise InputError(
            f"{place} holds no {known.title}; wanted a folder with {known.expects} (from {known.page}; "
            "nothing is downloaded)"
        )
    counts: dict[str, int] = {}
    for record in records:
        for label in record.labels:
            counts[label] = counts.get(label, 0) + 1
    wanted = tuple(known.positive if positive is None else (label.strip() for label in positive))
    if positive is not None and (never := [label for label in wanted if label not in counts]):
        raise ConfigError(f"positive names {never[0]!r}, which never occurs; there are {sorted(counts)}")
    memes: list[Meme] = []
    missing: list[str] = []
    for record in records:
        image = place / record.image
        if not is_file(image):
            missing.append(record.image)
            continue
        label = _label(record, wanted, None if positive is not None else known.negative)
        memes.append(Meme(record.id, image, record.text, "", label, split=record.split, source=name))
    if not memes:
        raise InputError(
            f"{place} lacks all {len(missing)} pictures, such as {missing[0]}; wanted {known.expects}"
        )
    duplicates = find_duplicates(memes)
    dropped: tuple[str, ...] = ()
    if drop:
        memes, dropped = drop_duplicates(memes, duplicates)
    splits: dict[str, dict[str, int]] = {}
    for meme in memes:
        part = splits.setdefault(meme.split or "", {})
        key = "null" if meme.label is None else str(meme.label)
        part[key] = part.get(key, 0) + 1
    save_memes(out, memes)
    train = [record.labels for record in records if record.split == "train"]
    version = known.versions.get((len(train), sum(known.positive[0] in labels for labels in train)), "")
    return ConvertReport(
        name, version, wanted, len(memes), splits, counts, tuple(missing), duplicates, dropped
    )


def _label(record: Raw, positive: Sequence[str], negative: Sequence[str] | None) -> int | None:
    if not record.labels:
        return None
    if any(label in positive for label in record.labels):
        return 1
    if negative is not None and not any(label in negative for label in record.labels):
        raise DataError(
            f"meme {record.id!r} has the label {record.labels[0]!r}, wanted one of "
            f"{[*positive, *negative]}; name the positive ones with positive"
        )
    return 0


class _TextOnly(pickle.Unpickler):
    """Reads dictionaries and texts; any class or function that a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it names a persistent object {pid!r}")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = _TextOnly(file).load()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise DataError(
            f"{path} is not loaded: {error}; only dictionaries of texts are read, as a pickle can run any "
            f"code"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise DataError(f"{path} holds a {type(found).__name__}, wanted a dictionary by meme id")
    return found


def load_official_debates(
    debates: str | os.PathLike[str], verdicts: str | os.PathLike[str] | None = None
) -> list[Debate]:
    """Read the authors' pickles without running anything that is in them.

    Args:
        debates: ``{id: {"harmful": text, "harmless": text}}``.
        verdicts: ``{id: "0" | "1"}``, 1 = harmful.

    Raises:
        InputError: no such file.
        DataError: anything else than dictionaries of texts in it, or a side that is missing.
    """
    found = _unpickle(Path(debates))
    said = {} if verdicts is None else _unpickle(Path(verdicts))
    made: list[Debate] = []
    for name, sides in found.items():
        if not isinstance(sides, dict) or not all(
            isinstance(sides.get(s), str) for s in ("harmful", "harmless")
        ):
            raise DataError(f"{debates}: {name!r} lacks a side, wanted texts 'harmful' and 'harmless'")
        verdict = said.get(name)
        if verdict not in (None, "0", "1"):
            raise DataError(f"{verdicts}: {name!r} is {verdict!r}, wanted '0' or '1'")
        made.append(
            Debate(name, sides["harmful"], sides["harmless"], None if verdict is None else int(verdict))
        )
    return made

"""Is a file whole, and do two folders hold the same? By suffix, each with the library that reads it."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TEMPORARY = re.compile(r"(^|/)\.[^/]+\.(tmp|old)(/|$)|\.partial(/|$)|-(wal|shm|journal)$")
"""Names of work under way: a temporary sibling, a shard without its name, SQLite's own files."""
APPENDED = ("manifest.jsonl", "metrics.jsonl")
"""Lists that grow line by line; their readers drop a last line that was cut off."""
TIMES = (
    rb'("seconds": )\{[^}]*\}',
    rb'("(?:seconds|date|created|started|finished|ours_s|reference_s|train_runtime)": )[^,\n}]+',
    rb"('seconds': )'[^']*'",  # in what is told of a training's state
)
"""What differs between two runs of any command."""


def files(place: Path) -> dict[str, Path]:
    """Relative name -> path of every file below a folder, but for work under way."""
    found = {path.relative_to(place).as_posix(): path for path in sorted(place.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if not TEMPORARY.search(name)}


def folders(place: Path) -> set[str]:
    """Relative names of the folders below a folder, but for work under way."""
    found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_dir()}
    return {name for name in found if not TEMPORARY.search(name)}


def plain(data: bytes, volatile: Iterable[bytes] = ()) -> bytes:
    """The bytes with what differs from run to run replaced; a pattern's first group is kept."""
    for pattern in (*TIMES, *volatile):
        data = re.sub(pattern, lambda found: (found[1] if found.re.groups else b"") + b"*", data)
    return data


def contents(place: Path, volatile: Mapping[str, Iterable[bytes]] | None = None) -> dict[str, bytes]:
    """Relative name -> bytes, those of text without what differs from run to run.

    Args:
        place: the folder.
        volatile: pattern of names -> patterns of what differs in such files.
    """
    found: dict[str, bytes] = {}
    for name, path in files(place).items():
        data = path.read_bytes() if path.suffix != ".pt" else _told(path)
        more = [p for names, patterns in (volatile or {}).items() if re.search(names, name) for p in patterns]
        found[name] = plain(data, more) if more or b"\0" not in data[:4096] else data
    return found


def _told(path: Path) -> bytes:
    """What a file of ``torch.save`` holds, in words: equal contents may be pickled in two ways."""
    import torch

    from fusion_core.checkpoint import digest

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - half a file; it is told of elsewhere
        return path.read_bytes()
    entries = found.items() if isinstance(found, dict) else [("", found)]
    return "".join(f"{name}: {_digest(value, digest)}\n" for name, value in entries).encode()


def _digest(value: Any, digest: Any) -> str:
    if isinstance(value, dict):
        # No command of ours draws from Python's own generator, so that nothing sets it to begin with.
        return str({str(k): _digest(entry, digest) for k, entry in value.items() if k != "python"})
    if isinstance(value, list | tuple):
        return str([_digest(entry, digest) for entry in value[:700]])
    return repr(value)[:200] if not hasattr(value, "shape") else digest(value)[:16]


def fault(path: Path) -> str | None:
    """Why a file is not whole, or None."""
    if path.name in APPENDED:
        data = path.read_bytes().rpartition(b"\n")[0]
        reader: Any = lambda _: [json.loads(line) for line in data.splitlines()]
    else:
        reader = _READERS.get(path.suffix.lower())
    if reader is None:
        return None
    try:
        reader(path)
    except Exception as error:  # noqa: BLE001 - each library has errors of its own
        return f"{path.name}: {type(error).__name__}: {str(error)[:160]}"
    return None


def beginning(data: bytes, reference: bytes, name: str) -> str | None:
    """Why the bytes are half a file: they are a true beginning of what an undisturbed run writes."""
    if Path(name).name in APPENDED or len(data) >= len(reference) or not reference.startswith(data):
        return None
    return f"{name}: {len(data)} bytes, the beginning of {len(reference)}"


def differences(found: Mapping[str, bytes], reference: Mapping[str, bytes]) -> list[str]:
    """What distinguishes two folders, in words."""
    words = [f"{name} is missing" for name in sorted(reference.keys() - found.keys())]
    words += [f"{name} is extra" for name in sorted(found.keys() - reference.keys())]
    for name in sorted(found.keys() & reference.keys()):
        if found[name] != reference[name]:
            words.append(f"{name} differs{_where(found[name], reference[name])}")
    return words


def _where(one: bytes, two: bytes) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
    if b"\0" in one[:4096]:
        return f" at byte {place}, {len(one)} and {len(two)} bytes"
    return f" at byte {place}: {one[max(place - 40, 0) : place + 40]!r}"


def _json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ValueError("the last line is cut off")
    for line in text.splitlines():
        json.loads(line)


def _toml(path: Path) -> None:
    tomllib.loads(path.read_text(encoding="utf-8"))


def _html(path: Path) -> None:
    if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("it does not end with </html>")


def _csv(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or not text.endswith("\n") or len({len(row) for row in rows}) > 1:
        raise ValueError("rows of unequal length, or none")


def _safetensors(path: Path) -> None:
    from fusion_core.shards import read_header

    read_header(path)


def _picture(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        image.load()


def _arrays(path: Path) -> None:
    import numpy as np

    found = np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        for name in found.files:
            found[name]


def _pickle(path: Path) -> None:
    import torch

    torch.load(path, map_location="cpu", weights_only=True)


def _onnx(path: Path) -> None:
    import onnx

    onnx.checker.check_model(onnx.load(path))


def _hdf5(path: Path) -> None:
    import h5py

    with h5py.File(path, "r") as file:
        file.visititems(lambda _, item: item[()] if isinstance(item, h5py.Dataset) else None)


def _fits(path: Path) -> None:
    from astropy.io import fits

    with fits.open(path) as units:
        for unit in units:
            unit.data  # noqa: B018 - reads it


def _table(path: Path) -> None:
    from astropy.table import Table

    Table.read(path)


def _sqlite(path: Path) -> None:
    with sqlite3.connect(path) as database:
        (found,) = database.execute("PRAGMA integrity_check").fetchone()
    database.close()
    if found != "ok":
        raise ValueError(found)


_READERS: dict[str, Any] = {
    ".csv": _csv, ".ecsv": _table, ".fits": _fits, ".h5": _hdf5, ".hdf5": _hdf5, ".html": _html,
    ".jpg": _picture, ".json": _json, ".jsonl": _lines, ".npy": _arrays, ".npz": _arrays, ".onnx": _onnx,
    ".parquet": _table, ".png": _picture, ".pt": _pickle, ".safetensors": _safetensors, ".sqlite": _sqlite,
    ".toml": _toml,
}  # fmt: skip

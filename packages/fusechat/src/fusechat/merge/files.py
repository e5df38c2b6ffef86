"""The files of a merge on their way: what goes where, what is done, and the step that shows them."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fusion_core.results import dump_json

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "added_tokens.json",
)
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass
class Place:
    """Where a merged tensor goes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: int = 0
    offset: int = 0

    @property
    def count(self) -> int:
        """Number of entries."""
        total = 1
        for n in self.shape:
            total *= n
        return total

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.count * torch.empty(0, dtype=self.dtype).element_size()


class Journal:
    """Which tensors of a run are written."""

    def __init__(self, work: Path) -> None:
        self.file = work / "journal.txt"
        text = self.file.read_text("utf-8", errors="replace") if self.file.is_file() else ""
        lines = text.splitlines(keepends=True)
        self.keys = {line[:-1] for line in lines if line.endswith("\n")}
        self.lock = threading.Lock()

    def add(self, key: str) -> None:
        """Note a tensor; its bytes are in the file before its line is."""
        with self.lock, self.file.open("a", encoding="utf-8") as file:
            file.write(f"{key}\n")


def open_shards(work: Path, places: list[Place]) -> dict[int, tuple[Path, int]]:
    """Files with their headers and full length; per shard its path and where data begin."""
    found: dict[int, tuple[Path, int]] = {}
    shards = sorted({place.shard for place in places})
    for shard in shards:
        mine = [place for place in places if place.shard == shard]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for place in mine:
            ends = [place.offset, place.offset + place.nbytes]
            header[place.key] = {
                "dtype": _NAMES[place.dtype],
                "shape": list(place.shape),
                "data_offsets": ends,
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = work / (_shard_name(shard, len(shards)))
        start = 8 + len(text)
        length = start + sum(place.nbytes for place in mine)
        if not path.is_file() or path.stat().st_size != length:
            with path.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(length)
        found[shard] = (path, start)
    return found


def _shard_name(shard: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"


def finish(work: Path, places: list[Place], origin: Path | None, card: Mapping[str, Any]) -> None:
    """Flush the shards, and write index, card and companions."""
    count = places[-1].shard + 1 if places else 0
    for file in work.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if count > 1:
        table = {entry.key: _shard_name(entry.shard, count) for entry in places}
        total = sum(entry.nbytes for entry in places)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    if origin is not None and origin.is_dir():
        for pattern in _COMPANIONS:
            for file in origin.glob(pattern):
                if file.is_file():  # again where an interrupted run has: its copy may be half one
                    shutil.copyfile(file, work / file.name)
    (work / "merge.json").write_text(dump_json(card))
    (work / "journal.txt").unlink(missing_ok=True)

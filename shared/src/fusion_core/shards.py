"""Safetensors files by the piece: one tensor is read at a time, one shard is held at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fusion_core.atomic import UNDER_WAY, PathLike, atomic_write
from fusion_core.errors import CheckpointError, InputError, reading

if TYPE_CHECKING:
    from torch import Tensor

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip
_NAMES = {code: name for name, code in CODES.items()}
_SIZES = {"bool": 1, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5,})(?:-of-\d{5,})?\.safetensors(?:\.partial)?")
_COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "spiece.model", "chat_template*", "*processor_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: dtype by name, shape, file, first byte and number of bytes."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def dtype_name(value: Tensor | np.ndarray[Any, Any]) -> str:
    """The dtype's name, the same for a tensor and an array: ``"float32"``."""
    return value.dtype.name if isinstance(value, np.ndarray) else str(value.dtype).removeprefix("torch.")


def raw_bytes(value: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The contents as flat little-endian uint8, copied only where memory is not so already."""
    if isinstance(value, np.ndarray):
        array = value.astype(value.dtype.newbyteorder("<"), copy=False)
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    import torch

    tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()


def write_tensors(
    file: IO[Any],
    tensors: Mapping[str, Tensor] | Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors or arrays to an open file in the safetensors format, one after the other.

    Raises:
        InputError: a value is no tensor or has a dtype that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, value in tensors.items():
        code = CODES.get(dtype_name(value)) if hasattr(value, "dtype") else None
        if code is None:
            kind = getattr(value, "dtype", type(value).__name__)
            raise InputError(f"tensor {name!r} is {kind}, wanted a tensor of one of {sorted(CODES)}")
    # Widest first, as the format's own writer does: every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        value = tensors[name]
        begin, end = end, end + value.nbytes
        shape = [int(size) for size in value.shape]
        header[name] = {"dtype": CODES[dtype_name(value)], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(raw_bytes(tensors[name]).data)


def read_header(path: PathLike) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read where each tensor of a safetensors file lies, without its contents.

    Returns:
        Name -> :class:`TensorInfo`, and the metadata.

    Raises:
        CheckpointError: missing, a Git LFS pointer, cut off, or not in the format.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            start = handle.read(8)
            if start == b"version ":
                raise CheckpointError(f"{path} is a Git LFS pointer, not the tensors; run: git lfs pull")
            length = int.from_bytes(start, "little")
            if size < 8 or (length > size - 8 and start[7:] == b"\0"):
                raise CheckpointError(
                    f"{path} is cut off: {size} bytes do not hold its header; copy it again"
                )
            if length > size - 8:
                raise CheckpointError(f"{path} is not a safetensors file")
            header: dict[str, Any] = json.loads(handle.read(length))
        metadata: dict[str, Any] = dict(header.pop("__metadata__", {}))
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError("metadata")
        found: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            info = TensorInfo(
                _NAMES[entry["dtype"]], tuple(entry["shape"]), file, 8 + length + begin, end - begin
            )
            if not all(type(size) is int for size in (*info.shape, begin, end)):
                raise TypeError(info.shape)
            itemsize = _SIZES.get(info.dtype) or np.dtype(info.dtype).itemsize
            if begin < 0 or min(info.shape, default=0) < 0 or prod(info.shape) * itemsize != info.nbytes:
                raise CheckpointError(
                    f"{path}: tensor {name!r} has bytes that do not fit its shape {info.shape}"
                )
            found[name] = info
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is damaged") from error
    wanted = max((info.offset + info.nbytes for info in found.values()), default=8 + length)
    if size != wanted:
        word = "is cut off" if size < wanted else "is too long"
        raise CheckpointError(f"{path} {word}: {size} bytes of {wanted}; copy it again")
    return found, metadata


def _index_files(index: Path) -> dict[str, Path]:
    with reading(index, "is not an index of shards", CheckpointError):
        table: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        files = {key: index.parent / name for key, name in table.items()}
        outside = next((name for name in table.values() if Path(name).name != name or "\\" in name), None)
    if outside is not None:
        raise CheckpointError(f"{index} names {outside!r}, which is outside its folder")
    return files


class ShardReader:
    """Read tensors one at a time from a safetensors file, an index of shards, or a folder of either.

    Only headers are read until :meth:`get`; nothing is kept open and nothing is kept in memory. ``metadata``
    holds the text of the headers read so far.

    Args:
        path: ``*.safetensors``, ``*.index.json`` or a folder that holds them.

    Raises:
        CheckpointError: nothing there, a shard missing, cut off or damaged.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        if self.path.is_dir():
            indices = sorted(self.path.glob("*.safetensors.index.json"))
            files = indices[:1] if len(indices) == 1 else sorted(self.path.glob("*.safetensors"))
            if len(indices) > 1:
                raise CheckpointError(f"{path} holds several indices, name one: {[i.name for i in indices]}")
            if any(self.path.glob("*.safetensors.partial")) or (self.path / UNDER_WAY).exists():
                raise CheckpointError(f"{path} is unfinished; run again what wrote it, and it goes on")
            if not files:
                raise CheckpointError(f"{path} holds no *.safetensors and no index of them")
        else:
            files = [self.path]
        if files[0].suffix == ".json":
            self._files = _index_files(files[0])
        else:
            pairs = [(key, file) for file in files for key in self._header(file)]
            self._files = dict(pairs)
            if len(self._files) < len(pairs):
                twice = next(key for key, file in pairs if self._files[key] != file)
                raise CheckpointError(
                    f"{path} holds {twice!r} in more than one file; name the file or an index"
                )

    def _header(self, file: Path) -> dict[str, TensorInfo]:
        if file not in self._headers:
            self._headers[file], metadata = read_header(file)
            self.metadata |= metadata
        return self._headers[file]

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._files)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def __len__(self) -> int:
        return len(self._files)

    def info(self, key: str) -> TensorInfo:
        """Dtype, shape and place of a tensor, from the header alone.

        Raises:
            CheckpointError: no such tensor.
        """
        file = self._files.get(key)
        found = self._header(file).get(key) if file else None
        if found is None:
            raise CheckpointError(f"{file or self.path} has no tensor {key!r}; it has {_some(self.keys())}")
        return found

    def get(self, key: str, device: str | Any = "cpu") -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            CheckpointError: no such tensor, or the file was cut since its header was read.
        """
        import torch

        info = self.info(key)
        tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
        try:
            with info.file.open("rb") as file:
                file.seek(info.offset)
                count = file.readinto(raw_bytes(tensor).data)
        except OSError as error:
            raise CheckpointError(f"{info.file} cannot be read: {error.strerror or error}") from error
        if count != info.nbytes:
            raise CheckpointError(f"{info.file} is cut off inside {key!r}; copy it again")
        return tensor.to(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


class ShardWriter:
    """Write a checkpoint of any size, one shard in memory at a time.

    Shards carry the suffix ``.partial`` until :meth:`close` gives all of them their standard names
    (``model-00001-of-0000N.safetensors``) and then writes ``model.safetensors.index.json``. After a kill the
    same call resumes: keys whose shard was written are ``in`` the writer and need not be added again.

    Args:
        folder: where to write; made if it is not there.
        shard_bytes: most bytes of a shard (a larger tensor gets one of its own).
        like: folder of a model whose config, tokenizer and generation files are copied on ``close``, except
            those that are in ``folder`` already.

    Raises:
        InputError: ``folder`` holds a finished checkpoint, ``like`` is no folder, ``shard_bytes`` is below 1.
        CheckpointError: a shard of an interrupted run is damaged.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder, shard_bytes=10**6) as writer:
        ...         writer.add("weight", torch.ones(2))
        ...     ShardReader(folder).get("weight")
        tensor([1., 1.])
    """

    def __init__(self, folder: PathLike, shard_bytes: int, like: PathLike | None = None) -> None:
        self.folder, self.shard_bytes = Path(folder), int(shard_bytes)
        self._like = None if like is None else Path(like)
        if self.shard_bytes < 1:
            raise InputError(f"shard_bytes is {shard_bytes}, wanted at least 1")
        if self._like is not None and not self._like.is_dir():
            raise InputError(f"like is {str(like)!r}, wanted the folder of a model")
        if (self.folder / UNDER_WAY).exists():  # cut off between the index and the step that shows it
            (self.folder / _INDEX).unlink(missing_ok=True)
        if (self.folder / _INDEX).exists():
            raise InputError(f"{folder} holds a finished checkpoint ({_INDEX}); name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shards: dict[int, dict[str, TensorInfo]] = {}
        self._buffer: dict[str, Tensor] = {}
        self._held = 0
        for file in sorted(self.folder.iterdir()):
            match = _SHARD.fullmatch(file.name)
            if match:  # a close() that was cut short has renamed some: they are partial again
                number = int(match[1])
                file = file.replace(self._partial(number))
                self._shards[number] = read_header(file)[0]
        self._keys = {key for shard in self._shards.values() for key in shard}

    def _partial(self, number: int) -> Path:
        return self.folder / f"model-{number:05d}.safetensors.partial"

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def add(self, key: str, tensor: Tensor) -> None:
        """Add a tensor; it is kept by reference until its shard is full and written.

        Raises:
            InputError: the key was added before (test ``key in writer`` when resuming).
        """
        if key in self._keys:
            raise InputError(f"tensor {key!r} is written already; when resuming skip what is `in` the writer")
        if self._buffer and self._held + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._keys.add(key)
        self._buffer[key] = tensor.detach()
        self._held += tensor.nbytes

    def _flush(self) -> None:
        if self._buffer:
            number = max(self._shards, default=0) + 1
            with atomic_write(self._partial(number)) as file:
                write_tensors(file, self._buffer)
            self._shards[number] = read_header(self._partial(number))[0]
            self._buffer, self._held = {}, 0

    def close(self) -> None:
        """Write what is left, give the shards their names, copy the files of ``like``, write the index."""
        self._flush()
        numbers = sorted(self._shards)
        table: dict[str, str] = {}
        for place, number in enumerate(numbers, 1):
            name = f"model-{place:05d}-of-{len(numbers):05d}.safetensors"
            self._partial(number).replace(self.folder / name)
            table |= dict.fromkeys(self._shards[number], name)
        companions = [f for pattern in _COMPANIONS for f in (self._like.glob(pattern) if self._like else ())]
        for source in companions:
            if source.is_file() and not (self.folder / source.name).exists():
                with source.open("rb") as origin, atomic_write(self.folder / source.name) as copy:
                    shutil.copyfileobj(origin, copy)
        total = sum(info.nbytes for shard in self._shards.values() for info in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        with atomic_write(self.folder / _INDEX, "w") as file:  # the last step: its presence means complete
            file.write(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

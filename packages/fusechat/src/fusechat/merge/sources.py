"""Checkpoints as flat, chunk-wise readable tensors: folders, files and state dicts."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusechat.errors import IncompatibleCheckpoints
from fusion_core.atomic import PathLike
from fusion_core.checkpoint import load_foreign
from fusion_core.errors import CheckpointError, InputError
from fusion_core.shards import ShardReader

__all__ = ["DiskSource", "MemorySource", "Source", "check_sources", "open_source"]

_TABLES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared.weight", "embed_in", "embed_out")
_SHOWN = 10

Read = Callable[[int, int], Tensor]


class Source(ABC):
    """Tensors that are read in pieces.

    Attributes:
        name: for messages and reports.
        path: of the files, or None.
    """

    name: str
    path: Path | None = None

    @abstractmethod
    def keys(self) -> list[str]:
        """Names of the tensors."""

    @abstractmethod
    def info(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype."""

    @abstractmethod
    def opened(self, key: str) -> AbstractContextManager[Read]:
        """A tensor to be read in pieces: what is entered gives its flat entries from start to stop."""

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of the flat tensor, in its own dtype."""
        with self.opened(key) as read:
            return read(start, stop)


class MemorySource(Source):
    """A state dict."""

    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        self.state, self.name = dict(state), name

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.state)

    def info(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype."""
        return tuple(self.state[key].shape), self.state[key].dtype

    def opened(self, key: str) -> AbstractContextManager[Read]:
        """Entries of the flat tensor."""
        flat = self.state[key].detach().cpu().reshape(-1)
        return contextlib.nullcontext(lambda start, stop: flat[start:stop])


class DiskSource(Source):
    """Safetensors on disk; only what is asked for is read, and nothing is kept."""

    def __init__(self, path: PathLike, name: str) -> None:
        self.path, self.name, self.reader = Path(path), name, ShardReader(path)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return self.reader.keys()

    def info(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype."""
        found = self.reader.info(key)
        return tuple(found.shape), getattr(torch, found.dtype)

    @contextlib.contextmanager
    def opened(self, key: str) -> Generator[Read]:
        """Entries of the flat tensor.

        Raises:
            CheckpointError: the file is cut off.
        """
        found = self.reader.info(key)
        dtype = getattr(torch, found.dtype)
        with found.file.open("rb", buffering=0) as file:

            def read(start: int, stop: int) -> Tensor:
                part = torch.empty(stop - start, dtype=dtype)
                file.seek(found.offset + start * part.element_size())
                if part.numel() and file.readinto(part.view(torch.uint8).numpy().data) != part.nbytes:
                    raise CheckpointError(f"{found.file} is cut off inside {key!r}; copy it again")
                return part

            yield read


def open_source(value: Any, name: str) -> Source:
    """A source from a state dict, a module, a folder or a file.

    Args:
        value: what was given; ``.bin``, ``.pt`` and ``.pth`` files are read with ``weights_only=True``.
        name: for messages.

    Raises:
        InputError: something else.
        CheckpointError: a folder without checkpoints, or a damaged file.
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, torch.nn.Module):
        return MemorySource(value.state_dict(), name)
    if isinstance(value, Mapping):
        return MemorySource(value, name)
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name} is {type(value).__name__}, wanted a folder, a file or a state dict")
    place = Path(value)
    if not place.exists():
        raise InputError(f"{name} is {place}, which does not exist")
    bins = [place] if place.suffix in (".bin", ".pt", ".pth") else []
    if place.is_dir() and not any(place.glob("*.safetensors")):
        bins = sorted(place.glob("pytorch_model*.bin"))
    if bins:
        state: dict[str, Tensor] = {}
        for file in bins:
            state |= load_foreign(file)
        found = MemorySource(state, name)
        found.path = place
        return found
    return DiskSource(place, name)


def _is_table(key: str) -> bool:
    return any(word in key for word in _TABLES)


def check_sources(base: Source, others: Sequence[Source], embeddings: str = "error") -> dict[str, int]:
    """Compare names, shapes and kinds of tensors.

    Args:
        base: the pivot (or the first target).
        others: the targets.
        embeddings: ``error``, or ``common``: tables with other numbers of rows are merged on their common
            rows, the base's others stay.

    Returns:
        Per table of unequal rows, how many are common.

    Raises:
        IncompatibleCheckpoints: lists up to ten names.
        InputError: another word for ``embeddings``.
    """
    if embeddings not in ("error", "common"):
        raise InputError(f"embeddings is {embeddings!r}, wanted error or common")
    wrong: list[str] = []
    common: dict[str, int] = {}
    mine = set(base.keys())
    for other in others:
        theirs = set(other.keys())
        wrong += [f"{key} is missing in {other.name}" for key in sorted(mine - theirs)]
        wrong += [f"{key} of {other.name} is not in {base.name}" for key in sorted(theirs - mine)]
        for key in sorted(mine & theirs):
            (shape0, kind0), (shape1, kind1) = base.info(key), other.info(key)
            if kind0.is_floating_point != kind1.is_floating_point:
                wrong.append(f"{key} is {kind0} in {base.name} and {kind1} in {other.name}")
            elif shape0 != shape1:
                if embeddings == "common" and _is_table(key) and shape0[1:] == shape1[1:]:
                    common[key] = min(common.get(key, shape0[0]), shape0[0], shape1[0])
                else:
                    wrong.append(f"{key} has shape {shape0} in {base.name} and {shape1} in {other.name}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        hint = (
            "; tables of other sizes: embeddings='common'" if any("shape" in line for line in wrong) else ""
        )
        raise IncompatibleCheckpoints(f"the checkpoints differ: {'; '.join(wrong[:_SHOWN])}{more}{hint}")
    return common

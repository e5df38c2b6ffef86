"""Merging a checkpoint piece by piece.

Bounded memory, resumable, the same bits under any chunking and workers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusechat.merge.files import Journal, Place, finish, open_shards
from fusechat.merge.rules import BLOCK, Chunk, Chunks, Rule
from fusechat.merge.sources import Source, check_sources, open_source
from fusion_core.atomic import PathLike, occupied, resumable_directory
from fusion_core.checkpoint import digest
from fusion_core.device import threads
from fusion_core.errors import InputError
from fusion_core.progress import track
from fusion_core.report import Report
from fusion_core.shards import raw_bytes

__all__ = ["Merge"]

_CHUNK = 4 * BLOCK
_HELD = 1 << 25  # entries of one tensor in all checkpoints that stay in memory between two readings


class _Reread:
    """Chunks that are read from their sources once, where there are few enough to hold them."""

    def __init__(self, chunks: Chunks, hold: bool) -> None:
        self.chunks, self.hold = chunks, hold
        self.held: list[Chunk] | None = None

    def __call__(self) -> Iterator[Chunk]:
        if self.held is not None:
            yield from self.held
            return
        kept: list[Chunk] = []
        for chunk in self.chunks():
            if self.hold:
                kept.append(chunk)
            yield chunk
        if self.hold:
            self.held = kept

    def last(self) -> Iterator[Chunk]:
        """Read them once more and let them go."""
        if self.held is None:
            yield from self.chunks()
            return
        self.held.reverse()
        while self.held:
            yield self.held.pop()


@dataclass
class Merge:
    """A planned merge; nothing is read before it is asked for a result.

    Attributes:
        rule: the method.
        targets: the checkpoints that are merged.
        base: the pivot, or None where the method needs none.
        embeddings: ``error`` or ``common``, see :func:`check_sources`.
        chunk: entries that are worked on at once; a whole number of blocks of 2^16.
    """

    rule: Rule
    targets: list[Source]
    base: Source | None = None
    embeddings: str = "error"
    chunk: int = _CHUNK
    common: dict[str, int] = field(default_factory=dict[str, int], repr=False)

    @classmethod
    def plan(cls, rule: Rule, targets: Sequence[Any], base: Any = None, **options: Any) -> Merge:
        """Open checkpoints and compare them.

        Args:
            rule: the method.
            targets: folders, files or state dicts.
            base: the pivot likewise.
            **options: ``embeddings``, ``chunk``.

        Raises:
            InputError: no targets, the same twice, a target that is the pivot, no pivot where the method
                needs one.
            IncompatibleCheckpoints: other names, shapes or kinds.
        """
        if not targets:
            raise InputError("targets is empty, wanted at least one checkpoint")
        if rule.needs_base and base is None:
            raise InputError(f"{rule.name} merges differences to a pivot; give base")
        seen: list[Any] = []
        for target in targets:
            same = str(Path(target).resolve()) if isinstance(target, str | os.PathLike) else id(target)
            if same in seen:
                raise InputError(f"targets holds {target if isinstance(same, str) else 'an object'} twice")
            seen.append(same)
        pivot = str(Path(base).resolve()) if isinstance(base, str | os.PathLike) else id(base)
        if base is not None and pivot in seen:
            raise InputError(f"targets holds the base {base if isinstance(pivot, str) else 'object'} itself")
        rule.check(len(targets))
        opened = [open_source(target, _named(target, f"target {j}")) for j, target in enumerate(targets)]
        ground = None if base is None else open_source(base, _named(base, "base"))
        merge = cls(rule, opened, ground, **options)
        if merge.chunk < BLOCK or merge.chunk % BLOCK:
            raise InputError(f"chunk is {merge.chunk}, wanted a whole number of {BLOCK} entries")
        merge.common = check_sources(
            merge.first, [s for s in opened if s is not merge.first], merge.embeddings
        )
        return merge

    @property
    def first(self) -> Source:
        """The pivot, or the first target: it gives names, shapes and dtypes."""
        return self.base if self.base is not None else self.targets[0]

    def _floating(self) -> list[str]:
        return [key for key in self.first.keys() if self.first.info(key)[1].is_floating_point]  # noqa: SIM118

    def _span(self, key: str) -> int:
        """Entries of a tensor that are merged."""
        shape, _ = self.first.info(key)
        count = 1
        for n in (self.common.get(key, shape[0]), *shape[1:]) if shape else ():
            count *= n
        return count

    def _chunks(self, key: str) -> Chunks:
        kinds = [source.info(key)[1] for source in (self.first, *self.targets)]
        work = torch.float64 if torch.float64 in kinds else torch.float32
        size = self._span(key)

        def read() -> Iterator[Chunk]:
            with contextlib.ExitStack() as files:
                enter = files.enter_context
                pieces = [enter(source.opened(key)) for source in self.targets]
                pivot = None if self.base is None else enter(self.base.opened(key))
                for start in range(0, size, self.chunk):
                    stop = min(start + self.chunk, size)
                    targets = torch.empty(len(pieces), stop - start, dtype=work)
                    for row, piece in zip(targets, pieces, strict=True):
                        row.copy_(piece(start, stop))
                    base = targets[0] if pivot is None else pivot(start, stop).to(work)
                    chunk = Chunk(start, base, targets)
                    yield chunk if self.rule.needs_targets else chunk.only_deltas()

        return read

    def _parts(self) -> int:
        """How many entries a chunk holds for one of the result: pivot, differences, targets where needed."""
        return 1 + len(self.targets) * (2 if self.rule.needs_targets else 1)

    def _prepare(self, keys: list[str]) -> None:
        self.rule.prepare({key: self._chunks(key) for key in keys}, {key: self._span(key) for key in keys})

    def _pieces(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """The merged entries of a tensor, in order; rows that are not common come from the first."""
        size = self._span(key)
        chunks = _Reread(self._chunks(key), size * self._parts() <= _HELD)
        state = self.rule.measure(key, chunks, size, len(self.targets))
        for chunk in chunks.last():
            yield chunk.start, self.rule.join(key, state, chunk)
        shape, _ = self.first.info(key)
        whole = 1
        for n in shape:
            whole *= n
        for start in range(size, whole, self.chunk):
            yield start, self.first.read(key, start, min(start + self.chunk, whole))

    def weights(self, progress: bool | None = None) -> Report:
        """The weights of every tensor, without merging: a table with one row per tensor.

        Args:
            progress: show a bar.
        """
        keys = self._floating()
        self._prepare(keys)
        rows: list[dict[str, Any]] = []
        for key in track(keys, "weights", enabled=progress):
            state = self.rule.measure(key, self._chunks(key), self._span(key), len(self.targets))
            told = self.rule.told(state)
            names = [source.name for source in self.targets]
            rows.append({"tensor": key, **(dict(zip(names, told, strict=False)) if told else {})})
        return Report(title=f"Weights of {self.rule.name}", rows=rows)

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The merged tensors in memory.

        Args:
            dtype: of the result; the pivot's by default.
        """
        keys = self._floating()
        self._prepare(keys)
        out: dict[str, Tensor] = {}
        with threads():
            for key in self.first.keys():  # noqa: SIM118
                shape, kind = self.first.info(key)
                if not kind.is_floating_point:
                    count = Place(key, shape, kind).count
                    out[key] = self.first.read(key, 0, count).clone().reshape(shape)
                    continue
                flat = torch.empty(Place(key, shape, kind).count, dtype=dtype or kind)
                for start, piece in self._pieces(key):
                    flat[start : start + len(piece)] = piece.to(flat.dtype)
                out[key] = flat.reshape(shape)
        return out

    def _layout(self, dtype: torch.dtype | None, shard_bytes: int) -> list[Place]:
        places: list[Place] = []
        shard, held = 0, 0
        for key in self.first.keys():  # noqa: SIM118
            shape, kind = self.first.info(key)
            place = Place(key, shape, dtype if dtype is not None and kind.is_floating_point else kind)
            if held and held + place.nbytes > shard_bytes:
                shard, held = shard + 1, 0
            place.shard, place.offset = shard, held
            held += place.nbytes
            places.append(place)
        return places

    def dry_run(
        self, *, dtype: torch.dtype | None = None, shard_bytes: int = 5_000_000_000, num_workers: int = 1
    ) -> dict[str, Any]:
        """What a save would cost: bytes read and written, shards, and the memory of the largest tensor.

        Args:
            dtype: of the result.
            shard_bytes: most bytes of a shard.
            num_workers: tensors that are merged side by side.
        """
        places = self._layout(dtype, shard_bytes)
        sources = [*self.targets, *([] if self.base is None else [self.base])]
        reads = sum(Place(key, *s.info(key)).nbytes for s in sources for key in s.keys())  # noqa: SIM118
        largest = max((place.count for place in places), default=0)
        held = {"sce": 9, "ties": 5 + len(self.targets)}.get(self.rule.name, 0)
        held = 0 if getattr(self.rule, "tau", 0.0) >= 1 else held
        piece = self.chunk * 4 * (3 * len(self.targets) + 4)
        sizes = [place.count * self._parts() for place in places]
        piece += 4 * max((size for size in sizes if size <= _HELD), default=0)
        return {
            "method": self.rule.name,
            "tensors": len(places),
            "bytes_read_once": reads,
            "bytes_written": sum(place.nbytes for place in places),
            "shards": places[-1].shard + 1 if places else 0,
            "working_bytes": num_workers * (piece + held * largest),
        }

    def save(
        self,
        out: PathLike,
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int = 5_000_000_000,
        num_workers: int = 1,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> None:
        """Write the merged checkpoint, with the pivot's configuration and tokenizer beside it.

        Shards grow in ``OUT.partial`` and get their place at the end; an interrupted run goes on with the
        next tensor.

        Args:
            out: the folder to make.
            dtype: of the result; the pivot's by default. Sums and differences are taken in float32 or better.
            shard_bytes: most bytes of a shard.
            num_workers: tensors that are merged side by side; the result is the same to the bit.
            overwrite: replace what is in ``out``.
            progress: show a bar.

        Raises:
            InputError: ``out`` is not empty.
        """
        place = Path(out)
        if occupied(place) and not overwrite:
            raise InputError(f"out is {out}, which is not empty; pass overwrite or another name")
        places = self._layout(dtype, shard_bytes)
        keys = self._floating()
        _keep_freed_memory()
        with resumable_directory(place, self._fingerprint(places), overwrite=overwrite) as work:
            done = Journal(work)
            files = open_shards(work, places)
            # Workers are threads of their own; torch's would get in their way.
            with threads(), ThreadPoolExecutor(max(1, num_workers)) as pool:
                todo = [entry for entry in places if entry.key not in done.keys]
                if todo:
                    self._prepare(keys)
                jobs = {pool.submit(self._write, entry, files[entry.shard]): entry.key for entry in todo}
                try:
                    for job in track(as_completed(jobs), "merging", total=len(jobs), enabled=progress):
                        job.result()
                        done.add(jobs[job])
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            finish(work, places, self.first.path, self._card(dtype))

    def _write(self, entry: Place, file: tuple[Path, int]) -> None:
        path, header = file
        with path.open("r+b", buffering=0) as out:
            width = torch.empty(0, dtype=entry.dtype).element_size()
            whole = self.first.info(entry.key)[1].is_floating_point
            pieces = (
                self._pieces(entry.key) if whole else iter([(0, self.first.read(entry.key, 0, entry.count))])
            )
            for start, piece in pieces:
                out.seek(header + entry.offset + start * width)
                out.write(raw_bytes(piece.to(entry.dtype).contiguous()).data)

    def _fingerprint(self, places: list[Place]) -> str:
        def stamp(source: Source) -> Any:
            if source.path is None:
                return [(key, str(source.info(key))) for key in source.keys()]  # noqa: SIM118
            files = sorted(source.path.glob("*")) if source.path.is_dir() else [source.path]
            return [
                (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()
            ]

        sources = [*self.targets, *([] if self.base is None else [self.base])]
        settings = {k: str(v) for k, v in vars(self.rule).items() if k not in ("groups", "layers")}
        layout = [(p.key, p.shard, p.offset, str(p.dtype)) for p in places]
        return digest(
            self.rule.name, settings, self.embeddings, [str(stamp(s)) for s in sources], str(layout)
        )

    def _card(self, dtype: torch.dtype | None) -> dict[str, Any]:
        return {
            "schema": "fusechat.merge/1",
            "method": self.rule.name,
            "settings": {k: v for k, v in vars(self.rule).items() if k not in ("groups", "layers")},
            "base": None if self.base is None else self.base.name,
            "targets": [source.name for source in self.targets],
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        }


def _named(value: Any, default: str) -> str:
    return Path(value).name if isinstance(value, str | os.PathLike) else default


def _keep_freed_memory() -> None:
    """Let glibc give chunks' memory out again instead of returning it to the system and faulting it in anew.

    Freeing one large block raises its thresholds to that block's size; nothing is touched, other systems do
    not mind.
    """
    torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8)

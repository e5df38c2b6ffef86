"""Results on disk that survive a kill: stores of arrays, lists of what was done, and shares of the work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fusion_core.atomic import PathLike, atomic_write
from fusion_core.checkpoint import digest_file
from fusion_core.errors import CheckpointError, InputError, StoreError, reading
from fusion_core.shards import CODES, read_header, write_tensors

SCHEMA = "fusion.store/1"
Arrays = dict[str, np.ndarray[Any, Any]]


def _plain(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} takes what JSON can say, finite numbers included: {error}") from error


def _difference(stored: Any, wanted: Any, path: str = "") -> str | None:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted({*stored, *wanted}):
            here = f"{path}.{key}" if path else key
            if key not in stored or key not in wanted:
                has, asked = stored.get(key, "nothing"), wanted.get(key, "nothing")
                return f"{here!r}: the store has {has!r}, wanted {asked!r}"
            if (found := _difference(stored[key], wanted[key], here)) is not None:
                return found
        return None
    same = type(stored) is type(wanted) and stored == wanted
    return None if same else f"{path!r}: the store has {stored!r}, wanted {wanted!r}"


def _check_manifest(manifest: Any) -> None:
    """Complain of what the rest of the store takes for granted."""
    if manifest["schema"] != SCHEMA:
        raise StoreError(f"it has schema {manifest['schema']!r}, wanted {SCHEMA!r}")
    kinds = {"kind": str, "fingerprint": dict, "complete": bool, "rows": int, "arrays": dict, "shards": list}
    for name, kind in kinds.items():
        if not isinstance(manifest[name], kind):
            raise StoreError(f"{name} is {str(manifest[name])[:40]!r}, wanted {kind.__name__}")
    _plain("fingerprint", manifest["fingerprint"])
    for shard in manifest["shards"]:
        rows = [shard["start"], shard["stop"]]
        if Path(shard["file"]).name != shard["file"] or not isinstance(shard["digest"], str):
            raise StoreError(f"shard {str(shard['file'])[:40]!r} is outside the folder or has no digest")
        if [type(row) for row in rows] != [int, int] or not 0 <= rows[0] < rows[1] < 2**62:
            raise StoreError(f"shard {shard['file']} holds the rows {rows}, wanted 0 <= start < stop")
    for name, (dtype, tail) in manifest["arrays"].items():
        if dtype not in CODES or not all(type(size) is int and size >= 0 for size in tail):
            raise StoreError(f"array {name} is {dtype!r} of {tail}, wanted a dtype and the shape of a row")


class ShardStore:
    """Rows of named arrays in numbered safetensors shards beside a ``manifest.json``.

    Each :meth:`append` writes a shard and then the manifest, both whole or not at all: after a kill between
    any two steps the store opens, :meth:`missing` tells which rows are still to be made, and the next append
    goes over what was left behind. One process writes at a time; any number may read.

    Attributes:
        folder: where it lies.
        schema: name of each array -> (dtype, shape of one row).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = ShardStore.create(folder, {"seed": 0}, {"logits": ("float16", (3,))})
        ...     store.append({"logits": np.ones((2, 3), np.float16)}, (0, 2))
        ...     store.missing(5), store[[1]]["logits"].tolist()
        ([(2, 5)], [[1.0, 1.0, 1.0]])
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self._maps: dict[str, Arrays] = {}
        self.schema = {name: (dtype, tuple(tail)) for name, (dtype, tail) in manifest["arrays"].items()}
        self._arrange(manifest)
        for before, after in pairwise(self._shards):
            if after["start"] < before["stop"]:
                raise StoreError(f"{folder}: {before['file']} and {after['file']} hold the same rows")
        for shard in self._shards:
            self._check(shard)

    def _arrange(self, manifest: dict[str, Any]) -> None:
        self._manifest = manifest
        self._shards: list[dict[str, Any]] = sorted(manifest["shards"], key=lambda shard: shard["start"])
        self._starts = np.array([shard["start"] for shard in self._shards], np.int64)
        self._stops = np.array([shard["stop"] for shard in self._shards], np.int64)

    @classmethod
    def create(
        cls,
        folder: PathLike,
        fingerprint: Mapping[str, Any],
        schema: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        kind: str = "arrays",
    ) -> ShardStore:
        """Make a store, or resume the one in ``folder`` that was made from the same things.

        Args:
            folder: where; made if it is not there.
            fingerprint: what the rows are made from, as JSON values.
            schema: name -> (numpy dtype by name, shape of one row).
            kind: a word for what the store holds.

        Raises:
            StoreError: the store there has another fingerprint (named with both values) or schema.
            InputError: a dtype that cannot be stored, or a fingerprint that is not JSON.
        """
        for name, (dtype, _) in schema.items():
            if dtype not in CODES or not hasattr(np, dtype):
                raise InputError(
                    f"schema[{name!r}] has dtype {dtype!r}, wanted a numpy dtype such as 'float16'"
                )
        if not schema:
            raise InputError("schema is empty, wanted name -> (dtype, shape of one row)")
        from fusion_core import __version__

        arrays = _plain("schema", {name: (dtype, tuple(tail)) for name, (dtype, tail) in schema.items()})
        wanted = _plain("fingerprint", fingerprint)
        if (Path(folder) / "manifest.json").exists():
            store = cls.open(folder, wanted)
            if (found := _difference(store._manifest["arrays"], arrays)) is not None:
                raise StoreError(f"{folder} has another schema in {found}")
            return store
        head = {
            "schema": SCHEMA,
            "kind": kind,
            "version": __version__,
            "fingerprint": wanted,
            "arrays": arrays,
        }
        store = cls(Path(folder), {**head, "rows": 0, "shards": [], "complete": False})
        store._write(store._manifest)
        return store

    @classmethod
    def open(cls, folder: PathLike, fingerprint: Mapping[str, Any] | None = None) -> ShardStore:
        """Open a store; the length of every shard is checked, its contents only by :meth:`verify`.

        Args:
            folder: where the store is.
            fingerprint: what it must have been made from; None takes any.

        Raises:
            StoreError: no store there, damaged, or another fingerprint; the differing field is named.
        """
        path = Path(folder) / "manifest.json"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"{folder} is no store: {path.name} cannot be read") from error
        with reading(path, "is damaged", StoreError):
            manifest = json.loads(data.decode("utf-8"))
            _check_manifest(manifest)
            store = cls(Path(folder), manifest)
        if fingerprint is not None:
            found = _difference(manifest["fingerprint"], _plain("fingerprint", fingerprint))
            if found is not None:
                raise StoreError(f"{folder} was made from something else; {found}")
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a worker process maps the files anew

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the rows were made from."""
        return self._manifest["fingerprint"]

    @property
    def kind(self) -> str:
        """A word for what the store holds."""
        return self._manifest["kind"]

    @property
    def complete(self) -> bool:
        """Whether :meth:`finish` was called and every row was there."""
        return self._manifest["complete"]

    def __len__(self) -> int:
        """How many rows are there."""
        return int((self._stops - self._starts).sum())

    def _check(self, shard: dict[str, Any]) -> None:
        try:
            header, _ = read_header(self.folder / shard["file"])
        except CheckpointError as error:
            raise StoreError(
                f"{self.folder}: shard {shard['file']} does not fit the manifest: {error}"
            ) from error
        rows = shard["stop"] - shard["start"]
        has = {name: (info.dtype, info.shape) for name, info in header.items()}
        wanted = {name: (dtype, (rows, *tail)) for name, (dtype, tail) in self.schema.items()}
        if has != wanted:
            raise StoreError(f"{self.folder}: shard {shard['file']} has {has}, the manifest wants {wanted}")

    def _write(self, manifest: dict[str, Any]) -> None:
        with atomic_write(self.folder / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=1)
        self._arrange(manifest)

    def append(self, arrays: Mapping[str, np.ndarray[Any, Any]], index: tuple[int, int]) -> None:
        """Write the rows ``start`` to ``stop`` as one shard.

        Args:
            arrays: name -> (stop - start, *shape of one row), of exactly the schema's names and dtypes.
            index: (start, stop); shards may come in any order.

        Raises:
            InputError: other names, dtypes or shapes than the schema's, or rows that are there already.
            StoreError: the store is complete.
        """
        start, stop = int(index[0]), int(index[1])
        if self.complete:
            raise StoreError(f"{self.folder} is complete with {len(self)} rows; nothing can be appended")
        if not 0 <= start < stop:
            raise InputError(f"index is {index}, wanted 0 <= start < stop")
        if overlap := next((s for s in self._shards if s["start"] < stop and start < s["stop"]), None):
            raise InputError(f"index is {index}, but rows {overlap['start']} to {overlap['stop']} are there")
        has = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        wanted = {name: (dtype, (stop - start, *tail)) for name, (dtype, tail) in self.schema.items()}
        if has != wanted:
            raise InputError(f"arrays are {has}, wanted {wanted}")
        name = f"shard-{len(self._shards):05d}.safetensors"
        with atomic_write(self.folder / name) as file:
            write_tensors(file, arrays)
        shard = {"file": name, "start": start, "stop": stop, "digest": digest_file(self.folder / name)}
        rows = len(self) + stop - start
        self._write({**self._manifest, "rows": rows, "shards": [*self._manifest["shards"], shard]})

    def missing(self, n: int) -> list[tuple[int, int]]:
        """The (start, stop) ranges of the first ``n`` rows that are not there."""
        gaps: list[tuple[int, int]] = []
        end = 0
        for start, stop in [*((s["start"], s["stop"]) for s in self._shards), (n, n)]:
            if end < min(start, n):
                gaps.append((end, min(start, n)))
            end = max(end, stop)
        return gaps

    def finish(self, n: int) -> None:
        """Mark the store complete with exactly ``n`` rows; calling it again changes nothing.

        Raises:
            StoreError: rows are missing, or there are more.
        """
        if gaps := self.missing(n):
            raise StoreError(
                f"{self.folder} cannot be complete: rows {gaps[0][0]} to {gaps[0][1]} of {n} are missing"
            )
        if len(self) != n:
            raise StoreError(f"{self.folder} has {len(self)} rows, finish was told {n}")
        if not self.complete:
            self._write({**self._manifest, "complete": True})

    def verify(self) -> None:
        """Read every shard and compare it with its digest in the manifest.

        Raises:
            StoreError: names the first shard that differs.
        """
        for shard in self._shards:
            self._check(shard)
            if digest_file(self.folder / shard["file"]) != shard["digest"]:
                raise StoreError(
                    f"{self.folder}: shard {shard['file']} does not have the digest of the manifest"
                )

    def _map(self, shard: dict[str, Any]) -> Arrays:
        file = shard["file"]
        if file not in self._maps:
            self._check(shard)
            header, _ = read_header(self.folder / file)
            memory = np.memmap(self.folder / file, np.uint8, "r")
            self._maps[file] = {
                name: memory[info.offset : info.offset + info.nbytes].view(info.dtype).reshape(info.shape)
                for name, info in header.items()
            }
        return self._maps[file]

    def __getitem__(self, rows: slice | np.ndarray[Any, Any] | list[int]) -> Arrays:
        """Copies of some rows; only the bytes of these rows are read.

        Args:
            rows: a slice, or 1-D integers in any order, negative ones from the end.

        Raises:
            InputError: no slice and no integers.
            StoreError: a row is not there; the first such is named.
        """
        extent = self._shards[-1]["stop"] if self._shards else 0
        wanted = np.arange(*rows.indices(extent)) if isinstance(rows, slice) else np.asarray(rows)
        wanted = wanted.astype(np.int64) if wanted.size == 0 else wanted
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise InputError(
                f"rows is {wanted.dtype} of shape {wanted.shape}, wanted a slice or 1-D integers"
            )
        wanted = np.where(wanted < 0, wanted + extent, wanted)
        place = np.searchsorted(self._stops, wanted, "right")
        bad = (wanted < 0) | (wanted >= extent)
        bad[~bad] = wanted[~bad] < self._starts[place[~bad]]
        if bad.any():
            raise StoreError(f"{self.folder} has no row {int(wanted[bad.argmax()])}; it has {len(self)} rows")
        out = {n: np.empty((len(wanted), *tail), dtype) for n, (dtype, tail) in self.schema.items()}
        for number in np.unique(place):
            here = place == number
            local = wanted[here] - self._starts[number]
            for name, array in self._map(self._shards[number]).items():
                out[name][here] = array[local]
        return out


class Manifest:
    """An append-only list of what a run has done, one JSON line for each key, which a kill cannot break.

    A last line that was cut off is dropped when the file is opened again; of several lines with one key the
    last counts. A key with an ``error`` among its facts counts as failed and not as done, so that a resumed
    run tries it again.

    Args:
        path: the file, made on the first :meth:`add`; its directory must be there.

    Raises:
        StoreError: a line before the last is no JSON object with a ``key``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = Manifest(f"{folder}/manifest.jsonl")
        ...     manifest.add("a.png", seconds=0.5)
        ...     manifest.add("b.png", error="cut off")
        ...     "a.png" in Manifest(manifest.path), "b.png" in manifest, manifest.failures()
        (True, False, {'b.png': 'cut off'})
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.entries: dict[str, dict[str, Any]] = {}
        text = self.path.read_bytes() if self.path.exists() else b""
        whole, _, cut = text.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                entry = json.loads(line)
                self.entries[entry.pop("key")] = entry
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise StoreError(f"{path}, line {number}: no JSON object with a key") from error
        if cut:
            with self.path.open("r+b") as file:
                file.truncate(len(text) - len(cut))

    def add(self, key: str, **facts: Any) -> None:
        """Note that a key is done, or failed where ``error`` is among the facts; on disk when it returns.

        Raises:
            InputError: facts that JSON cannot say.
        """
        facts = _plain("facts", facts)
        line = json.dumps({"key": key, **facts}).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.entries[key] = facts

    @property
    def done(self) -> frozenset[str]:
        """The keys that are done."""
        return frozenset(key for key, facts in self.entries.items() if "error" not in facts)

    def __contains__(self, key: object) -> bool:
        return key in self.entries and "error" not in self.entries[key]  # type: ignore[index]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return iter(self.entries.items())

    def __len__(self) -> int:
        return len(self.entries)

    def failures(self) -> dict[str, str]:
        """The keys that failed, with their errors."""
        return {key: str(facts["error"]) for key, facts in self.entries.items() if "error" in facts}


Item = TypeVar("Item")


def parse_shard(shard: str | None) -> tuple[int, int]:
    """The two numbers of ``"i/n"``: share ``i`` of ``n``, counted from 0; None is the whole, ``(0, 1)``.

    Raises:
        InputError: no such pair, or not 0 <= i < n.

    Example:
        >>> parse_shard("1/4")
        (1, 4)
    """
    if shard is None:
        return 0, 1
    left, slash, right = shard.partition("/")
    if not (slash and left.isdecimal() and right.isdecimal() and int(left) < int(right)):
        raise InputError(f"shard is {shard!r}, wanted i/n with 0 <= i < n, such as 0/4")
    return int(left), int(right)


def take_shard(items: Sequence[Item], shard: str | None) -> list[Item]:
    """The share of the work that ``shard`` names: every n-th of the sorted items, from the i-th on.

    Args:
        items: things that can be sorted, such as paths.
        shard: ``"i/n"``; None takes all.

    Example:
        >>> take_shard(["c", "a", "b"], "0/2")
        ['a', 'c']
    """
    i, n = parse_shard(shard)
    return sorted(items)[i::n]  # type: ignore[type-var]

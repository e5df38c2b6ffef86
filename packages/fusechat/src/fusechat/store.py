"""A source's top-k distributions on disk, independent of any pivot: ragged rows in safetensors shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusechat.errors import AlignmentError
from fusechat.spans import Encoded, load_tokenizer
from fusechat.texts import Text
from fusion_core.atomic import PathLike, atomic_write
from fusion_core.checkpoint import digest, digest_file
from fusion_core.errors import CheckpointError, InputError, StoreError, reading
from fusion_core.shards import read_header, write_tensors

SCHEMA = "fusion.store/1"
KIND = "fusechat.topk"
Arrays = dict[str, NDArray[Any]]
_NAMES = {
    "ids", "logits", "indices", "lse", "end", "ce", "supervised", "row_ptr", "text", "text_ptr", "spans",
    "span_ptr", "whole",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class StoredRow:
    """One dialogue as one source saw it.

    Attributes:
        text: rendered, with its spans.
        encoded: ids, ends and supervision of the source's tokens; none where the dialogue was skipped.
        logits: (tokens, k) the largest, descending.
        indices: (tokens, k) their ids, int32.
        lse: (tokens,) logsumexp over the source's vocabulary.
        token_ce: (tokens,) -log P of the next token, NaN at the last.
    """

    text: Text
    encoded: Encoded
    logits: NDArray[Any]
    indices: NDArray[Any]
    lse: NDArray[np.float32]
    token_ce: NDArray[np.float32]

    @property
    def ce(self) -> float:
        """Mean cross-entropy over the supervised next tokens; NaN where there is none."""
        learned = self.encoded.supervised[1:]
        return float(self.token_ce[:-1][learned].astype(np.float64).mean()) if learned.any() else float("nan")


def shard_arrays(rows: Sequence[StoredRow], k: int, logits: str, indices: str) -> Arrays:
    """The flat arrays of a shard."""

    def joined(parts: list[Any], dtype: Any, tail: tuple[int, ...] = ()) -> NDArray[Any]:
        parts = [np.asarray(part, dtype).reshape(-1, *tail) for part in parts]
        return np.concatenate([np.zeros((0, *tail), dtype), *parts])

    def pointers(sizes: list[int]) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    letters = [np.frombuffer(row.text.text.encode("utf-8", "surrogatepass"), np.uint8) for row in rows]
    return {
        "ids": joined([row.encoded.ids for row in rows], np.int32),
        "logits": joined([row.logits for row in rows], logits, (k,)),
        "indices": joined([row.indices for row in rows], indices, (k,)),
        "lse": joined([row.lse for row in rows], np.float32),
        "end": joined([row.encoded.ends for row in rows], np.int32),
        "ce": joined([row.token_ce for row in rows], np.float32),
        "supervised": joined([row.encoded.supervised for row in rows], np.uint8),
        "row_ptr": pointers([len(row.encoded) for row in rows]),
        "text": joined(letters, np.uint8),
        "text_ptr": pointers([len(text) for text in letters]),
        "spans": joined([row.text.spans for row in rows], np.int32, (2,)),
        "span_ptr": pointers([len(row.text.spans) for row in rows]),
        "whole": np.array([row.text.whole for row in rows], np.uint8),
    }


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Look at what a manifest says before it is used; whatever is missing is a KeyError."""
    if manifest["schema"] != SCHEMA or manifest["kind"] != KIND:
        raise StoreError(f"it is of no store of top-k distributions, its kind is {manifest['kind']!r}")
    for name, kind in (("fingerprint", dict), ("shards", list), ("complete", bool), ("digest", str)):
        if not isinstance(manifest[name], kind):
            raise StoreError(f"{name} is {manifest[name]!r:.80}, wanted a {kind.__name__}")
    for name in ("k", "shard_rows", "rows", "vocab_size"):
        if type(manifest[name]) is not int or not 1 <= manifest[name] < 1 << 62:
            raise StoreError(f"{name} is {manifest[name]!r:.80}, wanted a whole number of at least 1")
    starts = [shard["start"] for shard in manifest["shards"]]
    wanted = range(0, manifest["rows"], manifest["shard_rows"])
    if manifest["complete"] and (len(starts) != len(wanted) or starts != list(wanted)):
        raise StoreError(f"its shards begin at the rows {starts!r:.80}, which does not fit its sizes")


class TopKStore:
    """Dialogues with the top-k logits of one source, written shard by shard and read by the row.

    Shards hold a fixed number of rows each, so any process may write any shard: the result does not depend on
    who wrote what, or in which order. ``manifest.json`` says what the store is made from; every shard carries
    the digest of that, and a folder with all shards is finished by :meth:`finish`.

    Args:
        folder: where the store is; see :meth:`create` to make one.

    Raises:
        StoreError: no store there, damaged, or a shard of another store.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"{folder} is no store: manifest.json cannot be read") from error
        with reading(path, "is damaged", StoreError):
            self._manifest: dict[str, Any] = json.loads(data.decode("utf-8"))
            _check_manifest(self._manifest)
        self.k, self.shard_rows = self._manifest["k"], self._manifest["shard_rows"]
        self._total, self._mark = self._manifest["rows"], str(self._manifest["digest"])
        self._maps: dict[int, Arrays] = {}
        self._places: dict[str, int] | None = None
        if self.complete:
            for shard in self._manifest["shards"]:
                self._check(shard["start"] // self.shard_rows)

    @classmethod
    def create(
        cls,
        folder: PathLike,
        fingerprint: Mapping[str, Any],
        *,
        rows: int,
        k: int,
        vocab_size: int,
        logits_dtype: str = "float16",
        shard_rows: int = 256,
    ) -> TopKStore:
        """Make a store, or open the one in ``folder`` that was made from the same things.

        Args:
            folder: where; made if it is not there.
            fingerprint: what the rows are made from, as JSON values.
            rows: number of dialogues.
            k: entries per token.
            vocab_size: of the source; decides whether ids take two bytes or four.
            logits_dtype: ``"float16"`` or ``"float32"``.
            shard_rows: dialogues per shard.

        Raises:
            InputError: numbers or dtype out of range.
            StoreError: the store there was made from something else; the first differing field is named.
        """
        if rows < 1 or shard_rows < 1 or not 1 <= k <= vocab_size:
            raise InputError(
                f"rows is {rows}, shard_rows {shard_rows}, k {k}, wanted at least 1 each and k at most the "
                f"vocabulary's {vocab_size}"
            )
        if logits_dtype not in ("float16", "float32"):
            raise InputError(f"logits_dtype is {logits_dtype!r}, wanted 'float16' or 'float32'")
        indices = "uint16" if vocab_size <= 1 << 16 else "int32"
        layout = {
            "rows": rows,
            "k": k,
            "vocab_size": vocab_size,
            "logits_dtype": logits_dtype,
            "indices_dtype": indices,
            "shard_rows": shard_rows,
        }
        made = json.loads(json.dumps({**layout, "fingerprint": dict(fingerprint)}))
        if (Path(folder) / "manifest.json").exists():
            store = cls(folder)
            for key, wanted in {**made, **made["fingerprint"]}.items():
                has = store._manifest.get(key, store._manifest["fingerprint"].get(key))
                if key != "fingerprint" and has != wanted:
                    raise StoreError(
                        f"{folder} was made from something else; "
                        f"{key!r}: the store has {has!r}, wanted {wanted!r}"
                    )
            return store
        from fusion_core.demo import package_version

        manifest = {
            "schema": SCHEMA,
            "kind": KIND,
            "version": package_version("fusechat"),
            **made,
            "digest": digest(made),
            "shards": [],
            "complete": False,
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(folder) / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=1)
        return cls(folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a worker process maps the files anew

    def __len__(self) -> int:
        return self._total

    def tokenizer(self) -> Any:
        """The tokenizer of the model that the distributions are of.

        Raises:
            StoreError: the store does not name it.
            InputError: it cannot be loaded.
        """
        with reading(self.folder):
            name = self.fingerprint.get("model")
            if not isinstance(name, str):
                raise StoreError(f"the source is {name!r}, wanted a model's name or folder")
            return load_tokenizer(name)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the rows were made from."""
        return self._manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Number of classes of the source's logits."""
        return int(self._manifest["vocab_size"])

    @property
    def complete(self) -> bool:
        """Whether every shard is there and :meth:`finish` was called."""
        return bool(self._manifest["complete"])

    @property
    def nbytes(self) -> int:
        """Bytes of the shards that are there."""
        return sum(self._path(n).stat().st_size for n in range(self.shards) if self._path(n).exists())

    @property
    def shards(self) -> int:
        """Number of shards of the whole store."""
        return -(-self._total // self.shard_rows)

    def _path(self, number: int) -> Path:
        return self.folder / f"rows-{number:06d}.safetensors"

    def shard_range(self, number: int) -> range:
        """The rows of a shard."""
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self._total))

    def missing(self) -> list[int]:
        """Shards that are not there yet.

        Raises:
            StoreError: a shard is damaged or of another store.
        """
        return [n for n in range(self.shards) if not self._path(n).exists() or not self._check(n)]

    def _check(self, number: int) -> bool:
        path = self._path(number)
        try:
            header, metadata = read_header(path)
        except CheckpointError as error:
            raise StoreError(f"{self.folder}: shard {path.name} cannot be used: {error}") from error
        if metadata.get("store") != self._mark or set(header) != _NAMES:
            raise StoreError(f"{self.folder}: shard {path.name} belongs to another store")
        sizes = [list(header[name].shape[1:]) for name in ("logits", "indices")]
        if sizes != [[self.k]] * 2:
            raise StoreError(
                f"{self.folder}: shard {path.name} has {sizes} entries a token, manifest.json {self.k}"
            )
        return True

    def write(self, number: int, rows: Sequence[StoredRow]) -> None:
        """Write one shard, whole or not at all.

        Raises:
            InputError: another number of rows than the shard's.
            StoreError: the store is complete.
        """
        if self.complete:
            raise StoreError(f"{self.folder} is complete; nothing can be written to it")
        if len(rows) != len(self.shard_range(number)):
            raise InputError(
                f"rows are {len(rows)}, wanted {len(self.shard_range(number))} for shard {number}"
            )
        layout = self._manifest
        arrays = shard_arrays(rows, self.k, layout["logits_dtype"], layout["indices_dtype"])
        with atomic_write(self._path(number)) as file:
            write_tensors(file, arrays, {"store": self._mark})

    def finish(self) -> bool:
        """Mark the store complete if every shard is there; any number of processes may call it.

        Returns:
            Whether it is complete now.
        """
        if self.complete or self.missing():
            return self.complete
        shards = [
            {
                "file": self._path(n).name,
                "start": r.start,
                "stop": r.stop,
                "digest": digest_file(self._path(n)),
            }
            for n, r in ((n, self.shard_range(n)) for n in range(self.shards))
        ]
        manifest = {**self._manifest, "shards": shards, "complete": True}
        with atomic_write(self.folder / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=1)
        self._manifest = manifest
        return True

    def verify(self) -> None:
        """Compare every shard with its digest in the manifest.

        Raises:
            StoreError: names the first shard that differs.
        """
        for number, shard in enumerate(self._manifest["shards"]):
            if digest_file(self._path(number)) != shard["digest"]:
                raise StoreError(
                    f"{self.folder}: shard {shard['file']} does not have the digest of the manifest"
                )

    def _map(self, number: int) -> Arrays:
        if number not in self._maps:
            self._check(number)
            header, _ = read_header(self._path(number))
            memory = np.memmap(self._path(number), np.uint8, "r")
            self._maps[number] = {
                name: memory[info.offset : info.offset + info.nbytes].view(info.dtype).reshape(info.shape)
                for name, info in header.items()
            }
        return self._maps[number]

    def _place(self, row: int) -> tuple[Arrays, int]:
        if not -self._total <= row < self._total:
            raise InputError(f"row is {row}, but the store has {self._total} rows")
        number, local = divmod(row % self._total, self.shard_rows)
        if not self._path(number).exists():
            raise StoreError(
                f"{self.folder} does not hold row {row} yet; run the collection again to resume it"
            )
        return self._map(number), local

    def text(self, row: int) -> Text:
        """The rendered dialogue of a row."""
        arrays, at = self._place(row)
        begin, end = arrays["text_ptr"][at : at + 2]
        first, last = arrays["span_ptr"][at : at + 2]
        spans = tuple((int(a), int(b)) for a, b in arrays["spans"][first:last])
        letters = arrays["text"][begin:end].tobytes().decode("utf-8", "surrogatepass")
        return Text(letters, spans, bool(arrays["whole"][at]))

    def __getitem__(self, row: int) -> StoredRow:
        """One dialogue; only its bytes are read.

        Raises:
            InputError: no such row.
            StoreError: the row is not collected yet.
        """
        arrays, at = self._place(row)
        begin, end = (int(place) for place in arrays["row_ptr"][at : at + 2])
        part = slice(begin, end)
        encoded = Encoded(
            np.array(arrays["ids"][part]), np.array(arrays["end"][part]), arrays["supervised"][part] != 0
        )
        return StoredRow(
            self.text(row),
            encoded,
            np.array(arrays["logits"][part]),
            arrays["indices"][part].astype(np.int32),
            np.array(arrays["lse"][part]),
            np.array(arrays["ce"][part]),
        )

    def find(self, text: Text, row: int | None = None) -> int:
        """The row that holds a text.

        Args:
            text: a rendered dialogue.
            row: how the caller counts it, for the message.

        Raises:
            AlignmentError: the store does not hold it; the nearest text and the first character that differs
                are named.
        """
        if self._places is None:
            self._places = {}
            for number in range(self._total):
                self._places.setdefault(self.text(number).digest, number)
        found = self._places.get(text.digest)
        if found is not None:
            return found
        near, same = max(
            ((n, _common(self.text(n).text, text.text)) for n in range(self._total)), key=lambda pair: pair[1]
        )
        said = "the dialogue" if row is None else f"dialogue {row}"
        raise AlignmentError(
            f"{said} is not in {self.folder}: the nearest, row {near}, differs from character {same} on "
            f"({self.text(near).text[same : same + 20]!r} there, {text.text[same : same + 20]!r} here); "
            "collect with the same dialogues and the pivot's chat template"
        )


def check_same_texts(first: TopKStore, second: TopKStore) -> None:
    """Raise unless two stores hold the same texts in the same rows.

    Raises:
        AlignmentError: names the row and the first character that differs.
    """
    if len(first) != len(second):
        raise AlignmentError(
            f"{first.folder} has {len(first)} rows, {second.folder} {len(second)}; "
            "wanted stores of the same texts"
        )
    for row in range(len(first)):
        a, b = first.text(row).text, second.text(row).text
        if a != b:
            at = _common(a, b)
            raise AlignmentError(
                f"{first.folder} and {second.folder} hold different texts: row {row} differs from character "
                f"{at} on ({a[at : at + 20]!r} and {b[at : at + 20]!r})"
            )


def _common(first: str, second: str) -> int:
    size = min(len(first), len(second))
    return next((n for n in range(size) if first[n] != second[n]), size)

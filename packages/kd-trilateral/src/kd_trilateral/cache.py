"""The teacher's logits on disk: computed once, resumable, and tied to what they were made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fusion_core.batching import map_batches
from fusion_core.checkpoint import PathLike, digest_state
from fusion_core.device import resolve_device
from fusion_core.errors import ConfigError, DataError, StoreError, reading
from fusion_core.modules import untouched
from fusion_core.numerics import TopK
from fusion_core.progress import track
from fusion_core.store import ShardStore
from kd_trilateral.classmean import ClassMeanState, class_mean
from kd_trilateral.forward import call_arguments
from kd_trilateral.losses import as_pair
from kd_trilateral.rowsource import Rows, check_teacher, forward_teacher

_FORMAT = 1
_SHARD_ROWS = 8192
_CHUNK = 16384
_FLOOR = -60.0


_LARGEST = 2**31 - 1  # of an index that is stored


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise StoreError(f"{name} is {value!r}, wanted a whole number from 1 to {_LARGEST}")
    return value


class TeacherCache:
    """Logits of every training row, memory-mapped.

    A cache knows the digest of the teacher's weights and of the data; opening it for others is an error that
    names the difference. Whole rows are stored (float16 by default), or the ``top_k`` largest
    log-probabilities, whose left-over mass is spread evenly over the other classes.

    Args:
        store: an open store, see :meth:`open` and :meth:`build`.

    Raises:
        StoreError: the store is unfinished.

    Example:
        >>> import tempfile, pathlib
        >>> teacher = nn.Linear(4, 3).eval()
        >>> data = torch.randn(10, 4), torch.arange(10) % 3
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = TeacherCache.build(teacher, data, pathlib.Path(folder) / "teacher.kdc")
        ...     cache.logits(torch.tensor([0, 9])).shape, cache.info()["rows"]
        (torch.Size([2, 3]), 10)
    """

    def __init__(self, store: ShardStore) -> None:
        if not store.complete:
            raise StoreError(
                f"{store.folder} is unfinished ({len(store)} rows so far); build it again with the same "
                "teacher "
                "and data, and it goes on where it stopped"
            )
        self.store = store
        with reading(store.folder, "has a damaged manifest", StoreError):
            found = store.fingerprint
            self.num_classes = _count("classes", found["classes"])
            self.views = _count("views", found["views"])
            self.top_k: int | None = None if found["top_k"] is None else _count("top_k", found["top_k"])
            shape = store.schema["logits"][1]
            if shape != (self.views, self.top_k or self.num_classes):
                raise StoreError(f"a row of logits is {shape}, wanted (views, classes or top_k)")

    @classmethod
    def build(
        cls,
        teacher: nn.Module,
        data: Any,
        path: PathLike,
        *,
        top_k: int | None = None,
        dtype: Literal["float16", "float32"] = "float16",
        task: Literal["multiclass", "binary"] = "multiclass",
        views: int = 1,
        batch_size: int = 256,
        num_workers: int = 0,
        device: str | torch.device = "auto",
        progress: bool | None = None,
    ) -> TeacherCache:
        """Run the teacher over the rows that are not stored yet.

        Args:
            teacher: any module with logits; used in evaluation mode, without gradients; comes back untouched.
            data: the training rows, see :class:`~kd_trilateral.rowsource.Rows`.
            path: a directory, ``NAME.kdc`` by custom.
            top_k: classes stored per row; None = all.
            dtype: of the stored numbers.
            task: ``"binary"`` stores the pair (0, u) of a single logit u.
            views: for random augmentation: the dataset's ``view(v)`` gives the v-th fixed version of it, and
                each is stored. A dataset that says ``random = True`` is refused otherwise.
            batch_size: rows per forward; halved by itself where memory runs out.
            num_workers: loader processes.
            device: where the teacher runs.
            progress: show a bar; None = on a terminal.

        Returns:
            The finished cache, opened.

        Raises:
            DataError: logits that are not finite (rows are named), a random dataset without views.
            StoreError: the path holds the cache of another teacher or of other data.
        """
        source = Rows(data)
        parts = _views(source, views)
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k is {top_k}, wanted at least 1")
        check_teacher(teacher)
        where = resolve_device(device)
        home = next((p.device for p in teacher.parameters()), where)

        def run(x: Any) -> Tensor:
            found = forward_teacher(teacher, x, where)
            return as_pair(found) if task == "binary" else found

        try:
            teacher.to(where)
            with untouched(teacher):
                classes = run(parts[0][torch.arange(1)][0]).shape[1]
            kept = None if top_k is None or top_k >= classes else top_k
            fingerprint = {
                "format": _FORMAT,
                "rows": len(source),
                "classes": classes,
                "dtype": dtype,
                "top_k": kept,
                "task": task,
                "views": views,
                "teacher": digest_state(teacher.state_dict()),
                "data": source.fingerprint(),
            }
            width = (views, classes if kept is None else kept)
            schema = {"logits": (dtype, width), "labels": ("int64", ())}
            if kept is not None:
                schema["indices"] = ("int32", width)
            store = ShardStore.create(path, fingerprint, schema, kind="kd-trilateral teacher cache")
            cuts = [
                (start, min(start + _SHARD_ROWS, stop))
                for first, stop in store.missing(len(source))
                for start in range(first, stop, _SHARD_ROWS)
            ]
            with untouched(teacher):
                for start, stop in track(cuts, "teacher logits", enabled=progress):
                    rows = torch.arange(start, stop).split(batch_size)
                    store.append(_shard(run, parts, rows, num_workers, kept, dtype), (start, stop))
            store.finish(len(source))
        finally:
            teacher.to(home)
        return cls(store)

    @classmethod
    def open(cls, path: PathLike, teacher: nn.Module | None = None, data: Any = None) -> TeacherCache:
        """Open a finished cache.

        Args:
            path: its directory.
            teacher: must be the one that it was made from; None is not checked.
            data: likewise.

        Raises:
            StoreError: no cache there, unfinished, damaged, or made from something else.
        """
        found = ShardStore.open(path)
        wanted = dict(found.fingerprint)
        if "teacher" not in wanted or wanted.get("format") != _FORMAT:
            raise StoreError(f"{path} holds {found.kind}, wanted a teacher cache of format {_FORMAT}")
        if teacher is not None:
            wanted["teacher"] = digest_state(teacher.state_dict())
        if found.complete and len(found) != wanted.get("rows"):
            raise StoreError(
                f"{path}: its shards have {len(found)} rows, its manifest tells of {wanted.get('rows')}"
            )
        if data is not None:
            rows = Rows(data)
            wanted |= {"rows": len(rows), "data": rows.fingerprint()}
        return cls(ShardStore.open(path, wanted))

    def __len__(self) -> int:
        return len(self.store)

    def logits(self, index: Tensor | slice, view: int = 0) -> Tensor:
        """Logits (log-probabilities of a top-k cache) of some rows, ``(rows, classes)`` float32."""
        part = self.store[index.numpy() if isinstance(index, Tensor) else index]
        values = torch.from_numpy(part["logits"][:, view % self.views].astype(np.float32))
        if self.top_k is None:
            return values
        places = torch.from_numpy(part["indices"][:, view % self.views].astype(np.int64))
        log_probs = TopK(values, places, torch.zeros(len(values))).log_probs(self.num_classes, tail="uniform")
        return log_probs.clamp_min(_FLOOR)  # rounding may leave the tail no mass

    def labels(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Labels of some rows, ``(rows,)``."""
        return torch.from_numpy(self.store[index.numpy() if isinstance(index, Tensor) else index]["labels"])

    def class_mean(self, temperature: float = 1.0) -> Tensor:
        """T-bar ``(classes, classes)`` of all rows and views, streamed."""
        state: ClassMeanState | None = None
        tbar = torch.empty(0)
        for start in range(0, len(self), _CHUNK):
            part = slice(start, min(start + _CHUNK, len(self)))
            for view in range(self.views):
                t = (self.logits(part, view) / temperature).softmax(-1)
                tbar, state = class_mean(t, self.labels(part), self.num_classes, state)
        return tbar

    def verify(self) -> None:
        """Compare every shard with its digest; StoreError names the first that differs."""
        self.store.verify()

    def info(self) -> dict[str, Any]:
        """What the cache holds and what it was made from."""
        folder = self.store.folder
        size = sum(file.stat().st_size for file in folder.iterdir())
        return {"path": str(folder), "bytes": size, "complete": self.store.complete, **self.store.fingerprint}


def _views(source: Rows, views: int) -> list[Rows]:
    if views == 1:
        if getattr(source.dataset, "random", False):
            raise DataError(
                "the dataset says that it is random, so one stored row would not be what training sees; "
                "give it "
                "a view(v) method and pass views=V"
            )
        return [source]
    if not hasattr(source.dataset, "view"):
        raise DataError(f"views is {views}, but the dataset has no view(v) method that fixes its randomness")
    return [Rows(source.dataset.view(v)) for v in range(views)]


def _shard(
    run: Callable[[Any], Tensor],
    parts: list[Rows],
    order: Sequence[Tensor],
    num_workers: int,
    kept: int | None,
    dtype: str,
) -> dict[str, Any]:
    """Logits and labels of one shard; each row is read once per view, whatever the forward's size becomes."""
    limit = torch.finfo(getattr(torch, dtype)).max
    views: list[Tensor] = []
    labels: list[Tensor] = []
    for part in parts:
        found: list[Tensor] = []
        for index, x, y in part.batches(order, num_workers):
            args, kwargs = call_arguments(x)
            names, packed = (*kwargs,), (*args, *kwargs.values())
            found += map_batches(
                lambda some, names=names, x=x: run(_like(x, some, names)), packed, len(index)
            )
            if part is parts[0]:
                labels.append(y)
        logits = torch.cat(found)
        bad = ~(torch.isfinite(logits) & (logits.abs() <= limit)).all(-1)
        if bool(bad.any()):
            first = int(order[0][0])
            shown = (bad.nonzero().flatten()[:8] + first).tolist()
            raise DataError(
                f"the teacher's logits are not finite in {dtype} in rows {shown} ({int(bad.sum())} of rows "
                f"{first} to {first + len(bad)}); mend the teacher or those rows, or pass dtype='float32'"
            )
        views.append(logits)
    stacked = torch.stack(views, dim=1)
    y = torch.cat(labels).long().numpy()
    if kept is None:
        return {"logits": stacked.numpy().astype(dtype), "labels": y}
    top = TopK.from_logits(stacked, kept)
    values = (top.values - top.lse.unsqueeze(-1)).numpy().astype(dtype)
    return {"logits": values, "indices": top.indices.numpy().astype(np.int32), "labels": y}


def _like(x: Any, leaves: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    """The leaves in the structure of the inputs that they were cut from."""
    if names:
        return dict(zip(names, leaves, strict=True))
    return leaves if isinstance(x, (tuple, list)) else leaves[0]

"""Rows of training data by number: tensors or any map-style dataset, and the teacher's logits beside them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from fusion_core.checkpoint import digest
from fusion_core.errors import DataError, FusionWarning, ShapeError
from fusion_core.modules import logits_of, untouched
from fusion_core.seeding import generator
from kd_trilateral.forward import call_arguments

_SAMPLED = 64


class Rows:
    """A data set whose rows are fetched by number.

    Args:
        data: ``(x, y)`` of equally long tensors or arrays (x may be a tuple or mapping of them), a
            ``TensorDataset``, or a map-style dataset of ``(x, y)`` pairs or mappings with ``labels``.

    Raises:
        DataError: another structure, or no rows.
    """

    def __init__(self, data: Any) -> None:
        self.dataset: Any = None
        self.tensors: tuple[Any, Tensor] | None = None
        self._labels: Tensor | None = None
        if isinstance(data, TensorDataset):
            *parts, y = data.tensors
            data = (parts[0] if len(parts) == 1 else tuple(parts), y)
        if isinstance(data, Rows):
            self.dataset, self.tensors, self._labels = data.dataset, data.tensors, data._labels
        elif isinstance(data, list) and len(cast("list[Any]", data)) != 2:
            self.dataset = data  # a list of rows
        elif isinstance(data, (tuple, list)):
            pair = cast("tuple[Any, ...]", data)
            if len(pair) != 2:
                raise DataError(f"data has {len(pair)} parts, wanted (x, y)")
            self.tensors = (_tensors(pair[0]), class_indices(pair[1]))
            lengths = {len(part) for part in (*_leaves(self.tensors[0]), self.tensors[1])}
            if len(lengths) != 1:
                raise ShapeError(f"x and y have {sorted(lengths)} rows, wanted as many of each")
        elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (dict, str)):
            self.dataset = data
        else:
            raise DataError(f"data is a {type(data).__name__}, wanted (x, y) or a map-style dataset")
        if not len(self):
            raise DataError("data has no rows, wanted at least one")

    def __len__(self) -> int:
        return len(self.dataset) if self.tensors is None else len(self.tensors[1])

    def __getitem__(self, index: Tensor) -> tuple[Any, Tensor]:
        """The inputs and labels of some rows."""
        if self.tensors is not None:
            x, y = self.tensors
            return _take(x, index), y[index]
        return _split(default_collate([self.dataset[int(i)] for i in index]))

    def batches(self, order: Sequence[Tensor], num_workers: int = 0) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """``(index, x, y)`` for each entry of an order; worker processes only for a dataset."""
        if self.tensors is not None or not num_workers:
            for index in order:
                yield index, *self[index]
            return
        loader = DataLoader(
            cast("Dataset[Any]", self.dataset),
            batch_sampler=[index.tolist() for index in order],
            num_workers=num_workers,
        )
        for index, batch in zip(order, loader, strict=True):
            yield index, *_split(batch)

    def labels(self) -> Tensor:
        """All labels ``(rows,)``; a dataset is read through once unless it has ``targets``."""
        if self.tensors is not None:
            return self.tensors[1]
        if self._labels is not None:
            return self._labels
        known = getattr(self.dataset, "targets", None)
        if known is not None and len(known) == len(self):
            self._labels = class_indices(known)
        else:
            parts = [y for _, _, y in self.batches(list(torch.arange(len(self)).split(256)))]
            self._labels = class_indices(torch.cat(parts))
        return self._labels

    def subset(self, index: Tensor) -> Rows:
        """Some of the rows, in the order of the numbers."""
        if self.tensors is not None:
            return Rows(self[index])
        found = Rows(torch.utils.data.Subset(self.dataset, index.tolist()))
        found._labels = None if self._labels is None else self._labels[index]
        return found

    def fingerprint(self) -> str:
        """A digest: of all values of tensors, of 64 rows of a dataset (or its ``fingerprint``)."""
        if self.tensors is not None:
            return digest(self.tensors[1], *_leaves(self.tensors[0]))
        named = getattr(self.dataset, "fingerprint", None)
        if named is not None:
            return digest(str(named() if callable(named) else named), len(self))
        index = torch.linspace(0, len(self) - 1, min(_SAMPLED, len(self))).long()
        x, y = self[index]
        return digest(len(self), y, *_leaves(x))

    def joined(self, other: Rows) -> Rows:
        """These rows followed by another's.

        Raises:
            DataError: the inputs differ in structure.
        """
        if self.tensors is None or other.tensors is None:
            return Rows(torch.utils.data.ConcatDataset([_Pairs(self), _Pairs(other)]))
        a, b = _leaves(self.tensors[0]), _leaves(other.tensors[0])
        if not isinstance(self.tensors[0], Tensor) or len(a) != 1 or len(b) != 1:
            return Rows(torch.utils.data.ConcatDataset([_Pairs(self), _Pairs(other)]))
        return Rows((torch.cat([a[0], b[0]]), torch.cat([self.tensors[1], other.tensors[1]])))

    def overlap(self, other: Rows) -> int:
        """How many of these rows are the other's too: by value, datasets only as subsets of one."""
        if self.tensors is not None and other.tensors is not None:
            mine, theirs = (_keys(rows_.tensors) for rows_ in (self, other))
            return int(np.isin(mine, theirs).sum()) if mine.dtype == theirs.dtype else 0
        mine, theirs = (getattr(r.dataset, "indices", None) for r in (self, other))
        base = [getattr(r.dataset, "dataset", None) for r in (self, other)]
        if self.dataset is other.dataset and self.dataset is not None:
            return len(self)
        if mine is None or theirs is None or base[0] is not base[1]:
            return 0
        return len(set(map(int, mine)) & set(map(int, theirs)))


class _Pairs(Dataset[Any]):
    def __init__(self, source: Rows) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Any:
        if self.source.tensors is None:
            return self.source.dataset[i]
        x, y = self.source.tensors
        return _take(x, torch.tensor([i]), squeeze=True), y[i]


def class_indices(labels: Any, name: str = "labels") -> Tensor:
    """Labels as int64 ``(rows,)``.

    Raises:
        DataError: not numbers, or not whole ones.
        ShapeError: more than one dimension.
    """
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} are no numbers ({error}); wanted class indices 0..K-1") from error
    if found.dim() != 1:
        raise ShapeError(f"{name} have shape {tuple(found.shape)}, wanted (rows,)")
    if found.is_floating_point() or found.is_complex():
        raise DataError(f"{name} have dtype {found.dtype}, wanted integers (class indices)")
    return found.long()


def _tensor(x: Any) -> Tensor:
    """A tensor as it is; numpy's default float64 becomes torch's default dtype, as models have it."""
    found = torch.as_tensor(x)
    if not isinstance(x, Tensor) and found.dtype == torch.float64:
        found = found.to(torch.get_default_dtype())
    return found


def _tensors(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _tensor(value) for name, value in cast("dict[str, Any]", x).items()}
    if isinstance(x, (tuple, list)) and x and hasattr(cast("list[Any]", x)[0], "shape"):
        return tuple(_tensor(value) for value in cast("list[Any]", x))
    return _tensor(x)


def _leaves(x: Any) -> list[Tensor]:
    args, kwargs = call_arguments(x)
    return [torch.as_tensor(value) for value in (*args, *kwargs.values())]


def _take(x: Any, index: Tensor, *, squeeze: bool = False) -> Any:
    pick = lambda t: t[index][0] if squeeze else t[index]
    if isinstance(x, dict):
        return {name: pick(value) for name, value in cast("dict[str, Any]", x).items()}
    return tuple(pick(value) for value in x) if isinstance(x, tuple) else pick(x)


def _split(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, dict):
        fields = dict(cast("dict[str, Any]", batch))
        if "labels" not in fields:
            raise DataError(f"a row is a mapping with {sorted(fields)}, wanted 'labels' among them")
        return fields, fields.pop("labels")
    parts = cast("list[Any]", batch)
    if not isinstance(batch, (tuple, list)) or len(parts) != 2:
        raise DataError(f"a row is a {type(batch).__name__}, wanted a pair (x, y) or a mapping with 'labels'")
    return parts[0], parts[1]


def _keys(tensors: Any) -> Any:
    flat = [leaf.reshape(len(leaf), -1).contiguous().numpy() for leaf in _leaves(tensors[0])]
    table = np.ascontiguousarray(
        np.concatenate([part.view(np.uint8).reshape(len(part), -1) for part in flat], 1)
    )
    return table.view([("row", np.void, table.shape[1])]).ravel()["row"]


def check_teacher(teacher: nn.Module) -> None:
    """Warn where a teacher would be used in training mode; it is put into evaluation mode for the pass."""
    if any(m.training for m in teacher.modules()):
        warnings.warn(
            "the teacher is in training mode; it is used in evaluation mode and without gradients",
            FusionWarning,
            stacklevel=3,
        )


@torch.no_grad()
def forward_teacher(teacher: nn.Module, x: Any, device: torch.device) -> Tensor:
    """The teacher's logits of one batch, on the host, in float32."""
    args, kwargs = call_arguments(moved(x, device))
    return logits_of(teacher(*args, **kwargs)).float().cpu()


def teacher_logits(teacher: nn.Module, data: Rows, *, batch_size: int = 256, num_workers: int = 0) -> Tensor:
    """The teacher's logits of all rows, on the host, in float32; the teacher comes back untouched."""
    where = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    order = list(torch.arange(len(data)).split(batch_size))
    with untouched(teacher):
        return torch.cat([forward_teacher(teacher, x, where) for _, x, _ in data.batches(order, num_workers)])


def moved(x: Any, device: torch.device) -> Any:
    """A batch's inputs on a device."""
    if isinstance(x, dict):
        return {name: value.to(device) for name, value in cast("dict[str, Any]", x).items()}
    if isinstance(x, (tuple, list)):
        return tuple(value.to(device) for value in cast("tuple[Any, ...]", x))
    return x.to(device)


def stratified(labels: Tensor, share: float, seed: int, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Row numbers ``(rest, drawn)``: a share of each class is drawn, at least one row of two.

    Args:
        labels: ``(rows,)``.
        share: in (0, 1).
        seed: of the draw.
        ignore_index: label of rows that are never drawn.
    """
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    by_class = order[torch.argsort(labels[order], stable=True)]
    sizes = torch.bincount(labels.unique(return_inverse=True)[1])
    position = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    wanted = (sizes * share).round().long().clamp_min(1)
    wanted = torch.minimum(wanted, sizes - 1).repeat_interleave(sizes)
    drawn = (position < wanted) & (labels[by_class] != ignore_index)
    return by_class[~drawn].sort().values, by_class[drawn].sort().values

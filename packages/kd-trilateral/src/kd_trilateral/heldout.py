"""Held-out batches for the outer loss, from whatever the caller has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fusion_core.errors import DataError, ShapeError

ValBatches = Iterable[Any] | Callable[[int], Any]


class HeldOutBatch(NamedTuple):
    """Inputs of the student, labels ``(batch,)``, and the teacher's logits where they were given."""

    inputs: Any
    labels: Tensor
    teacher_logits: Tensor | None


def split_batch(batch: Any, device: torch.device) -> HeldOutBatch:
    """Read ``(x, y)``, ``(x, y, teacher_logits)`` or a mapping with ``labels``, and move it to a device.

    Raises:
        DataError: another structure, or no rows.
    """

    def to(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, Mapping):
            return {name: to(v) for name, v in cast("Mapping[str, Any]", value).items()}
        if isinstance(value, (tuple, list)):
            return tuple(to(v) for v in cast("tuple[Any, ...]", value))
        return value

    labels: Any
    teacher: Any
    if isinstance(batch, Mapping):
        inputs: Any = dict(cast("Mapping[str, Any]", batch))
        labels, teacher = inputs.pop("labels", None), inputs.pop("teacher_logits", None)
        inputs.pop("sample_id", None)
    elif isinstance(batch, (tuple, list)) and len(cast("tuple[Any, ...]", batch)) in (2, 3):
        inputs, labels, teacher = (*cast("tuple[Any, ...]", batch), None)[:3]
    else:
        raise DataError(
            f"a held-out batch is a {type(batch).__name__}, wanted (x, y), (x, y, teacher_logits) or a "
            "mapping with "
            "'labels'"
        )
    if labels is not None and not isinstance(labels, Tensor):
        labels = torch.as_tensor(labels)
    if labels is not None and labels.dim() != 1:
        raise ShapeError(
            f"held-out labels have shape {tuple(labels.shape)}, wanted (batch,); a data set of single rows "
            "goes "
            "through a DataLoader"
        )
    if labels is None or not labels.numel():
        raise DataError("a held-out batch has no labels, wanted at least one row")
    if labels.is_floating_point():
        raise DataError(f"held-out labels have dtype {labels.dtype}, wanted integers (class indices)")
    return HeldOutBatch(to(inputs), to(labels).long(), None if teacher is None else to(teacher))


class HeldOut:
    """Draws held-out batches for ever.

    Args:
        source: an iterable, run through again and again, or a callable ``outer_step -> batch``.
        device: where batches go.
        check: raises where labels cannot be used.
    """

    def __init__(
        self, source: ValBatches, device: torch.device, check: Callable[[Tensor], None] | None = None
    ) -> None:
        self.source = source
        self.check = check
        self.device = device
        self.drawn = 0
        self._iterator: Iterator[Any] = iter(())

    def draw(self, outer_step: int) -> HeldOutBatch:
        """The next batch.

        Raises:
            DataError: the source is empty, or its batches cannot be read.
        """
        if callable(self.source):
            batch: Any = self.source(outer_step)
        else:
            batch = next(self._iterator, None)
            if batch is None:
                self._iterator = iter(self.source)
                batch = next(self._iterator, None)
            if batch is None:
                raise DataError(
                    "val_batches is empty, or an iterator that is used up; pass the loader itself: the "
                    "ratio network "
                    "learns from held-out batches (x, y)"
                )
        self.drawn += 1
        found = split_batch(batch, self.device)
        if self.check is not None:
            self.check(found.labels)
        return found

    def skip_to(self, drawn: int) -> None:
        """Run an iterable forward to where a saved run had it; a callable needs none."""
        while not callable(self.source) and self.drawn < drawn:
            self.draw(0)
        self.drawn = drawn

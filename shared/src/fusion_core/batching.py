"""Batches that make themselves smaller when the memory does not hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch

from fusion_core.errors import FusionError, InputError, ShapeError

Out = TypeVar("Out")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whichever device."""
    words = ("out of memory", "DefaultCPUAllocator")
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def map_batches(
    fn: Callable[[Any], Out],
    inputs: Any,
    batch_size: int,
    *,
    halve: bool = True,
    progress: bool | None = None,
) -> Iterator[Out]:
    """Call a function on slices of the inputs, in order; when memory runs out, halve and go on.

    The smaller size is kept for the rest. Only the batch that did not fit is tried again, and only running
    out of memory leads to that: every other error passes unchanged.

    Args:
        fn: takes a slice of ``inputs`` (a tuple of slices for a tuple).
        inputs: a sequence, array or tensor, or a tuple of such of equal length.
        batch_size: most items of a call, at least 1.
        halve: False passes on running out of memory too.
        progress: True shows a bar that counts items.

    Returns:
        An iterator over what ``fn`` returned, one entry per batch.

    Raises:
        InputError: ``batch_size`` is below 1.
        ShapeError: the inputs of a tuple differ in length.
        FusionError: a single item does not fit the memory.

    Example:
        >>> list(map_batches(sum, [1, 2, 3, 4, 5], 2))
        [3, 7, 5]
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, wanted at least 1")
    parts: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
    lengths = [len(part) for part in parts]
    if len(set(lengths)) != 1:
        raise ShapeError(f"inputs have lengths {lengths}, wanted equal ones")
    return _run(fn, parts, isinstance(inputs, tuple), batch_size, halve, bool(progress))


def _run(
    fn: Callable[[Any], Out], parts: tuple[Any, ...], many: bool, batch_size: int, halve: bool, progress: bool
) -> Iterator[Out]:
    total, start, size = len(parts[0]), 0, batch_size
    bar = iter(range(total))
    if progress:
        from fusion_core.progress import track

        bar = iter(track(range(total), "batches", total=total, enabled=True))
    while start < total:
        stop = min(start + size, total)
        batch = tuple(part[start:stop] for part in parts)
        try:
            result = fn(batch if many else batch[0])
        except (RuntimeError, MemoryError) as error:
            if not halve or not is_out_of_memory(error):
                raise
            if stop - start == 1:
                raise FusionError(
                    f"out of memory on a single item, number {start} of {total} (batch_size was "
                    f"{batch_size}); take smaller items, a smaller model, a half dtype or another device"
                ) from error
            size = (stop - start) // 2
        else:
            yield result
            del result
            start = stop
            for _ in islice(bar, len(batch[0])):
                pass
            continue
        # Outside the handler: its traceback holds the tensors of the failed call.
        del batch
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    for _ in bar:  # lets the bar close itself
        pass

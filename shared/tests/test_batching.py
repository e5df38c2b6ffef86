import sys
import types
import weakref
from itertools import chain

import numpy as np
import pytest
import torch

from fusion_core.batching import map_batches
from fusion_core.errors import FusionError, InputError, ShapeError


class Model:
    """Runs out of memory on more than ``room`` items."""

    def __init__(self, room, error):
        self.room, self.error, self.seen = room, error, []

    def __call__(self, batch):
        self.seen.append(len(batch))
        if len(batch) > self.room:
            raise self.error
        return list(batch)


OOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_batches_in_order(make):
    found = [[int(x) for x in batch] for batch in map_batches(list, make([1, 2, 3, 4, 5]), 2)]
    assert found == [[1, 2], [3, 4], [5]]
    assert list(map_batches(list, make([]), 2)) == []


def test_tuple_of_inputs():
    def add(batch):
        a, b = batch
        return (a + b).tolist()

    found = list(map_batches(add, (torch.arange(5), torch.ones(5, dtype=torch.int64)), 3))
    assert found == [[1, 2, 3], [4, 5]]
    with pytest.raises(ShapeError, match=r"inputs have lengths \[3, 2\], wanted equal ones"):
        map_batches(add, (torch.arange(3), torch.arange(2)), 3)


@pytest.mark.parametrize("error", OOM, ids=lambda e: type(e).__name__ + str(e)[:4])
def test_halves_and_remembers(error):
    model = Model(3, error)
    found = list(map_batches(model, list(range(11)), 8))
    assert list(chain(*found)) == list(range(11))
    assert model.seen == [8, 4, 2, 2, 2, 2, 2, 1]


def test_halves_what_was_tried_not_what_was_asked():
    model = Model(2, MemoryError())
    assert list(chain(*map_batches(model, [1, 2, 3], 1000))) == [1, 2, 3]
    assert model.seen == [3, 1, 1, 1]


def test_a_real_allocation_that_fails():
    def fn(batch):
        return torch.empty(2**50 if len(batch) > 2 else 1).numel() * len(batch)

    assert list(map_batches(fn, list(range(6)), 6)) == [1] * 6


def test_single_item_that_does_not_fit():
    model = Model(0, OOM[0])
    words = r"out of memory on a single item, number 0 of 4 \(batch_size was 4\); take smaller"
    with pytest.raises(FusionError, match=words) as caught:
        list(map_batches(model, [1, 2, 3, 4], 4))
    assert caught.value.__cause__ is OOM[0]
    assert not isinstance(caught.value, InputError)
    assert model.seen == [4, 2, 1]


def test_without_halving_the_error_passes():
    model = Model(1, OOM[0])
    with pytest.raises(torch.OutOfMemoryError):
        list(map_batches(model, [1, 2], 2, halve=False))
    assert model.seen == [2]


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_are_never_tried_again(error):
    model = Model(0, error)
    with pytest.raises(type(error)) as caught:
        list(map_batches(model, [1, 2], 2))
    assert caught.value is error
    assert model.seen == [2]


def test_failed_call_is_let_go_and_the_cache_emptied(monkeypatch):
    events = []

    class Big:
        def __del__(self):
            events.append("freed")

    def fn(batch):
        big = Big()
        events.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return big is None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    list(map_batches(fn, [1, 2], 2))
    assert events == [2, "freed", "emptied", 1, "freed", 1, "freed"]


def test_no_output_is_held_while_the_next_is_made():
    alive = []

    def fn(batch):
        assert all(ref() is None for ref in alive)
        array = np.zeros(len(batch))
        alive.append(weakref.ref(array))
        return array

    for output in map_batches(fn, [1, 2, 3], 1):
        assert alive[-1]() is output
        del output


def test_batch_size_is_checked_at_once():
    with pytest.raises(InputError, match="batch_size is 0, wanted at least 1"):
        map_batches(list, [1], 0)


def test_is_lazy():
    model = Model(9, MemoryError())
    batches = map_batches(model, list(range(100)), 5)
    assert model.seen == []
    next(batches)
    assert model.seen == [5]


def test_progress_counts_items(monkeypatch):
    shown = []

    def track(iterable, text, total=None, enabled=None):
        shown.append((text, total, enabled))
        for item in iterable:
            yield item
            shown.append(item)
        shown.append("closed")

    monkeypatch.setitem(sys.modules, "fusion_core.progress", types.SimpleNamespace(track=track))
    list(map_batches(Model(2, MemoryError()), list(range(5)), 4, progress=True))
    assert shown == [("batches", 5, True), *range(5), "closed"]
    shown.clear()
    list(map_batches(list, [1], 1))
    assert shown == []

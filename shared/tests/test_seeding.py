# ruff: noqa: PT012, NPY002 - the global states are what is looked at
import random

import numpy as np
import pytest
import torch

from fusion_core.seeding import deterministic, generator, restore_rng, rng, rng_state


def test_streams_do_not_look_at_the_global_state():
    first = torch.rand(4, generator=generator(3, "noise", 1)), rng(3, "noise", 1).random(4)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    state = torch.get_rng_state()
    torch.rand(7)
    again = torch.rand(4, generator=generator(3, "noise", 1)), rng(3, "noise", 1).random(4)
    torch.set_rng_state(state)
    expected = torch.rand(3)
    torch.set_rng_state(state)
    generator(0)
    rng(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


def test_order_does_not_count_and_keys_differ():
    forward = {k: float(torch.rand(1, generator=generator(0, k))) for k in range(20)}
    backward = {k: float(torch.rand(1, generator=generator(0, k))) for k in reversed(range(20))}
    assert forward == backward
    keys = [(), (0,), (1,), ("0",), ("a", 1), ("a1",), (1, "a")]
    assert len({rng(0, *key).integers(2**60) for key in keys}) == len(keys)
    assert rng(0).integers(2**60) != rng(1).integers(2**60)


def test_streams_are_the_same_on_every_machine():
    assert rng(0, "split").integers(10**6, size=3).tolist() == RECORDED


RECORDED = [226310, 698552, 981143]


def test_deterministic_restores_after_an_error():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with pytest.raises(KeyError), deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark
            raise KeyError
        assert torch.backends.cudnn.benchmark
        assert torch.are_deterministic_algorithms_enabled() == before[0]
        torch.use_deterministic_algorithms(True, warn_only=True)
        with deterministic():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def test_rng_state_round_trip():
    state = rng_state()
    drawn = random.random(), np.random.rand(), float(torch.rand(1))
    assert (random.random(), np.random.rand(), float(torch.rand(1))) != drawn
    restore_rng(state)
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == drawn

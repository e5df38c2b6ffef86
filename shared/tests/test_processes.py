"""A second process computes beside the first and never outlives it."""

import os
import time
from multiprocessing import active_children

import pytest
import torch

from fusion_core.processes import second_process


def test_jobs_run_elsewhere_one_after_the_other_on_one_thread():
    with second_process() as start:
        who, roots, torch_threads = start(os.getpid), start(divmod, 7, 2), start(torch.get_num_threads)
        broken, again = start(divmod, 7, 0), start(os.getpid)
        assert roots() == (3, 1)
        assert who() == again() != os.getpid()
        assert torch_threads() == 1
        with pytest.raises(ZeroDivisionError):
            broken()
    assert not active_children()


def test_without_it_a_job_runs_here_when_it_is_asked_for():
    done = []
    with second_process(False) as start:
        later = start(done.append, 1)
        assert not done
        later()
    assert done == [1]


def test_an_error_in_the_block_does_not_wait_for_jobs():
    def interrupted():
        with second_process() as start:
            for _ in range(2):
                start(time.sleep, 60)
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 20
    until = time.monotonic() + 10
    while active_children() and time.monotonic() < until:
        time.sleep(0.05)
    assert not active_children()

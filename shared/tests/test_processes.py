"""A second process computes beside the first and never outlives it."""

import json
import operator
import os
import pickle
import signal
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from fusion_core.errors import FusionError
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


AWKWARD = """
class Awkward(Exception):
    pass

raise Awkward("odd")
"""  # an error of a class that no other process can import


def test_what_pickle_does_not_carry_is_an_error_and_no_end():
    with second_process() as start:
        with pytest.raises((AttributeError, pickle.PicklingError)):
            start(lambda: 1)
        odd, closure, last = start(exec, AWKWARD, {}), start(operator.attrgetter, "a"), start(abs, -3)
        with pytest.raises(FusionError, match="Awkward: odd"):
            odd()
        assert closure()
        made = start(eval, "lambda: 1")
        with pytest.raises((AttributeError, pickle.PicklingError)):
            made()
        assert last() == 3


def test_an_error_tells_where_it_happened():
    with second_process() as start:
        later = start(json.loads, "{")
        with pytest.raises(json.JSONDecodeError) as told:
            later()
    assert "in the second process:\n" in told.value.__notes__[0]
    assert "raw_decode" in told.value.__notes__[0]


def test_much_may_go_both_ways_before_anything_is_asked_for():
    much = b"x" * (8 << 20)
    with second_process() as start:
        laters = [start(bytes.upper, much) for _ in range(3)]
        assert all(later() == much.upper() for later in laters)


def test_a_process_that_is_killed_is_told():
    with second_process() as start:
        who, later = start(os.getpid), start(time.sleep, 60)
        os.kill(who(), signal.SIGKILL)
        with pytest.raises(FusionError, match="the second process ended before its work was done"):
            later()
        with pytest.raises(FusionError, match="ended before its work"):
            start(abs, 1)()


def test_work_that_nobody_waits_for_is_done_all_the_same(tmp_path):
    with second_process() as start:
        start(Path.write_text, tmp_path / "a", "done")
    assert (tmp_path / "a").read_text() == "done"


def test_the_process_starts_with_the_block():
    with second_process():
        assert len(active_children()) == 1
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

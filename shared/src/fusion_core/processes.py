"""A second process beside the first, for work that Python does not share between threads."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from typing import ParamSpec, Protocol, TypeVar

from fusion_core.device import threads

__all__ = ["Start", "second_process"]

P = ParamSpec("P")
T = TypeVar("T")


class Start(Protocol):
    """Begins a job; gives what waits for its result."""

    def __call__(self, job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]: ...  # noqa: D102


@contextmanager
def second_process(wanted: bool = True) -> Generator[Start, None, None]:
    """Give a function that starts jobs in one other process, one after the other, with torch on one thread.

    The process is started with the first job. When the block ends, by Ctrl-C or an error too, it is gone;
    and it ends by itself where this process is killed.

    Args:
        wanted: False computes a job here, when its result is asked for.

    Example:
        >>> with second_process(False) as start:
        ...     later = start(sum, [1, 2])
        ...     later()
        3
    """
    if not wanted:

        def here(job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
            return lambda: job(*args, **kwargs)

        yield here
        return
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent)

    def start(job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        return pool.submit(_alone, job, *args, **kwargs).result

    try:
        yield start
    except BaseException:  # Ctrl-C above all: do not wait for what is still to come
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
        raise
    pool.shutdown()


def _alone(job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    warnings.simplefilter("ignore", FutureWarning)  # torch's to itself, as in the command line
    with threads():
        return job(*args, **kwargs)


def _end_with_parent() -> None:
    """A worker whose parent is gone, killed included, would otherwise work on and then wait for ever."""
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()

"""Threads that read ahead while the network runs, a bounded number of batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fusion_core.errors import InputError

Job = TypeVar("Job")
Out = TypeVar("Out")


def read_ahead(function: Callable[[Job], Out], jobs: Sequence[Job], num_workers: int) -> Iterator[Out]:
    """``map`` in threads, in order; at most ``num_workers + 1`` results wait.

    Args:
        function: reads one batch.
        jobs: what it is called with.
        num_workers: threads; 0 calls it in turn.

    Raises:
        InputError: a negative number of threads.

    Example:
        >>> list(read_ahead(lambda x: 2 * x, [1, 2, 3], 2))
        [2, 4, 6]
    """
    if num_workers < 0:
        raise InputError(f"num_workers is {num_workers}, wanted at least 0")
    return _stream(function, jobs, num_workers) if num_workers else map(function, jobs)


def _stream(function: Callable[[Job], Out], jobs: Sequence[Job], num_workers: int) -> Iterator[Out]:
    waiting: deque[Future[Out]] = deque()
    pool = ThreadPoolExecutor(num_workers, "read")
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

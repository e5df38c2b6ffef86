"""A second process beside the first, for work that Python does not share between threads."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, ParamSpec, Protocol, TypeVar

from fusion_core.device import threads
from fusion_core.errors import FusionError

__all__ = ["Start", "second_process"]

P = ParamSpec("P")
T = TypeVar("T")
_END = b""  # in place of a job


class Start(Protocol):
    """Begins a job; gives what waits for its result."""

    def __call__(self, job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]: ...  # noqa: D102


@contextmanager
def second_process(wanted: bool = True) -> Generator[Start, None, None]:
    """Give a function that starts jobs in one other process, one after the other, with torch on one thread.

    The process is started at once, so that it loads torch while the block does its own preparations. When the
    block ends, by Ctrl-C or an error too, it is gone; and it ends by itself where this process is killed.

    Args:
        wanted: False computes a job here, when its result is asked for.

    Raises:
        FusionError: the process was killed before it gave a result that is asked for.

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
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,))
    waiting: deque[Future[Any]] = deque()

    def start(job: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        data = ForkingPickler.dumps((job, args, kwargs))
        future: Future[Any] = Future()
        waiting.append(future)
        try:
            ours.send_bytes(data)
        except OSError as error:
            with contextlib.suppress(ValueError):  # which has been told already
                waiting.remove(future)
            raise _gone() from error
        return future.result

    try:
        with _ctrl_c_is_ours():
            process.start()
        theirs.close()
        threading.Thread(target=_receive, args=(ours, waiting), daemon=True).start()
        yield start
        for future in list(waiting):
            future.exception()
        with contextlib.suppress(OSError):
            ours.send_bytes(_END)
    except BaseException:  # Ctrl-C above all: do not wait for what is still to come
        if process.pid is not None:
            process.kill()
        raise
    finally:
        if process.pid is not None:
            process.join()


def _gone() -> FusionError:
    return FusionError("the second process ended before its work was done; it was killed, or out of memory")


@contextmanager
def _ctrl_c_is_ours() -> Generator[None, None, None]:
    """What is started in here never sees Ctrl-C: it ends with this process, without words of its own."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(pipe: Connection, waiting: deque[Future[Any]]) -> None:
    """Hand out results in the order of the jobs, until the other side is gone."""
    while True:
        try:
            value, error, words = pipe.recv()
        except (EOFError, OSError):
            break
        except Exception as wrong:  # noqa: BLE001 - what cannot be read here is the waiting one's error
            value, error, words = None, wrong, "the second process's answer"
        future = waiting.popleft()
        if error is None:
            future.set_result(value)
        else:
            error.add_note(words)
            future.set_exception(error)
    while waiting:
        waiting.popleft().set_exception(_gone())


def _work(pipe: Connection) -> None:
    """The other process: a thread takes jobs in, so that whoever sends one never waits for another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", FutureWarning)  # torch's to itself, as in the command line
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take, args=(pipe, jobs), daemon=True).start()
    with threads():
        while (data := jobs.get()) is not None:
            try:
                job, args, kwargs = pickle.loads(data)  # noqa: S301 - our own parent's
                answer = ForkingPickler.dumps((job(*args, **kwargs), None, ""))
            except Exception as error:  # noqa: BLE001 - raised again where the result is asked for
                answer = _told(error)
            pipe.send_bytes(answer)


def _take(pipe: Connection, jobs: queue.SimpleQueue[Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while (data := pipe.recv_bytes()) != _END:
            jobs.put(data)
    jobs.put(None)


def _told(error: Exception) -> Any:
    """An error as bytes, with where it happened; one that pickle cannot carry, in words."""
    words = "in the second process:\n" + "".join(traceback.format_exception(error))
    try:
        data = ForkingPickler.dumps((None, error, words))
        pickle.loads(data)  # noqa: S301
    except Exception:  # noqa: BLE001 - an error's own constructor may do anything
        return ForkingPickler.dumps((None, FusionError(f"{type(error).__name__}: {error}"), words))
    return data


def _end_with_parent() -> None:
    """A worker whose parent is gone, killed included, would otherwise work on and then wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

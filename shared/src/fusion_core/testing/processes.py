"""Command lines run inside the test process, processes killed at a chosen moment, and groups of processes."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import inspect
import io
import operator
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

_Reference = tuple[str, str | None, str]


@dataclass(frozen=True, slots=True)
class Completed:
    """What a command line did: exit code and both streams."""

    code: int
    stdout: str
    stderr: str


def run_cli(main: Callable[[], Any], *args: object) -> Completed:
    """Run a command line's ``main()`` in this process, as if called with ``args``.

    Args:
        main: the console script's function, which reads ``sys.argv``.
        *args: the words after the program's name; anything with a ``str``.

    Returns:
        Exit code (0 where ``main`` returns, 1 with the traceback on stderr where it raises), stdout, stderr.

    Example:
        >>> run_cli(lambda: print("hello", end="")).stdout
        'hello'
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    code: int = 0
    with (
        mock.patch.object(sys, "argv", ["prog", *map(str, args)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                sys.stderr.write(stop.code)
        except Exception:  # noqa: BLE001 - the interpreter would print it and exit with 1
            traceback.print_exc()
            code = 1
    return Completed(code, stdout.getvalue(), stderr.getvalue())


def heed_ctrl_c() -> None:
    """Undo that Ctrl-C is ignored, as background jobs inherit it: for ``Popen(preexec_fn=heed_ctrl_c)``."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_when(
    command: Sequence[Any],
    file_exists: str | os.PathLike[str],
    *,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> int:
    """Start a process and kill it, without a chance to clean up, once a file is there.

    Args:
        command: the program and its arguments; or a function at the top of a module and its arguments, which
            pickle can carry: it runs in a process that has PyTorch loaded from the start.
        file_exists: path or glob pattern to wait for.
        timeout: seconds until the process is killed anyway.
        env: added to the environment.

    Returns:
        The process's return code; that of a process that ended by itself before is its own.

    Raises:
        TimeoutError: the file did not appear in time.
    """
    if callable(command[0]):
        process = _Forked(_reference(command[0]), tuple(command[1:]), dict(env or {}))
    else:
        words = [os.fspath(word) for word in command]
        process = subprocess.Popen(words, env={**os.environ, **(env or {})})  # noqa: S603
    end = time.monotonic() + timeout
    try:
        while process.poll() is None:
            if glob.glob(os.fspath(file_exists)):  # noqa: PTH207 - the pattern may be absolute
                break
            if time.monotonic() > end:
                raise TimeoutError(f"{file_exists} did not appear within {timeout:g} s")
            time.sleep(0.002)
    finally:
        process.kill()
        code = process.wait()
    return code


class _Forked:
    """A function in a process of its own, with the methods of ``Popen`` that are needed here."""

    def __init__(self, fn: _Reference, args: tuple[Any, ...], env: dict[str, str]) -> None:
        import torch.multiprocessing as multiprocessing

        self._process = _context(multiprocessing).Process(target=_called, args=(fn, args, env), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def _called(fn: _Reference, args: tuple[Any, ...], env: dict[str, str]) -> None:
    os.environ.update(env)
    _found(*fn)(*args)


def spawn(fn: Callable[..., Any], world_size: int = 2, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run a function in several processes that form one ``torch.distributed`` group (gloo, on the CPU).

    The environment is that of ``torchrun``, so accelerate finds the group too.

    Args:
        fn: a function at the top of a module; called as ``fn(rank, *args)`` with the group set up.
        world_size: number of processes.
        *args: what pickle can carry.
        timeout: seconds until all are killed.

    Returns:
        Each rank's value, in the order of ranks.

    Raises:
        RuntimeError: a process failed; its traceback is the message.
        TimeoutError: not done in time.
    """
    import torch
    import torch.multiprocessing as multiprocessing

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        context = _context(multiprocessing)
        job = (_reference(fn), world_size, port, folder, args)
        processes: list[Any] = [
            context.Process(target=_member, args=(rank, *job), daemon=True) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes):
                failed = sorted(Path(folder).glob("*.error"))
                if failed:
                    raise RuntimeError(failed[0].read_text(encoding="utf-8"))
                if time.monotonic() > end:
                    raise TimeoutError(f"{world_size} processes were not done within {timeout:g} s")
                time.sleep(0.02)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        values: list[Any] = []
        for rank, process in enumerate(processes):
            error, value = (Path(folder) / f"{rank}.{what}" for what in ("error", "value"))
            if error.exists() or not value.exists():
                told = (
                    error.read_text(encoding="utf-8") if error.exists() else f"exit code {process.exitcode}"
                )
                raise RuntimeError(f"rank {rank}: {told}")
            values.append(torch.load(value, weights_only=False))  # written by the processes above
        return values


def _context(multiprocessing: Any) -> Any:
    """Processes forked from one that has done the slow imports; fresh ones where that cannot be."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    slow = (
        "torch.distributed", "accelerate", "transformers", "transformers.modeling_utils",
        "transformers.trainer",
    )  # fmt: skip
    context.set_forkserver_preload([name for name in slow if name == slow[0] or name in sys.modules])
    return context


def _reference(fn: Callable[..., Any]) -> _Reference:
    return fn.__module__, inspect.getsourcefile(fn), fn.__qualname__


def _found(module: str, file: str | None, name: str) -> Callable[..., Any]:
    """A function by its module's name, or by its file: pytest gives modules names that only it can import."""
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        spec = importlib.util.spec_from_file_location(module, file or "")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    return operator.attrgetter(name)(loaded)


def _member(
    rank: int, fn: _Reference, world_size: int, port: int, folder: str, args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as distributed

    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in group.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"})
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", rank=rank, world_size=world_size)
        value = _found(*fn)(rank, *args)
        distributed.barrier()
        torch.save(value, Path(folder) / f"{rank}.value")
        distributed.destroy_process_group()
    except BaseException:
        temporary = Path(folder) / f"{rank}.failed"
        temporary.write_text(traceback.format_exc(), encoding="utf-8")
        temporary.rename(Path(folder) / f"{rank}.error")
        raise

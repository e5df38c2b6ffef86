"""Command lines run inside the test process, and processes killed at a chosen moment."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock


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
    command: Sequence[str | os.PathLike[str]],
    file_exists: str | os.PathLike[str],
    *,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> int:
    """Start a process and kill it, without a chance to clean up, once a file is there.

    Args:
        command: the program and its arguments.
        file_exists: path or glob pattern to wait for.
        timeout: seconds until the process is killed anyway.
        env: added to the environment.

    Returns:
        The process's return code; that of a process that ended by itself before is its own.

    Raises:
        TimeoutError: the file did not appear in time.
    """
    process = subprocess.Popen([os.fspath(word) for word in command], env={**os.environ, **(env or {})})  # noqa: S603
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
        process.wait()
    return process.returncode

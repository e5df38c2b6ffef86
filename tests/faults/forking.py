"""Command lines in processes forked from this one, which has done the imports; killed at will."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Call = Callable[[], int | None]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = (
    "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "shutil.copyfile", "shutil.move", "shutil.rmtree", "sqlite3.connect",
)  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Args:
        seconds: of computing after its start, so that a busy machine moves nothing; None sets no clock.
        event: when it is about to change the working directory for the n-th time, from 1.
        after: seconds after that event.
    """

    seconds: float | None = None
    event: int | None = None
    after: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of a forked process.

    Attributes:
        code: exit code, or minus the signal that ended it.
        seconds: of computing.
        stdout: what it printed.
        stderr: what it complained of.
        events: how often it was about to change something below its working directory; None where it was
            killed.
        modules: what it had imported at its end.
    """

    code: int
    seconds: float
    stdout: str
    stderr: str
    events: int | None = None
    modules: tuple[str, ...] = ()

    @property
    def killed(self) -> bool:
        """Whether a signal ended it."""
        return self.code < 0


def quiet_threads() -> None:
    """One thread a process and no network: set before anything is imported, for a fork copies no threads."""
    for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"):
        os.environ[f"{name}_NUM_THREADS"] = "1"
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}


def load(name: str) -> Any:
    """An object by ``module:name``."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def warm(modules: Iterable[str]) -> None:
    """Import what a process needed, so that the next one finds it."""
    for name in modules:
        if name not in sys.modules and not name.startswith(("__", "faults")):
            with contextlib.suppress(Exception):  # a module may be one that only its package can make
                importlib.import_module(name)
    gc.freeze()  # a collection in a fork would touch, and so copy, every page of this process


def command(main: str, argv: Sequence[object]) -> Call:
    """A command line as a call: ``main`` is ``module:function``."""

    def call() -> int | None:
        sys.argv = [main.partition(".")[0].replace("_", "-"), *map(str, argv)]
        return load(main)()

    return call


class Child:
    """A process forked from this one.

    Args:
        call: what it runs; its return value or ``SystemExit`` is the exit code.
        place: its working directory.
        moment: when it is killed, with what it started.
        memory: bytes that it may allocate beyond what it was born with.
        timeout: seconds of computing until it is killed anyway; waiting may take far longer.
    """

    def __init__(
        self,
        call: Call,
        place: Path,
        *,
        moment: Moment | None = None,
        memory: int | None = None,
        timeout: int = 300,
    ) -> None:
        self.log = Path(tempfile.mkdtemp(prefix="faults-"))
        sys.stdout.flush()
        sys.stderr.flush()
        self.timeout, self.start = timeout, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _live(call, place, self.log, moment, memory, timeout)

    def said(self, stream: str) -> str:
        """What it has written so far to ``stdout`` or ``stderr``."""
        return _read(self.log / stream)

    def wait(self, patience: float | None = None) -> Outcome:
        """Wait for its end, and end what it had started.

        Args:
            patience: seconds of the clock; by default ten minutes more than ten times the limit.

        Raises:
            TimeoutError: it was not done in time; it is killed.
        """
        status, seconds = _wait(self.pid, 600 + 10 * self.timeout if patience is None else patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        facts: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            facts = json.loads(_read(self.log / "facts"))
        stdout, stderr = self.said("stdout"), self.said("stderr")
        shutil.rmtree(self.log, ignore_errors=True)
        code = None if status is None else os.waitstatus_to_exitcode(status)
        if code in (None, -signal.SIGXCPU):
            raise TimeoutError(f"not done within {seconds:.0f} s of computing: {stderr[-2000:]}")
        return Outcome(code, seconds, stdout, stderr, facts.get("events"), tuple(facts.get("modules", ())))


def forked(
    call: Call,
    place: Path,
    *,
    moment: Moment | None = None,
    timeout: int = 300,
    memory: int | None = None,
) -> Outcome:
    """Run a call in a process of its own and wait for it; see :class:`Child`.

    Raises:
        TimeoutError: it was not done in time.
    """
    return Child(call, place, moment=moment, memory=memory, timeout=timeout).wait()


@contextlib.contextmanager
def serving(make: Callable[[], Any] | None) -> Iterator[str]:
    """A server that answers as a script says, in a process of its own; gives its address.

    Args:
        make: gives the script of :class:`fusion_core.testing.FaultServer`; None starts nothing.
    """
    if make is None:
        yield ""
        return
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        from fusion_core.testing import FaultServer

        with FaultServer(make()) as server:
            os.write(writer, server.url.encode())
            os.close(writer)
            while True:
                time.sleep(3600)
    os.close(writer)
    try:
        with open(reader, encoding="utf-8") as pipe:  # noqa: PTH123 - a descriptor
            yield pipe.read()
    finally:
        _kill(child)
        os.waitpid(child, 0)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _wait(child: int, patience: float) -> tuple[int | None, float]:
    """The wait status, None where the patience was over, and the seconds of computing."""
    end, late = time.monotonic() + patience, False
    while True:
        found, status, used = os.wait4(child, os.WNOHANG)
        if found:
            return None if late else status, used.ru_utime + used.ru_stime
        if time.monotonic() >= end:
            late = True
            _kill(child)
        time.sleep(0.004)


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _live(
    call: Call, place: Path, log: Path, moment: Moment | None, memory: int | None, timeout: int
) -> None:
    """The life of the forked process; never returns."""
    code = 70
    try:
        os.setsid()
        os.chdir(place)
        for number, name in ((1, "stdout"), (2, "stderr")):
            handle = os.open(log / name, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(handle, number)
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - as long as the process
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", write_through=True)
        if memory is not None:
            born = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (born + memory, born + memory))
        resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if moment is not None and moment.seconds is not None:  # the default of SIGPROF ends a process at once
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, max(moment.seconds, 1e-4))
        counted = _count(place, moment)
        code = _exit_code(call)
        threading._shutdown()  # as the interpreter does at its end: threads that write are waited for
        facts = {"events": counted[0], "modules": list(sys.modules)}
        (log / "facts").write_text(json.dumps(facts), encoding="utf-8")
    except BaseException:  # noqa: BLE001 - a fork must never return
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        os._exit(code)


def _exit_code(call: Call) -> int:
    try:
        code = call()
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code if isinstance(code, int) else 0


def _count(place: Path, moment: Moment | None) -> list[int]:
    """Count the changes below ``place`` from now on, and end the process at the chosen one."""
    inside, here, counted = os.path.realpath(place) + os.sep, os.getpid(), [0]
    wanted = None if moment is None else moment.event
    after = 0.0 if moment is None else moment.after

    def ours(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.join(inside, os.fsdecode(path)).startswith(inside)  # noqa: PTH118 - a hook is quick

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if not (isinstance(args[2], int) and args[2] & _WRITES and ours(args[0])):
                return
        elif event not in _EVENTS or not any(ours(path) for path in args[:2]):
            return
        if os.getpid() != here:
            return
        counted[0] += 1
        if counted[0] == wanted:
            if after > 0:  # the default of SIGALRM ends a process as SIGKILL does, with nothing run
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, after)
            else:
                os.kill(here, signal.SIGKILL)

    sys.addaudithook(hook)
    return counted

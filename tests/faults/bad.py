"""Commands that do what is forbidden, to see that the tools find it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path


def half() -> None:
    """Write a file piece by piece under its own name."""
    with Path(sys.argv[2]).open("w") as file:
        for number in range(20):
            file.write(f"line {number}\n")
            file.flush()
            Path("mark").write_text(str(number))
            _work(0.005)


def whole() -> None:
    """Write a file that appears at once, and a list that grows."""
    with Path("manifest.jsonl").open("a") as lines:
        lines.write('{"key": 1}\n') if lines.tell() == 0 else None
    handle, name = tempfile.mkstemp(prefix=".x.", suffix=".tmp", dir=".")
    with os.fdopen(handle, "w") as file:
        for number in range(20):
            file.write(f"line {number}\n")
            _work(0.005)
    Path(name).replace(sys.argv[2])


def stuck() -> None:
    """Refuse to run again where an earlier run left something."""
    if Path("work").exists():
        sys.exit(2)
    Path("work").mkdir()
    _work(0.05)
    Path(sys.argv[2]).write_text("done\n")
    Path("work").rmdir()


def mixed() -> None:
    """Go on with what another run left, whatever it was made from."""
    before = Path("part").read_text() if Path("part").exists() else f"{os.getpid()}"
    Path("part").write_text(before if Path("part").exists() else "the same")
    _work(0.02)
    Path(sys.argv[2]).write_text(before if before != f"{os.getpid()}" else "alone\n")
    _work(0.02)
    Path("part").unlink()


def careless() -> None:
    """Read JSON and take for granted what is in it."""
    found = json.loads(Path(sys.argv[2]).read_text())
    print(found["a"]["b"] + 1)


def careful() -> None:
    """Read JSON, whatever is in it."""
    try:
        found = json.loads(Path(sys.argv[2]).read_text())
        print(float(found["a"]["b"]) + 1)
    except Exception as error:  # noqa: BLE001 - garbage raises anything
        sys.stderr.write(f"error: {sys.argv[2]} cannot be read: {type(error).__name__}\n")
        sys.exit(2)


def vague() -> None:
    """Complain of a file without a name."""
    try:
        careless()
    except Exception:  # noqa: BLE001 - garbage raises anything
        sys.stderr.write("error: something is wrong\n")
        sys.exit(2)


def hungry() -> None:
    """Need longer than it is given."""
    if "b" not in Path(sys.argv[2]).read_text(errors="replace"):
        _work(60)


def _work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

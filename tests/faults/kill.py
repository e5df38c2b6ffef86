"""Kill every command that writes, at random: its output is absent or whole, and it can be run again."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import whole
from faults.forking import Moment, Outcome, command, forked, serving, warm

EVENTS = 0.6
"""Share of the kills at the moment of a write; the others are spread over the whole time."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line that writes.

    Args:
        name: as people call it.
        argv: its words; ``{in}`` is the folder of inputs, results go below the working directory.
        main: ``module:function``.
        make: fills the folder of inputs, once for all commands that share it.
        again: further words of the run after a kill.
        before: words of a run that comes first and is not killed, such as one that leaves what is replaced.
        look: words of a command that reads the result, which must take it or refuse it.
        patch: called with the folder of inputs, in the process and before the command.
        serve: gives the script of a server that the command asks; ``{url}`` is its address.
        volatile: pattern of names -> patterns of bytes that differ from run to run.
        ignore: pattern of names that are not compared, only read.
        grows: the reader may be given what an interrupted run has so far.
        together: the results appear all at once: a folder has all its files or is not there.
    """

    name: str
    main: str
    argv: tuple[str, ...]
    make: Callable[[Path], None] | None = None
    again: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    look: tuple[str, ...] = ()
    patch: Callable[[Path], None] | None = None
    serve: Callable[[], Any] | None = None
    volatile: Mapping[str, Sequence[bytes]] = field(default_factory=dict)
    ignore: str | None = None
    grows: bool = False
    together: bool = False
    timeout: int = 600

    @property
    def package(self) -> str:
        """The console script."""
        return self.name.partition(" ")[0]


@dataclass
class Found:
    """What the kills of one command gave."""

    name: str
    seconds: float
    events: int
    kills: int = 0
    absent: int = 0
    partial: int = 0
    complete: int = 0
    again: int = 0
    same: int = 0
    broken: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """As a row of the report."""
        return {**vars(self), "seconds": round(self.seconds, 2), "broken": sorted(set(self.broken))}


class Bench:
    """Where a command is run over and over, always under the same path.

    Args:
        place: an empty folder.
        case: the command.
        inputs: the folder of its inputs, filled.
        url: of the server that it asks.
    """

    def __init__(self, place: Path, case: Command, inputs: Path, url: str = "") -> None:
        self.place, self.case, self.inputs, self.url = place / "run", case, inputs, url
        self.clear()

    def clear(self) -> None:
        """Begin with an empty folder, or with what the command that comes first leaves."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)

    def prepare(self) -> None:
        """Run the command that comes first."""
        if self.case.before:
            done = self.run(self.case.before)
            assert done.code == 0, done.stderr

    def run(self, words: Sequence[str], moment: Moment | None = None) -> Outcome:
        """Run the command once, and kill it at a moment."""
        argv = [word.replace("{in}", str(self.inputs)).replace("{url}", self.url) for word in words]
        call = command(self.case.main, argv)
        patch = self.case.patch

        def patched() -> int | None:
            if patch is not None:
                patch(self.inputs)
            return call()

        return forked(patched, self.place, moment=moment, timeout=self.case.timeout)

    def contents(self) -> dict[str, bytes]:
        """What lies there now, without what differs from run to run."""
        found = whole.contents(self.place, self.case.volatile)
        return {name: data for name, data in found.items() if not self.ignored(name)}

    def ignored(self, name: str) -> bool:
        """Whether a file is read only, not compared."""
        import re

        return self.case.ignore is not None and re.search(self.case.ignore, name) is not None


def kill(case: Command, place: Path, inputs: Path, kills: int = 20, seed: int = 0) -> Found:
    """Kill one command again and again.

    Args:
        case: the command.
        place: a folder to work in.
        inputs: filled by ``case.make``.
        kills: how many kills; one that came too late is tried again at another moment.
        seed: of the moments.
    """
    with serving(case.serve) as url:
        return _kill(Bench(place, case, inputs, url), kills, seed)


def _kill(bench: Bench, kills: int, seed: int) -> Found:
    case = bench.case
    bench.prepare()
    start = bench.contents()
    taken = {bench.run(case.look).stdout} if case.look and case.before else set()
    first = bench.run(case.argv)
    assert first.code == 0, f"{case.name} cannot be run: {first.stderr[-3000:]}"
    warm(first.modules)
    bench.clear()
    bench.prepare()
    second = bench.run(case.argv)
    reference = bench.contents()
    found = Found(case.name, second.seconds, second.events or 0)
    bad = [why for why in map(whole.fault, whole.files(bench.place).values()) if why]
    assert not bad, f"{case.name}: {bad}"
    taken |= {bench.run(case.look).stdout} if case.look else set()
    moments = _moments(second, kills, random.Random(seed))
    while found.kills < kills:
        bench.clear()
        bench.prepare()
        stopped = bench.run(case.argv, next(moments))
        if not stopped.killed:
            continue
        found.kills += 1
        _judge(bench, found, start, reference)
        if case.look:
            _look(bench, found, taken)
        _again(bench, found, reference)
    return found


def _moments(run: Outcome, kills: int, draw: random.Random) -> Iterator[Moment]:
    """Moments at and shortly after writes, and others spread over the time; later ones are random."""
    events = run.events or 0
    at_writes = round(kills * EVENTS) if events else 0
    for number in range(at_writes):
        low = 1 + number * events // at_writes
        high = max(low, (number + 1) * events // at_writes)
        yield Moment(event=draw.randint(low, high), after=draw.choice((0.0, draw.uniform(1e-5, 3e-3))))
    rest = max(kills - at_writes, 1)
    for number in range(kills - at_writes):
        yield Moment(seconds=run.seconds * (number + draw.random()) / rest)
    while True:
        yield Moment(event=draw.randint(1, events)) if events else Moment(seconds=run.seconds * draw.random())


def _judge(bench: Bench, found: Found, start: dict[str, bytes], reference: dict[str, bytes]) -> None:
    left = bench.contents()
    for name, path in whole.files(bench.place).items():
        why = whole.fault(path)
        if why is None and name in reference and name in left and left[name] != start.get(name):
            why = whole.beginning(left[name], reference[name], name)
        if why is not None:
            found.broken.append(f"half a file: {why}")
    if left == start:
        found.absent += 1
    elif left == reference:
        found.complete += 1
    else:
        found.partial += 1
        if bench.case.together:
            found.broken.append(f"not at once: {'; '.join(whole.differences(left, reference)[:3])}")


def _look(bench: Bench, found: Found, taken: set[str]) -> None:
    """The command that reads the result takes it as it takes a whole one, or refuses it in one line."""
    seen = bench.run(bench.case.look)
    if seen.code == 0 and seen.stdout not in taken and not bench.case.grows:
        found.broken.append("half a result is taken for a whole one")
    elif seen.code not in (0, 2) or "Traceback" in seen.stderr:
        found.broken.append(f"half a result makes its reader end with {seen.code}: {seen.stderr[-300:]}")


def _again(bench: Bench, found: Found, reference: dict[str, bytes]) -> None:
    complete = bench.contents() == reference
    done = bench.run((*bench.case.argv, *bench.case.again))
    if done.code == 2 and complete and "Traceback" not in done.stderr:
        pass  # all was done when the kill came, and a second run does not go over it
    elif done.code != 0:
        found.broken.append(f"cannot be run again: {done.code}, {done.stderr.strip()[-300:]}")
        return
    found.again += 1
    words = whole.differences(bench.contents(), reference)
    if words:
        found.broken.append(f"another result after a kill: {'; '.join(words[:3])}")
    else:
        found.same += 1
    bad = [why for why in map(whole.fault, whole.files(bench.place).values()) if why]
    found.broken.extend(f"half a file after running again: {why}" for why in bad)


def run(cases: Sequence[Command], place: Path, kills: int, seed: int, report: Callable[[Any], None]) -> bool:
    """Kill every command of a list; true where none left anything broken.

    Args:
        cases: the commands.
        place: a folder to work in.
        kills: of each command.
        seed: of the moments.
        report: called with the row of each command as it is done.
    """
    good = True
    for case in cases:
        inputs = fill(case.make, place)
        try:
            row = kill(case, place / "work", inputs, kills, seed).row()
        except (AssertionError, TimeoutError) as error:
            row = {"name": case.name, "kills": 0, "broken": [f"not tried: {error}"]}
        good = good and not row["broken"]
        report(row)
        sys.stderr.write(_line(row))
    return good


def fill(make: Callable[[Path], None] | None, place: Path) -> Path:
    """The folder of inputs that ``make`` fills, made in a process of its own, once."""
    name = "none" if make is None else f"{make.__module__.rpartition('.')[2]}.{make.__name__}"
    inputs = place / "inputs" / name
    if make is not None and not inputs.exists():
        inputs.mkdir(parents=True)
        done = forked(lambda: make(inputs), inputs)
        assert done.code == 0, f"{name}: {done.stderr[-3000:]}"
        warm(done.modules)
    inputs.mkdir(parents=True, exist_ok=True)
    return inputs


def _line(row: dict[str, Any]) -> str:
    counts = ", ".join(
        f"{row.get(key, 0)} {key}" for key in ("kills", "absent", "partial", "complete", "same")
    )
    bad = "".join(f"\n    {why}" for why in row["broken"])
    return f"{row['name']}: {counts}; {row.get('seconds', 0)} s{bad}\n"

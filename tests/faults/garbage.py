"""Give every reader garbage: exit code 0, 2 or 3, one line that names the file, nothing half done."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import mangle, mangle_arrays, mangle_every, mangle_media, whole
from faults.forking import Outcome, command, forked, warm
from faults.kill import fill
from faults.mangle import Garbage

KINDS: dict[str, Callable[[bytes], Any]] = {
    "arrays": mangle_arrays.arrays_file,
    "bytes": mangle.whole_bytes,
    "database": mangle_media.database,
    "ecsv": mangle_media.table_file("ascii.ecsv"),
    "fields": mangle.fields,
    "fits": mangle_media.fits_file,
    "fits table": mangle_media.table_file("fits"),
    "hdf5": mangle_media.hdf5_file,
    "json": mangle.json_file,
    "json lines": mangle.json_lines,
    "matlab": mangle_media.matlab_file,
    "parquet": mangle_media.table_file("parquet"),
    "picture": mangle_media.picture,
    "pickle": mangle_media.pickled,
    "safetensors": mangle.safetensors_file,
    "toml": mangle.toml_file,
    "votable": mangle_media.table_file("votable"),
    "yaml": mangle.yaml_file,
}
_FAILED = "out of memory: |POST http://|training diverged: |the training loss is "
"""What a file that is read well may lead to, with exit code 1."""
MEMORY = 3 * 2**30
"""What a reader may take for a file of some kilobytes, in bytes."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A command line that reads a file.

    Args:
        name: the command and the argument.
        main: ``module:function``.
        argv: its words; ``{in}`` is the folder of inputs.
        file: the file that becomes garbage, relative to the inputs.
        kind: how, of :data:`KINDS`.
        make: fills the folder of inputs, once for all readers that share it.
        named: what a complaint may name instead of the file: a row, a member, a folder.
        several: the command takes many inputs, goes on without the bad one and lists it.
        patch: called with the folder of inputs, in the process and before the command.
        timeout: seconds of computing.
    """

    name: str
    main: str
    argv: tuple[str, ...]
    file: str
    kind: str
    make: Callable[[Path], None]
    named: tuple[str, ...] = ()
    several: bool = False
    patch: Callable[[Path], None] | None = None
    timeout: int = 30

    @property
    def package(self) -> str:
        """The console script."""
        return self.name.partition(" ")[0]


@dataclass
class Found:
    """What the garbage made of one reader."""

    name: str
    examples: int = 0
    codes: dict[int, int] = field(default_factory=dict)
    slowest: float = 0.0
    violations: dict[str, str] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As a row of the report."""
        codes = {str(code): self.codes[code] for code in sorted(self.codes)}
        return {**vars(self), "codes": codes, "slowest": round(self.slowest, 2)}


def verdict(reader: Reader, done: Outcome) -> str | None:
    """Which law the command broke, or None.

    Args:
        reader: whose it was.
        done: what the command did.
    """
    if "Traceback (most recent call last)" in done.stderr:
        return "traceback: " + _last_frame(done.stderr)
    if done.code == 1 and re.search(rf"^error: ({_FAILED})[^\n]+\n\Z", done.stderr, re.M):
        return None
    if done.code not in (0, 2, 3):
        return f"exit code {done.code}: {done.stderr.strip()[-200:]}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    if done.code == 2:
        if reader.several and told:
            return None if any(_names(reader, line) for line in told) else f"nameless: {told[0][:200]}"
        if len(told) != 1:
            return f"{len(told)} lines of error: {done.stderr.strip()[:300]}"
        if not _names(reader, told[0]):
            return f"nameless: {told[0][:200]}"
        if len(told[0]) > 1000:
            return f"a line of {len(told[0])} letters: {told[0][:200]}"
    noise = [line for line in lines if re.match(r"\S+\.py:\d+: ", line)]
    return f"a warning of the interpreter: {noise[0][-160:]}" if noise else None


def _names(reader: Reader, line: str) -> bool:
    return any(name in line for name in (Path(reader.file).name, *reader.named))


def _last_frame(text: str) -> str:
    """The error and the innermost frames of the workspace's own code, without numbers that vary."""
    frames = re.findall(r'File "[^"]*/src/([\w/]+)\.py", line (\d+), in (\S+)', text)
    kind = text.strip().splitlines()[-1][:140]
    return f"{kind} <- {' <- '.join(f'{f}:{n} {w}' for f, n, w in frames[-1:-3:-1])}"


def _signature(words: str) -> str:
    return re.sub(r"'[^']*'|\d+", "#", words)[:110]


def hunt(reader: Reader, place: Path, inputs: Path, examples: int, seed: int = 0) -> Found:
    """Give a reader many examples; all violations are collected, one for each kind.

    Args:
        reader: the command line.
        place: a folder to work in.
        inputs: filled by ``reader.make``.
        examples: how many; 0 = every single change of :mod:`faults.mangle_every` instead.
        seed: of the draws.
    """
    import hypothesis

    found = Found(reader.name)
    valid = (inputs / reader.file).read_bytes()
    sound = _try(reader, place, inputs, None)
    assert sound.code in (0, 3), f"{reader.name} cannot be run: {sound.code} {sound.stderr[-3000:]}"
    warm(sound.modules)

    def try_one(garbage: Garbage) -> None:
        found.examples += 1
        words = _one(reader, place, inputs, garbage, found)
        if words is not None:
            found.violations.setdefault(_signature(words), f"{words} | {garbage!r}")

    if not examples:
        for garbage in mangle_every.every(reader.kind, valid):
            try_one(garbage)
        return found

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(KINDS[reader.kind](valid))
    def one(garbage: Garbage) -> None:
        try_one(garbage)

    one()
    return found


def _one(reader: Reader, place: Path, inputs: Path, garbage: Garbage, found: Found) -> str | None:
    try:
        done = _try(reader, place, inputs, garbage)
    except TimeoutError as error:
        return f"timeout: {error}"
    found.codes[done.code] = found.codes.get(done.code, 0) + 1
    found.slowest = max(found.slowest, done.seconds)
    if (words := verdict(reader, done)) is not None:
        return words
    bad = [why for why in map(whole.fault, whole.files(place / "run").values()) if why]
    return f"half output: {bad[0]}" if bad else None


def _try(reader: Reader, place: Path, inputs: Path, garbage: Garbage | None) -> Outcome:
    """Run the reader once, with the file replaced."""
    work, given = place / "run", place / "given"
    for folder in (work, given):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    shutil.copytree(inputs, given, symlinks=True)
    if garbage is not None:
        target = given / reader.file
        target.unlink()
        if garbage.data is not None:
            target.write_bytes(garbage.data)
        elif garbage.how == "a folder":
            target.mkdir()
    words = [word.replace("{in}", str(given)) for word in reader.argv]
    call, patch = command(reader.main, words), reader.patch

    def patched() -> int | None:
        if patch is not None:
            patch(given)
        return call()

    memory = MEMORY if sys.platform == "linux" and garbage is not None else None
    return forked(patched, work, timeout=reader.timeout, memory=memory)


def run(
    readers: Sequence[Reader], place: Path, examples: int, seed: int, report: Callable[[Any], None]
) -> bool:
    """Give every reader of a list garbage; true where none broke a law.

    Args:
        readers: the command lines.
        place: a folder to work in.
        examples: for each; 0 = every single change.
        seed: of the draws.
        report: called with the row of each reader as it is done.
    """
    good = True
    for reader in readers:
        try:
            row = hunt(reader, place / "garbage", fill(reader.make, place), examples, seed).row()
        except (AssertionError, TimeoutError) as error:
            row = {"name": reader.name, "examples": 0, "violations": {"not tried": str(error)}}
        good = good and not row["violations"]
        report(row)
        sys.stderr.write(f"{row['name']}: {row['examples']} examples, codes {row.get('codes', {})}, ")
        sys.stderr.write(f"slowest {row.get('slowest', 0)} s\n")
        for words in row["violations"].values():
            sys.stderr.write(f"    {words}\n")
    return good

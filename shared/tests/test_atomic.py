import json

# ruff: noqa: PT012
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fusion_core.atomic import (
    UNDER_WAY,
    atomic_directory,
    atomic_write,
    entries,
    occupied,
    resumable_directory,
    sweep,
)
from fusion_core.errors import InputError

STEPS = [(tempfile, "mkstemp"), (os, "fdopen"), (os, "fsync"), (Path, "chmod"), (Path, "replace")]


class Boom(BaseException):
    pass


def fail(*args, **kwargs):
    raise Boom


def test_half_a_surrogate_pair_becomes_its_escape(tmp_path):
    with atomic_write(tmp_path / "a.json", "w") as file:
        file.write('"a \ud800 Grüße"')
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == "a \ud800 Grüße"


def test_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    for text in ("one", "two"):
        with atomic_write(path, "w") as file:
            file.write(text)
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_write_keeps_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_stop_at_any_step_leaves_the_old_file(tmp_path, monkeypatch, owner, name):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(Boom), atomic_write(path) as file:
        file.write(b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_error_in_the_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from fusion_core.atomic import atomic_write, atomic_directory
if sys.argv[2] == "file":
    with atomic_write(sys.argv[1]) as file:
        file.write(b"new" * 100000); file.flush()
        print("ready", flush=True); time.sleep(60)
with atomic_directory(sys.argv[1], overwrite=True) as folder:
    (folder / "new").write_text("half")
    print("ready", flush=True); time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_kill_leaves_the_old_one(tmp_path, kind):
    path = tmp_path / "thing"
    inner = path if kind == "file" else path / "old"
    inner.parent.mkdir(exist_ok=True)
    inner.write_text("old")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), kind], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.kill()
    code = child.wait()
    assert os.name == "nt" or code == -signal.SIGKILL
    child.stdout.close()
    assert inner.read_text() == "old"
    if kind == "folder":
        assert list(path.iterdir()) == [inner]


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(InputError, match=r"cannot write .*file.*name a writable place"),
        atomic_write(tmp_path / "file" / "a"),
    ):
        pass
    with pytest.raises(InputError, match="name a writable place"), atomic_directory(tmp_path / "file" / "a"):
        pass
    (tmp_path / "taken").mkdir()
    with (
        pytest.raises(InputError, match=r"cannot write .*taken.*name another"),
        atomic_write(tmp_path / "taken"),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def test_directory_refuses_a_filled_one(tmp_path):
    (tmp_path / "run").mkdir()
    with atomic_directory(tmp_path / "run") as folder:  # an empty one is free
        (folder / "a").write_text("1")
    with (
        pytest.raises(InputError, match=r"run is there already and not empty; .*overwrite=True"),
        atomic_directory(tmp_path / "run"),
    ):
        pass
    with atomic_directory(tmp_path / "run", overwrite=True) as folder:
        (folder / "b").write_text("2")
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["b"]
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("stop_at", [1, 2])
def test_directory_stopped_at_either_rename_keeps_the_old(tmp_path, monkeypatch, stop_at):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    calls, rename = [], Path.rename

    def stops(self, target):
        calls.append(target)
        if len(calls) == stop_at:
            raise Boom
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stops)
    with pytest.raises(Boom), atomic_directory(tmp_path / "run", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["old"]
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def test_error_in_the_directory_block(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), atomic_directory(tmp_path / "run") as folder:
        (folder / "a").write_text("1")
        raise RuntimeError("mine")
    assert list(tmp_path.iterdir()) == []


def test_occupied(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert [occupied(tmp_path / name) for name in ("none", "empty", "file", "")] == [False, False, True, True]


def test_what_a_killed_write_leaves_is_no_entry_and_is_swept(tmp_path):
    for name in ("a.txt", ".a.txt.x1.tmp", ".hidden", "b.tmp"):
        (tmp_path / name).write_text("x")
    assert entries(tmp_path) == {"a.txt", ".hidden", "b.tmp"}
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".hidden", "b.tmp"}
    assert entries(tmp_path / "none") == set()
    sweep(tmp_path / "none")


def test_resumable_directory_goes_on_and_appears_at_once(tmp_path):
    out, work = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(Boom), resumable_directory(out, "one") as folder:
        (folder / "a").write_text("1")
        raise Boom
    assert not out.exists()
    assert folder == work
    with resumable_directory(out, "one") as folder:
        assert (folder / "a").read_text() == "1"
        (folder / "b").write_text("2")
    assert sorted(f.name for f in out.iterdir()) == ["a", "b"]
    assert list(tmp_path.iterdir()) == [out]
    with (
        pytest.raises(InputError, match=r"out is there already and not empty"),
        resumable_directory(out, "one"),
    ):
        pass
    with resumable_directory(out, "one", overwrite=True) as folder:
        (folder / "c").write_text("3")
    assert [f.name for f in out.iterdir()] == ["c"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("left", ["another run", "no mark"])
def test_resumable_directory_takes_nothing_of_another_run(tmp_path, left):
    with pytest.raises(Boom), resumable_directory(tmp_path / "out", "one") as folder:
        (folder / "a").write_text("1")
        raise Boom
    if left == "no mark":  # killed between its making and its mark, or before the last step
        (folder / UNDER_WAY).unlink()
    with resumable_directory(tmp_path / "out", "two" if left == "another run" else "one") as folder:
        assert [f.name for f in folder.iterdir()] == [UNDER_WAY]
    assert list((tmp_path / "out").iterdir()) == []


def test_resumable_directory_needs_a_place(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(InputError, match="file"), resumable_directory(path, "one"):
            pass

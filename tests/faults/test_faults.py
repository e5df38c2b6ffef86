"""The tools find what is forbidden, and every case calls what there is."""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

if not hasattr(os, "fork"):
    pytest.skip("the tools fork", allow_module_level=True)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from faults import bad, cases, forking, garbage, kill, load, mangle, mangle_every  # noqa: E402 - the line above makes them importable
from faults.garbage import Reader  # noqa: E402
from faults.kill import Command  # noqa: E402


def killed(name, place, **options):
    argv = ("write", "out.txt")
    case = Command(name=f"bad {name}", main=f"faults.bad:{name}", argv=argv, **options)
    (place / "inputs").mkdir()
    return kill.kill(case, place / "work", place / "inputs", kills=12)


def test_half_a_file_is_found(tmp_path):
    found = killed("half", tmp_path)
    assert found.kills == 12
    assert found.partial > 0
    assert any("the beginning of" in why for why in found.broken), found.broken


def test_a_whole_file_is_sound(tmp_path):
    found = killed("whole", tmp_path)
    assert found.broken == []
    assert (found.kills, found.again, found.same) == (12, 12, 12)
    assert found.partial > 0


def test_a_command_that_cannot_be_run_again_is_found(tmp_path):
    found = killed("stuck", tmp_path)
    assert any(why.startswith("cannot be run again: 2") for why in found.broken)


def test_another_result_after_a_kill_is_found(tmp_path):
    found = killed("mixed", tmp_path)
    assert any("another result after a kill: out.txt differs" in why for why in found.broken), found.broken


def hunted(name, place, examples=10, **options):
    def make(folder):
        (folder / "a.json").write_text('{"a": {"b": 1}}')

    (place / "inputs").mkdir()
    make(place / "inputs")
    argv = ("read", "{in}/a.json")
    how = {"argv": argv, "file": "a.json", "kind": "json", "make": make, **options}
    reader = Reader(name=f"bad {name}", main=f"faults.bad:{name}", **how)
    return garbage.hunt(reader, place / "work", place / "inputs", examples)


@pytest.mark.parametrize(
    ("name", "words"),
    [("careless", "traceback: "), ("vague", "nameless: error: something"), ("careful", None)],
)
def test_what_garbage_does_is_judged(name, words, tmp_path):
    found = hunted(name, tmp_path)
    assert found.examples == 10
    assert all(why.startswith(words or "") for why in found.violations.values())
    assert bool(found.violations) == (words is not None), found.violations


def test_a_reader_that_never_ends_is_found(tmp_path):
    assert any("timeout" in why for why in hunted("hungry", tmp_path, timeout=1).violations.values())


DOCUMENTS = {
    "json": (b'{"a": {"b": [1, 2]}, "c": 3}', b'{"a": {"b": [-1, 2]}, "c": 3}'),
    "json lines": (b'{"a": 0}\n{"a": 1}\n', b'{"a": 0}\n{"a": -1}\n'),
    "toml": (b"a = 1\n[b]\nc = 2\n", b"a = 1\n\n[b]\nc = -1\n"),
    "yaml": (b"a: 1\nb:\n  c: 2\n", b"a: 1\nb:\n  c: -1\n"),
    "fields": (b"a,b\n1,2\n", b"a,b\n1,-1"),
    "bytes": (b"abc", b"abcabc"),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_every_single_change_is_made_once(kind):
    valid, wanted = DOCUMENTS[kind]
    made = [found.data for found in mangle_every.every(kind, valid)]
    assert wanted in made
    assert b"" in made
    assert None in made
    changed = made[len(mangle.known_bytes(valid)) :]
    assert valid not in changed
    assert all(isinstance(data, bytes) for data in changed)
    assert len(changed) >= 12 or kind == "bytes"


def test_a_tensor_of_another_place_is_among_the_changes():
    from safetensors.numpy import save

    valid = save({"w": np.zeros(3, np.float32)})
    assert any(b'"data_offsets":[-1,12]' in found.data.replace(b" ", b"")
               for found in mangle_every.every("safetensors", valid) if found.data)  # fmt: skip


def test_every_change_is_judged(tmp_path):
    found = hunted("careless", tmp_path, examples=0)
    assert found.examples > 60
    assert len(found.violations) > 3


def test_killed_means_killed(tmp_path):
    assert forking.forked(lambda: 3, tmp_path).code == 3
    stopped = forking.forked(lambda: bad._work(60), tmp_path, moment=forking.Moment(seconds=0.02))
    assert stopped.killed
    assert stopped.seconds < 5


def test_every_command_of_every_package_has_its_place():
    for verb in ("kill", "garbage", "load"):
        names = [case.name for case in cases.of(verb)]
        assert len(names) == len(set(names))
    kinds = {case.kind for case in cases.of("garbage")}
    assert kinds <= set(garbage.KINDS)
    assert sum(load.CLIENTS.values()) == 64


@cache
def _commands(module):
    from typer.main import get_command

    return get_command(importlib.import_module(module).app)


def _leaf(case, words):
    """The command that the words call, and those that follow its name."""
    command = _commands(case.main.partition(":")[0])
    rest = list(words)
    while rest and (below := getattr(command, "commands", None)):
        command = below[rest.pop(0)]
    return command, rest


@pytest.mark.parametrize("verb", ["kill", "garbage"])
def test_every_case_calls_a_verb_as_it_may_be_called(verb):
    wrong = []
    for case in cases.of(verb):
        again = (*case.argv, *case.again) if verb == "kill" else ()
        for words in (case.argv, again, getattr(case, "before", ()), getattr(case, "look", ())):
            if not words:
                continue
            command, rest = _leaf(case, words)
            try:
                command.make_context(case.name, [*rest])
            except Exception as error:  # noqa: BLE001 - typer's, which has a click of its own or another's
                if type(error).__name__ != "BadParameter":  # as a file is that is not there yet
                    wrong.append(f"{case.name}: {' '.join(words)}: {type(error).__name__} {error}")
    assert not wrong

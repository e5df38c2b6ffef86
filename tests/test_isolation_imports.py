"""``import package`` beside torch alone: what it loads, and (reported, not asserted) what it costs.

One process has imported torch and nothing else; a fork of it imports each package.
"""

import json
import subprocess
import sys

import pytest
from workspace import CORE, HEAVY, Member, members

FORKS = """
import json, os, sys, time
import torch
assert not {heavy!r} & set(sys.modules)
for module in {modules!r}:
    sys.stdout.flush()
    if not (child := os.fork()):
        start = time.perf_counter()
        __import__(module)
        names = sorted({{name.partition(".")[0] for name in sys.modules}})
        print(json.dumps([module, time.perf_counter() - start, names]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module
"""
ALONE = f"import {CORE.module}, json, sys; print(json.dumps(sorted(sys.modules)))"


def run(code: str, cwd: object) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, list[str]]]:
    modules = [member.module for member in members()]
    lines = run(
        FORKS.format(heavy=set(HEAVY), modules=modules), tmp_path_factory.mktemp("empty")
    ).splitlines()
    return {module: (seconds, names) for module, seconds, names in map(json.loads, lines)}


@pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
def test_import_loads_nothing_heavy(member: Member, loaded, record_property) -> None:
    seconds, names = loaded[member.module]
    record_property("seconds_beside_torch", seconds)
    print(f"import {member.module}: {seconds:.3f} s beside torch")
    assert member.module in names
    assert not set(HEAVY) & set(names)


def test_the_core_does_not_even_load_torch(tmp_path) -> None:
    names = json.loads(run(ALONE, tmp_path))
    assert not {"torch", "numpy", "rich", "typer", "pydantic"} & set(names)

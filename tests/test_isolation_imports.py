"""``import package`` in a fresh process: what it loads, and (reported, not asserted) what it costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import CORE, HEAVY, Member, members

CODE = """
import json, sys, time
if {torch}:
    import torch
start = time.perf_counter()
import {module}
print(json.dumps([time.perf_counter() - start, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


def load(module: str, cwd: Path, *, torch: bool) -> tuple[float, list[str]]:
    code = CODE.format(module=module, torch=torch)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    seconds, names = json.loads(done.stdout)
    return seconds, names


@pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
def test_import_loads_nothing_heavy(member: Member, tmp_path: Path, record_property) -> None:
    seconds, names = load(member.module, tmp_path, torch=True)
    record_property("seconds_beside_torch", seconds)
    print(f"import {member.module}: {seconds:.3f} s beside torch")
    assert not set(HEAVY) & set(names)


def test_the_core_does_not_even_load_torch(tmp_path: Path) -> None:
    _, names = load(CORE.module, tmp_path, torch=False)
    assert not {"torch", "numpy", "rich", "typer", "pydantic"} & set(names)

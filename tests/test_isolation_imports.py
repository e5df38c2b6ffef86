"""What an import loads, in a fresh process; ``.ci/isolation.py`` measures what it costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import CORE, HEAVY, Member, members

CODE = """
import json, sys
import {modules}
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""


def loaded(cwd: Path, *modules: str) -> set[str]:
    code = CODE.format(modules=", ".join(modules))
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
def test_import_loads_nothing_heavy(member: Member, tmp_path: Path) -> None:
    names = loaded(tmp_path, member.module)
    assert member.module in names
    assert not set(HEAVY) & names


def test_the_core_does_not_even_load_torch(tmp_path: Path) -> None:
    assert not {"torch", "numpy", "rich", "typer", "pydantic"} & loaded(tmp_path, CORE.module)


def test_the_command_and_reports_do_without_torch(tmp_path: Path) -> None:
    names = loaded(
        tmp_path, "fusion_core.command", "fusion_core.report", "fusion_core.bench", "fusion_core.config"
    )
    assert "rich" in names
    assert "torch" not in names

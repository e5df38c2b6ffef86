"""The scripts that try wheels: what a package costs, what is resolved, what type checkers have to see."""

import tomllib
from pathlib import Path

import pytest
from cost import BUDGET, Cost, closure, exceeded, files, strays, table
from matrix import RESOLUTIONS, extras_of, requirements
from packaging.requirements import Requirement
from workspace import CORE, ROOT, Member, member, members, packages

BUDGETS = {"import": {"seconds": 0.5, "torch_seconds": 2.0}, "megabytes": {"a": 100}}


def install(place: Path, name: str, requires: tuple[str, ...] = (), size: int = 10) -> None:
    module = name.replace("-", "_")
    info = place / f"{module}-1.0.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        "Version: 1.0",
        *(f"Requires-Dist: {line}" for line in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (place / f"{module}.py").write_text("#" * size)
    (info / "RECORD").write_text(f"{module}.py,,\n{info.name}/METADATA,,\n../../../bin/{name},,\n")


@pytest.fixture
def place(tmp_path):
    install(tmp_path, "own", ("Torch>=2", "Data_Frames[fast] >=1", 'windows-only ; sys_platform == "win32"'))
    install(tmp_path, "torch", ("sympy", "shared-part"), size=10**6)
    install(tmp_path, "sympy", size=10**6)
    install(tmp_path, "shared-part")
    install(tmp_path, "data-frames", ("shared_part", 'engine ; extra == "fast"', 'plots ; extra == "plot"'))
    install(tmp_path, "engine", ("own",))
    install(tmp_path, "plots")
    return tmp_path


def test_only_what_the_package_needs_counts_and_nothing_that_only_torch_needs(place):
    needed = closure(place, "own")
    assert set(needed) == {"own", "data-frames", "shared-part", "engine"}
    assert [path.name for path in files(needed["engine"])] == ["engine.py", "METADATA"]
    assert set(closure(place, "own", leaf="data-frames")) == {"own", "torch", "sympy", "shared-part"}


def test_a_clean_environment_has_no_strays(place):
    assert strays(place) == []
    (place / "left.py").touch()
    (place / "__pycache__").mkdir()
    assert strays(place) == ["left.py"]


@pytest.mark.parametrize(
    ("seconds", "torch_seconds", "megabytes", "words"),
    [
        (0.49, 2.0, 99.0, []),
        (0.9, 4.0, 99.0, []),  # a machine of half the speed
        (0.3, 1.0, 99.0, ["a: the import adds 0.30 CPU s to torch's 1.00, the budget is 0.25 here"]),
        (0.1, 2.0, 101.0, ["a: 101 MB beside torch, the budget is 100 MB"]),
    ],
)
def test_what_exceeds_the_budget_is_said(seconds, torch_seconds, megabytes, words):
    assert exceeded(Cost("a", seconds, torch_seconds, 1.0, 5, megabytes, 7), BUDGETS) == words


def test_a_package_without_a_budget_is_told():
    assert exceeded(Cost("b", 0.0, 2.0, 1.0, 5, 1.0, 7), BUDGETS) == [
        "b has no budget of megabytes in budget.toml"
    ]
    assert list(tomllib.loads(BUDGET.read_text("utf-8"))["megabytes"]) == [entry.name for entry in members()]


def test_the_table_has_a_line_for_each_package():
    lines = table([Cost("b", 0.25, 2.0, 1.0, 5, 74.2, 7), Cost("a", 0.0, 2.0, 1.0, 5, 1.0, 7)]).splitlines()
    assert [line.split()[0] for line in lines] == ["package", "a", "b"]
    assert lines[2].split() == ["b", "0.250", "2.00", "1.00", "5", "74", "7"]


@pytest.mark.parametrize("target", members(), ids=lambda entry: entry.name)
def test_every_line_that_an_install_follows_is_resolved(target: Member) -> None:
    built = {entry.name: ROOT / f"{entry.module}.whl" for entry in members()}
    for extras in ([], *([extra] for extra in extras_of(target)), extras_of(target)):
        found = [Requirement(line) for line in requirements(target, extras, built)]
        wheels = {entry.name: entry for entry in found if entry.url}
        assert set(wheels) == {target.name, CORE.name}
        assert wheels[target.name].extras == set(extras)
        assert CORE.name not in {entry.name for entry in found if not entry.url}
        declared = [Requirement(line) for line in target.pyproject["project"]["dependencies"]]
        asked = set().union(*(entry.extras for entry in declared if entry.name == CORE.name))
        assert asked <= wheels[CORE.name].extras
        assert {entry.name for entry in declared} <= {entry.name for entry in found}


def test_an_extra_of_the_core_is_followed() -> None:
    built = {entry.name: ROOT / f"{entry.module}.whl" for entry in members()}
    lines = requirements(member("dbnet-asf"), ["onnx"], built)
    assert any(line.startswith("onnxruntime>=") for line in lines)
    assert any(line.startswith("fusion-core[hub,onnx] @ file://") for line in lines)
    assert RESOLUTIONS == ("highest", "lowest-direct")


def test_the_consumer_is_an_outside_project_with_three_packages() -> None:
    place = ROOT / "tests" / "consumer"
    project = tomllib.loads((place / "pyproject.toml").read_text("utf-8"))
    listed = {Requirement(line).name for line in project["project"]["dependencies"]}
    assert len(listed & {entry.name for entry in packages()}) == 3
    assert "sources" not in project.get("tool", {}).get("uv", {})
    assert project["tool"]["basedpyright"]["typeCheckingMode"] == "strict"
    assert project["tool"]["mypy"]["strict"] is True
    assert (
        sum(line.endswith("# wrong") for line in (place / "misuse.py").read_text("utf-8").splitlines()) >= 8
    )

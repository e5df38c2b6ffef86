"""The workflows say what the tree says: a workflow per package, pinned actions, paths that cover the core."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from matrix import RESOLUTIONS
from release_check import disagreements
from workspace import CORE, ROOT, Member, members, packages

WORKFLOWS = ROOT / ".github" / "workflows"
FILES = sorted(WORKFLOWS.glob("*.yml"))
ids = {"ids": lambda value: value.name}


def read(path: Path) -> dict[str, Any]:
    # YAML 1.1 reads the key `on` as true
    return {
        "on" if key is True else key: value for key, value in yaml.safe_load(path.read_text("utf-8")).items()
    }


def caller(member: Member) -> Path:
    return WORKFLOWS / ("core.yml" if member == CORE else f"{member.name}.yml")


def uses_of(workflow: dict[str, Any]) -> list[str]:
    jobs = workflow["jobs"].values()
    steps = [step for job in jobs for step in job.get("steps", [])]
    return [entry["uses"] for entry in [*jobs, *steps] if "uses" in entry]


@pytest.mark.parametrize("path", FILES, **ids)
def test_every_action_is_pinned_by_commit_and_named_by_version(path: Path) -> None:
    lines = re.findall(r"^\s*(?:- )?uses: (.+)$", path.read_text("utf-8"), re.MULTILINE)
    assert len(lines) == len(uses_of(read(path)))
    for line in lines:
        assert line.startswith("./") or re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


@pytest.mark.parametrize("path", FILES, **ids)
def test_every_workflow_reads_only_and_ends(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 30, name
        for step in job.get("steps", []):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", ""), f"{name}: pass it through env instead"
    if "workflow_call" not in workflow["on"]:
        assert "concurrency" in workflow


@pytest.mark.parametrize("member", members(), **ids)
def test_every_member_has_a_workflow_that_its_changes_start(member: Member) -> None:
    workflow = read(caller(member))
    assert workflow["on"]["push"]["branches"] == ["main"]
    assert "paths" not in workflow["on"]["push"], "main runs everything"
    paths = set(workflow["on"]["pull_request"]["paths"])
    wanted = {f"{member.path}/**", f"{CORE.path}/**", "pyproject.toml", ".github/workflows/_package.yml"}
    if member != CORE:
        wanted.add(f"docs/tutorials/{member.name}.md")
    assert wanted | {f".github/workflows/{caller(member).name}"} <= paths
    foreign = {f"{other.path}/**" for other in packages() if other != member}
    assert not foreign & paths, "another package cannot change the outcome"
    (job,) = workflow["jobs"].values()
    assert job["uses"] == "./.github/workflows/_package.yml"
    assert job["with"] == {"package": member.name, "directory": member.path}


def test_no_workflow_is_left_of_a_package_that_is_gone() -> None:
    general = {"_package.yml", "faults.yml", "lint.yml", "matrix.yml", "release.yml"}
    assert {path.name for path in FILES} == general | {caller(member).name for member in members()}


def test_a_package_is_tested_on_both_ends_of_python_on_three_systems_alone_and_at_its_lowest() -> None:
    jobs = read(WORKFLOWS / "_package.yml")["jobs"]
    assert set(jobs) == {"tests", "lowest", "isolation", "docs"}
    matrix = jobs["tests"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.14"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert any(step.get("with", {}).get("python-version") == "3.11" for step in jobs["lowest"]["steps"])
    commands = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    assert "--resolution lowest-direct" in commands["lowest"]
    assert ".ci/isolation.py" in commands["isolation"]
    assert "tests/test_docs.py" in commands["docs"]


def test_the_matrix_has_every_member_at_both_ends_of_versions_and_python() -> None:
    workflow = read(WORKFLOWS / "matrix.yml")
    assert set(workflow["on"]) == {"schedule", "workflow_dispatch"}
    matrix = workflow["jobs"]["versions"]["strategy"]["matrix"]
    assert matrix["package"] == [member.name for member in members()]
    assert (
        matrix["python"] == read(WORKFLOWS / "_package.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    )
    assert set(matrix["resolution"]) == set(RESOLUTIONS)
    commands = {name: job["steps"][-1]["run"] for name, job in workflow["jobs"].items()}
    assert ".ci/matrix.py versions" in commands["versions"]
    assert ".ci/consumer.py" in commands["consumer"]


def test_the_lint_workflow_calls_steps_that_ci_run_has() -> None:
    jobs = read(WORKFLOWS / "lint.yml")["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    called = [word for line in lines if line.startswith("bash .ci/run ") for word in line.split()[2:]]
    declared = re.search(r"^steps=\((.*)\)$", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    assert declared is not None
    assert set(declared.group(1).split()) - set(called) == {"tests", "isolation"}


def test_the_faults_are_tried_in_every_package() -> None:
    jobs = read(WORKFLOWS / "faults.yml")["jobs"]
    tried = set(jobs["package"]["strategy"]["matrix"]["package"])
    names = {member.name for member in packages()}
    assert tried == names | {"fusion demo"}
    assert set(jobs["changes"]["strategy"]["matrix"]["package"]) == names
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert all(f"tests/faults {verb} " in commands for verb in ("kill", "garbage", "load"))


def test_a_release_checks_builds_tries_and_publishes_without_a_secret() -> None:
    text = (WORKFLOWS / "release.yml").read_text("utf-8")
    workflow = read(WORKFLOWS / "release.yml")
    assert workflow["on"] == {"push": {"tags": ["*-v[0-9]*"]}}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    commands = "\n".join(step.get("run", "") for step in build["steps"])
    positions = [commands.index(part) for part in (".ci/release_check.py", "uv build", ".ci/isolation.py")]
    assert positions == sorted(positions)
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert "permissions" not in build
    assert publish["environment"].startswith("release-")
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-")
    assert "secrets." not in text


@pytest.mark.parametrize("member", members(), **ids)
def test_release_check_wants_one_version_everywhere(member: Member) -> None:
    assert disagreements(member.name, member.version) == []
    wrong = disagreements(member.name, "99.0.0")
    assert len(wrong) == 3
    assert all("99.0.0" in line and member.version in line for line in wrong)


def test_release_check_knows_no_foreign_name() -> None:
    with pytest.raises(SystemExit, match="no member is called 'nothing'"):
        disagreements("nothing", "0.1.0")

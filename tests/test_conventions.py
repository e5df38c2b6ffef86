"""What every member of the workspace has in common, so that who knows one package knows all."""

import ast
import importlib
import re
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from workspace import CORE, ROOT, SECTIONS, Member, members, packages, tracked_files

LINES = 450
HOSTS = re.compile(
    "|".join(("py" + r"pi\.org", "python" + r"hosted\.", "npm" + r"js\.", "ana" + r"conda\.org")), re.I
)
MACHINE_PATHS = re.compile(r"(?<![\w.])/(home|root|Users|work|farm)/\w")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

every_member = pytest.mark.parametrize("member", members(), ids=lambda member: member.name)
every_package = pytest.mark.parametrize("member", packages(), ids=lambda member: member.name)


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {found.name: found for found in map(Requirement, lines)}


def imported(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def contracts(kind: str) -> list[dict[str, Any]]:
    return [entry for entry in PYPROJECT["tool"]["importlinter"]["contracts"] if entry["type"] == kind]


@every_member
def test_metadata(member: Member) -> None:
    project = member.pyproject["project"]
    assert member.pyproject["build-system"]["build-backend"] == "hatchling.build"
    assert member.pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        f"src/{member.module}"
    ]
    assert project["requires-python"] == ">=3.11"
    assert project["license"] == "Apache-2.0"
    assert project["readme"] == "README.md"
    assert len(project["description"]) <= 120
    assert (member.source / "py.typed").is_file()
    assert (member.directory / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert any(member.directory.glob("tests/test_*.py")), "a member has tests of its own"


@every_member
def test_one_version(member: Member) -> None:
    assert member.version == member.code_version() == member.changelog_version()


@every_package
def test_a_package_is_a_method(member: Member) -> None:
    project = member.pyproject["project"]
    assert member.directory.name == member.name
    assert project["scripts"] == {member.name: f"{member.module}.cli:main"}
    assert project["entry-points"]["fusion_core.methods"] == {member.name: f"{member.module}.demo:method"}
    core = requirements(project["dependencies"])["fusion-core"]
    assert core.specifier == Requirement("fusion-core>=0.1,<0.2").specifier
    assert "demo" in project["optional-dependencies"]
    for name in ("benchmarks", "tests/golden"):
        assert (member.directory / name).is_dir(), name
    others = {other.name for other in packages()} - {member.name}
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    assert not others & set(requirements([*project["dependencies"], *extras]))


@every_package
def test_the_method_can_be_found_and_loaded(member: Member) -> None:
    (entry,) = entry_points(group="fusion_core.methods", name=member.name)
    assert entry.load().name == member.name


@every_package
def test_the_workspace_installs_the_demo(member: Member) -> None:
    assert "demo" in requirements(PYPROJECT["project"]["dependencies"])[member.name].extras
    assert PYPROJECT["tool"]["uv"]["sources"][member.name] == {"workspace": True}


@every_member
def test_public_names(member: Member) -> None:
    """That ``__all__`` is sorted is ruff's RUF022; that it is true is seen here."""
    module = importlib.import_module(member.module)
    assert "__version__" in module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing
    assert set(module.__all__) <= set(dir(module))


@every_member
def test_packages_import_the_core_and_never_each_other(member: Member) -> None:
    foreign = {other.module for other in packages() if other != member}
    for path in member.source.rglob("*.py"):
        assert not foreign & imported(path), path.name


@every_package
def test_readme_sections(member: Member) -> None:
    text = (member.directory / "README.md").read_text(encoding="utf-8")
    headings = [line.lstrip("# ").lower() for line in text.splitlines() if re.match(r"##+ ", line)]
    missing = [section for section in SECTIONS if not any(section in heading for heading in headings)]
    assert not missing


def test_the_readme_lists_nine_methods_and_says_which_are_built() -> None:
    rows = dict(re.findall(r"^\| \[?`([\w-]+)`\S* \|(.*)$", README, re.MULTILINE))
    assert len(rows) == 9
    built = {name for name, rest in rows.items() if "not built yet" not in rest}
    assert built == {member.name for member in packages()}
    for member in packages():
        assert f"| [`{member.name}`]({member.path}) |" in README


def test_import_linter_knows_every_package() -> None:
    modules = {member.module for member in packages()}
    assert set(PYPROJECT["tool"]["importlinter"]["root_packages"]) == {CORE.module} | modules
    (forbidden,) = contracts("forbidden")
    assert forbidden["source_modules"] == [CORE.module]
    assert set(forbidden["forbidden_modules"]) == modules
    (independent,) = contracts("independence")
    assert set(independent["modules"]) == modules
    layered = {name for contract in contracts("layers") for name in contract["containers"]}
    assert layered == {CORE.module} | modules


def test_no_file_is_long() -> None:
    sizes = {
        path: path.read_text(encoding="utf-8").count("\n") for path in tracked_files() if path.suffix == ".py"
    }
    assert sizes
    assert not {path.relative_to(ROOT).as_posix(): size for path, size in sizes.items() if size > LINES}


def test_no_file_names_a_registry_or_a_machine() -> None:
    found: list[str] = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if HOSTS.search(line) or MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT).as_posix()}:{number}: {line.strip()[:80]}")
    assert not found


def test_the_lock_holds_hashes_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = re.findall(r"^[\w.-]+==", text, re.MULTILINE)
    assert len(pins) > 20
    assert text.count("--hash=sha256:") >= len(pins)
    assert "://" not in text
    assert not re.search(r"^-|\bfile:|@ ", text, re.MULTILINE)


def test_uv_lock_is_not_tracked() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "uv.lock"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout == ""
    assert "uv.lock" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "exclude-newer" in PYPROJECT["tool"]["uv"]

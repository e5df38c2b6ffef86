"""What READMEs and tutorials show works: snippets run and print what is shown, options are in ``--help``.

The snippets of one file share a namespace and an empty working directory, in order. A fence that says
```` ```python no-run REASON ```` is left out; what a snippet prints is compared with the
```` ```text output ```` after it, see ``.ci/fences.py``. Of a command line that
starts with one of our console scripts the verb must exist and its help must name every long option that the
line uses.
"""

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path

import pytest
from fences import difference, fences, plain_fences
from workspace import ROOT, Member, members, packages, tracked_files

from fusion_core.seeding import restore_rng, rng_state

TUTORIALS = ROOT / "docs" / "tutorials"
FILES = [
    ROOT / "README.md",
    *(member.directory / "README.md" for member in members()),
    *sorted(TUTORIALS.glob("*.md")),
]
SCRIPTS = {entry.name: entry for entry in entry_points(group="console_scripts")}
OURS = {member.script for member in members()}
HELP: dict[tuple[str, ...], str] = {}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
every_package = pytest.mark.parametrize("member", packages(), ids=lambda member: member.name)


def command_lines(path: Path) -> Iterator[list[str]]:
    """The words of each call of one of our console scripts, ``uv run`` and pipes cut off."""
    for fence in fences(path.read_text(encoding="utf-8")):
        if fence.language not in ("bash", "sh", "shell", "console"):
            continue
        for line in fence.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            for between, group in groupby(words, key={"&&", "||", "|", ";"}.__contains__):
                call = [] if between else list(group)
                if call[:2] == ["uv", "run"]:
                    scripts = [i for i, word in enumerate(call) if word in OURS]
                    if scripts and call[scripts[0] - 1] == "--package":
                        scripts = scripts[1:]
                    call = call[scripts[0] :] if scripts else []
                if call and call[0] in OURS:
                    yield call


def help_of(
    script: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What ``script words... --help`` prints; the call must end with 0. Several lines show the same verb."""
    if (script, *words) in HELP:
        return HELP[script, *words]
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
    capsys.readouterr()
    try:
        status = SCRIPTS[script].load()()
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert status in (0, None), f"{script} {' '.join(words)} --help: {said.out}{said.err}"
    HELP[script, *words] = re.sub(r"\x1b\[[0-9;]*m", "", said.out)
    return HELP[script, *words]


@every_file
def test_python_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    before = set(tracked_files())
    random = rng_state()
    said: str | None = None
    for fence in fences(path.read_text(encoding="utf-8")):
        where = f"{path.name}, line {fence.line}"
        if fence.output:
            assert said is not None, f"{where}: no snippet stands before this output"
            wrong = difference(said, fence.text, fence.tolerance)
            assert wrong is None, f"{where}: {wrong}"
        said = None
        if fence.language not in ("python", "py"):
            continue
        if fence.note.startswith("no-run"):
            assert fence.note.removeprefix("no-run").strip(), f"{where}: say why it is not run"
            continue
        # the newlines put the snippet's lines where the file has them, for the traceback
        code = compile("\n" * fence.line + fence.text, str(path), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        said = printed.getvalue()
    restore_rng(random)
    assert set(tracked_files()) == before, "a snippet writes into the repository"


@every_file
def test_command_lines_exist(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for script, *words in command_lines(path):
        first_option = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        text = help_of(script, words[:first_option], monkeypatch, capsys)
        for word in words[first_option:]:
            option = word.partition("=")[0]
            if option.startswith("--") and option not in {"--", "--help"}:
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), (
                    f"{script} {' '.join(words)}: {option}"
                )


@pytest.mark.parametrize("name", sorted(OURS))
def test_console_scripts_answer(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Usage" in help_of(name, [], monkeypatch, capsys)


@every_package
def test_every_package_has_a_tutorial_that_is_run_and_shows_what_it_prints(member: Member) -> None:
    text = (TUTORIALS / f"{member.name}.md").read_text(encoding="utf-8")
    assert 60 <= sum(bool(line.strip()) for line in text.splitlines()) <= 120
    blocks = list(fences(text))
    assert all("no-run" not in block.note for block in blocks)
    assert sum(block.language == "python" for block in blocks) >= 4
    assert sum(block.output for block in blocks) >= 3
    assert re.search(rf"^(from|import) {member.module}\b", text, re.MULTILINE)


def test_no_tutorial_is_left_of_a_package_that_is_gone() -> None:
    assert {path.stem for path in TUTORIALS.glob("*.md")} == {member.name for member in packages()}


def test_snippets_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "x\n```python no-run slow\na\n```\n```python\nb\n```\n\n```text output within 0.5\n1.0\n```\n"
        "```bash\n$ fusion demo \\\n  --out x # y\ncd y && uv run --package fusion fusion list | cat\n```\n"
    )
    found = [(fence.line, fence.language, fence.note) for fence in fences(page.read_text())]
    assert found == [
        (2, "python", "no-run slow"),
        (5, "python", ""),
        (9, "text", "output within 0.5"),
        (12, "bash", ""),
    ]
    assert [fence.output for fence in fences(page.read_text())] == [False, False, True, False]
    assert next(fence.tolerance for fence in fences(page.read_text()) if fence.output) == 0.5
    assert list(command_lines(page)) == [["fusion", "demo", "--out", "x"], ["fusion", "list"]]


def test_a_site_gets_fences_with_a_language_only() -> None:
    text = "1. x\n\n   ```python no-run: slow\n   a\n   ```\n\n```text output\n1\n```\n"
    assert plain_fences(text) == '1. x\n\n   ```python\n   a\n   ```\n\n```text title="Output"\n1\n```\n'


@pytest.mark.parametrize(
    ("said", "wanted", "tolerance", "same"),
    [
        ("a 1.0\n", "a 1.0\n", None, True),
        ("a 1.0\nb\n", "a ...\n", None, True),
        ("a 1.0\n", "a 1.01\n", None, False),
        ("a  -0.01 b\n", "a 0.01 b\n", 0.02, True),
        ("a 1.5\n", "a 1.0\n", 0.4, False),
        ("a 1.0 2\n", "a 1.0 3\n", 0.4, False),
        ("a nan\n", "a 1.0\n", 9.0, False),
        ("a 1.0\n", "a 1.0 b\n", 9.0, False),
        ("x 3.0\nrest 2.5 of it\n", "x 3.1\n...", 0.2, True),
    ],
)
def test_outputs_are_compared(said: str, wanted: str, tolerance: float | None, same: bool) -> None:
    assert (difference(said, wanted, tolerance) is None) is same

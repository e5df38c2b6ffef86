"""What the READMEs show works: Python snippets are run, command lines are compared with ``--help``.

The snippets of one file share a namespace and an empty working directory, in order. A fence that says
```` ```python no-run REASON ```` is left out. Of a command line that starts with one of our console scripts
the verb must exist and its help must name every long option that the line uses.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path

import pytest
from workspace import ROOT, members, tracked_files

FILES = [ROOT / "README.md", *(member.directory / "README.md" for member in members())]
FENCE = re.compile(r"^```(\w+)[ ]*([^\n]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
SCRIPTS = {entry.name: entry for entry in entry_points(group="console_scripts")}
OURS = {member.script for member in members()}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def fences(path: Path, *languages: str) -> Iterator[tuple[int, str, str]]:
    """Line number, what follows the language, and the text of each fenced block."""
    text = path.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found.group(1) in languages:
            yield text.count("\n", 0, found.start()) + 1, found.group(2).strip(), found.group(3)


def command_lines(path: Path) -> Iterator[list[str]]:
    """The words of each call of one of our console scripts, ``uv run`` and pipes cut off."""
    for _, _, block in fences(path, "bash", "sh", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
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
    """What ``script words... --help`` prints; the call must end with 0."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
    capsys.readouterr()
    try:
        status = SCRIPTS[script].load()()
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert status in (0, None), f"{script} {' '.join(words)} --help: {said.out}{said.err}"
    return re.sub(r"\x1b\[[0-9;]*m", "", said.out)


@every_file
def test_python_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    before = set(tracked_files())
    for number, note, code in fences(path, "python", "py"):
        if note.startswith("no-run"):
            assert note.removeprefix("no-run").strip(), f"line {number}: say why it is not run"
            continue
        # the newlines put the snippet's lines where the file has them, for the traceback
        exec(compile("\n" * number + code, str(path), "exec"), namespace)
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


def test_snippets_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "x\n```python no-run slow\na\n```\n```python\nb\n```\n"
        "```bash\n$ fusion demo \\\n  --out x # y\ncd y && uv run --package fusion fusion list | cat\n```\n"
    )
    assert list(fences(page, "python")) == [(2, "no-run slow", "a\n"), (5, "", "b\n")]
    assert list(command_lines(page)) == [["fusion", "demo", "--out", "x"], ["fusion", "list"]]

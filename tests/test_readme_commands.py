"""The README's two commands, and what ``.ci/run`` makes of the second."""

import re

from workspace import ROOT

SETUP = "python3 -m pip install uv && "
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines of the README that set everything up by themselves, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(SETUP)]


def test_the_readme_has_exactly_two_commands_and_the_first_shows_something() -> None:
    assert len(commands()) == 2
    assert commands()[0] == f"{SETUP}uv run fusion demo"


def test_ci_run_calls_the_second_command_as_it_stands() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    found = re.search(r"^tests\(\) \{ (.+?); \}", script, re.MULTILINE)
    assert found is not None
    assert SETUP + found.group(1) == commands()[1]
    assert "-m pip install uv" in script
    assert script.index("steps=(tests ") > 0, "the tests come first"

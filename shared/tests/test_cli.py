import errno
import json
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import typer

from fusion_core import cli
from fusion_core.errors import (
    CheckpointError,
    ConfigError,
    FusionError,
    FusionWarning,
    InputError,
    MissingExtraError,
    StoreError,
)
from fusion_core.progress import track
from fusion_core.report import Comparison, Report
from fusion_core.results import Result
from fusion_core.testing import run_cli

ERRORS = {
    e.__name__: e
    for e in (InputError, ConfigError, CheckpointError, StoreError, MissingExtraError, FusionError)
}


@dataclass(frozen=True, slots=True)
class Score(Result):
    score: float
    names: list


def make():
    app = cli.new_app("tool", "Does things.", "1.2.3")

    @app.command()
    def fail(kind: str):
        raise ERRORS[kind]("threshold is 7,\n  wanted a number in [0, 1]")

    @app.command()
    def fail_long():
        raise InputError(f"a.json: cx is {'x' * 9000}, wanted a number")

    @app.command()
    def fill(kind: str):
        if kind == "torch":
            torch.empty(1 << 60)
        raise MemoryError

    @app.command()
    def touch(path: str):
        Path(path).open("rb").close()

    @app.command()
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    @app.command()
    def warn():
        for kind in (FusionWarning, UserWarning):
            sys.stderr.write(warnings.formatwarning(kind("two\n  lines"), kind, "a.py", 3, "code()"))

    @app.command()
    def crash():
        raise RuntimeError("bug")

    @app.command()
    def gate():
        raise typer.Exit(3)

    @app.command()
    def interrupt():
        raise KeyboardInterrupt

    @app.command()
    def show(json: cli.Json = False):
        cli.emit(Score(float("nan"), ["a", "b"]), json)

    @app.command()
    def options(
        out: cli.Out = None,
        device: cli.Device = "auto",
        dtype: cli.DType = "auto",
        seed: cli.Seed = 0,
        quiet: cli.Quiet = False,
        limit: cli.Limit = None,
        batch_size: cli.BatchSize = 32,
        resume: cli.Resume = False,
        overwrite: cli.Overwrite = False,
    ):
        values = [out and str(out), device, dtype, seed, quiet, limit, batch_size, resume, overwrite]
        cli.emit(values, json=True)

    return app


main = partial(cli.run, make())


@pytest.mark.parametrize("kind", sorted(ERRORS))
def test_family_errors_are_one_line(kind):
    done = run_cli(main, "fail", kind)
    assert done.code == (1 if kind == "FusionError" else 2)
    assert done.stderr == "error: threshold is 7, wanted a number in [0, 1]\n"
    assert done.stdout == ""


@pytest.mark.parametrize("kind", ["torch", "python"])
def test_out_of_memory_is_one_line(kind):
    done = run_cli(main, "fill", kind)
    assert done.code == 1
    assert re.fullmatch(r"error: out of memory: .+\n", done.stderr)


def test_what_the_system_refuses_is_one_line_with_the_file(tmp_path):
    done = run_cli(main, "touch", tmp_path)
    assert (done.code, done.stderr) == (2, f"error: {tmp_path}: Is a directory\n")
    done = run_cli(main, "touch", tmp_path / ("n" * 300))
    assert (done.code, done.stderr.endswith("nnn: File name too long\n")) == (2, True)
    done = run_cli(main, "full")
    assert (done.code, done.stderr) == (1, "error: No space left on device\n")


def test_a_very_long_error_keeps_its_ends():
    done = run_cli(main, "fail-long")
    assert done.stderr.startswith("error: a.json: cx is xxx")
    assert done.stderr.endswith("xxx, wanted a number\n")
    assert len(done.stderr) < 1000


def test_a_warning_of_the_family_is_one_line():
    before = warnings.formatwarning
    done = run_cli(main, "warn")
    assert done.stderr == "warning: two lines\na.py:3: UserWarning: two\n  lines\n  code()\n"
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["gate"], 3),
        (["interrupt"], 130),
        (["--version"], 0),
        (["--help"], 0),
        (["-h"], 0),
        (["nothing"], 2),
        (["options", "--limit", "0"], 2),
        (["options", "--batch-size", "x"], 2),
    ],
)
def test_exit_codes(arguments, code):
    done = run_cli(main, *arguments)
    assert done.code == code
    assert "Traceback" not in done.stderr
    if arguments == ["--version"]:
        assert done.stdout == "tool 1.2.3\n"


def test_no_verb_prints_help():
    done = run_cli(main)
    assert "Does things." in done.stdout + done.stderr
    assert "--version" in done.stdout + done.stderr


def test_a_bug_shows_a_plain_traceback():
    done = run_cli(main, "crash")
    assert done.code == 1
    assert "RuntimeError: bug" in done.stderr


def test_options():
    assert json.loads(run_cli(main, "options").stdout) == [
        None,
        "auto",
        "auto",
        0,
        False,
        None,
        32,
        False,
        False,
    ]
    words = [
        "-o",
        "x",
        "--device",
        "cpu",
        "--dtype",
        "float64",
        "--seed",
        "3",
        "-q",
        "--limit",
        "5",
        "--batch-size",
        "2",
        "--resume",
        "--overwrite",
    ]
    wanted = ["x", "cpu", "float64", 3, True, 5, 2, True, True]
    assert json.loads(run_cli(main, "options", *words).stdout) == wanted


def test_emit_json_is_strict():
    assert json.loads(run_cli(main, "show", "--json").stdout) == {"score": None, "names": ["a", "b"]}


def test_emit_writes_the_result_before_it_prints_it(tmp_path, capsys):
    report = Report(title="R", rows=[{"n": 1}])
    cli.emit(report, True, tmp_path / "page")
    assert (tmp_path / "page" / "report.json").read_text() == capsys.readouterr().out


def test_emit_for_people(capsys):
    cli.emit(Score(0.25, ["a", "b"]), json=False)
    cli.emit([{"method": "x" * 150, "n": 1}], json=False)
    cli.emit("plain [text]", json=False)
    made = Comparison({"loss": {"better": "lower"}}, "plain", [0])
    made.add("plain", "loss", 0, 1.5)
    cli.emit(made, json=False)
    text = capsys.readouterr().out
    assert re.search(r"names\W+a, b", text)
    assert "x" * 150 in text  # not folded to 80 columns in a pipe
    assert "plain [text]\n" in text
    assert "1.500 *" not in text  # one method is no best of anything
    assert "1.500" in text


def test_import_is_light():
    code = "import fusion_core, fusion_core.cli, fusion_core.progress, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "fusion_core.cli" in loaded
    assert not {"torch", "numpy", "jinja2"} & loaded


def test_track_passes_items_and_is_silent_off_a_terminal(capsys):
    assert list(track((i for i in range(3)), "counting")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_track_shows_a_bar_on_stderr_when_asked(capsys):
    assert list(track((i for i in range(3)), "counting [x]", total=3, enabled=True)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "counting [x]" in captured.err
    assert "3/3" in captured.err


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.5", 0.5), (" 1 / 4 ", 0.25), ("1e-3", 1e-3), ("-2", -2.0)]
)
def test_fractions(text, value):
    assert cli.fraction(text) == value


@pytest.mark.parametrize("text", ["", "eight", "1/0", "1/2/3", "nan", "inf", "1/"])
def test_what_is_no_fraction(text):
    with pytest.raises(ConfigError, match="wanted"):
        cli.fraction(text)

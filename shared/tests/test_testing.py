import os
import signal
import sys
import time

import numpy as np
import pytest
from hypothesis import given

from fusion_core.testing import kill_when, run_cli, strategies


@given(strategies.batches(heads=2))
def test_batches_fit_together(batch):
    student, teacher, labels = batch
    assert student.shape == teacher.shape
    assert labels.shape == student.shape[:1]
    assert labels.dtype == np.int64
    assert np.all((labels >= 0) & (labels < student.shape[1]))
    assert np.abs(student).max() <= 30


@given(strategies.probabilities(4, 3))
def test_probabilities_sum_to_one(probs):
    assert probs.shape == (4, 3)
    assert np.all(probs >= 0)
    assert probs.sum(axis=1) == pytest.approx(np.ones(4))


def leave(code):
    def main():
        print(sys.argv[1:])
        print("warned", file=sys.stderr)
        sys.exit(code)

    return main


@pytest.mark.parametrize(("code", "wanted"), [(0, 0), (3, 3), (None, 0), ("broken", 1)])
def test_run_cli_captures_code_and_streams(code, wanted):
    before = sys.argv
    done = run_cli(leave(code), "verb", 1)
    assert done.code == wanted
    assert done.stdout == "['verb', '1']\n"
    assert done.stderr.startswith("warned\n")
    assert sys.argv is before


def test_run_cli_reports_a_crash_as_code_1():
    done = run_cli(lambda: 1 / 0)
    assert done.code == 1
    assert "ZeroDivisionError" in done.stderr


WRITER = "import sys, time, pathlib; pathlib.Path(sys.argv[1]).write_text('x'); time.sleep(60)"


def test_kill_when_kills_once_the_file_is_there(tmp_path):
    code = kill_when([sys.executable, "-c", WRITER, tmp_path / "mark.txt"], tmp_path / "*.txt")
    assert code != 0
    assert (tmp_path / "mark.txt").exists()


def test_kill_when_returns_the_code_of_a_process_that_ended_before(tmp_path):
    assert kill_when([sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "never") == 7


def _write(path, then):
    part = path.with_suffix(".part")  # the file appears with its text, or the kill may come between
    part.write_text(os.environ["WORD"])
    part.replace(path)
    if then:
        raise SystemExit(then)
    time.sleep(60)


def test_kill_when_takes_a_function_and_its_arguments(tmp_path):
    mark, env = tmp_path / "mark.txt", {"WORD": "here"}
    assert kill_when([_write, mark, 0], mark, env=env) == -signal.SIGKILL
    assert mark.read_text() == "here"
    assert "WORD" not in os.environ
    assert kill_when([_write, mark, 7], tmp_path / "never", env=env) == 7


def test_kill_when_gives_up_in_time(tmp_path):
    with pytest.raises(TimeoutError, match="never"):
        kill_when([sys.executable, "-c", WRITER, tmp_path / "x"], tmp_path / "never", timeout=0.3)

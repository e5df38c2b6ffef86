import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fusion_core.testing.plugin import Golden

pytest_plugins = ["pytester"]

SUITE = """
import pytest

@pytest.mark.golden_files("features*.npz", "edges.npz")
def test_file(golden, golden_file):
    assert golden.load(golden_file)["x"].sum() == golden.settings[golden_file]["sum"]

def test_device(device):
    assert device in ("cpu", "cuda", "mps")

def test_threads():
    import os
    assert os.environ["OMP_NUM_THREADS"] == "1"
"""


def record(directory, names):
    directory.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        np.savez(directory / name, x=np.full(3, float(i)))
    (directory / "cases.json").write_text(
        json.dumps({name: {"sum": 3.0 * i} for i, name in enumerate(names)})
    )


@pytest.fixture
def suite(pytester):
    pytester.makepyfile(test_suite=SUITE)
    record(pytester.path / "golden", ["features.npz", "features_b.npz", "edges.npz", "other.npz"])
    return pytester


def run(pytester, *args):
    return pytester.runpytest_inprocess("-p", "fusion_core.testing.plugin", "-p", "no:cacheprovider", *args)


def test_golden_files_parametrise_over_what_matches(suite):
    result = run(suite, "-v", "-k", "test_file")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*test_file?edges.npz?*", "*test_file?features.npz?*"])


def test_golden_option_reads_another_directory(suite):
    record(suite.path / "other", ["features_c.npz"])
    result = run(suite, "-v", "-k", "test_file", "--golden", "other")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*test_file?features_c.npz?*"])


def test_golden_option_without_a_match_is_one_skip_with_the_reason(suite):
    record(suite.path / "empty", [])
    result = run(suite, "-rs", "-k", "test_file", "--golden", "empty")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*no file in *empty matches features?.npz or edges.npz*"])


def test_own_records_are_never_optional(suite):
    for path in (suite.path / "golden").glob("*.npz"):
        path.unlink()
    result = run(suite, "-k", "test_file")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no file in *golden matches*"])


def test_golden_option_must_be_a_directory(suite):
    assert "--golden is nowhere, wanted a directory" in run(suite, "--golden", "nowhere").stdout.str()


def test_device_and_threads(suite):
    run(suite, "-k", "device or threads").assert_outcomes(passed=1 + len(suite_devices()))


def suite_devices():
    return ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


def test_loading_the_plugin_imports_no_torch():
    code = "import fusion_core.testing.plugin, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "fusion_core.testing.plugin" in done.stdout.split()
    assert "torch" not in done.stdout.split()


def test_load_skips_only_in_a_borrowed_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        Golden(tmp_path).load("features.npz")
    with pytest.raises(pytest.skip.Exception, match=r"no features\.npz"):
        Golden(tmp_path, borrowed=True).load("features.npz")


def test_cases_leaves_out_settings_and_prose(tmp_path):
    record(tmp_path, ["b.npz", "a.npz"])
    (tmp_path / "README.md").write_text("")
    (tmp_path / "c.json").write_text("[1]")
    golden = Golden(tmp_path)
    assert golden.cases() == ["a.npz", "b.npz", "c.json"]
    assert golden.load("c.json") == [1]


assert_close = Golden("unused").assert_close


@pytest.mark.parametrize(
    ("actual", "expected", "options"),
    [
        (torch.tensor([1.0, 2.0 + 1e-6]), [1.0, 2.0], {}),
        (torch.tensor([1.0, 2.01], dtype=torch.bfloat16), [1.0, 2.0], {}),
        (np.array([np.nan, 1.0]), [np.nan, 1.0], {}),
        (np.array([1.0 + 1e-6]), [1.0], {"dtype": torch.float32}),
        (np.array([1.5]), [1.0], {"atol": 0.6}),
        (torch.tensor([1, 2]), np.array([1, 2]), {}),
        (2.0, 2.0, {}),
    ],
)
def test_assert_close_passes(actual, expected, options):
    assert_close(actual, expected, **options)


@pytest.mark.parametrize(
    ("actual", "expected", "options", "words"),
    [
        (np.array([1.0 + 1e-6]), [1.0], {"what": "alpha"}, "alpha"),
        (torch.ones(2, 1), np.ones(2), {"what": "c"}, r"c has shape \(2, 1\), recorded is \(2,\)"),
        (np.ones(()), np.ones(3), {}, "shape"),  # no broadcasting
        (torch.tensor([1, 3]), np.array([1, 2]), {"rtol": 9.0}, "Mismatched"),
        (np.array([np.nan]), [1.0], {}, "nan"),
        (np.array([1.0 + 1e-6]), [1.0], {"rtol": 1e-8, "atol": 0.0, "dtype": "float32"}, "Mismatched"),
    ],
)
def test_assert_close_fails(actual, expected, options, words):
    with pytest.raises(AssertionError, match=words):
        assert_close(actual, expected, **options)

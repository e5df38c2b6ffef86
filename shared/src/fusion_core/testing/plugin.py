"""The pytest plugin of the workspace: golden cases, devices, one thread per test process and no model hub."""

from __future__ import annotations

import json
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is first imported, after this
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # likewise; a name on no disk fails at once, without retries

_SETTINGS = "cases.json"
# rtol, atol of a comparison with float64 records, by the dtype that computed.
_TOLERANCES = {
    "float64": (1e-9, 1e-12),
    "float32": (1e-4, 1e-5),
    "float16": (1e-2, 1e-3),
    "bfloat16": (4e-2, 1e-2),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--golden DIR``."""
    group = parser.getgroup("fusion")
    group.addoption("--golden", metavar="DIR", help="read the golden files of DIR instead of tests/golden")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and keep every test process on one thread, so that workers share the cores."""
    config.addinivalue_line("markers", "golden_files(*patterns): run for each golden file that matches")
    if "PYTEST_XDIST_WORKER" in os.environ and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Begin each worker with its own part of the tests, so that fewer make a module's fixtures twice."""
    if config.getoption("dist") != "load":  # the default; whoever asks for another way gets it
        return None
    from xdist.scheduler.worksteal import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill ``device`` with the devices present and ``golden_file`` with the files that match."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _devices())
    if "golden_file" not in metafunc.fixturenames:
        return
    patterns = [p for mark in metafunc.definition.iter_markers("golden_files") for p in mark.args]
    if not patterns:
        raise pytest.UsageError(f"{metafunc.function.__name__} takes golden_file but no golden_files marker")
    golden = _golden(metafunc.config, metafunc.definition.path)
    names = sorted({name for pattern in patterns for name in golden.cases(pattern)})
    if names:
        metafunc.parametrize("golden_file", names)
        return
    reason = f"no file in {golden.directory} matches {' or '.join(patterns)}"
    if not golden.borrowed:  # a package's own records are never optional
        raise pytest.UsageError(reason)
    skipped = pytest.param(None, marks=pytest.mark.skip(reason=reason), id="-".join(patterns))
    metafunc.parametrize("golden_file", [skipped])


def _devices() -> list[str]:
    import torch  # not at load: collecting a suite without tensors stays fast

    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(name for name, there in found.items() if there)]


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden files of ``--golden DIR``, or of ``golden/`` beside the test file."""
    return _golden(request.config, request.path)


def _golden(config: pytest.Config, test_file: Path) -> Golden:
    named = config.getoption("--golden")
    if named is None:
        return Golden(test_file.parent / "golden")
    directory = Path(config.invocation_params.dir, named)
    if not directory.is_dir():
        raise pytest.UsageError(f"--golden is {named}, wanted a directory")
    return Golden(directory, borrowed=True)


class Golden:
    """A directory of recorded cases.

    Args:
        directory: holds ``*.npz`` and ``*.json`` records, and ``cases.json`` with what they do not say.
        borrowed: the directory was named with ``--golden``, so a record that is missing skips its test.

    Example:
        >>> Golden("nowhere").cases("*.npz")
        []
    """

    def __init__(self, directory: str | os.PathLike[str], *, borrowed: bool = False) -> None:
        self.directory = Path(directory)
        self.borrowed = borrowed

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The parsed ``cases.json``."""
        return self.load(_SETTINGS)

    def cases(self, pattern: str = "*") -> list[str]:
        """The sorted names of the records that match a glob pattern (``cases.json`` is none)."""
        found = (path.name for path in self.directory.glob(pattern) if path.suffix in (".npz", ".json"))
        return sorted(name for name in found if name != _SETTINGS)

    def load(self, name: str) -> dict[str, Any]:
        """The arrays of an ``.npz`` file by key, or the parsed object of a ``.json`` file."""
        path = self.directory / name
        if not path.is_file() and self.borrowed:
            pytest.skip(f"no {name} in {self.directory}")
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    def assert_close(
        self,
        actual: Any,
        expected: Any,
        dtype: Any = None,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        what: str = "",
    ) -> None:
        """Fail unless shapes are equal and every number is near the record; NaN equals NaN.

        Args:
            actual: tensor (any device, any dtype), array, number or nested list.
            expected: the record; integers and booleans must be equal.
            dtype: that the numbers were computed in, for the default tolerances; ``actual``'s own by default.
            rtol: relative tolerance instead of the dtype's.
            atol: absolute tolerance instead of the dtype's.
            what: named in the message.

        Raises:
            AssertionError: names the largest differences.
        """
        name = str(dtype if dtype is not None else getattr(actual, "dtype", "float64"))
        name = name.removeprefix("torch.")
        got, wanted = _as_numpy(actual), np.asarray(expected)
        if got.shape != wanted.shape:
            raise AssertionError(f"{what or 'result'} has shape {got.shape}, recorded is {wanted.shape}")
        if wanted.dtype.kind not in "fc":
            np.testing.assert_array_equal(got, wanted, err_msg=what)
            return
        default = _TOLERANCES.get(name, _TOLERANCES["float64"])
        np.testing.assert_allclose(
            got,
            wanted,
            rtol=default[0] if rtol is None else rtol,
            atol=default[1] if atol is None else atol,
            err_msg=what,
        )


def _as_numpy(value: Any) -> NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    return np.asarray(value)

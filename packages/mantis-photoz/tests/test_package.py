"""The package as a whole: light to import, every public name there, no file too long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mantis_photoz
from fusion_core.errors import FusionError, InputError
from mantis_photoz import citations, errors
from mantis_photoz.references import REFERENCES, bibtex

SOURCES = sorted(Path(mantis_photoz.__file__).parent.rglob("*.py"))
HEAVY = (
    "astropy",
    "matplotlib",
    "h5py",
    "scipy",
    "sklearn",
    "timm",
    "transformers",
    "cv2",
    "pyreqwest",
    "pyarrow",
    "qp",
)


def loaded(code):
    probe = f"{code}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_import_is_light():
    # In one process: what one import loads, the next does not take away.
    assert loaded("import mantis_photoz.cli\nfrom mantis_photoz import BinnedPDF, metrics") == []


def test_public_names():
    for name in mantis_photoz.__all__:
        assert getattr(mantis_photoz, name) is not None
    assert set(mantis_photoz.__all__) <= set(dir(mantis_photoz))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mantis_photoz.nothing  # noqa: B018
    assert issubclass(mantis_photoz.CutoutError, InputError)
    assert all(issubclass(getattr(errors, name), FusionError) for name in errors.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


def test_citations():
    assert citations() == ["engel2025mantis", "engel2024preliminary"]
    assert citations(["ps1", "calpit", "ps1", "early"])[2:] == ["chambers2016panstarrs", "dey2022calpit"]
    assert citations({"uses": ["zoobot"]})[-1] == "walmsley2023zoobot"
    text = bibtex(REFERENCES)
    assert text.count("@article{") == len(REFERENCES)
    assert text.count("{") == text.count("}")
    with pytest.raises(InputError, match="wanted a result"):
        citations("ps1")
    with pytest.raises(InputError, match="is no key"):
        bibtex(["nobody"])

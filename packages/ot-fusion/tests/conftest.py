"""The small models of models.py as a fixture."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

_found = spec_from_file_location("ot_fusion_models", Path(__file__).with_name("models.py"))
_models = module_from_spec(_found)
_found.loader.exec_module(_models)


@pytest.fixture(scope="session")
def models():
    return _models


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)

"""Specifications: each shipped one is proved by random legal relabellings; mistakes are found and named."""

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from ot_fusion import SpecError
from ot_fusion.spec.registry import spec_for
from ot_fusion.spec.types import Axis, TensorSpec
from ot_fusion.spec.verify import verify_spec

_found = spec_from_file_location("ot_fusion_models", Path(__file__).with_name("models.py"))
models = module_from_spec(_found)
_found.loader.exec_module(models)


@pytest.mark.parametrize("name", models.NAMES)
def test_every_shipped_spec_keeps_the_outputs(name):
    model = models.make(name)
    limit = 1e-5 if name == "gemma" else 1e-6  # its norms compute in float32 whatever the dtype
    found = verify_spec(model, spec_for(model), models.inputs(name), tolerance=limit)
    assert found.worst <= limit
    assert set(found) == {*spec_for(model).spaces, "all"}

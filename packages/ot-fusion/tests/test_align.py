"""Alignment: relabelled copies are recovered, functions are kept, for every shipped architecture."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from ot_fusion import FusionConfig, align, fuse
from ot_fusion.spec.verify import outputs_of

_found = spec_from_file_location("ot_fusion_models", Path(__file__).with_name("models.py"))
models = module_from_spec(_found)
_found.loader.exec_module(models)

WTS = FusionConfig.git_rebasin()
ACTS = FusionConfig(strategy="consistent", solver="lsa", samples=None)


def outputs(model, name):
    with torch.no_grad():
        return outputs_of(model, models.inputs(name))[0]


@pytest.mark.parametrize("config", [WTS, ACTS], ids=["wts", "acts"])
@pytest.mark.parametrize("name", models.NAMES)
def test_a_relabelled_copy_is_recovered(name, config):
    anchor = models.make(name)
    copy, elements = models.shuffled(anchor)
    assert any((index != torch.arange(len(index))).any() for e in elements.values() for index in e.values())
    found = align(copy, to=anchor, data=models.inputs(name, rows=40), config=config)
    for key, value in anchor.state_dict().items():
        torch.testing.assert_close(
            found.state[key], value, atol=1e-6, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("config", [WTS, ACTS], ids=["wts", "acts"])
@pytest.mark.parametrize("name", models.NAMES)
def test_hard_legal_maps_keep_the_function(name, config):
    source, anchor = models.make(name), models.make(name, seed=1)
    found = align(source, to=anchor, data=models.inputs(name, rows=40), config=config)
    before, after = outputs(source, name), outputs(found.model, name)
    assert float((after - before).abs().max() / before.abs().max()) < (1e-5 if name == "gemma" else 1e-6)
    assert any(not torch.equal(found.state[k], v) for k, v in source.state_dict().items())


@pytest.mark.parametrize("strategy", ["flow", "consistent"])
@pytest.mark.parametrize("features", ["acts", "wts"])
@pytest.mark.parametrize("name", ["mlp", "resnet", "vit", "bert", "gpt2", "llama", "qwen3"])
def test_a_model_fused_with_its_equal_is_itself(name, features, strategy):
    model, twin = models.make(name), models.make(name)
    config = FusionConfig(strategy=strategy, features=features, solver="emd", samples=None, alpha=0.3)
    fused = fuse([twin, model], data=models.inputs(name, rows=40), config=config)
    for key, value in model.state_dict().items():
        assert torch.equal(fused.state[key], value), key

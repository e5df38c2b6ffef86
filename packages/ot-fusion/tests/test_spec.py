"""Specifications: each shipped one is proved by random legal relabellings; mistakes are found and named."""

import json
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from fusion_core.seeding import generator
from ot_fusion import FusionConfig, SpecError, fuse
from ot_fusion.groups import Blocks, Frozen, Full, Heads
from ot_fusion.relabel import axis_parts
from ot_fusion.spec import Axis, TensorSpec, infer_spec, load_spec, save_spec, spec_for, verify_spec

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


def canonical(spec):
    """Axes and groups with spaces named after their first tensor; equal views of equal orders are one."""
    first = {}
    for key in sorted(spec.tensors):
        for axis in spec.tensors[key].axes:
            for part in () if axis is None else axis_parts(axis):
                first.setdefault(part.space, f"{key}:{part.view and 'heads'}")
    views = {"q": "qk", "k": "qk", "v": "vo", "o": "vo", "": "", "qk_norm": "qk_norm"}
    tensors = {
        key: tuple(
            None
            if axis is None
            else tuple((first[p.space], views[p.view], p.inner, p.side) for p in axis_parts(axis))
            for axis in tensor.axes
        )
        for key, tensor in spec.tensors.items()
        if any(axis is not None for axis in tensor.axes)
    }
    return tensors, {first[name]: space.group for name, space in spec.spaces.items()}


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet", "vit", "bert"])
def test_a_traced_spec_equals_the_written_one(name):
    model = models.make(name)
    traced = infer_spec(model, models.inputs(name, 2))
    assert canonical(traced) == canonical(spec_for(model))
    assert set(traced.tensors) | set(traced.copied) | {k for g in traced.tied for k in g} >= set(
        model.state_dict()
    )


@pytest.mark.parametrize("features", ["acts", "wts"])
@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_a_traced_spec_fuses_as_the_written_one(name, features):
    pair = [models.make(name), models.make(name, seed=1)]
    config = FusionConfig(features=features, solver="sinkhorn", last_block_tokens="same")
    data = models.inputs(name, 20)
    written = fuse(pair, data=data, config=config)
    traced = fuse(pair, data=data, config=config, spec=infer_spec(pair[0], models.inputs(name, 2)))
    for key, value in written.state.items():
        torch.testing.assert_close(
            traced.state[key], value, atol=1e-9, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_a_traced_decoder_keeps_its_heads():
    model = models.make("llama-mha")
    spec = infer_spec(model, models.inputs("llama-mha", 2))
    assert verify_spec(model, spec, models.inputs("llama-mha", 2)).worst < 1e-6
    groups = [space.group for space in spec.spaces.values() if isinstance(space.group, Heads)]
    assert [(g.kv, g.ratio, g.qk) for g in groups] == [(4, 1, "frozen")] * 2  # rotary channels stay


class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.second(torch.flip(self.first(x), [1]))


def test_what_cannot_be_derived_is_refused_by_name():
    with pytest.raises(SpecError, match=r"aten\.flip.*cannot be followed: it reads linear"):
        infer_spec(Odd(), torch.zeros(2, 4))
    with pytest.raises(SpecError, match=r"aten\.split.*transformer\.h\.0\.attn"):
        infer_spec(models.make("gpt2"), models.inputs("gpt2", 2))
    with pytest.raises(SpecError, match="cannot be traced"):
        infer_spec(torch.nn.Linear(3, 3), torch.zeros(2, 4))
    with pytest.raises(SpecError, match="no written spec for Odd"):
        spec_for(Odd())


def test_a_typing_error_in_a_spec_is_found_and_named():
    model = models.make("mlp")
    spec = spec_for(model)
    wrong = dict(spec.tensors)
    wrong["2.bias"] = TensorSpec("2.bias", (None,))
    with pytest.raises(SpecError, match="relabelling 2 changes the outputs"):
        verify_spec(model, replace(spec, tensors=wrong), models.inputs("mlp"))
    del wrong["2.bias"]
    with pytest.raises(SpecError, match=r"does not cover 2\.bias"):
        verify_spec(model, replace(spec, tensors=wrong), models.inputs("mlp"))
    wrong["2.bias"] = TensorSpec("2.bias", (Axis("nowhere"),))
    with pytest.raises(SpecError, match="'nowhere', which sequential does not declare"):
        verify_spec(model, replace(spec, tensors=wrong), models.inputs("mlp"))


@pytest.mark.parametrize("name", ["convnet", "gpt2", "qwen3"])
def test_a_spec_survives_its_file(name, tmp_path):
    spec = spec_for(models.make(name))
    save_spec(spec, tmp_path / "spec.json")
    assert load_spec(tmp_path / "spec.json") == spec
    document = json.loads((tmp_path / "spec.json").read_text())
    next(iter(document["tensors"].values()))[0] = []
    (tmp_path / "empty.json").write_text(json.dumps(document))
    with pytest.raises(SpecError, match=r"empty\.json: an axis of a tensor has an empty list"):
        load_spec(tmp_path / "empty.json")
    whole = json.loads((tmp_path / "spec.json").read_text())
    for name, wrong in (("copied", [[]]), ("tied", ["ab"]), ("tied", [[1]]), ("name", 3)):
        (tmp_path / "odd.json").write_text(json.dumps({**whole, name: wrong}))
        with pytest.raises(SpecError, match=rf"odd\.json: {name} has .*, wanted names"):
            load_spec(tmp_path / "odd.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(SpecError, match="holds no specification"):
        load_spec(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Linear(8, 2)), "in 2 groups"),
        (torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.PixelShuffle(2)), "PixelShuffle"),
        (torch.nn.Sequential(torch.nn.ReLU()), "no linear layer"),
        (
            torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(9, 2)),
            "no multiple of the 4",
        ),
    ],
)
def test_stacks_that_the_builder_does_not_describe(module, words):
    with pytest.raises(SpecError, match=words):
        spec_for(module)


def test_groups_know_their_elements():
    draws = generator(0, "groups")
    for group in (
        Full(6),
        Frozen(3),
        Blocks(3, 2),
        Heads(2, 2, 4),
        Heads(2, 3, 4, qk="rotary", norm="head"),
        Heads(3, 1, 4, qk="rotary", rotary=2, norm="all"),
        Heads(2, 1, 3, value_dim=5, heads="frozen"),
    ):
        for _ in range(5):
            element = group.random(draws)
            assert group.contains(element), (group, element)
            assert {view: len(order) for view, order in element.items()} == group.views()
    layer = Heads(2, 1, 4)
    mixed = layer.identity()
    mixed["q"] = torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])
    assert not layer.contains(mixed)
    with pytest.raises(SpecError, match="positive numbers"):
        Heads(0, 1, 4)

import json
import sys
import warnings

import pytest
import torch
from torch import nn

from adaea.models import OFFICIAL_NAMES, load_model, load_models, load_official, short_name
from adaea.wrappers import Normalized, predict
from fusion_core.errors import CheckpointError, ConfigError, InputError, MissingExtraError


class Tiny(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


def test_zoo_models_load_in_eval_mode_and_leave_the_random_numbers_alone():
    before = torch.get_rng_state()
    model = load_model("zoo:res16")
    assert not model.training
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["", "resnet18", "timm:", "keras:x", "http://x", ":x"])
def test_a_name_outside_the_grammar_lists_the_grammar(name):
    with pytest.raises(InputError, match=r"wanted timm:NAME, torchvision:NAME, hf:NAME, file:PATH"):
        load_model(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zoo:nothing", "wanted one of res16"),
        ("zoo:res16?depth=3", "option 'depth', wanted mean, std, size"),
        ("zoo:res16?size=big", "size is 'big'"),
        ("zoo:res16?pretrained=perhaps", "pretrained is 'perhaps'"),
        ("zoo:res16?num_classes=3", "models come as they are"),
        ("zoo:res16?mean=0.5&std=0", "std > 0"),
        ("zoo:res16?mean=0.5,0.5&std=1", "one each per channel"),
        ("py:no_such_module:build", "no module 'no_such_module'"),
        ("py:math:pi", "gave a float"),
    ],
)
def test_bad_names_say_what_is_wrong(name, words):
    with pytest.raises(InputError, match=words):
        load_model(name)


def test_timm_models_take_their_own_normalization_and_size():
    timm = pytest.importorskip("timm")
    model = load_model("timm:resnet18?num_classes=5", pretrained=False)
    config = timm.get_pretrained_cfg("resnet18")
    assert isinstance(model, Normalized)
    assert model.mean.flatten().tolist() == pytest.approx(config.mean)
    assert model.std.flatten().tolist() == pytest.approx(config.std)
    assert model.size == tuple(config.input_size[1:])
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(InputError, match="timm has no model 'resnet1888'"):
        load_model("timm:resnet1888", pretrained=False)


def test_torchvision_models():
    pytest.importorskip("torchvision")
    model = load_model("torchvision:squeezenet1_1?pretrained=false&num_classes=5&size=64")
    assert model.size == (64, 64)
    assert model.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(InputError, match="torchvision has no model 'squeeze'"):
        load_model("torchvision:squeeze", pretrained=False)


def test_hugging_face_folders_take_mean_std_and_size_of_the_processor(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    recipe = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "size": {"height": 16, "width": 16}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**recipe, "do_normalize": True}))
    found = load_model(f"hf:{tmp_path}")
    assert found.size == (16, 16)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = model.eval()((x - 0.4) / 0.2).logits
    torch.testing.assert_close(found(x).logits, wanted)
    assert torch.equal(predict(found, x), wanted.argmax(1))
    with pytest.raises(InputError, match=r"hf:.*nowhere cannot be loaded"):
        load_model(f"hf:{tmp_path}/nowhere")


def test_exported_and_scripted_files(tmp_path):
    model = Tiny().eval()
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), tmp_path / "net.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, x), tmp_path / "net.pt")
    for name in ("net.pt2", "net.pt"):
        found = load_model(f"file:{tmp_path / name}?mean=0.5,0.5,0.5&std=0.5,0.5,0.5")
        torch.testing.assert_close(found(x[:2]), model((x[:2] - 0.5) / 0.5))


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(CheckpointError, match="is not there"):
        load_model(f"file:{tmp_path}/missing.pt2")
    torch.save(Tiny().state_dict(), tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"neither a torch.export nor.*py:module:factory"):
        load_model(f"file:{tmp_path}/state.pt")
    (tmp_path / "cut.pt2").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(CheckpointError, match="neither"):
        load_model(f"file:{tmp_path}/cut.pt2")


def test_python_factories(tmp_path, monkeypatch):
    (tmp_path / "adaea_test_nets.py").write_text(
        "from torch import nn\n\ndef build():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.chdir(tmp_path)
    model = load_model("py:adaea_test_nets:build")
    assert model(torch.ones(1, 3, 4, 4)).tolist() == [[1.0, 1.0, 1.0]]
    assert not model.training
    monkeypatch.delitem(sys.modules, "adaea_test_nets")


def test_several_models_and_their_names():
    found = load_models("zoo:vit8,mine=zoo:vit8?mean=0,0,0&std=1,1,1,zoo:res16")
    assert list(found) == ["vit8", "mine", "res16"]
    assert found["mine"].std.flatten().tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(InputError, match="two models are called 'vit8'"):
        load_models(["zoo:vit8", "zoo:vit8"])
    with pytest.raises(InputError, match="no model is named"):
        load_models(" , ")
    assert short_name("py:nets:build") == "build"
    assert short_name("hf:google/vit-base") == "vit-base"


def test_the_official_checkpoints(tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet18", num_classes=10).state_dict()
    (tmp_path / "resnet18").mkdir()
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "resnet18/resnet18.pth.tar"
    )
    found = load_official(tmp_path, "cifar10")
    assert list(found) == ["resnet18"]
    torch.testing.assert_close(found["resnet18"].model.state_dict()["fc.weight"], state["fc.weight"])
    assert found["resnet18"].size == (224, 224)
    assert found["resnet18"].mean.tolist() == [[[[0.0]]]]
    with pytest.raises(CheckpointError, match="does not fit"):
        load_official(tmp_path, "cifar100")
    with pytest.raises(InputError, match="wanted 'cifar10' or 'cifar100'"):
        load_official(tmp_path, "imagenet")
    with pytest.raises(InputError, match="names has 'vgg'"):
        load_official(tmp_path, "cifar10", names=["vgg"])
    with pytest.raises(CheckpointError, match=r"holds no .pth.tar file"):
        load_official(tmp_path, "cifar10", names=["vit_t"])
    with pytest.raises(InputError, match="holds no folder"):
        load_official(tmp_path / "resnet18", "cifar10")


def test_the_official_names_are_all_known_to_timm():
    timm = pytest.importorskip("timm")
    assert len(OFFICIAL_NAMES) == 18
    assert [name for name in OFFICIAL_NAMES.values() if not timm.is_model(name)] == []


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [
        ("timm", "timm:resnet18", "zoo"),
        ("transformers", "hf:x", "zoo"),
        ("torchvision", "torchvision:resnet18", "vision"),
    ],
)
def test_a_missing_extra_is_named(module, name, extra, monkeypatch):
    for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [_Absent(module), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=rf'{module}.*pip install "adaea\[{extra}\]"'):
        load_model(name)


class _Absent:
    def __init__(self, name):
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        torch.tensor([1, 0]),
        torch.tensor([1, 0], dtype=torch.uint8).numpy(),
        {"logits": torch.tensor([[0.0, 1.0], [1.0, 0.0]])},
        (torch.tensor([[0.0, 1.0], [1.0, 0.0]]), None),
        [1, 0],
        torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16),
    ],
)
def test_predict_takes_what_models_return(output):
    assert predict(lambda x: output, torch.zeros(2, 3, 4, 4)).tolist() == [1, 0]


@pytest.mark.parametrize(
    "output", [torch.zeros(2), torch.zeros(3, 2), torch.zeros(2, 2, 2), torch.zeros(3).long()]
)
def test_predict_refuses_the_rest(output):
    with pytest.raises(InputError, match=r"wanted logits \(2, classes\) or integer labels \(2,\)"):
        predict(lambda x: output, torch.zeros(2, 3, 4, 4))


def test_the_model_without_normalization_stays_itself():
    assert type(load_model("zoo:vit8")).__name__ == "Transformer"
    with pytest.raises(ConfigError, match=r"std is '0\.2;0\.3'"):
        load_model("zoo:vit8?std=0.2;0.3")

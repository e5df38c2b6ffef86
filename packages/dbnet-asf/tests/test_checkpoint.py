"""The authors' files: names, inference of the architecture, refusals; ImageNet weights."""

from __future__ import annotations

import pytest
import torch

from dbnet_asf import DBConfig, DBNet, load_official
from dbnet_asf.checkpoint import from_official, load_imagenet
from fusion_core.checkpoint import save_tensors
from fusion_core.errors import CheckpointError
from fusion_core.testing import fill_state_dict

pytestmark = pytest.mark.filterwarnings("ignore::fusion_core.errors.FusionWarning")
CASES = [
    {},
    {"attention": None},
    {"attention": "scale_spatial"},
    {"attention": "scale_channel"},
    {"dcn": True},
    {"serial": True},
    {"smooth": True},
    {"backbone": "resnet34"},
    {"backbone": "resnet50", "dcn": True, "dcn_offset": "official"},
]


def config_of(**settings):
    return DBConfig.official("resnet18", dcn=False).replace(inner=32, **settings)


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(map(str, s.values())) or "asf")
def test_architecture_is_inferred(settings, official_state):
    config = config_of(**settings)
    net = from_official(official_state(config, "model.module."))
    assert net.config == config
    assert not net.training


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.module.", "module.model.module."])
def test_prefixes(prefix, official_state, tmp_path):
    state = official_state(config_of(), prefix)
    state["criterion.bce_loss.weight"] = torch.zeros(1)
    path = tmp_path / "totaltext_resnet18"  # the authors' files have no suffix
    torch.save(state, path)
    net = load_official(path)
    wanted = from_official(official_state(config_of()))
    x = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(net(x).prob, wanted(x).prob)


def test_old_pickles_of_tensors_load(official_state, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(official_state(config_of()), path, _use_new_zipfile_serialization=False)
    assert load_official(path).config == config_of()


def test_offset_rule_is_set_by_itself(official_state):
    config = config_of(backbone="resnet50", dcn=True)
    state = official_state(config)
    assert from_official(state).config.dcn_offset == "official"
    assert from_official(state, dcn_offset="strided").config.dcn_offset == "strided"
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        one, two = from_official(state)(x).prob, from_official(state, dcn_offset="strided")(x).prob
    assert (one - two).abs().max() > 1e-6  # it is another network


def test_saved_again_it_keeps_its_rule(official_state, tmp_path):
    config = config_of(backbone="resnet50", dcn=True, dcn_offset="official")
    net = from_official(official_state(config)).float()
    net.save_pretrained(tmp_path / "converted")
    assert DBNet.from_pretrained(tmp_path / "converted").config == net.config


def test_inference_checkpoint_without_threshold_head(official_state):
    state = {k: v for k, v in official_state(config_of()).items() if ".thresh." not in k}
    assert "thresh" not in from_official(state).head


def test_refusals(official_state, tmp_path):
    state = official_state(config_of())
    missing = {k: v for k, v in state.items() if k != "decoder.in3.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing: neck.lateral.1.weight"):
        from_official(missing)
    with pytest.raises(CheckpointError, match=r"1 extra: decoder.more"):
        from_official({**state, "decoder.more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"of another shape: neck\.smooth\.0\.weight"):
        from_official({**state, "decoder.out2.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no network of DBNet's authors: \(0, 0, 0, 0\)"):
        from_official({"a.weight": torch.zeros(1)})
    path = tmp_path / "objects.pth"
    torch.save({"state": DBNet(DBConfig.nano())}, path)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_official(path)
    path.write_bytes(b"\x80\x02cut")
    with pytest.raises(CheckpointError, match=r"objects\.pth"):
        load_official(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_official(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_large"])
def test_imagenet_weights(backbone, tmp_path):
    import torchvision.models

    made = getattr(torchvision.models, backbone.replace("mobilenetv3", "mobilenet_v3"))()
    fill_state_dict(made)
    torch.save(made.state_dict(), tmp_path / "imagenet.pth")
    dcn = backbone == "resnet18"
    net = DBNet(DBConfig(backbone=backbone, dcn=dcn, inner=32))
    load_imagenet(net, tmp_path / "imagenet.pth")
    name = "layer2.0.conv2.weight" if dcn else "features.3.block.0.0.weight"
    assert torch.equal(net.backbone.state_dict()[name], made.state_dict()[name])
    with pytest.raises(CheckpointError, match="does not fit"):
        load_imagenet(DBNet(DBConfig.nano()), tmp_path / "imagenet.pth")


def test_a_network_that_lacks_weights_names_their_file(tmp_path):
    net = DBNet(config_of())
    net.save_pretrained(tmp_path / "net")
    state = dict(net.state_dict())
    state.pop("backbone.layer2.0.bn1.num_batches_tracked")
    save_tensors(tmp_path / "net" / "model.safetensors", state)
    with pytest.raises(CheckpointError, match=r"net/model\.safetensors: state does not fit DBNet; 1 missing"):
        DBNet.from_pretrained(tmp_path / "net")

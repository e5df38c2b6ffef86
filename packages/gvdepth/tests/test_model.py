"""The network: shapes, cameras, cues, precision, checkpoints."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fusion_core.checkpoint import load_tensors, save_tensors
from fusion_core.errors import CheckpointError, ConfigError, ShapeError
from gvdepth import GVDepth, GVDepthConfig
from gvdepth.data import RIGS
from gvdepth.modeling import load_model
from gvdepth.modeling_blocks import CueHeads
from gvdepth.modeling_encoder import architecture
from gvdepth.modeling_head import cue_depths, fuse_cues
from gvdepth.train_checkpoints import MODELS

CUES = ("fusion", "focal", "vertical", "direct")
CAMERAS = torch.stack([RIGS["A"][0].tensor(), RIGS["E"][0].rotate(roll_deg=4).tensor()])


def model(seed=0, **settings):
    torch.manual_seed(seed)
    return GVDepth(GVDepthConfig.tiny(encoder_widths=(8, 8, 16), **settings)).eval()


def images(batch=2, height=48, width=120, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cue", CUES)
@pytest.mark.parametrize("size", [(48, 120), (49, 67), (32, 33)])
def test_shapes_and_ranges(cue, size, device):
    net = model(cue=cue).to(device)
    with torch.no_grad():
        found = net(images(2, *size).to(device), CAMERAS.to(device))
    for name in ("depth", "uncertainty", "depth_focal", "depth_vertical", "weight_focal"):
        value = getattr(found, name)
        assert value.shape == (2, 1, *size)
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
    assert (found.depth > 0).all()
    assert (found.uncertainty > 0).all()
    assert found.loss is None
    weight = {"fusion": None, "focal": 1.0, "direct": 1.0, "vertical": 0.0}[cue]
    if weight is not None:
        assert (found.weight_focal == weight).all()
        torch.testing.assert_close(found.depth, found.depth_focal)
        torch.testing.assert_close(found.depth, found.depth_vertical)


def test_a_batch_is_its_images():
    net = model()
    x = images()
    with torch.no_grad():
        both = net(x, CAMERAS).depth
        for i in range(2):
            torch.testing.assert_close(net(x[i : i + 1], CAMERAS[i : i + 1]).depth, both[i : i + 1])


@pytest.mark.parametrize("form", ["offset", "row", "bounded"])
def test_the_camera_reaches_the_depth(form):
    """Invariant 14: the same numbers of the network mean another depth for another camera."""
    raw = torch.randn(1, 2, 2, 24, 60, generator=torch.Generator().manual_seed(0))
    config = GVDepthConfig.tiny(vertical_param=form)
    one, two = (cue_depths(raw, CAMERAS[i : i + 1], 48, config) for i in (0, 1))
    assert (one.vertical / two.vertical - 1).abs().mean() > 0.02
    assert (one.focal / two.focal - 1).abs().mean() > 0.1
    direct = GVDepthConfig.tiny(cue="direct")
    single = raw[:, :1]
    first, second = (cue_depths(single, CAMERAS[i : i + 1], 48, direct) for i in (0, 1))
    torch.testing.assert_close(first.focal, second.focal, rtol=0, atol=0)


def test_direct_sees_no_camera_unless_it_is_embedded():
    x = images(1)
    with torch.no_grad():
        net = model(cue="direct")
        torch.testing.assert_close(net(x, CAMERAS[:1]).depth, net(x, CAMERAS[1:]).depth, rtol=0, atol=0)
        net = model(cue="direct", embedding=True)
        assert (net(x, CAMERAS[:1]).depth - net(x, CAMERAS[1:]).depth).abs().max() > 1e-4
        net = model(cue="fusion", embedding=False)
        assert net(x, CAMERAS[:1]).depth.shape == (1, 1, 48, 120)


def test_grouped_heads_never_mix_the_cues():
    torch.manual_seed(0)
    heads = CueHeads(6, (4, 8), 2)
    found = heads(torch.randn(1, 6, 16, 24))
    assert found.shape == (1, 2, 2, 16, 24)
    found[:, 0].sum().backward()
    for name, parameter in heads.named_parameters():
        half = parameter.shape[0] // 2
        assert parameter.grad[half:].abs().max() == 0, name
        assert parameter.grad[:half].abs().max() > 0, name


def test_grouped_heads_are_two_networks():
    torch.manual_seed(0)
    both = CueHeads(6, (4, 8), 2).double()
    for cue in (0, 1):
        alone = CueHeads(6, (4, 8), 1).double()
        state = {k: v[cue * len(v) // 2 : (cue + 1) * len(v) // 2] for k, v in both.state_dict().items()}
        alone.load_state_dict(state)
        x = torch.randn(2, 6, 16, 24, dtype=torch.float64)
        torch.testing.assert_close(alone(x)[:, 0], both(x)[:, cue])


def test_half_precision_trunk_keeps_the_geometry_in_float32(device):
    net = model().to(device)
    x, camera = images().to(device), CAMERAS.to(device)
    with torch.no_grad():
        plain = net(x, camera)
        with torch.autocast(device.type if hasattr(device, "type") else device, dtype=torch.bfloat16):
            mixed = net(x, camera)
        whole = net.bfloat16()(x.bfloat16(), camera)
    for found in (mixed, whole):
        assert found.depth.dtype == torch.float32
        assert torch.isfinite(found.depth).all()
        assert (found.depth / plain.depth - 1).abs().median() < 0.05


def test_loss_is_that_of_the_equations_and_its_gradient_is_finite():
    from gvdepth.losses import depth_loss

    net = model().train()
    labels = torch.rand(2, 48, 120) * 100
    found = net(images(), CAMERAS, labels)
    pairs = (
        (found.depth_focal, found.log_uncertainty_focal),
        (found.depth_vertical, found.log_uncertainty_vertical),
    )
    torch.testing.assert_close(found.loss, depth_loss(found.depth, labels[:, None], cues=pairs).total)
    found.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    net.zero_grad()
    empty = net(images(), CAMERAS, torch.zeros(2, 48, 120))
    assert empty.loss == 0
    empty.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in net.parameters())


@pytest.mark.parametrize("cue", CUES)
def test_no_finite_input_gives_a_gradient_that_is_not(cue):
    net = model(cue=cue).train()
    x = torch.cat([torch.zeros(1, 3, 48, 120), torch.full((1, 3, 48, 120), 1e4)])
    net(x, CAMERAS, torch.full((2, 48, 120), 1e-3)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_calibration_errors_take_trust_from_the_vertical_cue():
    net, x = model(), images()
    with torch.no_grad():
        plain = net(x, CAMERAS)
        same = net(x, CAMERAS, calib_std=torch.zeros(2, 2))
        less = net(x, CAMERAS, calib_std=torch.tensor([[0.1, 0.5]] * 2))
    torch.testing.assert_close(same.depth, plain.depth)
    assert (less.weight_focal >= plain.weight_focal - 1e-6).all()
    assert (less.weight_focal - plain.weight_focal).max() > 0.05
    assert (less.log_uncertainty_vertical >= plain.log_uncertainty_vertical - 1e-6).all()
    torch.testing.assert_close(less.log_uncertainty_focal, plain.log_uncertainty_focal)


def test_the_head_compiles_as_one_graph():
    config, raw = GVDepthConfig.tiny(), torch.randn(2, 2, 2, 24, 60)

    def head(numbers, camera):
        fused = fuse_cues(cue_depths(numbers, camera, 48, config), config)
        return fused.depth, fused.total

    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(raw, CAMERAS), head(raw, CAMERAS))


@pytest.mark.slow
def test_the_network_compiles_as_one_graph():
    net = model()
    whole = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(whole(images(), CAMERAS).depth, net(images(), CAMERAS).depth)


def test_bad_shapes():
    net = model()
    with pytest.raises(ShapeError, match=r"pixel_values has shape \(2, 1, 48, 120\), wanted"):
        net(torch.rand(2, 1, 48, 120), CAMERAS)
    with pytest.raises(ShapeError, match=r"camera has shape \(2, 6\)"):
        net(images(), CAMERAS[:, :6])
    with pytest.raises(ShapeError, match="labels"):
        net(images(), CAMERAS, torch.rand(2, 24, 60))
    with pytest.raises(ShapeError, match="8x120 pixels, wanted at least 16x16"):
        net(images(2, 8, 120), CAMERAS)


def test_checkpoints_come_back(tmp_path):
    net = model(vertical_param="row", cue="vertical")
    net.save_pretrained(tmp_path / "m")
    again = GVDepth.from_pretrained(tmp_path / "m")
    assert again.config == net.config
    assert not again.training
    with torch.no_grad():
        torch.testing.assert_close(
            again(images(), CAMERAS).depth, net(images(), CAMERAS).depth, rtol=0, atol=0
        )
    other = GVDepth.from_pretrained(tmp_path / "m", config=net.config.replace(fusion="variance"))
    assert other.config.fusion == "variance"
    assert "gvdepth" in (tmp_path / "m" / "README.md").read_text()


def test_checkpoints_of_another_parametrization_are_refused(tmp_path):
    net = model()
    net.save_pretrained(tmp_path)
    for changes in (
        {"vertical_param": "row"},
        {"extend": 0.25},
        {"f_c": 500.0},
        {"encoder_widths": (8, 16, 16)},
    ):
        with pytest.raises(CheckpointError, match=f"made with {next(iter(changes))}="):
            GVDepth.from_pretrained(tmp_path, config=net.config.replace(**changes))
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**text, "f_c": 300.0}))
    with pytest.raises(CheckpointError, match=r"trained with f_c=75\.0, config\.json says 300\.0"):
        GVDepth.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**text, "f_d": 300.0}))
    with pytest.raises(CheckpointError, match="unknown setting 'f_d'"):
        GVDepth.from_pretrained(tmp_path)


def test_broken_checkpoints_are_refused(tmp_path):
    net = model()
    net.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cut off"):
        GVDepth.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    save_tensors(weights, load_tensors(weights))  # without the settings
    with pytest.raises(CheckpointError, match="holds no settings of a gvdepth model"):
        GVDepth.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        GVDepth.from_pretrained(tmp_path.parent)
    with pytest.raises(CheckpointError, match="is neither a folder"):
        load_model("not a model/at all/")


def test_shipped_models_load_and_say_what_they_are():
    for name, settings in MODELS.items():
        net = load_model(f"tiny-{name}")
        assert net.config.cue == settings["cue"]
        assert net.config.input_height == 48
    assert load_model("tiny").config.cue == "fusion"


def test_config_refuses():
    for settings, words in (
        ({"f_c": 0.0}, "f_c is 0.0"),
        ({"max_depth": math.nan}, "max_depth is nan"),
        ({"focal_range": (3.0, 2.0)}, "two rising lengths"),
        ({"correction": 2}, "correction is 2"),
        ({"head_widths": ()}, "head_widths is"),
        ({"input_height": 3}, "input_height is 3"),
        ({"image_std": (0.0, 1.0, 1.0)}, "image_std"),
        ({"decoder_widths": (8,)}, "wanted 2 widths"),
    ):
        with pytest.raises(ConfigError, match=words):
            model(**settings)
    with pytest.raises(ConfigError, match="did you mean vertical_param"):
        GVDepthConfig.from_dict({"vertical_para": "row"})
    with pytest.raises(ConfigError, match="vertical_param"):
        GVDepthConfig.from_dict({"vertical_param": "rows"})
    assert GVDepthConfig.from_dict(GVDepthConfig.tiny().to_dict()) == GVDepthConfig.tiny()


def test_known_architectures():
    assert architecture("facebook/convnext-large-384-22k-1k")["hidden_sizes"][-1] == 1536
    assert architecture("facebook/dinov2-base")["patch_size"] == 14
    assert architecture("somebody/unknown") is None


SMALL_BACKBONES = {
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "resnet": {
        "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "embedding_size": 8, "layer_type": "basic",
    },
    "dinov2": {
        "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14,
        "image_size": 56,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL_BACKBONES)
def test_backbones_of_transformers(kind, tmp_path):
    config = GVDepthConfig(
        encoder=kind, encoder_config={"model_type": kind, **SMALL_BACKBONES[kind]},
        decoder_widths=(8, 8, 8, 8), head_widths=(8,),
    )  # fmt: skip
    net = GVDepth(config).eval()
    with torch.no_grad():
        found = net(images(2, 70, 90), CAMERAS)
        assert found.depth.shape == (2, 1, 70, 90)
        net.save_pretrained(tmp_path)
        again = GVDepth.from_pretrained(tmp_path)  # asks no hub
        torch.testing.assert_close(again(images(2, 70, 90), CAMERAS).depth, found.depth, rtol=0, atol=0)
    groups = net.parameter_groups(1e-3, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert groups[1]["lr"] == pytest.approx(1e-4)
    with pytest.raises(ShapeError, match="at least 64x64"):
        net(images(2, 48, 90), CAMERAS)


@pytest.mark.slow
def test_unknown_backbones_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="wanted 'tiny', a folder with a backbone"):
        GVDepth(GVDepthConfig(encoder=str(tmp_path)))
    with pytest.raises(ConfigError, match="is a bert, wanted one of"):
        GVDepth(GVDepthConfig(encoder="x", encoder_config={"model_type": "bert"}))

"""The network: shapes, deformable rules, attention, the fused form, saving; invariants 12 to 14."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from dbnet_asf import DBConfig, DBNet
from dbnet_asf.model.asf import AdaptiveScaleFusion, FoldedFusion, PlainFusion
from dbnet_asf.model.backbone import ResNet, build_backbone
from dbnet_asf.model.deform import DeformConv2d
from dbnet_asf.model.head import Head, ShuffledDouble
from fusion_core.errors import CheckpointError, ConfigError, FusionWarning, InputError, ShapeError
from fusion_core.testing import fill_state_dict

TINY = DBConfig(backbone="nano", channels=(8, 8, 16, 16), blocks=(1, 1, 1, 1), stem=8, inner=32)
KINDS = ("scale_channel_spatial", "scale_spatial", "scale_channel")


def filled(config=TINY, dtype=torch.float64):
    net = DBNet(config).to(dtype)
    fill_state_dict(net)
    return net


def picture(batch=2, height=64, width=96, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("resnet34", [64, 128, 256, 512]),
        ("resnet50", [256, 512, 1024, 2048]),
        ("resnet101", [256, 512, 1024, 2048]),
        ("mobilenetv3_large", [24, 40, 112, 960]),
        ("nano", [24, 48, 96, 160]),
        ("timm:test_resnet.r160_in1k", [32, 48, 192, 96]),
    ],
)
def test_backbones(backbone, channels):
    body = build_backbone(DBConfig(backbone=backbone)).eval()
    with torch.no_grad():
        maps = body(torch.zeros(1, 3, 64, 96))
    assert [m.shape[1] for m in maps] == channels == list(body.channels)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_resnet_has_torchvisions_names():
    from torchvision.models import resnet18, resnet50

    for name, make in (("resnet18", resnet18), ("resnet50", resnet50)):
        with torch.device("meta"):
            theirs = {k: v.shape for k, v in make().state_dict().items() if not k.startswith("fc.")}
            ours = {k: v.shape for k, v in ResNet(name).state_dict().items()}
        assert ours == theirs


def test_parameter_counts():
    with torch.device("meta"):
        net = DBNet()
        count = lambda part: sum(p.numel() for p in part.parameters())
        assert count(net.neck.asf) == 149_834
        assert count(net.head["thresh"]) == 164_417
        for name, number in (("resnet18", 11_612_130), ("resnet50", 24_379_295)):
            assert count(ResNet(name, "strided")) == number


def plain_deform(x, offset, mask, weight, stride):
    """Modulated deformable convolution written out: bilinear samples, zero outside."""
    batch, channels, height, width = x.shape
    rows, columns = offset.shape[-2:]
    out = torch.zeros(batch, weight.shape[0], rows, columns, dtype=x.dtype)
    for n in range(batch):
        for i in range(rows):
            for j in range(columns):
                column = torch.zeros(channels, 9, dtype=x.dtype)
                for tap in range(9):
                    y = i * stride - 1 + tap // 3 + offset[n, 2 * tap, i, j]
                    z = j * stride - 1 + tap % 3 + offset[n, 2 * tap + 1, i, j]
                    low_y, low_z = int(y.floor()), int(z.floor())
                    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        r, c = low_y + a, low_z + b
                        if 0 <= r < height and 0 <= c < width:
                            share = (1 - (y - r).abs()) * (1 - (z - c).abs())
                            column[:, tap] += share * mask[n, tap, i, j] * x[n, :, r, c]
                out[n, :, i, j] = torch.einsum("oct,ct->o", weight.flatten(2), column)
    return out


@pytest.mark.parametrize("rule", ["strided", "official"])
@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_convolution(rule, stride):
    layer = DeformConv2d(3, 4, stride, rule).double()
    nn.init.normal_(layer.offset.weight, std=0.3)
    nn.init.normal_(layer.offset.bias, std=0.5)
    x = picture(2, 6, 7)
    raw = layer.offset(x)
    rows, columns = 6 // stride, (7 - 1) // stride + 1
    offset, mask = raw[:, :18], raw[:, 18:].sigmoid()
    if rule == "official" and stride == 2:
        assert raw.shape[2:] == (6, 7)
        offset = offset.flatten(1)[:, : 18 * rows * columns].view(2, 18, rows, columns)
        mask = mask.flatten(1)[:, : 9 * rows * columns].view(2, 9, rows, columns)
    wanted = plain_deform(x, offset, mask, layer.weight, stride)
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-12)


def test_deformable_rules_agree_without_stride_and_start_as_half_a_convolution(device):
    x = picture(1, 8, 8, torch.float32, device)
    one, two = DeformConv2d(3, 5, 1).to(device), DeformConv2d(3, 5, 1, "official").to(device)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x), two(x))
    torch.testing.assert_close(
        one(x), nn.functional.conv2d(x, one.weight / 2, padding=1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["scale_channel_spatial", "scale_spatial"])
def test_rewritten_attention_equals_the_published_form(kind):
    module = AdaptiveScaleFusion(32, kind).double()
    fill_state_dict(module)
    x = picture(2, 6, 10)[:, :1].repeat(1, 32, 1, 1) * torch.randn(2, 32, 1, 1, dtype=torch.float64)
    s = module.conv(x)
    g = s
    if kind == "scale_channel_spatial":
        g = module.gate(s.mean((-2, -1), keepdim=True)) + s
    g = module.place(g.mean(1, keepdim=True)) + g
    torch.testing.assert_close(module.weights(x), torch.sigmoid(module.level(g)), rtol=0, atol=1e-14)
    levels = x.chunk(4, 1)
    for other in (FoldedFusion(module), PlainFusion(module)):
        for a, b in zip(module(levels), other.double()(levels), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_gradients(kind):
    module = AdaptiveScaleFusion(16, kind).double().eval()
    fill_state_dict(module)
    levels = [picture(1, 3, 4, seed=i)[:, :1].repeat(1, 4, 1, 1).requires_grad_() for i in range(4)]
    assert torch.autograd.gradcheck(lambda *x: module(x)[0], levels)
    weights = module(levels)[1]
    assert ((weights > 0) & (weights < 1)).all()
    if kind == "scale_channel":
        torch.testing.assert_close(weights.sum(1), torch.ones(1, 1, 1, dtype=torch.float64))


def test_transposed_convolution_is_a_pixel_shuffle():
    layer = nn.ConvTranspose2d(6, 5, 2, stride=2).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), ShuffledDouble(layer)(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("smooth", [False, True])
def test_heads_quadruple_the_size(smooth):
    assert Head(16, 8, smooth=smooth)(torch.zeros(1, 16, 5, 6)).shape == (1, 1, 20, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"serial": True}, {"smooth": True}, {"attention": None}])
def test_output(settings, dtype, device):
    net = filled(TINY.replace(**settings), dtype).to(device).train()
    out = net(picture(dtype=dtype, device=device))
    for found in (out.prob, out.thresh, out.binary):
        assert found.shape == (2, 1, 64, 96)
        assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(out.prob, torch.sigmoid(out.prob_logit))
    torch.testing.assert_close(out.binary, torch.sigmoid(50 * (out.prob - out.thresh)))
    assert (out.attention is None) == (net.config.attention is None)
    out.binary.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    quiet = net.eval()(picture(dtype=dtype, device=device))
    assert quiet.thresh is None
    assert quiet.binary is None


OTHERS = [*({"attention": kind} for kind in (*KINDS[1:], None)), {"smooth": True}]


@pytest.mark.parametrize("settings", [{}, *OTHERS])
def test_fused_equals_eager(settings):
    net = filled(TINY.replace(**settings)).eval()
    fused, x = net.fuse(), picture()
    with torch.no_grad():
        torch.testing.assert_close(net(x).prob, fused(x).prob, rtol=0, atol=1e-10)
    assert "thresh" in net.head  # the original can still train
    with pytest.raises(ConfigError, match="no threshold head and cannot train"):
        fused.train()(x)
    single = net.float().fuse()
    with torch.no_grad():
        torch.testing.assert_close(net(x.float()).prob, single(x.float()).prob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"smooth": True}])
def test_a_start_at_few_text_pixels(settings):
    torch.manual_seed(0)
    net, x = DBNet(TINY.replace(**settings)).eval(), picture(dtype=torch.float32)
    with torch.no_grad():
        before = net(x)
        assert net.start_at(0.05) is net
        after = net(x)
    assert float(before.prob.mean()) > 0.2
    assert float(after.prob_logit.mean()) == pytest.approx(math.log(0.05 / 0.95), abs=0.5)
    assert float(after.prob_logit.std()) < 0.2 * float(before.prob_logit.std())
    for wrong in (0.0, 1.0):
        with pytest.raises(ConfigError, match="prior"):
            net.start_at(wrong)


def test_fused_resnet_equals_eager():
    net = filled(DBConfig(backbone="resnet18"), torch.float32).eval()
    x = picture(1, 64, 64, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(net(x).prob, net.fuse()(x).prob, rtol=0, atol=1e-4)


def test_bfloat16_is_near(device):
    net = filled(dtype=torch.float32).to(device).eval()
    x = picture(dtype=torch.float32, device=device)
    with torch.no_grad():
        half = net.fuse("bfloat16")(x)
        assert half.prob.dtype == torch.float32
        torch.testing.assert_close(net(x).prob, half.prob, rtol=0, atol=0.1)
        assert net.fuse("auto")(x).prob.shape == half.prob.shape


def test_batch_equals_each_alone():
    net, x = filled(dtype=torch.float32).eval(), picture(3, dtype=torch.float32)
    with torch.no_grad():
        together = net(x).prob
        alone = torch.cat([net(one[None]).prob for one in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_save_and_load(tmp_path):
    net, x = filled(dtype=torch.float32).eval(), picture(dtype=torch.float32)
    net.save_pretrained(tmp_path / "net")
    again = DBNet.from_pretrained(tmp_path / "net")
    assert again.config == net.config
    assert not again.training
    with torch.no_grad():
        assert torch.equal(net(x).prob, again(x).prob)
    with pytest.raises(InputError, match="not empty"):
        net.save_pretrained(tmp_path / "net")


def test_load_refuses(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no directory, no shipped checkpoint \(.*\) and no 'owner/name'"
    ):
        DBNet.from_pretrained("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config.json and no model.safetensors"):
        DBNet.from_pretrained(tmp_path / "empty")
    filled(dtype=torch.float32).save_pretrained(tmp_path / "net")
    TINY.replace(inner=64).save(tmp_path / "net" / "config.json")
    with pytest.raises(CheckpointError, match="of another shape"):
        DBNet.from_pretrained(tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError):
        DBNet.from_pretrained(tmp_path / "net")


def test_bad_input_gets_a_sentence():
    net = filled(dtype=torch.float32).eval()
    with pytest.raises(ShapeError, match=r"images has shape \(1, 3, 60, 64\), wanted .* multiples of 32"):
        net(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ShapeError, match="images has shape"):
        net(torch.zeros(1, 1, 64, 64))
    for bad, words in (
        ({"inner": 40}, "inner is 40, wanted a multiple of 16 from 16"),
        ({"backbone": "vgg"}, r"backbone is 'vgg', wanted one of"),
        ({"backbone": "nano", "dcn": True}, "deformable convolutions need a ResNet"),
        ({"k": 0.0}, "k is 0"),
        ({"attention": "all"}, "attention is 'all'"),
    ):
        with pytest.raises(ConfigError, match=words):
            DBConfig(**bad)
    with pytest.raises(ConfigError, match="cannot be made"):
        build_backbone(DBConfig(backbone="timm:no_such_net"))


def test_deformable_net_warns_on_the_cpu():
    net = DBNet(DBConfig(backbone="resnet18", dcn=True, inner=16)).eval()
    with pytest.warns(FusionWarning, match="'resnet18' and 'nano'"), torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))


@pytest.mark.slow
def test_import_is_light():
    heavy = ("torchvision", "matplotlib", "sklearn", "transformers", "timm")
    code = (
        "import sys, dbnet_asf; dbnet_asf.DBNet; dbnet_asf.TextDetector; dbnet_asf.DBLoss;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

"""ONNX files: onnxruntime, both engines of OpenCV, the settings inside, refusals."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dbnet_asf import DBConfig, DBNet, PostConfig, export_onnx
from dbnet_asf.export import detector_parameters
from fusion_core.errors import InputError
from fusion_core.onnx import onnx_difference, read_metadata
from fusion_core.testing import fill_state_dict

TINY = DBConfig(backbone="nano", channels=(8, 8, 16, 16), blocks=(1, 1, 1, 1), stem=8, inner=32)


class Plane(nn.Module):
    def __init__(self, net, plane):
        super().__init__()
        self.net, self.plane = net, plane

    def forward(self, x):
        return self.net(x).prob[0, 0] if self.plane else self.net(x).prob


def filled(**settings):
    net = DBNet(TINY.replace(**settings)).eval()
    fill_state_dict(net)
    return net


@pytest.mark.slow
def test_onnxruntime(tmp_path):
    net = filled()
    path = export_onnx(net, tmp_path / "net.onnx")
    for shape in ((1, 3, 64, 96), (3, 3, 96, 32)):
        assert onnx_difference(path, Plane(net, False), [torch.randn(shape)]) < 1e-4
    facts = read_metadata(path)
    assert DBConfig.from_dict(facts["config"]) == net.config
    assert facts["multiple"] == 32
    assert net.training is False
    assert "thresh" in net.head


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scale_channel_spatial", "scale_channel"])
def test_both_engines_of_opencv(kind, tmp_path):
    net = filled(attention=kind)
    path = export_onnx(net, tmp_path / "net.onnx", opencv=True)
    for engine in (cv2.dnn.ENGINE_NEW, cv2.dnn.ENGINE_CLASSIC):
        model = cv2.dnn.readNetFromONNX(str(path), engine)
        for shape in ((1, 3, 64, 96), (1, 3, 96, 64)):
            x = torch.randn(shape)
            model.setInput(x.numpy())
            with torch.no_grad():
                wanted = net(x).prob[0, 0].numpy()
            np.testing.assert_allclose(model.forward(), wanted, atol=1e-4)


@pytest.mark.slow
def test_opencv_text_detector(tmp_path):
    """A network whose map is the picture's darkness: OpenCV's detector finds the bars that were drawn."""
    net = DBNet(TINY.replace(attention=None, mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)))
    path = export_onnx(Dark(net.config), tmp_path / "net.onnx", opencv=True)
    image = np.full((128, 192, 3), 255, np.uint8)
    boxes = [((60, 40), (60, 16)), ((120, 90), (80, 20))]
    for (x, y), (w, h) in boxes:
        cv2.rectangle(image, (x - w // 2, y - h // 2), (x + w // 2, y + h // 2), (0, 0, 0), -1)
    detector = cv2.dnn.TextDetectionModel_DB(cv2.dnn.readNet(str(path)))
    settings = detector_parameters(net)
    for name in ("setBinaryThreshold", "setPolygonThreshold", "setUnclipRatio", "setMaxCandidates"):
        getattr(detector, name)(settings[name])
    given = settings["setInputParams"]
    detector.setInputParams(given["scale"], (192, 128), given["mean"], given["swapRB"], given["crop"])
    quads, scores = detector.detect(image)
    assert len(quads) == 2
    assert min(scores) > 0.6
    found = sorted(np.asarray(q, float).mean(0).tolist() for q in quads)
    np.testing.assert_allclose(found, sorted([list(center) for center, _ in boxes]), atol=3)


class Dark(DBNet):
    """Writes 1 - gray into the map through the ordinary layers' places."""

    def __init__(self, config):
        super().__init__(config)
        self.backbone, self.neck = nn.Identity(), Pair()
        self.head = nn.ModuleDict({"prob": Darkness()})


class Pair(nn.Module):
    asf = None

    def forward(self, x):
        return x, None


class Darkness(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 1, 1)
        with torch.no_grad():
            self.weight.copy_(torch.tensor([-20.0, 0, 0]).view(1, 3, 1, 1))
            self.bias.fill_(10.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fusion_core.errors.FusionWarning")
def test_deformable_runs_in_onnxruntime(tmp_path):
    net = DBNet(DBConfig(backbone="resnet18", dcn=True, inner=16)).eval()
    fill_state_dict(net)
    path = export_onnx(net, tmp_path / "net.onnx", dynamic=False, size=(64, 64))
    assert onnx_difference(path, Plane(net, False), [torch.randn(1, 3, 64, 64)]) < 1e-4


@pytest.mark.filterwarnings("ignore::fusion_core.errors.FusionWarning")
def test_refusals(tmp_path):
    net = DBNet(DBConfig(backbone="resnet18", dcn=True, inner=16)).eval()
    with pytest.raises(InputError, match=r"no deformable convolutions.*'resnet18', 'resnet50', 'nano'"):
        export_onnx(net, tmp_path / "net.onnx", opencv=True)
    with pytest.raises(InputError, match=r"size is \(60, 64\), wanted multiples of 32"):
        export_onnx(net, tmp_path / "net.onnx", size=(60, 64))
    nn.init.ones_(net.backbone.layer2[0].conv2.offset.bias)
    with pytest.raises(InputError, match="the offsets are not all zero"):
        export_onnx(net, tmp_path / "net.onnx", opencv=True, drop_deform=True)
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.filterwarnings("ignore::fusion_core.errors.FusionWarning")
def test_zero_offsets_can_be_dropped():
    from dbnet_asf.export import _undeformed

    net = DBNet(DBConfig(backbone="resnet18", dcn=True, inner=16)).eval()
    made = _undeformed(net)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(x).prob, made(x).prob, rtol=0, atol=1e-5)
    assert made.config.dcn is False
    assert net.config.dcn is True


def test_detector_parameters():
    net = DBNet(TINY.replace(post=PostConfig(mode="polygon").to_dict(), color="bgr"))
    found = detector_parameters(net)
    assert found["setUnclipRatio"] == 2.0
    assert found["setInputParams"]["swapRB"] is False

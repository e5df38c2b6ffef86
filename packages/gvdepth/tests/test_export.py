"""Invariant 15: one graph, the camera an input, equal to torch at two sizes and with two cameras."""

from __future__ import annotations

import json

import pytest
import torch

from fusion_core.errors import FusionError
from fusion_core.onnx import read_metadata
from gvdepth import GVDepth, GVDepthConfig, export
from gvdepth.export import Graph, difference, example, export_onnx


def model():
    torch.manual_seed(0)
    return GVDepth(GVDepthConfig.tiny(encoder_widths=(8, 8), decoder_widths=(8,), head_widths=(4,))).eval()


@pytest.mark.slow
def test_the_exported_graph_is_the_model(tmp_path):
    net = model()
    found = export_onnx(net, tmp_path / "m.onnx")
    assert found.log_depth_difference < 1e-3
    # Other sizes, odd ones too, and a batch with its own cameras.
    assert difference(found.path, net, [(33, 47), (64, 96)]) < 1e-3
    import onnxruntime

    session = onnxruntime.InferenceSession(str(found.path))
    one, two = example(net, 40, 56), example(net, 40, 56, other=True)
    both = [torch.cat(pair) for pair in zip(one, two, strict=True)]
    theirs = session.run(None, {"pixel_values": both[0].numpy(), "camera": both[1].numpy()})
    with torch.no_grad():
        for mine, other in zip(Graph(net)(*both), theirs, strict=True):
            torch.testing.assert_close(mine, torch.from_numpy(other), rtol=1e-3, atol=1e-4)
    stored = read_metadata(found.path)
    assert GVDepthConfig.from_dict(stored["gvdepth"]) == net.config
    assert json.dumps(stored["inputs"]) == '["pixel_values", "camera"]'


def test_a_graph_that_differs_is_not_left(tmp_path, monkeypatch):
    net, path = model(), tmp_path / "m.onnx"
    monkeypatch.setattr(export, "core_export", lambda *args, **kw: path.write_bytes(b"x"))
    monkeypatch.setattr(export, "difference", lambda *args: 0.5)
    with pytest.raises(FusionError, match=r"differ by 5\.00e-01 in log depth"):
        export_onnx(net, path)
    assert not path.exists()

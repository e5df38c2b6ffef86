import pytest
import torch
from torch import nn

from fusion_core.errors import CheckpointError, FusionError, InputError
from fusion_core.onnx import export_onnx, onnx_difference, read_metadata

NAMES = {"input_names": ["image"], "output_names": ["map"]}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 1)).eval()


@pytest.mark.slow
def test_export_equals_the_module_at_other_sizes_and_carries_its_settings(tmp_path):
    module, path = net(), tmp_path / "net.onnx"
    dynamic = {"image": {0: "batch", 2: "height", 3: "width"}}
    export_onnx(
        module, [torch.rand(2, 3, 8, 8)], path, dynamic=dynamic, metadata={"mean": [0.5], "k": 50}, **NAMES
    )
    assert onnx_difference(path, module, [torch.rand(1, 3, 12, 20)]) < 1e-5
    assert read_metadata(path) == {"mean": [0.5], "k": 50}
    with torch.no_grad():
        module[2].bias += 1
    assert onnx_difference(path, module, [torch.rand(1, 3, 12, 20)]) == pytest.approx(1, abs=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_what_cannot_be_exported_is_refused(tmp_path):
    args = [torch.rand(1, 3, 8, 8)]
    with pytest.raises(InputError, match="training mode"):
        export_onnx(net().train(), args, tmp_path / "a.onnx", **NAMES)
    with pytest.raises(InputError, match="2 names for 1 args"):
        export_onnx(net(), args, tmp_path / "a.onnx", input_names=["a", "b"], output_names=["c"])
    with pytest.raises(InputError, match=r"dynamic names \['x'\]"):
        export_onnx(net(), args, tmp_path / "a.onnx", dynamic={"x": {0: "n"}}, **NAMES)
    with pytest.raises(InputError, match="metadata takes what JSON can say"):
        export_onnx(net(), args, tmp_path / "a.onnx", metadata={"a": object()}, **NAMES)
    with pytest.raises(FusionError, match="cannot be exported"):
        export_onnx(Branch().eval(), args, tmp_path / "a.onnx", **NAMES)
    assert not list(tmp_path.iterdir())


def test_settings_of_other_files_are_refused(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"no\.onnx"):
        read_metadata(tmp_path / "no.onnx")

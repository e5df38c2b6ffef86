"""The package as a whole: names, what an import costs, the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import gvdepth
from fusion_core.errors import ConfigError
from gvdepth import Camera, ground_depth
from gvdepth.bench import ROWS, indexed_metrics, meshgrid_depth, run


def test_every_public_name_is_there():
    for name in gvdepth.__all__:
        assert getattr(gvdepth, name) is not None, name
    assert callable(gvdepth.metrics)  # no submodule hides a function
    assert callable(gvdepth.calibrate)
    assert set(gvdepth.__all__) <= set(dir(gvdepth))
    with pytest.raises(AttributeError, match="PitchTracker"):
        _ = gvdepth.PitchTracker  # a later feature


def test_the_geometry_is_light():
    """Geometry, metrics, calibration and evaluation import neither a network library nor a picture one."""
    code = (
        "import sys, gvdepth; gvdepth.ground_depth, gvdepth.fuse, gvdepth.silog_loss, gvdepth.metrics\n"
        "gvdepth.calibrate, gvdepth.doctor, gvdepth.evaluate, gvdepth.Camera\n"
        "heavy = 'transformers torchvision matplotlib cv2 sklearn scipy pandas yaml accelerate PIL '\n"
        "heavy += 'huggingface_hub'\n"
        "print([name for name in heavy.split() if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_references_of_the_benchmark_are_right():
    camera = Camera(fx=90.0, fy=95.0, cx=30.0, cy=12.0, width=60, height=40, camera_height=1.5, roll_deg=2.0)
    ours, theirs = ground_depth(camera), meshgrid_depth(camera, "cpu")
    near = theirs < 50
    torch.testing.assert_close(ours[near], theirs[near], rtol=1e-4, atol=0)
    made = torch.Generator().manual_seed(0)
    prediction, target = (
        torch.rand(9, 9, generator=made, dtype=torch.float64).numpy() * 60 + 1 for _ in range(2)
    )
    expected, found = indexed_metrics(prediction, target), gvdepth.metrics(prediction, target)
    assert found == pytest.approx(expected | {"valid": 81}, rel=1e-9)


@pytest.mark.slow
def test_the_benchmark_measures_what_it_says(tmp_path):
    found = run(repeats=2, only=("ground", "metrics"))
    rows = {row.name: row for row in found.rows}
    assert list(rows) == [
        "ground map",
        "ground map, rolled",
        "ground map, another camera each time",
        "eleven metrics",
    ]
    assert rows["ground map"].target == ">= 500"
    assert rows["eleven metrics"].target == ">= 5"
    assert rows["ground map"].ratio > 10
    assert rows["eleven metrics"].ratio > 1
    found.save(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["schema"] == "fusion.bench/1"


def test_the_benchmark_refuses_unknown_rows():
    with pytest.raises(ConfigError, match=r"only is \['sun'\], wanted words of ground map, metrics"):
        run(only=("sun",))
    assert {"ground map", "metrics"} <= set(ROWS)

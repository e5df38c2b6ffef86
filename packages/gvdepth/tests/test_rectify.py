"""Lens distortion taken out on load."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fusion_core.errors import ConfigError, MissingExtraError, ShapeError
from gvdepth import CalibrationError
from gvdepth.rectify import read_rectifier, rectifier

cv2 = pytest.importorskip("cv2")

MATRIX = np.array([[200.0, 0, 159.5], [0, 205.0, 99.5], [0, 0, 1]])
LENSES = {
    "pinhole": np.array([-0.2, 0.05, 0.001, -0.001, 0.0]),
    "fisheye": np.array([0.05, -0.01, 0.002, 0.0]),
}


def distorted(points, lens):
    """Where 3-D points fall in the raw image."""
    zero, model = np.zeros(3), cv2.fisheye if lens == "fisheye" else cv2
    project = lambda p: model.projectPoints(p.reshape(-1, 1, 3), zero, zero, MATRIX, LENSES[lens])
    return project(points)[0].reshape(-1, 2)


@pytest.mark.parametrize("lens", LENSES)
def test_points_fall_where_the_pinhole_camera_says(lens):
    made = rectifier(MATRIX, LENSES[lens], 320, 200, lens=lens, camera_height=1.2, pitch_deg=-1.0)
    assert (made.camera.size, made.camera.camera_height, made.camera.pitch_deg) == ((200, 320), 1.2, -1.0)
    for u, v in ((60, 50), (160, 100), (250, 150)):
        ray = np.linalg.inv(made.camera.matrix) @ [u, v, 1.0]
        raw = distorted(np.array([ray]), lens)[0]
        np.testing.assert_allclose([made.columns[v, u], made.rows[v, u]], raw, atol=1e-2)
    draw = np.random.default_rng(0)
    smooth = cv2.GaussianBlur(draw.uniform(0, 255, (200, 320, 3)).astype(np.float32), (0, 0), 5)
    image = made(smooth)
    assert image.shape == (200, 320, 3)
    expected = cv2.remap(smooth, made.columns, made.rows, cv2.INTER_LINEAR)
    np.testing.assert_array_equal(image, expected)
    assert made(smooth[..., 0]).shape == (200, 320)
    wider = rectifier(MATRIX, LENSES[lens], 320, 200, lens=lens, balance=1.0).camera
    assert wider.fx != made.camera.fx


def test_a_lens_without_distortion_changes_nothing():
    made = rectifier(MATRIX, np.zeros(5), 320, 200)
    image = np.random.default_rng(0).integers(0, 255, (200, 320, 3), dtype=np.uint8)
    assert np.abs(made(image).astype(int) - image).mean() < 3
    assert made.camera.fx == pytest.approx(200.0, rel=0.01)


def test_files(tmp_path):
    entry = lambda values, rows: {"rows": rows, "cols": len(values) // rows, "data": list(values)}
    path = tmp_path / "front.yaml"
    path.write_text(
        "image_width: 320\nimage_height: 200\ndistortion_model: equidistant\n"
        f"camera_matrix: {{rows: 3, cols: 3, data: {MATRIX.ravel().tolist()}}}\n"
        f"distortion_coefficients: {{rows: 1, cols: 4, data: {LENSES['fisheye'].tolist()}}}\n"
    )
    wanted = rectifier(MATRIX, LENSES["fisheye"], 320, 200, lens="fisheye")
    np.testing.assert_array_equal(read_rectifier(path).columns, wanted.columns)
    other = tmp_path / "front.json"
    document = {"K": entry(MATRIX.ravel(), 3), "D": entry(LENSES["pinhole"], 1), "image_width": 320}
    other.write_text(json.dumps(document | {"image_height": 200}))
    found = read_rectifier(other, camera_height=2.0)
    assert found.camera.camera_height == 2.0
    for broken, words in (
        (document, "has no image_width and image_height"),
        ({"K": document["K"]}, "has no distortion coefficients"),
        ({"D": document["D"]}, "has no matrix"),
        ([], "holds a list"),
    ):
        other.write_text(json.dumps(broken))
        with pytest.raises(CalibrationError, match=words):
            read_rectifier(other)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lens": "wide"}, CalibrationError, "lens is 'wide', wanted 'pinhole' or 'fisheye'"),
        ({"lens": "fisheye"}, CalibrationError, "wanted 4 numbers for lens 'fisheye'"),
        ({"balance": 2.0}, ConfigError, r"balance is 2.0, wanted a number in \[0, 1\]"),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        rectifier(MATRIX, LENSES["pinhole"], 320, 200, **options)


def test_another_size_and_a_missing_library_are_told(monkeypatch):
    import sys

    made = rectifier(MATRIX, LENSES["pinhole"], 320, 200)
    with pytest.raises(ShapeError, match="image is 160x100, the lens was calibrated at 320x200"):
        made(np.zeros((100, 160, 3), dtype=np.uint8))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r'pip install "gvdepth\[cv\]"'):
        rectifier(MATRIX, LENSES["pinhole"], 320, 200)

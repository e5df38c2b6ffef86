"""Prediction: every kind of input, folders with threads, and the files."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fusion_core.errors import FusionWarning, InputError, NonFiniteError
from fusion_core.images import save_png
from fusion_core.store import Manifest
from gvdepth import Camera, CameraError, DepthOutput, GeometryError, GVDepth, GVDepthConfig
from gvdepth.data import RIGS, Simulated, read_depth
from gvdepth.geometry import height_above_road
from gvdepth.modeling import load_model
from gvdepth.outputs import FORMATS
from gvdepth.predict import predict_folder
from gvdepth.processing import prepare
from gvdepth.viz import color_depth, colorize, draw_ground, magma_r, sheet

CAMERA = RIGS["D"][0]
FRAMES = Simulated("D", 3, seed=1)


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-fusion")


@pytest.fixture(scope="module")
def image():
    return FRAMES[0].image


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        save_png(tmp_path / "in" / "day" / f"{index}.png", FRAMES[index].image)
    return tmp_path / "in"


def test_every_kind_of_image_gives_the_same(model, image, tmp_path):
    path = save_png(tmp_path / "street.png", image)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    rgba = np.dstack([image, np.full(image.shape[:2], 9, np.uint8)])
    kinds = [path, str(path), path.read_bytes(), Image.open(path), image, tensor, tensor.float() / 255, rgba]
    first = model.predict(image, CAMERA)
    assert isinstance(first, DepthOutput)
    assert first.depth.shape == (48, 120)
    assert first.depth.dtype == torch.float32
    for kind in kinds:
        torch.testing.assert_close(model.predict(kind, CAMERA).depth, first.depth, rtol=0, atol=0)
    assert model.predict(path, CAMERA).id == "street"
    deep = image.astype(np.uint16) * 257
    torch.testing.assert_close(model.predict(deep, CAMERA).depth, first.depth)
    gray = model.predict(image[..., 0], CAMERA)
    assert gray.depth.shape == (48, 120)


@pytest.fixture
def plain_convolutions():
    """PyTorch's own; oneDNN takes other kernels for other batch sizes, which round otherwise."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def test_lists_mix_sizes_and_cameras(model, image, plain_convolutions):
    large = np.repeat(np.repeat(image, 2, 0), 2, 1)
    other = CAMERA.replace(pitch_deg=-3, roll_deg=2)
    found = model.predict([image, large, image], [CAMERA, CAMERA.resize(240, 96), other], batch_size=2)
    assert [tuple(one.depth.shape) for one in found] == [(48, 120), (96, 240), (48, 120)]
    torch.testing.assert_close(found[0].depth, model.predict(image, CAMERA).depth, rtol=0, atol=0)
    torch.testing.assert_close(found[2].depth, model.predict(image, other).depth, rtol=0, atol=0)
    assert (found[0].depth - found[2].depth).abs().max() > 0.1
    batch = torch.from_numpy(np.stack([image, image])).permute(0, 3, 1, 2)
    assert len(model.predict(batch, CAMERA)) == 2


def test_a_resized_image_is_the_same_street(model, image):
    """The camera follows the image, so metres stay."""
    large = np.asarray(Image.fromarray(image).resize((360, 144), Image.Resampling.BICUBIC))
    small, big = model.predict(image, CAMERA).depth, model.predict(large, CAMERA.resize(360, 144)).depth
    assert big.shape == (144, 360)
    assert (big[1::3, 1::3] / small - 1).abs().median() < 0.05


def test_maps_belong_together(model, image):
    found = model.predict(image, CAMERA)
    above = height_above_road(found.depth, CAMERA)
    torch.testing.assert_close(found.height_above_road, above)
    free = model.predict(image, CAMERA, clip=False)
    mixed = torch.lerp(free.depth_vertical, free.depth_focal, free.weight_focal)
    assert (mixed / free.depth - 1).abs().median() < 0.02  # fused before the maps were enlarged
    torch.testing.assert_close(found.depth, free.depth.clamp(1e-3, 80))
    assert (found.uncertainty > 0).all()
    assert found.depth.min() >= 1e-3
    assert found.depth.max() <= 80
    tele = CAMERA.replace(fx=900, fy=900)
    assert model.predict(image, tele, clip=False).depth_focal.max() > 80
    assert model.predict(image, tele).depth_focal.max() == 80
    assert found.obstacles().dtype == torch.bool
    assert "float32 (48, 120)" in repr(found)


def test_shipped_model_knows_the_road(model):
    truth = FRAMES.frame(0)
    found = model.predict(truth.image, CAMERA)
    error = np.abs(found.depth.numpy() / np.where(truth.depth > 0, truth.depth, 1) - 1)
    road = truth.ground & (truth.depth < 30)
    assert np.median(error[road]) < 0.15
    assert np.abs(found.height_above_road.numpy()[road]).mean() < 0.3


def test_rules_and_calibration_errors(model, image):
    focal = model.predict(image, CAMERA, fusion="focal")
    torch.testing.assert_close(focal.depth, focal.depth_focal)
    vertical = model.predict(image, CAMERA, fusion="vertical")
    torch.testing.assert_close(vertical.depth, vertical.depth_vertical)
    plain, unsure = model.predict(image, CAMERA), model.predict(image, CAMERA, calib_std=(0.1, 1.0))
    assert unsure.weight_focal.mean() > plain.weight_focal.mean() + 0.05
    with pytest.raises(InputError, match=r"calib_std is \(-1, 0\)"):
        model.predict(image, CAMERA, calib_std=(-1, 0))


def test_half_precision(model, image):
    plain, half = model.predict(image, CAMERA), model.predict(image, CAMERA, dtype="bfloat16")
    assert half.depth.dtype == torch.float32
    assert (half.depth / plain.depth - 1).abs().median() < 0.05


def test_above_the_horizon(image):
    sky = CAMERA.replace(pitch_deg=30)
    torch.manual_seed(0)
    vertical = GVDepth(GVDepthConfig.tiny(cue="vertical", encoder_widths=(8, 8)))
    with pytest.raises(GeometryError, match="lies above the horizon"):
        vertical.predict(image, sky)
    fusion = GVDepth(GVDepthConfig.tiny(encoder_widths=(8, 8))).train()
    with pytest.warns(FusionWarning, match="above the horizon"):
        found = fusion.predict(image, sky)
    assert (found.weight_focal == 1).all()
    assert fusion.training  # as it was found


def test_bad_input(model, image):
    with pytest.raises(CameraError, match="another aspect"):
        model.predict(image[:40], CAMERA)
    with pytest.raises(CameraError, match="camera_height is not known"):
        model.predict(image, CAMERA.computed(camera_height=None))
    with pytest.raises(InputError, match="2 images and 1 cameras"):
        model.predict([image, image], [CAMERA])
    with pytest.raises(InputError, match=r"camera is a dict, wanted gvdepth\.Camera"):
        model.predict(image, {"fx": 1})
    with pytest.raises(InputError, match="cameras has a int"):
        model.predict([image], [3])
    with pytest.raises(InputError, match="is not there"):
        model.predict("nowhere.png", CAMERA)
    with pytest.raises(NonFiniteError, match="NaN"):
        model.predict(torch.full((3, 48, 120), torch.nan), CAMERA)
    with pytest.raises(InputError, match="batch_size is 0"):
        model.predict(image, CAMERA, batch_size=0)
    assert prepare(image, CAMERA, height=24).network_camera.size == (24, 60)


def test_files(model, image, tmp_path):
    found = model.predict(image, CAMERA)
    paths = found.save(tmp_path, formats=FORMATS, name="x")
    assert {path.name for path in paths} == {
        "x.depth.npy", "x.depth.png", "x.color.png", "x.ply", "x.uncertainty.npy", "x.height.npy",
    }  # fmt: skip
    depth = found.depth.numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "x.depth.npy"), depth)
    np.testing.assert_allclose(read_depth(tmp_path / "x.depth.png"), depth, atol=1 / 500)
    assert np.asarray(Image.open(tmp_path / "x.color.png")).shape == (48, 120, 3)
    found.save(tmp_path / "all.npz")
    assert np.load(tmp_path / "all.npz")["depth"].shape == (48, 120)
    with pytest.raises(InputError, match=r"formats is \['exr'\]"):
        found.save(tmp_path, formats=["exr"])


def test_points(model, image, tmp_path):
    found = model.predict(image, CAMERA)
    points = found.point_cloud(max_depth=20).double()
    assert points.shape[1] == 6
    assert points[:, 2].max() <= 20
    u = points[:, 0] / points[:, 2] * CAMERA.fx + CAMERA.cx
    v = points[:, 1] / points[:, 2] * CAMERA.fy + CAMERA.cy
    row, column = v.round().long(), u.round().long()
    torch.testing.assert_close(found.depth[row, column].double(), points[:, 2])
    assert (torch.from_numpy(image)[row, column].double() == points[:, 3:]).all()
    found.save(tmp_path, formats=["ply"], name="x", max_depth=20)
    head, _, body = (tmp_path / "x.ply").read_bytes().partition(b"end_header\n")
    assert f"element vertex {len(points)}".encode() in head
    assert len(body) == len(points) * (3 * 4 + 3 + 4)
    first = struct.unpack("<fffBBBf", body[:19])
    np.testing.assert_allclose(first[:6], points[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_folder(model, folder, tmp_path, workers):
    found = predict_folder(
        model, folder, CAMERA, tmp_path / "out", formats=("npy", "color"), num_workers=workers, batch_size=2
    )
    assert (found.done, found.skipped, found.failures) == (3, 0, {})
    for index in range(3):
        depth = np.load(tmp_path / "out" / "day" / f"{index}.depth.npy")
        np.testing.assert_allclose(depth, model.predict(FRAMES[index].image, CAMERA).depth, rtol=1e-5)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_images_are_listed_in_their_order(model, folder, tmp_path, monkeypatch):
    save, finished = DepthOutput.save, []

    def slow_first(self, *places, **options):
        time.sleep(0.5 if self.id == "day/0" else 0)
        finished.append(self.id)
        return save(self, *places, **options)

    monkeypatch.setattr(DepthOutput, "save", slow_first)
    predict_folder(model, folder, CAMERA, tmp_path / "out", num_workers=2, batch_size=3)
    assert finished[-1] == "day/0"
    assert list(Manifest(tmp_path / "out" / "manifest.jsonl").entries) == ["day/0", "day/1", "day/2"]


def test_folder_resumes_and_goes_on_after_broken_files(model, folder, tmp_path):
    (folder / "day" / "1.png").write_bytes(b"no image")
    out = tmp_path / "out"
    found = predict_folder(model, folder, CAMERA, out)
    assert found.done == 2
    assert "day/1" in found.failures
    assert "no image that can be read" in found.failures["day/1"]
    with pytest.raises(InputError, match="holds a run"):
        predict_folder(model, folder, CAMERA, out)
    stamp = (out / "day" / "0.depth.npy").stat().st_mtime_ns
    save_png(folder / "day" / "1.png", FRAMES[1].image)
    again = predict_folder(model, folder, CAMERA, out, resume=True)
    assert (again.done, again.skipped, again.failures) == (1, 2, {})
    assert (out / "day" / "0.depth.npy").stat().st_mtime_ns == stamp
    anew = predict_folder(model, folder, CAMERA, out, overwrite=True)
    assert anew.done == 3


def test_shards_share_the_work(model, folder, tmp_path):
    counts = [predict_folder(model, folder, CAMERA, tmp_path / "out", shard=f"{i}/2").done for i in (0, 1)]
    assert counts == [2, 1]
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 3
    assert predict_folder(model, folder, CAMERA, tmp_path / "one", limit=1).done == 1
    with pytest.raises(InputError, match="shard is '2/2'"):
        predict_folder(model, folder, CAMERA, tmp_path / "x", shard="2/2")


def test_folder_with_a_camera_of_another_size_fails_image_by_image(model, folder, tmp_path):
    save_png(folder / "day" / "1.png", FRAMES[1].image[:30])
    found = predict_folder(model, folder, lambda path: CAMERA, tmp_path / "out")
    assert found.done == 2
    assert "another aspect" in found.failures["day/1"]


def test_two_images_with_one_name(model, folder, tmp_path):
    Image.fromarray(FRAMES[0].image).save(folder / "day" / "0.jpg")
    with pytest.raises(InputError, match="would both be written as day/0"):
        predict_folder(model, folder, CAMERA, tmp_path / "out")


def test_pictures():
    from matplotlib import colormaps

    table = colormaps["magma_r"](np.arange(256))[:, :3] * 255
    assert np.abs(magma_r() - table).max() <= 0.5 + 1e-9
    depth = np.array([[0.0, 4.0, 80.0, np.inf, 8.0]])
    found = color_depth(depth, min_depth=4.0)
    assert (found[0, 0] == 128).all()
    assert (found[0, 3] == 128).all()
    assert (found[0, 1] == magma_r()[255]).all()
    assert (found[0, 2] == magma_r()[0]).all()
    np.testing.assert_array_equal(
        colorize(np.array([[0.0, 1.0]]), 1.0, 0.0), colorize(np.array([[1.0, 0.0]]), 0.0, 1.0)
    )
    camera = Camera(fx=100, fy=100, cx=99.5, cy=40, width=200, height=80, camera_height=1.5, roll_deg=4)
    picture = draw_ground(camera)
    assert picture.shape == (80, 200, 3)
    blue = (picture == (30, 120, 255)).all(-1)
    assert abs(np.nonzero(blue[:, 0])[0].min() - (40 + np.tan(np.deg2rad(4)) * 99.5)) <= 1.5
    tiles = [[np.zeros((4, 6, 3), np.uint8)] * 2] * 3
    assert sheet(tiles, ["a", "b"], ["x", "y", "z"]).shape[2] == 3

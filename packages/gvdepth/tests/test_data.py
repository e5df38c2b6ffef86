"""Readers on small made files, and augmentation held against the camera."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.errors import ConfigError, DataError, InputError, ShapeError
from fusion_core.images import save_png
from fusion_core.seeding import rng
from gvdepth import Camera, ground_depth
from gvdepth.augment import (
    augment,
    color_jitter,
    draw_size,
    draw_view,
    resize_depth,
    resize_image,
    turn,
    view_camera,
)
from gvdepth.config import AugmentConfig
from gvdepth.data import KITTI, RIGS, Folder, Sample, Simulated, Subset, open_data, read_depth, write_depth
from gvdepth.data.base import make_sample
from gvdepth.errors import CameraError

CAMERA = Camera(
    fx=60, fy=62, cx=49.0, cy=18.0, width=100, height=40, camera_height=1.5, pitch_deg=-1, roll_deg=2
)
DATE, DRIVE = "2011_09_26", "2011_09_26_drive_0001_sync"


def picture(height=40, width=100, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def kitti(tmp_path):
    """Two frames in KITTI's own layout."""
    root = tmp_path / "kitti"
    matrix = " ".join(map(str, [7.2e1, 0, 5e1, 4.4, 0, 7.2e1, 1.8e1, 0.2, 0, 0, 1, 0.003]))
    lines = ["calib_time: 09-Jan-2012 13:57:47"]
    for side in (2, 3):
        lines += [f"S_rect_0{side}: 100 40", f"P_rect_0{side}: {matrix}"]
    (root / DATE).mkdir(parents=True)
    (root / DATE / "calib_cam_to_cam.txt").write_text("\n".join(lines) + "\n")
    for frame in (3, 7):
        save_png(root / DATE / DRIVE / "image_02" / "data" / f"{frame:010d}.png", picture(seed=frame))
        depth = np.full((40, 100), float(frame))
        depth[:10] = 0
        write_depth(root / "train" / DRIVE / "proj_depth/groundtruth/image_02" / f"{frame:010d}.png", depth)
    return root


def test_kitti(kitti):
    found = KITTI(kitti)
    assert len(found) == 2
    sample = found[1]
    assert sample.id == f"{DATE}/{DRIVE}/0000000007_2"
    np.testing.assert_array_equal(sample.image, picture(seed=7))
    assert (sample.depth[10:] == 7).all()
    assert (~sample.valid[:10]).all()
    assert (sample.camera.fx, sample.camera.cy) == (72.0, 18.0)
    assert (sample.camera.camera_height, sample.camera.pitch_deg) == (1.659, -0.664)


def test_kitti_split(kitti, tmp_path):
    split = tmp_path / "split.txt"
    split.write_text(f"{DATE}/{DRIVE} 0000000007 l\n\n{DATE}/{DRIVE} 3 l\n")
    found = KITTI(kitti, split=split)
    assert [found[i].id[-12:] for i in range(2)] == ["0000000007_2", "0000000003_2"]
    assert len(open_data(f"kitti:{kitti}", split=str(split), limit=1)) == 1
    split.write_text(f"{DATE}/{DRIVE} 0000000007 l\n{DATE} 7 l\n")
    with pytest.raises(
        InputError, match=r"split\.txt, line 2: '2011_09_26 7 l', wanted DATE/DRIVE FRAME SIDE"
    ):
        KITTI(kitti, split=split)
    for frame in ("8", "8" * 300):
        split.write_text(f"{DATE}/{DRIVE} {frame} l\n")
        with pytest.raises(InputError, match="line 1: the image of"):
            KITTI(kitti, split=split)
    with pytest.raises(InputError, match="cannot be read"):
        KITTI(kitti, split=tmp_path / "none.txt")


def test_kitti_refuses(tmp_path, kitti):
    calibration = kitti / DATE / "calib_cam_to_cam.txt"
    calibration.write_text(calibration.read_text().replace("P_rect_02: 72.0", "P_rect_02: -72.0"))
    with pytest.raises(CameraError, match=r"calib_cam_to_cam\.txt: fx is -72"):
        KITTI(kitti)[0]
    with pytest.raises(InputError, match="is no folder"):
        KITTI(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no frame"):
        KITTI(tmp_path / "kitti" / DATE)


def test_folder(tmp_path):
    CAMERA.save(tmp_path / "camera.json")
    for name, suffix in (("b/1", "npy"), ("a", "png")):
        save_png(tmp_path / "images" / f"{name}.png", picture())
        write_depth(tmp_path / "depth" / f"{name}.{suffix}", np.full((40, 100), 5.5))
    found = Folder(tmp_path)
    assert [found[i].id for i in range(len(found))] == ["a", "b/1"]
    assert found[1].camera == CAMERA
    assert (found[0].depth == 5.5).all()
    (tmp_path / "depth" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png has no depth"):
        Folder(tmp_path)
    assert not Folder(tmp_path, labeled=False)[0].valid.any()
    (tmp_path / "camera.json").unlink()
    with pytest.raises(InputError, match="there is no camera file"):
        Folder(tmp_path, labeled=False)
    (tmp_path / "cameras").mkdir()
    CAMERA.save(tmp_path / "cameras" / "a.json")
    assert Folder(tmp_path, labeled=False)[0].camera == CAMERA
    with pytest.raises(InputError, match="there is no camera file"):
        Folder(tmp_path, labeled=False)[1]
    with pytest.raises(InputError, match="has no folder images/"):
        Folder(tmp_path / "images")
    CAMERA.replace(camera_height=None).save(tmp_path / "cameras" / "a.json")
    with pytest.raises(CameraError, match=r"a\.json: camera_height is not known"):
        Folder(tmp_path, labeled=False)[0]


def test_depth_files(tmp_path):
    depth = np.array([[0.0, 0.001, 1.0, 79.99, 300.0, np.inf, np.nan, -2.0]])
    write_depth(tmp_path / "d.png", depth)
    write_depth(tmp_path / "d.npy", depth)
    known = np.array([0, 1 / 256, 1, 79.99, 65535 / 256, 0, 0, 0])
    np.testing.assert_allclose(read_depth(tmp_path / "d.png")[0], known, atol=1 / 500)
    np.testing.assert_allclose(
        read_depth(tmp_path / "d.npy")[0], [0, 0.001, 1, 79.99, 300, 0, 0, 0], rtol=1e-6
    )
    save_png(tmp_path / "rgb.png", picture())
    (tmp_path / "cut.png").write_bytes((tmp_path / "d.png").read_bytes()[:40])
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "three.npy", np.zeros((2, 2, 2)))
    np.savez(tmp_path / "two.npz", a=depth)
    (tmp_path / "two.npz").rename(tmp_path / "two.npy")
    for name, words in (
        ("two.npy", "is an archive of arrays"),
        ("none.png", "is not there"), ("rgb.png", "wanted 16-bit gray"), ("cut.png", "cannot be read"),
        ("text.npy", "cannot be read"), ("three.npy", r"wanted metres \(H, W\)"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            read_depth(tmp_path / name)
    (tmp_path / "d.exr").touch()
    for call in (lambda: read_depth(tmp_path / "d.exr"), lambda: write_depth(tmp_path / "d.exr", depth)):
        with pytest.raises(DataError, match=r"has suffix '\.exr'"):
            call()


def test_data_by_name(tmp_path):
    assert open_data("simulated:A").count == 32
    assert (open_data("simulated:F:5:9").count, open_data("simulated:F:5:9").object_size) == (5, 1.3)
    assert isinstance(open_data("simulated:A:9", limit=2), Subset)
    for spec in ("simulated:Z", "simulated:A:x", "kitti:", "video:x", "nowhere"):
        with pytest.raises(InputError, match="wanted"):
            open_data(spec)
    with pytest.raises(InputError, match="only kitti"):
        open_data("simulated:A", split="x")
    with pytest.raises(ShapeError, match="its depth 4x4"):
        make_sample(picture(), np.zeros((4, 4)), CAMERA, "x")
    with pytest.raises(CameraError, match=r"^a/3: the image is 100x40, the camera is of 4000x40 images"):
        make_sample(picture(), np.zeros((40, 100)), CAMERA.replace(width=4000), "a/3")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_a_view_and_its_camera_agree(seed, flip):
    """On the road the depth of a view is what its camera says of the road."""
    draws = rng(seed, "view")
    plane = np.asarray(ground_depth(CAMERA, backend="numpy", dtype=np.float64))
    depth = np.where(np.isfinite(plane) & (plane < 100), plane, 0.0).astype(np.float32)
    view = draw_view((40, 100), (48, 120), AugmentConfig(flip=float(flip), crop_area=(0.2, 1.0)), draws)
    camera = view_camera(CAMERA, view)
    assert camera.size == (48, 120)
    found = resize_depth(depth, view)
    wanted = np.asarray(ground_depth(camera, backend="numpy", dtype=np.float64))
    # Interpolated, exactly, where rows differ by less than 15 %; else nearest: half a source row is allowed.
    close = (found > 0) & (wanted < 30)
    assert (np.abs(1 / found[close] - 1 / wanted[close]) < 0.01).all()
    near = (found > 0) & (wanted < 9)
    exact = np.abs(found[near] / wanted[near] - 1) < 1e-4
    assert near.sum() == 0 or exact.mean() > 0.9  # but at the border


def test_the_pixels_of_a_view():
    image = picture()
    assert (resize_image(image, (0, 0, 100, 40, 100, 40, 0)) == image).all()
    assert (resize_image(image, (10, 5, 50, 20, 50, 20, 1)) == image[5:25, 10:60][:, ::-1]).all()
    depth = np.zeros((40, 100), np.float32)
    depth[::7, ::9] = 9.0  # sparse, as LiDAR
    same = resize_depth(depth, (0, 0, 100, 40, 100, 40, 0))
    np.testing.assert_array_equal(same, depth)
    twice = resize_depth(depth, (0, 0, 100, 40, 200, 80, 0))
    assert set(np.unique(twice)) == {0.0, 9.0}
    edge = np.where(np.arange(100) < 50, 5.0, 50.0).astype(np.float32)[None].repeat(40, 0)
    assert set(np.unique(resize_depth(edge, (0.3, 0.2, 99, 39, 120, 48, 0)))) == {5.0, 50.0}


@settings(max_examples=20, deadline=None)
@given(st.floats(-4, 4), st.floats(-5, 5))
def test_a_turned_picture_fits_its_camera(pitch, roll):
    camera = CAMERA.resize(400, 160)
    plane = np.asarray(ground_depth(camera, backend="numpy", dtype=np.float64))
    depth = np.where(np.isfinite(plane) & (plane < 60), plane, 0.0).astype(np.float32)
    found = turn(Sample(picture(160, 400), depth, depth > 0, camera, "x"), pitch, roll)
    assert found.camera.pitch_deg == pytest.approx(camera.pitch_deg + pitch)
    wanted = np.asarray(ground_depth(found.camera, backend="numpy", dtype=np.float64))
    seen = found.valid & (wanted < 20)
    assert seen.sum() > 1000
    assert np.abs(found.depth[seen] / wanted[seen] - 1).max() < 0.06  # half a pixel of the source
    same = turn(Sample(picture(160, 400), depth, depth > 0, camera, "x"), 0.0, 0.0)
    np.testing.assert_allclose(same.depth, depth, rtol=1e-6)
    assert np.abs(same.image.astype(int) - picture(160, 400)).max() <= 1


def test_augmented_samples():
    sample = Simulated("train", 1)[0]
    config = AugmentConfig(size=(48, 120), pitch_deg=2, roll_deg=2, noise_pitch_deg=0.2, noise_height=0.01)
    one, two, other = (augment(sample, (48, 120), config, rng(0, name)) for name in ("a", "a", "b"))
    torch.testing.assert_close(one.pixel_values, two.pixel_values, rtol=0, atol=0)
    assert (one.pixel_values != other.pixel_values).any()
    assert one.pixel_values.shape == (3, 48, 120)
    assert 0 <= one.pixel_values.min() <= one.pixel_values.max() <= 1
    heights = [float(augment(sample, (48, 120), config, rng(i, "h")).camera[4]) for i in range(200)]
    assert np.mean(heights) == pytest.approx(1.65, rel=0.005)
    assert np.std(heights) == pytest.approx(0.0165, rel=0.3)
    plain = AugmentConfig(size=(48, 120), color=0.0, flip=0.0)
    found = augment(sample, (48, 120), plain, rng(0, "x"))
    assert found.camera[4:].tolist() == pytest.approx(sample.camera.tensor()[4:].tolist())
    x = torch.rand(3, 8, 8)
    assert color_jitter(x, 0.0, rng(0)) is x


def test_sizes_are_drawn_within_their_range():
    config = AugmentConfig(min_height=64, max_height=100)
    sizes = [draw_size(config, 2.5, rng(0, i)) for i in range(200)]
    assert min(h for h, _ in sizes) == 64
    assert max(h for h, _ in sizes) == 100
    assert all(h % 2 == 0 and abs(w / h - 2.5) < 0.05 for h, w in sizes)
    assert draw_size(AugmentConfig(size=(48, 120)), 2.5, rng(0)) == (48, 120)
    for settings_, words in (
        ({"min_height": 300, "max_height": 200}, "min_height is 300"),
        ({"crop_area": (0.5, 0.4)}, "crop_area"),
        ({"size": (8, 8)}, "size is"), ({"flip": 2.0}, "flip is 2"), ({"pitch_deg": 90.0}, "pitch_deg is 90"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            AugmentConfig(**settings_)


def test_rigs():
    assert {name: camera.camera_height for name, (camera, _) in RIGS.items()} == {
        "train": 1.65, "A": 1.65, "B": 1.65, "C": 2.15, "D": 1.2, "E": 1.5, "F": 1.5,
    }  # fmt: skip
    sample = Simulated("A", 2, keep=True)
    assert sample[1] is sample[1]
    assert sample[1].camera.size == (48, 120)

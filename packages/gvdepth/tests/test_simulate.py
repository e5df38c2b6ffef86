"""The simulator: exact depth for any rig, one world for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from gvdepth_strategies import cameras
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.errors import ConfigError, InputError
from gvdepth import Camera, calibrate, ground_depth
from gvdepth.data import RIGS, Folder, Simulated, write_frames
from gvdepth.errors import CameraError
from gvdepth.simulate import BUILDING, SKY, make_scene, render, simulate, value_noise

SMALL = Camera(
    fx=40, fy=42, cx=29.0, cy=14.5, width=60, height=36, camera_height=1.4, pitch_deg=-2, roll_deg=3
)


def brute_force(scene, camera):
    """Every pixel against the ground and every box, one by one."""
    depth = np.zeros(camera.size)
    for v in range(camera.height):
        for u in range(camera.width):
            ray = camera.rotation @ np.array([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, 1.0])
            best = camera.camera_height / ray[1] if ray[1] > 0 else np.inf
            origin = np.array([0.0, -camera.camera_height, 0.0])
            for box in scene.boxes:
                near, far = -np.inf, np.inf
                for axis in range(3):
                    ends = sorted((box[2 * axis + i] - origin[axis]) / ray[axis] for i in (0, 1))
                    near, far = max(near, ends[0]), min(far, ends[1])
                if 0 < near < far:
                    best = min(best, near)
            depth[v, u] = best if np.isfinite(best) else 0.0
    return depth


def test_depth_is_the_first_hit():
    scene = make_scene(3, 1)
    np.testing.assert_allclose(render(scene, SMALL).depth, brute_force(scene, SMALL), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(cameras(), st.integers(0, 50))
def test_ground_is_the_plane_of_the_camera(camera, index):
    camera = camera.computed(width=40, height=24, cx=19.5, cy=11.5, fx=40.0, fy=40.0)
    frame = render(make_scene(0, index), camera)
    plane = np.asarray(ground_depth(camera, backend="numpy", dtype=np.float64))
    np.testing.assert_allclose(frame.depth[frame.ground], plane[frame.ground], rtol=1e-9)
    assert not frame.ground[~np.isfinite(plane)].any()
    solid = (frame.labels >= BUILDING) & np.isfinite(plane)
    assert (frame.depth[solid] <= plane[solid] * (1 + 1e-9)).all()  # what stands on the road hides it
    assert ((frame.depth == 0) == (frame.labels == SKY)).all()


def test_a_crop_sees_the_same_points():
    scene = make_scene(0, 2)
    whole, part = render(scene, SMALL), render(scene, SMALL.crop(7, 5, 30, 20))
    np.testing.assert_allclose(part.depth, whole.depth[5:25, 7:37], rtol=1e-12)
    fine = render(scene, SMALL, supersample=2)
    np.testing.assert_array_equal(fine.depth, whole.depth)
    assert (fine.image != whole.image).any()


def test_frames_depend_on_seed_and_index_only():
    first = [frame.image for frame in simulate(SMALL, 4, seed=5)]
    later = next(iter(simulate(SMALL, 1, seed=5, start=3)))
    np.testing.assert_array_equal(first[3], later.image)
    assert later.id == "5-00003"
    assert (first[0] != first[1]).any()
    assert (render(make_scene(6, 3), SMALL).image != first[3]).any()


def test_size_multiplies_objects():
    one, more = make_scene(0, 0), make_scene(0, 0, object_size=1.3)
    tall = [np.abs(scene.boxes[scene.kinds == BUILDING, 2]).mean() for scene in (one, more)]
    assert 1.1 < tall[1] / tall[0] < 1.5
    assert (one.boxes[:, 3] == 0).all()  # everything stands on the ground


def test_value_noise_is_smooth_and_in_range():
    x = np.linspace(-3, 3, 601)
    found = value_noise(x, np.full_like(x, 0.4), 0.5, 7)
    assert (found >= 0).all()
    assert (found < 1).all()
    assert np.abs(np.diff(found)).max() < 0.03
    assert found.std() > 0.05


def test_calibrate_recovers_the_rig_from_exact_depth():
    camera = SMALL.resize(240, 144)
    frames = [render(make_scene(0, i), camera) for i in range(3)]
    found = calibrate([f.depth for f in frames], [f.ground for f in frames], camera)
    assert found.camera_height == pytest.approx(1.4, abs=1e-6)
    assert found.pitch_deg == pytest.approx(-2, abs=1e-6)
    assert found.roll_deg == pytest.approx(3, abs=1e-6)


def test_written_streets_are_read_back(tmp_path):
    streets = Simulated("D", 2, seed=4)
    assert write_frames((streets.frame(i) for i in range(2)), tmp_path) == 2
    folder = Folder(tmp_path)
    assert folder.camera(0) == RIGS["D"][0]
    sample = folder[1]
    frame = streets.frame(1)
    np.testing.assert_array_equal(sample.image, frame.image)
    near = (frame.depth > 0) & (frame.depth < 200)
    np.testing.assert_allclose(sample.depth[near], frame.depth[near], atol=1 / 500)


def test_bad_input():
    with pytest.raises(ConfigError, match="size is 9"):
        make_scene(0, 0, object_size=9)
    with pytest.raises(ConfigError, match="supersample is 0"):
        render(make_scene(), SMALL, supersample=0)
    with pytest.raises(ConfigError, match="noise is -1"):
        render(make_scene(), SMALL, noise=-1)
    with pytest.raises(CameraError, match="camera_height"):
        render(make_scene(), SMALL.computed(camera_height=None))
    with pytest.raises(InputError, match="camera is 'Z', wanted a Camera or one of train, A"):
        Simulated("Z", 1)
    with pytest.raises(InputError, match="count is 0"):
        Simulated("A", 0)
    with pytest.raises(IndexError, match="there are 2 frames"):
        Simulated("A", 2).frame(2)

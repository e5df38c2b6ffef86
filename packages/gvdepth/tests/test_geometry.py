"""Invariants 1 to 5 of section 8: ground depth, transforms, embedding, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gvdepth_strategies import CAMERA, cameras, double, floats
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.errors import ConfigError, ShapeError
from gvdepth import Camera, fct, fct_inverse, fuse, ground_depth, horizon, vct, vct_inverse
from gvdepth.canonical import fct_derivative, vct_derivative
from gvdepth.geometry import (
    camera_numbers,
    down_component,
    ground_embedding,
    ground_pyramid,
    height_above_road,
    pixel_centers,
)
from gvdepth.vertical import (
    VERTICAL,
    vertical_head,
)

FORMS = list(VERTICAL)
few = settings(max_examples=40, deadline=None)


def rays(camera, size=None):
    """(h, w, 3) rays, the plain way."""
    height, width = size or camera.size
    v, u = np.mgrid[:height, :width].astype(float)
    return np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones_like(u)], -1)


def brute_depth(camera):
    """Ray and plane by explicit rotation: world y of the ray, per metre of depth."""
    down = (rays(camera) @ camera.rotation.T)[..., 1]
    with np.errstate(divide="ignore"):
        return np.where(down > 0, camera.camera_height / down, np.inf), down


# 1


@few
@given(cameras(), st.lists(floats(0.3, 500.0), min_size=1, max_size=8))
def test_transforms_invert_each_other(camera, depths):
    depth = double(depths)
    columns = torch.linspace(0, camera.width - 1, len(depths), dtype=torch.float64)
    for at in (None, columns):
        back = vct(vct_inverse(depth, camera, camera.height, columns=at), camera, camera.height, columns=at)
        torch.testing.assert_close(back, depth, rtol=1e-9, atol=0)
    torch.testing.assert_close(fct(fct_inverse(depth, camera), camera), depth, rtol=1e-12, atol=0)


# 2


@few
@given(cameras())
def test_ground_pixels_lie_on_the_plane(camera):
    depth = ground_depth(camera, dtype=torch.float64).numpy()
    expected, down = brute_depth(camera)
    points = rays(camera) * np.where(np.isfinite(depth), depth, 0.0)[..., None]
    sure = np.abs(down) > 1e-12
    on_plane = np.isfinite(depth)
    assert (on_plane == (down > 0))[sure].all()
    np.testing.assert_allclose((points @ camera.normal)[on_plane], camera.camera_height, rtol=1e-9)
    near = sure & (expected < 1e6)
    np.testing.assert_allclose(depth[near], expected[near], rtol=1e-8)
    rows = horizon(camera, pixel_centers(camera.width)).numpy()
    below = np.arange(camera.height)[:, None] - rows
    assert (on_plane == (below > 0))[np.abs(below) > 1e-9 * (1 + np.abs(rows))].all()


@few
@given(cameras())
def test_backends_and_batches_agree(camera):
    expected = ground_depth(camera, backend="numpy", dtype=np.float64)
    for found in (
        ground_depth(camera, dtype=torch.float64),
        ground_depth(camera, roll=True, dtype=torch.float64),
        ground_depth([camera, camera], dtype=torch.float64)[1, 0],
        ground_depth(camera.tensor(torch.float64)[None], camera.size, dtype=torch.float64)[0, 0],
    ):
        # What a tensor holds is radians; a pixel next to the horizon sees the last bit of them.
        near = expected < 1e5
        np.testing.assert_allclose(found.numpy()[near], expected[near], rtol=1e-7)


def test_the_ground_map_of_a_level_camera_is_one_row_vector():
    camera = Camera(**CAMERA | {"roll_deg": 0.0})
    depth = ground_depth(camera)
    assert depth.stride(1) == 0
    assert ground_depth(camera).data_ptr() != depth.data_ptr()  # nothing is shared
    tensor = ground_depth(camera.tensor()[None], camera.size, roll=False)
    assert tensor.shape == (1, 1, *camera.size)
    assert tensor.stride(3) == 0
    assert down_component(camera, pixel_centers(10)).shape == (10, 1)


def test_strides_look_at_the_middle_of_their_cells():
    camera = Camera(**CAMERA)
    fine = 1.0 / ground_depth(camera, stride=1, dtype=torch.float64)
    coarse = 1.0 / ground_depth(camera, stride=2, dtype=torch.float64)
    below = torch.isfinite(1 / fine).reshape(100, 2, 160, 2).all(3).all(1)
    mean = fine.reshape(100, 2, 160, 2).mean((1, 3))
    torch.testing.assert_close(coarse[below], mean[below], rtol=1e-9, atol=1e-12)
    odd = camera.crop(0, 0, 319, 199)
    assert ground_depth(odd, stride=2).shape == (100, 160)


# 3


@few
@given(cameras(), floats(0.1, 10.0), st.integers(1, 4), st.integers(1, 4))
def test_depth_scales_with_height_and_knows_no_resolution(camera, factor, sx, sy):
    depth = ground_depth(camera, dtype=torch.float64)
    higher = ground_depth(camera.computed(camera_height=camera.camera_height * factor), dtype=torch.float64)
    torch.testing.assert_close(higher, depth * factor, rtol=1e-12, atol=0)
    # The same 3-D points: pixel u of the small image is (u + 1/2) s - 1/2 of the large one.
    large = camera.resize(camera.width * sx, camera.height * sy)
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in camera.size)
    fine = down_component(large, (rows + 0.5) * sy - 0.5, (columns + 0.5) * sx - 0.5)
    torch.testing.assert_close(fine, down_component(camera, rows, columns), rtol=1e-9, atol=1e-12)


@few
@given(cameras(), st.data())
def test_a_crop_keeps_the_points(camera, data):
    x0, y0 = data.draw(st.integers(0, camera.width - 2)), data.draw(st.integers(0, camera.height - 2))
    part = camera.crop(x0, y0, camera.width - x0, camera.height - y0)
    whole = down_component(camera, pixel_centers(camera.height), pixel_centers(camera.width))
    found = down_component(part, pixel_centers(part.height), pixel_centers(part.width))
    torch.testing.assert_close(found, whole[y0:, x0:], rtol=1e-9, atol=1e-12)


# 4


@few
@given(cameras())
def test_flip_is_an_involution_that_mirrors_the_map(camera):
    twice = camera.flip().flip()
    for name in ("fx", "fy", "cy", "camera_height", "pitch_deg", "roll_deg", "size"):
        assert getattr(twice, name) == getattr(camera, name)
    assert twice.cx == pytest.approx(camera.cx, rel=1e-15, abs=1e-12)
    flipped = camera.flip()
    assert (flipped.roll_deg, flipped.pitch_deg) == (-camera.roll_deg, camera.pitch_deg)
    whole = [pixel_centers(n) for n in camera.size]
    torch.testing.assert_close(
        down_component(flipped, *whole), down_component(camera, *whole).flip(-1), rtol=1e-9, atol=1e-12
    )


@few
@given(cameras(roll=False))
def test_without_roll_columns_do_not_matter(camera):
    depth = ground_depth(camera, roll=True, dtype=torch.float64)
    assert (depth == depth[:, :1]).all()


# 5


@few
@given(cameras(), floats(1e-3, 0.999))
def test_depth_falls_with_the_row_and_rises_with_y(camera, share):
    depth = ground_depth(camera, dtype=torch.float64)
    below = torch.isfinite(depth)
    pairs = below[1:] & below[:-1]
    assert (depth[1:] < depth[:-1])[pairs].all()
    top = camera.height - float(horizon(camera))
    y = double([top - 2 * share - 1, top - share]).requires_grad_()
    found = vct(y, camera, camera.height)
    assert 0 < found[0] < found[1]
    found.sum().backward()
    closed = vct_derivative(found.detach(), camera)
    assert (closed > 0).all()
    torch.testing.assert_close(y.grad, closed, rtol=1e-6, atol=0)
    assert vct(double(top + 1), camera, camera.height) < 0  # above the horizon


def test_the_derivative_of_the_focal_transform():
    camera = Camera(**CAMERA)
    assert float(fct_derivative(camera, f_c=500.0)) == camera.fy / 500.0
    z = torch.ones(3, dtype=torch.float64, requires_grad=True)
    fct(z, camera, f_c=250.0).sum().backward()
    assert z.grad.tolist() == [camera.fy / 250.0] * 3


def test_gradients_of_the_transforms_and_the_ground():
    numbers = Camera(**CAMERA).tensor(torch.float64)[None].requires_grad_()
    depth = double([[3.0, 8.0, 20.0]]).requires_grad_()
    columns = double([0.0, 100.0, 300.0])
    check = torch.autograd.gradcheck
    assert check(lambda d, c: vct_inverse(d, c, 200.0, columns=columns), (depth, numbers))
    y = vct_inverse(depth, numbers, 200.0, columns=columns).detach().requires_grad_()
    assert check(lambda y, c: vct(y, c, 200.0, columns=columns), (y, numbers), atol=1e-4, rtol=1e-3)
    assert check(lambda d, c: fct_inverse(fct(d, c) * 2, c), (depth, numbers))
    assert check(lambda c: horizon(c, columns), (numbers,))
    assert check(lambda d, c: height_above_road(d.reshape(1, 1, 1, 3), c), (depth, numbers))
    finite = lambda c: torch.nan_to_num(ground_depth(c, (200, 8), stride=50, dtype=torch.float64), posinf=0.0)
    numbers.grad = None
    finite(numbers).sum().backward()
    assert torch.isfinite(numbers.grad).all()
    assert check(finite, (numbers,), atol=1e-5)


# The embedding


@few
@given(cameras())
def test_the_embedding_is_inverse_depth_and_angle(camera):
    found = ground_embedding([camera], camera.size, dtype=torch.float64)[0]
    direction = rays(camera)
    sine = direction @ camera.normal / np.linalg.norm(direction, axis=-1)
    np.testing.assert_allclose(found[1], sine, rtol=1e-9, atol=1e-12)
    inverse = 8 * np.clip(1.0 / ground_depth(camera, backend="numpy", dtype=np.float64), 0, 1)
    np.testing.assert_allclose(found[0], inverse, rtol=1e-7, atol=1e-9)


def test_the_pyramid_is_area_resized():
    camera = Camera(**CAMERA | {"height": 192})
    whole = ground_embedding([camera], (192, 320))
    levels = ground_pyramid(whole, (1, 2, 32))
    assert [tuple(x.shape[-2:]) for x in levels] == [(192, 320), (96, 160), (6, 10)]
    torch.testing.assert_close(levels[2], whole.reshape(1, 2, 6, 32, 10, 32).mean((3, 5)))
    level = ground_embedding(camera.computed(roll_deg=0.0), (192, 320), roll=False)
    torch.testing.assert_close(level, ground_embedding(camera.computed(roll_deg=0.0), (192, 320)))
    with pytest.raises(ShapeError, match="191x320, wanted multiples of the stride 2"):
        ground_pyramid(whole[:, :, :191], (2,))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda c: ground_depth(c, backend="jax"),
            ConfigError,
            "backend is 'jax', wanted 'torch' or 'numpy'",
        ),
        (lambda c: ground_depth(c.tensor()), ShapeError, r"size is None, wanted \(height, width\)"),
        (lambda c: ground_depth(torch.zeros(6), (4, 4)), ShapeError, r"shape \(6,\), wanted \(..., 7\)"),
        (lambda c: ground_depth([c, c.crop(0, 0, 9, 9)]), ShapeError, "wanted one size"),
        (lambda c: ground_depth([c], backend="numpy"), ConfigError, "takes one Camera"),
        (
            lambda c: vertical_head("rows"),
            ConfigError,
            "vertical_param is 'rows', wanted one of bounded, row, offset",
        ),
        (lambda c: vertical_head("offset", extend=1.0), ConfigError, "extend"),
        (
            lambda c: fuse(*[torch.zeros(1)] * 4, fusion="max"),
            ConfigError,
            "fusion is 'max', wanted one of scale",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(Camera(**CAMERA))


def test_numbers_are_formed_in_double_precision():
    assert camera_numbers(torch.zeros(3, 7)).dtype == torch.float64
    assert camera_numbers([Camera(**CAMERA)] * 2).shape == (2, 7)

"""Invariants 10 and 14 of section 8: the vertical forms, exact under roll, bounded, compiled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gvdepth_strategies import CAMERA, cameras, double, floats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gvdepth import Camera, GeometryError, fct, fuse, ground_depth, vct, vct_inverse
from gvdepth.geometry import (
    down_component,
    height_above_road,
    pixel_centers,
)
from gvdepth.vertical import (
    VERTICAL,
    bounded_depth,
    check_ground,
    focal_canonical,
    offset_depth,
    row_depth,
    row_offset,
    sees_ground,
    soft_bound,
    softplus,
    vertical_head,
    y_max,
)

FORMS = list(VERTICAL)
few = settings(max_examples=40, deadline=None)


@few
@given(cameras(road=True), st.sampled_from(FORMS), st.integers(0, 2**31))
def test_the_vertical_forms_commute_with_a_flip(camera, form, seed):
    z = torch.randn(
        1, 1, *(n // 2 + 1 for n in camera.size), generator=torch.Generator().manual_seed(seed)
    ).double()
    size = tuple(2 * n for n in z.shape[-2:])
    camera = camera.crop(0, 0, size[1], size[0])  # so that the half-resolution map mirrors onto itself
    head = vertical_head(form)
    depth = head(z, camera.tensor(torch.float64)[None], size[0])
    mirrored = head(z.flip(-1), camera.flip().tensor(torch.float64)[None], size[0])
    torch.testing.assert_close(mirrored.flip(-1), depth, rtol=1e-9, atol=1e-12)
    if abs(camera.roll_deg) > 0.5 and form == "offset" and camera.fx < 500:
        level = head(z, camera.computed(roll_deg=0.0).tensor(torch.float64)[None], size[0])
        assert not torch.allclose(level, depth, rtol=1e-6)  # the roll is not ignored


# 10


def offset_at(camera, offset, roll=True, **options):
    rows, columns = (pixel_centers(n) for n in camera.size)
    # z of a given number of rows: the inverse of softplus.
    wanted = torch.broadcast_to(double(offset), camera.size) / (camera.height * 0.125)
    z = torch.where(wanted > 0, wanted + torch.log(-torch.expm1(-wanted.clamp(min=1e-300))), double(-1e4))
    return z, offset_depth(z, camera, camera.height, rows=rows, columns=columns if roll else None, **options)


@few
@given(cameras(road=True))
def test_offset_zero_is_the_road(camera):
    _, depth = offset_at(camera, 0.0)
    road = ground_depth(camera, dtype=torch.float64)
    near = road < 40
    torch.testing.assert_close(depth[near], road[near], rtol=5e-3, atol=0)
    assert ((depth > 0) & (depth <= 80)).all()


@few
@given(cameras(road=True), st.integers(0, 2**31), floats(1.0, 30.0))
def test_offset_heights_are_never_below_the_road_and_gamma_is_their_ratio(camera, seed, scale):
    offset = torch.rand(camera.size, generator=torch.Generator().manual_seed(seed)).double() * scale
    z, depth = offset_at(camera, offset)
    height = height_above_road(depth, camera)
    assert (height >= -1e-9).all()
    gamma = vertical_head("offset").gamma(z, camera, camera.height)
    sure = depth < 30  # where the bound does not act
    torch.testing.assert_close((height / depth)[sure], gamma[sure], rtol=2e-2, atol=2e-3)
    exact = row_offset(z, camera.height) * math.cos(camera.roll) * math.cos(camera.pitch) / camera.fy
    torch.testing.assert_close(gamma, exact, rtol=1e-9, atol=1e-12)
    _, nearer = offset_at(camera, offset + 1.0)
    assert (nearer <= depth).all()
    assert (nearer < depth)[depth < 79.9].all()  # above the horizon the bound is flat to the last digit


@few
@given(cameras(road=True), floats(0.1, 3.0), floats(5.0, 25.0))
def test_offset_is_exact_under_roll(camera, height, at):
    """A point ``height`` metres above the road has the offset of its ground projection, whatever the roll."""
    assume(height < 0.8 * camera.camera_height)
    rows, columns = (pixel_centers(n) for n in camera.size)
    down = down_component(camera, rows, columns)
    gamma = height / at
    offset = gamma * camera.fy / (math.cos(camera.roll) * math.cos(camera.pitch))
    _, depth = offset_at(camera, offset, max_depth=1e4, softness=200.0)
    expected = camera.camera_height / (down + gamma)
    sure = (down + gamma > 0) & (expected < 2000)
    torch.testing.assert_close(depth[sure], expected[sure], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
@few
@given(data=st.data())
def test_forms_under_roll_are_the_rolled_plane(form, data):
    """Each form, column by column: the road depth at the row that its formula names, by explicit rotation."""
    camera = data.draw(cameras(road=True))
    z = torch.randn(
        camera.size, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    ).double()
    rho, cap, h = 0.5, 80.0, camera.height
    rows, columns = (pixel_centers(n) for n in camera.size)
    turn, share = camera.rotation, torch.sigmoid(z).numpy()
    u = columns.numpy()[None, :]
    h_ext = (1 + rho) * h

    def down(v):
        return (
            turn[1, 0] * (u - camera.cx) / camera.fx + turn[1, 1] * (v - camera.cy) / camera.fy + turn[1, 2]
        )

    slope = turn[1, 1] / camera.fy
    if form == "bounded":
        # The row of the column that is 80 m deep, counted from the bottom.
        highest = h_ext - (camera.camera_height / cap - down(0.0)) / slope
        assume((highest > 1).all())
        found = bounded_depth(z, camera, h, columns=columns, extend=rho, max_depth=cap)
        expected = camera.camera_height / down(h_ext - highest * share)
        np.testing.assert_allclose(
            y_max(camera, h, columns=columns, ndim=2), highest[0], rtol=1e-9, atol=1e-9
        )
        assert (found <= cap * (1 + 1e-12)).all()
    else:
        if form == "row":
            found = row_depth(z, camera, h, columns=columns, extend=rho, max_depth=cap)
            raw = down(h_ext - h_ext * share)
        else:
            found = offset_depth(z, camera, h, rows=rows, columns=columns, max_depth=cap)
            raw = down(rows.numpy()[:, None] + h / 8 * np.log1p(np.exp(z.numpy())))
        x = cap * raw / camera.camera_height
        expected = cap / (1 + np.logaddexp(0.0, 8 * (x - 1)) / 8)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)


# 14


@pytest.mark.parametrize("form", FORMS)
def test_no_form_loses_the_camera(form):
    z = torch.linspace(-3, 3, 40, dtype=torch.float64).reshape(1, 1, 8, 5)
    base = Camera(**CAMERA | {"roll_deg": 0.0})
    head = vertical_head(form)
    depth = head(z, base.tensor(torch.float64)[None], 200, stride=8)
    for change in ({"pitch_deg": 1.0}, {"camera_height": 1.2}, {"fy": 250.0}, {"cy": 75.0}):
        other = head(z, base.replace(**change).tensor(torch.float64)[None], 200, stride=8)
        assert ((other - depth).abs() / depth).max() > 0.01, change


def test_the_trap_a_row_tied_to_a_depth_loses_the_camera():
    """Section 2.3: with y = 0 fixed to a depth d_min, height, focal length and pitch cancel."""
    z = torch.linspace(-3, 3, 9, dtype=torch.float64)
    made = []
    for change in ({}, {"pitch_deg": 3.0, "camera_height": 1.1, "fy": 500.0}):
        camera = Camera(**CAMERA | {"roll_deg": 0.0} | change)
        d_min = 2.0
        h_ext = 200 - float(vct_inverse(double(d_min), camera, 200))  # so that y(d_min) = 0
        highest = vct_inverse(double(80.0), camera, h_ext)
        made.append(vct(highest * z.sigmoid(), camera, h_ext))
    torch.testing.assert_close(made[0], made[1], rtol=1e-9, atol=0)


# Bounds, edges, gradients, dtypes


@given(st.lists(floats(-1e4, 1e4), min_size=1, max_size=20), floats(1.0, 500.0))
def test_the_soft_bound(values, cap):
    x = double(values).requires_grad_()
    found = soft_bound(x, cap)
    assert ((found > 0) & (found <= cap)).all()
    found.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad <= 0).all()
    assert (x.grad[(x > -80) & (x < 1e3)] < 0).all()


def test_the_soft_bound_is_off_by_what_the_page_says():
    off = [1 - float(soft_bound(double(80.0 / d))) / d for d in (39.9, 60.0, 80.0)]
    assert off[0] < 1e-4
    assert off[1] == pytest.approx(0.006, abs=0.001)
    assert off[2] == pytest.approx(0.08, abs=0.001)


def test_softplus_neither_overflows_nor_rounds():
    x = double([-800.0, -30.0, 0.0, 19.9, 20.1, 800.0]).requires_grad_()
    found = softplus(x)
    expected = np.logaddexp(0.0, x.detach().numpy())
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-14)
    found.sum().backward()
    np.testing.assert_allclose(
        x.grad.numpy(), 1 / (1 + np.exp(-x.detach().numpy().clip(-700))), rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_forms(form):
    z = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    numbers = Camera.batch([Camera(**CAMERA), Camera(**CAMERA | {"pitch_deg": 2.0})], torch.float64)
    numbers.requires_grad_()
    head = vertical_head(form)
    assert torch.autograd.gradcheck(lambda z, c: head(z, c, 200.0, stride=32), (z, numbers), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_widened(form, dtype, device):
    z = torch.linspace(-4, 4, 24).reshape(1, 1, 4, 6).to(device, dtype)
    numbers = Camera(**CAMERA).tensor()[None].to(device)
    head = vertical_head(form)
    depth = head(z, numbers, 200.0, stride=32)
    assert depth.dtype == torch.float32
    assert depth.device.type == device
    wanted = head(z.double().cpu(), numbers.double().cpu(), 200.0, stride=32)
    torch.testing.assert_close(depth.cpu().double(), wanted, rtol=1e-4, atol=1e-4)
    assert focal_canonical(z).dtype == torch.float32
    assert vct_inverse(depth.to(dtype), numbers, 200.0).dtype == torch.float32


def closed_form(zf, zy, sf, sy, camera, height):
    """The closed-form part of the head: activations, FCT, VCT, fusion."""
    return fuse(fct(focal_canonical(zf), camera), vertical_head("offset")(zy, camera, height), sf, sy)


@pytest.mark.slow
def test_the_head_compiles_without_a_break(device):
    maps = [torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(i)).to(device) for i in range(4)]
    camera = Camera.batch([Camera(**CAMERA)] * 2).to(device)
    compiled = torch.compile(closed_form, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*maps, camera, 16.0), closed_form(*maps, camera, 16.0)
    for name in ("depth", "weight_focal", "uncertainty", "disagreement", "total"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_compiles_without_a_break(form):
    z, camera = (
        torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(1)),
        Camera(**CAMERA).tensor()[None],
    )
    head = vertical_head(form)
    function = lambda z, c: head(z, c, 12.0)
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(z, camera)
    torch.testing.assert_close(found, function(z, camera))


# What cannot be seen


def test_an_image_above_the_horizon():
    up = Camera(**CAMERA | {"pitch_deg": 40.0})
    assert not sees_ground(up)
    assert torch.isinf(ground_depth(up)).all()
    with pytest.raises(GeometryError, match=r"200 rows lies above the horizon .* pitch_deg \(40"):
        check_ground(up)
    check_ground(Camera(**CAMERA))
    assert sees_ground(up, extend=2.0)
    # The extended image is still above: it grows until the row of 80 m is the 16th.
    assert float(y_max(up, 200)) == 16.0
    for form in FORMS:
        z = torch.randn(1, 1, 4, 4, requires_grad=True)
        depth = vertical_head(form)(z, up.tensor()[None], 200)
        assert ((depth > 0) & (depth <= 80)).all()
        depth.sum().backward()
        assert torch.isfinite(z.grad).all()


def test_the_horizon_itself():
    camera = Camera(**CAMERA | {"pitch_deg": 0.0, "roll_deg": 0.0})
    assert math.isinf(ground_depth(camera)[60, 0])
    assert math.isfinite(ground_depth(camera)[61, 0])
    z = torch.full((200, 320), -200.0)
    assert float(offset_depth(z, camera, 200, rows=pixel_centers(200))[60, 0]) == pytest.approx(
        80.0, rel=1e-3
    )

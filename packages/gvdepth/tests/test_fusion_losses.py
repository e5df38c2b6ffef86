"""Invariants 6 to 9 of section 8: fusion, uncertainties, propagation, losses, warps, ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gvdepth_ranks import maps, pooled_loss
from gvdepth_strategies import CAMERA, cameras, double, floats
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.errors import ConfigError, DataError, ShapeError
from fusion_core.testing import spawn
from gvdepth import Camera, consistency_loss, fct, fuse, ground_depth, propagate, silog_loss, uncertainty_loss
from gvdepth.fusion import FUSIONS, focal_weight
from gvdepth.geometry import down_component, pixel_centers
from gvdepth.losses import depth_loss, pooled_mean, valid_mask
from gvdepth.propagation import calibration_std, inflate
from gvdepth.vertical import bounded_depth, focal_canonical, offset_depth
from gvdepth.warping import warp

few = settings(max_examples=60, deadline=None)
depths = floats(0.1, 300.0)
scores = floats(-700.0, 700.0)


# 6


@few
@given(depths, depths, scores, scores, st.sampled_from(FUSIONS))
def test_fusion_lies_between_its_cues(d_focal, d_vertical, s_focal, s_vertical, rule):
    args = [double(x) for x in (d_focal, d_vertical, s_focal, s_vertical)]
    fused = fuse(*args, fusion=rule)
    low, high = min(d_focal, d_vertical), max(d_focal, d_vertical)
    assert low * (1 - 1e-12) <= float(fused.depth) <= high * (1 + 1e-12)
    assert 0 <= float(fused.weight_focal) <= 1
    assert math.isfinite(float(fused.depth))
    assert float(fused.disagreement) == pytest.approx(high - low, rel=1e-12)
    swapped = fuse(
        args[1], args[0], args[3], args[2], fusion={"focal": "vertical", "vertical": "focal"}.get(rule, rule)
    )
    assert float(swapped.depth) == pytest.approx(float(fused.depth), rel=1e-12)
    for name in ("uncertainty", "total"):
        assert float(getattr(swapped, name)) == pytest.approx(float(getattr(fused, name)), rel=1e-9)


@few
@given(depths, depths, floats(-50.0, 50.0), floats(-50.0, 50.0), floats(-100.0, 100.0))
def test_only_the_difference_of_uncertainties_matters(d_focal, d_vertical, s_focal, s_vertical, constant):
    args = [double(x) for x in (d_focal, d_vertical, s_focal, s_vertical)]
    moved = [*args[:2], args[2] + constant, args[3] + constant]
    for rule in ("scale", "variance", "mean"):
        found, expected = (float(fuse(*a, fusion=rule).depth) for a in (moved, args))
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(depths, depths, scores)
def test_equal_uncertainties_give_the_mean_and_an_infinite_one_the_other_cue(d_focal, d_vertical, s):
    one, two = double(d_focal), double(d_vertical)
    for rule in ("scale", "variance", "mean", "select"):
        found = float(fuse(one, two, double(s), double(s), fusion=rule).depth)
        assert found == pytest.approx((d_focal + d_vertical) / 2, rel=1e-12)
    for rule in ("scale", "variance", "select"):
        fused = fuse(one, two, double(math.inf), double(0.0), fusion=rule)
        assert float(fused.depth) == d_vertical
        # As the focal uncertainty grows, its weighted share stays: 1/uncertainty is the weight.
        assert float(fused.total) == pytest.approx(2.0 if rule == "scale" else 1.0)
        assert float(fuse(one, two, double(0.0), double(math.inf), fusion=rule).depth) == d_focal
        assert float(fuse(one, two, double(1500.0), double(-1500.0), fusion=rule).depth) == d_vertical


@given(st.lists(floats(-5.0, 5.0), min_size=2, max_size=2), depths, depths)
def test_weights_and_uncertainties_are_those_of_the_formulas(s, d_focal, d_vertical):
    a, b = (math.exp(x) for x in s)
    args = [double(x) for x in (d_focal, d_vertical, *s)]
    fused = {rule: fuse(*args, fusion=rule) for rule in FUSIONS}
    assert float(fused["scale"].depth) == pytest.approx((b * d_focal + a * d_vertical) / (a + b), rel=1e-12)
    squares = (b * b * d_focal + a * a * d_vertical) / (a * a + b * b)
    assert float(fused["variance"].depth) == pytest.approx(squares, rel=1e-12)
    assert float(fused["scale"].uncertainty) == pytest.approx(a * b / (a + b), rel=1e-12)
    assert float(fused["variance"].uncertainty) == pytest.approx(a * b / math.hypot(a, b), rel=1e-12)
    for rule in ("mean", "select", "focal", "vertical"):
        w = float(fused[rule].weight_focal)
        assert float(fused[rule].uncertainty) == pytest.approx(w * a + (1 - w) * b, rel=1e-12)
    for found in fused.values():
        w = float(found.weight_focal)
        total = w * a + (1 - w) * b + 2 * w * (1 - w) * abs(d_focal - d_vertical)
        assert float(found.total) == pytest.approx(total, rel=1e-12)
    assert float(fused["focal"].depth) == d_focal
    assert float(fused["vertical"].depth) == d_vertical


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fusion_of_half_precision_does_not_overflow(dtype, device):
    s = torch.tensor([30.0, -30.0], dtype=dtype, device=device)
    depth = torch.tensor([10.0, 20.0], dtype=dtype, device=device)
    for rule in FUSIONS:
        fused = fuse(depth, depth + 1, s, -s, fusion=rule)
        assert fused.depth.dtype == torch.float32
        assert torch.isfinite(fused.depth).all()
        assert torch.isfinite(fused.total).all()


def test_gradients_of_fusion():
    args = [maps(3, seed=i).requires_grad_() for i in range(2)]
    args += [maps(3, seed=i, low=-2.0, high=2.0).requires_grad_() for i in (2, 3)]
    for rule in ("scale", "variance", "mean"):

        def outputs(*tensors, rule=rule):
            fused = fuse(*tensors, fusion=rule)
            return fused.depth, fused.uncertainty, fused.total

        assert torch.autograd.gradcheck(outputs, args)


# Propagation


def test_propagation_agrees_with_differences():
    camera = Camera(**CAMERA)
    depth = ground_depth(camera, dtype=torch.float64)[120, 37]
    small = 1e-6
    for name, change, unit in (("height_std", "camera_height", 1.0), ("pitch_std_deg", "pitch_deg", 1.0)):
        higher = camera.computed(**{change: getattr(camera, change) + small * unit})
        # The pixel's ground projection stays where it is, so the depth follows the camera.
        moved = ground_depth(higher, dtype=torch.float64)[120, 37]
        found = propagate(depth, camera, **{name: small})
        assert float(found) == pytest.approx(abs(float(moved - depth)), rel=1e-4)


@few
@given(cameras(road=True), floats(1.0, 60.0))
def test_the_error_of_pitch_is_that_of_the_formula(camera, d):
    """d^2/h |((v_g - cy)/fy) sin p + cos p| of section 2.4, for a camera without roll."""
    camera = camera.computed(roll_deg=0.0)
    v = camera.cy + camera.fy * (camera.camera_height / d + math.sin(camera.pitch)) / math.cos(camera.pitch)
    slope = (v - camera.cy) / camera.fy * math.sin(camera.pitch) + math.cos(camera.pitch)
    expected = d * d / camera.camera_height * abs(slope) * math.radians(0.2)
    found = propagate(double(d), camera, pitch_std_deg=0.2)
    assert float(found) == pytest.approx(expected, rel=1e-9)
    both = propagate(double(d), camera, height_std=0.05, pitch_std_deg=0.2)
    assert float(both) == pytest.approx(math.hypot(expected, 0.05 * d / camera.camera_height), rel=1e-9)
    assert float(calibration_std(double(d), camera, (0.05, 0.2))) == float(both)


def test_propagation_of_a_batch_and_of_nothing():
    numbers = Camera.batch([Camera(**CAMERA), Camera(**CAMERA | {"camera_height": 0.8})], torch.float64)
    depth = maps(2, 1, 3, 4)
    found = propagate(depth, numbers, height_std=0.1)
    torch.testing.assert_close(found[1] / depth[1], torch.full((1, 3, 4), 0.125, dtype=torch.float64))
    assert (propagate(depth, numbers) == 0).all()
    assert propagate(depth.half(), numbers, row_std=1.0).dtype == torch.float32


@given(floats(-8.0, 8.0), floats(0.0, 50.0))
def test_inflation_adds_variances(s, std):
    found = float(inflate(double(s), double(std)))
    assert found == pytest.approx(0.5 * math.log(math.exp(2 * s) + std * std / 2), abs=1e-12)


def test_no_calibration_error_has_a_gradient():
    depth = maps(1, 1, 2, 3).requires_grad_()
    for std in ((0.0, 0.0), (0.02, 0.1)):
        depth.grad = None
        inflate(torch.zeros_like(depth), calibration_std(depth, Camera(**CAMERA), std)).sum().backward()
        assert torch.isfinite(depth.grad).all()


# 7


@few
@given(st.integers(0, 10_000), floats(0.05, 20.0))
def test_silog_without_the_mean_is_blind_to_scale(seed, factor):
    target, depth = maps(2, 1, 3, 4, seed=seed), maps(2, 1, 3, 4, seed=seed + 1)
    found = [float(silog_loss(depth * f, target, lam=0.0)) for f in (1.0, factor)]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0] >= 0
    assert float(silog_loss(depth, target)) > 0
    assert float(silog_loss(target, target)) == 0
    assert float(silog_loss(target * factor, target, lam=0.0)) == pytest.approx(0.0, abs=1e-6)


def test_silog_is_its_formula():
    target, depth = maps(2, 1, 3, 4, seed=1), maps(2, 1, 3, 4, seed=2)
    gap = (depth.log() - target.log()).flatten()
    expected = 10 * torch.sqrt(gap.var(correction=0) + 0.15 * gap.mean() ** 2)
    torch.testing.assert_close(silog_loss(depth, target), expected, rtol=1e-12, atol=0)
    expected = 3 * torch.sqrt(gap.var(correction=1) + 0.5 * gap.mean() ** 2)
    found = silog_loss(depth, target, correction=1, alpha=3.0, lam=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_means_are_pooled_over_pixels_not_images():
    target, depth = maps(2, 1, 2, 2, seed=1), maps(2, 1, 2, 2, seed=2)
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]]).reshape(2, 1, 2, 2)
    picked = [x[mask][None, None, None] for x in (depth, target)]
    torch.testing.assert_close(silog_loss(depth, target, mask), silog_loss(*picked), rtol=1e-12, atol=0)
    s = maps(2, 1, 2, 2, seed=3, low=-1, high=1)
    found = uncertainty_loss(depth, s, target, mask)
    expected = uncertainty_loss(picked[0], s[mask][None, None, None], picked[1])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("holes", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_an_empty_batch_gives_zero_with_a_gradient_of_zero(holes, device):
    depth = maps(1, 1, 2, 3).float().to(device).requires_grad_()
    s = torch.zeros_like(depth).requires_grad_()
    target = torch.full_like(depth, holes).detach()
    found = depth_loss(depth, target, cues=((depth, s), (depth, s)))
    assert float(found.total.detach()) == 0
    found.total.backward()
    assert (depth.grad == 0).all()
    assert (s.grad == 0).all()


def test_one_valid_pixel_and_a_perfect_one_have_finite_gradients():
    depth, target = maps(1, 1, 2, 2).requires_grad_(), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    target[0, 0, 0, 0] = 5.0
    for correction in (0, 1):
        depth.grad = None
        loss = silog_loss(depth, target, correction=correction)
        gap = math.log(float(depth.detach()[0, 0, 0, 0]) / 5.0)
        assert float(loss.detach()) == pytest.approx(10 * math.sqrt(0.15) * abs(gap), rel=1e-9)
        loss.backward()
        assert torch.isfinite(depth.grad).all()
    exact = target.clone().requires_grad_()
    silog_loss(exact, target).backward()
    assert (exact.grad == 0).all()


@few
@given(
    st.lists(floats(-3e4, 3e4), min_size=8, max_size=8),
    st.lists(floats(-700.0, 700.0), min_size=8, max_size=8),
    st.lists(
        st.one_of(floats(0.0, 80.0), st.sampled_from([math.nan, math.inf, -1.0])), min_size=4, max_size=4
    ),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_total_has_a_finite_gradient_for_every_finite_input(z, s, target, dtype):
    """Also where heads are absurd: outputs of any size, uncertainties unclamped."""
    camera = Camera(**CAMERA).tensor()[None]
    inputs = [torch.tensor(x, dtype=dtype).reshape(2, 1, 1, 2, 2).requires_grad_() for x in (z, s)]
    focal = fct(focal_canonical(inputs[0][0]), camera)
    vertical = offset_depth(inputs[0][1], camera, 200.0, rows=double([20.0, 150.0]))
    fused = fuse(focal, vertical, *inputs[1])
    truth = torch.tensor(target, dtype=dtype).reshape(1, 1, 2, 2)
    cues = ((focal, inputs[1][0]), (vertical, inputs[1][1]))
    pulled = consistency_loss(fused.depth, focal, [0, 0, 2, 2, 2, 2], [0, 0, 2, 2, 2, 2])
    loss = depth_loss(fused.depth, truth, cues=cues, consistency=pulled)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    for tensor in inputs:
        assert torch.isfinite(tensor.grad).all()


def test_gradients_of_the_losses():
    target, mask = maps(2, 1, 2, 3, seed=5), maps(2, 1, 2, 3, seed=6) > 20
    depth = maps(2, 1, 2, 3, seed=7).requires_grad_()
    s = maps(2, 1, 2, 3, seed=8, low=-2, high=2).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda d: silog_loss(d, target, mask), (depth,))
    assert check(lambda d: silog_loss(d, target, mask, correction=1), (depth,))
    assert check(lambda d, s: uncertainty_loss(d, s, target, mask), (depth, s))
    views = [0, 0, 3, 2, 3, 2], [1, 0, 2, 2, 3, 2]
    assert check(lambda d: consistency_loss(d, target, *views), (depth,))


# 8


@few
@given(floats(0.01, 100.0), floats(1.0, 50.0), floats(-3.0, 3.0))
def test_the_best_uncertainty_is_the_error(error, truth, off):
    depth, target = double([truth + error]), double([truth])
    at = lambda s: float(uncertainty_loss(depth, double([s]), target))
    best = math.log(error)
    assert at(best) == pytest.approx(1 + best, rel=1e-9, abs=1e-9)
    assert at(best) <= at(best + off) + 1e-12
    s = double([best]).requires_grad_()
    uncertainty_loss(depth, s, target).backward()
    assert float(s.grad) == pytest.approx(0.0, abs=1e-9)


def test_plain_l1_without_weighting():
    depth, target = maps(1, 1, 2, 3, seed=1), maps(1, 1, 2, 3, seed=2)
    found = uncertainty_loss(depth, torch.full_like(depth, 3.0), target, unc_weighting=False)
    torch.testing.assert_close(found, (depth - target).abs().mean())
    whole = depth_loss(depth, target, cues=((depth, depth),), unc_weighting=False, uncertainty_weight=2.0)
    torch.testing.assert_close(whole.total, whole.silog + 2 * found)


# 9


def test_consistency_of_the_same_view_is_zero_and_pulls_one_side_only():
    one, view = maps(2, 1, 6, 8).requires_grad_(), [3, 2, 16, 12, 8, 6]
    two = one.detach().clone().requires_grad_()
    assert float(consistency_loss(one, two, view, view).detach()) == 0
    other = (maps(2, 1, 6, 8, seed=4)).requires_grad_()
    consistency_loss(one, other, view, view).backward()
    assert other.grad is None
    assert (one.grad != 0).any()


def plain_warp(depth, view_1, view_2, size):
    """Pixel by pixel, through the coordinates of the original image."""
    found = np.zeros(size)
    valid = np.zeros(size, dtype=bool)
    (x1, y1, w1, h1, n1, m1, f1), (x2, y2, w2, h2, n2, m2, f2) = (
        [*map(float, v), 0.0][:7] if len(v) == 6 else list(map(float, v)) for v in (view_1, view_2)
    )
    for v in range(size[0]):
        for u in range(size[1]):
            column = n2 - 1 - u if f2 else u
            x = (column + 0.5) * w2 / n2 - 0.5 + x2
            y = (v + 0.5) * h2 / m2 - 0.5 + y2
            s, t = (x + 0.5 - x1) * n1 / w1 - 0.5, (y + 0.5 - y1) * m1 / h1 - 0.5
            if not (-1e-9 <= s <= n1 - 1 + 1e-9 and -1e-9 <= t <= m1 - 1 + 1e-9):
                continue
            s = n1 - 1 - s if f1 else s
            i, j = min(max(int(t), 0), int(m1) - 2), min(max(int(s), 0), int(n1) - 2)
            a, b = t - i, s - j
            part = depth[i : i + 2, j : j + 2]
            found[v, u] = np.array([1 - a, a]) @ part @ np.array([1 - b, b])
            valid[v, u] = True
    return found, valid


@few
@given(st.data())
def test_the_warp_is_a_change_of_pixels(data):
    def view():
        numbers = [data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))]
        numbers += [data.draw(st.integers(6, 14)) for _ in range(2)] + [
            data.draw(st.integers(4, 18)) for _ in range(2)
        ]
        return [*numbers, data.draw(st.integers(0, 1))]

    one, two = view(), view()
    depth = maps(one[5], one[4], seed=data.draw(st.integers(0, 99)))
    size = (two[5], two[4])
    found, valid = warp(depth, one, two, size)
    expected, inside = plain_warp(depth.numpy(), one, two, size)
    np.testing.assert_array_equal(valid.numpy(), inside)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)
    whole = warp(
        depth[None, None].expand(2, 1, -1, -1), torch.tensor([one, one]), torch.tensor([two, two]), size
    )
    torch.testing.assert_close(whole[0][1, 0], found)


@few
@given(cameras(road=True), st.integers(0, 1))
def test_the_warped_road_is_the_road_of_the_other_view(camera, flip):
    """Crop, resize and flip of the camera agree with the warp of the pixels."""
    op_1, op_2 = [0, 0, camera.width, camera.height, 64, 48, 0], [2, 1, 10, 12, 20, 24, flip]
    views = []
    for x0, y0, w, h, new_w, new_h, mirrored in (op_1, op_2):
        made = camera.crop(x0, y0, w, h).resize(new_w, new_h)
        views.append(made.flip() if mirrored else made)
    # n . r is affine in the pixel, so that bilinear sampling is exact.
    one, two = (down_component(c, pixel_centers(c.height), pixel_centers(c.width)) for c in views)
    found, valid = warp(one, op_1, op_2, views[1].size)
    assert valid.any()
    torch.testing.assert_close(found[valid], two[valid], rtol=1e-7, atol=1e-9)


# Pooling over ranks


@pytest.mark.slow
def test_pooled_losses_of_two_ranks_are_those_of_one():
    value, *grads = pooled_loss(0, whole=True)
    for rank, (found, *found_grads) in enumerate(spawn(pooled_loss, 2, timeout=240)):
        assert found == pytest.approx(value, rel=1e-12)
        for got, whole in zip(found_grads, grads, strict=True):
            # Averaged over ranks, as DistributedDataParallel does it.
            np.testing.assert_allclose(got / 2, whole[rank : rank + 1], rtol=1e-9, atol=1e-15)


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda x: silog_loss(x, x[:1]),
            ShapeError,
            r"depth \(2, 1, 2, 2\), target \(1, 1, 2, 2\): wanted one shape",
        ),
        (lambda x: silog_loss(x, x, correction=2), ConfigError, "correction is 2, wanted 0 or 1"),
        (lambda x: uncertainty_loss(x, x[0], x), ShapeError, "log_uncertainty"),
        (lambda x: valid_mask(x, x), DataError, "mask is torch.float64, wanted torch.bool"),
        (
            lambda x: warp(x, [0, 0, 2], [0, 0, 2, 2, 2, 2], (2, 2)),
            ShapeError,
            r"view_1 has shape \(2, 3\), wanted",
        ),
        (lambda x: focal_weight(x, x, "max"), ConfigError, "fusion is 'max', wanted one of scale, variance"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(maps(2, 1, 2, 2))


def test_a_pooled_mean_of_nothing_is_zero():
    x = torch.full((3,), math.nan).requires_grad_()
    found = pooled_mean(x, torch.zeros(3, dtype=torch.bool))
    assert float(found.detach()) == 0
    found.backward()
    assert (x.grad == 0).all()


def test_bounded_is_affine_in_the_row():
    """1/D is affine in y: the middle of two rows is the harmonic mean of their depths."""
    z = torch.logit(double([0.2, 0.5, 0.8]))
    d = 1 / bounded_depth(z, Camera(**CAMERA | {"roll_deg": 0.0}), 200)
    assert float(d[1]) == pytest.approx(float(d[0] + d[2]) / 2, rel=1e-12)

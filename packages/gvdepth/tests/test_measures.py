"""Invariant 13 of section 8: the metrics, the order of clipping and masking, crops, pooling, bins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gvdepth_strategies import floats
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_core.errors import ConfigError, DataError, NonFiniteError, ShapeError
from gvdepth import metrics
from gvdepth.measures import CROPS, METRICS, crop_window, error_sums, from_sums, pool

few = settings(max_examples=60, deadline=None)
SHARES = ("d1", "d2", "d3")
holes = st.sampled_from([0.0, -1.0, math.nan, math.inf, 80.0, 80.5, 1e-3])


@st.composite
def pairs(draw, shape=None):
    size = shape or (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    count = math.prod(size)
    target = draw(st.lists(st.one_of(floats(0.01, 79.0), holes), min_size=count, max_size=count))
    prediction = draw(st.lists(floats(-5.0, 120.0), min_size=count, max_size=count))
    return np.array(prediction).reshape(size), np.array(target).reshape(size)


def plain(prediction, target, cap=80.0):
    """Metric by metric, by boolean indexing."""
    p = np.clip(prediction, 1e-3, cap)
    valid = (target > 1e-3) & (target <= cap) & np.isfinite(target)
    p, g = p[valid], target[valid]
    if not g.size:
        return dict.fromkeys(METRICS, math.nan)
    e, log = p - g, np.log(p) - np.log(g)
    worse = np.maximum(p / g, g / p)
    return {
        "abs_rel": np.mean(np.abs(e) / g),
        "sq_rel": np.mean(e**2 / g),
        "rmse": np.sqrt(np.mean(e**2)),
        "rmse_log": np.sqrt(np.mean(log**2)),
        "silog": 100 * np.sqrt(np.maximum(np.mean(log**2) - np.mean(log) ** 2, 0)),
        "log10": np.mean(np.abs(log)) / np.log(10),
        "irmse": 1000 * np.sqrt(np.mean((1 / p - 1 / g) ** 2)),
        "mae": np.mean(np.abs(e)),
        "d1": np.mean(worse < 1.25),
        "d2": np.mean(worse < 1.25**2),
        "d3": np.mean(worse < 1.25**3),
    }


def assert_close(found, expected, rel=1e-9):
    for name in METRICS:
        # silog is the root of a difference that may cancel to a few last digits.
        assert found[name] == pytest.approx(
            expected[name], rel=rel, abs=1e-4 if name == "silog" else 1e-12, nan_ok=True
        )


@few
@given(pairs())
def test_metrics_are_their_formulas(pair):
    expected = plain(*pair)
    for backend in ("numpy", "torch"):
        assert_close(metrics(*pair, backend=backend), expected)
    assert_close(metrics(*map(torch.as_tensor, pair)), expected)


@few
@given(pairs(), st.randoms(use_true_random=False))
def test_the_order_of_pixels_does_not_matter(pair, random):
    order = list(range(pair[0].size))
    random.shuffle(order)
    shuffled = [x.ravel()[order].reshape(1, -1) for x in pair]
    assert_close(metrics(*shuffled), metrics(*pair))


@few
@given(pairs())
def test_shares_are_nested_and_a_perfect_prediction_is_perfect(pair):
    found = metrics(*pair)
    if found["valid"]:
        assert 0 <= found["d1"] <= found["d2"] <= found["d3"] <= 1
        truth = np.where(np.isfinite(pair[1]), pair[1], 1.0)
        perfect = metrics(truth, pair[1])
        assert all(perfect[name] == (1.0 if name in SHARES else 0.0) for name in METRICS if name != "silog")
        assert perfect["silog"] == pytest.approx(0.0, abs=1e-5)
    else:
        assert all(math.isnan(found[name]) for name in METRICS)


def test_clipping_comes_before_the_mask_and_the_cap_is_valid():
    target = np.array([[80.0, 80.001, 10.0, 1e-3, 0.0]])
    prediction = np.array([[200.0, 80.0, -4.0, 5.0, 5.0]])
    found = metrics(prediction, target)
    assert found["valid"] == 2  # 80 m is valid, more is not, 1e-3 is not
    assert found["mae"] == pytest.approx((0.0 + 10.0 - 1e-3) / 2)
    assert metrics(np.array([[math.inf]]), np.array([[40.0]]))["mae"] == 40.0
    assert metrics(prediction, target, max_depth=math.inf)["valid"] == 3


def test_thresholds_are_strict():
    found = metrics(np.array([[12.5, 8.0, 12.4999]]), np.array([[10.0, 10.0, 10.0]]))
    assert found["d1"] == pytest.approx(1 / 3)


def test_an_empty_mask_gives_nan_and_no_pixels():
    for backend in ("numpy", "torch"):
        found = metrics(np.ones((2, 3)), np.zeros((2, 3)), backend=backend)
        assert found["valid"] == 0
        assert all(math.isnan(found[name]) for name in METRICS)


def test_crops():
    assert {name: crop_window(name, (375, 1242)) for name in ("garg", "eigen", "none")} == {
        "garg": (slice(153, 371), slice(44, 1197)),
        "eigen": (slice(124, 342), slice(44, 1197)),
        "none": (slice(0, 375), slice(0, 1242)),
    }
    target, prediction = np.full((20, 10), 10.0), np.full((20, 10), 10.0)
    prediction[:10] = 20.0
    assert metrics(prediction, target, crop=(0.5, 1.0, 0.0, 1.0))["mae"] == 0
    assert metrics(prediction, target, crop=(0.0, 1.0, 0.0, 0.5))["valid"] == 100
    assert set(CROPS) == {"none", "garg", "eigen"}
    mask = np.zeros((20, 10), dtype=bool)
    mask[12:, 3] = True
    found = metrics(prediction, target, mask=mask, crop=CROPS["garg"])
    assert found["valid"] == int(mask[crop_window("garg", (20, 10))].sum()) > 0


@few
@given(st.lists(pairs((3, 4)), min_size=1, max_size=4))
def test_batches_pool_by_image_or_by_pixel(images):
    batch = [np.stack(x) for x in zip(*images, strict=True)]
    each = [metrics(*pair) for pair in images]
    seen = [x for x in each if x["valid"]]
    for backend in ("numpy", "torch"):
        found = metrics(*batch, backend=backend)
        assert_close(found, {n: np.mean([x[n] for x in seen]) if seen else math.nan for n in METRICS})
        assert found["valid"] == sum(x["valid"] for x in each)
        assert_close(
            metrics(*batch, pooling="pixel", backend=backend), plain(*(x.reshape(1, -1) for x in batch))
        )
    channels = [x[:, None] for x in batch]
    assert_close(metrics(*channels), metrics(*batch))


@few
@given(st.lists(pairs((3, 4)), min_size=1, max_size=3))
def test_bins_add_up(images):
    batch = [np.stack(x) for x in zip(*images, strict=True)]
    edges = [0.0, 5.0, 20.0, 80.0]
    for backend in ("numpy", "torch"):
        parts = error_sums(*batch, bins=edges, backend=backend)
        assert parts.shape == (len(images), 3, 12)
        np.testing.assert_allclose(parts.sum(1), error_sums(*batch, backend=backend), rtol=1e-9, atol=1e-9)
        near = np.where((batch[1] > 5.0) & (batch[1] <= 20.0), batch[1], 0.0)
        np.testing.assert_allclose(
            parts[:, 1], error_sums(batch[0], near, backend=backend), rtol=1e-9, atol=1e-9
        )


def test_pooling_does_not_depend_on_the_order_of_images():
    generator = np.random.default_rng(0)
    sums = error_sums(generator.uniform(1, 50, (7, 5, 5)), generator.uniform(1, 50, (7, 5, 5)))
    for pooling in ("image", "pixel"):
        assert pool(sums, pooling) == pool(sums[::-1], pooling)  # bit by bit
    assert from_sums(sums)["valid"].tolist() == [25.0] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_predictions(dtype, device):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 1, 8, 9, generator=generator).to(device) * 50 + 1
    prediction = (target * 1.1).to(dtype)
    found = metrics(prediction, target)
    expected = plain(prediction.double().cpu().numpy(), target.double().cpu().numpy())
    assert found["abs_rel"] == pytest.approx(expected["abs_rel"], rel=1e-2)
    other = metrics(prediction, target, backend="torch")
    assert other["rmse"] == pytest.approx(found["rmse"], rel=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda x: metrics(x, x[:1]),
            ShapeError,
            r"prediction has shape \(2, 3\), wanted that of target, \(1, 3\)",
        ),
        (lambda x: metrics(x[0], x[0]), ShapeError, r"target has shape \(3,\), wanted \(h, w\)"),
        (
            lambda x: metrics(x, x, max_depth=0.0),
            ConfigError,
            "max_depth 0.0, wanted 0 < min_depth < max_depth",
        ),
        (lambda x: metrics(x, x, crop="carg"), ConfigError, "crop is 'carg', wanted none, garg, eigen"),
        (lambda x: metrics(x, x, crop=(0.5, 0.2, 0, 1)), ConfigError, "wanted fractions"),
        (lambda x: metrics(x, x, backend="cupy"), ConfigError, "backend is 'cupy'"),
        (
            lambda x: metrics(x, x, pooling="mean"),
            ConfigError,
            "pooling is 'mean', wanted 'image' or 'pixel'",
        ),
        (lambda x: metrics(x, x, mask=x), DataError, "mask is float64, wanted bool"),
        (
            lambda x: metrics(x, x, mask=x, backend="torch"),
            DataError,
            "mask is torch.float64, wanted torch.bool",
        ),
        (lambda x: error_sums(x, x, bins=[5.0]), ConfigError, "wanted at least two increasing edges"),
        (lambda x: error_sums(x, x, bins=[5.0, 1.0]), ConfigError, "wanted at least two increasing edges"),
        (lambda x: metrics(x * math.nan, x), NonFiniteError, "prediction is NaN at valid pixels of image 0"),
        (lambda x: metrics(x * math.nan, x, backend="torch"), NonFiniteError, "prediction is NaN"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(np.full((2, 3), 5.0))

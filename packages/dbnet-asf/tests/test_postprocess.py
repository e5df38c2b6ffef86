"""Maps to boxes and polygons: equivariance, monotony, the round trip, options, bad input, fuzz."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dbnet_asf import plain
from dbnet_asf.config import PostConfig
from dbnet_asf.geometry import area, offset, perimeter, rectangle_corners
from dbnet_asf.postprocess import PostProcess, polygons_from_map, quads_from_map, regions_from_map
from fusion_core.errors import ConfigError, FusionError, InputError, ShapeError


def page(seed=0, shape=(160, 240), count=14):
    """A map of blurred rotated bars that do not touch."""
    random = np.random.default_rng(seed)
    prob, taken = np.zeros(shape, np.float32), np.zeros(shape, np.uint8)
    for _ in range(count * 4):
        rect = (
            (random.uniform(0.2, 0.8) * shape[1], random.uniform(0.2, 0.8) * shape[0]),
            (random.uniform(18, 46), random.uniform(7, 12)),
            random.uniform(-40, 40),
        )
        wide = (rect[0], (rect[1][0] + 10, rect[1][1] + 10), rect[2])
        around = cv2.fillPoly(np.zeros(shape, np.uint8), [np.int32(cv2.boxPoints(wide))], 1)
        if not (around & taken).any():
            taken |= around
            cv2.fillPoly(prob, [np.int32(cv2.boxPoints(rect))], float(random.uniform(0.6, 1.0)))
    return np.clip(cv2.GaussianBlur(prob, (0, 0), 0.8), 0, 1)


def iou(first, second):
    a, b = shapely.Polygon(first).buffer(0), shapely.Polygon(second).buffer(0)
    return a.intersection(b).area / max(a.union(b).area, 1e-9)


def assert_same_outlines(ours, theirs, least=0.95):
    assert len(ours) == len(theirs) > 0
    for outline in ours:
        assert max(iou(outline, other) for other in theirs) >= least


BOTH = pytest.mark.parametrize("find", [quads_from_map, polygons_from_map])
SEEDS = st.integers(0, 10_000)


@BOTH
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, shift=st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
def test_translation(find, seed, shift):
    prob = page(seed)
    moved = np.roll(prob, shift, (0, 1))
    ours, _ = find(moved, box_thresh=0.4)
    theirs, _ = find(prob, box_thresh=0.4)
    assert_same_outlines(ours, [outline + shift[::-1] for outline in theirs])


@BOTH
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS)
def test_transposition(find, seed):
    prob = page(seed)
    ours, _ = find(np.ascontiguousarray(prob.T), box_thresh=0.4)
    theirs, _ = find(prob, box_thresh=0.4)
    assert_same_outlines(ours, [outline[:, ::-1] for outline in theirs])


@BOTH
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, low=st.floats(0.3, 0.9), high=st.floats(0.3, 0.9))
def test_raising_the_score_threshold_only_removes(find, seed, low, high):
    low, high = sorted((low, high))
    prob = page(seed)
    some, scores = find(prob, box_thresh=high)
    every, _ = find(prob, box_thresh=low)
    assert all(any(np.array_equal(outline, other) for other in every) for outline in some)
    assert (scores >= np.float32(high)).all()


@BOTH
def test_the_order_of_contours_does_not_matter(find, monkeypatch):
    prob = page(3)
    before, _ = find(prob, box_thresh=0.4)
    trace = cv2.findContours

    def backward(*arguments):
        contours, hierarchy = trace(*arguments)
        return contours[::-1], None if hierarchy is None else hierarchy[:, ::-1]

    monkeypatch.setattr(cv2, "findContours", backward)
    after, _ = find(prob, box_thresh=0.4)
    key = lambda outline: np.asarray(outline).tobytes()
    assert sorted(map(key, before)) == sorted(map(key, after))


def test_round_trip_of_drawn_labels():
    random, found = np.random.default_rng(0), []
    for _ in range(300):
        rect = np.array(
            [[128, 128, random.uniform(16, 120), random.uniform(16, 60), random.uniform(-90, 90)]]
        )
        truth = rectangle_corners(rect)[0]
        distance = area(truth) * (1 - 0.4**2) / perimeter(truth)
        shrunk = offset(truth, -distance)[0]
        prob = np.zeros((256, 256), np.float32)
        cv2.fillPoly(prob, [shrunk.astype(np.int32)], 1.0)
        ratio = distance * perimeter(shrunk) / area(shrunk)
        quads, _ = quads_from_map(prob, unclip_ratio=float(ratio))
        assert len(quads) == 1
        found.append(iou(quads[0], truth))
    assert min(found) >= 0.7
    assert np.mean(found) >= 0.88


@pytest.mark.parametrize("mode", ["quad", "polygon"])
def test_official_equals_the_plain_reference(mode):
    prob, size = page(5), (320, 500)
    function = plain.quads if mode == "quad" else plain.polygons
    wanted, scores = function(prob, size, thresh=0.3, box_thresh=0.5)
    config = PostConfig.official(mode).replace(box_thresh=0.5)
    found = regions_from_map(prob, size, config)
    assert len(found.outlines) == len(wanted) > 3
    for ours, theirs in zip(found.outlines, wanted, strict=True):
        assert np.abs(np.asarray(ours) - theirs).max() <= 1
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)


def test_caps():
    prob = page(2)
    every, scores = quads_from_map(prob, box_thresh=0.3)
    best, kept = quads_from_map(prob, box_thresh=0.3, max_candidates=3)
    assert sorted(kept) == sorted(sorted(scores)[-3:])
    first, _ = quads_from_map(prob, box_thresh=0.3, max_candidates=3, cap="official", contours="official")
    np.testing.assert_array_equal(first, every[:3])
    assert not np.array_equal(first, best)
    polygons, tops = polygons_from_map(prob, box_thresh=0.3, max_candidates=2)
    assert len(polygons) == len(tops) == 2


def test_holes():
    prob = np.zeros((80, 120), np.float32)
    prob[10:70, 10:110] = 0.9
    prob[25:55, 30:90] = 0.45
    config = PostConfig(thresh=0.5, box_thresh=0.3)
    assert len(quads_from_map(prob, config=config)[0]) == 1
    assert len(quads_from_map(prob, config=config, contours="official")[0]) == 2
    prob[35:45, 45:75] = 0.9  # text inside the hole is found as well
    assert len(quads_from_map(prob, config=config)[0]) == 2


def test_scores():
    prob = np.zeros((60, 120), np.float32)
    cv2.ellipse(prob, (60, 60), (50, 50), 0, 200, 340, 0.9, 6)  # an arc: its rectangle is mostly empty
    slow = quads_from_map(prob, box_thresh=0.0, score="slow")[1]
    fast = quads_from_map(prob, box_thresh=0.0, score="fast")[1]
    component = quads_from_map(prob, box_thresh=0.0, score="component")[1]
    assert fast[0] < 0.5 < slow[0]
    assert component[0] == pytest.approx(0.9, abs=1e-6)
    prob = np.zeros((60, 120), np.float32)
    prob[20:40, 20:100] = 0.8
    prob[28:32, 40:80] = 0.0
    full, part = (quads_from_map(prob, box_thresh=0.0, score=s)[1][0] for s in ("component", "slow"))
    assert full == pytest.approx(0.8, abs=1e-6)
    assert part < 0.79


def test_dilation_joins_what_nearly_touches():
    prob = np.zeros((40, 90), np.float32)
    prob[10:20, 10:40] = prob[10:20, 41:80] = 0.9
    assert len(quads_from_map(prob)[0]) == 2
    assert len(quads_from_map(prob, dilation=True)[0]) == 1


def test_several_polygons_after_growing():
    ring = np.zeros((120, 120), np.float32)
    cv2.ellipse(ring, (60, 60), (44, 44), 0, 20, 340, 1.0, 3)
    keep = {"box_thresh": 0.3, "score": "component", "epsilon": 0.0, "unclip_ratio": 14.0}
    kept, _ = polygons_from_map(ring, several="largest", **keep)
    dropped, _ = polygons_from_map(ring, several="drop", **keep)
    assert len(kept) == 1
    assert not dropped
    assert area(kept[0].astype(float)) > 100 * 100 * 0.6


def test_scaling_and_types(device):
    prob = torch.from_numpy(page(4))[None, None].to(device)
    quads, scores = quads_from_map(prob, (640, 720))
    small, _ = quads_from_map(prob)
    np.testing.assert_allclose(quads, small * np.array([720 / 240, 640 / 160], np.float32), rtol=1e-5)
    assert quads.dtype == scores.dtype == np.float32
    rounded, _ = quads_from_map(prob, (70_000, 70_000), round=True)
    assert (rounded == np.rint(rounded)).all()
    assert rounded.max() > 32767  # the authors' 16 bits wrap here
    half = quads_from_map(prob.to(torch.bfloat16))[0]
    assert len(half) == len(quads)


def test_batches():
    maps = np.stack([page(1), page(2), np.zeros((160, 240), np.float32)])[:, None]
    process = PostProcess(box_thresh=0.4)
    outlines, scores = process(maps, [(160, 240), (320, 480), (10, 10)])
    alone, _ = quads_from_map(maps[1], (320, 480), box_thresh=0.4)
    np.testing.assert_array_equal(outlines[1], alone)
    assert len(outlines[2]) == len(scores[2]) == 0
    polygons, _ = PostProcess(mode="polygon", box_thresh=0.4)(torch.from_numpy(maps))
    assert [len(each) for each in polygons] == [len(each) for each in outlines]
    with pytest.raises(ShapeError, match="sizes holds 2 sizes for 3 maps"):
        process(maps, [(1, 1)] * 2)
    with pytest.raises(ShapeError, match="batch, 1, height, width"):
        process(np.zeros((2, 3, 8, 8)))


def test_uncertainty():
    sharp = np.zeros((60, 120), np.float32)
    sharp[20:40, 20:100] = 1.0
    soft = cv2.GaussianBlur(sharp, (0, 0), 3)
    values = [regions_from_map(each, uncertainty=True).uncertainty[0] for each in (sharp, soft)]
    assert values[0] == 0
    assert 0.1 < values[1] <= 0.25
    assert regions_from_map(sharp).uncertainty is None


BAD = [
    (np.zeros((2, 3, 8, 8)), ShapeError, "(2, 3, 8, 8)"),
    (np.zeros((0, 8)), ShapeError, "(0, 8)"),
    (np.full((8, 8), 1.5), InputError, "[0, 1]"),
    (np.full((8, 8), np.nan), InputError, "nan"),
    (np.full((8, 8), -0.1), InputError, "-0.1"),
    (np.full((8, 8), "x"), InputError, "dtype"),
]


@BOTH
@pytest.mark.parametrize(("prob", "error", "words"), BAD)
def test_bad_maps(find, prob, error, words):
    with pytest.raises(error) as told:
        find(prob)
    assert "prob" in str(told.value)
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"box_thresh": 1.5}, "box_thresh"),
        ({"thresh": -1}, "thresh"),
        ({"unclip_ratio": -2.0}, "unclip_ratio"),
        ({"box_tresh": 0.5}, "box_thresh"),
    ],
)
def test_bad_settings(settings_, words):
    with pytest.raises(ConfigError, match=words):
        quads_from_map(np.zeros((8, 8)), **settings_)


def test_bad_size():
    with pytest.raises(ShapeError, match="size"):
        quads_from_map(np.zeros((8, 8)), (0, 5))


maps = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.one_of(st.sampled_from([0.0, 0.2, 0.31, 0.9, 1.0]), st.floats(0, 1, width=32)),
)


@settings(max_examples=150, deadline=2000)
@given(
    maps,
    st.sampled_from(["quad", "polygon"]),
    st.sampled_from(["fast", "slow", "component"]),
    st.sampled_from(["ours", "official"]),
    st.booleans(),
    st.sampled_from([None, 1, 3]),
    st.floats(0, 4),
)
def test_any_map_is_done(prob, mode, score, compat, dilation, cap, ratio):
    config = PostConfig(
        mode=mode,
        score=score,
        compat=compat,
        dilation=dilation,
        max_candidates=cap,
        unclip_ratio=ratio,
        box_thresh=0.2,
        min_size=0.0,
    )
    found = regions_from_map(prob, (50, 60), config, uncertainty=True)
    assert len(found.outlines) == len(found.scores) == len(found.uncertainty)
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    for outline in found.outlines:
        assert np.isfinite(outline).all()
        assert (outline >= 0).all()
        assert (outline <= [60, 50]).all()


@settings(max_examples=80, deadline=2000)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int16, np.uint8, np.bool_]),
        hnp.array_shapes(max_dims=5, max_side=6),
    )
)
def test_any_array_is_done_or_refused(array):
    try:
        quads, scores = quads_from_map(array)
    except FusionError:
        return
    assert len(quads) == len(scores)

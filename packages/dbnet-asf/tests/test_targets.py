"""Labels: invariants 3 to 5 and what is wrong with polygons."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet_asf.config import LabelConfig
from dbnet_asf.geometry import area, offset
from dbnet_asf.targets import Targets, make_targets, shrink_distance, shrink_map, threshold_map
from fusion_core.errors import ConfigError, InputError, NonFiniteError, ShapeError

HEIGHT, WIDTH = 96, 128
PRECISE = LabelConfig(distance="exact", precise=True)


def rectangle(center, sides, degrees):
    box = cv2.boxPoints(((float(center[0]), float(center[1])), (float(sides[0]), float(sides[1])), degrees))
    return np.asarray(box, np.float64)


@st.composite
def words(draw, shortest=10):
    center = draw(st.tuples(st.floats(30, 98), st.floats(30, 66)))
    sides = draw(st.tuples(st.floats(20, 50), st.floats(shortest, 24)))
    return rectangle(center, sides, draw(st.floats(-40, 40)))


def filled(polygon, grow=0):
    image = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.fillPoly(image, [np.rint(polygon).astype(np.int32)], 1)
    return cv2.dilate(image, np.ones((2 * grow + 1,) * 2, np.uint8)) if grow else image


@given(words(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_shrunk_inside_polygon_inside_grown(word, precise):
    config = LabelConfig(precise=precise)
    targets = make_targets([word], None, (HEIGHT, WIDTH), config)
    inside = filled(word, grow=1).astype(bool)
    assert targets.gt.any()
    assert not (targets.gt.numpy() & ~inside).any()
    clipped = filled(np.clip(word, 0, (WIDTH - 1, HEIGHT - 1))).astype(bool)
    grown = cv2.dilate(targets.thresh_mask.numpy().astype(np.uint8), np.ones((3, 3))).astype(bool)
    assert not (clipped & ~grown).any()


@given(words())
@settings(max_examples=40, deadline=None)
def test_smaller_ratio_smaller_region(word):
    areas, pixels = [], []
    for ratio in (0.9, 0.7, 0.5, 0.3):
        areas.append(sum(area(piece) for piece in offset(word, -shrink_distance(word, ratio))))
        gt, _, _ = shrink_map([word], [False], (HEIGHT, WIDTH), shrink_ratio=ratio, precise=True)
        pixels.append(int(gt.sum()))
    assert areas == sorted(areas, reverse=True)  # of pixels a thin region may gain some where it loses area
    assert areas[0] > areas[-1]
    assert pixels[0] > pixels[-1]


def polygons_of(moved):
    return [np.asarray(polygon) for polygon in moved]


MOVES = {
    "horizontal flip": (lambda p: np.stack([WIDTH - 1 - p[:, 0], p[:, 1]], 1), lambda x: x[:, ::-1]),
    "vertical flip": (lambda p: np.stack([p[:, 0], HEIGHT - 1 - p[:, 1]], 1), lambda x: x[::-1]),
    "rotation": (lambda p: np.stack([p[:, 1], WIDTH - 1 - p[:, 0]], 1), lambda x: np.rot90(x)),
}


@pytest.mark.parametrize("name", MOVES)
@given(word=words())
@settings(max_examples=25, deadline=None)
def test_labels_commute_with_flips_and_rotation(name, word):
    points, image = MOVES[name]
    size = (WIDTH, HEIGHT) if name == "rotation" else (HEIGHT, WIDTH)
    before = make_targets([word], None, (HEIGHT, WIDTH), PRECISE)
    after = make_targets([points(word)], None, size, PRECISE)
    for key in ("gt", "thresh_mask"):
        a, b = image(getattr(before, key).numpy()), getattr(after, key).numpy()
        wide = np.ones((5, 5), np.uint8)
        near = cv2.dilate(a.astype(np.uint8), wide) - cv2.erode(a.astype(np.uint8), wide)
        assert not ((a != b) & (near == 0)).any(), key  # only the outermost pixels may differ
    both = image(before.thresh_mask.numpy()) & after.thresh_mask.numpy()
    a, b = image(before.thresh_map.numpy())[both], after.thresh_map.numpy()[both]
    np.testing.assert_allclose(a, b, atol=1e-4)


@given(words(shortest=11))  # smaller by a fifth, a side of 10 may fall below `min_size`
@settings(max_examples=25, deadline=None)
def test_ignored_polygons_elsewhere_change_the_mask_alone(word):
    other = rectangle((20, 85), (16, 10), 0)
    word = word * 0.8 + np.array([25, 0])
    one = make_targets([word], None, (HEIGHT, WIDTH))
    two = make_targets([word, other], [False, True], (HEIGHT, WIDTH))
    for key in ("gt", "thresh_map", "thresh_mask"):
        assert torch.equal(getattr(one, key), getattr(two, key)), key
    assert (one.mask != two.mask).any()
    assert two.ignore == (False, True)


@pytest.mark.parametrize("distance", ["official", "exact", "raster"])
@given(word=words())
@settings(max_examples=25, deadline=None)
def test_threshold_map_bounds(distance, word):
    values, mask = threshold_map([word], [False], (HEIGHT, WIDTH), distance=distance)
    assert values.min() >= np.float32(0.3)
    assert values.max() <= np.float32(0.7)
    assert set(np.unique(mask)) <= {0, 1}
    assert values.max() > 0.6
    if distance == "raster":
        exact, _ = threshold_map([word], [False], (HEIGHT, WIDTH), distance="exact")
        assert np.abs(values - exact).max() < 0.15


def test_exact_distance_is_the_distance_to_the_segment():
    word = np.array([[20.0, 20.0], [90.0, 30.0], [85.0, 60.0], [15.0, 50.0]])
    values, _ = threshold_map([word], [False], (HEIGHT, WIDTH), distance="exact", precise=True)
    reach = 0.84 * cv2.contourArea(word.astype(np.float32)) / cv2.arcLength(word.astype(np.float32), True)
    for x, y in ((40, 40), (16, 44), (60, 30), (88, 45)):
        away = abs(cv2.pointPolygonTest(word.astype(np.float32), (float(x), float(y)), True))
        assert abs(values[y, x] - (0.3 + 0.4 * max(0.0, 1 - away / reach))) < 1e-4


def test_outside_the_image_is_no_error():
    far = np.array([[500.0, 500.0], [600.0, 500.0], [600.0, 540.0], [500.0, 540.0]])
    targets = make_targets([far], None, (64, 64))
    assert targets.ignore == (True,)
    assert not targets.gt.any()
    values, mask = threshold_map([far], [False], (64, 64))  # the authors' code raises on broadcasting
    assert not mask.any()
    assert (values == np.float32(0.3)).all()
    half = np.array([[-30.0, 10.0], [40.0, 10.0], [40.0, 40.0], [-30.0, 40.0]])
    assert make_targets([half], None, (64, 64)).gt.any()


def test_line_and_point_are_ignored():
    line, point = [[5, 5], [50, 5], [20, 5]], [[9, 9], [9, 9], [9, 9]]
    for training in (True, False):
        targets = make_targets([line, point], None, (64, 64), training=training)
        assert targets.ignore == (True, True)
        assert not targets.thresh_mask.any()


def test_pieces():
    left = [[5, 45], [5, 5], [45, 5], [45, 18]]
    right = [[80, 18], [80, 5], [120, 5], [120, 45], [80, 45], [80, 21], [45, 21], [45, 45]]
    dumbbell = left + right
    first = make_targets([dumbbell], None, (50, 128))
    every = make_targets([dumbbell], None, (50, 128), LabelConfig(pieces="all"))
    assert cv2.connectedComponents(first.gt.numpy().astype(np.uint8))[0] == 2
    assert cv2.connectedComponents(every.gt.numpy().astype(np.uint8))[0] == 3


@pytest.mark.parametrize(
    ("polygons", "ignore", "size", "error", "words"),
    [
        ([[[1, 1], [2, 2]]], None, (9, 9), ShapeError, r"polygons\[0\] has shape \(2, 2\), wanted"),
        ([[[1, 1, 1]] * 4], None, (9, 9), ShapeError, r"polygons\[0\] has shape \(4, 3\)"),
        ([[[1, 1], [2, np.nan], [3, 1]]], None, (9, 9), NonFiniteError, r"polygons\[0\] holds non-finite"),
        ([[[1, 1], [5, 1], [5, 5]]], [True, False], (9, 9), InputError, "ignore has 2 flags for 1 polygons"),
        ([], None, (0, 9), InputError, r"size is \(0, 9\), wanted"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(polygons, ignore, size, error, words):
    with pytest.raises(error, match=words):
        make_targets(polygons, ignore, size)


def test_bad_settings_get_a_sentence():
    with pytest.raises(ConfigError, match=r"shrink_ratio is 1.0, wanted a number in \(0, 1\)"):
        LabelConfig(shrink_ratio=1.0)
    with pytest.raises(ConfigError, match=r"thresh_min is 0.7 and thresh_max 0.3, wanted min < max"):
        LabelConfig(thresh_min=0.7, thresh_max=0.3)
    with pytest.raises(ConfigError, match="distance is 'near'"):
        LabelConfig(distance="near")
    with pytest.raises(ConfigError, match="shrink_ratio is 0"):
        shrink_map([], [], (8, 8), shrink_ratio=0)
    with pytest.raises(InputError, match="items is empty"):
        Targets.stack([])

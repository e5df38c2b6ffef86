"""Offsets, corner order, repair, rectification, reading order; the polygon code under fuzz."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dbnet_asf import geometry as g
from fusion_core.errors import ConfigError, FusionError, InputError, NonFiniteError, ShapeError

sides = st.floats(4, 200)
angles = st.floats(-90, 90)
SQUARE = np.array([[0, 0], [10, 0], [10, 10], [0, 10]], float)


def rectangle(width, height, angle, center=(300.0, 300.0)):
    return np.array([[*center, width, height, angle]])


def iou(first, second):
    a, b = shapely.Polygon(first).buffer(0), shapely.Polygon(second).buffer(0)
    return a.intersection(b).area / a.union(b).area


@settings(max_examples=60, deadline=None)
@given(sides, sides, angles, st.floats(0.1, 3.0))
def test_the_closed_form_equals_the_clipper(width, height, angle, ratio):
    rect = rectangle(width, height, angle)
    corners = g.rectangle_corners(rect)[0]
    (clipped,) = g.unclip(corners, ratio)
    wanted = g.rectangle_corners(g.unclip_rectangles(rect, ratio))[0]
    found = cv2.boxPoints(g_min(clipped))
    # the clipper's integers are 1/1024 pixel wide, and float32 near 300 resolves 3e-5
    apart = np.linalg.norm(wanted[:, None] - found[None], axis=2).min(1)
    assert apart.max() <= 0.01 + 2e-3 * max(width, height) / min(width, height)
    assert abs(shapely.Polygon(wanted).area / shapely.Polygon(found).area - 1) < 2e-3


def g_min(points):
    x, y, w, h, a = g.minimum_rectangle(points)
    return (x, y), (w, h), a


@settings(max_examples=60, deadline=None)
@given(st.floats(12, 200), st.floats(12, 200), angles)
def test_unclip_undoes_shrinking(width, height, angle):
    corners = g.rectangle_corners(rectangle(width, height, angle))[0]
    distance = g.area(corners) * (1 - 0.4**2) / g.perimeter(corners)
    shrunk = g.offset(corners, -distance)
    assert len(shrunk) == 1
    x, y, w, h, a = g.minimum_rectangle(shrunk[0])
    ratio = distance * g.perimeter(shrunk[0]) / g.area(shrunk[0])
    back = g.rectangle_corners(g.unclip_rectangles(np.array([[x, y, w, h, a]]), ratio))[0]
    apart = np.linalg.norm(corners[:, None] - back[None], axis=2).min(1)
    assert apart.max() < 1.0


@settings(max_examples=60, deadline=None)
@given(st.floats(10, 200), st.floats(10, 200), angles, st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_shrunk_lies_in_polygon_lies_in_dilated(width, height, angle, r, other):
    corners = g.rectangle_corners(rectangle(width, height, angle))[0]
    polygon = shapely.Polygon(corners)
    areas = []
    for ratio in sorted((r, other)):
        distance = g.area(corners) * (1 - ratio**2) / g.perimeter(corners)
        (dilated,) = g.offset(corners, distance)
        assert shapely.Polygon(dilated).buffer(0.01).contains(polygon)
        shrunk = g.offset(corners, -distance)
        assert all(polygon.buffer(0.01).contains(shapely.Polygon(piece)) for piece in shrunk)
        areas.append(sum(shapely.Polygon(piece).area for piece in shrunk))
    assert areas[0] <= areas[1] + 0.05  # the smaller r shrinks more


def test_the_official_offset_truncates():
    (grown,) = g.offset(SQUARE + 0.9, 2.0, scale=1)
    assert grown.min(0).tolist() == [-2, -2]
    assert grown.max(0).tolist() == [12, 12]
    (precise,) = g.offset(SQUARE + 0.9, 2.0)
    np.testing.assert_allclose(precise.min(0), [-1.1, -1.1], atol=2e-3)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, (5, 4, 2), elements=st.integers(-50, 50)))
def test_corner_order_by_its_rule(quads):
    ordered = g.order_corners(quads)
    for quad, found in zip(quads, ordered, strict=True):
        points = sorted(quad.tolist(), key=lambda p: p[0])
        left, right = points[:2], points[2:]
        top_left, bottom_left = left if left[1][1] > left[0][1] else left[::-1]
        top_right, bottom_right = right if right[1][1] > right[0][1] else right[::-1]
        assert found.tolist() == [top_left, top_right, bottom_right, bottom_left]


def test_corners_agree_with_opencv():
    random = np.random.default_rng(0)
    rects = np.column_stack(
        [random.uniform(0, 2000, (50, 2)), random.uniform(3, 200, (50, 2)), random.uniform(-90, 90, 50)]
    )
    rects = rects.astype(np.float32)
    wanted = [cv2.boxPoints(((x, y), (w, h), a)) for x, y, w, h, a in rects.tolist()]
    np.testing.assert_allclose(g.rectangle_corners(rects), wanted, atol=2e-3)


def test_area_and_perimeter_are_exact_far_from_the_origin():
    assert g.area(SQUARE + 1e7) == 100
    assert g.perimeter(SQUARE) == 40
    assert g.area(np.stack([SQUARE, 2 * SQUARE])).tolist() == [100, 400]


def test_make_valid():
    assert g.make_valid(SQUARE) is not None
    bow = [[0, 0], [10, 10], [10, 0], [0, 6]]
    part = g.make_valid(bow)
    assert shapely.Polygon(part).is_valid
    assert 0 < shapely.Polygon(part).area < 60
    assert g.make_valid([[0, 0], [5, 5], [10, 10]]) is None
    assert g.make_valid([[1, 1], [1, 1], [1, 1]]) is None


def bent(points=14, radius=80.0, thick=24.0, arc=2.2):
    theta = np.linspace(-arc / 2, arc / 2, points // 2)
    ring = lambda r: np.stack([150 + r * np.sin(theta), 140 - r * np.cos(theta)], 1)
    return np.concatenate([ring(radius + thick / 2), ring(radius - thick / 2)[::-1]])


@pytest.mark.parametrize("start", [0, 3, 9])
@pytest.mark.parametrize("reverse", [False, True])
def test_curved_text_is_straightened(start, reverse):
    polygon = bent(28)
    angle = np.arctan2(
        *(np.mgrid[:300, :300][::-1] - np.array([150, 140])[:, None, None]) * np.array([1, -1])[:, None, None]
    )
    image = np.clip((angle / 2.2 + 0.5) * 255, 0, 255).astype(np.uint8)  # grows along the arc, left to right
    turned = np.roll(polygon[::-1] if reverse else polygon, start, 0)
    strip = g.rectify(image, turned).astype(float)
    assert abs(strip.shape[0] - 24) <= 3
    assert abs(strip.shape[1] - 80 * 2.2) <= 14
    columns = strip.mean(0)
    assert columns[0] < 40
    assert columns[-1] > 215
    assert (np.diff(columns) > -0.5).all()
    assert strip.std(0).max() < 6  # a column lies along one radius


def test_the_upper_side_stays_up():
    image = np.zeros((300, 300, 3), np.uint8)
    cv2.circle(image, (150, 140), 92, (255, 0, 0), 6)  # red outside, blue inside
    cv2.circle(image, (150, 140), 68, (0, 0, 255), 6)
    strip = g.rectify(image, np.roll(bent(28)[::-1], 5, 0))
    assert strip[1, strip.shape[1] // 2, 0] > 128
    assert strip[-2, strip.shape[1] // 2, 2] > 128


def test_quads_are_cut_and_turned():
    image = np.arange(60 * 80, dtype=np.float32).reshape(60, 80)
    cut = g.rectify(image, [[10, 5], [30, 5], [30, 15], [10, 15]])
    np.testing.assert_allclose(cut, image[5:15, 10:30], atol=1e-3)
    tall = g.rectify(image, [[10, 5], [20, 5], [20, 45], [10, 45]])
    assert tall.shape == (10, 40)
    np.testing.assert_allclose(tall, np.rot90(image[5:45, 10:20]), atol=1e-3)
    assert g.rectify(image, [[10, 5], [20, 5], [20, 45], [10, 45]], upright=False).shape == (40, 10)
    assert g.rectify(image, [[10, 5], [30, 5], [30, 15], [10, 15]], height=32).shape == (32, 64)
    assert g.rectify(image, [[-50, -5], [300, -5], [300, 15], [-50, 15]]).shape == (20, 350)


def box(x, y, w=40, h=12):
    return np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]], float)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.floats(-20, 20), st.randoms(use_true_random=False))
def test_reading_order_of_skewed_lines(lines, words, skew, shuffle):
    boxes = [box(60 * column, 30 * line) for line in range(lines) for column in range(words)]
    turn = cv2.getRotationMatrix2D((100, 100), skew, 1.0)
    boxes = [points @ turn[:, :2].T + turn[:, 2] for points in boxes]
    order = list(range(len(boxes)))
    shuffle.shuffle(order)
    assert [order[i] for i in g.reading_order([boxes[i] for i in order])] == list(range(len(boxes)))


def test_reading_order_of_columns():
    left = [box(0, 20 * row) for row in range(4)]
    right = [box(120, 20 * row) for row in range(4)]
    both = [entry for pair in zip(left, right, strict=True) for entry in pair]
    assert g.reading_order(both) == list(range(8))
    assert g.reading_order(both, columns=True) == [0, 2, 4, 6, 1, 3, 5, 7]
    assert g.reading_order([]) == []


BAD = [
    ([[0, 0], [1, 1]], ShapeError, "at least 3 points"),
    (np.zeros((4, 3)), ShapeError, "(4, 3)"),
    ([[0, 0], [1, np.nan], [2, 2]], NonFiniteError, "non-finite"),
    ([[0, 0], [1e8, 0], [2, 2]], InputError, "2**24"),
    ("word", ShapeError, "no array"),
]


@pytest.mark.parametrize(("points", "error", "words"), BAD)
@pytest.mark.parametrize("function", [g.make_valid, g.unclip, g.fold, lambda p: g.offset(p, 1.0)])
def test_bad_polygons(function, points, error, words):
    with pytest.raises(error) as told:
        function(points)
    assert words in str(told.value)


def test_bad_numbers():
    with pytest.raises(ConfigError, match="unclip_ratio"):
        g.unclip(SQUARE, -1.0)
    with pytest.raises(NonFiniteError, match="distance"):
        g.offset(SQUARE, float("nan"))
    with pytest.raises(ShapeError, match="image"):
        g.rectify(np.zeros((0, 3)), SQUARE)
    with pytest.raises(InputError, match="no length"):
        g.fold([[1, 1], [1, 1], [1, 1]])


coordinates = st.one_of(
    st.integers(-40, 40), st.floats(-1e3, 1e3), st.just(float("nan")), st.just(float("inf")), st.just(1e30)
)


@settings(max_examples=250, deadline=2000)
@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=coordinates),
    st.floats(-30, 60),
)
def test_any_array_is_done_or_refused(points, distance):
    image = np.zeros((20, 30, 3), np.uint8)
    for function in (
        lambda p: g.offset(p, distance),
        lambda p: g.offset(p, distance, scale=1),
        lambda p: g.unclip(p, abs(distance)),
        g.make_valid,
        lambda p: g.rectify(image, p, max_side=64),
        lambda p: g.reading_order([p, p]),
    ):
        try:
            function(points)
        except FusionError as error:
            assert str(error)  # noqa: PT017


@settings(max_examples=150, deadline=2000)
@given(hnp.arrays(np.float64, st.tuples(st.integers(3, 12), st.just(2)), elements=st.integers(-30, 30)))
def test_repaired_polygons_are_valid(points):
    part = g.make_valid(points)
    assert part is None or shapely.Polygon(part).is_valid
    image = np.zeros((20, 30), np.uint8)
    if part is not None:
        assert min(g.rectify(image, part, max_side=128).shape) >= 1

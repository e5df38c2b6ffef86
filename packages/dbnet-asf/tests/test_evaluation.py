"""The evaluator's invariants, sweep and average precision, tuning, and the diagnosis of data sets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet_asf import DBConfig, DBNet, TextDetector, diagnose, evaluate
from dbnet_asf.config import LabelConfig
from dbnet_asf.datasets import Example, Rendered
from dbnet_asf.protocols import combine, deteval_protocol, iou_protocol
from dbnet_asf.tuning import tune
from fusion_core.errors import ConfigError, InputError, NonFiniteError, ShapeError

PROTOCOLS = pytest.mark.parametrize("protocol", [iou_protocol, deteval_protocol])


def box(x, y, w=10, h=10):
    return np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]], float)


boxes = st.lists(
    st.builds(box, st.integers(0, 60), st.integers(0, 60), st.integers(2, 40), st.integers(2, 40)), max_size=7
)


@PROTOCOLS
@settings(max_examples=150, deadline=None)
@given(data=st.data(), truth=boxes, found=boxes)
def test_shares_lie_between_0_and_1(protocol, data, truth, found):
    ignore = data.draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth)))
    result = protocol(truth, ignore, found)
    for value in (result.precision, result.recall, result.hmean):
        assert 0 <= value <= 1
    assert result.truths == len(truth) - sum(ignore)


disjoint = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12, unique=True
).map(lambda cells: [box(20 * x, 20 * y) for x, y in cells])


@PROTOCOLS
@settings(max_examples=40, deadline=None)
@given(truth=disjoint)
def test_the_truth_itself_is_perfect(protocol, truth):
    result = protocol(truth, [False] * len(truth), truth)
    assert (result.precision, result.recall, result.hmean) == (1, 1, 1)


@PROTOCOLS
@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.tuples(boxes, boxes), min_size=2, max_size=4), random=st.randoms(use_true_random=False)
)
def test_the_order_of_images_does_not_matter(protocol, images, random):
    results = [protocol(truth, [False] * len(truth), found) for truth, found in images]
    before = combine(results)
    random.shuffle(results)
    np.testing.assert_allclose(combine(results), before, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(truth=disjoint, found=boxes, inside=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_a_detection_inside_a_dont_care_changes_nothing(truth, found, inside):
    truth = [*truth, box(300, 300)]
    ignore = [False] * (len(truth) - 1) + [True]
    more = [*found, box(301, 301, *inside)]
    before, after = iou_protocol(truth, ignore, found), iou_protocol(truth, ignore, more)
    assert (before.precision, before.recall, before.pairs) == (after.precision, after.recall, after.pairs)
    if found:
        before, after = deteval_protocol(truth, ignore, found), deteval_protocol(truth, ignore, more)
        assert (before.precision, before.recall) == (after.precision, after.recall)


@settings(max_examples=60, deadline=None)
@given(truth=disjoint, data=st.data())
def test_swapping_both_sides_swaps_precision_and_recall(truth, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(truth), max_size=len(truth)))
    found = [points + 3 for points, kept in zip(truth, keep, strict=True) if kept]
    one = iou_protocol(truth, [False] * len(truth), found, iou_threshold=0.3)
    other = iou_protocol(found, [False] * len(found), truth, iou_threshold=0.3)
    if found:
        assert (one.precision, one.recall) == (other.recall, other.precision)


def test_the_largest_matching():
    truth = [box(0, 0, 20, 10), box(0, 0, 30, 10)]
    found = [box(0, 0, 24, 10), box(0, 0, 13, 10)]
    greedy = iou_protocol(truth, [False, False], found)
    largest = iou_protocol(truth, [False, False], found, matching="max")
    assert greedy.pairs == ((0, 0),)
    assert largest.pairs == ((0, 1), (1, 0))
    none = iou_protocol(truth, [False, False], [], matching="max")
    assert none.pairs == ()


BAD = [
    (([box(0, 0)], [], []), ShapeError, "0 flags for 1 polygons"),
    (([box(0, 0)[:2]], [False], []), ShapeError, r"polygons\[0\]"),
    (([], [], [box(0, np.nan)]), NonFiniteError, r"detections\[0\]"),
]


@PROTOCOLS
@pytest.mark.parametrize(("arguments", "error", "words"), BAD)
def test_bad_polygons(protocol, arguments, error, words):
    with pytest.raises(error, match=words):
        protocol(*arguments)


def test_bad_thresholds():
    with pytest.raises(ConfigError, match="iou_threshold"):
        iou_protocol([], [], [], iou_threshold=2)
    with pytest.raises(ConfigError, match="min_recall"):
        deteval_protocol([], [], [], min_recall=-1)
    with pytest.raises(InputError, match="matching"):
        iou_protocol([], [], [], matching="best")


def picture(polygons, ignore=None, name="a", shape=(100, 200)):
    flags = np.zeros(len(polygons), bool) if ignore is None else np.array(ignore)
    return Example(np.zeros((*shape, 3), np.uint8), list(polygons), flags, name)


def test_evaluate():
    pictures = [
        picture([box(0, 0), box(40, 0, 30, 20)]),
        picture([box(5, 5)], name="b"),
        picture([], name="c"),
    ]
    answers = iter([[(box(0, 0), 0.9), (box(80, 80), 0.6)], [(box(5, 5), 0.35)], []])
    report = evaluate(lambda image: next(answers), pictures)
    assert (report.precision, report.recall) == (2 / 3, 2 / 3)
    by_score = {entry["score"]: entry for entry in report.sweep}
    assert by_score[0.3]["recall"] == 2 / 3
    assert by_score[0.7]["precision"] == 1
    assert by_score[0.7]["recall"] == 1 / 3
    assert report.best["hmean"] == max(entry["hmean"] for entry in report.sweep)
    assert report.average_precision == pytest.approx((1 + 2 / 3) / 3)
    sizes = {row["short side"]: row for row in report.by_size}
    assert sizes["8 to 16 px"]["recall"] == 1
    assert sizes["16 to 32 px"] == {"short side": "16 to 32 px", "words": 1, "recall": 0.0}
    assert [row["name"] for row in report.images] == ["a", "b", "c"]
    json.dumps(report.to_dict(), default=float)
    assert report.to_dict()["hmean"] == report.hmean


def test_evaluate_by_deteval_with_a_limit(tmp_path):
    pictures = [picture([box(0, 0, 40, 10)]), picture([box(0, 0)])]
    parts = [(box(0, 0, 20, 10), 0.9), (box(20, 0, 20, 10), 0.9)]
    report = evaluate(lambda image: parts, pictures, protocol="deteval", limit=1)
    assert report.recall == pytest.approx(0.8)
    assert report.average_precision is None
    report.save(tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["precision"] == pytest.approx(0.8)
    with pytest.raises(InputError, match="protocol"):
        evaluate(lambda image: [], pictures, protocol="f1")
    with pytest.raises(InputError, match="DetEval does not have"):
        evaluate(lambda image: [], pictures, protocol="deteval", matching="max")
    with pytest.raises(InputError, match="no pictures"):
        evaluate(lambda image: [], [])


class Drawn(TextDetector):
    """A detector whose maps are drawn from the pictures: the red channel."""

    def _maps(self, images):
        from dbnet_asf.detect import MapOutput

        return (MapOutput(image[..., 0].astype(np.float32) / 255, None, 0.0) for image in images)


@pytest.fixture(scope="module")
def drawn():
    config = DBConfig.nano(inner=16).replace(channels=(8, 8, 8, 8), stem=8)
    torch.manual_seed(0)
    return Drawn(DBNet(config), device="cpu", box_thresh=0.95, unclip_ratio=1.0)


def labelled(level, grow):
    """A picture whose map is words shrunk by ``grow`` pixels, at a probability of ``level``."""
    words = [box(20, 20, 60, 24), box(100, 50, 70, 24)]
    made = picture(words)
    for x, y, w, h in ((20, 20, 60, 24), (100, 50, 70, 24)):
        made.image[y + grow : y + h - grow, x + grow : x + w - grow, 0] = round(255 * level)
    made.image[5:12, 150:170, 0] = 120  # a false one that scores less
    return made


def test_tune_finds_the_thresholds(drawn):
    pictures = [labelled(0.8, 6), labelled(0.85, 7)]
    assert evaluate(drawn, pictures).hmean == 0
    report = tune(drawn, pictures)
    assert report.before[2] == 0
    assert report.after[2] == 1
    better = Drawn(DBNet(drawn.network), device="cpu", config=drawn.config.replace(post=report.post))
    assert evaluate(better, pictures).hmean == 1
    assert len(report.rows) == 10
    assert report.to_dict()["post"]["unclip_ratio"] == report.post.unclip_ratio
    with pytest.raises(InputError, match="one is empty"):
        tune(drawn, pictures, thresh=[])
    with pytest.raises(InputError, match="no pictures"):
        tune(drawn, [])


def test_diagnose_counts():
    pictures = [
        picture(
            [
                box(0, 0, 50, 20),
                box(60, 0, 30, 5),
                box(0, 40, 10, 60),
                np.array([[60.0, 40], [90, 70], [90, 40], [60, 70]]),
            ]
        ),
        picture([box(190, 90, 40, 30), box(400, 0), box(20, 20, 40, 20)], [False, False, True], "b"),
        picture([box(0, 0, 40, 20)], [True], "c"),
    ]
    report = diagnose(pictures)
    counts = report.counts
    assert (counts["pictures"], counts["words"], counts["ignored"]) == (3, 8, 2)
    assert counts["too small"] == 1
    assert counts["self-crossing"] == 1
    assert counts["outside"] == 1
    assert counts["partly outside"] == 2
    assert counts["pictures without a word that counts"] == 1
    assert diagnose(pictures, scale=0.25).counts["too small"] > 2
    assert diagnose(pictures, labels=LabelConfig(min_text_size=2)).counts["too small"] == 0


def test_diagnose_warns_where_all_is_ignored():
    report = diagnose([picture([box(0, 0, 40, 20)] * 3, [True, True, False])])
    assert any("don't care" in warning for warning in report.warnings)
    assert report.to_dict()["warnings"] == list(report.warnings)
    assert any("no picture has a word" in warning for warning in diagnose([picture([])]).warnings)
    small = diagnose([picture([box(0, 0, 40, 4)] * 3)])
    assert any("min_text_size" in warning for warning in small.warnings)
    with pytest.raises(InputError, match="scale"):
        diagnose([], scale=0)
    with pytest.raises(InputError, match="no pictures"):
        diagnose([])


def test_diagnose_of_rendered_scenes():
    report = diagnose(Rendered(6, size=192))
    assert report.counts["pictures"] == 6
    assert report.counts["self-crossing"] == 0

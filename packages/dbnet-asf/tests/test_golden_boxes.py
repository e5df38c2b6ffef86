"""The recorded boxes, polygons and matchings of tests/golden (or of ``--golden DIR``), every case."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely

from dbnet_asf import protocols
from dbnet_asf.config import PostConfig
from dbnet_asf.postprocess import polygons_from_map, quads_from_map, trace


def iou(first, second):
    a, b = shapely.Polygon(first).buffer(0), shapely.Polygon(second).buffer(0)
    return a.intersection(b).area / max(a.union(b).area, 1e-9)


def matched(ours, theirs):
    """Pairs each recorded outline with the nearest of ours, none twice."""
    table = np.array([[iou(a, b) for b in theirs] for a in ours]).reshape(len(ours), len(theirs))
    pairs = []
    for theirs_at in range(len(theirs)):
        ours_at = int(table[:, theirs_at].argmax())
        pairs.append((ours_at, theirs_at, float(table[ours_at, theirs_at])))
        table[ours_at] = -1
    return pairs


def cases(golden):
    group = golden.settings["postprocess"]
    records, arrays = golden.load(group["file"] + ".json"), golden.load(group["file"] + ".npz")
    assert records
    for name, record in records.items():
        prob = arrays[f"{name}.map_u8"].astype(np.float32) / np.float32(255)
        yield name, record, arrays, prob, group


def settings(record):
    return {key: record[key] for key in ("thresh", "box_thresh", "max_candidates")}


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_official_quads(golden, dtype):
    for name, record, arrays, prob, group in cases(golden):
        config = PostConfig.official("quad").replace(unclip_ratio=group["quad_unclip"], **settings(record))
        quads, scores = quads_from_map(prob.astype(dtype), record["dest_height_width"], config)
        wanted, wanted_scores = arrays[f"{name}.quad"], arrays[f"{name}.quad_score"]
        assert len(quads) == len(wanted), name
        for ours, theirs, _ in matched(quads, wanted):
            assert np.abs(quads[ours] - wanted[theirs]).max() <= group["official"]["corner_px"], name
            assert abs(scores[ours] - wanted_scores[theirs]) <= group["official"]["score_atol"], name
        assert (quads == np.rint(quads)).all()


def test_official_candidates(golden):
    for name, record, arrays, prob, _ in cases(golden):
        contours = trace((prob > record["thresh"]).astype(np.uint8), PostConfig.official())
        assert min(len(contours), record["max_candidates"]) == int(arrays[f"{name}.quad_candidates"]), name


def test_default_quads(golden):
    for name, record, arrays, prob, group in cases(golden):
        limits = group["default"]
        config = PostConfig(unclip_ratio=group["quad_unclip"], cap=limits["cap"], **settings(record))
        quads, scores = quads_from_map(prob, record["dest_height_width"], config)
        wanted, wanted_scores = arrays[f"{name}.quad"], arrays[f"{name}.quad_score"]
        assert len(quads) == len(wanted), name
        pairs = matched(quads, wanted)
        assert all(overlap >= limits["min_iou"] for _, _, overlap in pairs), name
        assert not pairs or np.mean([overlap for _, _, overlap in pairs]) >= limits["mean_iou"], name
        for ours, theirs, _ in pairs:
            assert abs(scores[ours] - wanted_scores[theirs]) <= limits["score_atol"], name


def test_official_polygons(golden):
    for name, record, _, prob, group in cases(golden):
        config = PostConfig.official("polygon").replace(
            unclip_ratio=group["polygon_unclip"], **settings(record)
        )
        polygons, scores = polygons_from_map(prob, record["dest_height_width"], config)
        assert len(polygons) == len(record["polygons"]), name
        for ours, theirs, overlap in matched(polygons, record["polygons"]):
            assert overlap >= group["official"]["polygon_iou"], name
            recorded = record["polygon_scores"][theirs]
            assert abs(scores[ours] - recorded) <= group["official"]["score_atol"], name


def test_score_cap_keeps_the_best(golden):
    for name, record, _, prob, group in cases(golden):
        size = record["dest_height_width"]
        plain = PostConfig(unclip_ratio=group["quad_unclip"], **settings(record)).replace(max_candidates=None)
        _, every = quads_from_map(prob, size, plain)
        _, scores = quads_from_map(prob, size, plain.replace(max_candidates=record["max_candidates"]))
        assert sorted(scores, reverse=True) == sorted(every, reverse=True)[: record["max_candidates"]], name


def check_image(ours, record, atol):
    assert ours.truths == record["gtCare"]
    assert ours.detections == record["detCare"]
    for key in ("precision", "recall", "hmean"):
        assert math.isclose(getattr(ours, key), record[key], rel_tol=0, abs_tol=atol), key


def test_iou_protocol(golden):
    group = golden.settings["evaluator"]
    records = golden.load(group["file"])
    options = {key: group[key] for key in ("iou_threshold", "area_threshold")}
    results = []
    for image in records["images"]:
        truth = [gt["points"] for gt in image["gt"]]
        flags = [gt["ignore"] for gt in image["gt"]]
        ours = protocols.iou_protocol(truth, flags, image["pred"], **options)
        results.append(ours)
        record = image["iou_protocol"]
        if "error" in record:
            continue
        check_image(ours, record, group["atol"])
        assert ours.recall_sum == ours.precision_sum == record["detMatched"]
        assert ours.pairs == tuple((pair["gt"], pair["det"]) for pair in record["pairs"])
        assert list(ours.ignored_truths) == record["gtDontCare"]
        assert list(ours.ignored_detections) == record["detDontCare"]
        np.testing.assert_allclose(ours.iou, np.array(record["iou_matrix"]), rtol=0, atol=group["atol"])
    totals = records["iou_combined"]
    expected = [totals[key] for key in ("precision", "recall", "hmean")]
    np.testing.assert_allclose(protocols.combine(results), expected, rtol=0, atol=group["atol"])


def test_deteval_protocol(golden):
    group = golden.settings["evaluator"]
    records = golden.load(group["file"])
    options = {key: group[key] for key in ("area_threshold", "min_recall", "min_precision", "split_weight")}
    results = []
    for image in records["images"]:
        truth = [gt["points"] for gt in image["gt"]]
        flags = [gt["ignore"] for gt in image["gt"]]
        ours = protocols.deteval_protocol(truth, flags, image["pred"], **options)
        results.append(ours)
        record = image["deteval_protocol"]
        if "error" in record:
            continue
        check_image(ours, record, group["atol"])
        np.testing.assert_allclose(
            [ours.recall_sum, ours.precision_sum],
            [record["recallAccum"], record["precisionAccum"]],
            rtol=0,
            atol=group["atol"],
        )
    totals = records["deteval_combined"]
    expected = [totals[key] for key in ("precision", "recall", "hmean")]
    np.testing.assert_allclose(protocols.combine(results), expected, rtol=0, atol=group["atol"])

"""The shipped checkpoint: words of a page covered, no false boxes, far above the classical baseline."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from dbnet_asf import TextDetector
from dbnet_asf.acceptance import classical, coverage, synthetic_score
from dbnet_asf.data.scenery import photographs
from dbnet_asf.model.dbnet import SHIPPED
from fusion_core.images import read_image

WORDS = json.loads((Path(__file__).parent / "data" / "page_words.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def detector():
    return TextDetector.from_pretrained(device="cpu")


def test_coverage_counts_areas():
    word = np.array([[0, 0], [10, 0], [10, 10], [0, 10]])
    half, less, away = (word + np.array([shift, 0]) for shift in (5, 6, 50))
    assert coverage([word], [half]).covered.all()
    assert not coverage([word], [less]).covered.any()
    assert coverage([word], [half, less, away]).false.tolist() == [False, True, True]
    assert coverage([word], [away], [away]).false.tolist() == [False]
    assert coverage([word], [word[:, ::-1] * [1, 0.5]]).covered.all()  # half of it, whatever the direction
    assert not coverage([], [away]).covered.size
    assert not coverage([word], []).covered.any()


def test_size():
    assert sum(file.stat().st_size for file in (SHIPPED / "nano").iterdir()) < 4.3e6


def test_page(detector):
    data = pytest.importorskip("skimage.data")
    assert len(WORDS["words"]) == 47
    image = cv2.resize(data.page(), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    found = detector(np.repeat(image[..., None], 3, -1))
    words, ignored = ([np.array(w["quad"]) * 2 for w in WORDS[key]] for key in ("words", "ignore"))
    result = coverage(words, [region.polygon for region in found], ignored)
    assert result.covered.mean() >= 0.9, [
        word["text"] for word, hit in zip(WORDS["words"], result.covered, strict=True) if not hit
    ]
    assert not result.false.any()


@pytest.mark.slow
def test_photographs_without_text(detector):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    paths = photographs("test")
    assert len(paths) == 8
    found = {path.name: len(detector(read_image(path))) for path in paths}
    assert sum(found.values()) <= 2, found


@pytest.mark.slow
def test_held_out_scenes(detector):
    pytest.importorskip("skimage")
    native = TextDetector.from_pretrained(device="cpu", resize="native")
    ours = synthetic_score(lambda image: [region.polygon for region in native(image)], 30)
    baseline = synthetic_score(classical, 30)
    assert ours["hmean"] >= 0.4
    assert ours["hmean"] >= 2 * baseline["hmean"], (ours, baseline)

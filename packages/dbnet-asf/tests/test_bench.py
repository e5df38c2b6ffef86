"""The benchmark's rows of labels and network: they run, and both sides compute the same."""

from __future__ import annotations

import numpy as np
import pytest

from dbnet_asf.bench import label_rows, network_rows, run, words
from dbnet_asf.config import LabelConfig
from dbnet_asf.plain_labels import labels
from dbnet_asf.targets import make_targets
from fusion_core.errors import ConfigError


def test_words_do_not_touch():
    found = words(12)
    assert len(found) == 12
    assert make_targets(found, None, (640, 640)).ignore == (False,) * 12


@pytest.mark.parametrize("distance", ["official", "exact", "raster"])
def test_plain_labels_are_ours(distance):
    polygons, size = words(12), (640, 640)
    gt, mask, thresh, band = labels(polygons, size)
    made = make_targets(polygons, None, size, LabelConfig(distance=distance))
    assert np.array_equal(made.gt.numpy(), gt.astype(bool))
    assert np.array_equal(made.mask.numpy(), mask.astype(bool))
    assert np.array_equal(made.thresh_mask.numpy(), band.astype(bool))
    off = np.abs(made.thresh_map.numpy() - thresh)[made.thresh_mask.numpy()]
    assert off.max() < {"official": 1e-5, "exact": 0.03, "raster": 0.15}[distance]


def test_rows():
    rows = label_rows(1)
    assert [row.target for row in rows] == [None, ">= 2", ">= 5"]
    assert all(row.ratio > 0 for row in rows)
    network = network_rows(1, size=(32, 64))
    assert network[0].target == ">= 1.2"
    assert network[-1].dtype == "float32"


def test_bad_input_gets_a_sentence():
    with pytest.raises(ConfigError, match="repeats is 0, wanted at least 1"):
        run(repeats=0)

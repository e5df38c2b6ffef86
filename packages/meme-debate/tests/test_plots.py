"""Pictures of scores."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fusion_core.errors import ConfigError, MissingExtraError, ShapeError
from meme_debate.calibrate import cost_curve
from meme_debate.plots import plot_costs, plot_reliability, reliability

pytest.importorskip("matplotlib", reason="needs the extra plot")
SCORES = np.linspace(0, 1, 50)
LABELS = (SCORES > 0.5).astype(np.int64)


def test_reliability_counts_every_meme():
    _, share, count = reliability(SCORES, LABELS)
    assert count.sum() == 50
    assert (share[:3] == 0).all()
    assert (share[-3:] == 1).all()
    with pytest.raises(ConfigError, match="bins is 0"):
        reliability(SCORES, LABELS, 0)
    with pytest.raises(ShapeError, match="labels has shape"):
        reliability(SCORES, LABELS[:3])


def test_lines_are_the_numbers(tmp_path):
    axes = plot_reliability(SCORES, LABELS, name="raw", color="red")
    x, y, _ = reliability(SCORES, LABELS)
    line = axes.lines[0]
    assert np.allclose(line.get_xdata(), x)
    assert np.allclose(line.get_ydata(), y)
    assert line.get_label().startswith("raw, ECE 0.")
    assert plot_reliability(SCORES, LABELS, axes) is axes
    costs = plot_costs(SCORES, LABELS, miss=5.0)
    thresholds, values = cost_curve(SCORES, LABELS, miss=5.0)
    assert np.allclose(costs.lines[0].get_xdata(), thresholds)
    assert np.allclose(costs.lines[0].get_ydata(), values)
    costs.figure.savefig(tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 1000


def test_matplotlib_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'pip install "meme-debate\[plot\]"'):
        plot_costs(SCORES, LABELS)

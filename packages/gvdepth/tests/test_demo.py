"""The demo in small, and the shipped models against what their card says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fusion_core.testing import run_cli
from gvdepth import demo as demo_module
from gvdepth import experiment
from gvdepth.cli import main
from gvdepth.train_checkpoints import MODELS


@pytest.fixture
def few(monkeypatch):
    plain = experiment.streets_of
    monkeypatch.setattr(experiment, "streets_of", lambda rig, count=4: plain(rig, 4))
    monkeypatch.setattr(demo_module, "streets_of", lambda rig, count=4: plain(rig, 4))
    monkeypatch.setattr(demo_module, "FRAMES", 3)


def test_demo_in_small(few, tmp_path):
    done = run_cli(main, "demo", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    cameras, rules = found["tables"]
    methods = {row["method"] for row in cameras["rows"]}
    assert methods == set(demo_module.NAMES.values())
    assert {row["method"] for row in rules["rows"]} == set(demo_module.RULE_NAMES.values())
    assert len(found["claims"]) == 5
    assert all(claim["sentence"] for claim in found["claims"])
    assert {figure["file"] for figure in found["figures"]} == {"demo.png", "pitch.png"}
    assert "1.20" in found["settings"]["calibrate D"]
    assert any("embedding" in note for note in found["notes"])
    picture = np.asarray(Image.open(tmp_path / "out" / "demo.png"))
    assert picture.std() > 20
    weights = picture[18 + 4 * 99 : 18 + 5 * 99, 115:]
    assert len(np.unique(weights.reshape(-1, 3), axis=0)) > 20  # a map, no plain colour


@pytest.mark.slow
def test_training_in_the_demo(few, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "MODELS", {name: MODELS[name] for name in ("focal", "fusion")})
    monkeypatch.setattr(experiment.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(experiment, "training_streets", lambda seed, count=700: _few_streets(seed))
    models, steps = experiment.train_all([0], tmp_path, steps=2)
    assert (set(models), steps) == ({("focal", 0), ("fusion", 0)}, 2)
    monkeypatch.setattr(experiment, "trial_seconds", lambda: 9.0)
    monkeypatch.setattr(experiment, "STEPS", {"demo": 4})
    assert experiment.train_all([1], tmp_path)[1] == 2  # a slow machine: half the steps


def _few_streets(seed):
    from gvdepth.data import Simulated

    return Simulated("train", 4, seed=seed, keep=True)


def test_trial_is_measured():
    assert 0 < experiment.trial_seconds(1) < 60


def test_fusion_beats_its_own_cues_on_an_unseen_camera():
    """What the shipped fusion model was trained for; the other models are measured by the demo."""
    model, seen = experiment.shipped("fusion"), experiment.streets_of("E", 8)
    found = experiment.infer(model, seen, rules=("focal", "vertical", "mean"))
    errors = {name: float(experiment.score(output.depth, seen)["abs_rel"]) for name, output in found.items()}
    assert errors["model"] < min(errors["focal"], errors["vertical"])
    assert errors["model"] < 0.2
    bins = experiment.score(found["model"].depth, seen, bins=experiment.BINS)["abs_rel"]
    assert bins.shape == (5,)

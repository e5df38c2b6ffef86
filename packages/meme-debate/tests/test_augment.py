"""The authors' settings beside ours: changed pictures, whole batches, what chooses the best epoch."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from judges import make_judge, make_memes, picture

from fusion_core.errors import ConfigError, InputError, MissingExtraError
from meme_debate.augment import RandAugment
from meme_debate.features import image_features
from meme_debate.settings import JudgeSettings
from meme_debate.training import JudgeBatches, JudgeTrainConfig, _Validation, train_judge

pytest.importorskip("torchvision", reason="needs the extra augment")


def test_changes_follow_the_key_and_leave_the_global_stream(tmp_path):
    change, source = RandAugment(0), picture(1, (40, 40))
    before = torch.random.get_rng_state()
    one, again = (np.asarray(change(source, 0, 7)) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(one, again)
    others = [np.asarray(change(source, *key)) for key in ((1, 7), (0, 8), (2, 7), (0, 9))]
    assert sum(not np.array_equal(one, other) for other in others) >= 3
    assert not np.array_equal(np.asarray(RandAugment(1)(source, 0, 7)), one)
    assert one.shape == (40, 40, 3)
    assert change(None, 0, 0) is None
    with pytest.raises(InputError, match=r"no.png' is not there"):
        change(tmp_path / "no.png", 0, 0)


def test_changed_pictures_are_seen_anew_in_every_step():
    memes, debates = make_memes(8)
    judge = make_judge()
    features = image_features(judge, [meme.image for meme in memes])
    rows = np.arange(8)
    plain = JudgeBatches(judge, memes, debates, JudgeTrainConfig(batch_size=8), features)
    assert "image_features" in plain.batch(rows)
    changed = JudgeBatches(judge, memes, debates, JudgeTrainConfig(batch_size=8, augment=True), features)
    first = changed.batch(rows)["pixel_values"]
    assert torch.equal(first, changed.batch(rows)["pixel_values"])
    changed.set_epoch(1)
    assert not torch.equal(first, changed.batch(rows)["pixel_values"])
    blind = JudgeBatches(make_judge("none"), memes, debates, JudgeTrainConfig(augment=True))
    assert set(blind.batch(rows)) == {"input_ids", "attention_mask", "labels"}


def test_training_with_changed_pictures_runs_the_tower_in_every_step(tmp_path):
    memes, debates = make_memes(16)
    judge = make_judge(max_length=64)
    calls = []
    judge.image_transformer.register_forward_hook(lambda *_: calls.append(1))
    config = JudgeTrainConfig(steps=4, batch_size=8, augment=True)
    train_judge(judge, memes, debates, config, out=tmp_path / "a", device="cpu")
    assert len(calls) == 4
    with pytest.raises(ConfigError, match="augment is on; states of changed pictures cannot be kept"):
        train_judge(judge, memes, debates, config, out=tmp_path / "b", features=tmp_path / "states")


def test_the_authors_settings_have_a_name():
    theirs, ours = JudgeTrainConfig.official(), JudgeTrainConfig()
    assert (theirs.debate_dropout, theirs.augment, theirs.metric, theirs.window) == (0.0, True, "accuracy", 1)
    assert (ours.debate_dropout, ours.augment, ours.metric, ours.window) == (0.5, False, "macro_f1", 8)
    for name in ("epochs", "batch_size", "lr", "weight_decay", "warmup", "max_grad_norm"):
        assert getattr(theirs, name) == getattr(ours, name), name
    theirs, ours = JudgeSettings.official(), JudgeSettings()
    assert (theirs.truncate, theirs.normalize) == ("tail", "inception")
    assert (ours.truncate, ours.normalize) == ("balanced", "clip")
    judge = make_judge()
    memes, debates = make_memes(8)
    whole = JudgeBatches(
        judge, memes, debates, JudgeTrainConfig.official().replace(augment=False, batch_size=2)
    )
    assert not any(dropped for _, dropped in whole.plan())


def test_the_metric_that_chooses_the_best_epoch_is_an_option():
    """Accuracy chooses in the authors' code, macro-F1 by default here; both are reported."""
    judge = make_judge()
    memes, debates = make_memes(12)
    found = {}
    for metric in ("accuracy", "macro_f1", "auroc"):
        seen = _Validation(judge, memes, debates, metric)(judge)
        assert seen["score"] == seen[metric]
        found[metric] = seen
    assert found["accuracy"] == {**found["macro_f1"], "score": found["accuracy"]["accuracy"]}
    with pytest.raises(ConfigError, match="metric is 'loss', wanted one of"):
        _Validation(judge, memes, debates, "loss")
    with pytest.raises(ConfigError, match="metric"):
        JudgeTrainConfig.from_dict({"metric": "loss"})


def test_torchvision_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(MissingExtraError, match=r'pip install "meme-debate\[augment\]"'):
        RandAugment(0)

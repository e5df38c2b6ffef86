"""What the benchmark of the judges measures is what it says."""

from __future__ import annotations

import numpy as np
import torch

from meme_debate import bench_judge
from meme_debate.features import image_features
from meme_debate.training import JudgeBatches, JudgeTrainConfig


def test_made_debates_have_the_lengths_of_real_ones_and_waste_little():
    memes, debates = bench_judge.made_debates(256)
    judge = bench_judge._judge(memes, debates)
    plain = JudgeBatches(judge, memes, list(debates), JudgeTrainConfig(batch_size=32, debate_dropout=0.0))
    whole = [len(text) for text in plain.whole]
    short = [len(text) for text in plain.short]
    assert 395 < np.mean(whole) < 430
    assert 55 < np.mean(short) < 75
    assert max(whole) <= bench_judge.LENGTH
    assert plain.padding_share() <= 0.05


def test_both_schemes_train_the_same_memes(monkeypatch):
    monkeypatch.setattr(bench_judge, "LENGTH", 96)
    memes, debates = bench_judge.made_debates(16)
    judge = bench_judge._judge(memes, debates)
    features = image_features(judge, [meme.image for meme in memes])
    batches = JudgeBatches(
        judge, memes, list(debates), JudgeTrainConfig(batch_size=8, debate_dropout=0.0), features
    )
    run = bench_judge._Run(judge, batches)
    forwards = []
    judge.image_transformer.register_forward_hook(lambda *_: forwards.append(1))
    run.ours()
    assert forwards == []
    padded = list(run._padded())
    assert len(padded) == 2
    assert all(batch["input_ids"].shape == (8, 96) for batch in padded)
    run.authors()
    assert len(forwards) == 2
    with torch.no_grad():
        judge.eval()
        ours = judge(**batches.batch(np.arange(8))).logits
        theirs = judge(**padded[0]).logits
    assert ours.shape == theirs.shape

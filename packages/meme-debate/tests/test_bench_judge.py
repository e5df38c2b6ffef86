"""What the benchmark of the judges measures is what it says."""

from __future__ import annotations

import numpy as np

from meme_debate import bench, bench_judge
from meme_debate.features import image_features
from meme_debate.training import JudgeBatches, JudgeTrainConfig


def test_made_debates_have_the_lengths_of_real_ones_and_waste_little():
    memes, debates = bench_judge.made_debates(256, images=False)
    judge = bench_judge._judge(memes, debates)
    plain = JudgeBatches(judge, memes, list(debates), JudgeTrainConfig(batch_size=32, debate_dropout=0.0))
    whole = [len(text) for text in plain.whole]
    short = [len(text) for text in plain.short]
    assert 395 < np.mean(whole) < 430
    assert 55 < np.mean(short) < 75
    assert max(whole) <= bench_judge.LENGTH
    assert plain.padding_share() <= 0.05


def test_both_schemes_train_as_many_memes(monkeypatch):
    monkeypatch.setattr(bench_judge, "LENGTH", 128)
    memes, debates = bench_judge.made_debates(16)
    judge = bench_judge._judge(memes, debates)
    features = image_features(judge, [meme.image for meme in memes])
    config = JudgeTrainConfig(batch_size=4, debate_dropout=0.5)
    run = bench_judge._Run(judge, JudgeBatches(judge, memes, list(debates), config, features), 2)
    forwards, batches = [], []
    judge.image_transformer.register_forward_hook(lambda *_: forwards.append(1))
    plain = judge.forward
    monkeypatch.setattr(judge, "forward", lambda **batch: batches.append(batch) or plain(**batch))
    before = judge.clf.weight.detach().clone()
    run.ours()
    assert forwards == []
    lengths = [batch["input_ids"].shape for batch in batches]
    assert [rows for rows, _ in lengths] == [4, 4]
    assert lengths[0][1] > lengths[1][1], "one batch with debates, one without"
    assert not np.array_equal(before, judge.clf.weight.detach()), "the optimizer steps"
    batches.clear()
    run.authors()
    assert len(forwards) == 2
    assert [batch["input_ids"].shape for batch in batches] == [(4, 128), (4, 128)]
    assert all("pixel_values" in batch for batch in batches)


def test_rows_are_told_as_they_come(monkeypatch, capsys):
    monkeypatch.setattr(bench_judge, "LIGHT_TEXTS", 60)
    monkeypatch.setattr(bench_judge, "_training", lambda repeats: iter(()))
    found = bench.run(client=False)
    assert [row.name for row in found.rows] == ["light judge, fit and predict, seconds"]
    told = capsys.readouterr()
    assert "light judge, fit and predict, seconds" in told.err
    assert "(< 15: met)" in told.err
    assert told.out == ""
    bench.run(client=False, quiet=True)
    assert capsys.readouterr().err == ""

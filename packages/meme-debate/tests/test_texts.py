"""Text format, truncation, lengths, metrics, calibration: properties and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judges import make_judge, make_memes
from sklearn import metrics as sk

from fusion_core.errors import ConfigError, DataError, InputError, NonFiniteError, ShapeError
from meme_debate.ablations import ABLATIONS, fields_of, judge_text, paired
from meme_debate.calibrate import (
    Calibration,
    abstain_band,
    calibrate,
    cost_curve,
    decide,
    fit_temperature,
    scale_scores,
    threshold_by_cost,
)
from meme_debate.composing import compose, compose_parts, parse
from meme_debate.encoding import collate, encode_fields, locate
from meme_debate.lengths import padding_share, window_batches
from meme_debate.meme import Debate, Meme
from meme_debate.scoring import metrics, reversed_labels
from meme_debate.tokens import word_tokenizer
from meme_debate.truncate import balanced, keep, tail

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
lines = st.lists(
    st.sampled_from(
        ["Text: a", "\\Caption: b", "\\\\Harmful: ", "Harmless: x", "", "é\r", "plain", " Text: "]
    ),
    max_size=4,
).map("\n".join)
texts = st.one_of(st.text(max_size=60), lines)


@quick
@given(text=texts, caption=texts, harmful=texts, harmless=texts, verdict=st.sampled_from([0, 1, None]),
       first=st.sampled_from(["verdict", "harmful", "harmless"]))  # fmt: skip
def test_parse_inverts_compose_for_any_text(text, caption, harmful, harmless, verdict, first):
    meme, debate = Meme("m", None, text, caption), Debate("m", harmful, harmless, verdict)
    composed = compose(meme, debate, first)
    again, back = parse(composed, "m")
    assert (again.text, again.caption) == (text, caption)
    assert (back.harmful, back.harmless) == (harmful, harmless)
    wanted = {"harmful": 1, "harmless": 0, "verdict": 1 if verdict is None else verdict}[first]
    assert back.verdict == wanted
    assert compose(again, back) == composed


@quick
@given(a=texts, b=texts)
def test_swapping_the_verdict_swaps_the_order_only(a, b):
    meme = Meme("m", None, "t", "c")
    one, two = (compose(meme, Debate("m", a, b, verdict)) for verdict in (1, 0))
    assert one == compose_parts([("Text", "t"), ("Caption", "c"), ("Harmful", a), ("Harmless", b)])
    assert two == compose_parts([("Text", "t"), ("Caption", "c"), ("Harmless", b), ("Harmful", a)])


@pytest.mark.parametrize(
    "text",
    ["", "Harmful: a", "Text: a\nHarmful: b\nHarmless: c", "Text: a\nCaption: b\nHarmful: c",
     "Text: a\nCaption: b\nHarmful: c\nHarmful: d", "Text: a\nCaption: b\nHarmful: c\nHarmless: d\nText: e"],
)  # fmt: skip
def test_other_tag_sequences_are_refused(text):
    with pytest.raises(InputError, match=r"text (begins with|has the tags)"):
        parse(text)


def test_compose_refuses_another_memes_debate():
    with pytest.raises(InputError, match=r"debate has id 'b', the meme 'a'"):
        compose(Meme("a", None, "x"), Debate("b", "x", "y"))
    with pytest.raises(InputError, match="first is 'winner'"):
        compose(Meme("a", None, "x"), Debate("a", "x", "y"), "winner")
    assert parse(compose(Meme("a", None, "x"), Debate("a", "", "")))[0].id == ""


def test_ablations_read_what_they_say():
    meme, debate = Meme("m", None, "T", "C"), Debate("m", "bad", "good", 0)
    read = {name: [v for _, v in fields_of(meme, debate, ablation=name)] for name in ["", *ABLATIONS]}
    assert read[""] == ["T", "C", "good", "bad"]
    assert judge_text(meme, debate) == compose(meme, debate)
    assert read["w/o MD"] == read["w/o SLMJ"] == ["T", "C"]
    assert read["w/o LLMJ"] == ["T", "C", "bad", "good"]
    assert (read["w/o HlD"], read["w/o HfD"], read["w/o UR"]) == (
        ["T", "C", "bad"], ["T", "C", "good"], ["T", "C", "good"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="ablation is 'w/o X'"):
        fields_of(meme, debate, ablation="w/o X")


def test_pairs_are_checked():
    memes, debates = make_memes(3)
    assert paired(memes, debates[1:]) == [None, debates[1], debates[2]]
    assert paired(memes, {d.id: d for d in debates}) == debates
    assert paired(memes, [Debate("m0", "", "")])[0] is None
    with pytest.raises(DataError, match="'m0' twice"):
        paired([memes[0], memes[0]], None)
    with pytest.raises(DataError, match="no meme"):
        paired(memes, [Debate("other", "a", "b")])


sizes = st.lists(st.tuples(*[st.integers(0, 300)] * 4), min_size=1, max_size=8)


@quick
@given(lengths=sizes, limit=st.integers(0, 512))
def test_truncation_keeps_all_that_fits_and_shares_the_rest(lengths, limit):
    size = np.array(lengths)
    for how in ("balanced", "tail"):
        kept = keep(size, limit, how)
        assert (kept <= size).all()
        assert (kept >= 0).all()
        assert (kept.sum(1) == np.minimum(size.sum(1), limit)).all()
    kept = balanced(size, limit)
    head, cut = size[:, :2].sum(1), kept[:, :2].sum(1)
    assert (cut >= np.minimum(head, limit // 2)).all()
    shorter = (kept[:, 2] < size[:, 2]) & (kept[:, 3] < size[:, 3])
    assert (np.abs(kept[:, 2] - kept[:, 3])[shorter] <= 1).all()


def test_the_tail_loses_the_second_rationale_first():
    assert tail([[10, 10, 50, 50]], 80).tolist() == [[10, 10, 50, 10]]
    assert balanced([[10, 10, 50, 50]], 80).tolist() == [[10, 10, 30, 30]]
    assert balanced([[300, 10, 50, 5]], 100).tolist() == [[40, 10, 45, 5]]
    with pytest.raises(ConfigError, match="truncate is 'middle'"):
        keep([[1, 1, 1, 1]], 3, "middle")
    with pytest.raises(ShapeError, match="lengths has shape"):
        balanced([[1, 2]], 3)


def test_encoded_tokens_know_their_place():
    tokenizer = word_tokenizer(["text caption harmful harmless : a b c d e rude words \\"])
    parts = [
        ("Text", "A b\nHarmful: c"),
        ("Caption", "d"),
        ("Harmful", "rude words rude"),
        ("Harmless", "e e"),
    ]
    whole = encode_fields(tokenizer, [parts], max_length=64, truncate="balanced")[0]
    assert whole.ids == tokenizer(compose_parts(parts).lower())["input_ids"]
    assert whole.cut == 0
    for field, (start, end), token in zip(whole.fields, whole.spans, whole.ids, strict=True):
        if field >= 0 and start < end:
            assert tokenizer.convert_ids_to_tokens(token) == parts[field][1][start:end].lower()
    cut = encode_fields(tokenizer, [parts], max_length=18, truncate="balanced")[0]
    assert (len(cut), cut.cut, cut.ids[-1]) == (18, len(whole) - 18, 1)
    assert (cut.fields == 0).sum() == (whole.fields == 0).sum() or (cut.fields < 2).sum() >= 9
    end = encode_fields(tokenizer, [parts], max_length=18, truncate="tail")[0]
    assert end.ids == [*whole.ids[:17], 1]
    forged = encode_fields(tokenizer, [[("Text", "a </s> b <pad>")]], max_length=32, truncate="tail")[0]
    assert forged.ids.count(1) == 1
    assert forged.ids.count(0) == 0
    turkish = encode_fields(tokenizer, [[("Text", "İİ a")]], max_length=16, truncate="tail")[0]
    assert turkish.spans.max() == 4


@quick
@given(values=st.tuples(texts, texts))
def test_places_in_the_text_are_places_in_the_fields(values):
    parts = list(zip(("Text", "Harmful"), values, strict=True))
    whole = compose_parts(parts)
    at = np.arange(len(whole))
    fields, spans = locate(parts, np.stack([at, at + 1], 1))
    for place, field, (start, end) in zip(at, fields, spans, strict=True):
        if end - start == 1:
            assert parts[field][1][start] == whole[place]


@quick
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=80), size=st.integers(1, 9),
       epoch=st.integers(0, 3))  # fmt: skip
def test_batches_hold_each_row_once(lengths, size, epoch):
    batches = window_batches(lengths, size, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) <= size
    again = window_batches(lengths, size, epoch=epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert 0 <= padding_share(lengths, batches) < 1


def test_windows_save_padding():
    lengths = np.random.default_rng(0).integers(50, 500, 1024)
    alone, sorted_ = (padding_share(lengths, window_batches(lengths, 32, window=w)) for w in (1, 8))
    assert sorted_ < 0.1 < alone
    with pytest.raises(ConfigError, match="batch_size is 0"):
        window_batches([1], 0)
    with pytest.raises(InputError, match="without tokens"):
        collate([[1], []], 0)


scored = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=2, max_size=60)


@quick
@given(rows=scored, threshold=st.floats(0, 1))
def test_metrics_are_scikit_learns(rows, threshold):
    scores, labels = map(np.array, zip(*rows, strict=True))
    found = metrics(scores, labels, threshold)
    predicted = scores >= threshold
    assert math.isclose(found["accuracy"], sk.accuracy_score(labels, predicted))
    both = sk.f1_score(labels, predicted, average=None, labels=[0, 1], zero_division=0)
    assert np.isclose(found["macro_f1"], both.mean())
    assert np.isclose(found["f1"], both[1])
    if 0 < labels.sum() < len(labels):
        assert np.isclose(found["auroc"], sk.roc_auc_score(labels, scores))
        assert np.isclose(found["auprc"], sk.average_precision_score(labels, scores))
    else:
        assert math.isnan(found["auroc"])
        assert math.isnan(found["auprc"])
    assert 0 <= found["ece"] <= 1


@quick
@given(rows=scored, temperature=st.floats(0.1, 10))
def test_temperature_keeps_the_ranking(rows, temperature):
    scores = np.array([row[0] for row in rows])
    scaled = scale_scores(scores, temperature)
    assert ((scaled >= 0) & (scaled <= 1)).all()
    order = np.argsort(scores)
    assert (np.diff(scaled[order]) >= -1e-15).all()
    assert ((scaled >= 0.5) == (scores >= 0.5)).all() or np.abs(scores - 0.5).min() < 1e-6


def test_temperature_is_found():
    draws = np.random.default_rng(0)
    logits = draws.normal(0, 2, 4000)
    labels = (draws.random(4000) < 1 / (1 + np.exp(-logits))).astype(int)
    sharp = 1 / (1 + np.exp(-3 * logits))
    assert fit_temperature(sharp, labels) == pytest.approx(3, rel=0.1)
    made = calibrate(sharp, labels, coverage=0.8, miss=5)
    assert metrics(made.apply(sharp), labels)["ece"] < 0.03 < metrics(sharp, labels)["ece"]
    assert made.threshold < 0.3
    assert made.coverage >= 0.8 - 0.01
    assert Calibration.from_dict(made.to_dict()) == made


@quick
@given(rows=scored, threshold=st.floats(0, 1), coverage=st.floats(0.05, 1))
def test_the_band_decides_at_least_the_coverage(rows, threshold, coverage):
    scores, labels = map(np.array, zip(*rows, strict=True))
    assert abstain_band(scores, labels, threshold, coverage=1.0) is None
    band = abstain_band(scores, labels, threshold, coverage=coverage)
    left = np.mean([decide(s, threshold, band) == "abstain" for s in scores])
    assert left <= 1 - coverage + 1e-9 + 1e-9
    if band is not None:
        assert 0 <= band[0] <= threshold <= band[1] <= 1


@quick
@given(rows=scored, error=st.floats(0.02, 0.9))
def test_the_band_bounds_the_errors(rows, error):
    scores, labels = map(np.array, zip(*rows, strict=True))
    band = abstain_band(scores, labels, max_error=error)
    decided = np.array([decide(s, 0.5, band) != "abstain" for s in scores])
    wrong = decided & ((scores >= 0.5) != labels)
    assert band == (0.0, 1.0) or (wrong.sum() + 1) / (len(scores) + 1) <= error + 1e-9


@quick
@given(score=st.floats(0, 1), low=st.floats(0, 1), high=st.floats(0, 1))
def test_decisions_are_monotone_in_the_threshold(score, low, high):
    low, high = min(low, high), max(low, high)
    if decide(score, high) == "harmful":
        assert decide(score, low) == "harmful"


@quick
@given(rows=scored, miss=st.floats(0.1, 20), alarm=st.floats(0.1, 20))
def test_the_chosen_threshold_costs_least(rows, miss, alarm):
    scores, labels = map(np.array, zip(*rows, strict=True))
    thresholds, costs = cost_curve(scores, labels, miss=miss, alarm=alarm)
    chosen = threshold_by_cost(scores, labels, miss=miss, alarm=alarm)
    assert costs[np.flatnonzero(thresholds == chosen)[0]] <= costs.min() + 1e-9
    for threshold, cost in zip(thresholds, costs, strict=True):
        predicted = scores >= threshold
        wanted = miss * (~predicted & (labels == 1)).sum() + alarm * (predicted & (labels == 0)).sum()
        assert math.isclose(cost, wanted / len(scores), abs_tol=1e-9)


def test_bad_scores_labels_and_settings():
    with pytest.raises(DataError, match=r"scores lies in \[0, 1.5\], wanted \[0, 1\]"):
        metrics([0, 1.5], [0, 1])
    with pytest.raises(NonFiniteError, match="1 non-finite"):
        metrics([0, float("nan")], [0, 1])
    with pytest.raises(DataError, match="labels holds 1 values such as 2, wanted 0 or 1"):
        metrics([0, 1], [0, 2])
    with pytest.raises(DataError, match="such as None"):
        metrics([0, 1], [0, None])
    with pytest.raises(ShapeError, match="labels has shape"):
        metrics([0, 1], [0])
    with pytest.raises(ShapeError, match="scores has shape"):
        metrics([], [])
    with pytest.raises(ConfigError, match="threshold is 2"):
        metrics([0, 1], [0, 1], 2)
    with pytest.raises(DataError, match="only class 1"):
        fit_temperature([0.5, 0.6], [1, 1])
    with pytest.raises(ConfigError, match="exactly one of them"):
        abstain_band([0.5], [1])
    with pytest.raises(ConfigError, match="temperature is 0"):
        scale_scores([0.5], 0)
    with pytest.raises(ConfigError, match="both 0"):
        cost_curve([0.5], [1], miss=0, alarm=0)
    assert "are the labels reversed?" in reversed_labels({"auroc": 0.3})
    assert reversed_labels({"auroc": 0.5}) is None
    assert make_judge().settings.labels == ("harmless", "harmful")

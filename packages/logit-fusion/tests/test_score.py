"""Scores of texts, calibration and sweeps, against the plain forward."""

import json

import numpy as np
import pytest
import torch

from fusion_core.errors import DataError, InputError
from logit_fusion import score as score_module
from logit_fusion.errors import UnpairedExpertWarning
from logit_fusion.member import Expert
from logit_fusion.model import FusedModel

TEXTS = ["hello world", "a b c d e f g", "the third of them", "tiny"]


@pytest.fixture(scope="module")
def fused(large, base, experts, make):
    return FusedModel(large, base, experts, tokenizer=make.letters())


@pytest.mark.parametrize("weights", ["uniform", "evidence"])
@pytest.mark.parametrize("elements", [1 << 25, 500])
def test_scores_are_those_of_the_forward(large, base, experts, make, monkeypatch, weights, elements):
    monkeypatch.setattr(score_module, "_ELEMENTS", elements)  # in one piece, and position by position
    letters = make.letters()
    fused = FusedModel(large, base, experts, tokenizer=letters, weights=weights)
    found = fused.score(TEXTS, batch_size=3)
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([letters(text)["input_ids"]])
        with torch.no_grad():
            log_probs = fused(ids, use_cache=False).logits[:, :-1]
        wanted = log_probs.gather(-1, ids[:, 1:, None])[0, :, 0]
        assert np.allclose(found.log_probs[found.text == number], wanted, atol=1e-8)
        assert found.nll[number] == pytest.approx(-float(wanted.mean()), abs=1e-8)
    assert found.mean_nll == pytest.approx(-found.log_probs.mean())
    assert found.perplexity == pytest.approx(np.exp(found.mean_nll))


def test_of_a_pair_the_answer_counts(fused, make):
    pairs = [("hello ", "world"), ("a b c", " d e f g")]
    found, whole = fused.score(pairs), fused.score(["hello world", "a b c d e f g"])
    for number, (_, answer) in enumerate(pairs):
        mine, all_of_it = found.log_probs[found.text == number], whole.log_probs[whole.text == number]
        assert len(mine) == len(answer)
        assert np.allclose(mine, all_of_it[-len(answer) :], atol=1e-8)
    ids = make.letters()(["hello world"])["input_ids"]
    assert np.allclose(fused.score(ids).log_probs, whole.log_probs[whole.text == 0])


def test_views_score_too(large, base, make):
    few = FusedModel(
        large, base, {"few": Expert(base, prefix="shots ", suffix="!")}, tokenizer=make.letters()
    )
    found = few.score([("hello ", "world"), ("a", "bc")])
    alone = few.score([("a", "bc")])
    assert np.allclose(found.log_probs[found.text == 1], alone.log_probs, atol=1e-8)


def test_calibrate_says_what_helps(fused, tmp_path):
    with _quiet():
        report = fused.calibrate(TEXTS, alphas=(0.5, 1.0))
    methods = [row["method"] for row in report.rows]
    assert methods[:4] == ["large", "base", "expert math", "expert chat"]
    assert {"static 0.5 (shared)", "single (paper)", "pool, evidence"} < set(methods)
    rows = {row["method"]: row for row in report.rows}
    for name in ("single", "pool"):
        label = "single (paper)" if name == "single" else "pool, uniform"
        plain = fused.score(TEXTS, strategy=name)
        assert rows[label]["nll"] == pytest.approx(plain.mean_nll, abs=1e-6)
    evident = fused.score(TEXTS, weights="evidence")
    assert rows["pool, evidence"]["nll"] == pytest.approx(evident.mean_nll, abs=1e-6)
    # The two measures of the gap, by hand.
    goal = min((rows["expert math"], rows["expert chat"]), key=lambda row: row["nll"])
    row = rows["pool, uniform"]
    if goal["top1"]:
        assert row["ratio_of_scores"] == pytest.approx(row["top1"] / goal["top1"])
    share = (rows["large"]["nll"] - row["nll"]) / (rows["large"]["nll"] - goal["nll"])
    assert row["gap_closed"] == pytest.approx(share)
    assert report.best not in ("large", "base", "math", "chat")
    assert {claim.shown for claim in report.claims} <= {True, False}
    assert "ratio of scores % (the papers' 'gap closed')" in report.shown_rows()[0]
    report.save(tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["schema"] == "fusion.report/1"


def _quiet():
    import warnings

    context = warnings.catch_warnings()
    warnings.simplefilter("ignore", UnpairedExpertWarning)
    return context


def test_sweep(fused, large, base, experts, make):
    with _quiet():
        report = fused.sweep(TEXTS, (0.0, 1.0))
    rows = {row["method"]: row for row in report.rows}
    assert rows["static 0"]["nll"] == pytest.approx(rows["large"]["nll"])
    assert rows["static 1"]["nll"] == pytest.approx(fused.score(TEXTS, alpha=0.5).mean_nll, abs=1e-6)
    assert rows["as set"]["nll"] == pytest.approx(fused.score(TEXTS).mean_nll, abs=1e-6)


def test_an_expert_far_from_its_base_is_noticed(large, base, make):
    far = FusedModel(large, base, {"far": make.near(base, 9, 2.0)}, tokenizer=make.letters())
    with pytest.warns(UnpairedExpertWarning, match="median Jeffreys divergence"):
        far.calibrate(TEXTS, alphas=(1.0,))


def test_bad_texts(fused, large, base, experts):
    with pytest.raises(InputError, match="wanted a list of texts"):
        fused.score([])
    with pytest.raises(InputError, match="wanted a list of texts"):
        fused.score("text")
    with pytest.raises(DataError, match="text 1 has 1 tokens to read and 0 to score"):
        fused.score(["ab", "a"])
    with pytest.raises(InputError, match="need the model's tokenizer"):
        FusedModel(large, base, experts).score(["ab"])
    with pytest.raises(InputError, match="batch_size is 0"):
        fused.score(["ab"], batch_size=0)
    with pytest.raises(InputError, match="target is 'me'"):
        fused.calibrate(["ab"], target="me")
    with pytest.raises(InputError, match="alphas is"):
        fused.sweep(["ab"], [float("nan")])

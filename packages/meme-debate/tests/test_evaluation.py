"""Reports about judges: ablations, where the debate helps, groups and other checks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from judges import make_judge, make_memes, picture
from sklearn.metrics import cohen_kappa_score

from fusion_core.errors import ConfigError, DataError, ShapeError
from meme_debate.ablations import ABLATIONS
from meme_debate.auditing import audit, confounder_pairs, swap_words
from meme_debate.difficulty import by_difficulty
from meme_debate.evaluation import LIGHT, ablation_names, evaluate
from meme_debate.meme import Meme
from meme_debate.scoring import kappa
from meme_debate.text_judge import TextJudge


@pytest.fixture(scope="module")
def light():
    memes, debates = make_memes(40)
    return TextJudge().fit_memes(memes, debates, coverage=0.7)


def test_audit_finds_groups_swaps_order_and_confounders(light):
    memes, debates = make_memes(40)
    twins = [Meme(f"t{i}", picture(9 + i), "same words", "", i % 2) for i in range(2)]
    report = audit([*memes, *twins], debates, light, swaps=[("rude", "cold")])
    checks = {row["check"] for row in report.rows}
    assert checks == {"all", "group", "people", "swap", "order", "confounders"}
    groups = [row for row in report.rows if row["check"] == "group"]
    assert [row["what"] for row in groups] == ["even", "odd"]
    assert sum(row["memes"] for row in groups) == 40
    assert report.pairs == 0.0  # the light judge does not see the picture
    assert 0 <= report.order_flips <= 1
    assert report.flips > 0
    assert report.gap == pytest.approx(abs(groups[0]["false_alarms"] - groups[1]["false_alarms"]))
    assert len(confounder_pairs([*memes, *twins])) == 1
    assert swap_words("He said HE, the heron", [("he", "she")]) == "She said SHE, the heron"
    none = make_judge("none", ablation="w/o LLMJ")
    assert audit(memes, debates, none).order == 0.0
    with pytest.raises(DataError, match="without a label"):
        audit([Meme("a", None, "b")], None, light)
    with pytest.raises(ConfigError, match="swaps holds"):
        audit(memes, None, light, swaps=[("a", "a")])


def test_ablations_make_one_table(light):
    memes, debates = make_memes(40)
    report = evaluate(memes, debates, light, ablations=list(ABLATIONS))
    assert len(report.comparison.methods) == 8
    values = {row["method"]: row["mean"] for row in report.comparison.rows() if row["metric"] == "accuracy"}
    verdict = np.mean([(d.verdict == m.label) for m, d in zip(memes, debates, strict=True)])
    assert values["w/o SLMJ: the LLM's verdict is the prediction"] == pytest.approx(verdict)
    assert light.settings.ablation == ""
    crossed = evaluate(memes, debates, None, ablations=["w/o MD"], seeds=[0, 1])
    assert crossed.comparison.seeds == [0, 1]
    fused = make_judge()
    evaluate(memes[:8], debates[:8], fused, ablations=["w/o MF"])
    assert fused.fusion == "layerwise"
    assert ablation_names(["md", "w/o UR"]) == ["w/o MD", "w/o UR"]
    with pytest.raises(ConfigError, match="ablate is 'x'"):
        ablation_names(["x"])


def test_the_light_judge_stands_beside_a_fused_one():
    memes, debates = make_memes(20)
    report = evaluate(memes, debates, make_judge(), ablations=["w/o MD"])
    methods = report.comparison.methods
    assert methods[-1] == LIGHT
    assert len(methods) == 3
    assert "of 1 ablations" in report.claims[0].sentence


def test_an_ablation_reads_the_caption_where_the_judge_does_not():
    memes, debates = make_memes(8)
    judge = make_judge(caption=False)
    without = evaluate(memes, debates, judge, ablations=["w/o MF"]).comparison
    plain = make_judge("none")
    reading = evaluate(memes, debates, plain).comparison
    rows = {(row["method"], row["metric"]): row["mean"] for row in without.rows()}
    same = {row["metric"]: row["mean"] for row in reading.rows() if row["method"] == "all"}
    name = next(method for method in without.methods if method.startswith("w/o MF"))
    assert {metric: rows[name, metric] for metric in same} == same
    assert (judge.fusion, judge.settings.caption) == ("layerwise", False)


def test_difficulty_counts_what_the_debate_helps_and_hurts():
    truth = np.array([1, 1, 0, 0, 1, 0])
    alone = np.array([0.9, 0.55, 0.1, 0.45, 0.4, 0.95])
    debated = np.array([0.9, 0.2, 0.1, 0.4, 0.8, 0.2])
    sure, unsure, everything, mixed = by_difficulty([alone], [debated], truth)
    assert (sure["count"], unsure["count"], everything["count"]) == (3, 3, 6)
    assert (sure["accuracy_without"], sure["accuracy"]) == (pytest.approx(2 / 3), 1.0)
    assert (sure["helped"], sure["hurt"]) == (1, 0)
    assert (unsure["helped"], unsure["hurt"]) == (1, 1)
    assert (everything["accuracy_without"], everything["accuracy"]) == (
        pytest.approx(4 / 6),
        pytest.approx(5 / 6),
    )
    assert mixed["accuracy"] == pytest.approx(4 / 6), "sure ones as before, unsure ones debated"
    assert everything["p"] == pytest.approx(1.0)
    two = by_difficulty([alone, alone], [debated, alone], truth)
    assert (two[2]["helped"], two[2]["p"]) == (2, None)
    with pytest.raises(ShapeError, match="1 and 0 seeds"):
        by_difficulty([alone], [], truth)


def test_difficulty_is_part_of_the_evaluation(light, tmp_path):
    memes, debates = make_memes(40)
    report = evaluate(memes, debates, light)
    assert [row["memes"] for row in report.rows] == [
        "sure without debate", "unsure without debate", "all", "all, the unsure half debated only"
    ]  # fmt: skip
    assert sum(row["count"] for row in report.rows[:2]) == 40
    assert report.rows[2]["accuracy"] == next(r["mean"] for r in report.comparison.rows())
    report.save(tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["rows"] == report.rows
    assert evaluate(memes, None, light).rows == []
    assert report.comparison.title.startswith("40 memes (train 40), ")


def test_kappa_is_scikit_learns():
    draws = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.9):
        one, other = draws.random(200) < share, draws.random(200) < 0.5
        assert kappa(one, other) == pytest.approx(cohen_kappa_score(one, other))
    assert kappa(one, one) == pytest.approx(1)
    assert np.isnan(kappa(np.ones(3, bool), np.ones(3, bool)))


def test_audit_says_how_far_judge_verdict_and_people_agree(light):
    memes, debates = make_memes(40)
    report = audit(memes, debates, light)
    found = {row["what"]: row["kappa"] for row in report.rows if row["check"] == "people"}
    verdicts = [debate.verdict for debate in debates]
    labels = [meme.label for meme in memes]
    assert found["verdict and labels"] == pytest.approx(cohen_kappa_score(verdicts, labels))
    assert report.agreement == found["judge and labels"] > found["verdict and labels"]
    assert report.title == "Audit of text judge, policy harmful, 40 memes (train 40)"
    with pytest.raises(ConfigError, match="threshold is 2"):
        audit(memes, debates, light, threshold=2)

"""The demo's stand-in memes and debater, and what one seed of it has to show."""

from __future__ import annotations

import base64
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

from fusion_core.errors import CheckpointError, FusionError, MissingExtraError
from meme_debate import demo_claims as words
from meme_debate import experiment as demonstration
from meme_debate import prompts, stand_in_memes
from meme_debate.demo_pages import choose_cards
from meme_debate.detection import detect
from meme_debate.encoding import pixels_of
from meme_debate.fused import score_memes
from meme_debate.judge import FUSIONS
from meme_debate.policy import Policy
from meme_debate.shipped import checkpoint, load_judges, save_judges, shipped_tokenizer
from meme_debate.stand_in import make_judge
from meme_debate.stand_in_memes import HELD_OUT, KNOWN, PIXELS, make_memes
from meme_debate.stand_in_server import BIG_WORDS, LARGE, REFUSAL, Script, view
from meme_debate.stand_in_work import SCALES, Worker

pytest.importorskip("skimage", reason="needs the extra demo")
pytest.importorskip("matplotlib", reason="needs the extra demo")


def test_the_label_is_the_pair_and_neither_half_tells_it(tmp_path):
    made = make_memes(tmp_path, 64, seed=3)
    cells = Counter()
    for each in made:
        says_large = any(word in each.meme.text for word in BIG_WORDS)
        is_large = each.thing in LARGE
        assert each.meme.label == int(says_large != is_large)
        assert each.thing in KNOWN
        cells[says_large, is_large] += 1
    assert set(cells.values()) == {16}
    assert 0.2 < np.mean([each.hidden for each in made]) < 0.6
    assert all((each.judged.image is None) == each.hidden for each in made)
    again = make_memes(tmp_path / "again", 64, seed=3)
    assert [each.digest for each in again] == [each.digest for each in made]
    unseen = make_memes(tmp_path, 8, split="unseen", things=HELD_OUT)
    assert {each.thing for each in unseen} == {"moon", "coins"}


def test_scikit_image_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(stand_in_memes, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "meme-debate\[demo\]"'):
        make_memes(tmp_path, 4)


def test_the_debater_errs_as_it_says():
    seen = [view("rocket", f"tiny thing {i}", "x", 0) for i in range(4000)]
    right = [said.better == "harmful" for said in seen]
    assert 0.58 < np.mean(right) < 0.72
    named = np.mean(["rocket" in said.statements["harmful"] for said in seen])
    assert 0.77 < named < 0.90
    assert 0.004 < np.mean([said.refuses is not None for said in seen]) < 0.02
    assert view("rocket", "tiny", "x", 0) == view("rocket", "tiny", "x", 0)
    assert seen[0] != view("rocket", "tiny thing 0", "x", 1)
    held_out = [view(thing, f"giant {i}", "x", 0) for thing in ("moon", "coins") for i in range(300)]
    assert any("moon" in said.statements["harmful"] for said in held_out)


def messages(task, picture=b"bytes", text="what a giant"):
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    user = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompts.prefix(text)},
            {"type": "text", "text": task}]  # fmt: skip
    return {
        "model": "stand-in-3",
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": user}],
    }


def test_the_server_answers_the_real_prompts():
    import hashlib

    digest = hashlib.sha256(b"bytes").hexdigest()
    script = Script({digest: "rocket"})
    said = view("rocket", "what a giant", digest, 3)
    for side in ("harmful", "harmless"):
        document = script.answer(messages(prompts.stance(side, Policy())))
        text = document["choices"][0]["message"]["content"]
        assert text == (REFUSAL if side == said.refuses else said.statements[side])
    for a, b in (("harmful", "harmless"), ("harmless", "harmful")):
        task = prompts.verdict(said.statements[a], said.statements[b])
        document = script.answer(messages(task))
        better = json.loads(document["choices"][0]["message"]["content"])["better"]
        assert (a if better == "A" else b) == said.better


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """One seed of the quick demo, over HTTP, as the demo itself runs it."""
    with Worker(tmp_path_factory.mktemp("demo"), SCALES["quick"], [0]) as worker:
        found = demonstration.run_seeds(worker)[0]
        reports = worker.report(0), worker.report(0, again=True)
    return (*found, *reports)


@pytest.mark.slow
def test_one_seed_shows_what_the_demo_claims(judged, tmp_path):
    rows, judge, sets, report, again = judged
    assert (
        report["calls"] == report["memes"] * 3
    )  # a refused side is asked twice, and then there is no verdict
    assert report["transport"]["retries"] > 0
    assert again["cached"] == again["calls"] == report["calls"]
    labels = sets["test"].labels
    accuracy = {name: demonstration._accuracy(scores["test"], labels) for name, scores in rows.items()}
    assert list(accuracy) == words.order(SCALES["quick"].fusions)
    assert 0.42 <= accuracy[words.without_debate("none")] <= 0.58
    assert accuracy[words.without_debate("layerwise")] >= 0.70
    ours = accuracy[words.with_debate("layerwise")]
    assert ours >= 0.82
    assert ours >= accuracy[words.VERDICT] + 0.10
    assert 0.42 <= accuracy[words.TEXT_ONLY] <= 0.58
    assert 0.42 <= accuracy[words.PICTURE_ONLY] <= 0.58
    cards, figures = demonstration._show(
        tmp_path, judge, sets["test"], rows[words.with_debate("layerwise")]["test"]
    )
    assert {figure.path for figure in figures} == {"calibration.png", "cards.png"}
    page = (tmp_path / "cards.html").read_text()
    assert page.count("<article") >= 3
    assert page.count("<mark") >= 3
    assert {"right", "wrong", "left to a person"} <= set(choose_cards(cards))
    notes = words.notes(SCALES["quick"], [report], again, cards)
    assert all(isinstance(note, str) for note in notes)
    some = list(detect(sets["test"].memes[:3], sets["test"].debates[:3], judge))
    assert [card.id for card in some] == [meme.id for meme in sets["test"].memes[:3]]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A few memes with debates, their pixels, what is prepared of them, and judges that are trained here."""
    scale = SCALES["quick"]._replace(train=48, test=16, seeds=1, steps=2, fusions=FUSIONS)
    tower = partial(demonstration.train_tower, steps=3)
    with Worker(tmp_path_factory.mktemp("few"), scale, [7]) as worker, pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstration, "train_tower", tower)
        prepared = dict(demonstration.prepared(worker))[7]
        scores = demonstration.run_seeds(worker)[7][0]
        return scale, prepared, worker.pixels(7), demonstration.train_seeds(worker)[7], scores


def test_judges_of_the_second_process_are_those_trained_here(few):
    scale, prepared, _, judges, scores = few
    trained = demonstration.Prepared(prepared.sets, judges, prepared.features)
    assert set(words.order(scale.fusions)) == set(scores)
    for fusion in scale.fusions:
        for row, parts in demonstration._fused(trained, fusion).items():
            np.testing.assert_allclose(scores[row]["test"], parts["test"], atol=1e-6)
            untrained = demonstration._fused(prepared, fusion)[row]["test"]
            assert not np.allclose(parts["test"], untrained, atol=1e-4)


def test_trained_judges_come_back_from_their_file(few, tmp_path):
    _, prepared, _, judges, _ = few
    sets = prepared.sets
    path = tmp_path / "judges.safetensors"
    shipped = {fusion: judge for fusion, judge in judges.items() if fusion != "final"}
    save_judges(shipped, path)
    again = {fusion: make_judge(shipped_tokenizer(path), fusion, 99) for fusion in shipped}
    load_judges(again, path)
    memes, said = sets["test"].memes[:4], list(sets["test"].debates[:4])
    for fusion, judge in shipped.items():
        assert again[fusion].tokenizer.get_vocab() == judge.tokenizer.get_vocab()
        before, after = (score_memes(each, memes, said) for each in (judge, again[fusion]))
        np.testing.assert_allclose(after, before, atol=2e-2)  # float16
    with pytest.raises(CheckpointError, match="does not fit"):
        load_judges({"final": judges["none"]}, path)
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors holds no judges of the demo"):
        shipped_tokenizer(tmp_path / "nowhere.safetensors")


def test_pixels_of_the_worker_are_the_judges(few):
    _, prepared, pixels, _, _ = few
    for name, part in prepared.sets.items():
        assert pixels[name].shape == (len(part.items), 3, PIXELS, PIXELS)
        found = torch.from_numpy(pixels[name][3])
        assert torch.equal(found, pixels_of(part.items[3].meme.image, PIXELS)), name


def test_shipped_words_are_those_of_the_demos_memes():
    for seed in range(SCALES["quick"].seeds):
        vocabulary = shipped_tokenizer(checkpoint(seed)).get_vocab()
        assert {"giant", "crumb", "rocket", "jibe", "harmless"} <= set(vocabulary)
        assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_a_worker_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(Worker, "memes_seed", lambda self, seed: seed)
    scale = SCALES["quick"]._replace(train=-1)
    told = pytest.raises(FusionError, match=r"second process ended: .+")
    with Worker(tmp_path, scale, [0]) as worker, told:
        worker.parts(0)

"""The light judge, training, features, detection, cards, audit and evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from judges import make_judge, make_memes, picture

from fusion_core.errors import CheckpointError, ConfigError, DataError, InputError, ShapeError, StoreError
from meme_debate.cards import card_html, card_report
from meme_debate.composing import compose_parts
from meme_debate.detection import detect, load_judge, score
from meme_debate.encoding import pixels_of
from meme_debate.explain import explain
from meme_debate.features import image_features
from meme_debate.fused import score_memes
from meme_debate.judge import Judge
from meme_debate.meme import Debate, Meme
from meme_debate.settings import JudgeSettings
from meme_debate.text_judge import TextJudge, folds
from meme_debate.training import JudgeBatches, JudgeTrainConfig, decay_groups, linear_schedule, train_judge


@pytest.fixture(scope="module")
def light():
    memes, debates = make_memes(40)
    return TextJudge().fit_memes(memes, debates, coverage=0.7)


def test_light_judge_saves_without_pickle_and_comes_back(light, tmp_path):
    light.save(tmp_path / "judge")
    names = {path.name for path in (tmp_path / "judge").iterdir()}
    assert names == {"config.json", "model.safetensors", "calibration.json", "card.md"}
    back = load_judge(tmp_path / "judge")
    memes, debates = make_memes(40)
    assert back.digest() == light.digest()
    assert np.array_equal(back.score_memes(memes, debates), light.score_memes(memes, debates))
    with pytest.raises(InputError, match="not empty"):
        light.save(tmp_path / "judge")
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_judge(tmp_path / "judge")
    with pytest.raises(CheckpointError, match="holds no judge"):
        load_judge(tmp_path / "nowhere")


def test_light_judge_tells_what_is_wrong():
    with pytest.raises(InputError, match="learned nothing yet"):
        TextJudge().predict_proba(["a"])
    with pytest.raises(DataError, match="only class 1"):
        TextJudge().fit(["a b", "c d"], [1, 1])
    with pytest.raises(DataError, match="labels holds 1 values such as 3"):
        TextJudge().fit(["a b", "c d"], [1, 3])
    with pytest.raises(ShapeError, match="labels has shape"):
        TextJudge().fit(["a b", "c d"], [1])
    with pytest.raises(DataError, match="cannot be learned from"):
        TextJudge().fit(["", ""], [0, 1])
    with pytest.raises(InputError, match="one text, wanted a list"):
        TextJudge().fit("a b", [0])
    with pytest.raises(InputError, match="c is -1"):
        TextJudge(c=-1)
    with pytest.raises(DataError, match="have no label, the first 'x'"):
        TextJudge().fit_memes([Meme("x", None, "a")])
    with pytest.raises(DataError, match="wanted at least 5"):
        folds([0, 1, 1, 1, 1, 1], 5)
    assert len(TextJudge().fit(["good day", "bad day"], [0, 1]).predict_proba([])) == 0


def test_word_weights_of_the_light_judge_sum_to_its_logit(light):
    memes, debates = make_memes(40)
    for text in light.texts(memes[:5], debates[:5]):
        logit = math.log((p := float(light.predict_proba([text])[0])) / (1 - p))
        total = sum(weight for _, _, weight in light.word_weights(text))
        assert total + light.intercept == pytest.approx(logit, abs=1e-9)


@pytest.mark.parametrize("normalize", ["clip", "inception"])
@pytest.mark.parametrize("size", [(20, 31), (40, 24), (16, 16)])
def test_pixels_are_clips(size, normalize):
    from transformers import CLIPImageProcessor

    image = picture(1, size)
    options = {} if normalize == "clip" else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, **options
    )
    theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    ours = pixels_of(image, 16, normalize)
    assert (ours - theirs).abs().mean() < 0.02  # their resize may be torchvision's
    assert pixels_of(None, 16).std((1, 2)).max() < 1e-6


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    from PIL import Image

    picture().save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    Image.new("1", (8000, 7000)).save(tmp_path / "bomb.png")
    for name, words in (
        ("cut.png", "broken or cut off|no image"),
        ("bomb.png", "max_pixels"),
        ("no.png", "not there"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            pixels_of(tmp_path / name, 16)
        assert name in str(caught.value)


def test_cached_features_equal_fresh_ones_and_know_their_tower(tmp_path):
    judge = make_judge()
    memes, debates = make_memes()
    images = [meme.image for meme in memes]
    fresh = image_features(judge, images)
    stored = image_features(judge, images, tmp_path / "states", batch_size=3)
    again = image_features(judge, images, tmp_path / "states")
    assert len(fresh.states) == 4
    rows = [5, 0, 3]
    assert torch.equal(stored[rows], again[rows])
    assert torch.allclose(fresh[rows], stored[rows], atol=1e-6)
    assert np.allclose(
        score_memes(judge, memes, debates, features=stored), score_memes(judge, memes, debates), atol=1e-6
    )
    other = make_judge(seed=3)
    with pytest.raises(StoreError, match="tower"):
        image_features(other, images, tmp_path / "states")
    other = make_judge(normalize="inception")
    with pytest.raises(StoreError, match=r"preprocessing\.normalize"):
        image_features(other, images, tmp_path / "states")
    with pytest.raises(StoreError, match="images"):
        image_features(judge, images[:3], tmp_path / "states")


def test_decay_groups_and_schedule_are_the_authors():
    judge = make_judge()
    judge.image_transformer.requires_grad_(False)
    groups = decay_groups(judge, 0.01)
    decayed = {id(p) for p in groups[0]["params"]}
    names = {name: id(p) in decayed for name, p in judge.named_parameters() if p.requires_grad}
    assert names["text_transformer.encoder.block.0.layer.0.layer_norm.weight"]
    assert names["clf.weight"]
    assert not names["clf.bias"]
    assert not names["text_transformer.encoder.ca_block.0.proj_q.bias"]
    assert not any(name.startswith("image_transformer") for name in names)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = linear_schedule(optimizer, 20, 0.1)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert np.allclose(np.diff(rates[2:]), -1 / 18)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_debate_dropout_leaves_out_its_share_of_the_batches(share):
    judge = make_judge()
    memes, debates = make_memes(64)
    config = JudgeTrainConfig(batch_size=4, debate_dropout=share)
    batches = JudgeBatches(judge, memes, debates, config, image_features(judge, [m.image for m in memes]))
    plan = batches.plan()
    assert sorted(int(i) for rows, _ in plan for i in rows) == list(range(64))
    assert sum(dropped for _, dropped in plan) == pytest.approx(share * 16, abs=1)
    whole, short = (batches.batch(np.arange(4), dropped=d)["input_ids"].shape[1] for d in (False, True))
    assert short < whole
    assert 0 <= batches.padding_share() < 0.5


def test_training_learns_sees_each_picture_once_and_resumes_exactly(tmp_path):
    memes, debates = make_memes(24)
    config = JudgeTrainConfig(steps=10, batch_size=8, lr=3e-3, save_every=4, seed=1)
    judge = make_judge(max_length=64)
    calls = []
    judge.image_transformer.register_forward_hook(lambda *_: calls.append(1))
    held = make_memes(20, seed=5)
    result = train_judge(judge, memes, debates, config, out=tmp_path / "a", device="cpu", validation=held,
                         features=tmp_path / "states")  # fmt: skip
    assert result.steps == 10
    assert len(calls) == 2  # the training pictures, and those of the validation
    back = load_judge(tmp_path / "a")
    assert isinstance(back, Judge)
    assert back.calibration.size == 20
    assert np.allclose(score_memes(back, *held), score_memes(judge, *held), atol=1e-7)
    written = json.loads((tmp_path / "a" / "train.json").read_text())
    assert (written["train"]["lr"], written["fusion"], written["settings"]["max_length"]) == (
        3e-3,
        "layerwise",
        64,
    )

    class Stop(Exception):
        pass

    def stop_at(count):
        seen = []

        def hook(*_):
            seen.append(1)
            if len(seen) == count:
                raise Stop

        return hook

    other = make_judge(max_length=64)
    handle = other.clf.register_forward_hook(stop_at(7))
    with pytest.raises(Stop):
        train_judge(other, memes, debates, config, out=tmp_path / "b", device="cpu")
    handle.remove()
    plain = make_judge(max_length=64)
    train_judge(plain, memes, debates, config, out=tmp_path / "c", device="cpu")
    again = make_judge(max_length=64)
    train_judge(again, memes, debates, config, out=tmp_path / "b", device="cpu", resume=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(InputError, match="holds a run"):
        train_judge(again, memes, debates, config, out=tmp_path / "b", device="cpu")


def test_one_judge_serves_memes_with_and_without_debate():
    memes, debates = make_memes(64)
    judge = make_judge(max_length=64)
    config = JudgeTrainConfig(steps=60, batch_size=16, lr=1e-2)
    optimizer = torch.optim.AdamW(decay_groups(judge, 0.01), lr=config.lr)
    batches = JudgeBatches(judge, memes, debates, config, image_features(judge, [m.image for m in memes]))
    judge.train()
    for epoch in range(15):
        batches.set_epoch(epoch)
        for batch in batches:
            judge(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    labels = np.array([meme.label for meme in memes])
    for said in (debates, [None] * 64):
        assert ((score_memes(judge, memes, said) >= 0.5) == labels).mean() > 0.9


def test_training_refuses_what_it_cannot_use(tmp_path):
    judge = make_judge()
    memes, debates = make_memes(6)
    with pytest.raises(DataError, match="one class only"):
        train_judge(judge, memes[::2], out=tmp_path)
    with pytest.raises(DataError, match="have no label"):
        train_judge(judge, [replace(memes[0], label=None), *memes[1:]], out=tmp_path)
    for setting in ({"batch_size": 0}, {"lr": 0.0}, {"debate_dropout": 1.5}, {"warmup": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            JudgeTrainConfig(**setting)
    del debates


def test_cards_say_what_was_read_and_decided(light):
    memes, debates = make_memes(40)
    cards = list(detect(memes, debates[:30], light))
    assert [card.id for card in cards] == [meme.id for meme in memes]
    assert {card.decision for card in cards} >= {"harmful", "harmless"}
    for card, meme in zip(cards, memes, strict=True):
        said = next((d for d in debates[:30] if d.id == card.id), None)
        line = card.to_dict()
        assert list(line)[:4] == ["schema", "id", "score", "decision"]
        assert line["schema"] == "meme-debate.card/1"
        json.dumps(line, allow_nan=False)
        assert ("debate" in card.inputs) == (said is not None)
        assert ("no_debate" in card.flags) == (said is None)
        assert "image" not in card.inputs
        if card.decision == "abstain" or said is None:
            assert card.explanation is None
            assert card.faithfulness is None
        else:
            assert card.explanation == getattr(said, card.decision)
            assert card.faithfulness["flips"] in (True, False)
            assert ". Without the chosen case the score is" in card_html(card)
        fields = {
            "text": meme.text,
            "caption": meme.caption,
            "harmful": card.harmful,
            "harmless": card.harmless,
        }
        for word in card.words:
            assert fields[word.field][word.start : word.end].isidentifier()
    assert {"id", "score", "decision", "threshold", "band", "explanation", "explanation_side",
            "harmful", "harmless", "verdict", "agreement", "judge", "inputs", "words", "patches",
            "faithfulness", "flags", "schema"} == set(line)  # fmt: skip


def test_permuting_memes_permutes_cards_and_the_threshold_is_monotone(light):
    memes, debates = make_memes(40)
    for judge in (light, make_judge()):
        cards = list(detect(memes, debates, judge, words=3))
        order = np.random.default_rng(0).permutation(40)
        again = list(detect([memes[i] for i in order], debates, judge, words=3))
        for i, card in zip(order, again, strict=True):
            assert (card.id, card.decision) == (cards[i].id, cards[i].decision)
            assert card.score == pytest.approx(cards[i].score, abs=2e-6)
    called = [
        {
            card.id
            for card in detect(memes, debates, make_judge(), threshold=level, words=0)
            if card.decision == "harmful"
        }
        for level in (0.2, 0.5, 0.8)
    ]
    assert called[0] >= called[1] >= called[2]


def test_fused_cards_have_patches_and_gradients_add_up():
    judge = make_judge()
    memes, debates = make_memes(6)
    memes[1] = replace(memes[1], image=None)
    cards = list(detect(memes, debates, judge, words=50))
    assert cards[0].patches.grid == (2, 2)
    assert np.isfinite(cards[0].patches.weights).all()
    assert cards[1].patches is None
    assert "no_image" in cards[1].flags
    assert "image" in cards[0].inputs
    alone = explain(judge, memes[:1], debates[:1], top=50)[0]
    assert [w.field for w in alone.words] == [w.field for w in cards[0].words]
    assert np.allclose([w.weight for w in alone.words], [w.weight for w in cards[0].words], atol=1e-5)
    blind = explain(make_judge("none"), memes[:1], debates[:1])[0]
    assert blind.patches is None


def test_refused_and_missing_sides_are_told():
    memes, _ = make_memes(3)
    debates = [Debate("m0", "", "only a joke", flags=("refused_harmful",)),
               Debate("m1", "", "", flags=("refused_harmful", "refused_harmless")),
               Debate("m2", "", "a joke")]  # fmt: skip
    judge = make_judge()
    cards = list(detect(memes, debates, judge, threshold=0.0))
    assert [card.decision for card in cards] == ["harmful"] * 3
    assert cards[0].explanation is None
    assert "refused_harmful" in cards[0].flags
    assert "no_debate" in cards[1].flags
    assert "debate" not in cards[1].inputs
    assert "empty_harmful" in cards[2].flags
    assert "refused to put this case" in card_html(cards[0])


def test_cards_and_their_table_use_the_words_of_the_judges_policy():
    judge = make_judge(labels=("wanted", "spam"))
    memes, debates = make_memes(2)
    cards = list(detect(memes, debates, judge, threshold=0.0, words=0))
    page = card_html(cards[0])
    assert ": spam</h3>" in page
    assert "The case that it is wanted" in page
    assert "harmless" not in page.split("</style>")[1]
    assert [row["what"] for row in card_report(cards).rows[:3]] == ["spam", "wanted", "abstain"]
    assert cards[0].to_dict()["decision"] == "harmful"  # programs read one vocabulary


def test_everything_on_a_card_is_escaped():
    nasty = '<script>alert(1)</script> rude "quoted" & <img src=x onerror=y> http://evil.example \u202e'
    meme = Meme("<b>id</b>", picture(), nasty, nasty, 1)
    debate = Debate("<b>id</b>", nasty, nasty, 1)
    for judge in (make_judge(name="<i>name</i>"), TextJudge().fit([nasty, "calm words"], [1, 0])):
        card = next(iter(detect([meme], [debate], judge)))
        page = card.html()
        for bad in ("<script", "<img src=x", "<b>id", "<i>name"):
            assert bad not in page
        assert "&lt;script&gt;" in page or "&lt;<mark" in page
        assert 'href="http' not in page


def test_debates_of_another_policy_are_refused(light):
    memes, debates = make_memes(2)
    record = {"policy": {"name": "spam", "digest": "ab"}}
    other = [replace(debates[0], record=record), debates[1]]
    with pytest.raises(InputError, match="learned the policy 'harmful', debate 'm0' was made for 'spam'"):
        list(detect(memes, other, light))
    changed = TextJudge(settings=JudgeSettings(policy="spam", policy_digest="cd"))
    with pytest.raises(InputError, match="another definition"):
        list(detect(memes, other, changed))
    with pytest.raises(InputError, match="judge is int"):
        detect(memes, debates, 3)
    with pytest.raises(ConfigError, match="threshold is 2"):
        detect(memes, debates, light, threshold=2)


def test_card_report_counts_and_asks(light, tmp_path):
    memes, debates = make_memes(40)
    wrong = [replace(meme, label=1 - meme.label) for meme in memes]
    report = card_report(list(detect(wrong, debates, light, words=2)))
    report.save(tmp_path / "out")
    lines = (tmp_path / "out" / "cards.jsonl").read_text().splitlines()
    assert len(lines) == 40
    rows = {row["what"]: row["share"] for row in report.rows}
    assert rows["auroc"] < 0.4
    assert any("are the labels reversed?" in what for what in rows)
    assert rows["harmful"] + rows["harmless"] + rows["abstain"] == pytest.approx(1)


def test_scores_without_any_debate_are_text_and_picture(light):
    memes, _ = make_memes(4)
    text = compose_parts([("Text", memes[0].text), ("Caption", memes[0].caption)])
    assert light.texts(memes[:1], [None]) == [text]
    assert score(light, memes, [None] * 4).shape == (4,)

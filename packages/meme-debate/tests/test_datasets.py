"""Converters on tiny made data sets, duplicates, the authors' pickles, and the commands about judges."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from judges import make_memes, picture

from fusion_core.errors import ConfigError, DataError, InputError
from fusion_core.testing import run_cli
from meme_debate.cli import main
from meme_debate.datasets import FORMATS, convert, load_official_debates
from meme_debate.duplicates import drop_duplicates, find_duplicates
from meme_debate.meme import Debate, Meme, load_memes, save_debates, save_memes
from meme_debate.scoring import metrics
from meme_debate.text_judge import TextJudge


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def images(folder, *names, seed=0):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed + number, (9, 8)).save(path)


def make_harm(folder):
    rows = [
        {"id": "a", "image": "a.png", "labels": ["not harmful"], "text": "fine\nday"},
        {"id": "b", "image": "b.png", "labels": ["somewhat harmful", "society"], "text": "odd"},
        {"id": "c", "image": "c.png", "labels": ["very harmful", "individual"], "text": "rude"},
    ]
    lines(folder / "annotations" / "train.jsonl", rows[:2])
    lines(folder / "annotations" / "test.jsonl", rows[2:])
    images(folder / "images", "a.png", "b.png", "c.png")
    return {"train": {"0": 1, "1": 1}, "test": {"1": 1}}


def make_fhm(folder):
    lines(folder / "train.jsonl", [{"id": 1, "img": "img/1.png", "label": 0, "text": "a"}])
    lines(folder / "test_seen.jsonl", [{"id": 2, "img": "img/2.png", "label": 1, "text": "b"}])
    lines(folder / "test_unseen.jsonl", [{"id": 2, "img": "img/2.png", "text": "b"}])
    images(folder / "img", "1.png", "2.png")
    return {"train": {"0": 1}, "test_seen": {"1": 1}, "test_unseen": {"null": 1}}


def make_mami(folder):
    head = "file_name\tmisogynous\tshaming\tstereotype\tobjectification\tviolence\tText Transcription\n"
    (folder / "training.csv").write_text(head + '1.jpg\t1\t0\t0\t0\t0\ta "quoted" line\n', encoding="utf-8")
    (folder / "test.tsv").write_text("file_name\tText Transcription\n2.jpg\tb\n", encoding="utf-8")
    (folder / "test_labels.txt").write_text("2.jpg\t0\t0\t0\t0\t0\n", encoding="utf-8")
    images(folder / "TRAINING", "1.jpg")
    images(folder, "2.jpg", seed=5)
    return {"training": {"1": 1}, "test": {"0": 1}}


def make_multioff(folder):
    place = folder / "Split Dataset"
    place.mkdir()
    for word, label in (("Training", "offensive"), ("Testing", "Non-offensiv")):
        (place / f"{word}_meme_dataset.csv").write_text(
            f'image_name,sentence,label\n{word}.png,"two\nlines",{label}\n', encoding="utf-8"
        )
    images(folder / "Labelled Images", "Training.png", "Testing.png")
    return {"train": {"1": 1}, "test": {"0": 1}}


def make_pridemm(folder):
    (folder / "PrideMM.csv").write_text(
        "name,text,hate,target,stance,humour,split\na.png,x,1,0,1,1,train\nb.png,y,0,,1,1,test\n",
        encoding="utf-8",
    )
    images(folder / "Images", "a.png", "b.png")
    return {"train": {"1": 1}, "test": {"0": 1}}


MAKERS = {"harmc": make_harm, "harmp": make_harm, "fhm": make_fhm, "mami": make_mami,
          "multioff": make_multioff, "pridemm": make_pridemm}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_each_data_set_becomes_the_same_records(name, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    splits = MAKERS[name](folder)
    report = convert(name, folder, tmp_path / "out" / "memes.jsonl")
    assert report.splits == splits
    memes = load_memes(tmp_path / "out" / "memes.jsonl")
    assert len(memes) == report.memes == sum(n for part in splits.values() for n in part.values())
    assert {meme.source for meme in memes} == {name}
    assert all(Path(meme.image).is_file() for meme in memes)
    raw = json.loads((tmp_path / "out" / "memes.jsonl").read_text().splitlines()[0])
    assert raw["image"].startswith("../set/")
    with pytest.raises(InputError, match=r"holds no .*; wanted a folder with .*nothing is downloaded"):
        convert(name, tmp_path / "out", tmp_path / "x.jsonl")


def test_positive_labels_are_explicit(tmp_path):
    make_harm(tmp_path)
    strict = convert("harmc", tmp_path, tmp_path / "m.jsonl", positive=["very harmful"])
    assert strict.positive == ("very harmful",)
    assert strict.splits["train"] == {"0": 2}
    assert strict.raw_labels == {"not harmful": 1, "somewhat harmful": 1, "very harmful": 1}
    with pytest.raises(ConfigError, match="'awful', which never occurs; there are"):
        convert("harmc", tmp_path, tmp_path / "m.jsonl", positive=["awful"])
    with pytest.raises(ConfigError, match="format is 'harm', wanted one of harmc"):
        convert("harm", tmp_path, tmp_path / "m.jsonl")
    lines(
        tmp_path / "annotations" / "val.jsonl", [{"id": "d", "image": "a.png", "labels": ["odd"], "text": ""}]
    )
    with pytest.raises(DataError, match="meme 'd' has the label 'odd'"):
        convert("harmc", tmp_path, tmp_path / "m.jsonl")


def test_versions_of_harm_p_are_told_by_their_counts(tmp_path):
    rows = [{"id": str(i), "image": "a.png", "text": str(i),
             "labels": ["very harmful" if i < 116 else "not harmful"]} for i in range(3020)]  # fmt: skip
    lines(tmp_path / "train.jsonl", rows)
    images(tmp_path / "images", "a.png")
    assert convert("harmp", tmp_path, tmp_path / "m.jsonl", drop=True).version == "v0"


def test_duplicates_are_counted_within_and_across_splits(tmp_path):
    images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a2.png").write_bytes((tmp_path / "a.png").read_bytes())
    a, a2, b, c = (tmp_path / f"{n}.png" for n in ("a", "a2", "b", "c"))
    memes = [Meme("1", a, "x", split="train"), Meme("2", a2, "y", split="train"),
             Meme("3", a, "z", split="test"), Meme("4", b, "Same  Words", split="train"),
             Meme("5", c, "same words", split="test"),
             Meme("6", None, "same words", split="test")]  # fmt: skip
    found = find_duplicates(memes)
    assert found.images == (("1", "2", "3"),)
    assert found.texts == (("4", "5", "6"),)
    assert (found.within, found.across, found.texts_across) == (1, 1, 1)
    assert "1 pictures repeat within a split, 1 across" in found.warning()
    kept, dropped = drop_duplicates(memes, found)
    assert [meme.id for meme in kept] == ["1", "4", "5"]
    assert dropped == ("2", "3", "6")
    assert find_duplicates(memes[:1]).warning() is None


class Evil:
    def __reduce__(self):
        return (os.system, ("echo pwned",))


def test_the_authors_pickles_are_read_as_texts_only(tmp_path):
    said = {"a": {"harmful": "x", "harmless": "y"}, "b": {"harmful": "z", "harmless": ""}}
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(said))
    (tmp_path / "v.pkl").write_bytes(pickle.dumps({"a": "1"}))
    found = load_official_debates(tmp_path / "d.pkl", tmp_path / "v.pkl")
    assert found == [Debate("a", "x", "y", 1), Debate("b", "z", "")]
    for bad, words in (
        (Evil(), "posix.system|nt.system"),
        ({"a": np.zeros(2)}, "numpy"),
        ([1], "holds a list"),
    ):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(bad))
        with pytest.raises(DataError, match=words):
            load_official_debates(tmp_path / "bad.pkl")
    (tmp_path / "half.pkl").write_bytes(pickle.dumps({"a": {"harmful": "x"}}))
    with pytest.raises(DataError, match="'a' lacks a side"):
        load_official_debates(tmp_path / "half.pkl")
    (tmp_path / "v2.pkl").write_bytes(pickle.dumps({"a": "yes"}))
    with pytest.raises(DataError, match="'a' is 'yes', wanted '0' or '1'"):
        load_official_debates(tmp_path / "d.pkl", tmp_path / "v2.pkl")
    with pytest.raises(InputError, match="cannot be read"):
        load_official_debates(tmp_path / "none.pkl")


@pytest.fixture
def files(tmp_path):
    memes, debates = make_memes(40)
    images(tmp_path / "pictures", *(f"{m.id}.png" for m in memes))
    memes = [Meme(m.id, tmp_path / "pictures" / f"{m.id}.png", m.text, m.caption, m.label, split=m.split,
                  group=m.group) for m in memes]  # fmt: skip
    save_memes(tmp_path / "memes.jsonl", memes)
    save_debates(tmp_path / "debates.jsonl", debates)
    return tmp_path


def test_train_predict_evaluate_detect_and_audit_by_command(files):
    memes, said, judge = files / "memes.jsonl", ("--debates", files / "debates.jsonl"), files / "judge"
    done = run_cli(main, "judge", "train", memes, *said, "--out", judge, "--coverage", "0.8", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["memes"] == 40
    done = run_cli(main, "judge", "predict", memes, *said, "--judge", judge, "--json")
    assert len(json.loads(done.stdout)["predictions"]) == 40
    done = run_cli(main, "judge", "predict", memes, "--judge", judge, "--out", files / "scores.jsonl")
    assert (done.code, done.stdout) == (0, "")
    done = run_cli(main, "judge", "evaluate", memes, *said, "--judge", judge, "--ablate", "MD", "--json")
    assert done.code == 0, done.stderr
    assert "w/o MD" in done.stdout
    done = run_cli(
        main, "detect", memes, *said, "--judge", judge, "--out", files / "cards", "--report", "page.html"
    )
    assert done.code == 0, done.stderr
    assert {p.name for p in (files / "cards").iterdir()} == {
        "cards.jsonl",
        "page.html",
        "report.json",
        "table.csv",
    }
    done = run_cli(main, "audit", memes, *said, "--judge", judge, "--swap", "rude=cold", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["flips"] > 0
    gate = run_cli(main, "audit", memes, *said, "--judge", judge, "--max-gap", "-1")
    assert gate.code == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("judge", "train", "no.jsonl"), "not there"),
        (("judge", "train", "MEMES", "--kind", "deep"), "--kind is 'deep'"),
        (("judge", "train", "MEMES", "--kind", "fused"), "needs --text and --vision"),
        (("judge", "train", "MEMES", "--split", "dev"), "no meme has the split 'dev'; there are train"),
        (("detect", "MEMES", "--judge", "nowhere"), "nowhere holds no judge"),
        (("detect", "MEMES", "--judge", "nowhere", "--report", "x.html"), "--report is 'x.html'"),
        (("judge", "evaluate", "MEMES", "--ablate", "XY"), "ablate is 'XY'"),
        (("convert", "harmc", "nowhere"), "holds no Harm-C"),
        (("audit", "MEMES", "--judge", "nowhere", "--swap", "women"), "--swap is 'women'"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(words, message, files):
    done = run_cli(main, *(files / "memes.jsonl" if word == "MEMES" else word for word in words))
    assert done.code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_convert_lists_missing_pictures_and_does_the_others(tmp_path):
    make_harm(tmp_path)
    (tmp_path / "images" / "b.png").unlink()
    done = run_cli(main, "convert", "harmc", tmp_path, "--out", tmp_path / "m.jsonl")
    assert done.code == 2
    assert "error: left out images/b.png: it is not there" in done.stderr
    assert [meme.id for meme in load_memes(tmp_path / "m.jsonl")] == ["a", "c"]


def test_convert_lists_a_picture_whose_name_no_system_takes(tmp_path):
    make_harm(tmp_path)
    path = tmp_path / "annotations" / "train.jsonl"
    path.write_text(path.read_text().replace("b.png", "b" * 300))
    done = run_cli(main, "convert", "harmc", tmp_path, "--out", tmp_path / "m.jsonl")
    assert done.code == 2
    assert f"error: left out images/{'b' * 300}: it is not there" in done.stderr
    assert [meme.id for meme in load_memes(tmp_path / "m.jsonl")] == ["a", "c"]


def test_labels_that_are_no_list_are_named(tmp_path):
    make_harm(tmp_path)
    path = tmp_path / "annotations" / "test.jsonl"
    path.write_text(path.read_text().replace('["very harmful", "individual"]', "7"))
    with pytest.raises(DataError, match=r"test\.jsonl: the labels of c are a int, wanted a list"):
        convert("harmc", tmp_path, tmp_path / "m.jsonl")


def measured_file(test=Path(__file__)):
    """The Harm-C debates that the authors publish: in ``../shared/data`` of the repository, or as named."""
    named = os.environ.get("MEME_DEBATE_HARM_C")
    root = next((p for p in test.resolve().parents if (p / "packages").is_dir()), Path())
    return Path(named) if named else root.parent / "shared" / "data" / "harm-c-test-debates.jsonl"


def test_the_authors_debates_are_looked_for_beside_the_repository(tmp_path, monkeypatch):
    place = tmp_path / "shared" / "data" / "harm-c-test-debates.jsonl"
    monkeypatch.delenv("MEME_DEBATE_HARM_C", raising=False)
    (tests := tmp_path / "clone" / "packages" / "meme-debate" / "tests").mkdir(parents=True)
    assert measured_file(tests / "test_datasets.py") == place
    monkeypatch.setenv("MEME_DEBATE_HARM_C", "elsewhere.jsonl")
    assert measured_file(tests / "test_datasets.py") == Path("elsewhere.jsonl")


@pytest.mark.skipif(not measured_file().is_file(), reason="the authors' Harm-C debates are not here")
@pytest.mark.slow
def test_light_judge_on_the_authors_debates():
    from sklearn.model_selection import StratifiedKFold

    rows = [json.loads(line) for line in measured_file().read_text("utf-8").splitlines()]
    texts, labels = [row["text"] for row in rows], np.array([row["labels"][0] for row in rows])
    assert len(rows) == 354
    scores = np.zeros(len(rows))
    for learn, held in StratifiedKFold(5, shuffle=True, random_state=0).split(texts, labels):
        judge = TextJudge().fit([texts[i] for i in learn], labels[learn])
        scores[held] = judge.predict_proba([texts[i] for i in held])
    found = metrics(scores, labels)
    assert found["accuracy"] >= 0.84
    assert found["macro_f1"] >= 0.82


@pytest.mark.parametrize("name", ["harmc", "fhm", "mami", "multioff", "pridemm"])
def test_a_table_that_is_no_text_is_named(name, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    MAKERS[name](folder)
    for path in folder.rglob("*"):
        if path.suffix in (".csv", ".jsonl", ".tsv", ".txt"):
            path.write_bytes(path.read_bytes() + b"\xff\n")
    with pytest.raises(
        DataError, match=r"set/.*\.(csv|jsonl|tsv|txt) cannot be read: 'utf-8' codec can't decode"
    ):
        convert(name, folder, tmp_path / "memes.jsonl")

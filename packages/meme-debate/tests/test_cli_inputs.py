"""Commands whose inputs are not all usable: the others are done, the bad ones listed, the exit code is 2."""

from __future__ import annotations

import json

import pytest
from debate_stub import Stub, jpeg, memes
from judges import make_judge, make_memes, picture
from test_datasets import make_harm

from fusion_core.store import Manifest
from fusion_core.testing import run_cli
from meme_debate.cli import main
from meme_debate.meme import Meme, save_debates, save_memes
from meme_debate.text_judge import TextJudge


def listed(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_debate_does_the_others_and_a_later_run_the_rest(tmp_path):
    save_memes(tmp_path / "memes.jsonl", memes(tmp_path, 3))
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[:100])
    words = (
        "debate",
        tmp_path / "memes.jsonl",
        "--model",
        "stub",
        "--out",
        tmp_path / "out" / "d.jsonl",
        "-q",
    )
    (tmp_path / "out").mkdir()
    with Stub() as server:
        stopped = run_cli(main, *words, "--url", server.v1, "--on-error", "raise")
        assert (stopped.code, stopped.stderr.count("\n")) == (2, 1)
        assert not (tmp_path / "out" / "d.jsonl").exists()
        done = run_cli(main, *words, "--url", server.v1)
        assert done.code == 2
        assert done.stderr.startswith("error: left out m1: meme 'm1': image")
        assert len((tmp_path / "out" / "d.jsonl").read_text().splitlines()) == 2
        (line,) = listed(tmp_path / "out")
        assert (line["key"], line["verb"], line["source"]) == ("m1", "debate", "memes.jsonl")
        assert "is broken or cut off" in line["error"]
        (tmp_path / "1.jpg").write_bytes(whole)
        asked = len(server.requests)
        again = run_cli(main, *words, "--url", server.v1, "--resume")
        assert (again.code, len(server.requests) - asked) == (0, 4)
    assert Manifest(tmp_path / "out" / "manifest.jsonl").failures() == {}
    assert [json.loads(line)["id"] for line in (tmp_path / "out" / "d.jsonl").read_text().splitlines()] == [
        "m0", "m1", "m2"
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    found, debates = make_memes(12)
    placed = []
    for number, meme in enumerate(found):
        path = tmp_path / f"{number}.png"
        picture(number).save(path)
        placed.append(Meme(meme.id, path, meme.text, meme.caption, meme.label, split=meme.split))
    save_memes(tmp_path / "memes.jsonl", placed)
    save_debates(tmp_path / "debates.jsonl", debates)
    make_judge().save_pretrained(tmp_path / "fused")
    TextJudge().fit_memes(found, debates).save(tmp_path / "light")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    (tmp_path / "5.png").unlink()
    return tmp_path


def test_detect_leaves_out_what_its_judge_cannot_see(files):
    said = ("--debates", files / "debates.jsonl")
    words = ("detect", files / "memes.jsonl", *said, "--device", "cpu", "-q")
    done = run_cli(main, *words, "--judge", files / "fused", "--out", files / "out")
    assert done.code == 2, done.stderr
    cards = [json.loads(line) for line in (files / "out" / "cards.jsonl").read_text().splitlines()]
    assert [card["id"] for card in cards] == [f"m{i}" for i in range(12) if i not in (3, 5)]
    assert [line["key"].rpartition(", ")[2] for line in listed(files / "out")] == ["line 4", "line 6"]
    assert "line 4: meme 'm3': image" in done.stderr
    assert "line 6: meme 'm5': image" in done.stderr
    light = run_cli(main, *words, "--judge", files / "light", "--json")
    assert light.code == 2
    ids = [card["id"] for card in json.loads(light.stdout)["cards"]]
    assert ids == [f"m{i}" for i in range(12) if i != 5], "a judge of words needs no whole picture"
    stopped = run_cli(main, *words, "--judge", files / "fused", "--on-error", "raise", "--out", files / "no")
    assert (stopped.code, stopped.stderr.count("\n")) == (2, 1)
    assert not (files / "no").exists()


def test_numbers_about_all_memes_stop_at_a_bad_one_unless_told(files):
    said = ("--debates", files / "debates.jsonl")
    for verb in (("judge", "evaluate"), ("audit",)):
        words = (*verb, files / "memes.jsonl", *said, "--judge", files / "light")
        stopped = run_cli(main, *words)
        assert (stopped.code, stopped.stderr.count("\n"), stopped.stdout) == (2, 1, "")
        done = run_cli(main, *words, "--on-error", "skip", "--out", files / verb[-1])
        assert done.code == 2
        assert "11 memes (train 11)" in json.loads((files / verb[-1] / "report.json").read_text())[
            "title"
        ] + (done.stdout)
        assert len(listed(files / verb[-1])) == 1


def test_predict_writes_the_scores_of_the_others(files):
    words = ("judge", "predict", files / "memes.jsonl", "--debates", files / "debates.jsonl")
    done = run_cli(main, *words, "--judge", files / "light", "--out", files / "scores.jsonl")
    assert done.code == 2
    assert len((files / "scores.jsonl").read_text().splitlines()) == 11
    assert len(listed(files)) == 1


def test_a_debate_about_nobody_is_an_error_all_the_same(files):
    with (files / "debates.jsonl").open("a") as file:
        file.write('{"id": "ghost", "harmful": "a", "harmless": "b"}\n')
    words = (
        "detect",
        files / "memes.jsonl",
        "--debates",
        files / "debates.jsonl",
        "--judge",
        files / "light",
    )
    done = run_cli(main, *words)
    assert done.code == 2
    assert "debate 'ghost' is about no meme of these 11" in done.stderr


def test_convert_writes_what_counted_as_harmful_beside_the_memes(tmp_path):
    make_harm(tmp_path)
    (tmp_path / "images" / "b.png").unlink()
    words = ("convert", "harmc", tmp_path, "--out", tmp_path / "m.jsonl", "--positive", "very harmful")
    done = run_cli(main, *words)
    assert done.code == 2
    document = json.loads((tmp_path / "m.report.json").read_text())
    assert list(document)[:3] == ["format", "version", "positive"]
    assert document["positive"] == ["very harmful"]
    (line,) = listed(tmp_path)
    assert (line["key"], line["verb"]) == ("images/b.png", "convert")
    picture().save(tmp_path / "images" / "b.png")
    assert run_cli(main, *words).code == 0
    assert Manifest(tmp_path / "manifest.jsonl").failures() == {}


def test_shards_make_the_whole(tmp_path):
    save_memes(tmp_path / "memes.jsonl", memes(tmp_path, 5))
    words = ("debate", tmp_path / "memes.jsonl", "--model", "stub", "-q", "--cache", tmp_path / "c.sqlite")
    with Stub() as server:
        for name, more in (("0", ("--shard", "0/2")), ("1", ("--shard", "1/2")), ("all", ())):
            out = tmp_path / f"{name}.jsonl"
            assert run_cli(main, *words, "--url", server.v1, "--out", out, *more).code == 0
        assert len(server.requests) == 20, "the whole finds the shards' replies in the cache"
    parts = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("0", "1", "all")]
    assert (len(parts[0]), sorted([*parts[0], *parts[1]])) == (3, sorted(parts[2]))
    done = run_cli(main, *words, "--url", "http://127.0.0.1:9/v1", "--out", tmp_path / "x", "--shard", "2/2")
    assert (done.code, "shard is '2/2', wanted i/n" in done.stderr) == (2, True)


def test_debate_shows_decided_examples(tmp_path):
    save_memes(tmp_path / "memes.jsonl", memes(tmp_path, 1))
    save_memes(tmp_path / "known.jsonl", [Meme("k", None, "what a giant, number 9", label=1)])
    words = ("debate", tmp_path / "memes.jsonl", "--model", "stub", "-q", "--out", tmp_path / "d.jsonl")
    with Stub() as server:
        done = run_cli(
            main, *words, "--url", server.v1, "--examples", tmp_path / "known.jsonl", "--neighbors", 1
        )
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "d.jsonl").read_text())["neighbors"] == ["k"]
    assert "It fell under the policy:" in server.requests[0].json()["messages"][1]["content"][1]["text"]
    (tmp_path / "0.jpg").write_bytes(jpeg())

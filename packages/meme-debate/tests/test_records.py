"""Memes, debates and their files."""

import json
import sys

import numpy as np
import pytest
from debate_stub import jpeg
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.errors import DataError, InputError, MissingExtraError
from meme_debate import Debate, Meme, load_debates, load_memes
from meme_debate.errors import DebateWarning
from meme_debate.meme import line, pair, save_debates, save_memes


def write(path, *records):
    path.write_text("".join(record if isinstance(record, str) else line(record) for record in records))
    return path


def test_round_trip(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(jpeg())
    memes = [
        Meme("a", tmp_path / "images/a.jpg", "one\ntwo", "cap", 1, split="train", group="g", source="s"),
        Meme("b", None, "\u2028 \U0001f600", label=np.int64(0)),
    ]
    save_memes(tmp_path / "m.jsonl", memes)
    first = json.loads((tmp_path / "m.jsonl").read_text().split("\n")[0])
    assert first["image"] == "images/a.jpg"
    assert list(first) == ["id", "image", "text", "caption", "label", "split", "group", "source"]
    again = load_memes(tmp_path / "m.jsonl")
    assert list(again) == memes
    assert again.skipped == ()
    assert type(again[1].label) is int
    assert len(load_memes(tmp_path / "m.jsonl", limit=1)) == 1


@given(st.text(), st.text(), st.sampled_from([0, 1, None]))
def test_any_text_survives(harmful, harmless, verdict):
    debate = Debate("x", harmful, harmless, verdict)
    record = json.loads(line({"id": "x", "harmful": debate.harmful, "harmless": debate.harmless}))
    assert Debate(**record, verdict=verdict) == debate
    assert debate.side == (None if verdict is None else ("harmless", "harmful")[verdict])


def test_half_a_surrogate_pair_is_mended():
    assert Meme("a", None, "x\ud83dy").text == "x\ufffdy"
    assert Meme("a", None, "\ud83d\ude00").text == "\U0001f600"


def test_half_a_surrogate_pair_in_a_record_is_kept(tmp_path):
    record = {"id": "a", "harmful": "x", "harmless": "y", "more": "\ud800"}
    save_debates(tmp_path / "d.jsonl", [Debate("a", "x", "y", record=record, flags=("\ud800",))])
    assert json.loads((tmp_path / "d.jsonl").read_text(encoding="utf-8")) == record


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Meme("", None, "x"), "meme has id '', wanted text"),
        (lambda: Meme(3, None, "x"), "meme has id 3"),
        (lambda: Meme("\ud800", None, "x"), "half a surrogate pair"),
        (lambda: Debate("a\udfff", "x", "y"), "half a surrogate pair"),
        (lambda: Meme("a", None, None), "meme 'a': text is a NoneType, wanted text"),
        (lambda: Meme("a", None, "x", 3), "meme 'a': caption is a int"),
        (
            lambda: Meme("a", None, "x", label=2),
            r"meme 'a': label is 2, wanted 0 \(harmless\), 1 \(harmful\)",
        ),
        (lambda: Meme("a", None, "x", label="harmful"), "label is 'harmful'"),
        (lambda: Meme("a", None, "x", label=True), "label is True"),
        (lambda: Meme("a", None, "x", label=0.5), "label is 0.5"),
        (lambda: Debate("a", "x", None), "debate 'a': harmless is a NoneType"),
        (lambda: Debate("a", "x", "y", -1), "debate 'a': verdict is -1"),
    ],
)
def test_bad_values(make, words):
    with pytest.raises(DataError, match=words):
        make()


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "line 2: id 'a' is there twice"),
        ([{"id": "a", "text": "x", "label": 3}], "line 1: meme 'a': label is 3"),
        ([{"id": "a", "text": "x", "label": "not harmful"}], "label is 'not harmful'"),
        ([{"id": "a", "image": "no.jpg", "text": "x"}], "line 1: meme 'a': image '.*no.jpg' is not there"),
        ([{"id": "a", "image": "x" * 300, "text": "x"}], "line 1: meme 'a': image '.*xxx' is not there"),
        ([{"id": "a", "image": "http://x/y.jpg", "text": "x"}], "nothing is fetched, give a path"),
        ([{"id": "a", "image": 3, "text": "x"}], "image is a int"),
        ([{"id": "a", "text": " ", "image": None}], "meme 'a' has no image and no text"),
        ([{"text": "x"}], "meme has id ''"),
        (["{not json}\n"], "line 1 is no JSON"),
        (["[1]\n"], "line 1 holds a list, wanted a JSON object"),
        (["\n"], "holds no meme"),
    ],
)
def test_bad_memes_file(records, words, tmp_path):
    with pytest.raises(InputError, match=words):
        load_memes(write(tmp_path / "m.jsonl", *records))


def test_skipping_is_counted(tmp_path):
    path = write(
        tmp_path / "m.jsonl", {"id": "a", "text": "x"}, {"id": "a", "text": "y"}, {"id": "b", "text": ""}
    )
    with pytest.warns(
        DebateWarning, match="left out 2 of 3 records, the first: .* line 2: id 'a' is there twice"
    ):
        memes = load_memes(path, on_error="skip")
    assert [meme.id for meme in memes] == ["a"]
    assert [place.rpartition(", ")[2] for place, _ in memes.skipped] == ["line 2", "line 3"]
    with pytest.raises(InputError, match="on_error is 'x'"):
        load_memes(path, on_error="x")
    with pytest.raises(InputError, match=r"m is not there, wanted a .jsonl file"):
        load_memes(tmp_path / "m")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"bytes.jsonl, line 1 is no JSON"):
        load_memes(tmp_path / "bytes.jsonl")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"id": ["a", "b"], "text": ["x", "y"], "label": [1, None]}), tmp_path / "m.parquet"
    )
    assert list(load_memes(tmp_path / "m.parquet")) == [Meme("a", None, "x", label=1), Meme("b", None, "y")]


def test_broken_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"m.parquet is no Parquet file"):
        load_memes(tmp_path / "m.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "m.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r'pip install "meme-debate\[parquet\]"'):
        load_memes(tmp_path / "m.parquet")


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"id": "a", "harmful": "x"}], "line 1: debate 'a' has no 'harmless'; its id and both sides"),
        ([{"harmful": "x", "harmless": "y"}], "line 1: debate None has no 'id'"),
        ([{"id": "a", "harmful": "x", "harmless": "y", "flags": "label"}], "line 1: .*flags is 'label'"),
        (
            [{"id": "a", "harmful": "x", "harmless": "y", "flags": [{}]}],
            r"flags is '\[\{\}\]', wanted a list",
        ),
        ([{"id": "a", "harmful": "x", "harmless": "y", "agreement": "no"}], "agreement is 'no', wanted true"),
        ([{"id": "a", "harmful": "x", "harmless": None}], "harmless is a NoneType"),
        ([{"id": "a", "harmful": "x", "harmless": "y", "verdict": 2}], "verdict is 2"),
        ([{"id": "a", "harmful": "x", "harmless": "y"}] * 2, "line 2: id 'a' is there twice"),
        (
            [{"schema": "meme-debate.card/1", "id": "a", "harmful": "x", "harmless": "y"}],
            "wanted 'meme-debate.deb",
        ),
    ],
)
def test_bad_debates_file(records, words, tmp_path):
    with pytest.raises(DataError, match=words):
        load_debates(write(tmp_path / "d.jsonl", *records))


def test_groups_are_words(tmp_path):
    (meme,) = load_memes(write(tmp_path / "m.jsonl", {"id": "a", "text": "x", "group": 3, "split": "test"}))
    assert (meme.group, meme.split, meme.source) == ("3", "test", None)
    for name in ("group", "split", "source"):
        with pytest.raises(DataError, match=f"line 1: meme 'a': {name} is a list, wanted text or null"):
            load_memes(write(tmp_path / "m.jsonl", {"id": "a", "text": "x", name: ["b"]}))


def test_unknown_keys_are_ignored(tmp_path):
    record = {"id": "a", "harmful": "x", "harmless": "y", "future": [1], "flags": ["names_label"]}
    (debate,) = load_debates(write(tmp_path / "d.jsonl", record))
    assert debate == Debate("a", "x", "y")
    assert debate.flags == ("names_label",)
    save_debates(tmp_path / "e.jsonl", [Debate("a", "x", "y", 0)])
    assert load_debates(tmp_path / "e.jsonl") == [Debate("a", "x", "y", 0)]


def test_pair():
    memes = [Meme("a", None, "x"), Meme("b", None, "y")]
    assert pair(memes, [Debate("b", "h", ""), Debate("a", "", " ")]) == [
        (memes[0], None), (memes[1], Debate("b", "h", ""))
    ]  # fmt: skip
    assert pair(memes, None) == [(memes[0], None), (memes[1], None)]
    with pytest.raises(DataError, match="debate 'c' is about no meme of these 2"):
        pair(memes, [Debate("c", "h", "h")])
    with pytest.raises(DataError, match="debate 'a' is there twice"):
        pair(memes, [Debate("a", "h", "h")] * 2)


def test_images_in_memory_are_not_saved(tmp_path):
    from PIL import Image

    with pytest.raises(InputError, match="meme 'a' holds a Image; save the image, give its path"):
        save_memes(tmp_path / "m.jsonl", [Meme("a", Image.new("RGB", (2, 2)), "x")])
    assert not (tmp_path / "m.jsonl").exists()

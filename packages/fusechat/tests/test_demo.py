"""The demo on fewer steps, and the texts behind it."""

import json

import pytest

from fusechat import demo as demo_module
from fusechat.cli import main
from fusechat.corpus import docstrings, load_corpus, split
from fusechat.tiny import bits_per_character, load_model, load_tokenizer
from fusion_core.errors import DataError
from fusion_core.testing import run_cli


def test_demo_in_small(tmp_path, monkeypatch):
    monkeypatch.setitem(demo_module.STEPS, "quick", 4)
    monkeypatch.setitem(demo_module.HELD_OUT, "quick", 6)
    done = run_cli(main, "demo", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    methods = {row["method"]: row["mean"] for row in found["tables"][0]["rows"]}
    assert {"fine-tuning only", "merge: VaRM", demo_module.CONTROL} < set(methods)
    assert methods["source 1 (own tokenizer)"] < methods["pivot before"]
    assert len(found["claims"]) == 3
    assert {figure["file"] for figure in found["figures"]} == {"bits.png", "strip.png"}


def test_shipped_models_are_as_their_card_says():
    texts = load_corpus().held_out
    for name, bits in (("pivot", 3.292), ("source1", 2.289), ("source2", 2.515)):
        assert bits_per_character(load_model(name), load_tokenizer(name), texts) == pytest.approx(
            bits, abs=0.01
        )


def test_the_corpus_is_split_alike_every_time():
    texts = docstrings()
    first, second = split(texts), split(texts)
    assert first == second
    assert not set(first.held_out) & set(first.tuning)
    with pytest.raises(DataError, match="is the standard library complete"):
        split(texts[:10])

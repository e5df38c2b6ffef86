"""The demo on fewer windows, the texts behind it, and the shipped checkpoints."""

import json

import pytest

from fusion_core.testing import run_cli
from logit_fusion import demo as demo_module
from logit_fusion.cli import main
from logit_fusion.corpus import DOMAINS, load_tokenizer, load_windows
from logit_fusion.tiny import load_model


@pytest.mark.slow
def test_demo_in_small(tmp_path, monkeypatch):
    windows = {name: texts[:6] for name, texts in load_windows().items()}
    monkeypatch.setattr(demo_module, "load_windows", lambda: windows)
    monkeypatch.setattr(demo_module, "TOKENS", 65)
    done = run_cli(main, "demo", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    losses = {(row["method"], row["metric"]): row["mean"] for row in found["tables"][0]["rows"]}
    assert losses["dynamic", "docs"] < losses["large", "docs"]
    assert losses["static 1.5", "qa"] < losses["dynamic", "qa"]  # printed though it beats the method
    assert losses["dynamic", "docs"] == pytest.approx(losses["dynamic, grid (paper)", "docs"], abs=0.02)
    assert len(found["claims"]) == 6
    files = {"one_expert.png", "two_experts.png", "alpha.png", "paragraph.png"}
    assert {figure["file"] for figure in found["figures"]} == files
    assert (tmp_path / "out" / "trace.html").exists()


@pytest.mark.slow
def test_the_full_mode_joins_its_trainings(tmp_path, monkeypatch):
    from logit_fusion import train_checkpoints

    seen = []

    def train(seed):
        seen.append(seed)
        models = {name: load_model(name) for name in ("large", "small", *DOMAINS)}
        windows = {name: texts[seed : seed + 3] for name, texts in load_windows().items()}
        return models, load_tokenizer(), windows

    monkeypatch.setattr(train_checkpoints, "train", train)
    monkeypatch.setattr(demo_module, "TOKENS", 49)
    done = run_cli(main, "demo", "--full", "--seed", "3", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert seen == found["seeds"] == [3, 4]
    assert all(len(row["values"]) == 2 for table in found["tables"] for row in table["rows"])


def test_shipped_models_are_as_recorded():
    tokenizer, windows = load_tokenizer(), load_windows()
    assert len(tokenizer) == 512
    assert {name: len(texts) for name, texts in windows.items()} == dict.fromkeys((*DOMAINS, "general"), 48)
    expected = {"large": 4.599, "small": 4.769, "docs": 4.203, "web": 4.701, "qa": 6.454}
    import torch

    rows = [tokenizer(text)["input_ids"][:97] for text in windows["docs"]]
    ids = torch.tensor(rows)
    for name, loss in expected.items():
        with torch.no_grad():
            found = load_model(name)(input_ids=ids, labels=ids).loss
        assert float(found) == pytest.approx(loss, abs=0.005), name


def test_windows_are_held_out():
    from logit_fusion.corpus import collect, held_out_windows

    corpus = collect()
    again = held_out_windows(corpus, 5, 200)
    assert again == held_out_windows(corpus, 5, 200)
    trained = "".join(corpus.train["docs"])
    paragraphs = {p.strip() for text in corpus.held_out["docs"] for p in text.split("\n\n") if p.strip()}
    assert not paragraphs & {p.strip() for text in corpus.train["docs"] for p in text.split("\n\n")}
    assert all(text not in trained for text in again["docs"])
    assert all(len(text) == 200 for texts in again.values() for text in texts)
    assert not set(corpus.train["qa"]) & set(corpus.held_out["qa"])

"""The command line: every verb, one line and exit 2 on bad input."""

import json
import shutil

import pytest
import torch

from fusechat.cli import main
from fusechat.corpus import load_corpus
from fusechat.tiny import bits_per_character, load_model, load_tokenizer
from fusion_core.testing import run_cli

VERBS = {"collect", "align", "train", "merge", "inspect", "demo", "bench"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    for name in ("pivot", "source1"):
        load_model(name).save_pretrained(folder / name)
        load_tokenizer(name).save_pretrained(folder / name)
    for j in range(2):
        model = load_model("pivot")
        for p in model.parameters():
            p.data += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(j))
        model.save_pretrained(folder / f"t{j}")
    (folder / "texts.txt").write_text("\n".join(load_corpus().tuning[:10]) + "\n")
    return folder


def test_help_lists_the_verbs():
    text = run_cli(main, "--help").stdout
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        assert "Example: fusechat" in " ".join(run_cli(main, verb, "--help").stdout.split())


def test_collect_align_inspect_train(place, tmp_path):
    common = ["--data", place / "texts.txt", "--max-length", "64", "-q"]
    done = run_cli(
        main, "collect", "--model", place / "source1", "--out", tmp_path / "store", *common, "--json"
    )
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 10
    done = run_cli(
        main,
        "align",
        tmp_path / "store",
        "--pivot",
        place / "pivot",
        "--tokenizer",
        place / "source1",
        "--out",
        tmp_path / "page",
        "--json",
    )
    assert done.code == 0, done.stderr
    assert (tmp_path / "page" / "report.html").exists()
    assert json.loads(run_cli(main, "inspect", tmp_path / "store", "--json").stdout)["rows"] == 10
    words = ["--store", tmp_path / "store", *common, "--epochs", "1", "--batch-size", "5"]
    done = run_cli(main, "train", "--pivot", place / "pivot", *words, "--out", tmp_path / "target")
    assert done.code == 0, done.stderr
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    before = load_model("pivot").state_dict()
    from transformers import LlamaForCausalLM

    after = LlamaForCausalLM.from_pretrained(tmp_path / "target").state_dict()
    assert any(not torch.equal(before[key], value) for key, value in after.items())
    again = run_cli(main, "train", "--pivot", place / "pivot", *words, "--out", tmp_path / "target")
    assert (again.code, "not empty" in again.stderr) == (2, True)
    shutil.copytree(place / "pivot", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "attention_dropout": None}))
    odd = run_cli(main, "train", "--pivot", tmp_path / "odd", *words, "--out", tmp_path / "other")
    assert (odd.code, "odd: config.json has no attention_dropout, wanted" in odd.stderr) == (2, True)


def test_merge(place, tmp_path):
    models = [place / "t0", place / "t1"]
    for number, method in enumerate(("sce", "varm", "linear", "ta", "ties", "dare", "slerp")):
        done = run_cli(
            main,
            "merge",
            *models,
            "--method",
            method,
            "--base",
            place / "pivot",
            "--out",
            tmp_path / str(number),
            "-q",
        )
        assert done.code == 0, done.stderr
        assert (tmp_path / str(number) / "config.json").exists()
    dry = run_cli(main, "merge", *models, "--base", place / "pivot", "--dry-run", "--json")
    assert json.loads(dry.stdout)["method"] == "sce"
    assert json.loads(run_cli(main, "inspect", tmp_path / "0", "--json").stdout)["targets"] == ["t0", "t1"]
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "1")
    assert 2 < bits_per_character(model, load_tokenizer("pivot"), load_corpus().held_out[:8]) < 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "A", "B", "--out", "O"], "give base"),
        (["merge", "A", "B", "--base", "P"], "--out is missing"),
        (["merge", "A", "A", "--base", "P", "--out", "O"], "twice"),
        (["merge", "A", "nowhere", "--base", "P", "--out", "O"], "does not exist"),
        (["merge", "A", "B", "--base", "P", "--out", "O", "--tau", "0"], "tau is 0.0"),
        (["merge", "A", "B", "--method", "linear", "--weights", "a,b", "--out", "O"], "--weights"),
        (["merge", "A", "S", "--method", "linear", "--out", "O"], "the checkpoints differ"),
        (["collect", "--model", "A", "--data", "none.jsonl", "--out", "O"], "none.jsonl cannot be read"),
        (["inspect", "nowhere"], "nowhere"),
        (
            ["collect", "--model", "S", "--data", "odd.jsonl", "--out", "O"],
            "odd.jsonl, dialogue 2: dialogue is a",
        ),
        (
            ["collect", "--model", "S", "--data", "half.json", "--out", "O"],
            "half.json, dialogue 1: a text holds half a surrogate pair at 0",
        ),
        (["collect", "--model", "S", "--data", "n.json", "--out", "O"], "n.json holds no list of dialogues"),
        (["align", "bad", "--pivot", "P"], "manifest.json is damaged: KeyError 'schema'"),
        (["align", "none", "--pivot", "P"], "none is no store"),
        (
            [
                "train",
                "--pivot",
                "P",
                "--store",
                "O",
                "--data",
                "T",
                "--out",
                "O",
                "--weight",
                "0.1",
                "--lambda",
                "0.9",
            ],
            "give one",
        ),
        (["train", "--pivot", "P", "--store", "O", "--data", "T", "--out", "O", "--weight", "2"], "weight"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(place, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.jsonl").write_text('"a text"\n{"role": "user"}\n')
    (tmp_path / "n.json").write_text("7")
    (tmp_path / "half.json").write_text('[[{"role": "\\ud800", "content": "x"}]]')
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{}")
    places = {
        "A": place / "t0",
        "B": place / "t1",
        "P": place / "pivot",
        "S": place / "source1",
        "O": tmp_path / "out",
        "T": place / "texts.txt",
    }
    done = run_cli(main, *[places.get(word, word) for word in arguments])
    assert done.code == 2, done.stderr
    assert words in done.stderr
    assert len([line for line in done.stderr.strip().splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("shards", 0, "shards is 0, wanted a list"),
        ("fingerprint", "x", "fingerprint is 'x', wanted a dict"),
        ("rows", 10**30, "rows is 10000"),
        ("rows", 1 << 61, "which does not fit its sizes"),
        ("complete", 1, "complete is 1, wanted a bool"),
        ("kind", "arrays", "its kind is 'arrays'"),
        ("k", 3, "entries a token, manifest.json 3"),
        ("fingerprint", {}, "the source is None, wanted a model's name or folder"),
        ("fingerprint", {"model": "no/such"}, "no/such has no tokenizer"),
    ],
)
def test_a_store_whose_manifest_is_odd(place, tmp_path, name, value, words):
    common = ("--data", place / "texts.txt", "--max-length", 16, "--limit", 2, "--device", "cpu", "-q")
    done = run_cli(main, "collect", "--model", place / "source1", *common, "--out", tmp_path / "store")
    assert done.code == 0, done.stderr
    path = tmp_path / "store" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    done = run_cli(main, "align", tmp_path / "store", "--pivot", place / "pivot")
    assert done.code == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert words in told[0]
    assert str(tmp_path / "store") in told[0]

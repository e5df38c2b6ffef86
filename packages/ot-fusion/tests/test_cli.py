"""The command line: every verb, exit codes, one line on bad input."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from fusion_core.testing import run_cli
from ot_fusion.cli import main

VERBS = {"fuse", "align", "diagnose", "verify-spec", "refuse", "interpolate", "demo", "bench"}


@pytest.fixture(scope="module")
def place(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    for seed, name in enumerate("abc"):
        models.make("vit", seed=seed).float().save_pretrained(folder / name)
        models.make("llama", seed=seed).float().save_pretrained(folder / f"llama-{name}")
    images = models.inputs("vit", 20).float().numpy()
    np.save(folder / "images.npy", images)
    labels = np.arange(20) % 5
    np.savez(folder / "labelled.npz", pixel_values=images, labels=labels)
    np.savez(folder / "tokens.npz", **{k: v.numpy() for k, v in models.inputs("llama", 6).items()})
    return folder


def test_help_lists_the_verbs():
    text = run_cli(main, "--help").stdout
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        assert "Example: ot-fusion" in " ".join(run_cli(main, verb, "--help").stdout.split())


def test_fuse_refuse_and_diagnose(place, tmp_path):
    done = run_cli(
        main,
        "fuse",
        place / "a",
        place / "b",
        "--anchor",
        "b",
        "--data",
        place / "images.npy",
        "--out",
        tmp_path / "fused",
        "--solver",
        "emd",
        "--report",
        tmp_path / "page",
        "--json",
        "-q",
    )
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "fusion.report/1"
    assert {"report.html", "maps.png", "costs.png"} <= {path.name for path in (tmp_path / "page").iterdir()}
    done = run_cli(main, "refuse", tmp_path / "fused", "--alpha", "0.9", "--out", tmp_path / "again", "-q")
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "again" / "ot_fusion.json").read_text())["weights"] == pytest.approx(
        {"a": 0.1, "b": 0.9}
    )
    three = run_cli(
        main,
        "fuse",
        place / "a",
        place / "b",
        place / "c",
        "--out",
        tmp_path / "three",
        "--set",
        "strategy=consistent",
        "-q",
    )
    assert three.code == 0, three.stderr
    assert "a/blocks.0.heads.q" in three.stdout
    found = run_cli(main, "diagnose", place / "a", place / "a", "--json", "-q")
    assert json.loads(found.stdout)["verdict"] == "average"
    found = run_cli(
        main,
        "diagnose",
        place / "a",
        place / "b",
        "--data",
        place / "images.npy",
        "--out",
        tmp_path / "report",
        "-q",
    )
    assert "align or fuse them by transport" in found.stdout
    assert (tmp_path / "report" / "report.html").exists()


def test_streaming_and_recipes(place, tmp_path):
    (tmp_path / "recipe.toml").write_text('features = "wts"\nstrategy = "consistent"\nsolver = "lsa"\n')
    done = run_cli(
        main,
        "fuse",
        place / "llama-a",
        place / "llama-b",
        "--out",
        tmp_path / "s",
        "--stream",
        "--recipe",
        tmp_path / "recipe.toml",
        "--shard-gb",
        "0.001",
        "-q",
    )
    assert done.code == 0, done.stderr
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.from_pretrained(tmp_path / "s").config.hidden_size == 16


def test_align_keeps_the_function(place, tmp_path, models):
    done = run_cli(
        main, "align", place / "llama-a", "--to", place / "llama-b", "--out", tmp_path / "aligned", "-q"
    )
    assert done.code == 0, done.stderr
    from transformers import LlamaForCausalLM

    data = models.inputs("llama", 4)
    first, second = (
        LlamaForCausalLM.from_pretrained(p)(**data).logits for p in (place / "llama-a", tmp_path / "aligned")
    )
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_verify_spec_and_its_gate(place, tmp_path):
    done = run_cli(main, "verify-spec", place / "llama-a", "--out", tmp_path / "spec.json", "--json")
    assert done.code == 0, done.stderr
    assert {row["space"] for row in json.loads(done.stdout)} >= {"stream", "all"}
    found = json.loads((tmp_path / "spec.json").read_text())
    found["tensors"]["model.norm.weight"] = [None]
    (tmp_path / "wrong.json").write_text(json.dumps(found))
    gate = run_cli(main, "verify-spec", place / "llama-a", "--spec", tmp_path / "wrong.json")
    assert gate.code == 3
    assert gate.stderr.startswith("not proved: relabelling stream changes the outputs")
    traced = run_cli(main, "verify-spec", place / "a", "--infer", "--data", place / "images.npy")
    assert traced.code == 0, traced.stderr
    assert "Heads" in traced.stdout


def test_a_curve_that_was_cut_off_is_not_there(place, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def stops(self, file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", stops)
    words = ["--steps", "2", "--plain", "--data", place / "labelled.npz", "--out", tmp_path / "curve.png"]
    done = run_cli(main, "interpolate", place / "a", place / "b", *words)
    assert done.code == 130
    assert list(tmp_path.iterdir()) == []


def test_interpolate(place, tmp_path):
    done = run_cli(
        main,
        "interpolate",
        place / "a",
        place / "b",
        "--steps",
        "3",
        "--data",
        place / "labelled.npz",
        "--out",
        tmp_path / "b.png",
        "--json",
    )
    assert done.code == 0, done.stderr
    curves = json.loads(done.stdout)
    assert set(curves) == {"plain", "aligned"}
    assert curves["plain"]["values"][0] == pytest.approx(
        curves["aligned"]["values"][0], abs=1e-4
    )  # the same function
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fuse", "A", "-o", "O"], "at least two models"),
        (["fuse", "A", "missing", "-o", "O"], "missing is no folder"),
        (["fuse", "A", "B", "-o", "O", "--anchor", "x"], "--anchor is 'x'"),
        (["fuse", "A", "B", "-o", "O", "--alpha", "2"], "alpha"),
        (["fuse", "A", "B", "-o", "O", "--features", "acts"], "needs data"),
        (["fuse", "A", "B", "-o", "O", "--set", "solvr=emd"], "solver"),
        (["fuse", "A", "B", "-o", "O", "--data", "none.npy"], "none.npy cannot be read"),
        (["fuse", "A", "B", "-o", "O", "--data", "none.csv"], "none.csv is no .npy"),
        (["fuse", "A", "L", "-o", "O"], "different operations"),
        (["fuse", "A", "B", "-o", "A"], "not empty"),
        (["align", "A", "--to", "L", "-o", "O"], "different spaces"),
        (["diagnose", "A", "nowhere:make"], "nowhere"),
        (["verify-spec", "A"], "give --data"),
        (["verify-spec", "L", "--spec", "missing.json"], "missing.json holds no specification"),
        (["refuse", "A", "-o", "O"], "no fused folder"),
        (["interpolate", "A", "B"], "--evaluate module:function"),
        (["interpolate", "A", "B", "--data", "I"], "with labels"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(place, tmp_path, arguments, words):
    places = {
        "A": place / "a",
        "B": place / "b",
        "L": place / "llama-a",
        "I": place / "images.npy",
        "O": tmp_path / "out",
    }
    done = run_cli(main, *[places.get(word, word) for word in arguments])
    assert done.code == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(place, models, tmp_path):
    broken = models.make("llama", seed=0).float()
    torch.nn.init.constant_(broken.get_parameter("model.norm.weight"), float("nan"))
    broken.save_pretrained(tmp_path / "nan")
    for words in (["diagnose"], ["fuse", "-o", tmp_path / "o"], ["fuse", "--stream", "-o", tmp_path / "o"]):
        done = run_cli(main, words[0], tmp_path / "nan", place / "llama-b", *words[1:], "-q")
        assert (done.code, len(done.stderr.strip().splitlines())) == (2, 1)
        assert re.search(r"(nan: model\.norm\.weight|model\.norm\.weight of nan) holds", done.stderr), (
            done.stderr
        )
    assert not (tmp_path / "o").exists()


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def test_a_module_function_is_a_model(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))\n"
        "def data():\n    return torch.randn(20, 4)\n"
        "def size(model):\n    return float(model[0].weight.norm())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    done = run_cli(
        main, "fuse", "nets:make", "nets:make", "--data", "nets:data", "--out", tmp_path / "o", "-q"
    )
    assert done.code == 0, done.stderr
    done = run_cli(main, "interpolate", "nets:make", "nets:make", "--evaluate", "nets:size", "--steps", "2")
    assert done.code == 0, done.stderr
    assert "barrier: plain" in done.stderr

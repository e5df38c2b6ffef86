import json

import pytest

from adaea.advset import AdversarialSet
from adaea.cli import app, main
from fusion_core.testing import kill_when, run_cli

AUDIT = ["audit", "zoo:vgg12", "-s", "zoo:res16,zoo:vit8", "-d", "zoo:scenes", "--limit", 8, "--steps", 2]
QUICK = ["--device", "cpu", "--quiet"]


def test_every_verb_has_help_with_an_example():
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert verbs == {"audit", "attack", "evaluate", "compare", "importance", "config", "demo", "bench"}
    for verb in verbs:
        done = run_cli(main, verb, "--help")
        assert done.code == 0
        assert f"Example: adaea {verb}" in " ".join(done.stdout.split()), verb


def test_audit_prints_json_and_leaves_a_whole_directory(tmp_path):
    out = tmp_path / "run"
    done = run_cli(main, *AUDIT, *QUICK, "--json", "--out", out, "--defence", "bits:3", "--png")
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "adaea.audit/1"
    assert {row["model"] for row in document["rows"]} == {"vgg12", "vgg12+bits:3", "res16", "vit8"}
    names = {path.name for path in out.iterdir()}
    assert {
        "report.html",
        "asr.csv",
        "asr.json",
        "grid.png",
        "curves.png",
        "weights.png",
        "adv",
        "png",
    } <= names
    assert json.loads((out / "asr.json").read_text()) == document
    assert "own or may test" in (out / "report.html").read_text()
    assert len(AdversarialSet.load(out / "png" / "adaea-eps8")) == 8
    again = run_cli(main, *AUDIT, *QUICK, "--out", out)
    assert again.code == 2
    assert "not empty" in again.stderr
    printed = run_cli(main, "config", "--run", out)
    assert 'attack = "AdaEA"' in printed.stdout


def test_the_gate_ends_with_3(tmp_path):
    open_gate = run_cli(main, *AUDIT, *QUICK, "--max-asr", "1.0")
    assert open_gate.code == 0
    shut = run_cli(
        main, *AUDIT, *QUICK, "--dtype", "bfloat16", "--max-asr", "0.01", "--out", tmp_path / "run"
    )
    assert shut.code == 3
    assert "gate not met" in shut.stderr
    assert "> --max-asr 0.01" in shut.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert "Strict attack success" in shut.stdout


@pytest.mark.slow
def test_an_audit_that_was_killed_goes_on_to_the_same_numbers(tmp_path):
    words = [*AUDIT, *QUICK, "--batch-size", 2, "--steps", 8, "--json"]
    whole = run_cli(main, *words, "--out", tmp_path / "whole")
    command = [run_cli, main, *words, "--out", tmp_path / "cut"]
    shard = tmp_path / "cut" / "adv" / ".work" / "*" / "shard-00001.safetensors"
    assert kill_when(command, shard) != 0
    assert not (tmp_path / "cut" / "asr.json").exists()
    refused = run_cli(main, *words, "--out", tmp_path / "cut")
    assert (refused.code, "resume" in refused.stderr) == (2, True)
    other = run_cli(main, *words, "--out", tmp_path / "cut", "--resume", "--seed", 5)
    assert other.code == 2
    assert "seed" in other.stderr
    done = run_cli(main, *words, "--out", tmp_path / "cut", "--resume")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == json.loads(whole.stdout)["rows"]
    assert not (tmp_path / "cut" / "adv" / ".work").exists()
    overwritten = run_cli(main, *words, "--out", tmp_path / "cut", "--overwrite", "--seed", 5)
    assert overwritten.code == 0, overwritten.stderr


def test_attack_evaluate_compare(tmp_path):
    common = ["-s", "zoo:res16,zoo:vit8", "-d", "zoo:scenes", "--limit", 8, "--steps", 2, *QUICK]
    for word in ("ens", "adaea+mi+linear"):
        done = run_cli(
            main, "attack", *common, "-a", word, "--out", tmp_path / f"{word}.safetensors", "--json"
        )
        assert done.code == 0, done.stderr
        made = AdversarialSet.load(tmp_path / f"{word}.safetensors")
        assert json.loads(done.stdout)["digest"] == made.digest()
    sets = [tmp_path / "ens.safetensors", tmp_path / "adaea+mi+linear.safetensors"]
    scored = run_cli(main, "evaluate", sets[0], "zoo:vgg12", "zoo:mixer8", "--json", *QUICK)
    rows = json.loads(scored.stdout)["rows"]
    assert [(row["model"], row["pixels"]) for row in rows] == [
        (model, pixels) for model in ("vgg12", "mixer8") for pixels in ("exact", "uint8")
    ]
    paired = run_cli(main, "compare", *sets, "--models", "zoo:vgg12", "--json", "--device", "cpu")
    assert json.loads(paired.stdout)["rows"][0]["p"] <= 1
    refused = run_cli(main, "attack", *common, "--out", sets[0])
    assert (refused.code, "--overwrite" in refused.stderr) == (2, True)
    folder = run_cli(main, "attack", *common, "--out", tmp_path / "png", "--target", "random", "--json")
    assert folder.code == 0, folder.stderr
    from_folder = run_cli(
        main, "evaluate", tmp_path / "png", "zoo:vgg12", "-d", "zoo:scenes", "--json", *QUICK
    )
    assert json.loads(from_folder.stdout)["rows"][0]["targeted"] is not None
    again = run_cli(main, "attack", *common, "--out", tmp_path / "png", "--overwrite")
    assert again.code == 0, again.stderr
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "png" / "set.json").unlink()  # now the pictures might be anybody's
    shown = run_cli(main, "evaluate", tmp_path / "png", "zoo:vgg12", "-d", "zoo:scenes", *QUICK)
    assert (shown.code, "eps not said" in shown.stdout) == (0, True), shown.stderr
    kept = run_cli(main, "attack", *common, "--out", tmp_path / "png", "--overwrite")
    assert (kept.code, "holds something else than a set of images" in kept.stderr) == (2, True)
    assert (tmp_path / "png" / "labels.csv").is_file()


def test_importance(tmp_path):
    words = ["importance", "zoo:vgg12", "-s", "zoo:res16,zoo:inc16,zoo:vit8", "-d", "zoo:scenes"]
    done = run_cli(main, *words, "--limit", 8, "--steps", 2, "--json", *QUICK, "--out", tmp_path / "run")
    rows = json.loads(done.stdout)["rows"]
    assert rows[0]["left out"] == "none"
    assert {row["left out"] for row in rows[1:]} == {"res16", "inc16", "vit8"}
    assert [row["fall"] for row in rows[1:]] == sorted((row["fall"] for row in rows[1:]), reverse=True)
    assert (tmp_path / "run" / "report.html").is_file()


def test_config_prints_what_an_attack_is(tmp_path):
    done = run_cli(main, "config", "--attacks", "adaea+mi", "--eps", "16/255", "--json")
    found = json.loads(done.stdout)["attacks"]["adaea+mi"]
    assert found["eps"] == 16 / 255
    assert found["update"] == [{"part": "Momentum", "mu": 0.9}]
    assert run_cli(main, "config", "--run", tmp_path).code == 2
    odd = {"schema": "adaea.audit/1", "settings": {"attacks": [None]}}
    (tmp_path / "asr.json").write_text(json.dumps(odd))
    told = run_cli(main, "config", "--run", tmp_path)
    assert (told.code, "asr.json cannot be written as TOML; pass --json" in told.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["audit", "zoo:nothing", "-s", "zoo:res16", "-d", "zoo:scenes"], "wanted one of res16"),
        (["audit", "zoo:vgg12", "-s", "", "-d", "zoo:scenes"], "no model is named"),
        (["audit", "zoo:vgg12", "-s", "zoo:res16", "-d", "nowhere"], "wanted a folder of images"),
        ([*AUDIT, "--attacks", "pgd"], "wanted ens or adaea"),
        ([*AUDIT, "--attacks", "adaea+xy"], "no part 'xy'"),
        ([*AUDIT, "--attacks", "adaea+mi+ni"], "mi and ni exclude each other"),
        ([*AUDIT, "--attacks", "ens+linear"], "ens has even weights"),
        ([*AUDIT, "--attacks", "ens,ens"], "wanted different words"),
        ([*AUDIT, "--eps", "8/0"], "wanted one such as 8/255"),
        ([*AUDIT, "--eps", "-1"], "eps is"),
        ([*AUDIT, "--alpha", "0"], "alpha is 0"),
        ([*AUDIT, "--defence", "gzip"], "defence is 'gzip'"),
        ([*AUDIT, "--norm", "l1"], "norm is 'l1'"),
        ([*AUDIT, "--target", "worst"], "target is 'worst'"),
        ([*AUDIT, "--target", "99"], "99"),
        ([*AUDIT, "--resume"], "need --out"),
        ([*AUDIT, "--device", "tpu"], "device"),
        ([*AUDIT, "--dtype", "int8"], "dtype is 'int8'"),
        (["evaluate", "missing.safetensors", "zoo:vgg12"], "missing.safetensors"),
        (["importance", *AUDIT[1:3], "zoo:res16", *AUDIT[4:]], "wanted at least two"),
        (["attack", "-s", "zoo:res16", "-d", "zoo:scenes", "--out", "set.pt"], "wanted NAME.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_2(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_cli(main, *words)
    assert done.code == 2, done.stderr
    assert said in " ".join(done.stderr.split())
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []

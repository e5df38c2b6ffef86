"""The command line: every verb, one line and exit 2 on bad input."""

import json

import pytest

from fusion_core.testing import run_cli
from logit_fusion.cli import main
from logit_fusion.corpus import load_tokenizer, load_windows
from logit_fusion.tiny import load_model

VERBS = {"generate", "chat", "score", "calibrate", "sweep", "trace", "merge", "check", "demo", "bench"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = load_tokenizer()
    for name in ("large", "small", "docs", "qa"):
        load_model(name).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    windows = load_windows()["docs"]
    (folder / "texts.txt").write_text("\n".join(" ".join(text.split())[:80] for text in windows[:3]) + "\n")
    pairs = [{"prompt": "Q: what is 1 plus 2? A:", "answer": " 3"}, {"text": "The following"}]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    return folder


@pytest.fixture(scope="module")
def members(place):
    return [
        "--large", place / "large", "--base", place / "small", "--expert", f"docs={place / 'docs'}",
        "--expert", f"qa={place / 'qa'}",
    ]  # fmt: skip


def test_help_lists_the_verbs():
    text = run_cli(main, "--help").stdout
    assert all(verb in text for verb in VERBS)
    for verb in VERBS:
        assert "Example: logit-fusion" in " ".join(run_cli(main, verb, "--help").stdout.split())


def test_generate_and_trace(place, members, tmp_path):
    common = [*members, "--max-new-tokens", "6", "--weights", "evidence", "--json"]
    done = run_cli(main, "generate", "The following", "Q: what is", *common, "--trace", tmp_path / "t.jsonl")
    assert done.code == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [entry["prompt"] for entry in answers] == ["The following", "Q: what is"]
    drafted = run_cli(main, "generate", "The following", "Q: what is", *common, "--gamma", "3")
    assert json.loads(drafted.stdout) == answers
    shown = run_cli(main, "trace", tmp_path / "t.jsonl")
    assert "sequence 1: " in shown.stdout
    assert run_cli(main, "trace", tmp_path / "t.jsonl", "--out", tmp_path / "t.html").code == 0
    assert "<svg" in (tmp_path / "t.html").read_text()
    plain = run_cli(
        main, "generate", "The", *members, "--max-new-tokens", "3", "--temperature", "0.8", "--alpha", "1"
    )
    assert plain.stdout.startswith("The")


def test_score_calibrate_sweep(place, members, tmp_path):
    done = run_cli(main, "score", place / "pairs.jsonl", *members, "--json", "-q")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == 2
    done = run_cli(
        main, "calibrate", place / "texts.txt", *members, "--out", tmp_path / "page", "--json", "-q"
    )
    assert done.code == 0, done.stderr
    assert "pool, evidence" in [row["method"] for row in json.loads(done.stdout)["rows"]]
    assert (tmp_path / "page" / "report.html").exists()
    done = run_cli(main, "sweep", place / "texts.txt", *members, "--alphas", "0,1", "-q")
    assert done.code == 0, done.stderr
    assert "static 1" in done.stdout


def test_check_and_merge(place, members, tmp_path):
    done = run_cli(main, "check", *members, "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["title"] == "512 shared tokens"
    assert [row["member"] for row in found["rows"]] == ["large", "base", "docs", "qa"]
    done = run_cli(
        main, "merge", place / "small", place / "docs", place / "qa", "--out", tmp_path / "m", "-q"
    )
    assert done.code == 0, done.stderr
    assert (tmp_path / "m" / "config.json").exists()


def test_chat(place, monkeypatch):
    import io

    from logit_fusion.chatting import converse
    from logit_fusion.model import FusedModel

    fused = FusedModel(
        load_model("large"), load_model("small"), {"docs": load_model("docs")}, tokenizer=load_tokenizer()
    )
    messages = converse(fused, io.StringIO("hello\nand\n\nnot this\n"), 4, "be kind", {"do_sample": False})
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]


def test_chat_takes_input_in_another_encoding(members, monkeypatch):
    import io

    said = []
    monkeypatch.setattr("logit_fusion.chatting.converse", lambda fused, lines, *rest: said.extend(lines))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Grüße\n".encode("latin-1")), "utf-8"))
    done = run_cli(main, "chat", *members)
    assert (done.code, said) == (0, ["Gr\ufffd\ufffde\n"])


BAD = [
    (["generate", "--large", "L"], "there is no prompt"),
    (["generate", "x", "--large", "L"], "base is missing"),
    (["generate", "\udcff", "--large", "L"], "a prompt holds half a surrogate pair at 0"),
    (["generate", "x", "--stop", "\udcff", "--large", "L"], "--stop holds half a surrogate pair"),
    (["chat", "--system", "\udcff", "--large", "L"], "--system holds half a surrogate pair"),
    (["score", "H", "--large", "L"], "half.jsonl line 2 holds half a surrogate pair at 2"),
    (["generate", "x", "--large", "L", "--base", "B"], "experts is empty"),
    (["generate", "x", "--large", "L", "--base", "B", "--expert", "E"], "wanted name=path"),
    (
        ["generate", "x", "--large", "L", "--base", "B", "--expert", "a=E", "--expert", "a=E"],
        "names 'a' twice",
    ),
    (["generate", "x", "--large", "N", "--base", "B", "--expert", "a=B"], "member 'large'"),
    (
        ["generate", "x", "--large", "L", "--base", "B", "--expert", "a=B", "--set", "stepp=1"],
        "did you mean step",
    ),
    (["generate", "x", "--large", "L", "--base", "B", "--expert", "a=B", "--strategy", "best"], "strategy"),
    (["generate", "x", "--large", "L", "--base", "B", "--expert", "a=B", "--alpha", "x"], "--alpha is 'x'"),
    (
        ["generate", "x", "--large", "L", "--base", "B", "--expert", "a=B", "--trace", "t.txt"],
        "--trace is t.txt",
    ),
    (["score", "E", "--large", "L"], "empty.jsonl line 2 is empty, or its prompt or answer is"),
    (
        ["generate", "--file", "W", "--large", "L", "--base", "B", "--expert", "a=B"],
        "wide.txt: member 'large' would read",
    ),
    (["score", "none.txt", "--large", "L"], "none.txt cannot be read as texts"),
    (["sweep", "T", "--large", "L", "--alphas", "a"], "--alphas is 'a'"),
    (["trace", "none.jsonl"], "cannot be read as a trace"),
    (["merge", "L", "B", "--out", "O", "-q"], "task vectors need one architecture"),
    (["check", "--large", "L"], "--base is missing"),
    (["check", "--large", "L", "--base", "B"], "--expert is missing"),
    (["check", "--large", "L", "--base", "N", "--expert", "a=B"], "member 'base'"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_input_is_one_line_and_exit_2(place, tmp_path, arguments, words):
    places = {
        "L": place / "large",
        "B": place / "small",
        "N": tmp_path / "nowhere",
        "O": tmp_path / "out",
        "T": place / "texts.txt",
        "a=B": f"a={place / 'small'}",
    }
    places |= {"E": tmp_path / "empty.jsonl", "W": tmp_path / "wide.txt"}
    places["E"].write_text('"a"\n{"prompt": "", "answer": "b"}\n')
    places["H"] = tmp_path / "half.jsonl"
    places["H"].write_text('"a"\n{"prompt": "b", "answer": "c \\ud800"}\n')
    places["W"].write_text("x y " * 2000)
    done = run_cli(main, *[places.get(word, word) for word in arguments])
    assert done.code == 2, done.stderr
    assert words in done.stderr
    assert len([line for line in done.stderr.strip().splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()

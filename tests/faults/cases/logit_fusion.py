"""Commands and readers of logit-fusion."""

from __future__ import annotations

import json
from pathlib import Path

from faults.cases.common import bench, demo, do
from faults.garbage import Reader
from faults.kill import Command

MAIN = "logit_fusion.cli:main"
MEMBERS = (
    "--large",
    "{in}/large",
    "--base",
    "{in}/small",
    "--expert",
    "docs={in}/docs",
    "--expert",
    "qa={in}/qa",
    "--device",
    "cpu",
    "--set",
    "strategy=pool",
)


def inputs(place: Path) -> None:
    """Four tiny members, a fusion kept in a folder, texts and a trace."""
    from logit_fusion.corpus import load_tokenizer, load_windows
    from logit_fusion.model import FusedModel
    from logit_fusion.tiny import load_model

    tokenizer = load_tokenizer()
    models = {name: load_model(name) for name in ("large", "small", "docs", "qa")}
    for name, model in models.items():
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    windows = load_windows()["docs"]
    (place / "texts.txt").write_text("\n".join(" ".join(text.split())[:80] for text in windows[:3]) + "\n")
    pairs = [{"prompt": "Q: what is 1 plus 2? A:", "answer": " 3"}, {"text": "The following"}]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    fused = FusedModel(models["large"], models["small"], {"docs": models["docs"]}, tokenizer=tokenizer)
    fused.save_pretrained(place / "fused")
    for trace in ("trace.jsonl", "trace.npz"):
        do(
            MAIN,
            "generate",
            "The following",
            *MEMBERS,
            "--max-new-tokens",
            4,
            "--trace",
            place / trace,
            at=place,
        )


def _text(verb: str, *words: str) -> tuple[str, ...]:
    return (verb, "{in}/texts.txt", *MEMBERS, "--max-length", "24", "-q", *words)


COMMANDS = [
    *(
        Command(
            name=f"logit-fusion generate --trace ({suffix})",
            main=MAIN,
            make=inputs,
            argv=("generate", "The following", *MEMBERS, "--max-new-tokens", "4", "--trace", f"t.{suffix}"),
        )
        for suffix in ("jsonl", "npz", "html")
    ),
    Command(name="logit-fusion calibrate", main=MAIN, make=inputs, argv=_text("calibrate", "--out", "page")),
    Command(
        name="logit-fusion sweep",
        main=MAIN,
        make=inputs,
        argv=_text("sweep", "--alphas", "0,1", "--out", "page"),
    ),
    Command(
        name="logit-fusion trace",
        main=MAIN,
        make=inputs,
        argv=("trace", "{in}/trace.jsonl", "--out", "t.html"),
    ),
    Command(
        name="logit-fusion merge",
        main=MAIN,
        make=inputs,
        look=("merge", "merged", "merged", "--out", "b", "-q"),
        argv=("merge", "{in}/small", "{in}/docs", "{in}/qa", "--shard-gb", "0.001", "--out", "merged", "-q"),
        ignore="^b/",
    ),
    bench("logit-fusion"),
    demo("logit-fusion"),
]


def _member(name: str, file: str, kind: str, *, verb: str = "check") -> Reader:
    argv: tuple[str, ...] = ("check", *MEMBERS[:8])
    if verb == "generate":
        argv = ("generate", "The following", *MEMBERS, "--max-new-tokens", "2")
    if verb == "merge":
        argv = ("merge", "{in}/small", "{in}/docs", "{in}/qa", "--out", "m", "-q")
    return Reader(
        name=f"logit-fusion {verb} {name}/{file}",
        main=MAIN,
        make=inputs,
        argv=argv,
        kind=kind,
        file=f"{name}/{file}",
        named=(f"/{name}", f"'{name}'", "'base'", "expert 0"),
    )


READERS = [
    Reader(
        name="logit-fusion score TEXTS (JSON Lines)",
        main=MAIN,
        make=inputs,
        kind="json lines",
        file="pairs.jsonl",
        argv=("score", "{in}/pairs.jsonl", *MEMBERS, "--max-length", "64", "-q"),
        named=("error: text ",),
    ),
    Reader(
        name="logit-fusion calibrate TEXTS (.txt)",
        main=MAIN,
        make=inputs,
        kind="fields",
        file="texts.txt",
        argv=(
            "calibrate",
            "{in}/texts.txt",
            *MEMBERS,
            "--max-length",
            "12",
            "--limit",
            "2",
            "-q",
            "--out",
            "page",
        ),
        named=("error: text ",),
    ),
    Reader(
        name="logit-fusion generate --file",
        main=MAIN,
        make=inputs,
        kind="json lines",
        file="pairs.jsonl",
        argv=("generate", "--file", "{in}/pairs.jsonl", *MEMBERS, "--max-new-tokens", "1"),
    ),
    Reader(
        name="logit-fusion trace (JSON Lines)",
        main=MAIN,
        make=inputs,
        kind="json lines",
        file="trace.jsonl",
        argv=("trace", "{in}/trace.jsonl", "--out", "t.html"),
    ),
    Reader(
        name="logit-fusion trace (npz)",
        main=MAIN,
        make=inputs,
        kind="arrays",
        file="trace.npz",
        argv=("trace", "{in}/trace.npz", "--out", "t.html"),
    ),
    Reader(
        name="logit-fusion generate fusion.json",
        main=MAIN,
        make=inputs,
        kind="json",
        file="fused/fusion.json",
        argv=("generate", "The", "--large", "{in}/fused", "--device", "cpu", "--max-new-tokens", "1"),
        named=("fused",),
    ),
    _member("small", "config.json", "json"),
    _member("small", "tokenizer.json", "json"),
    _member("small", "tokenizer_config.json", "json"),
    _member("small", "config.json", "json", verb="generate"),
    _member("docs", "model.safetensors", "safetensors", verb="generate"),
    _member("docs", "generation_config.json", "json", verb="generate"),
    _member("docs", "model.safetensors", "safetensors", verb="merge"),
]

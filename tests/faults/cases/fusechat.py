"""Commands and readers of fusechat."""

from __future__ import annotations

import json
from pathlib import Path

from faults.cases.common import bench, demo, do
from faults.garbage import Reader
from faults.kill import Command

MAIN = "fusechat.cli:main"
RECIPE = """
merge_method: sce
base_model: PIVOT
models:
  - model: T0
  - model: T1
parameters:
  select_topk: 0.1
dtype: float32
"""
DATA = ("--data", "{in}/texts.txt", "--max-length", "32")
METHODS = ("sce", "varm", "linear", "ta", "ties", "dare", "slerp")


def inputs(place: Path) -> None:
    """A pivot, a source, two targets, dialogues, a store and a recipe."""
    import torch

    from fusechat.corpus import load_corpus
    from fusechat.tiny import load_model, load_tokenizer

    for name in ("pivot", "source1"):
        load_model(name).save_pretrained(place / name)
        load_tokenizer(name).save_pretrained(place / name)
    chatty = load_tokenizer("pivot")
    chatty.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chatty.save_pretrained(place / "chatty")
    for j in range(2):
        model = load_model("pivot")
        for p in model.parameters():
            p.data += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(j))
        model.save_pretrained(place / f"t{j}", max_shard_size="100KB" if j else "1GB")
    texts = load_corpus().tuning[:6]
    (place / "texts.txt").write_text("\n".join(texts) + "\n")
    (place / "texts.jsonl").write_text("\n".join(json.dumps(text) for text in texts[:3]) + "\n")
    chats = [
        [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:40]}]
        for text in texts[:3]
    ]
    (place / "chats.json").write_text(json.dumps(chats))
    recipe = RECIPE.replace("PIVOT", str(place / "pivot")).replace("T0", str(place / "t0"))
    (place / "recipe.yaml").write_text(recipe.replace("T1", str(place / "t1")))
    do(
        MAIN,
        "collect",
        "--model",
        place / "source1",
        *DATA,
        "--out",
        place / "store",
        "--device",
        "cpu",
        "-q",
        at=place,
    )
    do(MAIN, "merge", place / "t0", place / "t1", "--base", place / "pivot", "--out", place / "merged", "-q")


def _merge(method: str, *words: str) -> tuple[str, ...]:
    base = ("--base", "{in}/pivot")
    return ("merge", "{in}/t0", "{in}/t1", "--method", method, *base, "--out", "merged", "-q", *words)


COMMANDS = [
    Command(
        name="fusechat collect",
        main=MAIN,
        make=inputs,
        look=("inspect", "store", "--json"),
        argv=(
            "collect",
            "--model",
            "{in}/source1",
            *DATA,
            "--batch-tokens",
            "64",
            "--device",
            "cpu",
            "-q",
            "--out",
            "store",
        ),
    ),
    Command(
        name="fusechat align",
        main=MAIN,
        make=inputs,
        argv=(
            "align",
            "{in}/store",
            "--pivot",
            "{in}/pivot",
            "--tokenizer",
            "{in}/source1",
            "--out",
            "page",
        ),
    ),
    Command(
        name="fusechat train",
        main=MAIN,
        make=inputs,
        ignore=r"training_args\.bin$",  # of transformers, with the time
        look=("merge", "target", "--method", "linear", "--dry-run", "--json"),
        argv=(
            "train",
            "--pivot",
            "{in}/pivot",
            "--store",
            "{in}/store",
            *DATA,
            "--epochs",
            "1",
            "-q",
            "--out",
            "target",
        ),
    ),
    *(
        Command(
            name=f"fusechat merge {method}",
            main=MAIN,
            make=inputs,
            argv=_merge(method),
            together=True,
            look=("inspect", "merged", "--json"),
        )
        for method in METHODS
    ),
    Command(
        name="fusechat merge in shards",
        main=MAIN,
        make=inputs,
        argv=_merge("sce", "--shard-gb", "0.001"),
        together=True,
        look=("merge", "merged", "--method", "linear", "--dry-run", "--json"),
    ),
    Command(
        name="fusechat merge --overwrite",
        main=MAIN,
        make=inputs,
        argv=_merge("sce", "--overwrite"),
        before=_merge("linear"),
        look=("inspect", "merged", "--json"),
    ),
    bench("fusechat"),
    demo("fusechat"),
]


def _reader(name: str, argv: tuple[str, ...], file: str, kind: str, *named: str) -> Reader:
    return Reader(
        name=f"fusechat {name}", main=MAIN, make=inputs, argv=argv, file=file, kind=kind, named=named
    )


COLLECT = ("--max-length", "24", "--out", "store", "--device", "cpu", "-q")
MERGE = ("merge", "{in}/t0", "{in}/t1", "--method", "sce", "--base", "{in}/pivot", "--out", "m", "-q")
TRAIN = (
    "train",
    "--pivot",
    "{in}/pivot",
    "--store",
    "{in}/store",
    *DATA,
    "--epochs",
    "0.5",
    "--out",
    "target",
    "-q",
)
ALIGN = ("align", "{in}/store", "--pivot", "{in}/pivot", "--tokenizer", "{in}/source1")

READERS = [
    _reader(
        "collect --data (.txt)",
        ("collect", "--model", "{in}/source1", "--data", "{in}/texts.txt", *COLLECT),
        "texts.txt",
        "fields",
    ),
    _reader(
        "collect --data (.jsonl)",
        ("collect", "--model", "{in}/source1", "--data", "{in}/texts.jsonl", *COLLECT),
        "texts.jsonl",
        "json lines",
    ),
    _reader(
        "collect --data (.json)",
        ("collect", "--model", "{in}/pivot", "--data", "{in}/chats.json", "--pivot", "{in}/chatty", *COLLECT),
        "chats.json",
        "json",
    ),
    _reader(
        "collect config.json",
        ("collect", "--model", "{in}/source1", "--data", "{in}/texts.txt", *COLLECT),
        "source1/config.json",
        "json",
        "source1",
    ),
    _reader(
        "collect tokenizer.json",
        ("collect", "--model", "{in}/source1", "--data", "{in}/texts.txt", *COLLECT),
        "source1/tokenizer.json",
        "json",
        "source1",
    ),
    _reader("align tokenizer_config.json", ALIGN, "pivot/tokenizer_config.json", "json", "pivot"),
    _reader("align manifest.json", ALIGN, "store/manifest.json", "json", "store"),
    _reader("inspect manifest.json", ("inspect", "{in}/store"), "store/manifest.json", "json", "store"),
    _reader("inspect merge.json", ("inspect", "{in}/merged"), "merged/merge.json", "json", "merged"),
    _reader("train store", TRAIN, "store/manifest.json", "json", "store"),
    _reader("train pivot", TRAIN, "pivot/config.json", "json", "pivot"),
    _reader("train --data", TRAIN, "texts.txt", "fields", "store"),
    _reader(
        "merge model.safetensors", MERGE, "t0/model.safetensors", "safetensors", "t0", "checkpoints differ"
    ),
    _reader("merge index.json", MERGE, "t1/model.safetensors.index.json", "json", "t1"),
    _reader(
        "merge --recipe", ("merge", "--recipe", "{in}/recipe.yaml", "--out", "m", "-q"), "recipe.yaml", "yaml"
    ),
]

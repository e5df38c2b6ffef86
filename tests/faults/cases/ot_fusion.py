"""Commands and readers of ot-fusion."""

from __future__ import annotations

from pathlib import Path

from faults.cases.common import bench, demo, do
from faults.garbage import Reader
from faults.kill import Command

MAIN = "ot_fusion.cli:main"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def inputs(place: Path) -> None:
    """Small vision transformers and Llamas, data of every kind, a recipe, a specification, a fused folder."""
    import json

    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

    from fusion_core.testing import tiny

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        shape = {"image_size": 8, "patch_size": 4, "num_labels": 5}
        ViTForImageClassification(ViTConfig(**SMALL, **shape)).save_pretrained(place / name)
        llama = LlamaConfig(**SMALL, vocab_size=40, max_position_embeddings=16, num_key_value_heads=2)
        LlamaForCausalLM(llama).save_pretrained(place / f"llama-{name}")
        tiny.bpe(
            ["the model reads a text", "a text tells what comes next"] * 3, 40, "blanks"
        ).save_pretrained(place / f"llama-{name}")
    images = np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype(np.float32)
    np.save(place / "images.npy", images)
    np.savez(place / "labelled.npz", pixel_values=images, labels=np.arange(12) % 5)
    (place / "texts.txt").write_text("the model reads\na text tells what\n")
    (place / "recipe.toml").write_text(
        'features = "wts"\nstrategy = "consistent"\nsolver = "lsa"\nalpha = 0.4\n'
    )
    (place / "recipe.json").write_text(json.dumps({"features": "wts", "solver": "emd"}))
    do(MAIN, "verify-spec", place / "llama-a", "--out", place / "spec.json")
    do(
        MAIN,
        "fuse",
        place / "a",
        place / "b",
        "--data",
        place / "images.npy",
        "--solver",
        "emd",
        "--out",
        place / "fused",
        "-q",
    )


FUSE = ("fuse", "{in}/a", "{in}/b", "--anchor", "b", "--data", "{in}/images.npy", "--solver", "emd", "-q")
STREAM = (
    "fuse",
    "{in}/llama-a",
    "{in}/llama-b",
    "--stream",
    "--recipe",
    "{in}/recipe.toml",
    "--shard-gb",
    "0.001",
    "-q",
)
LOOK = ("diagnose", "{in}/llama-a", "OUT", "--json", "-q")


def _look(model: str, out: str) -> tuple[str, ...]:
    return ("diagnose", f"{{in}}/{model}", out, "--json", "-q")


COMMANDS = [
    Command(
        name="ot-fusion fuse",
        main=MAIN,
        make=inputs,
        argv=(*FUSE, "--out", "fused"),
        together=True,
        look=_look("b", "fused"),
    ),
    Command(
        name="ot-fusion fuse --report",
        main=MAIN,
        make=inputs,
        argv=(*FUSE, "--out", "fused", "--report", "page"),
        again=("--overwrite",),
    ),
    Command(
        name="ot-fusion fuse --stream",
        main=MAIN,
        make=inputs,
        argv=(*STREAM, "--out", "fused"),
        together=True,
        look=_look("llama-b", "fused"),
    ),
    Command(
        name="ot-fusion fuse --stream --overwrite",
        main=MAIN,
        make=inputs,
        argv=(*STREAM, "--out", "fused", "--overwrite"),
        before=(*STREAM, "--alpha", "0.9", "--out", "fused"),
        look=_look("llama-b", "fused"),
    ),
    Command(
        name="ot-fusion align",
        main=MAIN,
        make=inputs,
        together=True,
        look=_look("llama-b", "aligned"),
        argv=("align", "{in}/llama-a", "--to", "{in}/llama-b", "--out", "aligned", "-q"),
    ),
    Command(
        name="ot-fusion diagnose",
        main=MAIN,
        make=inputs,
        argv=("diagnose", "{in}/a", "{in}/b", "--data", "{in}/images.npy", "--out", "page", "-q"),
    ),
    Command(
        name="ot-fusion verify-spec",
        main=MAIN,
        make=inputs,
        argv=("verify-spec", "{in}/llama-a", "--out", "spec.json"),
    ),
    Command(
        name="ot-fusion refuse",
        main=MAIN,
        make=inputs,
        together=True,
        look=_look("b", "again"),
        argv=("refuse", "{in}/fused", "--alpha", "0.3", "--out", "again", "-q"),
    ),
    *(
        Command(
            name=f"ot-fusion interpolate ({suffix})",
            main=MAIN,
            make=inputs,
            argv=(
                "interpolate",
                "{in}/a",
                "{in}/b",
                "--steps",
                "3",
                "--data",
                "{in}/labelled.npz",
                "--out",
                f"curve.{suffix}",
            ),
        )
        for suffix in ("png", "json")
    ),
    bench("ot-fusion"),
    demo("ot-fusion"),
]


def _reader(name: str, argv: tuple[str, ...], file: str, kind: str, *named: str) -> Reader:
    return Reader(
        name=f"ot-fusion {name}", main=MAIN, make=inputs, argv=argv, file=file, kind=kind, named=named
    )


DIAGNOSE = ("diagnose", "{in}/a", "{in}/b", "-q")
VERIFY = ("verify-spec", "{in}/llama-a", "--spec", "{in}/spec.json")
INTERPOLATE = ("interpolate", "{in}/a", "{in}/b", "--steps", "2", "--plain", "--data")

DATA = (
    "data do not fit",
    "data give ",
    "a batch is",
    "activations of",
    "labels",
)  # what is seen when models take them

READERS = [
    _reader("diagnose config.json", DIAGNOSE, "a/config.json", "json", "/a", "no written spec"),
    _reader("diagnose model.safetensors", DIAGNOSE, "a/model.safetensors", "safetensors", "/a"),
    _reader(
        "fuse --stream config.json",
        (*STREAM, "--out", "m"),
        "llama-a/config.json",
        "json",
        "llama-a",
        "the specs ",
    ),
    _reader(
        "fuse --stream model.safetensors",
        (*STREAM, "--out", "m"),
        "llama-a/model.safetensors",
        "safetensors",
        "llama-a",
    ),
    _reader("fuse --recipe (TOML)", (*STREAM, "--out", "m"), "recipe.toml", "toml", "features="),
    _reader(
        "fuse --recipe (JSON)",
        ("fuse", "{in}/a", "{in}/b", "--recipe", "{in}/recipe.json", "--out", "m", "-q"),
        "recipe.json",
        "json",
        "features=",
    ),
    _reader("fuse --data (.npy)", (*FUSE, "--out", "m"), "images.npy", "arrays", *DATA),
    _reader(
        "interpolate --data (.npz)", (*INTERPOLATE, "{in}/labelled.npz"), "labelled.npz", "arrays", *DATA
    ),
    _reader(
        "diagnose --data (.txt)",
        ("diagnose", "{in}/llama-a", "{in}/llama-b", "--data", "{in}/texts.txt", "-q"),
        "texts.txt",
        "fields",
        *DATA,
    ),
    _reader("verify-spec --spec", VERIFY, "spec.json", "json"),
    _reader(
        "refuse ot_fusion.json",
        ("refuse", "{in}/fused", "--out", "m", "-q"),
        "fused/ot_fusion.json",
        "json",
        "fused",
    ),
    _reader(
        "refuse maps.safetensors",
        ("refuse", "{in}/fused", "--out", "m", "-q"),
        "fused/maps.safetensors",
        "safetensors",
        "fused",
    ),
]

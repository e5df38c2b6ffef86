"""Commands and readers of adaea."""

from __future__ import annotations

from pathlib import Path

from faults.cases.common import bench, demo, do
from faults.garbage import Reader
from faults.kill import Command

MAIN = "adaea.cli:main"
QUICK = ("--device", "cpu", "--steps", "2", "--batch-size", "3", "-q")
SCENES = ("-s", "zoo:res16,zoo:vit8", "-d", "zoo:scenes", "--limit", "6", *QUICK)
AUDIT = ("audit", "zoo:vgg12", *SCENES, "--attacks", "ens,adaea", "--out", "audit")


def inputs(place: Path) -> None:
    """Sets of both kinds, labelled images of every kind, a finished audit, a model in a file."""
    import numpy as np
    import torch
    from PIL import Image

    from adaea.images import load_data
    from fusion_core.checkpoint import save_tensors

    for name in ("ens", "adaea"):
        do(MAIN, "attack", *SCENES, "-a", name, "--out", place / f"{name}.safetensors")
    do(MAIN, "attack", *SCENES, "--out", place / "png")
    images, labels = load_data("zoo:scenes", limit=4)
    np.savez(place / "data.npz", images=images.numpy(), labels=labels.numpy())
    save_tensors(place / "data.safetensors", {"images": images, "labels": labels})
    for label in range(2):
        folder = place / "classes" / f"class{label}"
        folder.mkdir(parents=True)
        for at in range(2):
            pixels = (images[at].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{at}.png")
    do(MAIN, *AUDIT[:-1], place / "audit")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 10)
    )
    torch.jit.trace(net.eval(), images[:1]).save(str(place / "net.pt"))


COMMANDS = [
    Command(
        name="adaea audit",
        main=MAIN,
        make=inputs,
        argv=(*AUDIT, "--png"),
        again=("--resume",),
        look=("config", "--run", "audit"),
    ),
    Command(
        name="adaea attack (safetensors)",
        main=MAIN,
        make=inputs,
        argv=("attack", *SCENES, "--out", "set.safetensors"),
        again=("--overwrite",),
        look=("evaluate", "set.safetensors", "zoo:vgg12", "--json", "--device", "cpu", "-q"),
    ),
    Command(
        name="adaea attack (PNG)",
        main=MAIN,
        make=inputs,
        argv=("attack", *SCENES, "--out", "set"),
        together=True,
        look=("evaluate", "set", "zoo:vgg12", "-d", "zoo:scenes", "--json", "--device", "cpu", "-q"),
        again=("--overwrite",),
    ),
    Command(
        name="adaea attack --overwrite",
        main=MAIN,
        make=inputs,
        argv=("attack", *SCENES, "--out", "set", "--overwrite"),
        before=("attack", *SCENES, "-a", "ens", "--out", "set"),
        look=("evaluate", "set", "zoo:vgg12", "-d", "zoo:scenes", "--json", "--device", "cpu", "-q"),
    ),
    Command(
        name="adaea evaluate",
        main=MAIN,
        make=inputs,
        argv=("evaluate", "{in}/ens.safetensors", "zoo:vgg12", "--device", "cpu", "--out", "page", "-q"),
    ),
    Command(
        name="adaea compare",
        main=MAIN,
        make=inputs,
        argv=(
            "compare",
            "{in}/ens.safetensors",
            "{in}/adaea.safetensors",
            "--models",
            "zoo:vgg12",
            "--device",
            "cpu",
            "--out",
            "page",
        ),
    ),
    Command(
        name="adaea importance",
        main=MAIN,
        make=inputs,
        argv=("importance", "zoo:vgg12", *SCENES, "--out", "page"),
    ),
    bench("adaea"),
    demo("adaea"),
]


def _reader(name: str, argv: tuple[str, ...], file: str, kind: str, *named: str) -> Reader:
    return Reader(name=f"adaea {name}", main=MAIN, make=inputs, argv=argv, file=file, kind=kind, named=named)


def _attack(data: str) -> tuple[str, ...]:
    return ("attack", "-s", "zoo:res16", "-d", f"{{in}}/{data}", *QUICK, "--out", "set")


EVALUATE = ("zoo:vgg12", "--device", "cpu", "-q")
AGAIN = ("audit", "zoo:vgg12", *SCENES, "--attacks", "ens,adaea", "--out", "{in}/audit", "--resume")

READERS = [
    _reader("attack --data (.npz)", _attack("data.npz"), "data.npz", "arrays"),
    _reader("attack --data (.safetensors)", _attack("data.safetensors"), "data.safetensors", "safetensors"),
    _reader("attack --data labels.csv", _attack("png"), "png/labels.csv", "fields", "/png"),
    _reader("attack --data image", (*_attack("classes"), "--size", "32"), "classes/class0/1.png", "picture"),
    _reader(
        "evaluate SET", ("evaluate", "{in}/ens.safetensors", *EVALUATE), "ens.safetensors", "safetensors"
    ),
    _reader(
        "evaluate SET set.json",
        ("evaluate", "{in}/png", "-d", "zoo:scenes", *EVALUATE),
        "png/set.json",
        "json",
        "/png",
    ),
    _reader(
        "evaluate SET labels.csv",
        ("evaluate", "{in}/png", "-d", "zoo:scenes", *EVALUATE),
        "png/labels.csv",
        "fields",
        "/png",
    ),
    _reader(
        "evaluate SET image",
        ("evaluate", "{in}/png", "-d", "zoo:scenes", *EVALUATE),
        "png/000001.png",
        "picture",
        "/png",
    ),
    _reader(
        "compare",
        (
            "compare",
            "{in}/ens.safetensors",
            "{in}/adaea.safetensors",
            "--models",
            "zoo:vgg12",
            "--device",
            "cpu",
        ),
        "adaea.safetensors",
        "safetensors",
    ),
    _reader("config --run", ("config", "--run", "{in}/audit"), "audit/asr.json", "json", "/audit"),
    _reader("audit --resume trace", AGAIN, "audit/adv/ens-eps8.trace.safetensors", "safetensors", "ens-eps8"),
    _reader("audit --resume set", AGAIN, "audit/adv/ens-eps8.safetensors", "safetensors", "ens-eps8"),
    _reader(
        "evaluate file:",
        ("evaluate", "{in}/ens.safetensors", "file:{in}/net.pt", "--device", "cpu", "-q"),
        "net.pt",
        "bytes",
    ),
]

"""Commands and readers of dbnet-asf."""

from __future__ import annotations

import json
from pathlib import Path

from faults.cases.common import bench, demo
from faults.garbage import Reader
from faults.kill import Command

MAIN = "dbnet_asf.cli:main"
ICDAR = "10,12,60,12,60,30,10,30,word\n20,40,70,42,69,60,20,58,###\n"
TOTAL = (
    "x: [[10 60 60 10]], y: [[12 12 30 30]], ornt: [u'h'], transcriptions: [u'word']\n"
    "x: [[20 70 69 20]], y: [[40 42 60 58]], ornt: [u'#'], transcriptions: [u'#']\n"
)
SETTINGS = """
epochs = 2
batch_size = 2
crop = 64
save_every = 1
num_workers = 0
optimizer = "adamw"
lr = 1e-3
[labels]
shrink_ratio = 0.4
"""


def inputs(place: Path) -> None:
    """A tiny network, pictures, and their words in each of the four formats."""
    import cv2
    import numpy as np
    import torch
    from PIL import Image
    from scipy import io as scipy_io

    from dbnet_asf import DBConfig, DBNet

    torch.manual_seed(0)
    config = DBConfig.nano(inner=32).replace(channels=(8, 12, 16, 16), stem=8, short_side=64)
    DBNet(config).eval().save_pretrained(place / "net")
    for folder in (
        "photos",
        "photo",
        "ic15/images",
        "ic15/gts",
        "total/images",
        "total/gts",
        "paddle",
        "synth/8",
    ):
        (place / folder).mkdir(parents=True)
    for at in range(3):
        noise = np.random.default_rng(at).integers(0, 256, (70, 100, 3), np.uint8)
        image = Image.fromarray(
            cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
        )
        image.save(place / "photos" / f"p{at}.png")
        image.save(place / "photo" / "p.png")
        for folder in ("ic15/images", "total/images", "paddle", "synth/8"):
            image.save(place / folder / f"img_{at}.jpg")
        (place / "ic15" / "gts" / f"gt_img_{at}.txt").write_text(ICDAR)
        (place / "total" / "gts" / f"gt_img_{at}.txt").write_text(TOTAL)
    words = [{"transcription": "word", "points": [[10, 12], [60, 12], [60, 30], [10, 30]]}]
    lines = [f"img_{at}.jpg\t{json.dumps(words)}\n" for at in range(3)]
    (place / "paddle" / "Label.txt").write_text("".join(lines))
    boxes = np.empty((1, 3), object)
    names, texts = np.empty((1, 3), object), np.empty((1, 3), object)
    for at in range(3):
        boxes[0, at] = np.array([[10.0, 60, 60, 10], [12, 12, 30, 30]])[:, :, None].repeat(2, 2)
        names[0, at], texts[0, at] = f"8/img_{at}.jpg", np.array(["word more"])
    scipy_io.savemat(place / "synth" / "gt.mat", {"imnames": names, "wordBB": boxes, "txt": texts})
    (place / "train.toml").write_text(SETTINGS)


def official(place: Path) -> None:
    """A checkpoint under the authors' names."""
    import importlib.util
    import sys

    import torch

    import dbnet_asf
    from dbnet_asf import DBConfig
    from fusion_core.testing.detfill import parameter

    source = Path(dbnet_asf.__file__).parents[2] / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("dbnet_asf_conftest", source)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    from dbnet_asf.model.dbnet import DBNet

    with torch.device("meta"):
        shapes = {k: v.shape for k, v in DBNet(DBConfig.preset("resnet18")).state_dict().items()}
    state = {
        module._official_name(name): torch.from_numpy(parameter(name, shape))
        for name, shape in shapes.items()
    }
    torch.save(state, place / "official.pth")


DETECT = (
    "detect",
    "--model",
    "{in}/net",
    "--device",
    "cpu",
    "--box-thresh",
    "0",
    "-q",
    "{in}/photos",
    "--out",
    "found",
)
TRAIN = (
    "train",
    "{in}/train.toml",
    "--data",
    "icdar2015:{in}/ic15",
    "--model",
    "{in}/net",
    "--device",
    "cpu",
    "-q",
)
EVALUATE = ("--model", "{in}/net", "--device", "cpu", "-q")

COMMANDS = [
    Command(name="dbnet-asf detect", main=MAIN, make=inputs, argv=DETECT, again=("--resume",)),
    Command(
        name="dbnet-asf detect --overwrite",
        main=MAIN,
        make=inputs,
        argv=(*DETECT, "--overwrite"),
        before=(*DETECT, "--polygon", "--limit", "1"),
    ),
    Command(
        name="dbnet-asf detect --crops (txt)",
        main=MAIN,
        make=inputs,
        argv=(*DETECT, "--format", "txt", "--crops"),
        again=("--resume",),
    ),
    Command(
        name="dbnet-asf train",
        main=MAIN,
        make=inputs,
        argv=(*TRAIN, "--test", "icdar2015:{in}/ic15", "--out", "run"),
        again=("--resume",),
        look=("detect", "--model", "run", "{in}/photos/p0.png", "--json", "--device", "cpu", "-q"),
    ),
    *(
        Command(
            name=f"dbnet-asf {verb}",
            main=MAIN,
            make=inputs,
            argv=(verb, "icdar2015:{in}/ic15", *words, "--out", "page"),
        )
        for verb, words in (("evaluate", EVALUATE), ("tune", EVALUATE), ("diagnose", ("-q",)))
    ),
    Command(
        name="dbnet-asf labels",
        main=MAIN,
        make=inputs,
        argv=("labels", "{in}/ic15/images/img_0.jpg", "{in}/ic15/gts", "--out", "labels"),
    ),
    Command(
        name="dbnet-asf export",
        main=MAIN,
        make=inputs,
        argv=("export", "--out", "net.onnx", "--model", "{in}/net"),
    ),
    Command(
        name="dbnet-asf convert",
        main=MAIN,
        make=official,
        argv=("convert", "{in}/official.pth", "--out", "net"),
        look=("export", "--out", "x.onnx", "--model", "net"),
        ignore=r"^x\.onnx$",
    ),
    Command(
        name="dbnet-asf render",
        main=MAIN,
        make=inputs,
        argv=("render", "--out", "scenes", "-n", "4", "--size", "96", "-q"),
        look=("diagnose", "totaltext:scenes", "--json", "-q"),
    ),
    bench("dbnet-asf"),
    demo("dbnet-asf"),
]


def _reader(
    name: str, argv: tuple[str, ...], file: str, kind: str, *named: str, several: bool = False
) -> Reader:
    return Reader(
        name=f"dbnet-asf {name}",
        main=MAIN,
        make=inputs,
        argv=argv,
        file=file,
        kind=kind,
        named=named,
        several=several,
    )


READERS = [
    _reader("detect IMAGE", (*DETECT[:-2], "--out", "found"), "photos/p1.png", "picture", several=True),
    _reader(
        "detect IMAGE on the screen",
        ("detect", "{in}/photos/p1.png", *EVALUATE),
        "photos/p1.png",
        "picture",
        several=True,
    ),
    _reader(
        "detect config.json", ("detect", "{in}/photos/p1.png", *EVALUATE), "net/config.json", "json", "/net"
    ),
    _reader(
        "detect model.safetensors",
        ("detect", "{in}/photos/p1.png", *EVALUATE),
        "net/model.safetensors",
        "safetensors",
        "/net",
        "prob has values",  # of weights that are numbers, and too large
    ),
    _reader(
        "diagnose icdar2015",
        ("diagnose", "icdar2015:{in}/ic15", "-q"),
        "ic15/gts/gt_img_1.txt",
        "fields",
        "img_1.jpg",
    ),
    _reader(
        "diagnose totaltext",
        ("diagnose", "totaltext:{in}/total", "-q"),
        "total/gts/gt_img_1.txt",
        "fields",
        "img_1.jpg",
    ),
    _reader(
        "diagnose paddleocr",
        ("diagnose", "paddleocr:{in}/paddle/Label.txt", "-q"),
        "paddle/Label.txt",
        "fields",
        "/paddle",
    ),
    _reader(
        "diagnose synthtext", ("diagnose", "synthtext:{in}/synth", "-q"), "synth/gt.mat", "matlab", "/synth"
    ),
    _reader(
        "diagnose (guessed)",
        ("diagnose", "{in}/ic15", "-q"),
        "ic15/gts/gt_img_0.txt",
        "fields",
        "img_0.jpg",
        "/ic15",
    ),
    _reader(
        "evaluate image", ("evaluate", "icdar2015:{in}/ic15", *EVALUATE), "ic15/images/img_1.jpg", "picture"
    ),
    _reader(
        "labels ANNOTATION",
        ("labels", "{in}/ic15/images/img_0.jpg", "{in}/ic15/gts/gt_img_0.txt", "--out", "l"),
        "ic15/gts/gt_img_0.txt",
        "fields",
    ),
    _reader(
        "labels IMAGE",
        ("labels", "{in}/photos/p0.png", "{in}/ic15/gts/gt_img_0.txt", "--out", "l"),
        "photos/p0.png",
        "picture",
    ),
    _reader("train --config", (*TRAIN, "--set", "epochs=1", "--out", "run"), "train.toml", "toml"),
    _reader(
        "render --photos",
        ("render", "--out", "scenes", "-n", "8", "--size", "64", "--photos", "{in}/photo", "-q"),
        "photo/p.png",
        "picture",
        "/photo",
    ),
    Reader(
        name="dbnet-asf convert CHECKPOINT",
        main=MAIN,
        make=official,
        kind="pickle",
        file="official.pth",
        argv=("convert", "{in}/official.pth", "--out", "net"),
    ),
]

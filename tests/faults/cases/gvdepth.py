"""Commands and readers of gvdepth."""

from __future__ import annotations

from pathlib import Path

from faults.cases.common import bench, demo, do
from faults.garbage import Reader
from faults.kill import Command

MAIN = "gvdepth.cli:main"
RECIPE = """
steps = 3
batch_size = 2
warmup_steps = 0
[augment]
size = [48, 120]
[model]
encoder_widths = [8, 8]
"""
OPENCV = """%YAML:1.0
---
image_width: 120
image_height: 48
camera_matrix: !!opencv-matrix
   rows: 3
   cols: 3
   dt: d
   data: [ 90., 0., 59.5, 0., 90., 21.4, 0., 0., 1. ]
distortion_coefficients: !!opencv-matrix
   rows: 1
   cols: 5
   dt: d
   data: [ 0., 0., 0., 0., 0. ]
"""
ROS = """image_width: 120
image_height: 48
camera_name: front
camera_matrix: {rows: 3, cols: 3, data: [90, 0, 59.5, 0, 90, 21.4, 0, 0, 1]}
distortion_model: plumb_bob
distortion_coefficients: {rows: 1, cols: 5, data: [-0.2, 0.05, 0, 0, 0]}
projection_matrix: {rows: 3, cols: 4, data: [90, 0, 59.5, 0, 0, 90, 21.4, 0, 0, 0, 1, 0]}
"""
KITTI = """S_rect_02: 1.200000e+02 4.800000e+01
R_rect_02: 1 0 0 0 1 0 0 0 1
P_rect_02: 9.0e+01 0 5.95e+01 4.485728e+01 0 9.0e+01 2.14e+01 2.163791e-01 0 0 1 2.745884e-03
"""


def inputs(place: Path) -> None:
    """Streets, a camera in each format, the same streets as KITTI has them, a recipe, a run."""
    import json
    import shutil

    from gvdepth import Camera
    from gvdepth.calib_io import write_camera
    from gvdepth.modeling import load_model

    do(MAIN, "simulate", "--rig", "D", "--count", 3, "--out", place / "streets", "-q")
    camera = Camera.load(place / "streets" / "camera.json")
    for name, form in (("camera.json", "json"), ("camera.toml", "toml"), ("sensor_camera.json", "nuscenes")):
        write_camera(camera, place / name, format=form)
    (place / "opencv.yaml").write_text(OPENCV)
    (place / "ros.yaml").write_text(ROS)
    (place / "kitti.txt").write_text(KITTI)
    drive = place / "kitti" / "2011_09_26" / "2011_09_26_drive_0001_sync"
    (drive / "image_02" / "data").mkdir(parents=True)
    (drive / "proj_depth" / "groundtruth" / "image_02").mkdir(parents=True)
    (place / "kitti" / "2011_09_26" / "calib_cam_to_cam.txt").write_text(KITTI)
    images = sorted((place / "streets" / "images").iterdir())
    depths = sorted((place / "streets" / "depth").iterdir())
    for at, (image, depth) in enumerate(zip(images, depths, strict=True)):
        shutil.copyfile(image, drive / "image_02" / "data" / f"{at:010d}.png")
        shutil.copyfile(depth, drive / "proj_depth" / "groundtruth" / "image_02" / f"{at:010d}.png")
    lines = [f"2011_09_26/2011_09_26_drive_0001_sync {at:010d} l\n" for at in range(3)]
    (place / "split.txt").write_text("".join(lines))
    (place / "recipe.toml").write_text(RECIPE)
    (place / "recipe.json").write_text(json.dumps({"steps": 2, "batch_size": 2, "warmup_steps": 0}))
    load_model("tiny").save_pretrained(place / "model")
    import numpy as np

    from gvdepth.data import read_depth

    (place / "npy").mkdir()
    for at, depth in enumerate(depths):
        np.save(place / "npy" / f"{at}.npy", read_depth(depth))


CAMERA = ("--camera", "{in}/streets/camera.json")
NUMBERS = (
    "--fx",
    "90",
    "--fy",
    "90",
    "--cx",
    "59.5",
    "--cy",
    "21.4",
    "--camera-height",
    "1.2",
    "--pitch-deg",
    "1",
    "--size",
    "120x48",
)
PREDICT = ("predict", "{in}/streets/images", *CAMERA, "--model", "{in}/model", "--device", "cpu", "-q")
TRAIN = (
    "train",
    "{in}/recipe.toml",
    "--data",
    "folder:{in}/streets",
    "--device",
    "cpu",
    "-q",
    "--set",
    "save_every=1",
)

COMMANDS = [
    Command(
        name="gvdepth predict",
        main=MAIN,
        make=inputs,
        again=("--resume",),
        argv=(*PREDICT, "--format", "npy,png16,color,ply,uncertainty,height", "--out", "depth"),
    ),
    *(
        Command(
            name=f"gvdepth ground ({suffix})",
            main=MAIN,
            make=inputs,
            argv=("ground", *NUMBERS, "--out", f"g.{suffix}"),
        )
        for suffix in ("npy", "png")
    ),
    Command(
        name="gvdepth calibrate",
        main=MAIN,
        make=inputs,
        argv=(
            "calibrate",
            "--depth",
            "{in}/streets/depth",
            "--road",
            "{in}/streets/road",
            *CAMERA,
            "--out",
            "c.json",
        ),
    ),
    Command(
        name="gvdepth doctor",
        main=MAIN,
        make=inputs,
        argv=("doctor", "--depth", "{in}/streets/depth", *CAMERA, "--out", "page"),
    ),
    Command(
        name="gvdepth train",
        main=MAIN,
        make=inputs,
        argv=(*TRAIN, "--out", "run"),
        again=("--resume",),
        look=(
            "evaluate",
            "folder:{in}/streets",
            "--model",
            "run",
            "--device",
            "cpu",
            "--json",
            "-q",
        ),
    ),
    Command(
        name="gvdepth evaluate",
        main=MAIN,
        make=inputs,
        argv=(
            "evaluate",
            "folder:{in}/streets",
            "--model",
            "{in}/model",
            "--device",
            "cpu",
            "--out",
            "page",
            "-q",
        ),
    ),
    Command(
        name="gvdepth simulate",
        main=MAIN,
        make=inputs,
        argv=("simulate", "--rig", "D", "--count", "3", "--out", "s", "-q"),
        together=True,
    ),
    Command(
        name="gvdepth simulate --overwrite",
        main=MAIN,
        make=inputs,
        argv=("simulate", "--rig", "D", "--count", "3", "--out", "s", "--overwrite", "-q"),
        before=("simulate", "--rig", "A", "--count", "2", "--out", "s", "-q"),
    ),
    Command(
        name="gvdepth export",
        main=MAIN,
        make=inputs,
        argv=("export", "--model", "{in}/model", "--onnx", "m.onnx", "--no-check"),
    ),
    bench("gvdepth"),
    demo("gvdepth"),
]


def _reader(
    name: str, argv: tuple[str, ...], file: str, kind: str, *named: str, several: bool = False
) -> Reader:
    return Reader(
        name=f"gvdepth {name}",
        main=MAIN,
        make=inputs,
        argv=argv,
        file=file,
        kind=kind,
        named=named,
        several=several,
    )


def _camera(file: str, kind: str, *words: str) -> Reader:
    mount = ("--camera-height", "1.2", "--pitch-deg", "1", "--size", "120x48")
    argv = ("ground", "--camera", f"{{in}}/{file}", *mount, "--out", "g.npy", *words)
    return _reader(f"ground --camera ({file})", argv, file, kind)


EVALUATE = ("evaluate", "--model", "{in}/model", "--device", "cpu", "-q")

SMALL = (  # an empty file of settings is a training of the full size
    *("--set", "steps=1"),
    *("--set", "batch_size=1"),
    *("--set", "augment.size=[48, 120]"),
    *("--set", "model.encoder=tiny"),
)

READERS = [
    _camera("camera.json", "json"),
    _camera("camera.toml", "toml"),
    _camera("sensor_camera.json", "json"),
    _camera("opencv.yaml", "yaml"),
    _camera("ros.yaml", "yaml"),
    _camera("kitti.txt", "fields"),
    _reader(
        "predict --rectify",
        (
            "predict",
            "{in}/streets/images",
            "--camera",
            "{in}/ros.yaml",
            "--rectify",
            "--model",
            "{in}/model",
            "--camera-height",
            "1.2",
            "--device",
            "cpu",
            "-q",
            "--out",
            "d",
        ),
        "ros.yaml",
        "yaml",
    ),
    _reader(
        "predict IMAGE",
        (*PREDICT, "--out", "d"),
        "streets/images/0-00001.png",
        "picture",
        "0-00001",
        several=True,
    ),
    _reader(
        "ground --image",
        ("ground", *CAMERA, "--image", "{in}/streets/images/0-00001.png"),
        "streets/images/0-00001.png",
        "picture",
    ),
    _reader(
        "predict config.json", (*PREDICT, "--limit", "1", "--out", "d"), "model/config.json", "json", "model"
    ),
    _reader(
        "predict model.safetensors",
        (*PREDICT, "--limit", "1", "--out", "d"),
        "model/model.safetensors",
        "safetensors",
        "model",
    ),
    _reader(
        "calibrate --depth (.png)",
        ("calibrate", "--depth", "{in}/streets/depth", *CAMERA),
        "streets/depth/0-00001.png",
        "picture",
        "streets/depth",
    ),
    _reader(
        "doctor --depth (.npy)", ("doctor", "--depth", "{in}/npy", *CAMERA), "npy/1.npy", "arrays", "/npy"
    ),
    _reader(
        "calibrate --road",
        ("calibrate", "--depth", "{in}/streets/depth", "--road", "{in}/streets/road", *CAMERA),
        "streets/road/0-00001.png",
        "picture",
        "streets/road",
        "mask",
    ),
    _reader(
        "evaluate folder: camera",
        (*EVALUATE, "folder:{in}/streets"),
        "streets/camera.json",
        "json",
        "streets/camera",
        "of image 0",
        "0-00000: ",
    ),
    _reader(
        "evaluate folder: depth",
        (*EVALUATE, "folder:{in}/streets"),
        "streets/depth/0-00001.png",
        "picture",
        "0-00001",
    ),
    _reader(
        "evaluate folder: image",
        (*EVALUATE, "folder:{in}/streets"),
        "streets/images/0-00001.png",
        "picture",
        "0-00001",
    ),
    _reader(
        "evaluate kitti: calib",
        (*EVALUATE, "kitti:{in}/kitti"),
        "kitti/2011_09_26/calib_cam_to_cam.txt",
        "fields",
        "/kitti",
    ),
    _reader(
        "evaluate kitti: --split",
        (*EVALUATE, "kitti:{in}/kitti", "--split", "{in}/split.txt"),
        "split.txt",
        "fields",
        "/kitti",
    ),
    _reader(
        "train CONFIG (TOML)",
        (*TRAIN, *SMALL, "--out", "run"),
        "recipe.toml",
        "toml",
        "decoder_widths",  # which follow from others
    ),
    _reader(
        "train CONFIG (JSON)",
        (
            "train",
            "{in}/recipe.json",
            "--data",
            "folder:{in}/streets",
            *SMALL,
            "--set",
            "model.encoder_widths=[8, 8]",
            "--device",
            "cpu",
            "--out",
            "run",
            "-q",
        ),
        "recipe.json",
        "json",
    ),
]

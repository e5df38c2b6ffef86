"""The command line of gvdepth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusion_core import cli
from fusion_core.bench import add_bench
from fusion_core.demo import add_demo
from fusion_core.errors import InputError, naming, reading
from gvdepth import __version__
from gvdepth.cli_options import CameraFlags, camera_options, check_sizes, pair, read_depths

app = cli.new_app("gvdepth", "Metric depth from any vehicle's camera, and its ground geometry.", __version__)

Model = Annotated[
    str, typer.Option("--model", "-m", help="tiny (shipped, simulator only), a folder, or a name on the hub.")
]
DATA = "kitti:ROOT, folder:ROOT or simulated:RIG[:COUNT[:SEED]]."
MaxDepth = Annotated[float, typer.Option("--max-depth", min=1.0, help="Metres.")]
Split = Annotated[str | None, typer.Option("--split", help="File of frames, for kitti.")]
NOTICE = (
    "note: the shipped tiny models were trained on simulated streets only; train or load a real model before "
    "you trust a number\n"
)


def _load(name: str, device: str = "cpu") -> Any:
    from fusion_core.device import resolve_device
    from gvdepth.modeling import load_model

    if name.startswith("tiny") and not Path(name).is_dir():
        sys.stderr.write(NOTICE)
    return load_model(name, resolve_device(device))


@app.command()
@camera_options
def predict(
    flags: CameraFlags,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")],
    model: Model = "tiny",
    format: Annotated[  # noqa: A002
        str, typer.Option("--format", help="By commas: npy, png16, color, ply, uncertainty, height.")
    ] = "npy,color",
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Write the uncertainty too.")] = False,
    calib_std: Annotated[
        str | None,
        typer.Option("--calib-std", help="Std of camera height (m) and pitch (degrees): 0.02,0.1."),
    ] = None,
    fusion: Annotated[
        Literal["scale", "variance", "mean", "select", "focal", "vertical"] | None,
        typer.Option("--fusion", help="Rule that joins the cues; by default the model's."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=32, help="Height of the network's image; the camera follows.")
    ] = None,
    rectify: Annotated[
        bool, typer.Option("--rectify", help="Take out the lens distortion that the --camera file holds.")
    ] = False,
    clip: Annotated[
        bool, typer.Option("--clip/--no-clip", help="Keep depth within the model's range.")
    ] = True,
    batch_size: cli.BatchSize = 1,
    num_workers: cli.NumWorkers = 2,
    limit: cli.Limit = None,
    shard: cli.Shard = None,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    device: cli.Device = "auto",
    dtype: cli.DType = "float32",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Predict metric depth of images; reading, network and writing overlap.

    Example: gvdepth predict frames --camera calib_cam_to_cam.txt --preset kitti --out depth --format
    npy,color
    """
    from fusion_core.images import list_images, read_image
    from gvdepth.predict import predict_folder

    formats = [part.strip() for part in format.split(",") if part.strip()] + ["uncertainty"] * uncertainty
    first: tuple[int, int] | None = None
    for path in list_images(images):  # the size of the first that can be read
        try:
            first = read_image(path).shape[:2]
            break
        except InputError:
            continue
    rectifier = flags.rectifier() if rectify else None
    camera = flags.resolve(first) if rectifier is None else flags.mounted(rectifier.camera)
    found = predict_folder(
        _load(model, device),
        images,
        camera,
        out,
        formats=formats,
        calib_std=pair(calib_std),
        clip=clip,
        fusion=fusion,
        height=rows,
        rectify=rectifier,
        batch_size=batch_size,
        num_workers=num_workers,
        limit=limit,
        shard=shard,
        resume=resume,
        overwrite=overwrite,
        dtype=dtype,
        progress=False if quiet else None,
    )
    for name, words in found.failures.items():
        sys.stderr.write(f"error: {name}: {words}\n")
    cli.emit(
        {"done": found.done, "skipped": found.skipped, "failed": len(found.failures), "out": str(out)}, json
    )
    if found.failures:
        raise typer.Exit(2)


@app.command()
@camera_options
def ground(
    flags: CameraFlags,
    image: Annotated[Path | None, typer.Option("--image", help="Shown under the lines.")] = None,
    out: cli.Out = None,
    json: cli.Json = False,
) -> None:
    """Where the road is at 5, 10, 20, 40 and 80 metres, and where the horizon; needs no model.

    Example: gvdepth ground --fx 721 --fy 721 --cx 609 --cy 173 --size 1242x375 --preset kitti --out
    ground.png
    """
    import numpy as np

    from fusion_core.atomic import atomic_write
    from fusion_core.images import read_image, save_png
    from gvdepth.geometry import ground_depth, horizon
    from gvdepth.viz import draw_ground

    picture = None if image is None else read_image(image)
    camera = flags.resolve(None if picture is None else picture.shape[:2])
    if image is not None and picture is not None:
        with reading(image):
            camera = camera.for_image(*picture.shape[:2])
    middle = float(horizon(camera))
    scale = camera.fy * camera.require_height() / float(camera.normal[1])
    rows = {f"{distance} m": round(middle + scale / distance, 2) for distance in (5, 10, 20, 40, 80)}
    if out is not None and out.suffix == ".npy":
        depth = np.asarray(ground_depth(camera, backend="numpy"), np.float32)
        with atomic_write(out) as file:
            np.save(file, np.where(np.isfinite(depth), depth, 0.0))
    elif out is not None and out.suffix == ".png":
        save_png(out, draw_ground(camera, picture))
    elif out is not None:
        raise InputError(f"--out is {str(out)!r}, wanted a .png picture or an .npy map")
    cli.emit({"horizon row": round(middle, 2), **{f"row at {name}": row for name, row in rows.items()}}, json)


@app.command()
@camera_options
def calibrate(
    flags: CameraFlags,
    depth: Annotated[Path, typer.Option("--depth", help="Folder of depth maps.")],
    road: Annotated[
        Path | None, typer.Option("--road", help="Folder of road masks, in the same order.")
    ] = None,
    max_depth: MaxDepth = 20.0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Camera file to write.")] = None,
    limit: cli.Limit = None,
    seed: cli.Seed = 0,
    json: cli.Json = False,
) -> None:
    """Camera height, pitch and roll from depth maps of the road (the paper's Algorithm 1).

    Example: gvdepth calibrate --depth depth --road road --camera camera.json --out calibrated.json
    """
    from fusion_core.images import list_images, read_image
    from gvdepth.calibration import calibrate as run

    depths = read_depths(depth, limit)
    masks = None
    if road is not None:
        masks = [read_image(path)[..., 0] > 127 for path in list_images([road])[:limit]]
    camera = flags.resolve(next(iter(depths.values())).shape, height_needed=False)
    check_sizes(camera, depths)
    found = run(list(depths.values()), masks, camera, max_depth=max_depth, seed=seed)
    if out is not None:
        found.apply(camera).save(out)
    names = ("camera_height", "pitch_deg", "roll_deg", "inliers")
    cli.emit({name: getattr(found, name) for name in names} | {"images": len(depths)}, json)


@app.command()
@camera_options
def doctor(
    flags: CameraFlags,
    depth: Annotated[
        Path | None, typer.Option("--depth", help="Folder of depth maps (LiDAR, stereo).")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Folder of images, for --model.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Take its focal depth instead.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 where the numbers look wrong.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for a page.")] = None,
    limit: cli.Limit = None,
    device: cli.Device = "auto",
    json: cli.Json = False,
) -> None:
    """Whether the camera's pitch and height agree with what is seen ("your pitch looks 0.8 degrees wrong").

    Example: gvdepth doctor --depth depth --camera camera.json
    """
    from fusion_core.images import list_images, read_image
    from gvdepth.diagnosis import doctor as run

    if (depth is None) == (images is None):
        raise InputError("give either --depth FOLDER, or --images FOLDER with --model")
    if depth is not None:
        maps = read_depths(depth, limit)
        camera = flags.resolve(next(iter(maps.values())).shape)
        check_sizes(camera, maps)
        found = run(list(maps.values()), camera)
    else:
        if model is None:
            raise InputError("--model is missing: whose focal depth of --images shall be compared?")
        pictures = {path: read_image(path) for path in list_images([images or ""])[:limit]}
        camera = flags.resolve(next(iter(pictures.values())).shape[:2])
        check_sizes(camera, pictures)
        found = run(list(pictures.values()), camera, model=_load(model, device))
    cli.emit(found, json, out)
    if strict and found.healthy is not True:
        raise typer.Exit(3)


@app.command()
def train(
    data: Annotated[str, typer.Option("--data", "-d", help=DATA)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the run.")],
    config: Annotated[Path | None, typer.Argument(help="Recipe and model, .toml or .json.")] = None,
    split: Split = None,
    settings: cli.Settings = None,
    limit: cli.Limit = None,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    device: cli.Device = "auto",
    quiet: cli.Quiet = False,
    json: cli.Json = False,
) -> None:
    """Train a model (needs the extra train); under accelerate launch for several processes.

    Example: gvdepth train recipe.toml --data kitti:ROOT --split eigen_train.txt --set steps=1000 --out run
    """
    from gvdepth.config import TrainConfig
    from gvdepth.data import open_data
    from gvdepth.train import Trainer, build_model, check_views

    found = TrainConfig() if config is None else TrainConfig.load(config)
    found = found.override(settings or [])
    samples = open_data(data, split=split, limit=limit)
    with naming(config):
        model = build_model(found)
        check_views(found, model)
    trainer = Trainer(
        model,
        samples,
        found,
        out=out,
        resume=resume,
        overwrite=overwrite,
        device=device,
        progress=False if quiet else None,
    )
    result = trainer.fit()
    cli.emit({"steps": result.steps, "epochs": result.epochs, **result.metrics, "out": str(out)}, json)


@app.command()
def evaluate(
    data: Annotated[str, typer.Argument(help=DATA)],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Model, or folder of depth maps; several compare."),
    ] = None,
    max_depth: MaxDepth = 80.0,
    crop: Annotated[
        Literal["none", "garg", "eigen"], typer.Option("--crop", help="Part that counts.")
    ] = "none",
    pooling: Annotated[
        Literal["image", "pixel"], typer.Option("--pooling", help="Mean of images' means, or of pixels.")
    ] = "image",
    split: Split = None,
    batch_size: cli.BatchSize = 8,
    limit: cli.Limit = None,
    max_abs_rel: Annotated[
        float | None, typer.Option("--max-abs-rel", help="Exit with 3 where the first model's is larger.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory for a page.")] = None,
    device: cli.Device = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Eleven depth metrics with intervals, per distance; several models are compared on the same images.

    Example: gvdepth evaluate kitti:ROOT --split eigen_test.txt --model run --crop garg
    """
    from gvdepth.data import open_data
    from gvdepth.evaluation import evaluate as run

    samples = open_data(data, split=split, limit=limit)
    methods: dict[str, Any] = {}
    for name in model or ["tiny"]:
        folder = Path(name)
        stored = folder.is_dir() and not (folder / "config.json").is_file()
        methods[folder.name or name] = folder if stored else _load(name, device)
    found = run(
        methods,
        samples,
        max_depth=max_depth,
        crop=crop,
        pooling=pooling,
        batch_size=batch_size,
        progress=False if quiet else None,
    )
    cli.emit(found, json, out)
    if max_abs_rel is not None:
        reached = next(iter(found.metrics.values()))["abs_rel"]
        if not reached <= max_abs_rel:
            sys.stderr.write(f"abs_rel is {reached:.4f}, the gate is {max_abs_rel:g}\n")
            raise typer.Exit(3)


@app.command()
@camera_options
def simulate(
    flags: CameraFlags,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder: images/, depth/, road/, camera.json.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many scenes.")] = 32,
    rig: Annotated[
        str | None, typer.Option("--rig", help="A rig of the experiments: train, A ... F.")
    ] = None,
    object_size: Annotated[
        float | None, typer.Option("--object-size", help="Multiplies all objects (another country).")
    ] = None,
    seed: cli.Seed = 0,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Streets with exact depth and road masks for any rig.

    Example: gvdepth simulate -n 200 --hfov 80 --size 640x192 --camera-height 1.2 --pitch-deg 2 --out streets
    """
    from fusion_core.atomic import atomic_directory
    from fusion_core.progress import track
    from gvdepth.data import Simulated, write_frames

    if rig is not None and flags.given:
        raise InputError("--rig is a whole camera; give it alone")
    streets = Simulated(
        rig if rig is not None else flags.resolve(), count, seed=seed, object_size=object_size
    )
    with atomic_directory(out, overwrite=overwrite) as place:
        frames = (
            streets.frame(index)
            for index in track(range(count), "simulating", enabled=False if quiet else None)
        )
        written = write_frames(frames, place)
    cli.emit({"frames": written, "out": str(out)}, json)


@app.command()
def export(
    onnx: Annotated[Path, typer.Option("--out", "-o", "--onnx", help="The ONNX file.")],
    model: Model = "tiny",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with onnxruntime.")] = True,
    json: cli.Json = False,
) -> None:
    """One ONNX graph that takes the camera as an input (needs the extra onnx).

    Example: gvdepth export --model run --out model.onnx
    """
    from gvdepth.export import export_onnx

    found = export_onnx(_load(model), onnx, check=check)
    cli.emit({"onnx": str(found.path), "log_depth_difference": found.log_depth_difference}, json)


add_demo(
    app,
    "gvdepth",
    "One camera to train with, six to test on, all simulated; nothing is downloaded.",
    "Train the models, two seeds (minutes).",
)


add_bench(
    app, "gvdepth", "Time the parts against plain implementations, in one process.", only=(cli.Only, None)
)


def main() -> None:
    """The console script."""
    cli.run(app)

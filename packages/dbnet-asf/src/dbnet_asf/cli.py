"""The command line: detect text, train, evaluate, tune, and look at what goes in and out."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dbnet_asf import __version__, options
from fusion_core import cli
from fusion_core.bench import add_bench
from fusion_core.demo import add_demo
from fusion_core.errors import InputError

app = cli.new_app(
    "dbnet-asf", "Find text in photographs and scans (DBNet++), train and evaluate detectors.", __version__
)


def _bar(quiet: bool) -> bool | None:
    return False if quiet else None


@app.command()
def detect(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    model: options.Model = "nano",
    polygon: options.Polygon = False,
    thresh: options.Thresh = None,
    box_thresh: options.BoxThresh = None,
    unclip: options.Unclip = None,
    short_side: options.ShortSide = None,
    long_side: options.LongSide = None,
    native: options.Native = False,
    tile: options.Tile = None,
    overlap: options.Overlap = 256,
    score: options.Score = None,
    columns: Annotated[bool, typer.Option("--columns", help="Read columns one after the other.")] = False,
    out: cli.Out = None,
    format: Annotated[str, typer.Option("--format", help="json, or txt (ICDAR submission).")] = "json",  # noqa: A002
    pictures: Annotated[bool, typer.Option(help="Write annotated pictures into --out.")] = True,
    crops: Annotated[
        bool, typer.Option("--crops", help="Write the straightened regions into --out.")
    ] = False,
    batch_size: cli.BatchSize = 4,
    num_workers: cli.NumWorkers = 2,
    limit: cli.Limit = None,
    shard: cli.Shard = None,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    device: cli.Device = "auto",
    dtype: cli.DType = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Find the text in pictures: a table on the screen, or with --out one JSON and one picture each.

    Example: dbnet-asf detect photo.jpg --out found
    """
    from fusion_core.images import list_images

    paths = list_images(images)  # before the model is loaded: a wrong name is told at once
    detector = options.detector(
        model,
        device,
        dtype,
        mode="polygon" if polygon else None,
        thresh=thresh,
        box_thresh=box_thresh,
        unclip_ratio=unclip,
        short_side=short_side,
        long_side=long_side,
        native=native,
        tile=tile,
        overlap=overlap,
        score=score,
        columns=columns,
        batch_size=batch_size,
    )
    failed: dict[str, str] = {}
    if out is not None:
        from dbnet_asf.jobs import detect_files

        found, failed = detect_files(
            detector,
            paths,
            out,
            format=format,
            pictures=pictures,
            crops=crops,
            shard=shard,
            limit=limit,
            resume=resume,
            overwrite=overwrite,
            num_workers=num_workers,
            progress=_bar(quiet),
        )
    else:
        found = _on_screen(detector, paths, shard, limit, num_workers, failed)
    if json:
        documents = [result.to_dict() for result in found]
        cli.emit(documents[0] if len(documents) == 1 else {"results": documents}, True)
    elif out is None:
        for result in found:
            typer.echo(f"{result.source}: {len(result)} regions in {sum(result.timings.values()):.2f} s")
            rows = [
                {"region": at, "score": round(region.score, 3), "outline": _flat(region.polygon)}
                for at, region in enumerate(result)
            ]
            if rows:
                cli.emit(rows, False)
    else:
        regions = sum(len(result) for result in found)
        typer.echo(f"{len(found)} pictures, {regions} regions, results in {out}")
    for path, reason in failed.items():
        sys.stderr.write(f"error: {path}: {reason}\n")
    if failed:
        raise typer.Exit(2)


def _flat(polygon: Any) -> str:
    return " ".join(f"{x:.0f},{y:.0f}" for x, y in polygon.tolist())


def _on_screen(
    detector: Any,
    paths: list[Path],
    shard: str | None,
    limit: int | None,
    workers: int,
    failed: dict[str, str],
) -> list[Any]:
    from fusion_core.store import take_shard

    def note(path: Any, error: InputError) -> None:
        failed[str(path)] = str(error)

    chosen = take_shard(paths, shard)[:limit]
    return list(detector.stream(chosen, num_workers=workers, failed=note))


@app.command()
def train(
    data: Annotated[str, typer.Option("--data", "-d", help=options.DATA)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the run.")],
    config: Annotated[
        Path | None, typer.Argument(help="Training settings, .toml or .json.", show_default=False)
    ] = None,
    test: Annotated[str | None, typer.Option("--test", help="Data set to evaluate on.")] = None,
    format: options.Format = None,  # noqa: A002
    preset: Annotated[
        str, typer.Option("--preset", help="Network by name, such as nano or resnet18.")
    ] = "resnet18",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Begin with these weights instead.")
    ] = None,
    prior: Annotated[
        float | None,
        typer.Option(
            "--prior", help="Begin without weights, and at this share of text pixels, such as 0.05."
        ),
    ] = None,
    change: cli.Settings = None,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    device: cli.Device = "auto",
    seed: cli.Seed = 0,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Train a detector; Ctrl-C finishes the step, --resume goes on.

    Example: dbnet-asf train -d icdar2015:ic15/train --test icdar2015:ic15/test --preset resnet18 -o runs/ic15
    """
    from dbnet_asf.config import DBConfig, TrainConfig
    from dbnet_asf.datasets import load
    from dbnet_asf.model.dbnet import DBNet
    from dbnet_asf.train import Trainer

    settings = TrainConfig.load(config) if config is not None else TrainConfig(seed=seed)
    settings = settings.override(change or [])
    if model is not None and prior is not None:
        raise InputError("prior is for a network without weights; leave out --prior or --model")
    if model is not None:
        net = DBNet.from_pretrained(model)
    else:
        import torch

        torch.manual_seed(settings.seed)
        net = DBNet(DBConfig.preset(preset))
        if prior is not None:
            net.start_at(prior)
    held_out = load(test) if test else None
    trainer = Trainer(net, load(data, format=format), held_out, config=settings, device=device)
    cli.emit(trainer.fit(out, resume=resume, overwrite=overwrite, progress=_bar(quiet)), json)


@app.command()
def evaluate(
    data: options.Data,
    model: options.Model = "nano",
    format: options.Format = None,  # noqa: A002
    protocol: options.Protocol = "iou",
    matching: Annotated[str, typer.Option("--matching", help="greedy, or max (bipartite).")] = "greedy",
    polygon: options.Polygon = False,
    thresh: options.Thresh = None,
    box_thresh: options.BoxThresh = None,
    unclip: options.Unclip = None,
    short_side: options.ShortSide = None,
    long_side: options.LongSide = None,
    native: options.Native = False,
    tile: options.Tile = None,
    score: options.Score = None,
    min_hmean: Annotated[float | None, typer.Option("--min-hmean", help="End with 3 below this.")] = None,
    limit: cli.Limit = None,
    batch_size: cli.BatchSize = 4,
    out: cli.Out = None,
    device: cli.Device = "auto",
    dtype: cli.DType = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Precision, recall and their harmonic mean on a labelled data set.

    Example: dbnet-asf evaluate rendered:40 --box-thresh 0.5
    """
    from dbnet_asf.datasets import load
    from dbnet_asf.evaluation import evaluate as run

    detector = options.detector(
        model,
        device,
        dtype,
        mode="polygon" if polygon else None,
        thresh=thresh,
        box_thresh=box_thresh,
        unclip_ratio=unclip,
        short_side=short_side,
        long_side=long_side,
        native=native,
        tile=tile,
        score=score,
        batch_size=batch_size,
    )
    how: dict[str, Any] = {"protocol": protocol, "matching": matching}
    report = run(detector, load(data, format=format), limit=limit, progress=_bar(quiet), **how)
    cli.emit(report, json, out)
    if min_hmean is not None and report.hmean < min_hmean:
        sys.stderr.write(f"gate not met: hmean is {report.hmean:.4f}, below --min-hmean {min_hmean:g}\n")
        raise typer.Exit(3)


@app.command()
def tune(
    data: options.Data,
    model: options.Model = "nano",
    format: options.Format = None,  # noqa: A002
    protocol: options.Protocol = "iou",
    polygon: options.Polygon = False,
    score: options.Score = None,
    short_side: options.ShortSide = None,
    limit: cli.Limit = None,
    out: cli.Out = None,
    device: cli.Device = "auto",
    dtype: cli.DType = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Find the thresholds with the largest hmean on a labelled set; the network runs once per picture.

    Example: dbnet-asf tune rendered:20
    """
    from dbnet_asf.datasets import load
    from dbnet_asf.tuning import tune as run

    detector = options.detector(
        model, device, dtype, mode="polygon" if polygon else None, score=score, short_side=short_side
    )
    report = run(detector, load(data, format=format), protocol=protocol, limit=limit, progress=_bar(quiet))
    cli.emit(report, json, out)


@app.command()
def diagnose(
    data: options.Data,
    format: options.Format = None,  # noqa: A002
    scale: Annotated[float, typer.Option("--scale", help="Pictures are resized by this factor.")] = 1.0,
    limit: cli.Limit = None,
    out: cli.Out = None,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Is this data set fit for training? Counts ignored, too small, vanished and self-crossing words.

    Example: dbnet-asf diagnose rendered:20
    """
    from dbnet_asf.datasets import load
    from dbnet_asf.diagnosing import diagnose as run

    report = run(load(data, format=format), scale=scale, limit=limit, progress=_bar(quiet))
    cli.emit(report, json, out)
    for warning in report.warnings:
        sys.stderr.write(f"warning: {warning}\n")


@app.command()
def labels(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    annotation: Annotated[Path, typer.Argument(help="Its words: a file, or the folder that holds it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the pictures.")],
    format: Annotated[str, typer.Option("--format", help="icdar2015 or totaltext.")] = "icdar2015",  # noqa: A002
    change: cli.Settings = None,
    json: cli.Json = False,
) -> None:
    """Draw the label maps that a network would learn from one picture.

    Example: dbnet-asf labels img_1.jpg gt_img_1.txt --out labels
    """
    from dbnet_asf.config import LabelConfig
    from dbnet_asf.jobs import label_pictures

    config = LabelConfig().override(change or [])
    made = label_pictures(image, annotation, out, format=format, labels=config)
    cli.emit([{"file": str(path)} for path in made], json)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file.")],
    model: options.Model = "nano",
    opencv: Annotated[
        bool, typer.Option("--opencv/--ort", help="For OpenCV's text detector, or onnxruntime.")
    ] = False,
    drop_deform: Annotated[bool, typer.Option("--drop-deform", help="Where all offsets are zero.")] = False,
    json: cli.Json = False,
) -> None:
    """Write a network as ONNX, with the settings of the whole pipeline inside.

    Example: dbnet-asf export --ort --out nano.onnx
    """
    from dbnet_asf.export import export_onnx
    from dbnet_asf.model.dbnet import DBNet

    path = export_onnx(DBNet.from_pretrained(model), out, opencv=opencv, drop_deform=drop_deform)
    cli.emit({"out": str(path)}, json)


@app.command()
def convert(
    official: Annotated[Path, typer.Argument(help="A checkpoint of the authors' code (.pth).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the converted network.")],
    polygon: options.Polygon = False,
    json: cli.Json = False,
) -> None:
    """Turn a checkpoint of the authors' code into one of ours, without running anything inside it.

    Example: dbnet-asf convert totaltext_resnet18 --polygon --out totaltext
    """
    from dbnet_asf.checkpoint import load_official

    net = load_official(official, mode="polygon" if polygon else "quad")
    net.save_pretrained(out)
    config = net.config
    facts = {name: getattr(config, name) for name in ("backbone", "dcn", "attention")}
    cli.emit({**facts, "out": str(out)}, json)


@app.command()
def render(
    out: Annotated[Path, typer.Option("--out", "-o", help="Gets images/ and gts/.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many scenes.")] = 100,
    photos: Annotated[Path | None, typer.Option("--photos", help="Photographs without text.")] = None,
    size: options.Size = 640,
    first: Annotated[int, typer.Option("--first", min=0, help="Index of the first scene.")] = 0,
    seed: cli.Seed = 0,
    num_workers: cli.NumWorkers = 1,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Render synthetic scenes with known words; what is there already stays.

    Example: dbnet-asf render -n 20 --out scenes
    """
    from dbnet_asf.jobs import render_files

    made = render_files(
        out,
        count,
        seed=seed,
        size=size,
        photos=photos,
        first=first,
        num_workers=num_workers,
        progress=_bar(quiet),
    )
    cli.emit({"scenes": made, "out": str(out)}, json)


add_bench(
    app,
    "dbnet-asf",
    "Measure against plain implementations, in interleaved pairs.",
    memory=(cli.Memory, True),
)


add_demo(
    app,
    "dbnet-asf",
    "Show the shipped detector at work: real pages, held-out scenes, the scale weights, a baseline.",
    "More scenes and seeds, and a training from scratch.",
)


def main() -> None:
    """The console script."""
    cli.run(app)

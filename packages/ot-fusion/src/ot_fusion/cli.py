"""The command line of ot-fusion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusion_core import cli
from fusion_core.atomic import occupied
from fusion_core.bench import add_bench
from fusion_core.demo import add_demo
from fusion_core.errors import naming, reading
from ot_fusion import __version__
from ot_fusion.errors import InputError
from ot_fusion.options import (
    Alpha,
    Data,
    Features,
    Legal,
    Models,
    Recipe,
    Reg,
    Solver,
    SpecFile,
    Strategy,
    make_config,
    pick_anchor,
    read_inputs,
    read_spec,
    short_names,
)

app = cli.new_app(
    "ot-fusion", "Fuse networks that were trained apart, by optimal transport of their neurons.", __version__
)


@app.command()
def fuse(
    models: Models,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the fused model.")],
    anchor: Annotated[
        str | None, typer.Option("--anchor", help="Which model gives coordinates and shape; the last.")
    ] = None,
    data: Data = None,
    features: Features = None,
    strategy: Strategy = None,
    solver: Solver = None,
    reg: Reg = None,
    residual: Annotated[
        str | None,
        typer.Option("--residual", help="mean, weighted_matrix, weighted_scalar, no_resid, only_resid."),
    ] = None,
    qk: Annotated[
        Literal["separate", "shared", "joint"] | None, typer.Option("--qk", help="Maps of queries and keys.")
    ] = None,
    legal: Legal = None,
    alpha: Alpha = None,
    recipe: Recipe = None,
    settings: cli.Settings = None,
    spec: SpecFile = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Read and write tensor by tensor, for folders larger than memory (features wts)."
        ),
    ] = False,
    shard_gb: cli.ShardGb = 5.0,
    report: Annotated[
        Path | None, typer.Option("--report", help="Directory for a page with pictures of the maps.")
    ] = None,
    max_length: cli.MaxLength = 128,
    seed: cli.Seed = 0,
    device: cli.Device = "auto",
    dtype: cli.DType = "auto",
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Fuse two or more models into one with the anchor's shape.

    Example: ot-fusion fuse modelA modelB --anchor modelB --data images.npy --out fused
    """
    if len(models) < 2:
        raise InputError(f"fuse takes at least two models, got {len(models)}")
    names = short_names(models)
    chosen = pick_anchor(models, names, anchor)
    default = "wts" if data is None and recipe is None else None
    config = make_config(
        recipe,
        settings,
        features=features or default,
        strategy=strategy,
        solver=solver,
        reg=reg,
        residual=residual,
        qk=qk,
        legal=legal,
        alpha=alpha,
        seed=seed,
    )
    if occupied(out) and not overwrite:
        raise InputError(f"--out {out} is not empty; pass --overwrite or another name")
    parents = dict(zip(names, models, strict=True))
    progress = False if quiet else None
    if stream:
        _stream(parents, out, chosen, config, read_spec(spec), int(shard_gb * 1e9), overwrite, progress)
        cli.emit({"out": str(out)}, json)
        return
    from fusion_core.device import resolve_device, resolve_dtype
    from ot_fusion.fusing import fuse as fuse_models
    from ot_fusion.loading import load_model

    place = resolve_device(device)
    kind = None if dtype == "auto" else resolve_dtype(dtype, place)
    loaded = {name: load_model(word, device=place, dtype=kind) for name, word in parents.items()}
    given = read_spec(spec)
    fused = fuse_models(
        loaded,
        anchor=chosen,
        data=read_inputs(data, parents[chosen], max_length),
        config=config,
        spec=given,
        progress=progress,
    )
    folders = {name: str(Path(word).resolve()) for name, word in parents.items() if Path(word).is_dir()}
    fused.save_pretrained(out, parents=folders, overwrite=overwrite)
    if report is not None:
        fused.save_report(report)
    cli.emit(fused.report, json)
    typer.echo(str(out), err=True)


def _stream(
    parents: dict[str, str],
    out: Path,
    chosen: str,
    config: Any,
    spec: Any,
    shard_bytes: int,
    overwrite: bool,
    progress: bool | None,
) -> None:
    from ot_fusion.fusing import resolve_weights, settled
    from ot_fusion.storage import LazyState, folder_spec, fuse_folders

    weights = resolve_weights(list(parents), chosen, config.alpha)
    ground = spec or folder_spec(parents[chosen], list(LazyState(parents[chosen])))
    fuse_folders(
        {name: str(Path(word).resolve()) for name, word in parents.items()},
        out,
        anchor=chosen,
        weights=weights,
        config=settled(config, ground),
        spec=spec,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )


@app.command()
def align(
    model: Annotated[str, typer.Argument(help="The model to re-express.")],
    to: Annotated[str, typer.Option("--to", help="The model whose coordinates it takes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the aligned model.")],
    data: Data = None,
    solver: Solver = None,
    legal: Legal = None,
    recipe: Recipe = None,
    settings: cli.Settings = None,
    spec: SpecFile = None,
    max_length: cli.MaxLength = 128,
    seed: cli.Seed = 0,
    device: cli.Device = "auto",
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Re-express a model in another's coordinates without mixing them; hard legal maps keep its function.

    Example: ot-fusion align modelA --to modelB --out modelA-in-B
    """
    from fusion_core.device import resolve_device
    from ot_fusion.config import FusionConfig
    from ot_fusion.fusing import Fused
    from ot_fusion.fusing import align as align_model
    from ot_fusion.loading import load_model

    if occupied(out) and not overwrite:
        raise InputError(f"--out {out} is not empty; pass --overwrite or another name")
    place = resolve_device(device)
    source, anchor = load_model(model, device=place), load_model(to, device=place)
    inputs = read_inputs(data, to, max_length)
    base = FusionConfig.git_rebasin() if inputs is None else FusionConfig(strategy="consistent", solver="lsa")
    if recipe is not None or settings or solver or legal:
        base = make_config(
            recipe,
            settings,
            strategy="consistent",
            features=base.features,
            solver=solver or base.solver,
            legal=legal,
            seed=seed,
        )
    found = align_model(
        source, anchor, data=inputs, config=base, spec=read_spec(spec), progress=False if quiet else None
    )
    names = short_names([model, to])
    whole = Fused(
        found.model, found.maps, found.state, {names[0]: 1.0, names[1]: 0.0}, names[1], base, found.costs
    )
    folders = {n: str(Path(w).resolve()) for n, w in zip(names, (model, to), strict=True) if Path(w).is_dir()}
    whole.save_pretrained(out, parents=folders, overwrite=overwrite)
    cli.emit(found.report, json)
    typer.echo(str(out), err=True)


@app.command()
def diagnose(
    first: Annotated[str, typer.Argument(help="A model.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    data: Data = None,
    spec: SpecFile = None,
    max_length: cli.MaxLength = 128,
    out: cli.Out = None,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Say whether plain averaging is the right tool for two models, before any merge.

    Example: ot-fusion diagnose base fine-tuned
    """
    from ot_fusion.diagnosing import diagnose as look
    from ot_fusion.loading import load_model

    one, other = load_model(first), load_model(second)
    inputs, given = read_inputs(data, second, max_length), read_spec(spec)
    with naming(f"{first} and {second}"):
        found = look(one, other, data=inputs, spec=given, progress=False if quiet else None)
    cli.emit(found, json, out)


@app.command("verify-spec")
def verify_spec(
    model: Annotated[str, typer.Argument(help="A model.")],
    data: Data = None,
    spec: SpecFile = None,
    infer: Annotated[
        bool, typer.Option("--infer", help="Derive the specification by tracing (needs --data).")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the specification to this JSON file.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest relative change of an output.")
    ] = 1e-6,
    max_length: cli.MaxLength = 128,
    json: cli.Json = False,
) -> None:
    """Prove a model's specification by random legal relabellings; exit 3 where outputs change.

    Example: ot-fusion verify-spec modelA --data images.npy
    """
    from ot_fusion.hooks import batches
    from ot_fusion.loading import load_model
    from ot_fusion.spec import infer_spec, save_spec, spec_for
    from ot_fusion.spec import verify_spec as verify

    loaded = load_model(model)
    inputs = read_inputs(data, model, max_length)
    if inputs is None:
        kind = getattr(getattr(loaded, "config", None), "vocab_size", None)
        if kind is None or infer:
            raise InputError("give --data: inputs that the model takes")
        import torch

        draws = torch.Generator().manual_seed(0)
        inputs = {"input_ids": torch.randint(0, int(kind), (2, 8), generator=draws)}
    few = next(iter(batches(inputs, 4, 4)))
    found = read_spec(spec) or (infer_spec(loaded, few) if infer else spec_for(loaded))
    try:
        changes = verify(loaded, found, few, tolerance=tolerance)
    except InputError as error:
        if "changes the outputs" not in str(error):
            with naming(spec or model):
                raise
        typer.echo(f"not proved: {error}", err=True)
        raise typer.Exit(3) from None
    if out is not None:
        save_spec(found, out)
    rows = [
        {
            "space": name,
            "group": str(found.spaces[name].group) if name in found.spaces else "all at once",
            "change": value,
        }
        for name, value in changes.items()
    ]
    cli.emit(rows, json)


@app.command()
def refuse(
    folder: Annotated[Path, typer.Argument(help="A folder that fuse made.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder.")],
    alpha: Alpha = None,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Fuse again from stored maps with another weight, in seconds.

    Example: ot-fusion refuse fused --alpha 0.3 --out fused-03
    """
    from ot_fusion.storage import refuse as again

    with reading(folder, "cannot be fused again"):
        again(folder, out, alpha=alpha, overwrite=overwrite, progress=False if quiet else None)
    cli.emit({"out": str(out)}, json)


@app.command()
def interpolate(
    first: Annotated[str, typer.Argument(help="The model at t = 0.")],
    second: Annotated[str, typer.Argument(help="The model at t = 1.")],
    steps: Annotated[int, typer.Option("--steps", min=2, help="Points on the line.")] = 11,
    data: Data = None,
    evaluate: Annotated[
        str | None, typer.Option("--evaluate", help="module:function that takes a model, gives a number.")
    ] = None,
    aligned: Annotated[
        bool, typer.Option("--aligned/--plain", help="Align the first to the second before.")
    ] = True,
    max_length: cli.MaxLength = 128,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .png of the curve, or a .json.")] = None,
    json: cli.Json = False,
) -> None:
    """The loss along the straight line between two models: the barrier, with and without alignment.

    Example: ot-fusion interpolate modelA modelB --data labelled.npz --out barrier.png
    """
    from ot_fusion.fusing import align as align_model
    from ot_fusion.loading import load_data, load_evaluation, load_model
    from ot_fusion.metrics import interpolate as line

    source, anchor = load_model(first), load_model(second)
    found = None if data is None else load_data(data, tokenizer=second, length=max_length)
    measure, label = load_evaluation(evaluate, found)
    curves = {"plain": line(source, anchor, steps).evaluate(measure)}
    if aligned:
        curves["aligned"] = line(align_model(source, anchor).model, anchor, steps).evaluate(measure)  # pyright: ignore[reportArgumentType]
    if out is not None and out.suffix == ".png":
        from ot_fusion.figures import barrier_figure

        barrier_figure(curves, out, label)
    elif out is not None:
        from fusion_core.atomic import atomic_write
        from fusion_core.results import dump_json

        with atomic_write(out, "w") as file:
            file.write(dump_json({name: curve.to_dict() for name, curve in curves.items()}))
    if json:
        cli.emit({name: curve.to_dict() for name, curve in curves.items()}, json)
        return
    points = [
        {"t": float(t), **{name: float(curve.values[i]) for name, curve in curves.items()}}
        for i, t in enumerate(next(iter(curves.values())).t)
    ]
    cli.emit(points, json)
    typer.echo(
        "barrier: " + ", ".join(f"{name} {curve.barrier:.4g}" for name, curve in curves.items()), err=True
    )


add_demo(
    app,
    "ot-fusion",
    "Digits classifiers trained apart, fused with and without transport; nothing is downloaded.",
    "Add the tiny vision transformers (minutes).",
)


add_bench(
    app,
    "ot-fusion",
    "Time fusing against the plain path, with memory, costs and solvers.",
    quick=(Annotated[bool, typer.Option("--quick", help="Smaller problems; targets are left out.")], False),
    memory=(cli.Memory, True),
)


def main() -> None:
    """The console script."""
    cli.run(app)

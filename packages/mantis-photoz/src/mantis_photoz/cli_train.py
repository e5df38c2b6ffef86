"""The verbs ``train``, ``simulate`` and ``convert`` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusion_core import cli
from fusion_core.errors import ConfigError, InputError, naming

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Add the three verbs."""
    app.command()(train)
    app.command()(simulate)
    app.command()(convert)


def train(
    config: Annotated[Path, typer.Argument(help="Settings: .toml or .json of TrainConfig.")],
    catalog: Annotated[Path, typer.Option("--catalog", help="Positions with true redshifts.")],
    cutouts: Annotated[Path, typer.Option("--cutouts", help="Directory of FITS files, or packed .h5.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the run and of the model.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="name=value, such as epochs=5 or model.fusion=late.")
    ] = None,
    truth: Annotated[str | None, typer.Option("--truth", help="Column of true redshifts.")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start the encoders from timm's weights (fetched).")
    ] = False,
    device: cli.Device = "auto",
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Train a network; runs under accelerate launch, resumes exactly with --resume.

    The catalogue's column "split" says what is train and val; without it a hash of the identifiers does.

    Example: mantis-photoz train small.toml --catalog spec.ecsv --cutouts cutouts --out run
    """
    from mantis_photoz.config import TrainConfig
    from mantis_photoz.cutouts import Cutouts
    from mantis_photoz.inputs import surveys_of
    from mantis_photoz.training import Trainer

    settings = TrainConfig.load(config).override(assignments or [])
    data = Cutouts.from_directory(cutouts, catalog, surveys_of(settings.model), truth=truth)
    with naming(config):
        trainer = Trainer(
            settings.model,
            settings,
            out=out,
            pretrained=pretrained,
            device=device,
            resume=resume,
            overwrite=overwrite,
            progress=False if quiet else None,
        )
    val: Any = data.split("val")
    trainer.fit(data.split("train"), val if len(val) else None)
    result = trainer.result
    shown: dict[str, Any] = {
        "out": str(out),
        "steps": result.steps,
        "epochs": result.epochs,
        **result.metrics,
    }
    cli.emit(shown | {f"best_{name}": value for name, value in (result.best or {}).items()}, json)


def simulate(
    count: Annotated[int, typer.Argument(min=1, help="Number of galaxies.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the FITS files and catalog.ecsv.")],
    full: Annotated[
        bool, typer.Option("--full", help="Cutouts as large as the paper's (PS1 170 px), not the demo's.")
    ] = False,
    galex_survey: Annotated[
        Literal["AIS", "MIS"], typer.Option("--galex-survey", help="MIS is 2.5 magnitudes deeper than AIS.")
    ] = "AIS",
    seed: cli.Seed = 0,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Simulate galaxies with known redshifts as FITS files of GALEX, Pan-STARRS1 and unWISE.

    Example: mantis-photoz simulate 200 --out sky --seed 1
    """
    from mantis_photoz.simulate import SimulationConfig, write

    config = SimulationConfig.full() if full else SimulationConfig()
    catalog = write(
        count,
        out,
        config.replace(galex_survey=galex_survey),
        seed=seed,
        overwrite=overwrite,
        progress=False if quiet else None,
    )
    cli.emit({"objects": count, "catalog": str(catalog), "cutouts": str(out), "seed": seed}, json)


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The authors' .pt file.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Directory for a network; a .safetensors file for Cal-PIT."),
    ],
    z_max: Annotated[
        float | None, typer.Option("--z-max", help="End of the redshift grid; 1.6, and 1.0 for the report.")
    ] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="Hash that the file must have.")] = None,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", help="Folder of calpit_mean.npy and calpit_std.npy: it is Cal-PIT."),
    ] = None,
    norm: Annotated[
        Literal["std", "official"],
        typer.Option("--calpit-norm", help="official divides features by their mean, as the authors do."),
    ] = "std",
    floor: Annotated[
        float, typer.Option("--calpit-floor", min=0.0, help="Added to each mass; the authors' is 0.01.")
    ] = 1e-6,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
) -> None:
    """Turn a checkpoint of the authors' code into a model folder; nothing of the file is executed.

    With --statistics the checkpoint is their Cal-PIT network, and the file is one for estimate --recalibrate.

    Example: mantis-photoz convert best_early.pt --out mantis-early
    """
    if statistics is not None:
        _convert_calpit(checkpoint, out, overwrite, json, sha256, statistics, norm, floor)
        return
    from fusion_core.atomic import atomic_directory
    from mantis_photoz.convert import load_official

    if z_max is not None and not z_max > 0:
        raise ConfigError(f"--z-max is {z_max:g}, wanted a redshift above 0")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file, wanted a directory")
    model = load_official(checkpoint, z_max=z_max, sha256=sha256)
    with atomic_directory(out, overwrite=overwrite) as place:
        model.save_pretrained(place)
    count = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    facts = {
        "fusion": config.fusion,
        "surveys": list(config.surveys),
        "bins": config.bins,
        "z_max": config.z_max,
    }
    cli.emit({"out": str(out), **facts, "parameters": count}, json)


def _convert_calpit(
    checkpoint: Path,
    out: Path,
    overwrite: bool,
    json: bool,
    sha256: str | None,
    statistics: Path,
    norm: Any,
    floor: float,
) -> None:
    from mantis_photoz.calpit import CalPIT
    from mantis_photoz.convert import check_hash

    if out.suffix != ".safetensors":
        raise InputError(f"--out is {out}, wanted a .safetensors file for Cal-PIT")
    if out.exists() and not overwrite:
        raise InputError(f"--out {out} is there already; pass --overwrite, or name another file")
    made = CalPIT.load_official(checkpoint, statistics, floor=floor, norm=norm)
    check_hash(checkpoint, sha256)
    made.save(out, converted=checkpoint.name)
    shape = {"features": made.network.features, "hidden": list(made.network.hidden)}
    count = sum(parameter.numel() for parameter in made.network.parameters())
    cli.emit({"out": str(out), **shape, "norm": norm, "floor": floor, "parameters": count}, json)

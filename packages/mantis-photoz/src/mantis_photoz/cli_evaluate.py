"""The verbs ``evaluate``, ``calibrate`` and ``explain`` of the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusion_core import cli
from fusion_core.errors import ConfigError, InputError

__all__ = ["add_commands"]

CatalogFile = Annotated[Path, typer.Argument(help="Positions with true redshifts: .ecsv, .csv, .fits, ...")]
Truth = Annotated[str, typer.Option("--truth", help="Column of true redshifts.")]
CutoutDir = Annotated[Path | None, typer.Option("--cutouts", help="Directory of FITS files, or packed .h5.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, name on the hub, or one that ships.")
]
Tta = Annotated[str, typer.Option("--tta", help="Views: none, d4 (mean of 8 exact ones), or a number.")]
_KINDS = ("temperature", "pit", "beta", "nearest", "calpit")


def add_commands(app: typer.Typer) -> None:
    """Add the three verbs."""
    app.command()(evaluate)
    app.command()(calibrate)
    app.command()(explain)


def _catalog(path: Path, truth: str, limit: int | None) -> tuple[Any, Any]:
    from mantis_photoz.catalog import read_catalog

    found = read_catalog(path)
    found = found if limit is None else found.take(range(min(limit, len(found))))
    return found, found.column(truth)


def _needed(cutouts: Path | None) -> Path:
    if cutouts is None:
        raise InputError("--cutouts is missing: name a directory of FITS files or a packed .h5 file")
    return cutouts


def _written(path: Path, catalog: Any) -> Any:
    """The densities of a file in the order of the catalogue, by id where the file has them."""
    import numpy as np

    from mantis_photoz.qpio import read_qp

    pdf, ancil = read_qp(path)
    ids = next((ancil[name] for name in ("id", "object_id") if name in ancil), None)
    if ids is None:
        return pdf
    rows = {name.decode() if isinstance(name, bytes) else str(name): i for i, name in enumerate(ids.tolist())}
    missing = [name for name in catalog.ids if name not in rows]
    if missing:
        raise InputError(
            f"--pdf {path} lacks {len(missing)} objects of the catalogue, the first is {missing[0]!r}"
        )
    return pdf[np.array([rows[name] for name in catalog.ids], dtype=np.int64)]


def _densities(photoz: Any, catalog: Any, cutouts: Path, tta: str, batch_size: int, quiet: bool) -> Any:
    from mantis_photoz.cli import parse_tta

    result = photoz.estimate(
        catalog, cutouts, tta=parse_tta(tta), batch_size=batch_size, progress=False if quiet else None
    )
    if result.flagged:
        sys.stderr.write(f"{result.flagged} of {len(result)} objects flagged\n")
    return result


def evaluate(
    catalog: CatalogFile,
    truth: Truth = "z_spec",
    cutouts: CutoutDir = None,
    pdf: Annotated[
        Path | None,
        typer.Option("--pdf", help="Densities of an earlier estimate (.hdf5) instead of cutouts."),
    ] = None,
    model: Model = None,
    recalibrate: Annotated[
        Path | None, typer.Option("--recalibrate", help="Compare with densities mended by this file.")
    ] = None,
    tta: Tta = "none",
    out: cli.Out = None,
    batch_size: cli.BatchSize = 64,
    limit: cli.Limit = None,
    seed: cli.Seed = 0,
    device: cli.Device = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Compare densities with true redshifts: point metrics, PIT, CRPS, density loss, coverage, pictures.

    Example: mantis-photoz evaluate hosts.ecsv --truth z_spec --cutouts cutouts --out report
    """
    from mantis_photoz.cli import load
    from mantis_photoz.report import evaluate as run

    found, z = _catalog(catalog, truth, limit)
    if pdf is not None:
        if recalibrate is not None:
            raise InputError("--recalibrate needs --cutouts; --pdf holds densities as they were written")
        pdfs: dict[str, Any] = {pdf.stem: _written(pdf, found)}
    else:
        place = _needed(cutouts)
        photoz = load(model, device, "float32", None)
        pdfs = {photoz.name: _densities(photoz, found, place, tta, batch_size, quiet).pdf}
        if recalibrate is not None:
            mended = load(model, device, "float32", recalibrate)
            pdfs["recalibrated"] = _densities(mended, found, place, tta, batch_size, quiet).pdf
    cli.emit(run(pdfs, z, seed=seed), json, out)


def calibrate(
    catalog: CatalogFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="File: .json, or .safetensors for calpit.")],
    truth: Truth = "z_spec",
    cutouts: CutoutDir = None,
    model: Model = None,
    kind: Annotated[
        str, typer.Option("--kind", help="temperature, pit, beta, nearest by commas, or calpit alone.")
    ] = "temperature,pit",
    tta: Tta = "none",
    batch_size: cli.BatchSize = 64,
    limit: cli.Limit = None,
    seed: cli.Seed = 0,
    device: cli.Device = "auto",
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Calibrate probabilities: fit a recalibration of p(z) on objects that the model was not trained on.

    Example: mantis-photoz calibrate held_out.ecsv --cutouts cutouts --kind temperature,pit --out mend.json
    """
    from mantis_photoz import calibrate as maps
    from mantis_photoz import metrics
    from mantis_photoz.estimate import PhotoZ

    kinds = [name.strip() for name in kind.split(",") if name.strip()]
    if not kinds or any(name not in _KINDS for name in kinds) or ("calpit" in kinds and len(kinds) > 1):
        raise ConfigError(f"--kind is {kind!r}, wanted some of {', '.join(_KINDS[:-1])}, or calpit alone")
    wanted = ".safetensors" if kinds == ["calpit"] else ".json"
    if out.suffix != wanted:
        raise InputError(f"--out is {out}, wanted a {wanted} file for {kind}")
    if out.exists() and not overwrite:
        raise InputError(f"--out {out} is there already; pass --overwrite, or name another file")
    found, z = _catalog(catalog, truth, limit)
    place = _needed(cutouts)
    photoz = PhotoZ.from_pretrained(_model(model), device=device, recalibration=False)
    pdf = _densities(photoz, found, place, tta, batch_size, quiet).pdf
    features: Any = _hidden(photoz, found, place, batch_size) if {"nearest", "calpit"} & set(kinds) else None
    made: Any
    if kinds == ["calpit"]:
        from mantis_photoz.calpit import CalPIT

        made = CalPIT.fit(pdf, z, features, seed=seed, progress=False if quiet else None)
        made.save(out)
    else:
        count = max(2, min(200, len(z) // 4))
        made = maps.fit(pdf, z, kinds, nearest={"features": features, "neighbours": count})
        maps.save(made, out, objects=len(z), kinds=kinds, model=photoz.name, catalogue=str(catalog.name))
    pits = {"raw": pdf.pit(z), "recalibrated": made(pdf, features).pit(z)}
    rows = [
        {"densities": n, "pit_ks": metrics.kolmogorov_smirnov(p), "objects": len(z)} for n, p in pits.items()
    ]
    sys.stderr.write("the numbers are of the objects that the fit saw; evaluate on others\n")
    cli.emit({"out": str(out), "rows": rows} if json else rows, json)


def _model(name: str | None) -> str:
    from mantis_photoz.fusion import shipped

    if name is not None:
        return name
    own = sorted(shipped(), key=lambda entry: ("early" not in entry, entry))
    if not own:
        raise InputError("--model is missing: name a folder, or a model on the hub")
    return own[0]


def _samples(photoz: Any, catalog: Any, cutouts: Path, truth: str | None = None) -> Any:
    from mantis_photoz.cutouts import Cutouts

    return Cutouts.from_directory(cutouts, catalog, photoz.surveys, truth=truth)


def _hidden(photoz: Any, catalog: Any, cutouts: Path, batch_size: int) -> Any:
    """The features that ``estimate`` gives to a local recalibration: the network's hidden layer."""
    from mantis_photoz.predicting import predict

    return (
        predict(photoz.model, _samples(photoz, catalog, cutouts), batch_size=batch_size)
        .features.double()
        .numpy()
    )


def explain(
    catalog: CatalogFile,
    truth: Truth = "z_spec",
    cutouts: CutoutDir = None,
    model: Model = None,
    players: Annotated[
        Literal["surveys", "bands"], typer.Option("--players", help="8 passes, or 512.")
    ] = "surveys",
    value: Annotated[
        Literal["neg_crps", "log_density", "z_mean"], typer.Option("--value", help="What is shared out.")
    ] = "neg_crps",
    baseline: Annotated[
        Literal["absent", "zero", "mean", "marginal"] | None,
        typer.Option("--baseline", help="What stands for an absent player."),
    ] = None,
    out: cli.Out = None,
    batch_size: cli.BatchSize = 64,
    limit: cli.Limit = None,
    seed: cli.Seed = 0,
    device: cli.Device = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Which surveys or bands the model uses: exact Shapley values, with errors, against redshift.

    Example: mantis-photoz explain hosts.ecsv --cutouts cutouts --players surveys --out use
    """
    from mantis_photoz.band_use import band_use
    from mantis_photoz.catalog import read_catalog
    from mantis_photoz.estimate import PhotoZ

    found = read_catalog(catalog)
    found = found if limit is None else found.take(range(min(limit, len(found))))
    known = truth in found.table.colnames or value != "z_mean"  # the mean redshift needs no truth
    place = _needed(cutouts)
    photoz = PhotoZ.from_pretrained(_model(model), device=device, recalibration=False)
    chosen = baseline or ("absent" if players == "surveys" else "zero")
    result = band_use(
        photoz.model,
        _samples(photoz, found, place, truth if known else None),
        players=players,
        value=value,
        baseline=chosen,
        batch_size=batch_size,
        seed=seed,
        progress=False if quiet else None,
    )
    cli.emit(result, json, out)

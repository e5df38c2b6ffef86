"""The verbs ``evaluate``, ``calibrate`` and ``explain`` of the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusion_core import cli
from fusion_core.errors import InputError
from mantis_photoz.options import (
    CatalogFile,
    CutoutDir,
    Model,
    Tta,
    first_rows,
    load_photoz,
    model_name,
    needed,
    parse_tta,
)

__all__ = ["add_commands"]

Truth = Annotated[str, typer.Option("--truth", help="Column of true redshifts.")]


def add_commands(app: typer.Typer) -> None:
    """Add the three verbs."""
    app.command()(evaluate)
    app.command()(calibrate)
    app.command()(explain)


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
    from mantis_photoz.estimate import PhotoZ
    from mantis_photoz.report import evaluate as run

    found = first_rows(catalog, limit)
    z = found.column(truth)
    if pdf is not None:
        if recalibrate is not None:
            raise InputError("--recalibrate needs --cutouts; --pdf holds densities as they were written")
        pdfs: dict[str, Any] = {pdf.stem: _written(pdf, found)}
    else:
        place, name = needed(cutouts), model_name(model)
        photoz = PhotoZ.from_pretrained(name, device=device)
        pdfs = {photoz.name: _densities(photoz, found, place, tta, batch_size, quiet).pdf}
        if recalibrate is not None:
            mended = PhotoZ.from_pretrained(name, device=device, recalibration=recalibrate)
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
    features: Annotated[
        Literal["photometric", "hidden"] | None,
        typer.Option("--features", help="Of nearest and calpit: Kron fluxes (needs SEP), or a hidden layer."),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of calpit, at most.")] = 100,
    hidden: Annotated[
        str, typer.Option("--hidden", help="Widths of calpit; the authors' are 1024,1024,1024,1024.")
    ] = "128,128,128",
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

    Cal-PIT takes photometric features as the authors do where SEP is installed (extra phot), else the
    network's hidden layer; nearest takes the hidden layer.

    Example: mantis-photoz calibrate held_out.ecsv --cutouts cutouts --kind temperature,pit --out mend.json
    """
    from mantis_photoz import calibrating, metrics

    kinds = [name.strip() for name in kind.split(",") if name.strip()]
    calibrating.check_kinds(kinds)
    calibrating.check_place(out, kinds)
    source = calibrating.feature_source(kinds, features)
    widths = calibrating.parse_widths(hidden)
    if out.exists() and not overwrite:
        raise InputError(f"--out {out} is there already; pass --overwrite, or name another file")
    place = needed(cutouts)
    photoz = load_photoz(model, device=device, recalibration=False)
    bar = False if quiet else None
    data = calibrating.calibration_set(
        photoz,
        _samples(photoz, first_rows(catalog, limit), place, truth),
        source=source,
        tta=parse_tta(tta),
        batch_size=batch_size,
        progress=bar,
    )
    if data.left_out:
        sys.stderr.write(f"{data.left_out} objects left out: no finite {truth}, or no density\n")
    made = calibrating.fit(data, kinds, epochs=epochs, hidden=widths, seed=seed, progress=bar)
    facts: dict[str, Any] = {"objects": len(data.z), "kinds": kinds, "features": source}
    calibrating.save(made, out, **facts, model=photoz.name, catalogue=catalog.name, truth=truth)
    pits = {"raw": data.pdf.pit(data.z), "recalibrated": made(data.pdf, data.features).pit(data.z)}
    rows = [
        {"densities": n, "pit_ks": metrics.kolmogorov_smirnov(p), "objects": len(p)} for n, p in pits.items()
    ]
    sys.stderr.write("the numbers are of the objects that the fit saw; evaluate on others\n")
    cli.emit({"out": str(out), "features": source, "rows": rows} if json else rows, json)


def _samples(photoz: Any, catalog: Any, cutouts: Path, truth: str | None = None) -> Any:
    from mantis_photoz.cutouts import Cutouts

    return Cutouts.from_directory(cutouts, catalog, photoz.surveys, truth=truth)


def explain(
    catalog: CatalogFile,
    truth: Truth = "z_spec",
    cutouts: CutoutDir = None,
    model: Model = None,
    method: Annotated[
        Literal["shapley", "expected", "integrated", "gradient", "ablation"],
        typer.Option("--method", help="Shapley values, shares of pixel attributions, or what is lost."),
    ] = "shapley",
    players: Annotated[
        Literal["surveys", "bands"], typer.Option("--players", help="8 passes, or 512, for Shapley values.")
    ] = "surveys",
    value: Annotated[
        Literal["neg_crps", "log_density", "z_mean"] | None,
        typer.Option("--value", help="What is shared out: neg_crps, and z_mean for attributions."),
    ] = None,
    baseline: Annotated[
        Literal["absent", "zero", "mean", "marginal"] | None,
        typer.Option("--baseline", help="What stands for an absent player, for Shapley values."),
    ] = None,
    out: cli.Out = None,
    batch_size: cli.BatchSize = 64,
    limit: cli.Limit = None,
    seed: cli.Seed = 0,
    device: cli.Device = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Which surveys or bands the model uses, against redshift: exact Shapley values with errors, or others.

    Example: mantis-photoz explain hosts.ecsv --cutouts cutouts --players surveys --out use
    """
    from mantis_photoz.ablation import ablation
    from mantis_photoz.band_use import band_use
    from mantis_photoz.pixel_use import pixel_use

    chosen: Any = value or ("neg_crps" if method == "shapley" else "z_mean")
    if baseline is not None and method != "shapley":
        raise InputError(f"--baseline is of --method shapley, not of {method}")
    found = first_rows(catalog, limit)
    # the mean redshift needs no truth
    known = truth in found.table.colnames or chosen != "z_mean" or method == "ablation"
    place = needed(cutouts)
    photoz = load_photoz(model, device=device, recalibration=False)
    data = _samples(photoz, found, place, truth if known else None)
    common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": False if quiet else None}
    if method == "shapley":
        absent: Any = baseline or ("absent" if players == "surveys" else "zero")
        made: Any = band_use(photoz.model, data, players=players, value=chosen, baseline=absent, **common)
    elif method == "ablation":
        made = ablation(photoz.model, data, **common)
    else:
        made = pixel_use(photoz.model, data, method=method, players=players, value=chosen, **common)
    cli.emit(made, json, out)

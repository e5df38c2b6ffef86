"""The command line of mantis-photoz."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusion_core import cli
from fusion_core.demo import add_demo
from fusion_core.errors import InputError
from mantis_photoz import __version__, cli_evaluate, cli_train
from mantis_photoz.options import (
    CatalogFile,
    CutoutDir,
    DecColumn,
    IdColumn,
    Model,
    RaColumn,
    Tta,
    first_rows,
    load_photoz,
    needed,
    parse_tta,
)

app = cli.new_app(
    "mantis-photoz",
    "Calibrated redshift densities of galaxies from the images of several surveys.",
    __version__,
)

Surveys = Annotated[
    str | None, typer.Option("--surveys", help="Use these only, by commas: galex,ps1,unwise.")
]


@app.command()
def estimate(
    catalog: CatalogFile,
    cutouts: CutoutDir = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch what is missing first, into --cutouts.")
    ] = False,
    model: Model = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Table: .ecsv, .fits or .parquet.")] = None,
    pdf: Annotated[Path | None, typer.Option("--pdf", help="Densities: .hdf5 of qp.")] = None,
    tta: Tta = "none",
    recalibrate: Annotated[
        Path | None, typer.Option("--recalibrate", help="File of calibrate, instead of the model's own.")
    ] = None,
    prior: Annotated[
        Path | None, typer.Option("--prior", help="n(z) of your sample: columns z and n, or z alone.")
    ] = None,
    surveys: Surveys = None,
    dust: Annotated[
        Path | None, typer.Option("--dust", help="Folder of dust maps, for catalogues without E(B-V).")
    ] = None,
    nan: Annotated[
        Literal["inpaint", "zero", "official", "error"], typer.Option("--nan", help="What fills NaN pixels.")
    ] = "inpaint",
    nan_limit: Annotated[
        float, typer.Option("--nan-limit", min=0.0, max=1.0, help="Share of NaN pixels that is flagged.")
    ] = 0.01,
    grid: Annotated[
        Literal["training", "official-infer"],
        typer.Option("--grid", help="official-infer repeats the authors' redshift grid."),
    ] = "training",
    official: Annotated[
        bool, typer.Option("--official-points", help="Point estimates with the masses at the nodes.")
    ] = False,
    format_columns: Annotated[
        Literal["own", "rail"], typer.Option("--format-columns", help="Names of the output's columns.")
    ] = "own",
    id_column: IdColumn = None,
    ra: RaColumn = None,
    dec: DecColumn = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 where an object is flagged.")] = False,
    batch_size: cli.BatchSize = 64,
    num_workers: Annotated[int, typer.Option("--num-workers", min=0, help="Threads that read ahead.")] = 1,
    limit: cli.Limit = None,
    seed: cli.Seed = 0,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    device: cli.Device = "auto",
    dtype: cli.DType = "float32",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Redshift densities of all objects of a catalogue; without --out the table goes to stdout.

    Example: mantis-photoz estimate hosts.ecsv --cutouts cutouts --out z.ecsv --pdf z.hdf5 --tta d4
    """
    from mantis_photoz.corrections import load_prior
    from mantis_photoz.ebv import dust_maps
    from mantis_photoz.output import check_suffix, provenance_file

    if out is not None:
        check_suffix(out)
    if pdf is not None:
        from mantis_photoz.qpio import check_pdf_suffix

        check_pdf_suffix(pdf)
        if pdf.exists() and not (overwrite or resume):
            raise InputError(f"--pdf {pdf} is there already; pass --overwrite, or name another file")
    found = first_rows(catalog, limit, id=id_column, ra=ra, dec=dec)
    photoz = load_photoz(model, device=device, dtype=dtype, recalibration=recalibrate, grid=grid)
    if fetch:
        cutouts = cutouts or (out or catalog).with_suffix(".cutouts")
        _fetch_first(found, cutouts, photoz, quiet=quiet)
    result = photoz.estimate(
        found,
        needed(cutouts, ", or pass --fetch"),
        tta=parse_tta(tta),
        batch_size=batch_size,
        nan=nan,
        nan_limit=nan_limit,
        prior=None if prior is None else load_prior(prior, photoz.edges.numpy()),
        official=official,
        ebv=None if dust is None else dust_maps(found, dust),
        surveys=None if surveys is None else [name.strip() for name in surveys.split(",") if name.strip()],
        seed=seed,
        num_workers=num_workers,
        out=out,
        resume=resume,
        overwrite=overwrite,
        progress=False if quiet else None,
    )
    files: list[Path] = []
    if out is not None:
        files = result.save(out, pdf=pdf, columns=format_columns)
        from mantis_photoz.runs import Run

        Run.remove(out)
    elif pdf is not None:
        result.save_pdf(pdf)
        files = [pdf]
    _report(result, quiet)
    summary = {**result.summary(), "files": [str(file) for file in files]}
    if json:
        cli.emit(summary, json=True)
    elif out is None:
        import io

        from mantis_photoz.output import rail_columns

        shown = rail_columns(result.table) if format_columns == "rail" else result.table
        text = io.StringIO()
        shown.write(text, format="ascii.ecsv")
        sys.stdout.write(text.getvalue())
    else:
        cli.emit({"objects": len(result), "flagged": result.flagged, "failed": result.failed,
                  "out": str(out), "provenance": str(provenance_file(out))}, json=False)  # fmt: skip
    if strict and result.flagged:
        raise typer.Exit(3)


def _report(result: Any, quiet: bool) -> None:
    """Flags, rates and the bottleneck, on stderr."""
    sys.stderr.write(
        f"{result.flagged} of {len(result)} objects flagged, {result.failed} without a density\n"
    )
    if quiet:
        return
    found = result.throughput()
    rates = [f"{name} {rate:.3g}" for name, rate in found["objects_per_s"].items() if rate is not None]
    if rates and found["bottleneck"] is not None:
        share = found["network_share"] or 0.0
        sys.stderr.write(
            f"objects/s: {', '.join(rates)}; bottleneck: {found['bottleneck']}; "
            f"network {share:.0%} of the time\n"
        )


def _fetch_first(catalog: Any, place: Path, photoz: Any, *, quiet: bool) -> None:
    from mantis_photoz.fetch import fetch as run

    found = run(catalog, place, surveys=photoz.surveys, resume=True, progress=False if quiet else None)
    for identifier, words in found.failures.items():
        sys.stderr.write(f"not fetched: {identifier}: {words}\n")


@app.command()
def fetch(
    catalog: CatalogFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the cutouts.")],
    surveys: Annotated[str, typer.Option("--surveys", help="By commas.")] = "galex,ps1,unwise",
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests in flight.")] = 8,
    rate: Annotated[float, typer.Option("--rate", min=0.01, help="Requests per second and host.")] = 5.0,
    retries: Annotated[int, typer.Option("--retries", min=0, help="Tries after the first.")] = 5,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Directory of what was fetched before, for all catalogues.")
    ] = None,
    cache_size: Annotated[
        float, typer.Option("--cache-size", min=0.0, help="Gigabytes kept in --cache.")
    ] = 20.0,
    unwise_pixscale: Annotated[
        float,
        typer.Option("--unwise-pixscale", min=0.1, help="Arc seconds; the authors' live service took 1.5."),
    ] = 2.75,
    service: Annotated[
        list[str] | None,
        typer.Option("--service", help="Other base address: viewer=URL, ps1names=URL, ps1cut=URL."),
    ] = None,
    dust: Annotated[
        Path | None, typer.Option("--dust", help="Fetch the dust maps too, into this folder (up to 1.8 GB).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count the requests, send none.")] = False,
    id_column: IdColumn = None,
    ra: RaColumn = None,
    dec: DecColumn = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 where a file is missing.")] = False,
    limit: cli.Limit = None,
    resume: cli.Resume = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Fetch cutouts from the Legacy viewer and Pan-STARRS1; rate limited, retried, cached, resumable.

    Example: mantis-photoz fetch hosts.ecsv --out cutouts --rate 5 --cache cache
    """
    from mantis_photoz.fetch import fetch as run
    from mantis_photoz.fetch.services import SERVICES
    from mantis_photoz.surveys import select_surveys

    bases = dict(SERVICES)
    for entry in service or []:
        name, mark, url = entry.partition("=")
        if not mark or name not in bases:
            raise InputError(f"--service is {entry!r}, wanted NAME=URL with a name of {', '.join(bases)}")
        bases[name] = url
    chosen = select_surveys(surveys)
    if "unwise" in chosen:
        chosen["unwise"] = chosen["unwise"].replace(pixel_scale=unwise_pixscale)
    found = first_rows(catalog, limit, id=id_column, ra=ra, dec=dec)
    result = run(
        found,
        out,
        surveys=chosen,
        concurrency=concurrency,
        rate=rate,
        retries=retries,
        cache=cache,
        cache_bytes=int(cache_size * 1e9),
        services=bases,
        dry_run=dry_run,
        resume=resume,
        progress=False if quiet else None,
    )
    failures = dict(result.failures)
    if dust is not None and not dry_run:
        from mantis_photoz.fetch import fetch_dust

        failures |= {name: words for name, words in fetch_dust(dust).items() if words != "ok"}
    for name, words in failures.items():
        sys.stderr.write(f"not fetched: {name}: {words}\n")
    cli.emit(result.to_dict(), json)
    if strict and failures:
        raise typer.Exit(3)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="FITS cutout, packed .h5, a model's folder or name.")],
    json: cli.Json = False,
) -> None:
    """What a cutout holds (bands, scale, place, gaps), or what a model is.

    Example: mantis-photoz inspect cutouts/host1.ps1.fits
    """
    from mantis_photoz.inspection import inspect as run

    cli.emit(run(source), json)


@app.command()
def pack(
    catalog: CatalogFile,
    cutouts: Annotated[Path, typer.Option("--cutouts", help="Directory of FITS files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Packed .h5 file.")],
    surveys: Annotated[str, typer.Option("--surveys", help="By commas.")] = "galex,ps1,unwise",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Pack at the pixels that this model takes.")
    ] = None,
    half: Annotated[bool, typer.Option("--float16", help="Half the size, three digits.")] = False,
    id_column: IdColumn = None,
    ra: RaColumn = None,
    dec: DecColumn = None,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Pack a folder of cutouts into one HDF5 file, which reads faster and trains better.

    Example: mantis-photoz pack hosts.ecsv --cutouts cutouts --out cutouts.h5
    """
    from mantis_photoz.catalog import read_catalog
    from mantis_photoz.cutouts import Cutouts
    from mantis_photoz.pack import pack as run
    from mantis_photoz.surveys import select_surveys

    chosen: Any = select_surveys(surveys)
    if model is not None:
        from mantis_photoz.fusion import load_model
        from mantis_photoz.inputs import surveys_of

        chosen = surveys_of(load_model(model).config)
    data = Cutouts.from_directory(cutouts, read_catalog(catalog, id=id_column, ra=ra, dec=dec), chosen)
    count = run(
        data,
        out,
        dtype="float16" if half else "float32",
        overwrite=overwrite,
        progress=False if quiet else None,
    )
    cli.emit({"objects": count, "bytes": out.stat().st_size, "out": str(out)}, json)


add_demo(
    app,
    "mantis-photoz",
    "Simulated galaxies in three surveys as FITS files, through the whole pipeline; nothing is downloaded.",
    "Train the models (minutes).",
)


@app.command()
def bench(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the JSON document.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Pairs per row.")] = 5,
    only: Annotated[list[str] | None, typer.Option("--only", help="Rows whose name contains this.")] = None,
    json: cli.Json = False,
) -> None:
    """Time the parts against the libraries of the field and the authors' way, in one process.

    Example: mantis-photoz bench --out bench.json
    """
    from mantis_photoz.bench import run

    cli.emit(run(repeats=repeats, only=tuple(only or ())), json, out)


cli_train.add_commands(app)
cli_evaluate.add_commands(app)


def main() -> None:
    """The console script."""
    cli.run(app)

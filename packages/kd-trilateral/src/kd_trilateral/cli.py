"""The command line: train, compare, look inside a run, keep a teacher's logits, measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from fusion_core import cli
from fusion_core.bench import add_bench
from fusion_core.demo import add_demo
from fusion_core.errors import ConfigError, DataError, InputError
from kd_trilateral import __version__

app = cli.new_app(
    "kd-trilateral",
    "Distil a teacher into a student with a learned weight per sample (TGeo-KD).\n\n"
    "Example: kd-trilateral demo --out demo",
    __version__,
)
cache = typer.Typer(help="Keep a teacher's logits on disk and use them again.", no_args_is_help=True)
app.add_typer(cache, name="cache")

ConfigFile = Annotated[Path, typer.Argument(help="Settings, .toml or .json.", show_default=False)]
RunDir = Annotated[Path, typer.Argument(help="A directory that train made.", show_default=False)]


def _load(path: Path, sets: list[str] | None) -> Any:
    from kd_trilateral.config import Config

    if not path.is_file():
        raise InputError(f"CONFIG is {path}, which is no file; wanted settings in .toml or .json")
    return Config.load(path).override(sets or [])


def _callable(config: Any, name: str, file: Path) -> Callable[..., Any]:
    """The callable that a setting names; errors name the file of the settings too."""
    from fusion_core.modules import load_object

    word = getattr(config, name)
    if not word:
        raise ConfigError(f'{file}: {name} is not set; name a callable, such as {name} = "module:function"')
    found = load_object(word, f"{file}: {name}")
    if not callable(found):
        raise ConfigError(f'{file}: {name} is {word!r}, which is no callable; wanted "module:function"')
    return found


def _student(config: Any, file: Path) -> Callable[..., Any]:
    """What makes a student; the geometry is looked up too, which the user's own modules may have named."""
    from fusion_core.errors import naming
    from kd_trilateral.geometry import Geometry

    make = _callable(config, "student", file)
    if config.geometry is not None:
        with naming(file):
            Geometry.named(config.geometry, 2)
    return make


def _seeded(make: Callable[..., Any], seed: int) -> Any:
    """Call with the seed where a parameter is named so or must be given."""
    import inspect

    parameters = inspect.signature(make).parameters
    if "seed" in parameters:
        return make(seed=seed)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind in positional]
    return make(seed) if needed else make()


def _as_splits(found: Any) -> Any:
    """What a data callable returned: Splits, or a mapping with its fields."""
    from kd_trilateral.training import Splits

    if isinstance(found, dict):
        known = set(Splits.__dataclass_fields__)
        fields = cast("dict[str, Any]", found)
        if unknown := sorted(set(fields) - known):
            raise DataError(f"data returned the keys {unknown}, wanted some of {sorted(known)}")
        if "train" not in fields:
            raise DataError("data returned a mapping without 'train', the training rows")
        return Splits(**fields)
    if not isinstance(found, Splits):
        raise DataError(f"data returned a {type(found).__name__}, wanted Splits or a mapping with its fields")
    return found


def _splits(config: Any, seed: int, file: Path) -> Any:
    """The rows of a seed, with the teacher that the settings name."""
    from kd_trilateral.cache import TeacherCache

    found = _as_splits(_seeded(_callable(config, "data", file), seed))
    if config.teacher:
        if ":" in config.teacher and not Path(config.teacher).exists():
            found.teacher = _seeded(_callable(config, "teacher", file), seed).eval()
        else:
            found.teacher = TeacherCache.open(config.teacher, data=found.train)
    if found.teacher is None:
        raise ConfigError(
            f"{file}: there is no teacher: set teacher to a module:callable or a cache, "
            "or let data bring logits"
        )
    return found


@app.command()
def train(
    config: ConfigFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the run.")],
    sets: cli.Settings = None,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    device: cli.Device = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Train a student; the run directory holds settings, weights, trace, metrics and a report.

    Example: kd-trilateral train run.toml --set every=8 --out runs/first
    """
    from kd_trilateral.runstate import check_out
    from kd_trilateral.training import fit

    settings = _load(config, sets)
    if device != "auto":
        settings = settings.replace(device=device)
    check_out(out, resume=resume, overwrite=overwrite)
    splits = _splits(settings, settings.seed, config)
    result = fit(
        _seeded(_student(settings, config), settings.seed),
        splits.train,
        splits.val,
        teacher=splits.teacher,
        val_teacher=splits.val_teacher,
        test=splits.test,
        num_classes=splits.num_classes,
        config=settings,
        out=out,
        resume=resume,
        overwrite=overwrite,
        progress=False if quiet else None,
    )
    report = result.report()
    _save_report(report, out)
    cli.emit({"out": str(out), **result.metrics[-1]} if json else report, json)


def _save_report(report: Any, out: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is not None:
        report.save(out)
    else:
        typer.echo('no pictures: matplotlib is not installed (pip install "kd-trilateral[plot]")', err=True)


@app.command()
def compare(
    config: ConfigFile,
    ratios: Annotated[
        str,
        typer.Option(
            "--ratios",
            help="alone, const[:0.9], ada, wls, anl, rw, tgeo, tgeo:paper, tgeo:refit, tgeo:frozen.",
        ),
    ] = "const:0.3,const:0.5,const:0.9,wls,ada,tgeo",
    seeds: cli.Seeds = 5,
    seed: cli.Seed = 0,
    out: cli.Out = None,
    sets: cli.Settings = None,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Does a per-sample ratio help on your data? Methods over seeds, paired test.

    Example: kd-trilateral compare run.toml --ratios const:0.5,wls,tgeo --seeds 5 --out comparison
    """
    from kd_trilateral.comparing import compare as run_compare
    from kd_trilateral.comparing import method

    settings = _load(config, sets)
    methods = dict(method(word) for word in ratios.split(",") if word.strip())
    make = _student(settings, config)
    report = run_compare(
        lambda s: _splits(settings, s, config),
        lambda s: _seeded(make, s),
        methods,
        range(seed, seed + seeds),
        config=settings,
        title=f"{config.stem}: methods over {seeds} seeds",
        progress=False if quiet else None,
    )
    cli.emit(report, json, out)
    if not json:
        for sentence in report.verdict:
            typer.echo(sentence)


@app.command()
def inspect(
    run_dir: RunDir,
    suspects: Annotated[
        int, typer.Option("--suspects", min=0, help="How many suspicious rows to show.")
    ] = 20,
    out: cli.Out = None,
    json: cli.Json = False,
) -> None:
    """Statistics of the ratio and the rows to distrust; --out FILE.csv writes all of them.

    Example: kd-trilateral inspect runs/first --suspects 10 --out suspects.csv
    """
    from kd_trilateral.report import run_report, save_suspects
    from kd_trilateral.report import suspects as find
    from kd_trilateral.runstate import load_run

    settings, trace, audit, metrics = load_run(run_dir)
    rows = audit if audit is not None else trace.rows().last_of_each()
    if out is not None:
        save_suspects(find(rows, len(rows), trace), out)
    cli.emit(run_report(trace, rows, metrics, settings, suspects), json)


@app.command()
def plot(run_dir: RunDir, out: cli.Out = None, json: cli.Json = False) -> None:
    """Draw the ratio over training.

    Example: kd-trilateral plot runs/first --out alpha.png
    """
    from kd_trilateral.report import plot as draw
    from kd_trilateral.runstate import load_run

    _, trace, _, _ = load_run(run_dir)
    target = out or run_dir / "alpha.png"
    if target.suffix != ".png":
        raise InputError(f"--out is {target}, wanted a .png file")
    draw(trace, target)
    cli.emit({"out": str(target)}, json)


add_demo(
    app,
    "kd-trilateral",
    "Fixed, heuristic and learned ratios on bundled data, with a page.",
    "Five seeds, and the whole recorded experiment (minutes).",
    task=(
        Annotated[Literal["digits", "cancer", "ctr"], typer.Option("--task", help="The bundled data.")],
        "digits",
    ),
    noise=(
        Annotated[
            str | None,
            typer.Option("--noise", help="Shares of wrong teachers and wrong labels, such as 0.3,0.3."),
        ],
        None,
    ),
    val_noise=(
        Annotated[
            float, typer.Option("--val-noise", min=0.0, max=0.99, help="Share of wrong held-out labels.")
        ],
        0.0,
    ),
    seeds=(
        Annotated[int | None, typer.Option("--seeds", min=1, help="How many; 3, with --full 5.")],
        None,
    ),
)


add_bench(
    app,
    "kd-trilateral",
    "Time each engine against a plain distillation step, in pairs.",
    student=(Annotated[str, typer.Option("--student", help="mlp, resnet or all.")], "all"),
    engines=(
        Annotated[str | None, typer.Option("--engines", help="By commas; all by default.")],
        None,
    ),
)


@cache.command("build")
def cache_build(
    teacher: Annotated[str, typer.Option("--teacher", help="module:callable that makes the teacher.")],
    data: Annotated[
        str, typer.Option("--data", "-d", help="module:callable that makes the training rows, or Splits.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The cache, such as teacher.kdc.")],
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Classes kept per row; all by default.")
    ] = None,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option("--dtype", help="Of the stored logits.")
    ] = "float16",
    task: Annotated[
        Literal["multiclass", "binary"], typer.Option("--task", help="What the logits are.")
    ] = "multiclass",
    batch_size: cli.BatchSize = 256,
    num_workers: cli.NumWorkers = 0,
    device: cli.Device = "auto",
    seed: cli.Seed = 0,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Run the teacher over the training rows; a cache that was cut off goes on where it stopped.

    Example: kd-trilateral cache build --teacher my:teacher --data my:train --out teacher.kdc
    """
    from fusion_core.modules import load_object
    from kd_trilateral.cache import TeacherCache
    from kd_trilateral.training import Splits

    rows = _seeded(load_object(data, "data"), seed)
    found = TeacherCache.build(
        _seeded(load_object(teacher, "teacher"), seed).eval(),
        _as_splits(rows).train if isinstance(rows, (dict, Splits)) else rows,
        out,
        top_k=top_k,
        dtype=dtype,
        task=task,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        progress=False if quiet else None,
    )
    cli.emit([found.info()] if not json else found.info(), json)


@cache.command("info")
def cache_info(path: Annotated[Path, typer.Argument(help="A cache.")], json: cli.Json = False) -> None:
    """What a cache holds and what it was made from.

    Example: kd-trilateral cache info teacher.kdc
    """
    from kd_trilateral.cache import TeacherCache

    info = TeacherCache.open(path).info()
    cli.emit(info if json else [{"field": name, "value": value} for name, value in info.items()], json)


@cache.command("verify")
def cache_verify(path: Annotated[Path, typer.Argument(help="A cache.")], json: cli.Json = False) -> None:
    """Compare every stored byte with its digest.

    Example: kd-trilateral cache verify teacher.kdc
    """
    from kd_trilateral.cache import TeacherCache

    found = TeacherCache.open(path)
    found.verify()
    cli.emit(
        {"path": str(path), "rows": len(found), "sound": True}
        if json
        else f"{path}: {len(found)} rows, sound",
        json,
    )


def main() -> None:
    """Run the command line."""
    cli.run(app)

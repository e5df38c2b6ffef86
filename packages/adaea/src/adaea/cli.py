"""The command line: audit a classifier that you own or may test, attack, evaluate, compare."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adaea import __version__
from fusion_core import cli
from fusion_core.bench import add_bench
from fusion_core.demo import add_demo
from fusion_core.errors import ConfigError, InputError, reading

app = cli.new_app(
    "adaea",
    "Audit image classifiers that you own or may test against adaptive ensemble transfer attacks.",
    __version__,
)

Model = Annotated[
    str,
    typer.Argument(help="timm:NAME, torchvision:NAME, hf:NAME, file:PATH, py:module:factory or zoo:NAME."),
]
Surrogates = Annotated[str, typer.Option("--surrogates", "-s", help="White-box stand-ins, by commas.")]
Data = Annotated[str, typer.Option("--data", "-d", help="Folder, .npz, .safetensors, or zoo:scenes.")]
Size = Annotated[
    int | None, typer.Option("--size", min=1, help="Resize image files to squares of so many pixels.")
]
Eps = Annotated[str, typer.Option("--eps", help="Budget or budgets, such as 8/255 or 4/255,8/255.")]
Alpha = Annotated[str | None, typer.Option("--alpha", help="Step size, such as 2/255.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the attack.")]
Norm = Annotated[str, typer.Option("--norm", help="linf or l2.")]
Target = Annotated[
    str | None, typer.Option("--target", help="A label, random or least-likely; untargeted if not given.")
]


def _settings(alpha: str | None, steps: int | None, norm: str) -> dict[str, Any]:
    found: dict[str, Any] = {"norm": norm}
    if alpha is not None:
        found["alpha"] = cli.fraction(alpha)
    if steps is not None:
        found["steps"] = steps
    return found


def _budgets(text: str) -> list[float]:
    return [cli.fraction(part) for part in text.split(",") if part.strip()]


def _target(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text


@app.command()
def audit(
    model: Model,
    surrogates: Surrogates,
    data: Data,
    attacks: Annotated[
        str,
        typer.Option("--attacks", "-a", help="By commas: ens, adaea, adaea+mi, adaea+linear ..."),
    ] = "ens,adaea",
    eps: Eps = "8/255",
    alpha: Alpha = None,
    steps: Steps = None,
    norm: Norm = "linf",
    target: Target = None,
    defence: Annotated[
        str | None,
        typer.Option(
            "--defence", help="Further targets, by commas: jpeg:75, bits:4, median:3, resize-pad ..."
        ),
    ] = None,
    batch_size: cli.BatchSize = 32,
    limit: cli.Limit = None,
    size: Size = None,
    device: cli.Device = "auto",
    dtype: cli.DType = "auto",
    seed: cli.Seed = 0,
    out: cli.Out = None,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    png: Annotated[bool, typer.Option("--png", help="Also write the images as PNG folders.")] = False,
    max_asr: Annotated[
        float | None,
        typer.Option(
            "--max-asr",
            min=0.0,
            max=1.0,
            help="End with 3 if the upper end of a strict rate exceeds it.",
        ),
    ] = None,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Attack surrogates and see how often the model falls for it.

    Example: adaea audit zoo:vgg12 -s zoo:res16,zoo:vit8 -d zoo:scenes --limit 64 --out audit --max-asr 0.6
    """
    from adaea.auditing import audit as run
    from adaea.words import parse_attacks

    if (resume or overwrite) and out is None:
        raise ConfigError("--resume and --overwrite need --out, the directory of the audit")
    report = run(
        model,
        surrogates=surrogates,
        data=data,
        attacks=parse_attacks(attacks, **_settings(alpha, steps, norm)),
        eps=_budgets(eps),
        seed=seed,
        defences=[word for word in (defence or "").split(",") if word.strip()],
        target=_target(target),
        batch_size=batch_size,
        limit=limit,
        size=size,
        device=device,
        dtype=dtype,
        class_names=_class_names(data),
        out=out,
        resume=resume,
        overwrite=overwrite,
        png=png,
        progress=False if quiet else None,
    )
    cli.emit(report, json)
    if max_asr is None:
        return
    if over := report.above(max_asr):
        worst = max(over, key=lambda row: row["strict_high"])
        sys.stderr.write(
            f"gate not met: {worst['attack']} at eps {worst['eps']:.4g} against {worst['model']} "
            f"({worst['pixels']} pixels) reaches up to {worst['strict_high']:.3f} > --max-asr {max_asr:g}; "
            f"{len(over)} of the rates are above\n"
        )
        raise typer.Exit(3)


def _class_names(data: str) -> list[str] | None:
    if data == "zoo:scenes":
        from adaea.scenes import CAPTIONS

        return list(CAPTIONS)
    folder = Path(data)
    if folder.is_dir() and not (folder / "labels.csv").is_file():
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    return None


@app.command()
def attack(
    surrogates: Surrogates,
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="NAME.safetensors, or a new folder for PNG files.")
    ],
    attack: Annotated[
        str, typer.Option("--attack", "-a", help="ens, adaea, adaea+mi, adaea+di ...")
    ] = "adaea",
    eps: Eps = "8/255",
    alpha: Alpha = None,
    steps: Steps = None,
    norm: Norm = "linf",
    target: Target = None,
    batch_size: cli.BatchSize = 32,
    limit: cli.Limit = None,
    size: Size = None,
    device: cli.Device = "auto",
    dtype: cli.DType = "auto",
    seed: cli.Seed = 0,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Make adversarial images and keep them, without any model under audit.

    Example: adaea attack -s zoo:res16,zoo:vit8 -d zoo:scenes --limit 32 -a adaea+mi --out set.safetensors
    """
    from adaea.advset import is_png_set
    from adaea.auditing import attack_images
    from adaea.words import parse_attack
    from fusion_core.atomic import occupied

    if out.exists() and not overwrite:
        raise InputError(f"--out {out} is there already; name another or pass --overwrite")
    if out.suffix not in ("", ".safetensors"):
        raise InputError(f"--out is {out}, wanted NAME.safetensors or a folder without suffix")
    if out.suffix == "" and occupied(out) and not is_png_set(out):
        raise InputError(f"--out {out} holds something else than a set of images; name another folder")
    budgets = _budgets(eps)
    if len(budgets) != 1:
        raise ConfigError(f"--eps is {eps!r}, wanted one budget")
    made = attack_images(
        attack,
        parse_attack(attack, eps=budgets[0], **_settings(alpha, steps, norm)),
        surrogates=surrogates,
        data=data,
        seed=seed,
        target=_target(target),
        batch_size=batch_size,
        limit=limit,
        size=size,
        device=device,
        dtype=dtype,
        progress=False if quiet else None,
    )
    made.save(out, overwrite=overwrite)
    cli.emit(
        {"path": str(out), "attack": attack, "images": len(made), "eps": made.eps, "digest": made.digest()},
        json,
    )


@app.command()
def evaluate(
    set_: Annotated[
        str, typer.Argument(metavar="SET", help="A saved set: NAME.safetensors or a PNG folder.")
    ],
    models: Annotated[list[str], typer.Argument(help="Models to score it on.")],
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Where the clean images are, if not in the set.")
    ] = None,
    batch_size: cli.BatchSize = 32,
    size: Size = None,
    device: cli.Device = "auto",
    out: cli.Out = None,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Score a saved set on models.

    Example: adaea evaluate set.safetensors zoo:vgg12 zoo:mixer8 --json
    """
    from adaea.evaluation import evaluate as run
    from adaea.images import load_data

    clean = None if data is None else load_data(data, size=size)[0]
    progress = False if quiet else None
    report = run(set_, models, clean=clean, batch_size=batch_size, device=device, progress=progress)
    cli.emit(report, json, out)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A saved set.")],
    second: Annotated[str, typer.Argument(help="Another of the same images.")],
    models: Annotated[str, typer.Option("--models", "-m", help="Models to ask, by commas.")],
    batch_size: cli.BatchSize = 32,
    device: cli.Device = "auto",
    out: cli.Out = None,
    json: cli.Json = False,
) -> None:
    """Two saved sets on the same images: which attack wins where, with McNemar's exact test.

    Example: adaea compare ens.safetensors adaea.safetensors --models zoo:vgg12,zoo:mixer8
    """
    from adaea.evaluation import compare as run

    report = run(first, second, models, batch_size=batch_size, device=device)
    cli.emit(report, json, out)


@app.command()
def importance(
    model: Model,
    surrogates: Surrogates,
    data: Data,
    attack: Annotated[str, typer.Option("--attack", "-a", help="ens, adaea, adaea+mi ...")] = "adaea",
    eps: Eps = "8/255",
    alpha: Alpha = None,
    steps: Steps = None,
    norm: Norm = "linf",
    batch_size: cli.BatchSize = 32,
    limit: cli.Limit = None,
    size: Size = None,
    device: cli.Device = "auto",
    dtype: cli.DType = "auto",
    seed: cli.Seed = 0,
    out: cli.Out = None,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Leave one surrogate out in turn: which public model endangers yours most?

    Example: adaea importance zoo:vgg12 -s zoo:res16,zoo:inc16,zoo:vit8 -d zoo:scenes --limit 64
    """
    from adaea.evaluation import importance as run
    from adaea.words import parse_attack

    budgets = _budgets(eps)
    if len(budgets) != 1:
        raise ConfigError(f"--eps is {eps!r}, wanted one budget")
    report = run(
        model,
        surrogates=surrogates,
        data=data,
        attack=parse_attack(attack, **_settings(alpha, steps, norm)),
        eps=budgets[0],
        seed=seed,
        batch_size=batch_size,
        limit=limit,
        size=size,
        device=device,
        dtype=dtype,
        progress=False if quiet else None,
    )
    cli.emit(report, json, out)


@app.command()
def config(
    attacks: Annotated[
        str, typer.Option("--attacks", "-a", help="Words of attacks, by commas.")
    ] = "ens,adaea",
    run: Annotated[
        Path | None, typer.Option("--run", help="The directory of an audit: print what it ran with.")
    ] = None,
    eps: Eps = "8/255",
    alpha: Alpha = None,
    steps: Steps = None,
    norm: Norm = "linf",
    json: cli.Json = False,
) -> None:
    """Print every setting of a run as TOML (or JSON): of attack words, or of a finished audit.

    Example: adaea config --attacks adaea+mi --eps 16/255
    """
    from adaea.auditing import read_settings
    from adaea.words import parse_attacks
    from fusion_core.results import plain

    if run is not None:
        found = read_settings(run)
    else:
        made = parse_attacks(attacks, eps=_budgets(eps)[0], **_settings(alpha, steps, norm))
        found = {"attacks": {name: plain(one.config()) for name, one in made.items()}}
    if json:
        cli.emit(found, json=True)
        return
    import tomli_w

    with reading("settings" if run is None else run / "asr.json", "cannot be written as TOML; pass --json"):
        text = tomli_w.dumps(_without_none(found))
    cli.emit(text, json=False)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


add_demo(
    app,
    "adaea",
    "AdaEA beside Ens against ten tiny models, on crops of photographs; nothing is downloaded.",
    "Repeat the recorded experiment (minutes).",
)


add_bench(
    app,
    "adaea",
    "Time AdaEA against a plain implementation of the published loop, in one process.",
    batch_size=(cli.BatchSize, 8),
    size=(Annotated[int, typer.Option("--size", min=32, help="Side of the images in pixels.")], 64),
    steps=(Annotated[int, typer.Option("--steps", min=1, help="Steps of the attack.")], 10),
    memory=(cli.Memory, True),
)


def main() -> None:
    """The console script ``adaea``."""
    cli.run(app)


if __name__ == "__main__":
    main()

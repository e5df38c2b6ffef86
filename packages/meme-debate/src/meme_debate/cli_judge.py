"""The commands about judges: train, predict, evaluate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_core import cli
from fusion_core.errors import ConfigError
from meme_debate.cli_inputs import Debates, JudgeFolder, OnError, finish, looks, of_split, read, say


def add_commands(app: typer.Typer) -> None:
    """Give the command line ``judge train``, ``judge predict`` and ``judge evaluate``."""
    judge = typer.Typer(help="Train, apply and compare judges.", no_args_is_help=True)
    judge.command("train")(train)
    judge.command("predict")(predict)
    judge.command("evaluate")(evaluate)
    app.add_typer(judge, name="judge")


def train(
    memes: Annotated[Path, typer.Argument(help="memes.jsonl with labels.")],
    debates: Debates = None,
    kind: Annotated[
        str, typer.Option("--kind", help="text: words only, seconds; fused: T5 with the picture.")
    ] = "text",
    text: Annotated[str | None, typer.Option("--text", help="fused: folder or name of a T5.")] = None,
    vision: Annotated[str | None, typer.Option("--vision", help="fused: folder or name of a CLIP.")] = None,
    fusion: Annotated[str, typer.Option("--fusion", help="fused: layerwise, final or none.")] = "layerwise",
    config: Annotated[Path | None, typer.Option("--config", help="fused: settings, .toml or .json.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="fused: a setting, such as lr=1e-4 or judge.truncate=tail."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Learn from this split only.")] = None,
    validation: Annotated[
        str | None, typer.Option("--validation", help="fused: the split that chooses and calibrates.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="File of the policy that the labels follow, .toml or .json."),
    ] = None,
    features: Annotated[
        Path | None, typer.Option("--features", help="fused: folder of the pictures' states, kept.")
    ] = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Learn from the first of equal memes only.")
    ] = False,
    coverage: Annotated[
        float | None, typer.Option("--coverage", help="Share to decide; the rest is left to a person.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="Share that may be decided wrongly.")
    ] = None,
    miss: Annotated[float, typer.Option("--miss-cost", help="Cost of a missed harmful meme.")] = 1.0,
    alarm: Annotated[float, typer.Option("--alarm-cost", help="Cost of a false alarm.")] = 1.0,
    on_error: OnError = "raise",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the judge.")] = Path("judge"),
    seed: cli.Seed = 0,
    device: cli.Device = "auto",
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Train a judge from labeled memes and their debates.

    Example: meme-debate judge train memes.jsonl --debates debates.jsonl --out judge
    """
    from meme_debate.duplicates import drop_duplicates as dropped
    from meme_debate.duplicates import find_duplicates

    everything, said, left_out = read(memes, debates, on_error, pictures=kind == "fused")
    repeated = find_duplicates(everything)
    if line := repeated.warning():
        say(f"warning: {line}")
    if drop_duplicates:
        everything, gone = dropped(everything, repeated)
        said = [debate for debate in said if debate.id not in set(gone)]
    rows, heard = of_split(everything, said, split) if split else (everything, said)
    held = of_split(everything, said, validation) if validation else None
    if held is not None and split is None:
        ids = {meme.id for meme in held[0]}
        rows = [meme for meme in rows if meme.id not in ids]
        heard = [debate for debate in heard if debate.id not in ids]
    about = _about(out.name, policy)
    costs = {"miss": miss, "alarm": alarm, "coverage": coverage, "max_error": max_error}
    if kind == "text":
        report = _train_text(rows, heard, out, costs, about, seed, overwrite, False if quiet else None)
    elif kind == "fused":
        options = {"out": out, "resume": resume, "overwrite": overwrite, "device": device,
                   "progress": False if quiet else None, "features": features, "costs": costs,
                   "validation": held}  # fmt: skip
        report = _train_fused(rows, heard, text, vision, fusion, config, settings or [], about, seed, options)
    else:
        raise ConfigError(f"--kind is {kind!r}, wanted text or fused")
    cli.emit({**report, "out": str(out)}, json)
    finish("judge train", memes, out, left_out)


def _about(name: str, policy: Path | None) -> Any:
    """The settings that say what the judge is for."""
    from meme_debate.policy import Policy
    from meme_debate.settings import JudgeSettings

    asked = Policy() if policy is None else Policy.load(policy)
    return JudgeSettings(
        name=name,
        policy=asked.name,
        policy_digest=asked.digest(),
        labels=(asked.negative, asked.positive),
    )


def _train_text(
    rows: Any,
    heard: Any,
    out: Path,
    costs: dict[str, Any],
    about: Any,
    seed: int,
    overwrite: bool,
    progress: bool | None,
) -> dict[str, Any]:
    from meme_debate.scoring import metrics
    from meme_debate.text_judge import TextJudge

    judge = TextJudge(settings=about.replace(image=False))
    judge.fit_memes(rows, heard, seed=seed, progress=progress, **costs)
    judge.save(out, overwrite=overwrite)
    report: dict[str, Any] = {"kind": "text", "memes": len(rows), "debates": len(heard)}
    made = judge.calibration
    if judge.held_out is not None:
        found = metrics(judge.held_out, [meme.label for meme in rows])
        report |= {f"held_out_{name}": value for name, value in found.items()}
        report |= {"temperature": made.temperature, "threshold": made.threshold, "band": made.band,
                   "coverage": made.coverage}  # fmt: skip
    return report


def _train_fused(
    rows: Any,
    heard: Any,
    text: str | None,
    vision: str | None,
    fusion: str,
    config: Path | None,
    assignments: list[str],
    about: Any,
    seed: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    from meme_debate.judge import Judge
    from meme_debate.training import JudgeTrainConfig, train_judge

    if text is None or vision is None:
        raise ConfigError("--kind fused needs --text and --vision, such as google/flan-t5-base and "
                          "openai/clip-vit-base-patch32, or folders of them")  # fmt: skip
    plan = JudgeTrainConfig.load(config) if config else JudgeTrainConfig(seed=seed)
    plan = plan.override([each for each in assignments if not each.startswith("judge.")])
    about = about.override([each.removeprefix("judge.") for each in assignments if each.startswith("judge.")])
    judge = Judge.from_parts(text, vision, fusion, about)  # type: ignore[arg-type]
    result = train_judge(judge, rows, heard, plan, **options)
    return {"kind": "fused", "memes": len(rows), "debates": len(heard), "steps": result.steps,
            **result.metrics, **{f"best_{k}": v for k, v in (result.best or {}).items()}}  # fmt: skip


def predict(
    memes: Annotated[Path, typer.Argument(help="memes.jsonl.")],
    judge: JudgeFolder,
    debates: Debates = None,
    on_error: OnError = "skip",
    out: cli.Out = None,
    limit: cli.Limit = None,
    batch_size: cli.BatchSize = 32,
    device: cli.Device = "auto",
    json: cli.Json = False,
) -> None:
    """Print the score of each meme, or write them as JSON Lines with --out.

    Example: meme-debate judge predict memes.jsonl --debates debates.jsonl --judge judge
    """
    from meme_debate.ablations import paired
    from meme_debate.calibrate import decide
    from meme_debate.detection import load_judge, score
    from meme_debate.meme import save_lines

    found = load_judge(judge, device)
    rows, said, left_out = read(memes, debates, on_error, limit, pictures=looks(found))
    scores = score(found, rows, paired(rows, said), batch_size=batch_size)
    made = found.calibration
    lines = [
        {"id": meme.id, "score": float(value), "decision": decide(float(value), made.threshold, made.band)}
        for meme, value in zip(rows, scores, strict=True)
    ]
    if out is not None:
        save_lines(out, lines, lambda line: line)
        say(f"{len(lines)} scores in {out}")
    else:
        cli.emit({"predictions": lines} if json else lines, json)
    finish("judge predict", memes, out, left_out, whole=limit is None)


def evaluate(
    memes: Annotated[Path, typer.Argument(help="memes.jsonl with labels.")],
    judge: Annotated[
        Path | None,
        typer.Option("--judge", help="A trained judge; without one a light judge is cross-validated."),
    ] = None,
    debates: Debates = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option("--ablate", help="MD, LLMJ, SLMJ, HlD, HfD, MF, UR, or all; repeat for several."),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="This split only.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Foldings of the cross-validation.")] = 3,
    on_error: OnError = "raise",
    out: cli.Out = None,
    limit: cli.Limit = None,
    seed: cli.Seed = 0,
    batch_size: cli.BatchSize = 32,
    device: cli.Device = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Compare judges and the paper's ablations on labeled memes, in one table.

    Example: meme-debate judge evaluate memes.jsonl --debates debates.jsonl --ablate all
    """
    from meme_debate.detection import load_judge
    from meme_debate.evaluation import ablation_names
    from meme_debate.evaluation import evaluate as compared

    found = None if judge is None else load_judge(judge, device)
    rows, said, left_out = read(memes, debates, on_error, limit, pictures=found is not None and looks(found))
    if split:
        rows, said = of_split(rows, said, split)
    report = compared(
        rows,
        said,
        found,
        ablations=ablation_names(ablate or []),
        seeds=range(seed, seed + seeds),
        batch_size=batch_size,
        progress=False if quiet else None,
    )
    cli.emit(report, json, out)
    finish("judge evaluate", memes, out, left_out, whole=limit is None)

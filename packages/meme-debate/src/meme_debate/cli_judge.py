"""The commands about judges: train, predict, evaluate, detect, convert, audit."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_core import cli
from fusion_core.errors import ConfigError, InputError

Debates = Annotated[
    Path | None, typer.Option("--debates", help="debates.jsonl of these memes; without it there are none.")
]
JudgeFolder = Annotated[Path, typer.Option("--judge", help="Folder that `judge train` wrote.")]
Threshold = Annotated[
    float | None, typer.Option("--threshold", help="Harmful from this score on; the judge's own by default.")
]
OnError = Annotated[str, typer.Option("--on-error", help="raise, or skip: leave unusable memes out.")]


def add_commands(app: typer.Typer) -> None:
    """Give the command line ``judge``, ``detect``, ``convert``, ``audit`` and ``demo``."""
    from fusion_core.demo import add_demo

    judge = typer.Typer(help="Train, apply and compare judges.", no_args_is_help=True)
    judge.command("train")(train)
    judge.command("predict")(predict)
    judge.command("evaluate")(evaluate)
    app.add_typer(judge, name="judge")
    app.command("detect")(detect)
    app.command("convert")(convert)
    app.command("audit")(audit)
    add_demo(
        app,
        "meme-debate",
        "Stand-in memes over photographs of scikit-image, a scripted debater behind a local server, and "
        "every "
        "judge in one table.",
        "Five seeds, all fusions, unseen photographs; within five minutes.",
    )


def _read(path: Path, debates: Path | None, on_error: str, limit: int | None = None) -> tuple[Any, Any]:
    from meme_debate.meme import load_debates, load_memes

    if on_error not in ("raise", "skip"):
        raise ConfigError(f"--on-error is {on_error!r}, wanted raise or skip")
    memes = load_memes(path, on_error=on_error, limit=limit)  # type: ignore[arg-type]
    for place, reason in memes.skipped:
        _say(f"left out {place}: {reason}")
    said = [] if debates is None else load_debates(debates)
    if on_error == "skip" or limit is not None:
        known = {meme.id for meme in memes}
        said = [debate for debate in said if debate.id in known]
    return memes, said


def _say(line: str) -> None:
    sys.stderr.write(f"{' '.join(line.split())}\n")


def _split(memes: Any, debates: Any, name: str) -> tuple[Any, Any]:
    chosen = [meme for meme in memes if meme.split == name]
    if not chosen:
        splits = sorted({str(meme.split) for meme in memes})
        raise InputError(f"no meme has the split {name!r}; there are {', '.join(splits)}")
    ids = {meme.id for meme in chosen}
    return chosen, [debate for debate in debates if debate.id in ids]


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
        list[str] | None, typer.Option("--set", help="fused: a setting, such as lr=1e-4.")
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

    everything, said = _read(memes, debates, on_error)
    repeated = find_duplicates(everything)
    if line := repeated.warning():
        _say(f"warning: {line}")
    if drop_duplicates:
        everything, gone = dropped(everything, repeated)
        said = [debate for debate in said if debate.id not in set(gone)]
    rows, heard = _split(everything, said, split) if split else (everything, said)
    held = _split(everything, said, validation) if validation else None
    if held is not None and split is None:
        ids = {meme.id for meme in held[0]}
        rows = [meme for meme in rows if meme.id not in ids]
        heard = [debate for debate in heard if debate.id not in ids]
    about = _about(out.name, policy)
    costs = {"miss": miss, "alarm": alarm, "coverage": coverage, "max_error": max_error}
    if kind == "text":
        report = _train_text(rows, heard, out, costs, about, seed, overwrite)
    elif kind == "fused":
        options = {"out": out, "resume": resume, "overwrite": overwrite, "device": device,
                   "progress": False if quiet else None, "features": features, "costs": costs,
                   "validation": held}  # fmt: skip
        report = _train_fused(rows, heard, text, vision, fusion, config, settings or [], about, seed, options)
    else:
        raise ConfigError(f"--kind is {kind!r}, wanted text or fused")
    cli.emit({**report, "out": str(out)}, json)


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
    rows: Any, heard: Any, out: Path, costs: dict[str, Any], about: Any, seed: int, overwrite: bool
) -> dict[str, Any]:
    from meme_debate.metrics import metrics
    from meme_debate.text_judge import TextJudge

    judge = TextJudge(settings=about.replace(image=False))
    judge.fit_memes(rows, heard, seed=seed, **costs)
    judge.save(out, overwrite=overwrite)
    report: dict[str, Any] = {"kind": "text", "memes": len(rows), "debates": len(heard)}
    if judge.calibration.calibrated:
        from meme_debate.ablations import labels_of, paired

        texts = judge.texts(rows, paired(rows, heard))
        found = metrics(judge.cross_scores(texts, labels_of(rows), seed=seed), labels_of(rows))
        report |= {f"held_out_{name}": value for name, value in found.items()}
        report |= {"temperature": judge.calibration.temperature, "threshold": judge.calibration.threshold,
                   "band": judge.calibration.band, "coverage": judge.calibration.coverage}  # fmt: skip
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
    plan = plan.override(assignments)
    judge = Judge.from_parts(text, vision, fusion, about)  # type: ignore[arg-type]
    result = train_judge(judge, rows, heard, plan, **options)
    return {"kind": "fused", "memes": len(rows), "debates": len(heard), "steps": result.steps,
            **result.metrics, **{f"best_{k}": v for k, v in (result.best or {}).items()}}  # fmt: skip


def predict(
    memes: Annotated[Path, typer.Argument(help="memes.jsonl.")],
    judge: JudgeFolder,
    debates: Debates = None,
    on_error: OnError = "raise",
    out: cli.Out = None,
    limit: cli.Limit = None,
    batch_size: cli.BatchSize = 32,
    json: cli.Json = False,
) -> None:
    """Print the score of each meme, or write them as JSON Lines with --out.

    Example: meme-debate judge predict memes.jsonl --debates debates.jsonl --judge judge
    """
    from meme_debate.ablations import paired
    from meme_debate.calibrate import decide
    from meme_debate.detect import load_judge, score
    from meme_debate.meme import save_lines

    rows, said = _read(memes, debates, on_error, limit)
    found = load_judge(judge)
    scores = score(found, rows, paired(rows, said), batch_size=batch_size)
    made = found.calibration
    lines = [
        {"id": meme.id, "score": float(value), "decision": decide(float(value), made.threshold, made.band)}
        for meme, value in zip(rows, scores, strict=True)
    ]
    if out is not None:
        save_lines(out, lines, lambda line: line)
        _say(f"{len(lines)} scores in {out}")
        return
    cli.emit({"predictions": lines} if json else lines, json)


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
    json: cli.Json = False,
) -> None:
    """Compare judges and the paper's ablations on labeled memes, in one table.

    Example: meme-debate judge evaluate memes.jsonl --debates debates.jsonl --ablate all
    """
    from meme_debate.detect import load_judge
    from meme_debate.evaluation import ablation_names
    from meme_debate.evaluation import evaluate as compared

    rows, said = _read(memes, debates, on_error, limit)
    if split:
        rows, said = _split(rows, said, split)
    report = compared(
        rows,
        said,
        None if judge is None else load_judge(judge),
        ablations=ablation_names(ablate or []),
        seeds=range(seed, seed + seeds),
        batch_size=batch_size,
    )
    cli.emit(report, json, out)


def detect(
    memes: Annotated[Path, typer.Argument(help="memes.jsonl.")],
    judge: JudgeFolder,
    debates: Debates = None,
    threshold: Threshold = None,
    report: Annotated[
        str | None, typer.Option("--report", help="Name of the page inside --out; report.html by default.")
    ] = None,
    words: Annotated[
        int, typer.Option("--words", min=0, help="Most words shown a card; 0 = no reasons.")
    ] = 20,
    on_error: OnError = "raise",
    out: cli.Out = None,
    limit: cli.Limit = None,
    batch_size: cli.BatchSize = 32,
    json: cli.Json = False,
) -> None:
    """Decide on memes: cards.jsonl and a page of cards in --out, or a table on the screen.

    Example: meme-debate detect memes.jsonl --debates debates.jsonl --judge judge --out results
    """
    from meme_debate.cards import card_report
    from meme_debate.detect import detect as decided
    from meme_debate.detect import load_judge

    if report is not None and (out is None or Path(report).name != report or Path(report).suffix != ".html"):
        raise ConfigError(f"--report is {report!r}, wanted the name of an .html file inside --out")
    rows, said = _read(memes, debates, on_error, limit)
    cards = list(
        decided(rows, said, load_judge(judge), threshold=threshold, words=words, batch_size=batch_size)
    )
    made = card_report(cards)
    if out is not None:
        made.save(out)
        if report is not None and report != "report.html":
            (out / "report.html").replace(out / report)
        _say(f"{len(cards)} cards in {out}")
    if json:
        cli.emit({"cards": [card.to_dict() for card in cards]}, True)
    elif out is not None:
        made.print()
    else:
        cli.emit([_short(card) for card in cards], False)


def _short(card: Any) -> dict[str, Any]:
    reason = card.explanation or ""
    return {
        "id": card.id,
        "score": round(card.score, 3),
        "decision": card.decision,
        "reason": reason if len(reason) <= 120 else reason[:117] + "...",
        "flags": ", ".join(card.flags),
    }


def convert(
    name: Annotated[str, typer.Argument(help="harmc, harmp, fhm, mami, multioff or pridemm.")],
    folder: Annotated[Path, typer.Argument(help="The folder of the data set.")],
    positive: Annotated[
        str | None,
        typer.Option(
            "--positive", help='Labels that count as harmful, such as "very harmful,somewhat harmful".'
        ),
    ] = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep the first of equal memes only.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="The memes.jsonl to write.")] = Path("memes.jsonl"),
    json: cli.Json = False,
) -> None:
    """Write a published data set as memes.jsonl; nothing is downloaded.

    Pictures that are missing are listed, the other memes written, and the exit code is 2.

    Example: meme-debate convert harmc HarMeme --out memes.jsonl
    """
    from meme_debate.datasets import convert as converted

    labels = None if positive is None else positive.split(",")
    report = converted(name, folder, out, positive=labels, drop=drop_duplicates)
    document = report.to_dict()
    if json:
        cli.emit(document, True)
    else:
        rows = [
            {"split": split, "label": label, "memes": count}
            for split, counts in report.splits.items()
            for label, count in sorted(counts.items())
        ]
        cli.emit(rows, False)
        version = f" ({report.version})" if report.version else ""
        _say(f"{report.memes} memes of {name}{version} in {out}; positive: {', '.join(report.positive)}")
    if line := report.duplicates.warning():
        _say(f"warning: {line}; {len(report.dropped)} dropped")
    for image in report.missing:
        _say(f"error: {image} is not there; its meme is left out")
    if report.missing:
        raise typer.Exit(2)


def audit(
    memes: Annotated[Path, typer.Argument(help="memes.jsonl with labels, and with group where known.")],
    judge: JudgeFolder,
    debates: Debates = None,
    threshold: Threshold = None,
    swap: Annotated[
        list[str] | None, typer.Option("--swap", help='Words to exchange, such as "women=men"; repeat.')
    ] = None,
    max_gap: Annotated[
        float | None, typer.Option("--max-gap", help="Exit with 3 if false alarms of groups differ by more.")
    ] = None,
    on_error: OnError = "raise",
    out: cli.Out = None,
    limit: cli.Limit = None,
    batch_size: cli.BatchSize = 32,
    json: cli.Json = False,
) -> None:
    """Error rates by group, swapped words, order of the statements, and same words over another picture.

    Example: meme-debate audit memes.jsonl --debates debates.jsonl --judge judge --swap women=men
    """
    from meme_debate.audit import audit as audited
    from meme_debate.detect import load_judge

    pairs: list[tuple[str, str]] = []
    for text in swap or []:
        left, equals, right = text.partition("=")
        if not equals:
            raise ConfigError(f"--swap is {text!r}, wanted two words such as women=men")
        pairs.append((left.strip(), right.strip()))
    rows, said = _read(memes, debates, on_error, limit)
    report = audited(rows, said, load_judge(judge), threshold=threshold, swaps=pairs, batch_size=batch_size)
    cli.emit(report, json, out)
    if report.question:
        _say(f"warning: {report.question}")
    if max_gap is not None and report.gap > max_gap:
        _say(f"the gap of false alarms is {report.gap:.3f}, more than {max_gap}")
        raise typer.Exit(3)

"""The commands about memes: detect, convert, audit."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_core import cli
from fusion_core.errors import ConfigError
from meme_debate.cli_inputs import Debates, JudgeFolder, OnError, Threshold, finish, looks, read, say


def add_commands(app: typer.Typer) -> None:
    """Give the command line ``detect``, ``convert``, ``audit`` and ``demo``."""
    from fusion_core.demo import add_demo

    app.command("detect")(detect)
    app.command("convert")(convert)
    app.command("audit")(audit)
    add_demo(
        app,
        "meme-debate",
        "Stand-in memes over photographs of scikit-image, a scripted debater behind a local server, and "
        "every judge in one table.",
        "Five seeds, all fusions, unseen photographs; within five minutes.",
    )


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
    on_error: OnError = "skip",
    out: cli.Out = None,
    limit: cli.Limit = None,
    batch_size: cli.BatchSize = 32,
    device: cli.Device = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Decide on memes: cards.jsonl and a page of cards in --out, or a table on the screen.

    Example: meme-debate detect memes.jsonl --debates debates.jsonl --judge judge --out results
    """
    from fusion_core.progress import track
    from meme_debate.cards import card_report
    from meme_debate.detection import detect as decided
    from meme_debate.detection import load_judge

    if report is not None and (out is None or Path(report).name != report or Path(report).suffix != ".html"):
        raise ConfigError(f"--report is {report!r}, wanted the name of an .html file inside --out")
    found = load_judge(judge, device)
    rows, said, left_out = read(memes, debates, on_error, limit, pictures=looks(found))
    made = decided(rows, said, found, threshold=threshold, words=words, batch_size=batch_size)
    cards = list(track(made, "judging", total=len(rows), enabled=False if quiet else None))
    page = card_report(cards)
    if out is not None:
        page.save(out)
        if report is not None and report != "report.html":
            (out / "report.html").replace(out / report)
        say(f"{len(cards)} cards in {out}")
    if json:
        cli.emit({"cards": [card.to_dict() for card in cards]}, True)
    elif out is not None:
        page.print()
    else:
        cli.emit([_short(card) for card in cards], False)
    finish("detect", memes, out, left_out, whole=limit is None)


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
    """Write a published data set as memes.jsonl, its counts beside it as .report.json; nothing is downloaded.

    Pictures that are missing are listed, the other memes written, and the exit code is 2.

    Example: meme-debate convert harmc HarMeme --out memes.jsonl
    """
    from meme_debate.datasets import convert as converted

    labels = None if positive is None else positive.split(",")
    report = converted(name, folder, out, positive=labels, drop=drop_duplicates)
    report.save(out.with_suffix(".report.json"))
    if json:
        cli.emit(report, True)
    else:
        rows = [
            {"split": split, "label": label, "memes": count}
            for split, counts in report.splits.items()
            for label, count in sorted(counts.items())
        ]
        cli.emit(rows, False)
        version = f" ({report.version})" if report.version else ""
        say(f"{report.memes} memes of {name}{version} in {out}; positive: {', '.join(report.positive)}")
    if line := report.duplicates.warning():
        say(f"warning: {line}; {len(report.dropped)} dropped")
    finish("convert", folder, out, [(image, "it is not there") for image in report.missing])


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
    device: cli.Device = "auto",
    json: cli.Json = False,
) -> None:
    """Error rates by group, swapped words, order of the statements, and same words over another picture.

    Example: meme-debate audit memes.jsonl --debates debates.jsonl --judge judge --swap women=men
    """
    from meme_debate.auditing import audit as audited
    from meme_debate.detection import load_judge

    pairs: list[tuple[str, str]] = []
    for text in swap or []:
        left, equals, right = text.partition("=")
        if not equals:
            raise ConfigError(f"--swap is {text!r}, wanted two words such as women=men")
        pairs.append((left.strip(), right.strip()))
    found = load_judge(judge, device)
    rows, said, left_out = read(memes, debates, on_error, limit, pictures=looks(found))
    report = audited(rows, said, found, threshold=threshold, swaps=pairs, batch_size=batch_size)
    cli.emit(report, json, out)
    if report.question:
        say(f"warning: {report.question}")
    finish("audit", memes, out, left_out, whole=limit is None)
    if max_gap is not None and report.gap > max_gap:
        say(f"the gap of false alarms is {report.gap:.3f}, more than {max_gap}")
        raise typer.Exit(3)

"""The command line of meme-debate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fusion_core import cli
from fusion_core.errors import ConfigError, InputError
from meme_debate import __version__, cli_judge, cli_memes
from meme_debate.cli_inputs import OnError, finish, read_memes

if TYPE_CHECKING:
    from meme_debate.debate import Debater, DebateReport

app = cli.new_app("meme-debate", "Harmful memes detected with reasons: a debate, and a judge.", __version__)

Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="Server with the chat-completions schema, openai:MODEL or transformers:MODEL."
    ),
]
Model = Annotated[str, typer.Option("--model", help="The model's name on the server.")]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="TOML or JSON: name, definition, positive, negative.")
]
Cache = Annotated[Path | None, typer.Option("--cache", help="SQLite file of replies.")]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="Memes at once.")]
KeyVariable = Annotated[
    str | None,
    typer.Option("--key-variable", help="Environment variable with the key; MEME_DEBATE_API_KEY by default."),
]


def _debater(url: str, model: str, policy: Path | None, cache: Path | None, **options: Any) -> Debater:
    from meme_debate.debate import Debater
    from meme_debate.policy import Policy

    chosen = None if policy is None else Policy.load(policy)
    backend = {name: value for name, value in options.pop("backend", {}).items() if value is not None}
    return Debater(url, model, policy=chosen, cache=cache, **backend, **options)


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        prompt, completion = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"--price is {text!r}, wanted two numbers such as 0.15,0.60 (prompt, completion)"
        ) from None
    return prompt, completion


@app.command()
def debate(
    memes: Annotated[Path, typer.Argument(help="memes.jsonl: id, image, text, caption.")],
    url: Url = None,
    model: Model = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the debates.")] = Path("debates.jsonl"),
    policy: PolicyFile = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="1: statements; more: answers too.")] = 1,
    verdict: Annotated[
        bool, typer.Option("--verdict/--no-verdict", help="Ask which side is better supported.")
    ] = True,
    swap: Annotated[bool, typer.Option("--swap/--no-swap", help="Ask in both orders.")] = True,
    verdict_model: Annotated[
        str | None, typer.Option("--verdict-model", help="Another model for the verdict.")
    ] = None,
    stances: Annotated[
        str, typer.Option("--stances", help="serial: the prefix is reused; parallel: sooner done.")
    ] = "serial",
    on_label: Annotated[
        str, typer.Option("--on-label", help="A statement that names a label: keep, mask or retry.")
    ] = "keep",
    structured: Annotated[
        bool, typer.Option("--structured", help="Ask for the verdict by JSON schema.")
    ] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    seed: cli.Seed = 0,
    concurrency: Concurrency = 16,
    rate: Annotated[float | None, typer.Option("--rate", help="Most requests a second.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds of one try.")] = 120.0,
    retries: Annotated[int, typer.Option("--retries", min=0, help="After the first try.")] = 5,
    key_variable: KeyVariable = None,
    max_side: Annotated[
        int, typer.Option("--max-side", min=16, help="Pictures are made no larger than this.")
    ] = 1568,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="SQLite file of replies; beside --out by default.")
    ] = None,
    price: Annotated[
        str | None, typer.Option("--price", help="Of a million prompt,completion tokens: 0.15,0.60.")
    ] = None,
    on_refusal: Annotated[
        str, typer.Option("--on-refusal", help="A side that was refused twice: empty, or keep the refusal.")
    ] = "empty",
    examples: Annotated[
        Path | None, typer.Option("--examples", help="Decided memes to show where they are similar (.jsonl).")
    ] = None,
    neighbors: Annotated[int, typer.Option("--neighbors", min=1, help="So many of --examples a meme.")] = 3,
    on_error: OnError = "skip",
    device: cli.Device = "auto",
    limit: cli.Limit = None,
    shard: cli.Shard = None,
    resume: cli.Resume = False,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Let a vision language model argue both sides of each meme; a stopped run continues by its cache.

    Example: meme-debate debate memes.jsonl --url http://localhost:8000/v1 --model qwen --out debates.jsonl
    """
    from fusion_core.store import take_shard
    from meme_debate.meme import load_memes, save_debates
    from meme_debate.neighbors import Neighbors

    if url is None:
        raise InputError(
            "--url is missing; name a server such as http://localhost:8000/v1, or openai:MODEL, or "
            "transformers:MODEL"
        )
    if out.exists() and not (resume or overwrite):
        raise InputError(f"{out} is there already; pass --resume to complete it or --overwrite to replace it")
    found, left_out = read_memes(memes, on_error, limit)
    if shard is not None:
        mine = set(take_shard([meme.id for meme in found], shard))
        found = [meme for meme in found if meme.id in mine]
    kind = url.partition(":")[0].replace("https", "http")
    options: dict[str, Any] = {"timeout": timeout, "retries": retries}
    if kind == "http":
        options |= {"rate": rate, "key_variable": key_variable}
    elif kind == "transformers":
        options = {"device": device}
    near = None if examples is None else Neighbors(load_memes(examples), neighbors)
    debater = _debater(
        url, model, policy, cache or out.with_suffix(".sqlite"), rounds=rounds, verdict=verdict, swap=swap,
        verdict_model=verdict_model, stances=stances, on_label=on_label, on_refusal=on_refusal,
        structured=structured, neighbors=near,
        temperature=temperature, seed=seed, max_side=max_side, price=_price(price),
        backend=options if kind in ("http", "openai", "transformers") else {},
    )  # fmt: skip
    debates = debater.run(
        found, concurrency, on_error=cast("Any", on_error), progress=False if quiet else None
    )
    save_debates(out, debates)
    _told(debates.report, json)
    finish("debate", memes, out, [*left_out, *debates.report.failed], whole=limit is None and shard is None)


def _told(report: DebateReport, json: bool) -> None:
    if json:
        cli.emit(report, True)
    else:
        shown = {"memes": report.memes, "calls": report.calls, "from the cache": report.cached}
        shown |= {
            "prompt tokens": report.prompt_tokens,
            "of them in the server's cache": report.prefix_tokens,
        }
        shown |= {"completion tokens": report.completion_tokens}
        rows: dict[str, Any] = shown | ({} if report.cost is None else {"cost": f"{report.cost:.4f}"})
        rows |= {f"verdict {name}": count for name, count in report.verdicts.items()}
        rows |= {f"flag {name}": count for name, count in report.flags.items()}
        cli.emit({**rows, "seconds": round(report.seconds, 1)}, False)


@app.command()
def serve(
    judge: Annotated[Path, typer.Option("--judge", help="Folder that `judge train` wrote.")],
    url: Url = None,
    model: Model = "",
    policy: PolicyFile = None,
    cache: Cache = None,
    key_variable: KeyVariable = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="Harmful from this score on; the judge's own by default."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="127.0.0.1 is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="Requests at once, else 503.")
    ] = 64,
    max_memes: Annotated[int, typer.Option("--max-memes", min=1, help="Of one request.")] = 32,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Bytes of one request.")] = 8 << 20,
    device: cli.Device = "auto",
) -> None:
    """Cards over HTTP: POST /v1/detect with {"memes": [{"id", "text", "image": base64}]}; /healthz, /metrics.

    Without --url memes are judged by words and picture alone, unless the request brings the debate.

    Example: meme-debate serve --judge judge --port 8000
    """
    from fusion_core.serve import serve as run_server
    from meme_debate.detection import load_judge
    from meme_debate.server import Detector, create_app

    options: dict[str, Any] = {"backend": {"key_variable": key_variable}}
    debater = None if url is None else _debater(url, model, policy, cache, **options)
    detector = Detector(load_judge(judge, device), debater, threshold, max_memes, concurrency)
    run_server(create_app(detector, max_body), host, port, concurrency)


@app.command()
def bench(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the JSON document.")] = None,
    memes: Annotated[
        Path | None, typer.Option("--memes", help="Count shared prompt tokens over these memes.")
    ] = None,
    debates: Annotated[Path | None, typer.Option("--debates", help="Debates about them.")] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Training at the size of Flan-T5-base too; some minutes.")
    ] = False,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Pairs per row.")] = 5,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Time the client against a local stub, and judges against the authors' scheme; a few minutes.

    Example: meme-debate bench --out bench.json
    """
    from meme_debate.bench import run

    cli.emit(run(repeats=repeats, base=base, memes=memes, recorded=debates, quiet=quiet), json, out)


cli_judge.add_commands(app)
cli_memes.add_commands(app)


def main() -> None:
    """The console script."""
    cli.run(app)

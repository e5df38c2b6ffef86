"""The command line of logit-fusion."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_core import cli
from fusion_core.bench import add_bench
from fusion_core.demo import add_demo
from fusion_core.errors import InputError, check_text, naming
from logit_fusion import __version__
from logit_fusion import options as common

app = cli.new_app("logit-fusion", "Small experts steer a large language model while it decodes.", __version__)

Texts = Annotated[
    Path, typer.Argument(help="A text a line (.txt), or JSON Lines with text, or prompt and answer.")
]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=2, help="Most tokens of a text.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw among the likeliest tokens of this mass.")]


def _sampling(temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    if temperature == 0.0:
        return {"do_sample": False}
    import torch

    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    found = [check_text("a prompt", prompt) for prompt in prompts or []]
    if file is not None:
        found += [text if isinstance(text, str) else text[0] for text in common.read_texts_file(file)]
    if not found:
        raise InputError("there is no prompt; give one, or --file")
    return found


@app.command()
def generate(
    large: common.Large,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts.")] = None,
    base: common.Base = None,
    expert: common.Experts = None,
    file: Annotated[Path | None, typer.Option("--file", help="A prompt a line, or JSON Lines.")] = None,
    max_new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    num_beams: Annotated[int, typer.Option("--num-beams", min=1, help="Beams.")] = 1,
    gamma: Annotated[
        int, typer.Option("--gamma", min=0, help="Draft so many tokens by an expert (lossless); 0: none.")
    ] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End an answer at this text.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Write what was done at every token: .jsonl, .npz or .html."),
    ] = None,
    strategy: common.Strategy = None,
    weights: common.Weights = None,
    solver: common.Solver = None,
    alpha: common.Alpha = None,
    preset: common.Preset = None,
    set_: cli.Settings = None,
    device: common.Devices = None,
    dtype: cli.DType = "auto",
    seed: cli.Seed = 0,
    json: cli.Json = False,
) -> None:
    """Continue prompts.

    Example: logit-fusion generate "2+3=" --large llama-13b --base llama-7b --expert math=llama-7b-gsm8k
    """
    texts, stop = _prompts(prompts, file), [check_text("--stop", text) for text in stop or []]
    if trace is not None and gamma:
        raise InputError("--trace is not written by --gamma; leave one out")
    if trace is not None and trace.suffix not in (".jsonl", ".npz", ".html"):
        raise InputError(f"--trace is {trace}, wanted .jsonl, .npz or .html")
    fused = common.load(
        large, base, expert, preset=preset, devices=device, dtype=dtype, strategy=strategy, weights=weights,
        solver=solver, alpha=alpha, assignments=set_,
    )  # fmt: skip
    batch = _encoded(fused, texts)
    with naming(file):
        if gamma:
            ids = fused.speculative_generate(
                batch["input_ids"], batch.get("attention_mask"), gamma=gamma, max_new_tokens=max_new_tokens,
                do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p,
                stop_strings=stop or None, seed=seed,
            )  # fmt: skip
        else:
            more: dict[str, Any] = {"stop_strings": stop, "tokenizer": fused.tokenizer} if stop else {}
            out = fused.generate(
                **batch, max_new_tokens=max_new_tokens, num_beams=num_beams, trace=trace is not None,
                **_sampling(temperature, top_p, seed), **more,
            )  # fmt: skip
            ids = out if trace is None else out.sequences
            if trace is not None:
                out.trace.save(trace)
    start = batch["input_ids"].shape[1]
    answers = fused.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    if json:
        cli.emit([{"prompt": p, "answer": a} for p, a in zip(texts, answers, strict=True)], json)
        return
    for prompt, answer in zip(texts, answers, strict=True):
        typer.echo(f"{prompt}{answer}")


def _encoded(fused: Any, texts: list[str]) -> dict[str, Any]:
    if fused.tokenizer is None:
        raise InputError("the large model's folder has no tokenizer")
    if fused.tokenizer.pad_token_id is None:
        fused.tokenizer.pad_token = fused.tokenizer.eos_token
    batch = fused.tokenizer(texts, return_tensors="pt", padding=True)
    return {name: batch[name].to(fused.device) for name in ("input_ids", "attention_mask") if name in batch}


@app.command()
def chat(
    large: common.Large,
    base: common.Base = None,
    expert: common.Experts = None,
    max_new_tokens: NewTokens = 500,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    system: Annotated[str | None, typer.Option("--system", help="What the assistant is told first.")] = None,
    strategy: common.Strategy = None,
    weights: common.Weights = None,
    solver: common.Solver = None,
    alpha: common.Alpha = None,
    preset: common.Preset = None,
    set_: cli.Settings = None,
    device: common.Devices = None,
    dtype: cli.DType = "auto",
    seed: cli.Seed = 0,
) -> None:
    """Talk to a fusion; an empty line or the end of input leaves.

    Example: logit-fusion chat --large llama-13b --base llama-7b --expert chat=llama-7b-chat
    """
    system = None if system is None else check_text("--system", system)
    fused = common.load(
        large, base, expert, preset=preset, devices=device, dtype=dtype, strategy=strategy, weights=weights,
        solver=solver, alpha=alpha, assignments=set_,
    )  # fmt: skip
    from logit_fusion.chatting import converse

    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a terminal or a pipe in another encoding
    converse(fused, sys.stdin, max_new_tokens, system, _sampling(temperature, top_p, seed))


@app.command()
def score(
    texts: Texts,
    large: common.Large,
    base: common.Base = None,
    expert: common.Experts = None,
    strategy: common.Strategy = None,
    weights: common.Weights = None,
    solver: common.Solver = None,
    alpha: common.Alpha = None,
    preset: common.Preset = None,
    set_: cli.Settings = None,
    batch_size: cli.BatchSize = 8,
    max_length: MaxLength = None,
    limit: cli.Limit = None,
    device: common.Devices = None,
    dtype: cli.DType = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Log-likelihood of texts under a fusion.

    Example: logit-fusion score texts.jsonl --large llama-13b --base llama-7b --expert math=llama-7b-gsm8k
    """
    wanted = common.read_texts_file(texts, limit)
    fused = common.load(
        large, base, expert, preset=preset, devices=device, dtype=dtype, strategy=strategy, weights=weights,
        solver=solver, alpha=alpha, assignments=set_,
    )  # fmt: skip
    with naming(texts):
        found = fused.score(
            wanted, batch_size=batch_size, max_length=max_length, progress=False if quiet else None
        )
    cli.emit(
        {
            "texts": len(found.nll),
            "tokens": len(found.text),
            "nll": found.mean_nll,
            "perplexity": found.perplexity,
            "top1": found.top1,
            **({"nll_per_text": found.nll} if json else {}),
        },
        json,
    )


@app.command()
def calibrate(
    texts: Texts,
    large: common.Large,
    base: common.Base = None,
    expert: common.Experts = None,
    out: cli.Out = None,
    target: Annotated[
        str | None, typer.Option("--target", help="The member that gaps are measured to.")
    ] = None,
    batch_size: cli.BatchSize = 8,
    max_length: MaxLength = None,
    limit: cli.Limit = None,
    set_: cli.Settings = None,
    device: common.Devices = None,
    dtype: cli.DType = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Does fusion help on your texts? Members, static strengths and strategies side by side.

    Example: logit-fusion calibrate texts.jsonl --large llama-13b --base llama-7b --expert math=llama-7b-gsm8k
    """
    wanted = common.read_texts_file(texts, limit)
    fused = common.load(large, base, expert, devices=device, dtype=dtype, assignments=set_)
    with naming(texts):
        found = fused.calibrate(
            wanted,
            target=target,
            batch_size=batch_size,
            max_length=max_length,
            progress=False if quiet else None,
        )
    cli.emit(found, json, out)


@app.command()
def sweep(
    texts: Texts,
    large: common.Large,
    base: common.Base = None,
    expert: common.Experts = None,
    alphas: Annotated[str, typer.Option("--alphas", help="Static strengths.")] = "0,0.5,1,1.5,2",
    out: cli.Out = None,
    batch_size: cli.BatchSize = 8,
    max_length: MaxLength = None,
    limit: cli.Limit = None,
    set_: cli.Settings = None,
    device: common.Devices = None,
    dtype: cli.DType = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Static strengths side by side with the dynamic one.

    Example: logit-fusion sweep texts.txt --large llama-13b --base llama-7b --expert math=llama-7b-gsm8k
    """
    try:
        strengths = [float(part) for part in alphas.split(",")]
    except ValueError:
        raise InputError(f"--alphas is {alphas!r}, wanted numbers such as 0,0.5,1") from None
    wanted = common.read_texts_file(texts, limit)
    fused = common.load(large, base, expert, devices=device, dtype=dtype, assignments=set_)
    with naming(texts):
        found = fused.sweep(
            wanted, strengths, batch_size=batch_size, max_length=max_length, progress=False if quiet else None
        )
    cli.emit(found, json, out)


@app.command()
def trace(
    path: Annotated[Path, typer.Argument(help="A trace: .jsonl or .npz.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write it as .html, .jsonl or .npz instead of showing it."),
    ] = None,
    json: cli.Json = False,
) -> None:
    """Show what a fusion did at every token, or write it as a page.

    Example: logit-fusion trace run.jsonl --out run.html
    """
    from logit_fusion.trace import FusionTrace

    found = FusionTrace.load(path)
    if out is not None:
        found.save(out)
    elif json:
        cli.emit(found, json)
    else:
        found.show()


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Folder of the small base.")],
    experts: Annotated[list[str], typer.Argument(help="Folders of its fine-tunes.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the merged expert.")],
    lam: Annotated[
        str, typer.Option("--lambda", help="Scale of the task vectors: 0.3, or one for each.")
    ] = "0.3",
    shard_gb: cli.ShardGb = 5.0,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Merge experts into one by task arithmetic, so that a fusion needs three members only.

    Example: logit-fusion merge llama-7b llama-7b-gsm8k llama-7b-chat --lambda 0.3 --out merged
    """
    from logit_fusion.task_vectors import merge_task_vectors

    try:
        scales = [float(part) for part in lam.split(",")]
    except ValueError:
        raise InputError(f"--lambda is {lam!r}, wanted a number such as 0.3") from None
    merge_task_vectors(
        base, experts, scales[0] if len(scales) == 1 else scales, out=out, shard_bytes=int(shard_gb * 1e9),
        progress=False if quiet else None,
    )  # fmt: skip
    cli.emit({"out": str(out)}, json)


@app.command()
def check(
    large: common.Large,
    base: common.Base = None,
    expert: common.Experts = None,
    align: Annotated[
        str, typer.Option("--align", help="id, or string: match tokens by their strings.")
    ] = "id",
    json: cli.Json = False,
) -> None:
    """Do the members share a vocabulary and a family? Reads tokenizers and configurations only.

    Example: logit-fusion check --large llama-13b --base llama-7b --expert math=llama-7b-gsm8k
    """
    from logit_fusion.checking import check_members

    cli.emit(check_members(*common.members(large, base, expert), align=align), json)


add_demo(
    app,
    "logit-fusion",
    "A tiny large model is steered by three tiny experts; nothing is downloaded.",
    "Train the tiny models anew first (minutes).",
)


add_bench(
    app,
    "logit-fusion",
    "Time the solvers and whole generation against plain ones.",
    hidden=(Annotated[int, typer.Option("--hidden", min=64, help="Width of the members.")], 1024),
    layers=(Annotated[int, typer.Option("--layers", min=1, help="Of each member.")], 8),
    members=(
        Annotated[bool, typer.Option("--members/--no-members", help="Whole generation too, about 3 GB.")],
        True,
    ),
)


def main() -> None:
    """The console script."""
    cli.run(app)

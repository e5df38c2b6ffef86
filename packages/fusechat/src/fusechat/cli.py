"""The command line of fusechat."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusechat import __version__
from fusion_core import cli
from fusion_core.atomic import atomic_directory, occupied
from fusion_core.bench import add_bench
from fusion_core.checkpoint import check_config
from fusion_core.demo import add_demo
from fusion_core.errors import CheckpointError, DataError, InputError, reading

app = cli.new_app("fusechat", "Fuse chat models of any tokenizer into one, then merge.", __version__)

Pivot = Annotated[
    str, typer.Option("--pivot", help="The pivot: name or folder of a model and its tokenizer.")
]
Stores = Annotated[list[Path], typer.Option("--store", help="A source's store; once for each source.")]


def _dialogues(path: Path) -> list[Any]:
    """Dialogues of a JSON Lines or JSON file, or one text a line."""
    from fusechat.texts import messages_of

    with reading(path, "cannot be read as dialogues", DataError):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            found = [json_module.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            found = json_module.loads(text)
        else:
            found = [line for line in text.splitlines() if line.strip()]
        if not isinstance(found, list) or not found:
            raise DataError(f"{path} holds no list of dialogues")
        for number, dialogue in enumerate(found, 1):
            with reading(f"{path}, dialogue {number}"):
                messages_of(dialogue)
    return found


def _tokenizer(name: str) -> Any:
    from fusechat.spans import load_tokenizer

    return load_tokenizer(name)


@app.command()
def collect(
    model: Annotated[str, typer.Option("--model", "-m", help="The source: name or folder.")],
    data: Annotated[
        Path, typer.Option("--data", "-d", help=".jsonl or .json of dialogues, or .txt with one text a line.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the store.")],
    pivot: Annotated[
        str | None, typer.Option("--pivot", help="Whose chat template renders the dialogues.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Entries to keep per token.")] = 10,
    max_length: cli.MaxLength = 2048,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", min=1, help="Most tokens of a forward pass.")
    ] = 8192,
    limit: cli.Limit = None,
    device: cli.Device = "auto",
    dtype: cli.DType = "auto",
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Store a source's top-k distributions on dialogues; an interrupted run goes on where it stopped.

    Example: fusechat collect --model sourceA --data dialogues.jsonl --pivot pivot --out stores/a
    """
    from fusechat.collecting import collect as run

    store = run(
        model,
        _dialogues(data)[:limit],
        out=out,
        k=k,
        pivot_tokenizer=None if pivot is None else _tokenizer(pivot),
        max_length=max_length,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        progress=False if quiet else None,
    )
    cli.emit({"rows": len(store), "out": str(out), **store.fingerprint}, json)


@app.command()
def align(
    store: Annotated[Path, typer.Argument(help="A source's store.")],
    pivot: Pivot,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="The source's tokenizer; by default its model's.")
    ] = None,
    vocab: Annotated[str, typer.Option("--vocab", help="ms, ms-official, em, mined or prefix.")] = "ms",
    out: cli.Out = None,
    json: cli.Json = False,
) -> None:
    """How well a source's tokens align with a pivot's: coverage and kept mass, before any GPU hour.

    Example: fusechat align stores/a --pivot pivot --out page
    """
    from fusechat.align import inspect
    from fusechat.store import TopKStore

    source = None if tokenizer is None else _tokenizer(tokenizer)
    found = inspect(TopKStore(store), _tokenizer(pivot), source_tokenizer=source, vocab=vocab)
    cli.emit(found, json, out)


@app.command()
def train(
    pivot: Pivot,
    store: Stores,
    data: Annotated[Path, typer.Option("--data", "-d", help="The dialogues that the stores hold.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the trained model.")],
    weight: Annotated[float | None, typer.Option("--weight", help="Share of the fusion term; 0.1.")] = None,
    lam: Annotated[float | None, typer.Option("--lambda", help="The papers' lambda: 1 - weight.")] = None,
    divergence: Annotated[str, typer.Option("--divergence", help="ce, kl, rkl or jsd.")] = "ce",
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 3.0,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 5e-6,
    batch_size: cli.BatchSize = 4,
    max_length: cli.MaxLength = 2048,
    seed: cli.Seed = 0,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Fine-tune the pivot towards a source's distributions (needs the extra train).

    Example: fusechat train --pivot pivot --store stores/a --data dialogues.jsonl --lambda 0.9 --out target-a
    """
    from fusion_core.errors import ConfigError, require_extra

    if weight is not None and lam is not None:
        raise ConfigError("--weight and --lambda say the same; give one")
    share = weight if weight is not None else (0.1 if lam is None else 1 - lam)
    require_extra("accelerate", "train", "fusechat")
    import torch
    from transformers import AutoModelForCausalLM, TrainingArguments

    from fusechat.objective import FusionLoss
    from fusechat.trainer import FusionTrainer

    objective = FusionLoss(weight=share, divergence=divergence)  # pyright: ignore[reportArgumentType]
    if occupied(out):
        raise InputError(f"--out {out} is not empty; name another folder")
    tokenizer, dialogues = _tokenizer(pivot), _dialogues(data)
    with reading(pivot, "cannot be loaded"):
        check_config(pivot)
        model = AutoModelForCausalLM.from_pretrained(pivot)
        if getattr(model.config, "attention_dropout", 0.0) is None:  # which only training asks for
            raise CheckpointError("config.json has no attention_dropout, wanted 0 to 1")
    with atomic_directory(out) as place:
        settings = TrainingArguments(
            output_dir=str(place),
            num_train_epochs=epochs,
            learning_rate=lr,
            per_device_train_batch_size=batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            seed=seed,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=quiet,
        )
        trainer = FusionTrainer(
            model,
            settings,
            dialogues,
            store,
            processing_class=tokenizer,
            fusion_loss=objective,
            collator_options={"max_length": max_length},
        )
        trainer.train()
        trainer.save_model(str(place))
    cli.emit({"out": str(out)}, json)


@app.command()
def merge(
    targets: Annotated[list[str] | None, typer.Argument(help="Folders or files to merge.")] = None,
    method: Annotated[
        Literal["sce", "varm", "linear", "ta", "ties", "dare", "slerp"],
        typer.Option("--method", help="The rule."),
    ] = "sce",
    base: Annotated[str | None, typer.Option("--base", help="The pivot.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the merged model.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A mergekit recipe instead (extra recipe).")
    ] = None,
    tau: Annotated[float, typer.Option("--tau", help="SCE: kept share of the elements that vary.")] = 0.1,
    variant: Annotated[str, typer.Option("--variant", help="SCE: paper, fusechat or mergekit.")] = "paper",
    level: Annotated[
        str, typer.Option("--level", help="VaRM: matrix, module, layer, model or element.")
    ] = "matrix",
    density: Annotated[float, typer.Option("--density", help="TIES, DARE: kept share.")] = 0.6,
    weights: Annotated[str | None, typer.Option("--weights", help="Comma-separated, one per target.")] = None,
    lam: Annotated[float, typer.Option("--lambda", help="Scale of task vectors.")] = 1.0,
    t: Annotated[float, typer.Option("--t", help="SLERP: share of the second.")] = 0.5,
    embeddings: Annotated[
        str, typer.Option("--embeddings", help="error, or common: merge common rows only.")
    ] = "error",
    shard_gb: cli.ShardGb = 5.0,
    num_workers: cli.NumWorkers = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost; read no tensor.")
    ] = False,
    dtype: cli.DType = "auto",
    seed: cli.Seed = 0,
    overwrite: cli.Overwrite = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
) -> None:
    """Merge checkpoints of one architecture, streamed; an interrupted run goes on where it stopped.

    Example: fusechat merge target-a target-b --method sce --base pivot --out merged
    """
    from fusechat import merge as rules
    from fusion_core.device import resolve_dtype

    common: dict[str, Any] = {"embeddings": embeddings}
    numbers = None
    if weights is not None:
        try:
            numbers = [float(part) for part in weights.split(",")]
        except ValueError:
            raise InputError(f"--weights is {weights!r}, wanted numbers such as 0.5,0.5") from None
    names = list(targets or [])
    if recipe is not None:
        plan = rules.from_recipe(recipe, **common)
    elif method == "linear":
        plan = rules.linear(names, base=base, weights=numbers, **common)
    elif method == "slerp":
        plan = rules.slerp(names, base=base, t=t, **common)
    elif method == "sce":
        plan = rules.sce(names, base=base, tau=tau, variant=variant, **common)  # pyright: ignore[reportArgumentType]
    elif method == "varm":
        plan = rules.varm(names, base=base, level=level, **common)  # pyright: ignore[reportArgumentType]
    elif method == "ta":
        plan = rules.task_arithmetic(names, base=base, weights=numbers, lam=lam, **common)
    elif method == "ties":
        plan = rules.ties(names, base=base, density=density, weights=numbers, lam=lam, **common)
    else:
        plan = rules.dare(names, base=base, density=density, weights=numbers, lam=lam, seed=seed, **common)
    kind = None if dtype == "auto" else resolve_dtype(dtype)
    size = int(shard_gb * 1e9)
    if dry_run:
        cli.emit(plan.dry_run(dtype=kind, shard_bytes=size, num_workers=num_workers), json)
        return
    if out is None:
        raise InputError("--out is missing: the folder of the merged model")
    plan.save(
        out,
        dtype=kind,
        shard_bytes=size,
        num_workers=num_workers,
        overwrite=overwrite,
        progress=False if quiet else None,
    )
    cli.emit({"out": str(out)}, json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A store, or a merged folder.")],
    json: cli.Json = False,
) -> None:
    """What a store or a merge holds and what it was made from.

    Example: fusechat inspect stores/a
    """
    from fusechat.store import TopKStore

    card = path / "merge.json"
    if card.is_file():
        with reading(card, "is damaged", CheckpointError):
            found = json_module.loads(card.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise CheckpointError(f"it holds a {type(found).__name__}, wanted facts by name")
        cli.emit(found, json)
        return
    store = TopKStore(path)
    cli.emit({"rows": len(store), "vocabulary": store.vocab_size, **store.fingerprint}, json)


add_demo(
    app,
    "fusechat",
    "A tiny pivot learns from two sources with other tokenizers; nothing is downloaded.",
    "Five seeds instead of two, and longer tuning (minutes).",
)


add_bench(
    app,
    "fusechat",
    "Time alignment against a plain program, and measure the memory of the loss.\n\n"
    "With --merging a 2 GB merge is compared with mergekit's, which gets an environment of its own by uv.",
    tokens=(Annotated[int, typer.Option("--tokens", min=16, help="Of the aligned pair.")], 1024),
    merging=(
        Annotated[
            Path | None,
            typer.Option("--merging", help="Folder with 4 GB of room: compare merging with mergekit too."),
        ],
        None,
    ),
    memory=(cli.Memory, True),
)


def main() -> None:
    """The console script."""
    cli.run(app)

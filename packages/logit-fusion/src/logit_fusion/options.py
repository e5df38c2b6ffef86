"""What several verbs of the command line share: which members, which settings, which texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_core.errors import DataError, InputError, check_text, naming, reading
from logit_fusion.config import FusionConfig

__all__ = [
    "Alpha", "Base", "Devices", "Experts", "Large", "Preset", "Solver", "Strategy", "Weights",
    "load", "members", "read_texts_file", "settings_of",
]  # fmt: skip

Large = Annotated[
    str, typer.Option("--large", help="The large model: folder or hub name; or a folder with fusion.json.")
]
Base = Annotated[str | None, typer.Option("--base", help="The small model that the experts were tuned from.")]
Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--expert", help="name=path, name=path@adapter, or name=@adapter on the base; once for each."
    ),
]
Strategy = Annotated[str | None, typer.Option("--strategy", help="pool, centroid, single (paper) or joint.")]
Weights = Annotated[
    str | None, typer.Option("--weights", help="uniform, jeffreys, evidence, or numbers such as 0.7,0.3.")
]
Solver = Annotated[str | None, typer.Option("--solver", help="exact, grid (paper) or newton.")]
Alpha = Annotated[
    str | None, typer.Option("--alpha", help="Static strength instead of a search; 1 or 0.5,1.")
]
Preset = Annotated[
    str | None, typer.Option("--preset", help="proxy-tuning, eft, dexperts or contrastive: a static rule.")
]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="A device for all, or name=cuda:0 for one member; name=auto spreads it."),
]


def _numbers(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} is {text!r}, wanted numbers such as 0.7,0.3") from None


def settings_of(
    start: FusionConfig,
    *,
    strategy: str | None = None,
    weights: str | None = None,
    solver: str | None = None,
    alpha: str | None = None,
    assignments: list[str] | None = None,
) -> FusionConfig:
    """Settings with the options of a command line.

    Args:
        start: what they change.
        strategy: see the options.
        weights: see the options.
        solver: see the options.
        alpha: see the options.
        assignments: of ``--set``.

    Raises:
        InputError: no numbers.
        ConfigError: an unknown setting, or a value outside its range.
    """
    changes: dict[str, Any] = {}
    if strategy is not None:
        changes["strategy"] = strategy
    if solver is not None:
        changes["solver"] = solver
    if weights is not None:
        rules = ("uniform", "jeffreys", "evidence")
        changes["weights"] = weights if weights in rules else _numbers(weights, "--weights")
    if alpha is not None:
        found = _numbers(alpha, "--alpha")
        changes["alpha"] = found[0] if len(found) == 1 else found
    made = start.replace(**changes) if changes else start
    return made.override(assignments) if assignments else made


def members(
    large: str, base: str | None, experts: list[str] | None
) -> tuple[str, str | None, dict[str, Any]]:
    """The members of a command line.

    Raises:
        InputError: an expert that is not ``name=path``, or a name twice.
    """
    from logit_fusion.member import Expert

    found: dict[str, Any] = {}
    for text in experts or []:
        name, equals, place = text.partition("=")
        source, _, adapter = place.partition("@")
        if not equals or not (source or adapter) or not name:
            raise InputError(f"--expert is {text!r}, wanted name=path or name=path@adapter")
        if name in found:
            raise InputError(f"--expert names {name!r} twice")
        found[name] = Expert(source or None, adapter=adapter or None)
    return large, base, found


def load(
    large: str,
    base: str | None,
    experts: list[str] | None,
    *,
    preset: str | None = None,
    devices: list[str] | None = None,
    dtype: str = "auto",
    **options: Any,
) -> Any:
    """The fusion that a command line names.

    Args:
        large: see the options.
        base: see the options.
        experts: see the options.
        preset: see the options.
        devices: see the options.
        dtype: of the weights.
        **options: of :func:`settings_of`.

    Raises:
        InputError: a wrong option.
        CheckpointError: a member cannot be loaded.
    """
    import os

    from transformers.utils import logging

    from logit_fusion.config import CONFIG_NAME
    from logit_fusion.model import FusedModel

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable_progress_bar()
    source, small, named = members(large, base, experts)
    start, saved = FusionConfig(), Path(large) / CONFIG_NAME
    whole = small is None and saved.is_file()  # a folder that says itself what is in it
    if whole:
        start = FusionConfig.load(saved)
    settings = settings_of(start, **options)
    device, places = "auto", dict[str, str]()
    for text in devices or []:
        name, equals, place = text.partition("=")
        if equals:
            places[name] = place
        else:
            device = text
    with naming(saved if whole else None):
        return FusedModel.from_pretrained(
            source,
            small,
            named,
            settings=settings,
            preset=preset,
            dtype=dtype,
            device=device,
            device_map=places or None,
        )


def read_texts_file(path: Path, limit: int | None = None) -> list[Any]:
    """Texts of a file: a line each (.txt), or JSON Lines with ``text``, or ``prompt`` and ``answer``.

    Args:
        path: of the file.
        limit: the first ones only.

    Raises:
        DataError: it cannot be read, or holds none.
    """
    found: list[Any] = []
    with reading(path, "cannot be read as texts", DataError):
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        for number, line in enumerate(lines, 1):
            if path.suffix != ".jsonl":
                found.append(line)
                continue
            entry = json.loads(line)
            if isinstance(entry, str):
                found.append(entry)
            elif isinstance(entry, dict) and "text" in entry:
                found.append(str(entry["text"]))
            elif isinstance(entry, dict) and {"prompt", "answer"} <= set(entry):
                found.append((str(entry["prompt"]), str(entry["answer"])))
            else:
                raise DataError(f"{path} line {number} has neither text nor prompt and answer")
            texts = found[-1] if isinstance(found[-1], tuple) else [found[-1]]
            if "" in texts:
                raise DataError(f"{path} line {number} is empty, or its prompt or answer is")
            for text in texts:
                check_text(f"{path} line {number}", text)
    if not found:
        raise DataError(f"{path} holds no texts")
    return found[:limit]

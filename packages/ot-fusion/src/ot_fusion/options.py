"""Options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ot_fusion.errors import InputError

__all__ = [
    "Alpha",
    "Data",
    "Features",
    "Legal",
    "Models",
    "Recipe",
    "Reg",
    "Solver",
    "SpecFile",
    "Strategy",
    "make_config",
    "pick_anchor",
    "read_inputs",
    "read_spec",
    "short_names",
]

Models = Annotated[list[str], typer.Argument(help="Model folders, or module:function giving a module.")]
Data = Annotated[
    str | None, typer.Option("--data", "-d", help=".npy, .npz, .safetensors, .txt, or module:function.")
]
Features = Annotated[
    Literal["acts", "wts"] | None, typer.Option("--features", help="acts (needs --data) or wts.")
]
Strategy = Annotated[
    Literal["flow", "consistent"] | None,
    typer.Option("--strategy", help="flow (the paper's) or consistent (one plan per space)."),
]
Solver = Annotated[str | None, typer.Option("--solver", help="emd, lsa, sinkhorn, sinkhorn_log, unbalanced.")]
Reg = Annotated[
    float | None, typer.Option("--reg", help="Weight of the entropy; 0.08 for acts, 0.06 for wts.")
]
Legal = Annotated[
    Literal["enforce", "warn", "off"] | None,
    typer.Option("--legal", help="What to do about maps that change the function."),
]
Alpha = Annotated[
    float | None, typer.Option("--alpha", help="Weight of the ANCHOR, in [0, 1]; 1/N by default.")
]
Recipe = Annotated[Path | None, typer.Option("--recipe", help="Settings from a .toml or .json file.")]
SpecFile = Annotated[
    Path | None, typer.Option("--spec", help="A specification file instead of the architecture's own.")
]


def make_config(recipe: Path | None, settings: list[str] | None, **options: Any) -> Any:
    """Settings from a file, from --set, and from the options that were given."""
    from ot_fusion.config import FusionConfig

    base = FusionConfig.load(recipe) if recipe is not None else FusionConfig()
    if settings:
        base = base.override(settings)
    given = {name: value for name, value in options.items() if value is not None}
    return base.replace(**given) if given else base


def read_spec(file: Path | None) -> Any:
    """The specification of --spec, if any."""
    from ot_fusion.spec.files import load_spec

    return None if file is None else load_spec(file)


def read_inputs(data: str | None, folder: str, length: int) -> Any:
    """Inputs without labels."""
    from ot_fusion.loading import load_data, split_labels

    return None if data is None else split_labels(load_data(data, tokenizer=folder, length=length))[0]


def short_names(models: list[str]) -> list[str]:
    """Short names of models by their paths."""
    short = [Path(word).name if Path(word).is_dir() else word for word in models]
    if len(set(short)) == len(short):
        return short
    return (
        list(models) if len(set(models)) == len(models) else [f"{n}:{word}" for n, word in enumerate(models)]
    )


def pick_anchor(models: list[str], names: list[str], anchor: str | None) -> str:
    """The name of the model that --anchor says, or the last."""
    if anchor is None:
        return names[-1]
    found = [
        name for name, word in zip(names, models, strict=True) if anchor in (name, word, word.rstrip("/"))
    ]
    if not found:
        raise InputError(f"--anchor is {anchor!r}, wanted one of {', '.join(models)}")
    return found[0]

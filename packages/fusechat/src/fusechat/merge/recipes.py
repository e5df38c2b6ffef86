"""mergekit's YAML recipes, for the methods of this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.merge.rules import Dare, Linear, Rule, Sce, TaskArithmetic, Ties
from fusechat.merge.spherical import Slerp
from fusechat.merge.streaming import Merge
from fusion_core.atomic import PathLike
from fusion_core.errors import ConfigError, reading, require_extra

__all__ = ["from_recipe"]

_KNOWN = {
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "chat_template",
    "name",
}


def from_recipe(recipe: PathLike | Mapping[str, Any], **options: Any) -> Merge:
    """A merge from a mergekit recipe: linear, task_arithmetic, ties, dare_linear, dare_ties, slerp, sce.

    Args:
        recipe: path of the YAML file, or its contents; models are local folders.
        **options: ``embeddings``, ``chunk``.

    Raises:
        ConfigError: another method, unknown keys, slices, or parameters of another form.
        MissingExtraError: PyYAML is not installed.
    """
    if isinstance(recipe, Mapping):
        return _plan(recipe, options)
    with reading(recipe, "is no recipe that can be merged by", ConfigError):
        return _plan(_read(recipe), options)


def _plan(found: Mapping[str, Any], options: dict[str, Any]) -> Merge:
    unknown = sorted(set(found) - _KNOWN)
    if unknown or "slices" in found:
        raise ConfigError(
            f"the recipe has {', '.join(unknown) or 'slices'}, which this package does not merge by"
        )
    models = found.get("models")
    if not isinstance(models, list) or not all(isinstance(m, Mapping) and "model" in m for m in models):
        raise ConfigError("the recipe has no list of models, each with a model")
    base = found.get("base_model")
    targets = [str(m["model"]) for m in models if str(m["model"]) != str(base)]
    own = [dict(m.get("parameters") or {}) for m in models if str(m["model"]) != str(base)]
    shared = dict(found.get("parameters") or {})
    rule = _rule(str(found.get("merge_method")), own, shared)
    if isinstance(rule, Slerp) and base is not None:
        targets = [str(base), *targets]
        base = None
    return Merge.plan(rule, targets, base, **options)


def _read(path: PathLike) -> dict[str, Any]:
    yaml = require_extra("yaml", "recipe", "fusechat")
    with reading(path, "is no YAML recipe", ConfigError):
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no recipe")
    return {str(key): value for key, value in found.items()}


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{what} is {value!r}, wanted a number (gradients are taken for slerp's t only)")
    return float(value)


def _rule(method: str, own: list[dict[str, Any]], shared: dict[str, Any]) -> Rule:
    weights = [_number(entry.get("weight", shared.get("weight", 1.0)), "weight") for entry in own]
    densities = {_number(e.get("density", shared.get("density", 1.0)), "density") for e in own} or {1.0}
    lam = _number(shared.get("lambda", 1.0), "lambda")
    if method in ("ties", "dare_linear", "dare_ties") and len(densities) > 1:
        raise ConfigError(f"the models have the densities {sorted(densities)}, wanted one for all")
    density = max(densities)
    if method == "linear":
        return Linear(weights, bool(shared.get("normalize", True)))
    if method == "task_arithmetic":
        return TaskArithmetic(weights, lam, bool(shared.get("normalize", False)))
    if method == "ties":
        return Ties(density, weights, lam, bool(shared.get("normalize", True)))
    if method in ("dare_linear", "dare_ties"):
        consensus = "linear" if method == "dare_linear" else "ties"
        normalize = bool(shared.get("normalize", consensus == "ties"))
        return Dare(
            density,
            weights,
            lam,
            normalize,
            "l1" if shared.get("rescale_norm") == "l1" else "density",
            consensus,
        )
    if method == "sce":
        return Sce(_number(shared.get("select_topk", 1.0), "select_topk"))
    if method == "slerp":
        return Slerp(_gradient(shared.get("t", 0.5)))
    raise ConfigError(
        f"merge_method is {method!r}, wanted linear, task_arithmetic, ties, dare_linear, dare_ties, slerp or "
        "sce"
    )


def _gradient(value: Any) -> Any:
    """Mergekit writes filters as a list of ``{filter, value}``; the entry without filter is the default."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return {str(entry.get("filter", "default")): entry["value"] for entry in value}
    return value

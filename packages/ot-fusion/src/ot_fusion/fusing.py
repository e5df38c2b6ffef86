"""Fusing and aligning models: the package's two verbs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.errors import FusionWarning
from ot_fusion.config import FusionConfig
from ot_fusion.consistent import consistent_pair
from ot_fusion.depth import with_layer_map
from ot_fusion.errors import InputError, ShapeError
from ot_fusion.flow import flow_pair, in_block
from ot_fusion.groups import Heads
from ot_fusion.hooks import Statistics, collect
from ot_fusion.plan import Plan
from ot_fusion.relabel import check_states
from ot_fusion.results import Aligned, Fused
from ot_fusion.spec.registry import spec_for
from ot_fusion.spec.types import AlignmentSpec

__all__ = [
    "Aligned",
    "Fused",
    "align",
    "align_states",
    "fuse",
    "mix_states",
    "resolve_weights",
    "settled",
    "spec_of",
    "state_of",
]

Models = Sequence[Any] | Mapping[str, Any]


def _named(models: Models) -> dict[str, Any]:
    pairs = (
        list(models.items()) if isinstance(models, Mapping) else [(str(i), m) for i, m in enumerate(models)]
    )
    if len(pairs) < 2:
        raise InputError(f"models has {len(pairs)} entries, wanted at least 2")
    for name, model in pairs:
        if not isinstance(model, nn.Module | Mapping):
            raise InputError(f"models[{name!r}] is {type(model).__name__}, wanted a module or a state dict")
    if len({id(model) for _, model in pairs}) < len(pairs):
        warnings.warn("the same model is given twice; it will weigh double", FusionWarning, stacklevel=3)
    return dict(pairs)


def _anchor_name(named: Mapping[str, Any], anchor: Any) -> str:
    names = list(named)
    if anchor is None:
        return names[-1]
    if isinstance(anchor, int) and not isinstance(anchor, bool) and -len(names) <= anchor < len(names):
        return names[anchor]
    if isinstance(anchor, str) and anchor in named:
        return anchor
    found = [name for name, model in named.items() if model is anchor]
    if not found:
        raise InputError(
            f"anchor is {anchor!r}, wanted one of {', '.join(names)} or an index below {len(names)}"
        )
    return found[0]


def resolve_weights(
    names: Sequence[str], anchor: str, alpha: float | None = None, weights: Any = None
) -> dict[str, float]:
    """How much each model counts.

    Args:
        names: of the models.
        anchor: the name of the anchor.
        alpha: weight of the ANCHOR, the others share the rest; None is 1 / number of models.
        weights: by name or in order, instead of ``alpha``; not negative, summing to 1.

    Raises:
        InputError: weights of other models, negative, or of another sum.

    Example:
        >>> resolve_weights(["a", "b", "c"], "c", 0.5)
        {'a': 0.25, 'b': 0.25, 'c': 0.5}
    """
    if weights is None:
        own = 1 / len(names) if alpha is None else alpha
        return {name: own if name == anchor else (1 - own) / (len(names) - 1) for name in names}
    given = dict(weights) if isinstance(weights, Mapping) else dict(zip(names, weights, strict=False))
    if set(given) != set(names) or (not isinstance(weights, Mapping) and len(weights) != len(names)):
        raise InputError(f"weights is {weights!r}, wanted one for each of {', '.join(names)}")
    if any(not value >= 0 for value in given.values()) or abs(sum(given.values()) - 1) > 1e-6:
        raise InputError(f"weights is {weights!r}, wanted numbers that are not negative and sum to 1")
    return {name: float(given[name]) for name in names}


def state_of(model: Any) -> dict[str, Tensor]:
    """A model's tensors, or the state dict that was given."""
    return dict(model.state_dict()) if isinstance(model, nn.Module) else dict(model)


def spec_of(model: Any, spec: Any, name: str) -> AlignmentSpec:
    """The given specification, the one of that name, or that of the architecture."""
    if isinstance(spec, Mapping):
        spec = spec.get(name)
    if isinstance(spec, AlignmentSpec):
        return spec
    if isinstance(model, nn.Module):
        return spec_for(model)
    raise InputError(f"models[{name!r}] is a state dict; give its spec")


def mix_states(
    anchor: Mapping[str, Tensor],
    aligned: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, float],
    anchor_name: str,
    spec: AlignmentSpec,
    config: FusionConfig,
) -> dict[str, Tensor]:
    """The weighted mean of aligned states; whatever is not fused comes from the anchor.

    Args:
        anchor: the anchor's tensors.
        aligned: by source, its tensors in the anchor's coordinates.
        weights: by model, summing to 1.
        anchor_name: which of them is the anchor's.
        spec: of the anchor.
        config: which parameters are fused; ``alpha_rule`` "official" weighs blocks half and half.
    """
    blocks = {key for op in spec.ops if in_block(op) for key in (op.weight, op.bias, *op.buffers) if key}
    tied = {key: group[0] for group in spec.tied for key in group}
    out: dict[str, Tensor] = {}
    official = config.official_side("alpha_rule")
    own = weights[anchor_name]
    for key, value in anchor.items():
        name = key if all(key in state for state in aligned.values()) else tied.get(key, key)
        if (
            not config.fuses(key)
            or not all(name in state for state in aligned.values())
            or not value.is_floating_point()
        ):
            out[key] = value.clone()
            continue
        work = torch.promote_types(value.dtype, torch.float32)
        mine = value.to(work)
        if official:
            share = 0.5 if key in blocks else own
            pairs = [(1 - share) * state[name].to(work) + share * mine for state in aligned.values()]
            mixed = torch.stack(pairs).mean(0)
        else:
            mixed = mine * own
            for source, state in aligned.items():
                mixed = mixed + weights[source] * (state[name].to(device=mine.device, dtype=work))
            if all(torch.equal(state[name].to(mine), mine) for state in aligned.values()):
                mixed = mine  # equal tensors stay as they are, to the last bit
        out[key] = mixed.to(value.dtype)
    for group in spec.tied:
        first = next((key for key in group if key in out), None)
        for key in group:
            if first is not None and key in out:
                out[key] = out[first]
    return out


def _decoder(spec: AlignmentSpec) -> bool:
    return spec.notes.get("decoder") == "yes"


def settled(config: FusionConfig | None, spec: AlignmentSpec) -> FusionConfig:
    """Legal maps by default for decoders and for the consistent strategy."""
    config = config or FusionConfig()
    if config.legal is not None:
        return config
    strict = _decoder(spec) or config.strategy == "consistent"
    heads = any(isinstance(space.group, Heads) for space in spec.spaces.values())
    return config.replace(legal="enforce" if strict and heads else "off")


def align_states(
    source: Any,
    anchor: Any,
    spec0: AlignmentSpec,
    spec1: AlignmentSpec,
    data: Any,
    config: FusionConfig,
    progress: bool | None,
    reference: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Plan], dict[str, dict[str, Any]]]:
    """Activations where they are needed, then maps and aligned tensors, by the strategy of the settings."""
    state0, state1 = state_of(source), state_of(anchor)
    check_states(spec0, state0, "the source")
    check_states(spec1, state1, "the anchor")
    stats: Statistics | None = None
    if config.features == "acts":
        if not isinstance(source, nn.Module) or not isinstance(anchor, nn.Module):
            raise InputError("features='acts' needs modules, not state dicts; use features='wts'")
        if data is None:
            raise InputError(
                "features='acts' needs data: inputs that both models take; features='wts' needs none"
            )
        keep = config.solver == "gromov"
        if reference is not None:
            from ot_fusion.reference import collect_reference

            stats = collect_reference(source, anchor, spec0, spec1, data, config, cdist=reference)
        else:
            stats = collect(source, anchor, spec0, spec1, data, config, keep=keep, progress=progress)
    if config.strategy == "consistent":
        aligned, maps, costs = consistent_pair(state0, state1, spec0, spec1, stats, config)
    else:
        found = flow_pair(state0, state1, spec0, spec1, stats, config)
        aligned, maps, costs = found.aligned, found.maps, found.costs
    pairs = dict(zip(spec0.tensors, spec1.tensors, strict=True))
    aligned = {pairs.get(key, key): value for key, value in aligned.items()}
    wrong = [
        key
        for key, value in aligned.items()
        if key in state1 and config.fuses(key) and value.shape != state1[key].shape
    ]
    if wrong:
        sizes = "; ".join(
            f"{key}: {tuple(aligned[key].shape)} and {tuple(state1[key].shape)}" for key in wrong[:5]
        )
        raise ShapeError(
            f"fixed axes (classes, vocabulary, pixels, positions) differ between source and anchor: {sizes}; "
            "give both "
            "models the same, or leave these out with fuse_parts"
        )
    return aligned, maps, costs


def _rebuilt(anchor: Any, state: Mapping[str, Tensor]) -> nn.Module | None:
    if not isinstance(anchor, nn.Module):
        return None
    model = copy.deepcopy(anchor)
    model.load_state_dict(dict(state))
    return model


def fuse(
    models: Models,
    *,
    anchor: Any = None,
    data: Any = None,
    weights: Any = None,
    config: FusionConfig | None = None,
    spec: Any = None,
    layer_map: Mapping[int, int] | None = None,
    reference: str | None = None,
    progress: bool | None = None,
) -> Fused:
    """Fuse models that were trained apart into one with the anchor's shape.

    Every other model is aligned with the anchor, neuron by neuron; the result is the weighted mean.

    Args:
        models: two or more modules (or state dicts with ``spec``, for features ``wts``), in a list or by
            name.
        anchor: index, name or object of the model that gives coordinates and shape; the last by default.
        data: inputs that all models take, for features ``acts``: a tensor, a mapping of tensors, or batches;
            no labels are used.
        weights: of each model, by name or in order, summing to 1; by default ``config.alpha`` is the
            anchor's.
        config: settings; :class:`FusionConfig` lists them.
        spec: an :class:`AlignmentSpec` for all, or by name; by default that of the architecture.
        layer_map: for unequal depth: block of the anchor -> block of the source; unmatched anchor blocks
            stay.
        reference: ``exact`` or ``torch``: the slow path of the benchmarks (stored activations, SciPy's or
            torch's distances, POT).
        progress: show a bar.

    Returns:
        The fused model, the maps and the report. The given models come back untouched.

    Raises:
        InputError: fewer than two models, an anchor that is none of them, weights that do not sum to 1, no
            data.
        SpecError: an architecture without specification, or tensors that it does not cover.
        ShapeError: fixed axes of different sizes.
        DataError: activations that are not finite, or quantised weights.

    Example:
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
        >>> fused = fuse([a, b], data=torch.randn(64, 4))
        >>> type(fused.model).__name__, sorted(fused.maps), fused.weights
        ('Sequential', ['0'], {'0': 0.5, '1': 0.5})
    """
    named = _named(models)
    chosen = _anchor_name(named, anchor)
    spec1 = spec_of(named[chosen], spec, chosen)
    config = settled(config, spec1)
    share = resolve_weights(list(named), chosen, config.alpha, weights)
    aligned: dict[str, dict[str, Tensor]] = {}
    maps: dict[str, Plan] = {}
    costs: dict[str, dict[str, Any]] = {}
    for name, model in named.items():
        if name == chosen:
            continue
        spec0 = spec_of(model, spec, name)
        spec0, target = with_layer_map(spec0, spec1, layer_map)
        found, plans, notes = align_states(
            model, named[chosen], spec0, target, data, config, progress, reference
        )
        aligned[name] = found
        prefix = f"{name}/" if len(named) > 2 else ""
        maps |= {prefix + key: plan for key, plan in plans.items()}
        costs |= {prefix + key: note for key, note in notes.items()}
    state = mix_states(state_of(named[chosen]), aligned, share, chosen, spec1, config)
    if config.official_side("unfused"):
        _official_unfused(state, named, chosen, spec1, config)
    return Fused(_rebuilt(named[chosen], state), maps, state, share, chosen, config, costs)


def _official_unfused(
    state: dict[str, Tensor], named: Mapping[str, Any], chosen: str, spec: AlignmentSpec, config: FusionConfig
) -> None:
    """The authors' code takes unfused parts of blocks from the source, and the first norm from the second."""
    source = state_of(next(model for name, model in named.items() if name != chosen))
    for op in spec.ops:
        for key in (op.weight, op.bias):
            if key is None or config.fuses(key) or not in_block(op) or key not in source:
                continue
            taken = key.replace("layernorm_before", "layernorm_after") if op.kind == "norm" else key
            if source[taken].shape == state[key].shape:
                state[key] = source[taken].clone()


def align(
    model: Any,
    to: Any,
    *,
    data: Any = None,
    spec: Any = None,
    config: FusionConfig | None = None,
    layer_map: Mapping[int, int] | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> Aligned:
    """Re-express a model in the coordinates of another, without mixing them.

    Args:
        model: the source.
        to: the anchor.
        data: as in :func:`fuse`.
        spec: as in :func:`fuse`; by name they are ``source`` and ``anchor``.
        config: settings; by default one hard, legal plan per space from the weights, which keeps the
            function.
        layer_map: as in :func:`fuse`.
        progress: show a bar.
        **settings: fields of :class:`FusionConfig` to change.

    Returns:
        The aligned model and the maps.

    Raises:
        InputError, SpecError, ShapeError, DataError: as in :func:`fuse`.

    Example:
        >>> a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = align(a, to=a)
        >>> all(torch.equal(x, y) for x, y in zip(found.state.values(), a.state_dict().values()))
        True
    """
    for name, value in (("model", model), ("to", to)):
        if not isinstance(value, nn.Module | Mapping):
            raise InputError(f"{name} is {type(value).__name__}, wanted a module or a state dict")
    named = {"source": model, "anchor": to}
    spec1 = spec_of(to, spec, "anchor")
    default = (
        FusionConfig.git_rebasin() if data is None else FusionConfig(strategy="consistent", solver="lsa")
    )
    config = config or default
    config = settled(config.replace(**settings) if settings else config, spec1)
    spec0, target = with_layer_map(spec_of(model, spec, "source"), spec1, layer_map)
    aligned, maps, costs = align_states(model, to, spec0, target, data, config, progress)
    anchor = state_of(named["anchor"])
    missing = [key for key, value in aligned.items() if value.shape != anchor[key].shape]
    if missing:
        raise ShapeError(f"aligned tensors keep another shape: {', '.join(missing)}")
    tied = {key: group[0] for group in spec1.tied for key in group}
    state = {
        key: aligned.get(key, aligned.get(tied.get(key, key), value)).to(value.dtype)
        if config.fuses(key)
        else value
        for key, value in anchor.items()
    }
    return Aligned(_rebuilt(to, state), maps, state, costs)

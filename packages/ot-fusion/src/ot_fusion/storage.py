"""Fused models on disk: folders that any tool reads, with the maps beside them.

Fusing folders larger than memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_core.atomic import PathLike, atomic_directory, atomic_write, occupied, resumable_directory
from fusion_core.checkpoint import check_config, digest, digest_file, load_tensors, save_tensors
from fusion_core.demo import package_version
from fusion_core.errors import CheckpointError, NonFiniteError, naming, reading
from fusion_core.progress import track
from fusion_core.results import dump_json
from fusion_core.shards import ShardReader, ShardWriter
from ot_fusion.config import FusionConfig
from ot_fusion.consistent import check_spaces, match_weights
from ot_fusion.errors import InputError
from ot_fusion.flow import flow_pair
from ot_fusion.plan import Plan
from ot_fusion.relabel import check_states, map_key
from ot_fusion.spec.registry import spec_for
from ot_fusion.spec.types import AlignmentSpec

if TYPE_CHECKING:
    from ot_fusion.fusing import Fused

__all__ = ["LazyState", "folder_spec", "fuse_folders", "load_maps", "refuse", "save_fused", "save_maps"]

SETTINGS, MAPS = "ot_fusion.json", "maps.safetensors"
SCHEMA = "ot_fusion.fused/1"


class LazyState(Mapping[str, Tensor]):
    """A checkpoint on disk as a mapping: a tensor is read when it is asked for, and not kept.

    Args:
        path: a safetensors file, an index of shards, or a folder.
    """

    def __init__(self, path: PathLike) -> None:
        self.reader = ShardReader(path)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.reader:
            raise KeyError(key)
        return self.reader.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.reader.keys())

    def __len__(self) -> int:
        return len(self.reader)


def save_maps(maps: Mapping[str, Plan], path: PathLike) -> None:
    """Write plans to a safetensors file, whole or not at all."""
    rules = {name: plan.normalization for name, plan in maps.items()}
    tensors = {name: plan.matrix.detach().cpu().contiguous() for name, plan in maps.items()}
    save_tensors(path, tensors, {"ot_fusion": json.dumps(rules)})


def load_maps(path: PathLike) -> dict[str, Plan]:
    """Read plans.

    Raises:
        CheckpointError: no such file, or one without plans.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_maps({"a": Plan.identity(2)}, f"{folder}/maps.safetensors")
        ...     load_maps(f"{folder}/maps.safetensors")
        {'a': Plan(2 -> 2, paper, identity share 1)}
    """
    reader = ShardReader(path)
    tensors = load_tensors(path)
    with reading(path, "holds no plans of ot-fusion", CheckpointError):
        rules = json.loads(reader.metadata["ot_fusion"])
        return {name: Plan(tensors[name], rules[name]) for name in rules}


def _document(
    config: FusionConfig,
    weights: Mapping[str, float],
    anchor: str,
    parents: Mapping[str, Any],
    costs: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": package_version("ot-fusion"),
        "anchor": anchor,
        "weights": dict(weights),
        "parents": {name: _parent(path) for name, path in parents.items()},
        "config": config.to_dict(),
        "costs": dict(costs),
    }


def _parent(path: Any) -> dict[str, Any]:
    place = Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    return {"path": str(path), "digests": {file.name: digest_file(file) for file in files if file.is_file()}}


def save_fused(fused: Fused, out: PathLike, *, parents: Mapping[str, Any], overwrite: bool = False) -> None:
    """See :meth:`ot_fusion.Fused.save_pretrained`."""
    place = Path(out)
    if occupied(place) and not overwrite:
        raise InputError(f"out is {out}, which is not empty; pass overwrite or another name")
    document = _document(fused.config, fused.weights, fused.anchor, parents, fused.costs)
    with atomic_directory(place, overwrite=True) as folder:
        _save_model(fused, folder)
        source = parents.get(fused.anchor)
        _copy_companions(source, folder)
        save_maps(fused.maps, folder / MAPS)
        with atomic_write(folder / SETTINGS, "w") as file:
            file.write(dump_json(document))


def _save_model(fused: Fused, folder: Path) -> None:
    saver = getattr(fused.model, "save_pretrained", None)
    if saver is not None:
        saver(folder)
        return
    seen: dict[int, str] = {}
    state = {k: v for k, v in fused.state.items() if seen.setdefault(v.data_ptr(), k) == k or v.numel() == 0}
    save_tensors(folder / "model.safetensors", state)


def _copy_companions(source: Any, folder: Path) -> None:
    """Tokenizer and preprocessing files of the anchor."""
    place = Path(source) if source is not None else None
    if place is None or not place.is_dir():
        return
    for pattern in (
        "tokenizer*",
        "special_tokens_map.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "preprocessor_config.json",
        "chat_template*",
        "generation_config.json",
    ):
        for file in place.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def folder_spec(path: PathLike, keys: list[str]) -> AlignmentSpec:
    """The specification of a Hugging Face folder, by its ``config.json``.

    Raises:
        InputError: no configuration there.
        SpecError: an architecture without written specification.
    """
    check_config(path)
    with reading(path, "has no readable config.json; give the folder of a Hugging Face model"):
        found = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        found.setdefault("tie_word_embeddings", "lm_head.weight" not in keys)
        return spec_for(SimpleNamespace(**found), keys)


def _settings(folder: Path) -> dict[str, Any]:
    with reading(folder, f"is no fused folder: it has no readable {SETTINGS}"):
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise InputError(f"{folder / SETTINGS} has schema {found['schema']!r}, wanted {SCHEMA!r}")
        _check_settings(found)
    return found


def _check_settings(found: dict[str, Any]) -> None:
    """Complain of what :func:`refuse` takes for granted."""
    for name in ("weights", "parents", "config"):
        if not isinstance(found[name], dict):
            raise InputError(f"{name} is {str(found[name])[:40]!r}, wanted a value by name")
    if found["anchor"] not in found["weights"]:
        raise InputError(f"anchor is {str(found['anchor'])[:40]!r}, wanted one of {list(found['weights'])}")
    for name, parent in found["parents"].items():
        if not isinstance(parent["path"], str) or not isinstance(parent["digests"], dict):
            raise InputError(f"parent {name} has no path and digests")


def _plans_of(maps: Mapping[str, Plan], source: str, several: bool) -> dict[str, Plan]:
    prefix = f"{source}/" if several else ""
    return {name.removeprefix(prefix): plan for name, plan in maps.items() if name.startswith(prefix)}


def _by_space(plans: Mapping[str, Plan], spec: AlignmentSpec) -> dict[tuple[str, str], Plan]:
    found: dict[tuple[str, str], Plan] = {}
    for space in spec.spaces.values():
        for view in space.group.views():
            name = f"{space.name}.{view}" if view else space.name
            if name in plans:
                found[space.name, view] = plans[name]
    return found


def fuse_folders(
    parents: Mapping[str, PathLike],
    out: PathLike,
    *,
    anchor: str,
    weights: Mapping[str, float],
    config: FusionConfig,
    maps: Mapping[str, Plan] | None = None,
    spec: AlignmentSpec | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: bool | None = None,
) -> dict[str, Plan]:
    """Fuse checkpoint folders without loading a whole model: tensors are read, mixed and written one by one.

    Maps come from the weights, or from an earlier run. An interrupted run goes on where it stopped: maps and
    finished shards lie in ``OUT.partial`` until the end. With ``strategy="flow"`` one aligned source is held
    in memory; ``consistent`` holds single tensors only.

    Args:
        parents: folders (or safetensors files, with ``spec``) by name.
        out: the folder to make.
        anchor: name of the parent whose coordinates and shape it has.
        weights: of each parent, summing to 1.
        config: settings; features ``wts``, unless ``maps`` are given.
        maps: plans of an earlier run.
        spec: of all parents; by default that of each folder's architecture.
        shard_bytes: most bytes of a shard.
        overwrite: replace what is in ``out``.
        progress: show a bar.

    Returns:
        The maps.

    Raises:
        InputError: ``out`` is not empty, or features ``acts`` without maps.
        NonFiniteError: a parent's weights are NaN or infinite.
    """
    place = Path(out)
    if occupied(place) and not overwrite:
        raise InputError(f"out is {out}, which is not empty; pass overwrite or another name")
    if config.features == "acts" and maps is None:
        raise InputError(
            "folders are fused from their weights: use features='wts', or give the maps of an earlier run"
        )
    states = {name: LazyState(path) for name, path in parents.items()}
    specs = {name: spec or folder_spec(parents[name], list(state)) for name, state in states.items()}
    for name, state in states.items():
        check_states(specs[name], state, name)
    document = _document(config, weights, anchor, parents, {})
    given = None if maps is None else {name: (plan.matrix, plan.normalization) for name, plan in maps.items()}
    made_from = digest(document, given, None if spec is None else repr(spec))
    several = len(parents) > 2
    base = Path(parents[anchor])
    with resumable_directory(place, made_from, overwrite=overwrite) as work:
        plans = dict(maps) if maps is not None else _cached_maps(work, states, specs, anchor, config)
        aligned: dict[str, Mapping[str, Tensor]] = {}
        for name, state in states.items():
            if name == anchor:
                continue
            mine = _plans_of(plans, name, several)
            if config.strategy == "consistent":
                aligned[name] = _Mapped(state, specs[name], _by_space(mine, specs[name]))
            else:
                found = replace(config, features="wts")
                ground = states[anchor], specs[name], specs[anchor]
                aligned[name] = flow_pair(state, *ground, None, found, mine).aligned
        with ShardWriter(work, shard_bytes, like=base if base.is_dir() else None) as writer:
            from ot_fusion.fusing import mix_states

            for key in track(list(states[anchor]), "writing", enabled=progress):
                if key not in writer:
                    one = {key: states[anchor][key]}
                    parts = {name: _One(state, key, specs[anchor]) for name, state in aligned.items()}
                    mixed = mix_states(one, parts, weights, anchor, specs[anchor], config)[key]
                    _check_mixed(key, mixed, states)
                    writer.add(key, mixed)
        save_maps(plans, work / MAPS)
        with atomic_write(work / SETTINGS, "w") as file:
            file.write(dump_json(document))
    return plans


def _check_mixed(key: str, mixed: Tensor, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse NaN and infinity, and name the parents that they come from."""
    if not mixed.is_floating_point() or bool(torch.isfinite(mixed).all()):
        return
    bad = [name for name, s in states.items() if key in s and not bool(torch.isfinite(s[key]).all())]
    raise NonFiniteError(f"{key} of {' and '.join(bad or states)} holds NaN or infinity")


class _Mapped(Mapping[str, Tensor]):
    """A source's tensors in the anchor's coordinates, moved when they are asked for."""

    def __init__(
        self, state: Mapping[str, Tensor], spec: AlignmentSpec, plans: Mapping[tuple[str, str], Plan]
    ) -> None:
        self.state, self.spec, self.plans = state, spec, plans

    def __getitem__(self, key: str) -> Tensor:
        return map_key(self.state[key], key, self.spec, self.plans)

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.state if key in self.spec.tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in self.spec.tensors and key in self.state


class _One(dict[str, Tensor]):
    """The one aligned tensor that a key needs."""

    def __init__(self, state: Mapping[str, Tensor], key: str, spec: AlignmentSpec) -> None:
        super().__init__()
        tied = {k: group[0] for group in spec.tied for k in group}
        for name in (key, tied.get(key, key)):
            if name in state:
                self[name] = state[name]
                return


def _cached_maps(
    work: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    specs: Mapping[str, AlignmentSpec],
    anchor: str,
    config: FusionConfig,
) -> dict[str, Plan]:
    """The maps of an interrupted run, or new ones, kept for the next."""
    if (work / MAPS).is_file():
        return load_maps(work / MAPS)
    plans: dict[str, Plan] = {}
    for name, state in states.items():
        if name == anchor:
            continue
        with naming(f"{name} to {anchor}"):
            if config.strategy == "consistent":
                found = _weights_only(state, states[anchor], specs[name], specs[anchor], config)
            else:
                found = flow_pair(state, states[anchor], specs[name], specs[anchor], None, config).maps
        prefix = f"{name}/" if len(states) > 2 else ""
        plans |= {prefix + key: plan for key, plan in found.items()}
    save_maps(plans, work / MAPS)
    return plans


def _weights_only(
    source: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    spec0: AlignmentSpec,
    spec1: AlignmentSpec,
    config: FusionConfig,
) -> dict[str, Plan]:
    check_spaces(spec0, spec1)
    found = match_weights(source, anchor, spec0, spec1, config)
    return {f"{space}.{view}" if view else space: plan for (space, view), plan in found.items()}


def refuse(
    folder: PathLike,
    out: PathLike,
    *,
    alpha: float | None = None,
    weights: Mapping[str, float] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Fuse again from the maps of a fused folder, with other weights, in seconds.

    Args:
        folder: what :meth:`ot_fusion.Fused.save_pretrained` or :func:`fuse_folders` wrote; it names its
            parents.
        out: the new folder.
        alpha: weight of the ANCHOR, in [0, 1].
        weights: of each parent, instead of ``alpha``.
        overwrite: replace what is in ``out``.
        progress: show a bar.

    Raises:
        InputError: no fused folder, parents that are gone or were changed, weights that do not sum to 1.
    """
    from ot_fusion.fusing import resolve_weights

    found = _settings(Path(folder))
    config = FusionConfig.from_dict(found["config"])
    names, anchor = list(found["weights"]), found["anchor"]
    if alpha is not None:
        config = config.replace(alpha=alpha)
    share = resolve_weights(names, anchor, config.alpha, weights)
    lost = [name for name in names if name not in found["parents"]]
    if lost:
        raise InputError(
            f"{folder} does not say where {', '.join(lost)} lie; save with parents={{name: path}}"
        )
    for name, parent in found["parents"].items():
        if _parent(parent["path"])["digests"] != parent["digests"]:
            raise InputError(
                f"the parent {name} at {parent['path']} is gone or was changed since the maps were made"
            )
    parents = {name: found["parents"][name]["path"] for name in names}
    plans = load_maps(Path(folder) / MAPS)
    with torch.no_grad():
        fuse_folders(
            parents,
            out,
            anchor=anchor,
            weights=share,
            config=config,
            maps=plans,
            overwrite=overwrite,
            progress=progress,
        )

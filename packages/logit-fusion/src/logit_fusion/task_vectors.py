"""Task arithmetic: one small expert out of several, base + lambda * sum of (expert - base).

The paper's section on task arithmetic (after Ilharco et al. 2023): merged once and used as the only
expert, it
brings a fusion of T experts from T + 2 members down to 3.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from fusion_core.atomic import occupied, resumable_directory
from fusion_core.checkpoint import digest
from fusion_core.errors import CheckpointError, InputError
from fusion_core.progress import track
from fusion_core.shards import ShardReader, ShardWriter

__all__ = ["merge_task_vectors"]

State = Mapping[str, Tensor]
Folder = str | os.PathLike[str]
Source = nn.Module | State | Folder
Model = TypeVar("Model", bound=nn.Module)
Scales = float | Sequence[float]


@overload
def merge_task_vectors(
    base: Model,
    experts: Sequence[nn.Module] | Mapping[str, nn.Module],
    lam: Scales = 0.3,
    *,
    out: None = None,
    shard_bytes: int = ...,
    progress: bool | None = None,
) -> Model: ...
@overload
def merge_task_vectors(
    base: State,
    experts: Sequence[State] | Mapping[str, State],
    lam: Scales = 0.3,
    *,
    out: None = None,
    shard_bytes: int = ...,
    progress: bool | None = None,
) -> dict[str, Tensor]: ...
@overload
def merge_task_vectors(
    base: Folder,
    experts: Sequence[Folder] | Mapping[str, Folder],
    lam: Scales = 0.3,
    *,
    out: Folder,
    shard_bytes: int = ...,
    progress: bool | None = None,
) -> Path: ...


def merge_task_vectors(
    base: Source,
    experts: Sequence[Source] | Mapping[str, Source],
    lam: Scales = 0.3,
    *,
    out: Folder | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: bool | None = None,
) -> Any:
    """Merge experts into one: base + sum of lam_t * (expert_t - base), in float32 or wider, rounded once.

    Args:
        base: a module, a state dict, or a folder or file of safetensors.
        experts: fine-tunes of it, of the same kind.
        lam: scale of every task vector, one number or one per expert. 0.3 is a common choice; the paper does
            not state its own.
        out: folder of the merged model, for folders and files: tensors are streamed one by one into
            ``OUT.partial``, an interrupted call goes on, and the base's configuration and tokenizer are
            copied.
        shard_bytes: most bytes of a written shard.
        progress: a bar; None: on a terminal.

    Returns:
        A module for modules, a state dict for state dicts, the folder's path for folders.

    Raises:
        InputError: no experts, kinds mixed, another number of scales, one that is not finite, or no free
            ``out``.
        CheckpointError: tensors differ in name or shape.

    Example:
        >>> base = {"w": torch.zeros(2)}
        >>> merge_task_vectors(base, [{"w": torch.ones(2)}, {"w": 3 * torch.ones(2)}], lam=0.5)["w"]
        tensor([2., 2.])
    """
    listed = list(experts.values()) if isinstance(experts, Mapping) and not _is_state(experts) else experts
    if _is_state(listed) or isinstance(listed, str | os.PathLike) or not listed:
        raise InputError("experts wants a list of one or more, or a mapping by name")
    listed = list(listed)
    scales = [float(lam)] * len(listed) if isinstance(lam, int | float) else [float(x) for x in lam]
    if len(scales) != len(listed) or not all(map(math.isfinite, scales)):
        raise InputError(
            f"lam is {lam!r}, wanted one finite number, or one for each of {len(listed)} experts"
        )
    kinds = {_kind(source) for source in (base, *listed)}
    if len(kinds) != 1:
        raise InputError(f"base and experts are {sorted(kinds)}; wanted one kind")
    kind = kinds.pop()
    if kind == "folder":
        if out is None:
            raise InputError("out is missing: the folder of the merged model")
        return _stream(base, listed, scales, Path(out), shard_bytes, progress)  # pyright: ignore
    if out is not None:
        raise InputError("out is for folders and files; modules and state dicts are returned")
    if isinstance(base, nn.Module):
        found = _merged(base.state_dict(), [x.state_dict() for x in listed], scales)  # pyright: ignore
        made = copy.deepcopy(base)
        made.load_state_dict(found)
        return made
    return _merged(base, listed, scales)  # pyright: ignore[reportArgumentType]


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _kind(source: Any) -> str:
    if isinstance(source, nn.Module):
        return "module"
    if _is_state(source):
        return "state dict"
    if isinstance(source, str | os.PathLike):
        return "folder"
    raise InputError(f"got {type(source).__name__}, wanted a module, a state dict, or a folder or file")


def _one(name: str, base: Tensor, experts: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    for number, expert in enumerate(experts):
        if expert.shape != base.shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(base.shape)} in the base and {tuple(expert.shape)} in "
                "expert "
                f"{number}; task vectors need one architecture"
            )
    if not base.is_floating_point():
        return base.clone()
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    start = base.to(wide)
    total = start.clone()
    for expert, scale in zip(experts, scales, strict=True):
        total += scale * (expert.to(start) - start)
    return total.to(base.dtype)


def _check_names(base: Sequence[str], experts: Sequence[Sequence[str]]) -> None:
    for number, names in enumerate(experts):
        missing, extra = sorted(set(base) - set(names)), sorted(set(names) - set(base))
        if missing or extra:
            raise CheckpointError(
                f"expert {number} lacks {missing[:5]} and has {extra[:5]} that the base has not; task "
                "vectors need "
                "one architecture"
            )


def _merged(base: State, experts: Sequence[State], scales: Sequence[float]) -> dict[str, Tensor]:
    _check_names(list(base), [list(expert) for expert in experts])
    return {
        name: _one(name, tensor, [expert[name] for expert in experts], scales)
        for name, tensor in base.items()
    }


def _stream(
    base: str | os.PathLike[str],
    experts: Sequence[str | os.PathLike[str]],
    scales: Sequence[float],
    out: Path,
    shard_bytes: int,
    progress: bool | None,
) -> Path:
    if occupied(out):
        raise InputError(f"out is {out}, which is not empty; name another folder")
    reader, others = ShardReader(base), [ShardReader(expert) for expert in experts]
    names = sorted(reader.keys())
    _check_names(names, [other.keys() for other in others])
    for name in names:  # before anything is written
        shapes = {other.info(name).shape for other in others} | {reader.info(name).shape}
        if len(shapes) != 1:
            _one(
                name,
                torch.empty(reader.info(name).shape),
                [torch.empty(o.info(name).shape) for o in others],
                scales,
            )
    like = Path(base) if Path(base).is_dir() else None
    made_from = digest([_stamp(source) for source in (base, *experts)], list(scales))
    get: Callable[[str], Tensor] = lambda name: _one(
        name, reader.get(name), [other.get(name) for other in others], scales
    )
    with (
        resumable_directory(out, made_from) as work,
        ShardWriter(work, shard_bytes, like=like) as writer,
    ):
        for name in track(names, "merging", enabled=progress):
            if name not in writer:
                writer.add(name, get(name))
    return out


def _stamp(source: str | os.PathLike[str]) -> list[Any]:
    """Names, sizes and times of a checkpoint's files."""
    place = Path(source)
    files = sorted(place.glob("*.safetensors*")) if place.is_dir() else [place]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

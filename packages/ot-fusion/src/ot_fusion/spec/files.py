"""Specifications as files: JSON that programs write and people can read and edit."""

import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fusion_core.atomic import PathLike, atomic_write
from fusion_core.errors import reading
from ot_fusion.errors import SpecError
from ot_fusion.groups import Blocks, Frozen, Full, Group, Heads
from ot_fusion.spec.types import AlignmentSpec, Axis, Concat, Op, Space, TensorSpec

__all__ = ["load_spec", "save_spec"]

SCHEMA = "ot_fusion.spec/1"
Made = TypeVar("Made")
_LARGEST = 2**31  # of a space
_GROUPS: dict[str, type[Group]] = {"full": Full, "frozen": Frozen, "blocks": Blocks, "heads": Heads}


def save_spec(spec: AlignmentSpec, path: PathLike) -> None:
    """Write a specification as JSON.

    Args:
        spec: what to write.
        path: of the file, which appears whole or not at all.
    """
    kinds = {kind: name for name, kind in _GROUPS.items()}
    document = {
        "schema": SCHEMA,
        "name": spec.name,
        "spaces": {
            name: {"group": kinds[type(space.group)], **dataclasses.asdict(space.group)}  # pyright: ignore[reportArgumentType]
            for name, space in spec.spaces.items()
        },
        "tensors": {key: [_axis_out(axis) for axis in tensor.axes] for key, tensor in spec.tensors.items()},
        "ops": [
            {k: v for k, v in dataclasses.asdict(op).items() if v not in (None, (), "")} for op in spec.ops
        ],
        "tied": spec.tied,
        "copied": spec.copied,
        "notes": spec.notes,
    }
    with atomic_write(Path(path), "w") as file:
        file.write(json.dumps(document, indent=1) + "\n")


def _axis_out(axis: Axis | Concat | None) -> Any:
    if axis is None:
        return None
    if isinstance(axis, Concat):
        return [_axis_out(part) for part in axis.parts]
    return {
        k: v
        for k, v in dataclasses.asdict(axis).items()
        if (k, v) not in (("view", ""), ("inner", 1), ("side", "out"))
    }


def _axis_in(value: Any) -> Axis | Concat | None:
    if value is None:
        return None
    if value == []:
        raise SpecError("an axis of a tensor has an empty list, wanted the spaces that lie on it")
    if isinstance(value, list):
        return Concat(tuple(_checked(Axis, part) for part in value))
    return _checked(Axis, value)


def _checked(kind: type[Made], entry: dict[str, Any]) -> Made:
    """A dataclass of plain values, each of the type that it declares."""
    made = kind(**entry)
    for name, hint in get_type_hints(kind).items():
        if not _fits(value := getattr(made, name), hint):
            raise SpecError(f"{kind.__name__} has {name}={str(value)[:60]}, wanted {hint}")
    return made


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind is UnionType:
        return any(_fits(value, part) for part in parts)
    if kind is tuple:
        wanted = parts[:1] * len(value) if parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(wanted) and all(map(_fits, value, wanted))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST
    return isinstance(value, hint)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def load_spec(path: PathLike) -> AlignmentSpec:
    """Read a specification.

    Raises:
        SpecError: no such file, no JSON, or another structure.
    """
    with reading(path, "holds no specification", SpecError):
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise SpecError(f"{path} has schema {found['schema']!r}, wanted {SCHEMA!r}")
        spaces: dict[str, Space] = {}
        for name, entry in found["spaces"].items():
            kind = _GROUPS[entry.pop("group")]
            spaces[name] = Space(name, _checked(kind, entry))
        tensors = {
            k: TensorSpec(k, tuple(_axis_in(axis) for axis in axes)) for k, axes in found["tensors"].items()
        }
        entries: list[dict[str, Any]] = [{k: _tuple(v) for k, v in entry.items()} for entry in found["ops"]]
        ops = tuple(_checked(Op, entry) for entry in entries)
        tied = tuple(_names("tied", group) for group in found["tied"])
        copied, (name,) = _names("copied", found["copied"]), _names("name", [found["name"]])
        return AlignmentSpec(spaces, tensors, ops, tied, copied, name, dict(found["notes"]))


def _names(what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise SpecError(f"{what} has {str(value)[:60]}, wanted names")
    return tuple(value)

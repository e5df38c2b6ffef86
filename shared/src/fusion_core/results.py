"""What functions return: frozen dataclasses that save themselves and print as shapes."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.atomic import atomic_directory, atomic_write
from fusion_core.errors import InputError
from fusion_core.stats import Interval

__all__ = ["Interval", "Result", "dump_json", "plain"]


def plain(value: Any) -> Any:
    """The JSON form of a value: finite numbers or null, nested lists for arrays and tensors.

    Args:
        value: plain values, arrays, tensors, dataclasses, paths, enums, mappings and iterables of them.

    Example:
        >>> plain({"x": np.array([1.0, np.nan]), "n": np.int64(3)})
        {'x': [1.0, None], 'n': 3}
    """
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if dataclasses.is_dataclass(value):
        return {name: plain(entry) for name, entry in _fields(value).items()}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain(entry) for entry in value]
    if _is_array(value):
        return plain(_to_numpy(value).tolist())
    return str(value)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) or hasattr(value, "detach")


def _to_numpy(value: Any) -> NDArray[Any]:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such dtype; float32 holds it exactly
        tensor = tensor.float()
    return tensor.numpy()


def dump_json(value: Any) -> str:
    """Strict JSON text of any value :func:`plain` takes; half a surrogate pair is escaped."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


class Result:
    """Mixin of result dataclasses: ``to_dict``, ``save`` and a ``repr`` of shapes instead of numbers.

    Example:
        >>> @dataclasses.dataclass(frozen=True, slots=True)
        ... class Depth(Result):
        ...     depth: np.ndarray
        ...     scale: float
        >>> Depth(np.zeros((2, 3)), 0.5)
        Depth(depth=float64 (2, 3), scale=0.5)
    """

    __slots__ = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in cls.__dict__:  # else @dataclass writes one that prints every number
            cls.__repr__ = Result.__repr__

    def __repr__(self) -> str:
        words = ", ".join(f"{name}={_short(value)}" for name, value in _fields(self).items())
        return f"{type(self).__name__}({words})"

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON form: arrays as nested lists, non-finite numbers as None."""
        return {name: plain(value) for name, value in _fields(self).items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result; it appears whole or not at all.

        Args:
            path: ``.json`` takes everything, ``.npz`` and ``.safetensors`` the arrays (nested ones as
                ``"field.key"``); no suffix means a new directory with ``result.json`` and ``arrays.npz``.

        Raises:
            InputError: another suffix, no arrays to write, or a place that cannot be written.
        """
        target, arrays = Path(path), _arrays(_fields(self))
        if target.suffix in (".npz", ".safetensors") and not arrays:
            raise InputError(f"{type(self).__name__} holds no arrays for {target.name}; save it as .json")
        if target.suffix == ".json":
            with atomic_write(target, "w") as file:
                file.write(dump_json(self))
        elif target.suffix == ".npz":
            with atomic_write(target) as file:
                _savez(file, arrays)
        elif target.suffix == ".safetensors":
            with atomic_write(target) as file:
                file.write(_safetensors(arrays))
        elif target.suffix == "":
            with atomic_directory(target) as directory:
                rest = {name: value for name, value in _fields(self).items() if name not in arrays}
                (directory / "result.json").write_text(dump_json(rest), encoding="utf-8")
                if arrays:
                    _savez(directory / "arrays.npz", arrays)
        else:
            raise InputError(f"path is {path}, wanted .json, .npz, .safetensors or a directory")


def _savez(file: Any, arrays: dict[str, Any]) -> None:
    columns: dict[str, Any] = {name: _to_numpy(value) for name, value in arrays.items()}
    if objects := [name for name, value in columns.items() if value.dtype.hasobject]:
        raise InputError(f"arrays {objects} hold objects, wanted numbers; nothing is pickled")
    np.savez(file, **columns)


def _safetensors(arrays: dict[str, Any]) -> bytes:
    import torch
    from safetensors.torch import save

    # One storage each: the format refuses tensors that share memory.
    return save(
        {name: torch.as_tensor(value).detach().cpu().clone().contiguous() for name, value in arrays.items()}
    )


def _arrays(fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if _is_array(value):
            found[name] = value
        elif isinstance(value, Result):
            found |= {f"{name}.{key}": array for key, array in _arrays(_fields(value)).items()}
        elif isinstance(value, Mapping):
            found |= {f"{name}.{key}": array for key, array in _arrays(value).items()}
    return found


def _short(value: Any) -> str:
    if _is_array(value) and getattr(value, "shape", ()) != ():
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if _is_array(value):
        return f"{value.item():.6g}" if isinstance(value.item(), float) else str(value.item())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping) and len(value) <= 3:
        return "{" + ", ".join(f"{key!r}: {_short(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, Mapping | list | tuple) and len(value) > 3:
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

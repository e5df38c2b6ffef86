"""Checkpoints that are written whole or not at all, and read without running anyone's code."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fusion_core.atomic import PathLike, atomic_directory, atomic_write
from fusion_core.errors import CheckpointError, InputError, reading
from fusion_core.shards import ShardReader, ShardWriter, TensorInfo, dtype_name, raw_bytes, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "KeyMap",
    "PathLike",
    "ShardReader",
    "ShardWriter",
    "TensorInfo",
    "atomic_directory",
    "atomic_write",
    "check_config",
    "digest",
    "digest_file",
    "digest_state",
    "load_foreign",
    "load_strict",
    "load_tensors",
    "plain_tensors",
    "save_tensors",
]

_LAYERS = re.compile(r"(^|_)((n|num)(_\w+)?|encoder|decoder)_layers?$")
_MOST_LAYERS = 10_000
_DROPOUT = re.compile(r"(dropout|_pdrop|drop_path)(_rate|_prob)?$")

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_REASON = re.compile(
    r"Unsupported (?:global: GLOBAL|class|operand) [\w.]+|GLOBAL [\w.]+ whose module \w+ is blocked"
)


def save_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to one safetensors file, whole or not at all; views and tied weights are written out.

    Args:
        path: the file.
        tensors: name -> tensor of any shape and device.
        metadata: text -> text, kept in the header.

    Raises:
        InputError: a value is no tensor, metadata is no text, or the place cannot be written.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tensors(f"{folder}/a.safetensors", {"weight": torch.ones(2)})
        ...     load_tensors(f"{folder}/a.safetensors")
        {'weight': tensor([1., 1.])}
    """
    for key, value in (metadata or {}).items():
        if [type(key), type(value)] != [str, str]:
            raise InputError(f"metadata has {key!r}: {value!r}, wanted text -> text")
    with atomic_write(path) as file:
        write_tensors(file, tensors, metadata)


def load_tensors(
    path: PathLike,
    keys: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Read tensors from a safetensors file, an index of shards, or a folder of either.

    Args:
        path: the file or folder.
        keys: names to read, in this order; None reads all.
        device: where the tensors go.
        shapes: name -> shape that must be there, checked before anything is read.

    Raises:
        CheckpointError: missing, cut off, a Git LFS pointer, or a tensor that is missing or of another shape.
    """
    reader = ShardReader(path)
    for key, shape in (shapes or {}).items():
        if reader.info(key).shape != tuple(shape):
            raise CheckpointError(
                f"{path}: {key!r} has shape {reader.info(key).shape}, wanted {tuple(shape)}"
            )
    wanted = reader.keys() if keys is None else keys
    for key in wanted:
        reader.info(key)
    return {key: reader.get(key, device) for key in wanted}


@contextmanager
def plain_tensors() -> Generator[None, None, None]:
    """Make an error of what PyTorch only warns of when a file is read: complex or sparse tensors in it.

    Raises:
        UserWarning: of PyTorch; :func:`fusion_core.errors.reading` around it names the file.
    """
    with warnings.catch_warnings():
        for message in ("Casting complex values", "Validating sparse tensor"):
            warnings.filterwarnings("error", message=message)
        yield


def load_foreign(path: PathLike) -> dict[str, Tensor]:
    """Read somebody else's checkpoint to the CPU: tensors only, no code of the file is ever run.

    A pickle goes through ``torch.load(weights_only=True)``; ``state_dict``, ``model_state_dict`` and
    ``model`` are unwrapped, also one within another.

    Raises:
        CheckpointError: missing, damaged, or it holds anything else than tensors; the message says what.
    """
    file = Path(path)
    if file.is_dir() or file.suffix in (".safetensors", ".json"):
        return load_tensors(file)
    import torch

    try:
        with file.open("rb") as handle:
            if handle.read(8) == b"version ":
                raise CheckpointError(f"{path} is a Git LFS pointer, not the tensors; run: git lfs pull")
        with plain_tensors():
            found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (CheckpointError, MemoryError):
        raise
    except UserWarning as error:
        raise CheckpointError(f"{path} holds complex or sparse tensors, wanted plain ones") from error
    except Exception as error:
        reason = _REASON.search(str(error))
        if reason and "operand" not in reason[0]:
            name = reason[0].removeprefix("Unsupported global: ")
            raise CheckpointError(
                f"{path} holds more than tensors ({name}) and was not loaded: a pickle of objects can run "
                "any code; ask its author for a state_dict or safetensors"
            ) from error
        raise CheckpointError(
            f"{path} is damaged or no checkpoint of tensors: {type(error).__name__}"
        ) from error
    for _ in range(2):
        key = next(
            (w for w in _WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(w), Mapping)), None
        )
        found = found if key is None else found[key]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, wanted a state_dict of tensors")
    other = {k: type(v).__name__ for k, v in found.items() if not isinstance(v, torch.Tensor)}
    if other or not all(isinstance(key, str) for key in found):
        raise CheckpointError(
            f"{path} holds more than tensors: {dict(list(other.items())[:5]) or list(found)[:5]}"
        )
    state = dict(cast("Mapping[str, Tensor]", found))
    if odd := next((k for k, v in state.items() if v.is_complex() or v.layout != torch.strided), None):
        raise CheckpointError(f"{path} holds complex or sparse tensors ({odd}), wanted plain ones")
    return state


class KeyMap:
    r"""Rename the tensors of a foreign checkpoint by rules.

    Args:
        rules: ``(regex, replacement)`` in order, each applied with ``re.sub`` to the name so far; a
            replacement None drops the tensors whose name the regex finds.
        strip: prefixes taken off first, as often as they occur.

    Raises:
        InputError: a rule is no valid regular expression.

    Example:
        >>> import torch
        >>> keys = KeyMap([(r"^fc\.", "head."), (r"num_batches", None)])
        >>> list(keys.apply({"module.fc.bias": torch.zeros(1), "num_batches": torch.zeros(())}))
        ['head.bias']
        >>> keys.report()
        {'renamed': {'module.fc.bias': 'head.bias'}, 'dropped': ['num_batches'], 'unused': []}
    """

    def __init__(
        self,
        rules: Sequence[tuple[str, str | None]] = (),
        strip: Sequence[str] = ("module.", "_orig_mod."),
    ) -> None:
        try:
            self._rules = [(re.compile(pattern), new) for pattern, new in rules]
        except re.error as error:
            raise InputError(f"rules has {error.pattern!r}, no regular expression: {error}") from error
        self._strip = tuple(strip)
        self._report: dict[str, Any] = {"renamed": {}, "dropped": [], "unused": []}

    def _name(self, key: str, used: set[str]) -> str | None:
        while prefix := next((p for p in self._strip if p and key.startswith(p)), None):
            key = key.removeprefix(prefix)
        for pattern, new in self._rules:
            if not pattern.search(key):
                continue
            used.add(pattern.pattern)
            if new is None:
                return None
            key = pattern.sub(new, key)
        return key

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state under its new names.

        Raises:
            CheckpointError: two tensors would get the same name.
        """
        used: set[str] = set()
        names = {key: self._name(key, used) for key in state}
        origin: dict[str, str] = {}
        for key, name in names.items():
            if name is not None and origin.setdefault(name, key) != key:
                raise CheckpointError(
                    f"{origin[name]!r} and {key!r} would both be named {name!r}; mend the rules"
                )
        self._report = {
            "renamed": {key: name for key, name in names.items() if name not in (None, key)},
            "dropped": [key for key, name in names.items() if name is None],
            "unused": [p.pattern for p, _ in self._rules if p.pattern not in used],
        }
        return {name: state[key] for name, key in origin.items()}

    def report(self) -> dict[str, Any]:
        """What the last :meth:`apply` did: names changed, names dropped, rules that met no tensor."""
        return self._report


def load_strict(module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state into a module; on any misfit the module stays as it was.

    Raises:
        CheckpointError: lists the missing, the extra, the differently shaped and the complex tensors.
    """
    own: dict[str, Any] = module.state_dict()
    shapes = [
        f"{key} {tuple(getattr(state[key], 'shape', ()))} for {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and hasattr(value, "shape") and getattr(state[key], "shape", None) != value.shape
    ]
    lists = {"missing": sorted(own.keys() - state.keys()), "extra": sorted(state.keys() - own.keys())}
    kinds = {key: (_is_complex(value), _is_complex(state[key])) for key, value in own.items() if key in state}
    lists |= {"of another shape": shapes, "complex": [k for k, (ours, its) in kinds.items() if its > ours]}
    problems = [
        f"{len(names)} {word}: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")
        for word, names in lists.items()
        if names
    ]
    if problems:
        raise CheckpointError(f"state does not fit {type(module).__name__}; " + "; ".join(problems))
    module.load_state_dict(dict(state))


def _is_complex(value: Any) -> bool:
    return getattr(getattr(value, "dtype", None), "is_complex", False)


def check_config(folder: PathLike) -> None:
    """Refuse a folder of transformers whose ``config.json`` asks for what fails late, or without end.

    Args:
        folder: what ``from_pretrained`` takes; a name on the hub, or a folder without the file, passes.

    Raises:
        CheckpointError: a count of layers below 0 or above 10,000, a dropout outside [0, 1], or NaN; the file
            is named.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return
    with reading(path, "cannot be read", CheckpointError):
        _check_config(json.loads(path.read_text("utf-8")))


def _check_config(config: Any) -> None:
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            _check_config(value)
        elif isinstance(value, int | float):
            most = _MOST_LAYERS if _LAYERS.search(name) else 1 if _DROPOUT.search(name) else None
            if value != value or (most is not None and not 0 <= value <= most):
                wanted = "a number" if most is None else f"0 to {most}"
                raise CheckpointError(f"{name} is {value}, wanted {wanted}")


def digest(*objects: Any) -> str:
    """Sha256 of nested plain values, arrays and tensors: the same in every process and on every machine.

    The order of dictionary keys and set members does not count, a tuple counts as a list, an array as the
    CPU tensor of the same dtype and shape; ``1``, ``1.0``, ``True`` and ``"1"`` differ.

    Raises:
        InputError: an object has no stable contents (a function, a module); the message names its type.

    Example:
        >>> digest({"a": 1, "b": [2.0, None]})[:12] == digest({"b": (2.0, None), "a": 1})[:12]
        True
    """
    return _hash(list(objects)).hex()


def _hash(value: Any) -> bytes:
    sha = hashlib.sha256()
    for part in _parts(value):
        # Each part goes in with its length, so that no two values give the same bytes.
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.digest()


def _parts(value: Any) -> list[Any]:
    torch = sys.modules.get("torch")
    tensors = (np.ndarray, torch.Tensor) if torch else (np.ndarray,)
    if isinstance(value, enum.Enum):
        return [b"enum", _hash(value.value)]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return [b"none"]
    for plain in (str, bool, int, float):
        if isinstance(value, plain):
            return [plain.__name__.encode(), repr(plain(value)).encode()]
    if isinstance(value, bytes | bytearray):
        return [b"bytes", value]
    if isinstance(value, tensors) and dtype_name(value) != "object":
        return [b"array", dtype_name(value).encode(), repr(tuple(value.shape)).encode(), raw_bytes(value)]
    if isinstance(value, Mapping):
        return [b"map", *sorted(_hash([key, item]) for key, item in value.items())]
    if isinstance(value, set | frozenset):
        return [b"set", *sorted(_hash(item) for item in value)]
    if isinstance(value, Sequence):
        return [b"list", *(_hash(item) for item in value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [b"dataclass", type(value).__qualname__.encode(), _hash(fields)]
    if isinstance(value, PurePath):
        return [b"path", value.as_posix().encode()]
    if torch and isinstance(value, torch.dtype | torch.device):
        return [type(value).__name__.encode(), str(value).encode()]
    raise InputError(f"digest got a {type(value).__name__}, wanted plain values, arrays and tensors")


def digest_file(path: PathLike) -> str:
    """Sha256 of a file's bytes, read by the piece.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def digest_state(state: Mapping[str, Tensor]) -> str:
    """Sha256 of a state: names, dtypes, shapes and bytes, whatever the order of its keys.

    Example:
        >>> import torch
        >>> a, b = torch.zeros(2), torch.ones(3)
        >>> digest_state({"a": a, "b": b}) == digest_state({"b": b, "a": a})
        True
    """
    return digest(dict(state))

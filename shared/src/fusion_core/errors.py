"""One family of errors for all packages, and the checks at the border that raise them.

Every message names the argument, what it got and what it takes. :class:`InputError` is the base of every
complaint about what a caller gave; a package may subclass it under its field's name.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


LARGEST = 1e9
"""The most that a setting may be whose field names no bound: float32 has room for its square."""
LARGEST_SEED = 2**63 - 1
"""The most that PyTorch takes for a seed."""


class FusionError(Exception):
    """Base of every error that the fusion packages raise on purpose."""


class InputError(FusionError, ValueError):
    """What the caller gave cannot be used; the message says what would be."""


class ShapeError(InputError):
    """A tensor or array has the wrong shape."""


class DataError(InputError):
    """Labels, samples or files hold values outside what the function takes."""


class NonFiniteError(InputError):
    """A tensor holds NaN or infinity where finite numbers are needed."""


class ConfigError(InputError):
    """A setting is unknown, of the wrong type or out of range."""


class CheckpointError(FusionError):
    """A checkpoint is missing, truncated, unsafe or does not fit the module."""


class StoreError(FusionError):
    """A store or cache on disk is broken or was made from something else."""


class MissingExtraError(FusionError, ImportError):
    """An optional dependency is not installed; the message holds the install line."""


class FusionWarning(UserWarning):
    """Something was mended or ignored on the caller's behalf."""


@contextmanager
def naming(path: str | os.PathLike[str] | None) -> Generator[None, None, None]:
    """Let every error of the family inside name a file: the one that asked for what went wrong.

    Args:
        path: the file; None if there is none to name.

    Raises:
        FusionError: the error inside, of its own class.

    Example:
        >>> with naming("run.toml"):
        ...     raise ConfigError("geometry is 'x', wanted 'auto'")
        Traceback (most recent call last):
        fusion_core.errors.ConfigError: run.toml: geometry is 'x', wanted 'auto'
    """
    name = "" if path is None else os.fspath(path)
    try:
        yield
    except MissingExtraError:
        raise
    except FusionError as found:
        if name in str(found):
            raise
        raise type(found)(f"{name}: {found}") from found


@contextmanager
def reading(
    path: str | os.PathLike[str], fault: str = "cannot be read", error: type[FusionError] = InputError
) -> Generator[None, None, None]:
    """Tell of whatever goes wrong while a caller's file is read as one error that names the file.

    Parsers raise what they like on garbage: a ``KeyError`` here, a ``RecursionError`` there. An error of the
    family keeps its class; where it names the file already it passes as it is.

    Args:
        path: the file.
        fault: what is said of it; the reason follows.
        error: the class of the error.

    Raises:
        FusionError: of the class ``error``, or of the family's error inside.

    Example:
        >>> import json
        >>> with reading("a.json", "is damaged", CheckpointError):
        ...     json.loads("{")["weights"]
        Traceback (most recent call last):
        fusion_core.errors.CheckpointError: a.json is damaged: Expecting property name enclosed in ...
    """
    name = os.fspath(path)
    try:
        with naming(path):
            yield
    except FusionError:
        raise
    except OSError as found:
        raise error(f"{name} {fault}: {found.strerror or found}") from found
    except BaseException as found:
        if not isinstance(found, Exception) and type(found).__name__ != "PanicException":  # Rust gave up
            raise
        words = " ".join(str(found).split())[:300]
        if not isinstance(found, ValueError) or not words:
            words = f"{type(found).__name__} {words}".strip()
        raise error(f"{name} {fault}: {words}") from found


def require_extra(module: str, extra: str, package: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: the module to import, such as ``"matplotlib.pyplot"``.
        extra: the extra of ``package`` that brings it.
        package: the distribution that declares the extra.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: the module's top-level package is not installed.

    Example:
        >>> require_extra("json", "plot", "kd-trilateral").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f'{error.name} is not installed; it comes with: pip install "{package}[{extra}]"'
        ) from error


def check_shape(name: str, tensor: Tensor, dims: str, **sizes: int) -> dict[str, int]:
    """Check a tensor's shape against named dimensions.

    Args:
        name: the argument's name, for the message.
        tensor: any object with a ``shape``.
        dims: space-separated names, such as ``"batch classes"``; a number stands for itself, a leading
            ``"..."`` takes any number of dimensions.
        **sizes: sizes that some names must have.

    Returns:
        The size of each named dimension.

    Raises:
        ShapeError: another number of dimensions, or another size.

    Example:
        >>> import torch
        >>> check_shape("logits", torch.zeros(2, 5), "batch classes", classes=5)
        {'batch': 2, 'classes': 5}
    """
    shape = tuple(int(size) for size in tensor.shape)
    names = dims.split()
    tail = shape
    if names and names[0] == "...":
        names = names[1:]
        tail = shape[max(len(shape) - len(names), 0) :]
    found: dict[str, int] = {}
    fits = len(tail) == len(names)
    if fits:
        for dim, size in zip(names, tail, strict=True):
            wanted = int(dim) if dim.isdigit() else sizes.get(dim, found.get(dim, size))
            fits = fits and size == wanted
            if not dim.isdigit():
                found[dim] = size
    if not fits:
        told = ", ".join(f"{dim}={size}" for dim, size in sizes.items())
        raise ShapeError(f"{name} has shape {shape}, wanted ({dims})" + (f" with {told}" if told else ""))
    return found


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise unless every entry is finite; costs one device synchronisation, so keep it off hot paths.

    Raises:
        NonFiniteError: names the first bad position and the number of bad entries.
    """
    import torch

    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteError(
            f"{name} holds {int(bad.sum())} non-finite values of {tensor.numel()}, the first at {first}; "
            "it takes finite numbers"
        )


def check_range(
    name: str,
    value: float,
    low: float,
    high: float = LARGEST,
    *,
    open: bool = False,  # noqa: A002
) -> float:
    """Check that a number lies in [low, high], or in (low, high) with ``open=True``.

    Returns:
        The value, so that the check can stand in an expression.

    Raises:
        ConfigError: the value is outside, or not a number.

    Example:
        >>> check_range("temperature", 4.0, 0.0, float("inf"), open=True)
        4.0
    """
    inside = low < value < high if open else low <= value <= high
    if not inside:
        left, right = ("(", ")") if open else ("[", "]")
        raise ConfigError(f"{name} is {value!r}, wanted a number in {left}{low:g}, {high:g}{right}")
    return value


def check_text(name: str, value: str) -> str:
    """Check that a text can be written and tokenized, which scraped JSON and other encodings may not be.

    Returns:
        The text.

    Raises:
        InputError: it holds half a surrogate pair.

    Example:
        >>> check_text("prompt", "a cup")
        'a cup'
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds half a surrogate pair at {error.start}, which is no text: {value[:80]!r}"
        ) from error
    return value

"""Which device and dtype to compute on, said in one word and refused in one sentence."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from fusion_core.errors import ConfigError, InputError

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_VERSIONS = ("fusion-core", "torch", "numpy", "transformers")


def _present() -> list[str]:
    found = ["cpu"]
    found += [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    return found


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that a word names, after a look at what is there.

    Args:
        device: ``"auto"`` (first CUDA, else MPS, else CPU), ``"cpu"``, ``"cuda"``, ``"cuda:i"``, ``"mps"``
            or a ``torch.device``.

    Raises:
        InputError: no such device here; the message lists those that are.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    present = _present()
    if device == "auto":
        return torch.device("cuda:0" if "cuda:0" in present else "mps" if "mps" in present else "cpu")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {device!r}, wanted 'auto' or one of {present}") from error
    name = {"cuda": "cuda:0", "mps:0": "mps", "cpu:0": "cpu"}.get(str(wanted), str(wanted))
    if name not in present:
        raise InputError(f"device {str(wanted)!r} is not on this machine, which has {present}")
    return wanted


def resolve_dtype(dtype: str | torch.dtype = "auto", device: str | torch.device | None = None) -> torch.dtype:
    """The compute dtype that a word names.

    Args:
        dtype: ``"auto"`` (bfloat16 on CUDA devices that have it, else float32), a name or a ``torch.dtype``.
        device: where the computation runs; only ``"auto"`` and the MPS check look at it.

    Raises:
        ConfigError: not a floating dtype that the packages compute in, or float64 on MPS.

    Example:
        >>> resolve_dtype("bfloat16")
        torch.bfloat16
    """
    where = resolve_device("cpu" if device is None else device)
    if dtype == "auto":
        half = where.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, wanted 'auto' or one of {sorted(_DTYPES)}")
    if name == "float64" and where.type == "mps":
        raise ConfigError("dtype is 'float64', which MPS does not have; take float32, or device='cpu'")
    return _DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """A ``torch.autocast`` context for a compute dtype; does nothing for float32 and float64."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype if half else None, enabled=half)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its queued work (for timing)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_left(device: torch.device) -> int | None:
    """Free memory of a device in bytes, or None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


@contextmanager
def threads(count: int = 1) -> Generator[None, None, None]:
    """Torch on so many threads inside the block, or inside the function that this decorates.

    Tiny networks gain nothing from a second thread, and lose much where another process holds its core.

    Example:
        >>> with threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, Any]:
    """What a number was measured on: Python, OS, processor, threads, devices and versions."""
    versions: dict[str, str] = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _present(),
        "accelerators": accelerators,
        "versions": versions,
    }

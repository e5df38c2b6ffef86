"""Random streams that depend on a seed and a key only, never on global state, rank or order."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # numpy's streams do not need it
    import torch

Key = int | str


def _entropy(seed: int, key: tuple[Key, ...]) -> int:
    text = repr((int(seed), *key)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def generator(seed: int, *key: Key, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for the stream that ``seed`` and ``key`` name.

    The same arguments give the same stream whatever else was drawn before, on any rank and in any order.

    Example:
        >>> import torch
        >>> first, again = (torch.rand(1, generator=generator(0, "noise", 3)) for _ in range(2))
        >>> bool(first == again)
        True
    """
    import torch

    return torch.Generator(device=device).manual_seed(_entropy(seed, key))


def rng(seed: int, *key: Key) -> np.random.Generator:
    """A numpy generator for the stream that ``seed`` and ``key`` name; see :func:`generator`."""
    return np.random.default_rng(_entropy(seed, key))


@contextmanager
def deterministic() -> Generator[None, None, None]:
    """Run the block with deterministic algorithms only; the former settings come back afterwards."""
    import torch

    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]


def rng_state() -> dict[str, Any]:
    """The state of the global generators of python, numpy, torch and every CUDA device."""
    import torch

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global state is what is being saved
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    import torch

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])

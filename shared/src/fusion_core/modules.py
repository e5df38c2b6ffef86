"""Using other people's modules without leaving a trace, and finding them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusion_core.errors import InputError, ShapeError
from fusion_core.seeding import restore_rng, rng_state

_NAMES = 8  # of a module are shown where one is not there, the likeliest first


@contextmanager
def untouched(
    *modules: nn.Module,
    eval: bool = True,  # noqa: A002 - the word of torch
    frozen: bool = True,
    buffers: bool = False,
    rng: bool = False,
) -> Generator[None, None, None]:
    """Use modules inside the block and find them as they were after it, also after an exception.

    The training mode of every submodule, ``requires_grad`` and ``.grad`` (the same object with the same
    values: inside the block it starts as None) come back. Weights are not copied.

    Args:
        *modules: the modules.
        eval: put them into evaluation mode inside the block.
        frozen: let no parameter require a gradient inside the block.
        buffers: bring the buffers back too (running statistics); costs a copy of them.
        rng: bring the global random states of python, numpy and torch back too.

    Raises:
        InputError: an argument is no module.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with untouched(layer):
        ...     layer.training, layer.weight.requires_grad
        (False, False)
        >>> layer.training, layer.weight.requires_grad
        (True, True)
    """
    if wrong := [type(m).__name__ for m in cast("tuple[Any, ...]", modules) if not isinstance(m, nn.Module)]:
        raise InputError(f"modules has a {wrong[0]}, wanted torch.nn.Module")
    parts = list({id(part): part for module in modules for part in module.modules()}.values())
    parameters = {id(p): p for part in parts for p in part.parameters(recurse=False)}.values()
    modes = [(part, part.training) for part in parts]
    grads = [(p, p.requires_grad, p.grad) for p in parameters]
    named = [(part, name, b) for part in parts for name, b in part.named_buffers(recurse=False)]
    kept = [(part, name, b, b.detach().clone()) for part, name, b in named] if buffers else []
    state = rng_state() if rng else None
    try:
        for part, _ in modes if eval else ():
            part.training = False
        for parameter, _, _ in grads:
            parameter.grad = None
            if frozen:
                parameter.requires_grad_(False)
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, required, grad in grads:
            parameter.requires_grad_(required)
            parameter.grad = grad
        with torch.no_grad():
            for part, name, buffer, copy in kept:
                buffer.copy_(copy)
                setattr(part, name, buffer)
        if state is not None:
            restore_rng(state)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, ``.logits``, ``["logits"]`` or the first item.

    Raises:
        ShapeError: none of these is a tensor.

    Example:
        >>> logits_of({"loss": None, "logits": torch.zeros(2)})
        tensor([0., 0.])
    """
    found = output
    if not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = output.get("logits")
        elif found is None and isinstance(output, tuple | list) and output:
            found = output[0]
    if not isinstance(found, Tensor):
        raise ShapeError(
            f"the model returned a {type(output).__name__} without logits; wanted a tensor, .logits, "
            "['logits'] or a tuple that starts with them"
        )
    return found


def load_object(path: str, what: str = "") -> Any:
    """The object that ``"module:name"`` names; modules in the current directory are found too.

    Args:
        path: an importable module, a colon, and a name in it (dots lead further in).
        what: the argument or setting that named it, for the message.

    Raises:
        InputError: not of that form, no such module, or no such name; the message lists names like it.

    Example:
        >>> load_object("math:sqrt")(9.0)
        3.0
    """
    shown = f"{what} {path!r}".lstrip()
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise InputError(f"{shown} names no object, wanted 'module:name' such as 'my_models:build'")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()  # the file may be younger than the last look at the directory
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        files = sorted(file.stem for file in Path(here).glob("*.py"))
        raise InputError(f"{shown}: no module {error.name!r}; the current directory has {files}") from error
    finally:
        sys.path.remove(here)
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError as error:
        public = _public(module)
        likely = get_close_matches(name, public, _NAMES, 0.0)
        more = f" and {len(public) - len(likely)} more" if len(public) > len(likely) else ""
        raise InputError(f"{shown}: {module_name} has no {name!r}; it has {likely}{more}") from error


def _public(module: ModuleType) -> list[str]:
    """A module's names, without what it imports."""
    own = [
        word
        for word, value in vars(module).items()
        if not word.startswith("_")
        and not isinstance(value, ModuleType)
        and getattr(value, "__module__", module.__name__) == module.__name__
    ]
    return sorted(getattr(module, "__all__", own))

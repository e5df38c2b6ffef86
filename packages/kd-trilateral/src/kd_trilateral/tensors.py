"""Operations on lists of tensors, one fused call each, and gradients without holes."""
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor


def copy_(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """``to[i] <- source[i]`` for all i, without a graph."""
    with torch.no_grad():
        torch._foreach_copy_([t.detach() for t in to], [t.detach() for t in source])


@contextmanager
def same_version(tensors: Sequence[Tensor]) -> Generator[None, None, None]:
    """Hide in-place changes from graphs that saved the tensors; the block must undo them before it ends."""
    with torch.autograd._unsafe_preserve_version_counter(tuple(tensors)):
        yield


def add_(to: Sequence[Tensor], other: Sequence[Tensor], scale: float = 1.0) -> None:
    """``to[i] <- to[i] + scale * other[i]`` for all i, without a graph."""
    with torch.no_grad():
        torch._foreach_add_(list(to), list(other), alpha=scale)


def mul_(to: Sequence[Tensor], factor: Tensor) -> None:
    """``to[i] <- to[i] * factor`` for all i, with a factor that stays on its device."""
    with torch.no_grad():
        torch._foreach_mul_(list(to), factor)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """One Euclidean norm over all entries of all tensors, ``()``, on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """One inner product over all entries of all tensors, ``()``."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """``torch.autograd.grad`` with zeros where an input plays no part."""
    found = torch.autograd.grad(
        outputs,
        list(inputs),
        grad_outputs,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )
    holes = cast("tuple[Tensor | None, ...]", found)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(holes, inputs, strict=True)]

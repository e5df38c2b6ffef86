"""Warps between two augmented views of one image: metric depth stays, pixels move (section 2.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_core.errors import ShapeError

__all__ = ["ViewLike", "warp"]

ViewLike = Sequence[float] | Tensor
_SLACK = 1e-9  # pixels


def _numbers(name: str, view: ViewLike, batch: int, device: torch.device) -> Tensor:
    wide = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.as_tensor(view, device=device).to(wide)
    if numbers.ndim == 1:
        numbers = numbers[None].expand(batch, -1)
    if numbers.ndim != 2 or numbers.shape[0] != batch or numbers.shape[1] not in (6, 7):
        raise ShapeError(
            f"{name} has shape {tuple(numbers.shape)}, wanted ({batch}, 6): x0, y0, w, h, new_w, new_h, or "
            f"({batch}, 7) with hflip"
        )
    flip = numbers[:, 6:] if numbers.shape[1] == 7 else torch.zeros_like(numbers[:, :1])
    return torch.cat([numbers[:, :6], flip], dim=1)


def _positions(target: Tensor, source: Tensor, axis: int, count: int) -> tuple[Tensor, Tensor]:
    """Where in the source the pixels of one axis of the target lie, (batch, count), and whether inside."""
    start_1, length_1, new_1 = (source[:, axis + 2 * i, None] for i in range(3))
    start_2, length_2, new_2 = (target[:, axis + 2 * i, None] for i in range(3))
    pixel = torch.arange(count, dtype=target.dtype, device=target.device)[None]
    inside = pixel <= new_2 - 1
    if axis == 0:
        pixel = torch.where(target[:, 6:] > 0, new_2 - 1 - pixel, pixel)
    found = ((pixel + 0.5) * (length_2 / new_2) + start_2 - start_1) * (new_1 / length_1) - 0.5
    inside = inside & (found >= -_SLACK) & (found <= new_1 - 1 + _SLACK)
    if axis == 0:
        found = torch.where(source[:, 6:] > 0, new_1 - 1 - found, found)
    return found, inside


def _sample(values: Tensor, positions: Tensor, dim: int) -> Tensor:
    last = values.shape[dim] - 1
    low = positions.floor().clamp(0, max(last - 1, 0))
    share = (positions - low).clamp(0.0, 1.0).to(values.dtype)
    shape = [values.shape[0], 1, 1, 1]
    shape[dim] = positions.shape[1]
    index = low.long().view(shape)
    sizes = list(values.shape)
    sizes[dim] = positions.shape[1]
    left = values.gather(dim, index.expand(sizes))
    right = values.gather(dim, (index + 1).clamp(max=last).expand(sizes))
    return torch.lerp(left, right, share.view(shape).expand(sizes))


def warp(
    depth: Float[Tensor, "... h1 w1"], view_1: ViewLike, view_2: ViewLike, size: tuple[int, int]
) -> tuple[Float[Tensor, "... h2 w2"], Bool[Tensor, "... h2 w2"]]:
    """Sample a map of view 1 at the pixels of view 2, bilinearly.

    Column ``u2`` of view 2 lies at ``u1 = ((u2 + 1/2)/s2 + x0_2 - x0_1) s1 - 1/2`` of view 1, rows likewise.

    Args:
        depth: (batch, channels, h1, w1) or (h1, w1).
        view_1: ``[x0, y0, w, h, new_w, new_h]``: a crop, resized; a seventh entry 1 mirrors it afterwards.
            One view for all, or (batch, 6 or 7).
        view_2: the same of the other view.
        size: ``(h2, w2)`` of the result, pixels.

    Returns:
        The sampled map, 0 where not valid, and where it is valid: inside the hull of view 1's pixel centers.

    Raises:
        ShapeError: a view that is not 6 or 7 numbers per image.
    """
    maps = depth[None, None] if depth.ndim == 2 else depth
    source = _numbers("view_1", view_1, maps.shape[0], maps.device)
    target = _numbers("view_2", view_2, maps.shape[0], maps.device)
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    columns, inside_columns = _positions(target, source, 0, size[1])
    rows, inside_rows = _positions(target, source, 1, size[0])
    found = _sample(_sample(wide, rows, 2), columns, 3)
    valid = (inside_rows[:, None, :, None] & inside_columns[:, None, None, :]).expand_as(found)
    found = torch.where(valid, found, torch.zeros_like(found))
    return (found[0, 0], valid[0, 0]) if depth.ndim == 2 else (found, valid)

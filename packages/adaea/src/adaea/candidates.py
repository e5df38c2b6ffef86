"""The K x K forwards of exact AGM: every surrogate on every surrogate's candidate, in as few calls as fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaea.losses import cross_entropy
from adaea.surrogates import Surrogate
from fusion_core.batching import map_batches
from fusion_core.device import autocast, resolve_dtype

View = Callable[[Tensor], Tensor]


@torch.no_grad()
def candidate_losses(
    surrogates: Sequence[Surrogate],
    candidates: Float[Tensor, "candidates batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    chunk: int | None = None,
    dtype: str | torch.dtype | None = None,
    views: Sequence[View | None] | None = None,
) -> tuple[Float[Tensor, "surrogates candidates batch"], int | None]:
    """Cross-entropy of every surrogate on every candidate, without graphs.

    Args:
        surrogates: frozen.
        candidates: ``(candidates, batch, channels, height, width)``.
        labels: ``(batch,)``.
        chunk: most images per forward; all at once by default. Halved where the memory does not hold it.
        dtype: autocast the forwards to this half dtype; weights need about three digits.
        views: per surrogate a transform of the candidates, or None.

    Returns:
        ``(surrogates, candidates, batch)``, and the chunk that fitted, None where all did.

    Raises:
        FusionError: a single image does not fit the memory; the chunk is named.
    """
    flat = candidates.flatten(0, 1)
    repeated = labels.repeat(candidates.shape[0])
    size = chunk or len(flat)
    largest = size
    rows: list[Tensor] = []
    for k, surrogate in enumerate(surrogates):
        view = views[k] if views else None
        place = surrogate.device or flat.device
        half = resolve_dtype(dtype) if dtype is not None else torch.float32
        seen: list[int] = []

        def losses(
            batch: tuple[Tensor, Tensor],
            surrogate: Surrogate = surrogate,
            view: View | None = view,
            place: torch.device = place,
            half: torch.dtype = half,
            seen: list[int] = seen,
        ) -> Tensor:
            images, wanted = batch
            with autocast(place, half):
                logits = surrogate(images if view is None else view(images))
            seen.append(len(images))
            return cross_entropy(logits, wanted)

        rows.append(torch.cat(list(map_batches(losses, (flat, repeated), largest))))
        largest = max(seen)
    return torch.stack(rows).unflatten(1, candidates.shape[:2]), largest if largest < len(flat) else None

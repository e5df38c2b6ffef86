"""The fused judge on memes: texts and pictures in, scores out, on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.batching import map_batches
from fusion_core.errors import CheckpointError, reading

from .ablations import fields_of
from .composing import First
from .encoding import Encoded, collate, encode_fields, stack_pixels
from .features import Features
from .judge import Judge
from .meme import Debate, Meme

__all__ = ["encode", "gather", "score_memes", "share_of_rank"]

Floats = NDArray[np.float64]


def encode(
    judge: Judge,
    memes: Sequence[Meme],
    debates: Sequence[Debate | None],
    *,
    first: First = "verdict",
    without: bool = False,
) -> list[Encoded]:
    """The tokens that the judge reads of each meme.

    Args:
        judge: its tokenizer and settings.
        memes: N memes.
        debates: N debates, None = without.
        first: see :func:`meme_debate.composing.order`.
        without: leave every debate out.
    """
    settings = judge.settings
    parts = [
        fields_of(
            meme,
            None if without else debate,
            first=first,
            caption=settings.caption,
            ablation=settings.ablation,
        )
        for meme, debate in zip(memes, debates, strict=True)
    ]
    with reading("the judge's tokenizer/tokenizer.json", "cannot be used", CheckpointError):
        return encode_fields(
            judge.tokenizer, parts, max_length=settings.max_length, truncate=settings.truncate
        )


def pad_id(judge: Judge) -> int:
    """The token that pads, 0 where the tokenizer names none."""
    found = getattr(judge.tokenizer, "pad_token_id", None)
    return int(found) if found is not None else 0


def score_memes(
    judge: Judge,
    memes: Sequence[Meme],
    debates: Sequence[Debate | None],
    *,
    first: First = "verdict",
    calibrated: bool = True,
    features: Features | None = None,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Floats:
    """Scores (N,) of memes with their debates, each meme once and in order, whatever the batches.

    Args:
        judge: in any mode; it is put into eval mode.
        memes: N memes.
        debates: N debates, None = without.
        first: see :func:`meme_debate.composing.order`.
        calibrated: whether the judge's temperature is applied.
        features: states of the N pictures, from :func:`meme_debate.features.image_features`; None computes
            them here.
        batch_size: memes a forward pass; texts of like length go together.
        progress: True shows a bar.

    Raises:
        InputError: a picture cannot be read.
        CheckpointError: the judge has no tokenizer, or its weights give scores that are not finite.
    """
    if not memes:
        return np.zeros(0)
    encoded = encode(judge, memes, debates, first=first)
    order = sorted(range(len(memes)), key=lambda i: -len(encoded[i]))
    weight, pad = judge.clf.weight, pad_id(judge)
    scores = np.zeros(len(memes))
    mode = judge.training
    judge.eval()

    @torch.no_grad()
    def run(rows: Sequence[int]) -> tuple[Sequence[int], Tensor]:
        batch = collate([encoded[i].ids for i in rows], pad)
        batch = {key: value.to(weight.device) for key, value in batch.items()}
        if judge.fusion != "none":
            batch |= picture_batch(judge, memes, rows, features)
        logits = judge(**batch).logits.double()
        return rows, torch.sigmoid(logits[:, 1] - logits[:, 0]).cpu()

    try:
        for rows, found in map_batches(run, order, batch_size, progress=progress):
            scores[list(rows)] = found.numpy()
    finally:
        judge.train(mode)
    if bad := int((~np.isfinite(scores)).sum()):
        raise CheckpointError(
            f"the judge gives {bad} of {len(scores)} memes no finite score; are the weights in its "
            "model.safetensors damaged?"
        )
    return judge.calibration.apply(scores) if calibrated else scores


def picture_batch(
    judge: Judge,
    memes: Sequence[Meme],
    rows: Sequence[int],
    features: Features | None,
    change: Callable[[Any, int], Any] | None = None,
) -> dict[str, Tensor]:
    """``image_features`` or ``pixel_values`` of some memes, on the judge's device.

    Args:
        judge: its tower and settings.
        memes: N memes.
        rows: of them.
        features: states of the N pictures; None gives pixels.
        change: picture and row -> picture, for training; then pixels are given.
    """
    weight = judge.clf.weight
    if features is not None and change is None and judge.settings.image:
        return {"image_features": features[list(rows)].to(weight.device, weight.dtype)}
    sources = [memes[i].image if judge.settings.image else None for i in rows]
    if change is not None:
        sources = [change(source, i) for source, i in zip(sources, rows, strict=True)]
    pixels = stack_pixels(sources, int(judge.vision_config.image_size), judge.settings.normalize)
    return {"pixel_values": pixels.to(weight.device, weight.dtype)}


def share_of_rank(count: int) -> list[int]:
    """The rows of this process: every n-th, so that all processes together have each row once."""
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return list(range(count))
    return list(range(distributed.get_rank(), count, distributed.get_world_size()))


def gather(scores: Floats, count: int) -> Floats:
    """The scores of all rows from those of :func:`share_of_rank`'s rows of each process.

    Args:
        scores: of this process's rows.
        count: rows in all.

    Returns:
        (count,), the same on every process; no row is repeated to fill a batch.
    """
    import torch.distributed as distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return scores
    parts: list[Floats] = [np.zeros(0)] * distributed.get_world_size()
    distributed.all_gather_object(parts, scores)
    found = np.zeros(count)
    for rank, part in enumerate(parts):
        found[rank :: len(parts)] = part
    return found

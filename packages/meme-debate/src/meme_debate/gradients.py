"""Words and patches that moved a fused judge's score: gradient times input, summed over whole words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .ablations import fields_of
from .encoding import collate
from .features import Features
from .fused import encode, pad_id, picture_batch
from .judge import Judge
from .meme import Debate, Meme
from .reasons import Explanation, Patches, Word, strongest

__all__ = ["explain_batch"]

_WORD = re.compile(r"\w+")


def explain_batch(
    judge: Judge,
    memes: Sequence[Meme],
    debates: Sequence[Debate | None],
    rows: range,
    top: int,
    features: Features | None,
) -> list[Explanation]:
    """Words and patches of some memes, in one forward and one backward pass.

    Args:
        judge: in any mode; it comes back in it.
        memes: N memes.
        debates: N debates, None = without.
        rows: of them.
        top: most words a meme.
        features: states of the N pictures; None computes them.
    """
    settings = judge.settings
    part = [memes[i] for i in rows], [debates[i] for i in rows]
    encoded = encode(judge, *part)
    weight = judge.clf.weight
    batch = collate([each.ids for each in encoded], pad_id(judge))
    ids, mask = batch["input_ids"].to(weight.device), batch["attention_mask"].to(weight.device)
    mode = judge.training
    judge.eval()
    try:
        with torch.enable_grad():
            words = judge.text_transformer.shared(ids).detach().requires_grad_()
            image = None
            if judge.fusion != "none":
                seen = picture_batch(judge, memes, list(rows), features)
                states = seen.get("image_features")
                with torch.no_grad():
                    states = judge.image_states(seen["pixel_values"]) if states is None else states
                image = states.detach().requires_grad_()
            logits = judge.from_embeddings(words, mask, image).logits
            inputs = [words] if image is None else [words, image]
            assert logits is not None
            grads = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), inputs)
    finally:
        judge.train(mode)
    moved = [
        (g.double() * x.detach().double()).sum(-1).cpu().numpy() for g, x in zip(grads, inputs, strict=True)
    ]
    found: list[Explanation] = []
    for number, (meme, debate, each) in enumerate(zip(*part, encoded, strict=True)):
        parts = fields_of(meme, debate, caption=settings.caption, ablation=settings.ablation)
        listed = _whole_words(parts, each.fields, each.spans, moved[0][number][: len(each)])
        looked = len(moved) > 1 and meme.image is not None and settings.image
        found.append(Explanation(strongest(listed, top), _patches(moved[1][number]) if looked else None))
    return found


def _whole_words(
    parts: Sequence[tuple[str, str]],
    fields: NDArray[np.int64],
    spans: NDArray[np.int64],
    weights: NDArray[np.float64],
) -> list[Word]:
    """Tokens' weights summed over the words that they are pieces of."""
    found: list[Word] = []
    for number, (tag, value) in enumerate(parts):
        words = [match.span() for match in _WORD.finditer(value)]
        here = (fields == number) & (spans[:, 0] < spans[:, 1])
        if not words or not here.any():
            continue
        starts, ends = (np.array(side) for side in zip(*words, strict=True))
        # a piece may begin with the blank before its word
        place = np.searchsorted(ends, spans[here, 1] - 1, side="right").clip(max=len(words) - 1)
        inside = spans[here, 1] > starts[place]
        sums = np.bincount(place[inside], weights=weights[here][inside], minlength=len(words))
        found += [
            Word(tag.lower(), start, end, float(total))
            for (start, end), total in zip(words, sums, strict=True)
        ]
    return found


def _patches(moved: NDArray[np.float64]) -> Patches:
    side = round((len(moved) - 1) ** 0.5)
    grid: Any = moved[1:].reshape(side, side)
    return Patches((side, side), [[float(value) for value in row] for row in grid])

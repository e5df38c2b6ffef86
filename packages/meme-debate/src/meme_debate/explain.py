"""Which words and patches moved a score: exact for the light judge, by gradients for the fused one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .ablations import fields_of
from .compose import compose_parts
from .encoding import collate, locate
from .features import Features
from .fused import encode, pad_id, picture_batch
from .judge import Judge
from .meme import Debate, Meme
from .text_judge import TextJudge

__all__ = ["Explanation", "Patches", "Word", "explain"]

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Word:
    """A word that moved the score.

    Args:
        field: ``text``, ``caption``, ``harmful`` or ``harmless``.
        start: character in the field.
        end: one past its last character.
        weight: share of the logit; above 0 speaks for harmful.
    """

    field: str
    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Patches:
    """What each patch of the (center square of the) picture did.

    Args:
        grid: rows and columns.
        weights: (rows, columns); above 0 speaks for harmful.
    """

    grid: tuple[int, int]
    weights: list[list[float]]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Words, the strongest first, and patches (None where the judge does not look at a picture)."""

    words: list[Word]
    patches: Patches | None


def explain(
    judge: TextJudge | Judge,
    memes: Sequence[Meme],
    debates: Sequence[Debate | None],
    *,
    top: int = 20,
    batch_size: int = 16,
    features: Features | None = None,
) -> list[Explanation]:
    """Words and patches of each meme.

    For the light judge the weights are exact: over all words they sum to its logit without the intercept. For
    the fused judge they are gradient times input of the difference of the logits: what a small change does,
    not
    what the network would say without the word.

    Args:
        judge: either kind.
        memes: N memes.
        debates: N debates, None = without.
        top: most words a meme.
        batch_size: memes a forward and backward pass.
        features: states of the N pictures; None computes them.
    """
    if isinstance(judge, TextJudge):
        pairs = zip(memes, debates, strict=True)
        return [Explanation(_strongest(_text_words(judge, *pair), top), None) for pair in pairs]
    found: list[Explanation] = []
    for start in range(0, len(memes), batch_size):
        rows = range(start, min(start + batch_size, len(memes)))
        found += _fused(judge, memes, debates, rows, top, features)
    return found


def _strongest(words: list[Word], top: int) -> list[Word]:
    kept = [word for word in words if word.weight != 0.0]
    return sorted(kept, key=lambda word: -abs(word.weight))[:top]


def _text_words(judge: TextJudge, meme: Meme, debate: Debate | None) -> list[Word]:
    settings = judge.settings
    parts = fields_of(meme, debate, caption=settings.caption, ablation=settings.ablation)
    found = judge.word_weights(compose_parts(parts))
    if not found:
        return []
    fields, spans = locate(parts, np.array([(a, b) for a, b, _ in found], np.int64))
    return [
        Word(parts[field][0].lower(), int(start), int(end), weight)
        for field, (start, end), (_, _, weight) in zip(fields, spans, found, strict=True)
        if start < end
    ]


def _fused(
    judge: Judge,
    memes: Sequence[Meme],
    debates: Sequence[Debate | None],
    rows: range,
    top: int,
    features: Features | None,
) -> list[Explanation]:
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
        found.append(Explanation(_strongest(listed, top), _patches(moved[1][number]) if looked else None))
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

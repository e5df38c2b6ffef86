"""Which words and patches moved a score: exact for the light judge, by gradients for the fused one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .ablations import fields_of
from .composing import compose_parts
from .encoding import locate
from .meme import Debate, Meme
from .reasons import Explanation, Patches, Word, strongest
from .text_judge import TextJudge

if TYPE_CHECKING:
    from .features import Features
    from .judge import Judge

__all__ = ["Explanation", "Patches", "Word", "explain"]


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
    not what the network would say without the word.

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
        return [Explanation(strongest(_text_words(judge, *pair), top), None) for pair in pairs]
    from .gradients import explain_batch

    found: list[Explanation] = []
    for start in range(0, len(memes), batch_size):
        rows = range(start, min(start + batch_size, len(memes)))
        found += explain_batch(judge, memes, debates, rows, top, features)
    return found


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

"""The published procedures written down plainly: what the benchmarks compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Path = list[tuple[int, int]]


def plain_dtw(source: Sequence[str], pivot: Sequence[str], tie: str = "fusechat") -> tuple[Path, float]:
    """Dynamic time warping as published: Python loops, one Levenshtein call per pair.

    Args:
        source: token strings, rows.
        pivot: token strings, columns.
        tie: ``"fusechat"`` or ``"fusellm"``.

    Returns:
        The path from (0, 0) to the last pair, and its cost.

    Example:
        >>> plain_dtw(["a", "b"], ["a", "b"])
        ([(0, 0), (1, 1)], 0.0)
    """
    from rapidfuzz.distance import Levenshtein

    infinite = float("inf")
    n, m = len(source), len(pivot)
    table = [[infinite] * (m + 1) for _ in range(n + 1)]
    table[0][0] = 0.0
    for i in range(n):
        above, row = table[i], table[i + 1]
        for j in range(m):
            row[j + 1] = Levenshtein.distance(source[i], pivot[j]) + min(above[j + 1], row[j], above[j])
    table[0][0] = infinite  # outside; the path ends at the first pair
    i, j = n - 1, m - 1
    path = [(i, j)]
    while i or j:
        corner, up, left = (
            (table[i][j], i - 1, j - 1),
            (table[i][j + 1], i - 1, j),
            (table[i + 1][j], i, j - 1),
        )
        order = (corner, left, up) if tie == "fusechat" else (corner, up, left)
        _, i, j = min(order, key=lambda step: step[0])
        path.append((i, j))
    return path[::-1], table[n][m]


def plain_loss(logits: Tensor, labels: Tensor, ids: Tensor, probs: Tensor, lam: float) -> Tensor:
    """The pairwise objective with dense targets, as the published collator and trainer make them.

    Args:
        logits: (batch, tokens, classes).
        labels: (batch, tokens), -100 where nothing is learned.
        ids: (batch, tokens, k) classes of the targets.
        probs: (batch, tokens, k).
        lam: share of the supervised part.
    """
    size = logits.shape[-1]
    dense = torch.zeros(*ids.shape[:2], size, dtype=logits.dtype)
    dense = dense.scatter_add(-1, ids, probs.to(logits.dtype))
    following = labels[:, 1:]
    sft = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, size), following.reshape(-1))
    mask = following != -100
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, size), dense[:, :-1].reshape(-1, size), reduction="none"
    )
    fusion = (each.reshape(mask.shape) * mask).sum() / mask.sum()
    return lam * sft + (1 - lam) * fusion

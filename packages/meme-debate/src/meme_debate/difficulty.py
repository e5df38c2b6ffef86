"""Where the debate helps and where it hurts: memes of which the judge is sure without it, and the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import ShapeError
from fusion_core.stats import mcnemar

__all__ = ["by_difficulty"]

Floats = NDArray[np.float64]
SURE, UNSURE = "sure without debate", "unsure without debate"
ONLY_UNSURE = "all, the unsure half debated only"


def by_difficulty(
    without: Sequence[Floats], with_debate: Sequence[Floats], truth: NDArray[np.int64], level: float = 0.5
) -> list[dict[str, Any]]:
    """Accuracy with and without the debate, for the memes of which the judge is sure without it, and unsure.

    Sure is the half whose scores without a debate are farther from the threshold (ties go to the sure ones).

    Args:
        without: scores (N,) of each seed, from text and picture alone.
        with_debate: scores (N,) of each seed, with the debate.
        truth: labels (N,).
        level: harmful from this score on.

    Returns:
        Rows for the sure half, the unsure half, all memes, and all memes with the unsure half debated only
        (half of the calls): counts and accuracies are means over the seeds, ``helped`` and ``hurt`` count the
        memes of all seeds that the debate put right and wrong, and ``p`` is McNemar's over them for one seed.

    Raises:
        ShapeError: other numbers of seeds or scores.

    Example:
        >>> rows = by_difficulty([np.array([0.1, 0.45])], [np.array([0.2, 0.9])], np.array([0, 1]))
        >>> [(row["helped"], row["accuracy"]) for row in rows][:2]
        [(0, 1.0), (1, 1.0)]
    """
    shapes = {each.shape for each in (*without, *with_debate)}
    if len(without) != len(with_debate) or shapes != {truth.shape}:
        raise ShapeError(
            f"without and with_debate have {len(without)} and {len(with_debate)} seeds of shapes "
            f"{sorted(shapes)}, wanted equally many of shape {truth.shape}"
        )
    parts: dict[str, list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]] = {}
    for alone, debated in zip(without, with_debate, strict=True):
        right = (alone >= level) == (truth == 1)
        right_then = (debated >= level) == (truth == 1)
        margin = np.abs(alone - level)
        sure = margin >= np.median(margin)
        for name, here in ((SURE, sure), (UNSURE, ~sure), ("all", np.ones_like(sure))):
            parts.setdefault(name, []).append((right[here], right_then[here]))
        parts.setdefault(ONLY_UNSURE, []).append((right, np.where(sure, right, right_then)))
    return [_row(name, pairs) for name, pairs in parts.items()]


def _row(name: str, pairs: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> dict[str, Any]:
    helped = sum(int((~before & after).sum()) for before, after in pairs)
    hurt = sum(int((before & ~after).sum()) for before, after in pairs)
    mean = lambda values: float(np.mean(values)) if len(values) else None
    return {
        "memes": name,
        "count": round(float(np.mean([len(before) for before, _ in pairs]))),
        "accuracy_without": mean([before.mean() for before, _ in pairs if len(before)]),
        "accuracy": mean([after.mean() for _, after in pairs if len(after)]),
        "helped": helped,
        "hurt": hurt,
        "p": mcnemar(helped, hurt) if len(pairs) == 1 else None,
    }

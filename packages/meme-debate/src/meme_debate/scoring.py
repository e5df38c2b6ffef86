"""Metrics of binary scores, in NumPy: exact with ties, nan where one class is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusion_core.errors import DataError, NonFiniteError, ShapeError, check_range

__all__ = [
    "check_labels",
    "check_scores",
    "expected_calibration_error",
    "kappa",
    "metrics",
    "reversed_labels",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
REVERSED_AUROC = 0.4


def check_scores(scores: ArrayLike) -> Floats:
    """Scores as float64 (N,).

    Raises:
        ShapeError: not one axis, or empty.
        NonFiniteError: NaN or infinity.
        DataError: outside [0, 1].
    """
    found = np.asarray(scores, np.float64)
    if found.ndim != 1 or found.size == 0:
        raise ShapeError(f"scores has shape {found.shape}, wanted (N,) with N > 0")
    if not np.isfinite(found).all():
        raise NonFiniteError(f"scores holds {int((~np.isfinite(found)).sum())} non-finite values")
    if found.min() < 0 or found.max() > 1:
        raise DataError(f"scores lies in [{found.min():g}, {found.max():g}], wanted [0, 1]")
    return found


def check_labels(labels: ArrayLike, size: int | None = None) -> Ints:
    """Labels as int64 (N,), 1 = harmful.

    Raises:
        ShapeError: not one axis, or another length than ``size``.
        DataError: a label that is neither 0 nor 1 (None included).
    """
    raw: NDArray[Any] = np.asarray(labels)
    if raw.ndim != 1 or (size is not None and len(raw) != size):
        raise ShapeError(f"labels has shape {raw.shape}, wanted ({'N' if size is None else size},)")
    bad = [value for value in raw.tolist() if value not in (0, 1)]
    if bad:
        raise DataError(f"labels holds {len(bad)} values such as {bad[0]!r}, wanted 0 or 1 (1 = harmful)")
    return raw.astype(np.int64)


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def expected_calibration_error(confidence: Floats, correct: NDArray[np.bool_], bins: int = 10) -> float:
    """The mean gap of accuracy and confidence over equal, right-closed bins of the confidence.

    Args:
        confidence: (N,) in [0, 1], of the predicted class.
        correct: (N,) whether the prediction was right.
        bins: (0, 1/bins], (1/bins, 2/bins] ...; a confidence of exactly 0 counts to the first.
    """
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    place = np.searchsorted(edges, confidence, side="left")
    gaps = np.bincount(place, weights=correct.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def metrics(scores: ArrayLike, labels: ArrayLike, threshold: float = 0.5) -> dict[str, float]:
    """Accuracy, F1, ranking and calibration of scores.

    Args:
        scores: (N,) probability of harmful.
        labels: (N,) 1 = harmful, 0 = harmless.
        threshold: predicted harmful where score >= threshold.

    Returns:
        ``accuracy``, ``macro_f1``, ``f1`` (of harmful), ``auroc``, ``auprc`` (average precision) and ``ece``
        (10 bins of the predicted class's confidence). ``auroc`` and ``auprc`` are nan where only one class
        occurs; an F1 without any positive is 0.

    Raises:
        InputError: scores outside [0, 1], labels that are not 0 or 1, or other lengths.

    Example:
        >>> metrics([0.9, 0.2, 0.6], [1, 0, 0])["auroc"]
        1.0
    """
    found = check_scores(scores)
    truth = check_labels(labels, len(found))
    check_range("threshold", threshold, 0.0, 1.0)
    predicted = found >= threshold
    positive = truth == 1
    hits = int((predicted & positive).sum())
    quiet = int((~predicted & ~positive).sum())
    f1 = _ratio(2 * hits, int(predicted.sum()) + int(positive.sum()))
    f1_harmless = _ratio(2 * quiet, int((~predicted).sum()) + int((~positive).sum()))
    correct = predicted == positive
    return {
        "accuracy": float(correct.mean()),
        "macro_f1": (f1 + f1_harmless) / 2,
        "f1": f1,
        "auroc": _auroc(found, positive),
        "auprc": _average_precision(found, positive),
        "ece": expected_calibration_error(np.where(predicted, found, 1 - found), correct),
    }


def _auroc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    count = int(positive.sum())
    if count in (0, len(scores)):
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def _average_precision(scores: Floats, positive: NDArray[np.bool_]) -> float:
    count = int(positive.sum())
    if count in (0, len(scores)):
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # one point for each distinct score
    hits = np.cumsum(positive[order])[last]
    called = np.flatnonzero(last) + 1
    return float(np.sum(np.diff(hits, prepend=0) * hits / called) / count)


def kappa(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Cohen's kappa of two sets of decisions: 1 = always equal, 0 = as by chance, nan = both constant.

    Args:
        one: (N,) decisions.
        other: (N,) decisions about the same memes.

    Example:
        >>> round(kappa(np.array([True, False, True]), np.array([True, False, False])), 3)
        0.4
    """
    agreed = float((one == other).mean())
    chance = float(one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean()))
    return float("nan") if chance == 1 else (agreed - chance) / (1 - chance)


def reversed_labels(found: Mapping[str, float]) -> str | None:
    """The question to ask where labelled data rank the wrong way round, else None.

    Args:
        found: of :func:`metrics`.
    """
    auroc = found["auroc"]
    if auroc < REVERSED_AUROC:
        return f"AUROC is {auroc:.3f}, below {REVERSED_AUROC}: are the labels reversed?"
    return None

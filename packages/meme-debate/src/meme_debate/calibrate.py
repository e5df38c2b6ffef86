"""From scores to decisions: temperature, a threshold by cost, and a band in which a person decides."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusion_core.config import Config
from fusion_core.errors import CheckpointError, ConfigError, DataError, check_range, reading

from .scoring import check_labels, check_scores

__all__ = [
    "Calibration",
    "abstain_band",
    "calibrate",
    "cost_curve",
    "decide",
    "fit_temperature",
    "scale_scores",
    "threshold_by_cost",
]

Floats = NDArray[np.float64]
Decision = Literal["harmful", "harmless", "abstain"]
_EDGE = 1e-12
_COLDEST = 1e-9  # of a temperature: far below, logits over it overflow


def _logit(scores: Floats) -> Floats:
    clipped = np.clip(scores, _EDGE, 1 - _EDGE)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def scale_scores(scores: ArrayLike, temperature: float) -> Floats:
    """Scores with their logits divided by a temperature; the ranking stays.

    Args:
        scores: (N,) in [0, 1].
        temperature: > 0; above 1 makes scores less sure.

    Raises:
        ConfigError: a temperature below 1e-9.

    Example:
        >>> scale_scores([0.5, 0.9], 2.0).round(3).tolist()
        [0.5, 0.75]
    """
    check_range("temperature", temperature, _COLDEST)
    found = check_scores(scores)
    return found if temperature == 1.0 else _sigmoid(_logit(found) / temperature)


def fit_temperature(scores: ArrayLike, labels: ArrayLike) -> float:
    """The temperature of least cross-entropy on held-out scores.

    A golden-section search over log T in [-3, 3]: the cross-entropy is convex in 1 / T.

    Args:
        scores: (N,) that the judge gave memes it did not learn from.
        labels: (N,) 1 = harmful.

    Raises:
        DataError: one class only.
    """
    logits, truth = _logit(check_scores(scores)), check_labels(labels, len(np.asarray(scores)))
    _both(truth, "calibration")
    sign = np.where(truth == 1, 1.0, -1.0)

    def cost(log_t: float) -> float:
        return float(np.logaddexp(0.0, -sign * logits / np.exp(log_t)).mean())

    low, high, golden = -3.0, 3.0, (5**0.5 - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    cost_a, cost_b = cost(a), cost(b)
    for _ in range(60):
        if cost_a <= cost_b:
            high, b, cost_b = b, a, cost_a
            a = high - golden * (high - low)
            cost_a = cost(a)
        else:
            low, a, cost_a = a, b, cost_b
            b = low + golden * (high - low)
            cost_b = cost(b)
    return float(np.exp((low + high) / 2))


def _both(truth: NDArray[np.int64], what: str) -> None:
    if len(np.unique(truth)) < 2:
        raise DataError(
            f"labels for {what} holds only class {int(truth[0])}, wanted harmless and harmful memes"
        )


def cost_curve(
    scores: ArrayLike, labels: ArrayLike, *, miss: float = 1.0, alarm: float = 1.0
) -> tuple[Floats, Floats]:
    """The mean cost a meme at every threshold that makes a difference.

    Args:
        scores: (N,) in [0, 1].
        labels: (N,) 1 = harmful.
        miss: cost of a harmful meme that is called harmless.
        alarm: cost of a harmless meme that is called harmful.

    Returns:
        Thresholds, ascending from 0 to 1 (halfway between neighbouring scores), and the cost at each.

    Raises:
        ConfigError: a negative cost, or both zero.
    """
    for name, value in (("miss", miss), ("alarm", alarm)):
        check_range(name, value, 0.0, float("inf"))
    if miss == alarm == 0:
        raise ConfigError("miss and alarm are both 0, wanted a cost")
    found, truth = check_scores(scores), check_labels(labels, len(np.asarray(scores)))
    distinct = np.unique(found)
    thresholds = np.unique(np.concatenate([[0.0], (distinct[1:] + distinct[:-1]) / 2, [1.0]]))
    harmful, harmless = np.sort(found[truth == 1]), np.sort(found[truth == 0])
    missed = np.searchsorted(harmful, thresholds, side="left")
    alarms = len(harmless) - np.searchsorted(harmless, thresholds, side="left")
    return thresholds, (miss * missed + alarm * alarms) / len(found)


def threshold_by_cost(
    scores: ArrayLike, labels: ArrayLike, *, miss: float = 1.0, alarm: float = 1.0
) -> float:
    """The threshold of least cost; of several the one nearest to alarm / (miss + alarm).

    Example:
        >>> threshold_by_cost([0.2, 0.4, 0.8], [0, 1, 1], miss=5)
        0.30000000000000004
    """
    thresholds, costs = cost_curve(scores, labels, miss=miss, alarm=alarm)
    best = thresholds[costs <= costs.min() + 1e-12]
    return float(best[np.abs(best - alarm / (miss + alarm)).argmin()])


def abstain_band(
    scores: ArrayLike,
    labels: ArrayLike,
    threshold: float = 0.5,
    *,
    coverage: float | None = None,
    max_error: float | None = None,
) -> tuple[float, float] | None:
    """The band of scores around the threshold in which the judge leaves the decision to a person.

    Split conformal on the distance to the threshold: with memes exchangeable with those of the calibration,
    at least ``coverage`` of new ones are decided, or at most ``max_error`` of all new ones decided wrongly.

    Args:
        scores: (N,) of memes that the judge did not learn from.
        labels: (N,) 1 = harmful.
        threshold: harmful where score >= threshold.
        coverage: share that is to be decided, in (0, 1]; 1 means all: no band. Or
        max_error: share that may be decided wrongly, in (0, 1).

    Returns:
        (low, high) within [0, 1], both ends belong to the band; None = every meme is decided. (0, 1) where no
        narrower band keeps ``max_error``.

    Raises:
        ConfigError: not exactly one of ``coverage`` and ``max_error``, or out of range.
    """
    if (coverage is None) == (max_error is None):
        raise ConfigError(f"coverage is {coverage} and max_error {max_error}, wanted exactly one of them")
    found, truth = check_scores(scores), check_labels(labels, len(np.asarray(scores)))
    check_range("threshold", threshold, 0.0, 1.0)
    distance = np.abs(found - threshold)
    widths, count = np.unique(distance), len(found) + 1
    if coverage is not None:
        check_range("coverage", coverage, 0.0, 1.0)
        inside = np.searchsorted(np.sort(distance), widths, side="right")
        fits = widths[(inside + 1) / count <= 1 - coverage]
        return None if fits.size == 0 else _band(found, threshold, float(fits[-1]))
    allowed = check_range("max_error", float(max_error or 0), 0.0, 1.0, open=True)
    wrong = np.sort(distance[(found >= threshold) != (truth == 1)])
    if (len(wrong) + 1) / count <= allowed:
        return None
    outside = len(wrong) - np.searchsorted(wrong, widths, side="right")
    fits = widths[(outside + 1) / count <= allowed]
    return (0.0, 1.0) if fits.size == 0 else _band(found, threshold, float(fits[0]))


def _band(scores: Floats, threshold: float, width: float) -> tuple[float, float]:
    """Ends that are scores themselves where a score lies on them, so that rounding moves none out."""
    inside = scores[np.abs(scores - threshold) <= width]
    low, high = min(threshold - width, float(inside.min())), max(threshold + width, float(inside.max()))
    return max(0.0, low), min(1.0, high)


def decide(score: float, threshold: float, band: tuple[float, float] | None = None) -> Decision:
    """Harmful, harmless or abstain for one score.

    Example:
        >>> decide(0.55, 0.5, (0.4, 0.6)), decide(0.7, 0.5, (0.4, 0.6)), decide(0.5, 0.5)
        ('abstain', 'harmful', 'harmful')
    """
    if band is not None and band[0] <= score <= band[1]:
        return "abstain"
    return "harmful" if score >= threshold else "harmless"


@dataclass(frozen=True)
class Calibration(Config):
    """What turns a judge's raw scores into decisions; ``calibration.json`` beside the judge.

    Args:
        temperature: divides the logits of the scores.
        threshold: harmful where the scaled score >= threshold.
        band: scaled scores that are left to a person, or None.
        size: memes that it was made from; 0 = not calibrated.
        coverage: share decided on them.
        error: share decided wrongly on them.
    """

    temperature: float = 1.0
    threshold: float = 0.5
    band: tuple[float, float] | None = None
    size: int = 0
    coverage: float = 1.0
    error: float | None = None

    def __post_init__(self) -> None:
        self.check_fields("temperature", low=_COLDEST)
        self.check_fields("threshold", "band", "coverage", "error", high=1.0)
        self.check_fields("size")

    @property
    def calibrated(self) -> bool:
        """Whether it was made from data."""
        return self.size > 0

    def apply(self, scores: ArrayLike) -> Floats:
        """Raw scores (N,) -> calibrated scores (N,)."""
        return scale_scores(scores, self.temperature)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read ``calibration.json``.

        Raises:
            CheckpointError: damaged.
            ConfigError: a number outside its range.
        """
        with reading(path, "is damaged", CheckpointError):
            return cls.from_dict(json.loads(Path(path).read_text("utf-8")))


def calibrate(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    miss: float = 1.0,
    alarm: float = 1.0,
    coverage: float | None = None,
    max_error: float | None = None,
) -> Calibration:
    """Temperature, then threshold by cost, then band, on scores of memes that the judge did not learn from.

    Args:
        scores: (N,) raw scores.
        labels: (N,) 1 = harmful.
        miss: cost of a missed harmful meme; with equal costs the threshold stays at 0.5.
        alarm: cost of a false alarm.
        coverage: see :func:`abstain_band`; without it and ``max_error`` there is no band.
        max_error: see :func:`abstain_band`.

    Raises:
        DataError: one class only.
    """
    temperature = fit_temperature(scores, labels)
    scaled, truth = scale_scores(scores, temperature), check_labels(labels)
    threshold = 0.5 if miss == alarm else threshold_by_cost(scaled, truth, miss=miss, alarm=alarm)
    band = None
    if coverage is not None or max_error is not None:
        band = abstain_band(scaled, truth, threshold, coverage=coverage, max_error=max_error)
    decided = np.array([decide(float(score), threshold, band) != "abstain" for score in scaled])
    wrong = ((scaled >= threshold) != (truth == 1)) & decided
    return Calibration(temperature, threshold, band, len(scaled), float(decided.mean()), float(wrong.mean()))

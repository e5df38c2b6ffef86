"""Pictures of scores: whether they are calibrated, and what each threshold would cost (extra ``plot``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusion_core.errors import check_range, require_extra

from .calibrate import cost_curve, threshold_by_cost
from .scoring import check_labels, check_scores, metrics

__all__ = ["plot_costs", "plot_reliability", "reliability"]

Floats = NDArray[np.float64]


def reliability(scores: ArrayLike, labels: ArrayLike, bins: int = 8) -> tuple[Floats, Floats, Floats]:
    """Mean score, share of harmful and number of memes in each of the equal bins that has any.

    Args:
        scores: (N,) in [0, 1].
        labels: (N,) 1 = harmful.
        bins: at least 1.

    Raises:
        InputError: scores outside [0, 1], or labels that are not 0 or 1.
    """
    check_range("bins", bins, 1, float("inf"))
    found = check_scores(scores)
    truth = check_labels(labels, len(found)).astype(np.float64)
    place = np.minimum((found * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    kept = count > 0
    sums = [np.bincount(place, weights=each, minlength=bins)[kept] for each in (found, truth)]
    return sums[0] / count[kept], sums[1] / count[kept], count[kept].astype(np.float64)


def plot_reliability(
    scores: ArrayLike, labels: ArrayLike, ax: Any = None, *, bins: int = 8, name: str = "scores", **style: Any
) -> Any:
    """Draw the score against the share of harmful memes; on the diagonal it is calibrated.

    Args:
        scores: (N,) in [0, 1].
        labels: (N,) 1 = harmful.
        ax: matplotlib axes; new ones by default.
        bins: of the scores.
        name: in the legend, before the calibration error.
        **style: of the line, such as ``color``.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    axes = _axes(ax)
    x, y, _ = reliability(scores, labels, bins)
    error = metrics(scores, labels)["ece"]
    axes.plot(x, y, "o-", label=f"{name}, ECE {error:.3f}", **{"markersize": 4, **style})
    axes.plot([0, 1], [0, 1], ":", color="black", linewidth=1)
    axes.set(xlabel="score", ylabel="share of harmful memes", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8)
    return axes


def plot_costs(
    scores: ArrayLike, labels: ArrayLike, ax: Any = None, *, miss: float = 1.0, alarm: float = 1.0
) -> Any:
    """Draw the mean cost a meme over the threshold, and the threshold of least cost.

    Args:
        scores: (N,) of memes that the judge did not learn from.
        labels: (N,) 1 = harmful.
        ax: matplotlib axes; new ones by default.
        miss: cost of a missed harmful meme.
        alarm: cost of a false alarm.

    Returns:
        The axes.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: a negative cost, or both zero.
    """
    thresholds, costs = cost_curve(scores, labels, miss=miss, alarm=alarm)
    best = threshold_by_cost(scores, labels, miss=miss, alarm=alarm)
    axes = _axes(ax)
    axes.step(thresholds, costs, where="post", label=f"a miss costs {miss:g}, a false alarm {alarm:g}")
    axes.axvline(best, color="black", linewidth=1, label=f"least cost at {best:.3f}")
    axes.set(xlabel="harmful from this score on", ylabel="mean cost a meme", xlim=(0, 1), ylim=(0, None))
    axes.legend(fontsize=8)
    return axes


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    return require_extra("matplotlib.figure", "plot", "meme-debate").Figure().add_subplot()

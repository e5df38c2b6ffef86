"""Thresholds that suit a labelled set best, from maps that are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, NamedTuple

import numpy as np

from fusion_core.errors import InputError
from fusion_core.progress import track
from fusion_core.report import Report

from .config import PostConfig
from .detect import TextDetector
from .evaluation import Matcher
from .geometry import Array
from .postprocess import regions_from_map
from .protocols import Matching, Overlaps, combine, overlaps

THRESH = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
BOX_THRESH = tuple(round(0.3 + 0.05 * step, 2) for step in range(13))
UNCLIP = (1.2, 1.4, 1.5, 1.6, 1.8, 2.0, 2.3)


@dataclass(frozen=True, kw_only=True)
class Tuning(Report):
    """What tuning found.

    Attributes:
        post: the best settings.
        before: precision, recall, hmean of the settings that it started from.
        after: of the best ones, on the same pictures; expect a little less on others.
    """

    post: PostConfig
    before: tuple[float, float, float]
    after: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            **super().to_dict(),
            "post": self.post.to_dict(),
            "before": list(self.before),
            "after": list(self.after),
        }


def tune(
    detector: TextDetector,
    dataset: Any,
    *,
    thresh: Sequence[float] = THRESH,
    box_thresh: Sequence[float] = BOX_THRESH,
    unclip_ratio: Sequence[float] = UNCLIP,
    protocol: str = "iou",
    matching: Matching = "greedy",
    limit: int | None = None,
    progress: bool | None = None,
) -> Tuning:
    """Find the thresholds with the largest hmean on a labelled set.

    The network runs once per picture; its maps are kept in half precision and post-processed for every pair
    of ``thresh`` and ``unclip_ratio``, and each result is cut at every ``box_thresh``.

    Args:
        detector: its post-processing is where the search starts.
        dataset: see :func:`dbnet_asf.evaluate`.
        thresh: values to try.
        box_thresh: values to try.
        unclip_ratio: values to try.
        protocol: ``"iou"`` or ``"deteval"``.
        matching: see :func:`dbnet_asf.evaluate`.
        limit: use the first so many pictures.
        progress: None shows a bar on a terminal only.

    Returns:
        The best settings (of equals those nearest to the start), with the ten best as rows.

    Raises:
        InputError: no pictures, or nothing to try.
    """
    matcher = Matcher(protocol, matching)
    if not len(thresh) or not len(box_thresh) or not len(unclip_ratio):
        raise InputError("thresh, box_thresh and unclip_ratio are lists of values to try; one is empty")
    kept: list[_Kept] = []
    total = min(len(dataset), limit or len(dataset)) if hasattr(dataset, "__len__") else limit
    for example in track(islice(iter(dataset), limit), "maps", total=total, enabled=progress):
        prob = detector.maps([example.image])[0].prob.astype(np.float16)
        kept.append(_Kept(prob, example.image.shape[:2], list(example.polygons), example.ignore))
    if not kept:
        raise InputError("dataset has no pictures")
    base = detector.config.post
    before = _numbers(matcher, kept, base, [base.box_thresh])[0]
    rows: list[dict[str, Any]] = []
    grid = list(product(thresh, unclip_ratio))
    for level, ratio in track(grid, "settings", enabled=progress):
        config = base.replace(thresh=level, unclip_ratio=ratio, box_thresh=min(box_thresh))
        for least, numbers in zip(box_thresh, _numbers(matcher, kept, config, box_thresh), strict=True):
            named = dict(zip(("precision", "recall", "hmean"), numbers, strict=True))
            rows.append({"thresh": level, "box_thresh": least, "unclip_ratio": ratio, **named})
    start = np.array([base.thresh, base.box_thresh, base.ratio])

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        away = np.abs(np.array([row["thresh"], row["box_thresh"], row["unclip_ratio"]]) - start).sum()
        return -row["hmean"], float(away)

    rows.sort(key=rank)
    best = {name: rows[0][name] for name in ("thresh", "box_thresh", "unclip_ratio")}
    return Tuning(
        title="Thresholds",
        rows=rows[:10],
        post=base.replace(**best),
        before=before,
        after=(rows[0]["precision"], rows[0]["recall"], rows[0]["hmean"]),
    )


class _Kept(NamedTuple):
    prob: Array
    size: tuple[int, int]
    polygons: list[Array]
    ignore: Array


def _numbers(
    matcher: Matcher, kept: Sequence[_Kept], config: PostConfig, levels: Sequence[float]
) -> list[tuple[float, float, float]]:
    """Precision, recall and hmean at each score level."""
    prepared: list[tuple[Overlaps, Array]] = []
    for prob, size, polygons, ignore in kept:
        found = regions_from_map(prob, size, config)
        tables = overlaps(polygons, ignore, list(found.outlines))
        prepared.append((tables, found.scores[tables.kept]))
    return [combine(matcher(t.only(s >= level)) for t, s in prepared) for level in levels]

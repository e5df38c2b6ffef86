"""A detector against annotated pictures: precision, recall, the scores' sweep, recall by size of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np

from fusion_core.errors import InputError
from fusion_core.progress import track
from fusion_core.report import Report

from .geometry import Array, minimum_rectangle
from .protocols import Matched, Matching, Overlaps, combine, match_deteval, match_iou, overlaps

Protocol = Literal["iou", "deteval"]

SWEEP = tuple(round(0.3 + 0.05 * step, 2) for step in range(13))
SIZES = (0.0, 8.0, 16.0, 32.0, 64.0, float("inf"))


@dataclass(frozen=True, kw_only=True)
class Evaluation(Report):
    """How well a detector does on a data set.

    Attributes:
        precision: of all pictures together, in [0, 1].
        recall: likewise.
        hmean: likewise, often called F.
        average_precision: area under precision over recall as the score threshold falls; None for DetEval.
        best: the entry of ``sweep`` with the largest hmean.
        sweep: precision, recall and hmean with only the regions that score at least ``score``.
        by_size: recall by the words' short side in pixels; None for DetEval.
        images: the numbers of each picture.
        settings: of the protocol.
    """

    precision: float = 0.0
    recall: float = 0.0
    hmean: float = 0.0
    average_precision: float | None = None
    best: dict[str, float]
    sweep: Sequence[dict[str, float]] = ()
    by_size: Sequence[dict[str, Any]] = ()
    images: Sequence[dict[str, Any]] = ()
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        names = ("precision", "recall", "hmean", "average_precision", "best", "sweep", "by_size", "images")
        return {**super().to_dict(), **{name: getattr(self, name) for name in (*names, "settings")}}


class Matcher:
    """One protocol with its thresholds.

    Args:
        protocol: ``"iou"`` or ``"deteval"``.
        matching: of the IoU protocol.
        **thresholds: of :func:`iou_protocol` or :func:`deteval_protocol`.

    Raises:
        InputError: another protocol, or bipartite matching with DetEval.
    """

    def __init__(self, protocol: str = "iou", matching: Matching = "greedy", **thresholds: float) -> None:
        if protocol not in ("iou", "deteval"):
            raise InputError(f"protocol is {protocol!r}, wanted 'iou' or 'deteval'")
        if protocol == "deteval" and matching != "greedy":
            raise InputError(f"matching is {matching!r}, which DetEval does not have; wanted 'greedy'")
        self.protocol, self.thresholds = protocol, thresholds
        self.matching: Matching = matching

    def __call__(self, tables: Overlaps) -> Matched:
        """Match one image."""
        if self.protocol == "deteval":
            return match_deteval(tables, **self.thresholds)
        return match_iou(tables, matching=self.matching, **self.thresholds)

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {"protocol": self.protocol, "matching": self.matching, **self.thresholds}


def evaluate(
    detector: Callable[[Any], Any],
    dataset: Any,
    *,
    protocol: Protocol = "iou",
    matching: Matching = "greedy",
    limit: int | None = None,
    progress: bool | None = None,
    **thresholds: float,
) -> Evaluation:
    """Run a detector over annotated pictures and count (section 8).

    Args:
        detector: a :class:`TextDetector`, or any function from a uint8 RGB image to an iterable of things
            with ``polygon`` and ``score``, or of (polygon, score) pairs.
        dataset: of pictures with words, see :mod:`dbnet_asf.datasets`; an iterable of things with ``image``,
            ``polygons``, ``ignore``, ``name``.
        protocol: ``"iou"`` (ICDAR 2015) or ``"deteval"`` (Total-Text).
        matching: ``"greedy"`` as the protocol says, or ``"max"``.
        limit: use the first so many pictures.
        progress: None shows a bar on a terminal only.
        **thresholds: of the protocol, such as ``iou_threshold``.

    Returns:
        A report. The sweep begins at the detector's own threshold, below which it returns nothing.

    Raises:
        InputError: another protocol; no pictures; pictures that cannot be read.
    """
    matcher = Matcher(protocol, matching, **thresholds)
    total = len(dataset) if hasattr(dataset, "__len__") else None
    bar = track(
        _examples(dataset, limit), "pictures", total=min(total or 0, limit or total or 0), enabled=progress
    )
    tables: list[Overlaps] = []
    scores: list[Array] = []
    names: list[str] = []
    sizes: list[Array] = []
    for example, found in _detect(detector, bar):
        pairs = [_pair(region) for region in found]
        prepared = overlaps(example.polygons, example.ignore, [polygon for polygon, _ in pairs])
        tables.append(prepared)
        scores.append(np.array([score for _, score in pairs], np.float64)[prepared.kept])
        names.append(example.name)
        sizes.append(np.array([_short_side(shape) for shape in prepared.truth]))
    if not tables:
        raise InputError("dataset has no pictures")
    return summarize(matcher, tables, scores, names, sizes)


def _examples(dataset: Any, limit: int | None) -> Iterator[Any]:
    return islice(iter(dataset), limit)


def _detect(detector: Callable[[Any], Any], examples: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Pictures with what was found in them; detectors that stream are fed so."""
    stream = getattr(detector, "stream", None)
    if stream is None:
        for example in examples:
            yield example, detector(example.image)
        return
    waiting: list[Any] = []

    def images() -> Iterator[Any]:
        for example in examples:
            waiting.append(example)
            yield example.image

    for found in stream(images()):
        yield waiting.pop(0), found


def _pair(region: Any) -> tuple[Array, float]:
    if hasattr(region, "polygon"):
        return np.asarray(region.polygon, np.float64), float(region.score)
    polygon, score = region
    return np.asarray(polygon, np.float64), float(score)


def _short_side(shape: Any) -> float:
    return min(minimum_rectangle(np.asarray(shape.exterior.coords[:-1]))[2:4])


def summarize(
    matcher: Matcher,
    tables: Sequence[Overlaps],
    scores: Sequence[Array],
    names: Sequence[str],
    sizes: Sequence[Array],
) -> Evaluation:
    """The report on pictures whose overlaps are known.

    Args:
        matcher: the protocol.
        tables: overlaps of each picture.
        scores: of the valid detections of each picture.
        names: of the pictures.
        sizes: short side of each valid truth of each picture.
    """
    results = [matcher(table) for table in tables]
    precision, recall, mean = combine(results)
    sweep = [
        _entry(level, combine(matcher(t.only(s >= level)) for t, s in zip(tables, scores, strict=True)))
        for level in SWEEP
    ]
    pairwise = matcher.protocol == "iou"
    row = {"precision": precision, "recall": recall, "hmean": mean, "pictures": len(names)}
    row |= {"words": sum(r.truths for r in results), "regions": sum(r.detections for r in results)}
    return Evaluation(
        title=f"Detection, {'IoU protocol' if pairwise else 'DetEval'}",
        rows=[row],
        precision=precision,
        recall=recall,
        hmean=mean,
        average_precision=average_precision(results, scores) if pairwise else None,
        best=max(sweep, key=lambda entry: entry["hmean"]),
        sweep=sweep,
        by_size=_by_size(results, tables, sizes) if pairwise else (),
        images=[
            {
                "name": name,
                "precision": result.precision,
                "recall": result.recall,
                "hmean": result.hmean,
                "words": result.truths,
                "regions": result.detections,
            }
            for name, result in zip(names, results, strict=True)
        ],
        settings=matcher.settings,
    )


def _entry(level: float, numbers: tuple[float, float, float]) -> dict[str, float]:
    return {"score": level, **dict(zip(("precision", "recall", "hmean"), numbers, strict=True))}


def average_precision(results: Sequence[Matched], scores: Sequence[Array]) -> float:
    """Mean over all cared-for words of the precision at which each was found, 0 where it was not.

    Args:
        results: of the IoU protocol, per picture.
        scores: of the valid detections, per picture.
    """
    confidence: list[Array] = []
    hits: list[Array] = []
    for result, score in zip(results, scores, strict=True):
        hit = np.zeros(len(score), np.bool_)
        hit[[detection for _, detection in result.pairs]] = True
        counted = np.ones(len(score), np.bool_)
        counted[list(result.ignored_detections)] = False
        confidence.append(score[counted])
        hits.append(hit[counted])
    words = sum(result.truths for result in results)
    order = np.argsort(-np.concatenate(confidence), kind="stable")
    found = np.concatenate(hits)[order]
    precision = np.cumsum(found) / np.arange(1, len(found) + 1)
    return float(precision[found].sum() / words) if words else 0.0


def _by_size(
    results: Sequence[Matched], tables: Sequence[Overlaps], sizes: Sequence[Array]
) -> list[dict[str, Any]]:
    side = np.concatenate(sizes) if sizes else np.zeros(0)
    cared = np.concatenate([~table.ignore for table in tables])
    found = np.zeros(len(side), np.bool_)
    start = 0
    for result, table in zip(results, tables, strict=True):
        found[[start + truth for truth, _ in result.pairs]] = True
        start += len(table.truth)
    rows: list[dict[str, Any]] = []
    for low, high in pairwise(SIZES):
        inside = cared & (side >= low) & (side < high)
        count = int(inside.sum())
        words = f"{low:g} to {high:g} px" if np.isfinite(high) else f"{low:g} px and more"
        recall = float(found[inside].mean()) if count else None
        rows.append({"short side": words, "words": count, "recall": recall})
    return rows

"""How detections are matched with the truth: the ICDAR IoU protocol and DetEval, image by image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from numpy.typing import ArrayLike

from fusion_core.errors import InputError, ShapeError, check_range

from .geometry import Array, check_polygon

Matching = Literal["greedy", "max"]


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Areas of the valid polygons of one image and of their intersections.

    Attributes:
        truth: polygons of the truth, shapely (truths,).
        detections: detected polygons, shapely (detections,).
        ignore: don't-care flags of the truth, bool (truths,).
        kept: indices of the valid detections in the caller's order.
        intersection: areas (truths, detections), square pixels.
    """

    truth: Array
    detections: Array
    ignore: Array
    kept: Array
    intersection: Array

    @property
    def share_of_truth(self) -> Array:
        """Share of each truth that a detection covers (truths, detections)."""
        return _divide(self.intersection, shapely.area(self.truth)[:, None])

    @property
    def share_of_detection(self) -> Array:
        """Share of each detection inside a truth (truths, detections)."""
        return _divide(self.intersection, shapely.area(self.detections)[None, :])

    @property
    def iou(self) -> Array:
        """Intersection over union (truths, detections)."""
        union = shapely.area(self.truth)[:, None] + shapely.area(self.detections)[None, :] - self.intersection
        return _divide(self.intersection, union)

    def only(self, chosen: Array) -> Overlaps:
        """The same with a part of the detections (bool over the valid ones)."""
        return Overlaps(
            self.truth,
            self.detections[chosen],
            self.ignore,
            self.kept[chosen],
            self.intersection[:, chosen],
        )


def _divide(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def overlaps(polygons: Sequence[ArrayLike], ignore: ArrayLike, detections: Sequence[ArrayLike]) -> Overlaps:
    """Prepare an image for either protocol; polygons that are not valid (they cross themselves) are dropped.

    Args:
        polygons: the truth, (points, 2) each.
        ignore: bool (truths,), True = don't care.
        detections: (points, 2) each.

    Raises:
        ShapeError: a polygon of other than (points, 2) with at least three points; another number of flags.
        NonFiniteError: NaN coordinates.
    """
    flags = np.asarray(ignore, np.bool_).reshape(-1)
    if len(flags) != len(polygons):
        raise ShapeError(f"ignore holds {len(flags)} flags for {len(polygons)} polygons, wanted one each")
    truth, valid = _shapes("polygons", polygons)
    found, kept = _shapes("detections", detections)
    intersection = np.zeros((len(truth), len(found)))
    if len(truth) and len(found):
        pairs = shapely.STRtree(found).query(truth)
        intersection[pairs[0], pairs[1]] = shapely.area(
            shapely.intersection(truth[pairs[0]], found[pairs[1]])
        )
    return Overlaps(truth, found, flags[valid], np.flatnonzero(kept), intersection)


def _shapes(name: str, polygons: Sequence[ArrayLike]) -> tuple[Array, Array]:
    shapes = [shapely.Polygon(check_polygon(f"{name}[{at}]", points)) for at, points in enumerate(polygons)]
    array = np.array(shapes, dtype=object)
    valid = shapely.is_valid(array).astype(np.bool_) if shapes else np.zeros(0, np.bool_)
    return array[valid], valid


@dataclass(frozen=True, slots=True)
class Matched:
    """The outcome for one image; counts and indices are over the valid polygons.

    Attributes:
        precision: in [0, 1].
        recall: in [0, 1].
        hmean: their harmonic mean, 0 where both are 0.
        truths: number of cared-for truths.
        detections: number of cared-for detections.
        recall_sum: what was found; the number of matched pairs in the IoU protocol.
        precision_sum: what was right.
        pairs: matched (truth, detection) indices; IoU protocol only.
        ignored_truths: indices of don't-care truths.
        ignored_detections: indices of detections that lie in one of them.
        iou: (truths, detections); empty where either side is; IoU protocol only.
    """

    precision: float
    recall: float
    hmean: float
    truths: int
    detections: int
    recall_sum: float
    precision_sum: float
    pairs: tuple[tuple[int, int], ...]
    ignored_truths: tuple[int, ...]
    ignored_detections: tuple[int, ...]
    iou: Array


def hmean(precision: float, recall: float) -> float:
    """Harmonic mean, 0 where both are 0."""
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _in_ignored(tables: Overlaps, threshold: float) -> Array:
    """Which detections lie in a don't-care truth."""
    return np.asarray((tables.share_of_detection[tables.ignore] > threshold).any(0))


def iou_protocol(
    polygons: Sequence[ArrayLike],
    ignore: ArrayLike,
    detections: Sequence[ArrayLike],
    *,
    iou_threshold: float = 0.5,
    area_threshold: float = 0.5,
    matching: Matching = "greedy",
) -> Matched:
    """The IoU protocol of ICDAR 2015 for one image (section 8).

    Args:
        polygons: the truth, one (points, 2) array a word, pixels.
        ignore: bool (truths,), True = don't care.
        detections: one (points, 2) array each.
        iou_threshold: a pair matches above it.
        area_threshold: a detection whose share inside a don't-care truth exceeds it does not count.
        matching: ``"greedy"`` in the order of the truths, as the protocol says, or ``"max"``, the largest
            number of pairs (needs scipy: extra ``eval``).

    Returns:
        Precision, recall, pairs and the rest; an image without cared-for truth has recall 1, and precision 0
        where anything was detected, else 1.

    Raises:
        ShapeError, NonFiniteError: bad polygons; ConfigError: thresholds outside [0, 1].

    Example:
        >>> box = [[0, 0], [10, 0], [10, 10], [0, 10]]
        >>> iou_protocol([box], [False], [box]).hmean
        1.0
    """
    tables = overlaps(polygons, ignore, detections)
    return match_iou(tables, iou_threshold=iou_threshold, area_threshold=area_threshold, matching=matching)


def match_iou(
    tables: Overlaps,
    *,
    iou_threshold: float = 0.5,
    area_threshold: float = 0.5,
    matching: Matching = "greedy",
) -> Matched:
    """:func:`iou_protocol` of prepared overlaps."""
    check_range("iou_threshold", iou_threshold, 0, 1)
    check_range("area_threshold", area_threshold, 0, 1)
    if matching not in ("greedy", "max"):
        raise InputError(f"matching is {matching!r}, wanted 'greedy' or 'max'")
    outside = ~_in_ignored(tables, area_threshold)
    cared = ~tables.ignore
    iou = tables.iou
    possible = (iou > iou_threshold) & cared[:, None] & outside[None, :]
    pairs = _greedy(possible) if matching == "greedy" else _largest(possible)
    truths, found, matched = int(cared.sum()), int(outside.sum()), len(pairs)
    recall = matched / truths if truths else 1.0
    precision = (matched / found if found else 0.0) if truths else float(found == 0)
    return Matched(
        precision,
        recall,
        hmean(precision, recall),
        truths,
        found,
        matched,
        matched,
        tuple(pairs),
        tuple(np.flatnonzero(tables.ignore).tolist()),
        tuple(np.flatnonzero(~outside).tolist()),
        iou if iou.size else np.zeros(0),
    )


def _greedy(possible: Array) -> list[tuple[int, int]]:
    free = np.ones(possible.shape[1], np.bool_)
    pairs: list[tuple[int, int]] = []
    for truth, row in enumerate(possible):
        candidates = np.flatnonzero(row & free)
        if len(candidates):
            free[candidates[0]] = False
            pairs.append((truth, int(candidates[0])))
    return pairs


def _largest(possible: Array) -> list[tuple[int, int]]:
    from fusion_core.errors import require_extra

    sparse = require_extra("scipy.sparse", "eval", "dbnet-asf")
    graph = require_extra("scipy.sparse.csgraph", "eval", "dbnet-asf")
    if not possible.any():
        return []
    columns = graph.maximum_bipartite_matching(sparse.csr_matrix(possible), perm_type="column")
    return [(row, int(column)) for row, column in enumerate(columns) if column >= 0]


def deteval_protocol(
    polygons: Sequence[ArrayLike],
    ignore: ArrayLike,
    detections: Sequence[ArrayLike],
    *,
    min_recall: float = 0.8,
    min_precision: float = 0.4,
    area_threshold: float = 0.5,
    split_weight: float = 0.8,
) -> Matched:
    """DetEval (Wolf and Jolion) as ICDAR and Total-Text use it, for one image (section 8).

    One detection may match one truth, one truth may be split over several detections, and one detection may
    merge several truths.

    Args:
        polygons: the truth, one (points, 2) array a word, pixels.
        ignore: bool (truths,), True = don't care.
        detections: one (points, 2) array each.
        min_recall: share of a truth that has to be covered.
        min_precision: share of a detection that has to lie inside.
        area_threshold: see :func:`iou_protocol`.
        split_weight: what each part of a split truth counts.

    Returns:
        Precision, recall and the sums they are made of. With nothing detected where there is truth all three
        are 0, even if all of it is don't-care; with no truth and no detection hmean is 0 though both are 1.

    Raises:
        ShapeError, NonFiniteError: bad polygons; ConfigError: thresholds outside [0, 1].
    """
    tables = overlaps(polygons, ignore, detections)
    return match_deteval(
        tables,
        min_recall=min_recall,
        min_precision=min_precision,
        area_threshold=area_threshold,
        split_weight=split_weight,
    )


def match_deteval(
    tables: Overlaps,
    *,
    min_recall: float = 0.8,
    min_precision: float = 0.4,
    area_threshold: float = 0.5,
    split_weight: float = 0.8,
) -> Matched:
    """:func:`deteval_protocol` of prepared overlaps."""
    for name, value in (("min_recall", min_recall), ("min_precision", min_precision)):
        check_range(name, value, 0, 1)
    check_range("area_threshold", area_threshold, 0, 1)
    outside = ~_in_ignored(tables, area_threshold)
    cared = ~tables.ignore
    truths, found = int(cared.sum()), int(outside.sum())
    ignored = tuple(np.flatnonzero(tables.ignore).tolist()), tuple(np.flatnonzero(~outside).tolist())
    sums = 0.0, 0.0
    if not len(tables.truth):
        recall, precision, mean = 1.0, float(len(tables.detections) == 0), 0.0
    elif not len(tables.detections):
        recall = precision = mean = 0.0
    else:
        sums = _deteval_sums(tables, cared, outside, min_recall, min_precision, split_weight)
        recall = sums[0] / truths if truths else 1.0
        precision = (sums[1] / found if found else 0.0) if truths else float(found == 0)
        mean = hmean(precision, recall)
    return Matched(precision, recall, mean, truths, found, *sums, (), *ignored, np.zeros(0))


def _deteval_sums(
    tables: Overlaps,
    cared: Array,
    outside: Array,
    min_recall: float,
    min_precision: float,
    split_weight: float,
) -> tuple[float, float]:
    recall, precision = tables.share_of_truth, tables.share_of_detection
    strong = (recall >= min_recall) & (precision >= min_precision)
    touches = recall > 0
    partners_of_truth = (touches & outside[None, :]).sum(1)
    partners_of_detection = (touches & cared[:, None]).sum(0)
    single = (
        strong
        & (strong.sum(1) == 1)[:, None]
        & (strong.sum(0) == 1)[None, :]
        & (partners_of_truth == 1)[:, None]
        & (partners_of_detection == 1)[None, :]
        & cared[:, None]
        & outside[None, :]
    )
    pairs = [(g, d) for g, d in np.argwhere(single).tolist() if _near(tables.truth[g], tables.detections[d])]
    recall_sum = precision_sum = float(len(pairs))
    free_truth, free_detection = cared.copy(), outside.copy()
    for g, d in pairs:
        free_truth[g] = free_detection[d] = False
    for g in np.flatnonzero(free_truth & (partners_of_truth >= 2)).tolist():
        parts = free_detection & (precision[g] >= min_precision)
        if round(float(recall[g, parts].sum()), 4) >= min_recall:
            count = int(parts.sum())
            recall_sum += 1.0 if count == 1 else split_weight
            precision_sum += 1.0 if count == 1 else split_weight * count
            free_truth[g] = False
            free_detection[parts] = False
    for d in np.flatnonzero(free_detection & (partners_of_detection >= 2)).tolist():
        parts = free_truth & (recall[:, d] >= min_recall)
        if round(float(precision[parts, d].sum()), 4) >= min_precision:
            recall_sum += float(parts.sum())
            precision_sum += 1.0
            free_truth[parts] = False
            free_detection[d] = False
    return recall_sum, precision_sum


def _near(truth: shapely.Polygon, detection: shapely.Polygon) -> bool:
    """Whether the centers are closer than half the sum of the boxes' diagonals."""
    points = [np.asarray(shape.exterior.coords[:-1]) for shape in (truth, detection)]
    apart = float(np.linalg.norm(points[0].mean(0) - points[1].mean(0)))
    diagonals = sum(float(np.linalg.norm(np.ptp(corners, axis=0))) for corners in points)
    return 2 * apart < diagonals


def combine(images: Iterable[Matched]) -> tuple[float, float, float]:
    """Precision, recall and hmean of a data set: sums over images over the sums of counts, 0 without any."""
    parts = list(images)
    truths, found = sum(part.truths for part in parts), sum(part.detections for part in parts)
    recall = sum(part.recall_sum for part in parts) / truths if truths else 0.0
    precision = sum(part.precision_sum for part in parts) / found if found else 0.0
    return precision, recall, hmean(precision, recall)

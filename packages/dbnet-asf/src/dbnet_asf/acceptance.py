"""How a detector is accepted: words covered, false boxes, and a classical baseline to beat (section 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from dbnet_asf.protocols import combine, iou_protocol


class Coverage(NamedTuple):
    """What detections do with the words of a picture.

    Attributes:
        words: number of words.
        covered: bool (words,): at least half of the word's area lies in the union of the detections.
        false: bool (detections,): less than half of the box's area lies in the union of the words (and of
            text that is there but not to be read).
    """

    words: int
    covered: NDArray[np.bool_]
    false: NDArray[np.bool_]


def coverage(
    words: Sequence[ArrayLike], detections: Sequence[ArrayLike], ignored: Sequence[ArrayLike] = ()
) -> Coverage:
    """Words covered and boxes that are false.

    Args:
        words: outlines (points, 2).
        detections: outlines (points, 2).
        ignored: outlines of text that may be found or not, such as a line that the border cuts.

    Example:
        >>> square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]])
        >>> found = coverage([square], [square + [1, 0], square + [9, 0]])
        >>> found.covered.tolist(), found.false.tolist()
        ([True], [False, True])
    """
    truth, found = _outlines(words), _outlines(detections)
    text = shapely.union_all([*truth, *_outlines(ignored)])
    boxes = shapely.union_all(found)
    covered = [_share(word, boxes) >= 0.5 for word in truth]
    false = [_share(box, text) < 0.5 for box in found]
    return Coverage(len(truth), np.array(covered, np.bool_), np.array(false, np.bool_))


def _outlines(polygons: Sequence[ArrayLike]) -> list[Any]:
    return [shapely.make_valid(shapely.Polygon(np.asarray(points, np.float64))) for points in polygons]


def _share(part: Any, whole: Any) -> float:
    return part.intersection(whole).area / part.area if part.area else 0.0


def classical(image: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """The baseline without learning: adaptive threshold, closing, rectangles round what is left.

    Args:
        image: uint8 RGB (height, width, 3).

    Returns:
        Quads (4, 2).
    """
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    ink = cv2.adaptiveThreshold(gray, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY_INV, 25, 12)
    joined = cv2.morphologyEx(ink, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_RECT, (9, 3)))
    contours, _ = cv2.findContours(joined, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    rectangles = [cv2.minAreaRect(contour) for contour in contours]
    return [np.asarray(cv2.boxPoints(r), np.float32) for r in rectangles if min(r[1]) >= 3]


def synthetic_score(
    find: Callable[[NDArray[np.uint8]], Sequence[ArrayLike]],
    count: int = 60,
    *,
    seed: int = 1000,
    size: int = 384,
) -> dict[str, float]:
    """Precision, recall and their harmonic mean (IoU protocol) on rendered scenes over held-out photographs.

    Args:
        find: image -> outlines.
        count: scenes that hold text.
        seed: of the scenes; other than that of the training.
        size: side of the scenes in pixels.
    """
    matched = [
        iou_protocol(polygons, ignore, find(image)) for image, polygons, ignore in scenes(count, seed, size)
    ]
    precision, recall, score = combine(matched)
    return {"precision": precision, "recall": recall, "hmean": score}


def scenes(count: int, seed: int = 1000, size: int = 384) -> Iterable[Any]:
    """Rendered scenes with text over the photographs that no training scene shows."""
    from dbnet_asf.data.synth import render

    found = 0
    for index in range(20 * count):
        scene = render(index, seed, size, backgrounds="test")
        if found < count and len(scene.polygons) and not np.all(scene.ignore):
            found += 1
            yield scene
        if found == count:
            return

"""Is this data set fit for training? What the labels would be made of, before any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from fusion_core.errors import InputError
from fusion_core.progress import track
from fusion_core.report import Report

from .config import LabelConfig
from .geometry import Array, make_valid, offset
from .targets import clip_polygons, shrink_distance


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Report):
    """What a data set holds.

    Attributes:
        counts: pictures, words, and words that are ignored, too small, vanished, split, self-crossing,
            outside, partly outside; pictures without a word that counts.
        warnings: plain sentences; none where all is well.
    """

    counts: dict[str, int]
    warnings: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {**super().to_dict(), "counts": self.counts, "warnings": list(self.warnings)}


_WORDS = {
    "ignored": "marked as don't care",
    "too small": "shorter side below min_text_size",
    "vanished": "nothing left after shrinking",
    "split": "falls apart when shrunk",
    "self-crossing": "the outline crosses itself; its largest part can be used",
    "outside": "wholly outside the picture",
    "partly outside": "reaches over the picture's border; cut there",
}


def diagnose(
    dataset: Any,
    *,
    labels: LabelConfig | None = None,
    scale: float = 1.0,
    limit: int | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Count what would happen to the words of a data set as labels are made of them (section 4).

    Args:
        dataset: see :func:`dbnet_asf.evaluate`.
        labels: how labels are made.
        scale: pictures are resized by this factor first, which decides what is too small.
        limit: use the first so many pictures.
        progress: None shows a bar on a terminal only.

    Returns:
        Counts, shares and warnings: above all where more than half of the words are ignored, for then a
        network learns nothing and all losses are near zero.

    Raises:
        InputError: no pictures, or one that cannot be read.
    """
    config = labels or LabelConfig()
    if not scale > 0:
        raise InputError(f"scale is {scale!r}, wanted a factor above 0")
    counts: Counter[str] = Counter({"pictures": 0, "words": 0, **dict.fromkeys(_WORDS, 0)})
    total = min(len(dataset), limit or len(dataset)) if hasattr(dataset, "__len__") else limit
    sides: list[float] = []
    for example in track(islice(iter(dataset), limit), "pictures", total=total, enabled=progress):
        size = tuple(max(round(length * scale), 1) for length in example.image.shape[:2])
        polygons = [np.asarray(polygon, np.float64) * scale for polygon in example.polygons]
        learned = _count(polygons, np.asarray(example.ignore), (size[0], size[1]), config, counts, sides)
        counts["pictures"] += 1
        counts["pictures without a word that counts"] += not learned
    if not counts["pictures"]:
        raise InputError("dataset has no pictures")
    words = counts["words"]
    rows = [
        {
            "what": name,
            "words": counts[name],
            "share": counts[name] / words if words else 0.0,
            "meaning": text,
        }
        for name, text in _WORDS.items()
    ]
    return Diagnosis(
        title="Fit for training?",
        rows=rows,
        counts=dict(counts),
        warnings=_warnings(counts, sides, config),
    )


def _count(
    polygons: Sequence[Array],
    ignore: Array,
    size: tuple[int, int],
    config: LabelConfig,
    counts: Counter[str],
    sides: list[float],
) -> int:
    """Adds one picture's words; returns how many of them will be learned."""
    learned = 0
    limit = np.array([size[1] - 1, size[0] - 1])
    clipped, gone = clip_polygons(polygons, np.zeros(len(polygons), np.bool_), size)
    for polygon, cut, empty, skip in zip(polygons, clipped, gone, ignore, strict=True):
        counts["words"] += 1
        counts["ignored"] += bool(skip)
        outside = (polygon < 0) | (polygon > limit)
        counts["outside" if outside.any(1).all() and empty else "partly outside"] += bool(outside.any())
        counts["self-crossing"] += make_valid(polygon) is not polygon  # it returns simple ones as they are
        if skip or empty:
            continue
        side = float(np.ptp(cut, axis=0).min())
        sides.append(side)
        if side < config.min_text_size:
            counts["too small"] += 1
            continue
        pieces = offset(cut, -shrink_distance(cut, config.shrink_ratio))
        counts["vanished"] += not pieces
        counts["split"] += len(pieces) > 1
        learned += bool(pieces)
    return learned


def _warnings(counts: Counter[str], sides: Sequence[float], config: LabelConfig) -> list[str]:
    words, found = counts["words"], list[str]()
    if not words:
        return ["no picture has a word: nothing but background would be learned"]
    if counts["ignored"] > words / 2:
        share = counts["ignored"] / words
        found.append(
            f"{share:.0%} of the words are marked as don't care, so most losses will be 0: is the format the "
            "right one, and does the text field hold what it should?"
        )
    if counts["too small"] > words / 4:
        found.append(
            f"{counts['too small'] / words:.0%} of the words are below min_text_size = "
            f"{config.min_text_size:g} pixels (median side {np.median(sides):.0f}): enlarge the pictures"
        )
    if counts["outside"] > words / 20:
        found.append(
            f"{counts['outside'] / words:.0%} of the words lie outside their pictures: is the EXIF rotation "
            "of the pictures part of the annotation, and were they resized?"
        )
    if counts["self-crossing"] > words / 20:
        found.append(
            f"{counts['self-crossing'] / words:.0%} of the outlines cross themselves: are their points in "
            "order?"
        )
    return found

"""Benchmark rows of post-processing and of the whole detector, against the plain form and against budgets."""

from __future__ import annotations

import math
import statistics
import time

import cv2
import numpy as np
import torch

from fusion_core.bench import Bench, Row, check_target, memory_row, paired, peak_memory

from . import plain
from .config import PostConfig
from .demo import page
from .detect import TextDetector
from .geometry import Array
from .postprocess import polygons_from_map, quads_from_map

# The three maps of section 7: height, width, contours, and the targets for quads and polygons.
MAPS = ((736, 1280, 60, None, None), (1152, 2048, 787, ">= 6", ">= 2.5"), (2048, 1472, 1998, None, None))
CONFIG = PostConfig(thresh=0.3, box_thresh=0.5)
SECONDS, MEGABYTES = 1.0, 300


def drawn_map(height: int, width: int, count: int, seed: int = 0) -> Array:
    """A probability map with ``count`` rotated, blurred bars of text that do not touch.

    Args:
        height: in pixels.
        width: in pixels.
        count: how many.
        seed: of sizes, angles and probabilities.
    """
    random = np.random.default_rng(seed)
    columns = math.ceil(math.sqrt(count * width / height / 2.2))
    rows = math.ceil(count / columns)
    wide, tall = width / columns, height / rows
    prob = np.zeros((height, width), np.float32)
    for cell in random.permutation(rows * columns)[:count].tolist():
        center = ((cell % columns + 0.5) * wide, (cell // columns + 0.5) * tall)
        w, h = random.uniform(0.4, 0.8) * min(wide, 150), random.uniform(0.22, 0.4) * min(tall, 60)
        angle = math.degrees(math.atan2(max(tall - h - 8, 0), w)) * random.uniform(-0.6, 0.6)
        corners = cv2.boxPoints((center, (w, h), angle)).astype(np.int32)
        cv2.fillPoly(prob, [corners], float(random.uniform(0.7, 1.0)))
    return np.clip(cv2.GaussianBlur(prob, (0, 0), 1.0), 0, 1)


def postprocessing(repeats: int) -> list[Row]:
    """Quads and polygons of the three maps, against one contour at a time with shapely and pyclipper."""
    rows: list[Row] = []
    for height, width, count, quads, polygons in MAPS:
        prob = drawn_map(height, width, count)
        size = (height, width)
        found = len(
            cv2.findContours((prob > CONFIG.thresh).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[
                0
            ]
        )
        rows.append(
            paired(
                f"quads, {height} x {width}, {found} contours",
                lambda prob=prob: quads_from_map(prob, config=CONFIG),
                lambda prob=prob, size=size: plain.quads(prob, size, thresh=0.3, box_thresh=0.5),
                repeats=repeats,
                target=quads,
                against="per contour, shapely + pyclipper",
            )
        )
        rows.append(
            paired(
                f"polygons, {height} x {width}, {found} contours",
                lambda prob=prob: polygons_from_map(prob, config=CONFIG),
                lambda prob=prob, size=size: plain.polygons(prob, size, thresh=0.3, box_thresh=0.5),
                repeats=repeats,
                target=polygons,
                against="per contour, shapely + pyclipper",
            )
        )
    return rows


def warm_page(repeats: int, device: str = "cpu") -> Row:
    """The shipped detector on the page at twice its size, in a warm process; ratio = a second over it."""
    detector, image = TextDetector.from_pretrained(device=device), page()
    detector(image)
    took: list[float] = []
    for _ in range(max(repeats, 5)):
        start = time.perf_counter()
        detector(image)
        took.append(time.perf_counter() - start)
    seconds = statistics.median(took)
    target = ">= 1"
    return Row(
        name="TextDetector, page() x2, warm",
        ratio=SECONDS / seconds,
        device=str(detector.device),
        threads=torch.get_num_threads(),
        ours_s=seconds,
        reference_s=SECONDS,
        reference="budget of 1 s",
        repeats=len(took),
        target=target,
        met=check_target(SECONDS / seconds, target),
        note="at most 1 s on two cores",
    )


def detect_page() -> None:
    """What :func:`page_memory` measures: load the detector and read the page once."""
    TextDetector.from_pretrained(device="cpu")(page())


def page_memory() -> Row:
    """Memory of loading the detector and reading the page, above the imports."""
    peak = peak_memory(f"{__name__}:detect_page")
    return memory_row(
        "TextDetector, page() x2, memory above the imports",
        peak,
        MEGABYTES * 1_000_000,
        target=">= 1",
        against="budget of 300 MB",
    )


def add_rows(bench: Bench, *, repeats: int = 5, device: str = "cpu", memory: bool = True) -> None:
    """Add all rows of this file.

    Args:
        bench: takes them.
        repeats: pairs per row.
        device: of the detector.
        memory: also the row that starts a fresh process.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(torch.get_num_threads())  # the same for both sides
    try:
        for row in postprocessing(repeats):
            bench.add(row)
    finally:
        cv2.setNumThreads(threads)
    bench.add(warm_page(repeats, device))
    if memory:
        bench.add(page_memory())

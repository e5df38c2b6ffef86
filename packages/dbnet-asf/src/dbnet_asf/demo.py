"""The demo: the shipped detector on a real page, on held-out scenes and on photographs without text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from fusion_core.comparison import Comparison
from fusion_core.demo import Demo, Method
from fusion_core.errors import MissingExtraError
from fusion_core.images import read_image, save_png
from fusion_core.report import Claim, Figure
from fusion_core.seeding import generator, rng

from . import draw
from .acceptance import classical, scenes
from .config import Attention, LabelConfig
from .data.dataset import Preparation, Rendered, TrainingSet
from .data.scenery import photographs
from .data.synth import Rendered as Scene
from .detect import TextDetector
from .geometry import Array
from .losses import DBLoss
from .model.dbnet import DBNet
from .protocols import combine, iou_protocol
from .targets import Targets, make_targets

PAPER = (
    "Minghui Liao, Zhisheng Zou, Zhaoyi Wan, Cong Yao, Xiang Bai: Real-Time Scene Text Detection with "
    "Differentiable Binarization and Adaptive Scale Fusion, IEEE TPAMI 2022"
)
OURS, BASELINE = "DB++ nano (shipped)", "classical: threshold, closing, rectangles"
SEEDS, SCENES = {"quick": 3, "full": 5}, {"quick": 14, "full": 30}
SIDE = 384
LEVELS = ("p5, stride 32", "p4, stride 16", "p3, stride 8", "p2, stride 4")
TRAIN_STEPS, TRAIN_SCENES, TRAIN_SEEDS = 150, 160, 2
CHANCE = "chance: the share of text pixels"
NETS: dict[str, Attention | None] = {"DB": None, "DB++": "scale_channel_spatial"}
NOTES = (
    "A small network of a third of a million parameters that learned from rendered scenes only; the "
    "photographs under the held-out scenes are in no training scene. Nothing is downloaded.",
    "The paper's numbers come from ResNets with deformable convolutions, pretrained on SynthText and "
    "finetuned on each benchmark for over a thousand epochs; no number here compares with those.",
)


def _file(module: str, name: str) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        word = {"skimage": "scikit-image"}.get(module, module)
        raise MissingExtraError(f'{word} is not installed; it comes with: pip install "dbnet-asf[demo]"')
    return Path(next(iter(spec.submodule_search_locations))) / name


def page() -> Array:
    """scikit-image's photograph of a printed page at twice its size, RGB."""
    image = read_image(_file("skimage", "data/page.png"))
    return np.asarray(cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC))


def demo(out: Path, *, full: bool = False, seed: int = 0) -> Demo:
    """Look at the shipped detector's work and count it against a baseline without learning.

    Args:
        out: gets the pictures.
        full: more scenes and seeds, and DB and DB++ trained on one backbone for the same number of steps.
        seed: of the scenes.

    Raises:
        MissingExtraError: scikit-image or matplotlib is not installed.
    """
    picture = page()
    mode = "full" if full else "quick"
    seeds = list(range(seed, seed + SEEDS[mode]))
    detector = TextDetector.from_pretrained(device="cpu", dtype="float32", keep_map=True)
    sets = {each: list(scenes(SCENES[mode], 5000 + each, SIDE)) for each in seeds}
    table, shown = _against_classical(detector, sets)
    figures = [_page_figure(out, detector, picture), _scenes_figure(out, shown)]
    weights, relation = _weights_figure(out, detector, sets)
    false, negatives = _negatives_figure(out, detector)
    tables = [table]
    asf = Claim(
        "Adaptive scale fusion finds more text than plain concatenation",
        "table 1",
        None,
        "Two networks of equal training are needed: run with --full.",
    )
    if full:
        trained, asf = _trained(seed)
        tables.append(trained)
    words = sum(len(scene.polygons) for part in sets.values() for scene in part)
    return Demo(
        tables=tables,
        claims=[_learned(table), asf, relation],
        figures=[*figures, *weights, negatives],
        notes=[*NOTES, f"Boxes on the {len(photographs('test'))} photographs without text: {false} in all."],
        settings={"scenes": {str(k): len(v) for k, v in sets.items()}, "words": words, "side": SIDE,
                  "detector": detector.config.to_dict()},
        seeds=seeds,
    )  # fmt: skip


def _learned(table: Comparison) -> Claim:
    mean = {row["method"]: row["mean"] for row in table.rows() if row["metric"] == "F"}
    ours, theirs = mean[OURS], mean[BASELINE]
    return Claim(
        "A segmentation network with differentiable binarization reads scenes that fixed rules cannot",
        "section 1",
        bool(ours > 2 * theirs),
        f"F is {ours:.3f} with it and {theirs:.3f} by threshold and closing on held-out synthetic scenes.",
    )


def _against_classical(
    detector: TextDetector, sets: dict[int, list[Scene]]
) -> tuple[Comparison, list[tuple[Scene, Sequence[Array]]]]:
    """The table of both, and a few scenes with what the detector found in them."""
    metrics: dict[str, Any] = {
        name: {"better": "higher", "percent": True} for name in ("precision", "recall", "F")
    }
    metrics["ms_per_image"] = {"better": "lower"}
    table = Comparison(
        metrics,
        BASELINE,
        list(sets),
        "Held-out synthetic scenes, IoU 0.5",
    )
    find: dict[str, Callable[[Array], Sequence[Array]]] = {
        BASELINE: classical,
        OURS: lambda image: detector(image).polygons,
    }
    detector(next(iter(sets.values()))[0].image)  # the first call pays for what later ones share
    shown: list[tuple[Scene, Sequence[Array]]] = []
    for seed, part in sets.items():
        for name, function in find.items():
            start = time.perf_counter()
            found = [function(scene.image) for scene in part]
            seconds = time.perf_counter() - start
            if name == OURS and not shown:
                shown = list(zip(part, found, strict=True))[:9]
            matched = [
                iou_protocol(scene.polygons, scene.ignore, polygons)
                for scene, polygons in zip(part, found, strict=True)
            ]
            numbers = dict(zip(("precision", "recall", "F"), combine(matched), strict=True))
            for metric, value in {**numbers, "ms_per_image": 1e3 * seconds / len(part)}.items():
                table.add(name, metric, seed, value)
    return table, shown


def _page_figure(out: Path, detector: TextDetector, picture: Array) -> Figure:
    result = detector(picture)
    prob = cv2.resize(result.prob, picture.shape[1::-1]) if result.prob is not None else picture[..., 0]
    panel = draw.panels(
        [np.asarray(result.draw()), draw.heat(np.asarray(prob))],
        [f"{len(result)} regions", "probability of the shrunk text"],
        columns=1,
    )
    save_png(out / "page.png", panel)
    return Figure(
        "page.png",
        "A photographed page with a box round each word, and the probability map under it.",
        "A real photograph (scikit-image's page, at twice its size); no real page was in the training.",
    )


def _scenes_figure(out: Path, shown: list[tuple[Scene, Sequence[Array]]]) -> Figure:
    pictures = [
        draw.outlines(draw.outlines(scene.image, scene.polygons, color=(255, 190, 0), fill=0), found)
        for scene, found in shown
    ]
    save_png(out / "scenes.png", draw.panels(pictures, [""] * len(pictures), columns=3))
    return Figure(
        "scenes.png",
        "Nine rendered scenes with the detector's boxes in green and the truth in yellow.",
        "Held-out synthetic scenes: green is found, yellow alone is missed.",
    )


def _weights_figure(
    out: Path, detector: TextDetector, sets: dict[int, list[Scene]]
) -> tuple[list[Figure], Claim]:
    """Pictures of the scale weights, and whether they follow the size of the text."""
    text = "The weights follow the scale of the text: larger text draws on coarser levels"
    scene = max(next(iter(sets.values())), key=lambda each: np.ptp([_height(p) for p in each.polygons]))
    attention = detector.maps([scene.image])[0].attention
    if attention is None:
        return [], Claim(text, "section 3.2, figure 4", None, "The shipped network has no scale fusion.")
    low, high = float(attention.min()), float(attention.max())
    panels = [
        np.asarray(cv2.resize(draw.heat(level, low=low, high=high), scene.image.shape[1::-1]))
        for level in attention
    ]
    titles = [f"{name}: {level.mean():.2f} on average" for name, level in zip(LEVELS, attention, strict=True)]
    pictures = [draw.outlines(scene.image, scene.polygons, fill=0), *panels]
    save_png(out / "weights.png", draw.panels(pictures, ["words", *titles], columns=3))
    figure = Figure(
        "weights.png",
        "A scene and, in four panels, the weight of each pyramid level at each pixel.",
        f"Weights of the adaptive scale fusion, dark = {low:.2f}, yellow = {high:.2f}.",
    )
    return [figure], _relation(detector, sets, text)


def _height(polygon: Array) -> float:
    return min(cv2.minAreaRect(np.asarray(polygon, np.float32))[1])


def _relation(detector: TextDetector, sets: dict[int, list[Scene]], text: str) -> Claim:
    heights: list[float] = []
    coarseness: list[float] = []
    for scene in (scene for part in sets.values() for scene in part):
        attention = detector.maps([scene.image])[0].attention
        if attention is None:
            continue
        scale = attention.shape[1] / scene.image.shape[0]
        total = attention.sum(0)
        level = np.tensordot(np.array([5.0, 4.0, 3.0, 2.0], np.float32), attention, 1) / np.maximum(
            total, 1e-6
        )
        for polygon in scene.polygons:
            mask = np.zeros(total.shape, np.uint8)
            cv2.fillPoly(mask, [np.rint(np.asarray(polygon) * scale).astype(np.int32)], 1)
            if mask.any():
                heights.append(_height(polygon))
                coarseness.append(cv2.mean(level, mask)[0])
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (heights, coarseness)]
    correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    order = np.argsort(heights)
    small, large = (
        np.mean(np.array(coarseness)[part])
        for part in (order[: len(order) // 4], order[-(len(order) // 4) :])
    )
    sentence = (
        f"Rank correlation of a word's height and the mean level of its weights (2 = fine, 5 = coarse) is "
        f"{correlation:+.2f} over {len(heights)} words: {small:.2f} for the smallest quarter, "
        f"{large:.2f} for the largest."
    )
    return Claim(text, "section 3.2, figure 4", bool(correlation > 0.3), sentence)


def _negatives_figure(out: Path, detector: TextDetector) -> tuple[int, Figure]:
    pictures: list[Array] = []
    titles: list[str] = []
    total = 0
    for path in photographs("test"):
        result = detector(path)
        total += len(result)
        side = 320 / max(result.image.shape[:2])
        small = cv2.resize(np.asarray(result.draw()), None, fx=side, fy=side, interpolation=cv2.INTER_AREA)
        square = np.full((320, 320, 3), 255, np.uint8)
        square[: small.shape[0], : small.shape[1]] = small[:320, :320]
        pictures.append(square)
        titles.append(f"{path.stem}: {len(result)}")
    save_png(out / "no_text.png", draw.panels(pictures, titles, columns=4))
    return total, Figure(
        "no_text.png",
        "Eight photographs without text, each with the number of boxes found in it.",
        "Photographs without text; every box here is false.",
    )


def _trained(seed: int) -> tuple[Comparison, Claim]:
    """DB and DB++ for equal steps on equal scenes, on the shipped network's backbone.

    The paper starts from a backbone that was trained on ImageNet. Both start at few text pixels; without that
    the gates of DB++ close within thirty steps, for good. After so few steps few regions pass the
    post-processing's thresholds; the pixels' average precision shows what was learned all the same.
    """
    metric: dict[str, Any] = {"pixel_AP": {"better": "higher", "percent": True}}
    seeds = list(range(seed, seed + TRAIN_SEEDS))
    table = Comparison(metric, "DB", seeds, f"Neck and heads from scratch, {TRAIN_STEPS} steps of 6 crops")
    held_out = list(scenes(30, 7000, 320))
    labels = LabelConfig(distance="exact", precise=True, min_text_size=5)
    start = DBNet.from_pretrained("nano")
    truth = [make_targets(s.polygons, s.ignore, s.image.shape[:2], labels) for s in held_out]
    pixels = np.concatenate([labels.gt.numpy()[labels.mask.numpy()] for labels in truth])
    for each in seeds:
        table.add(CHANCE, "pixel_AP", each, float(pixels.mean()))
        scenes_of = Rendered(TRAIN_SCENES, 100 + each, 256)
        how = Preparation(crop=224, labels=labels, seed=each)
        examples = [scenes_of[at] for at in range(TRAIN_SCENES)]
        for name, attention in NETS.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator(each, "weights").initial_seed())
                net = DBNet(start.config.replace(attention=attention)).start_at()
                net.backbone.load_state_dict(start.backbone.state_dict())
                fit(net, TrainingSet(examples, how), TRAIN_STEPS, seed=each)
            detector = TextDetector(net, device="cpu", dtype="float32", short_side=320)
            table.add(name, "pixel_AP", each, _pixel_precision(detector, held_out, truth, pixels))
    rows = {row["method"]: row for row in table.rows()}
    gain, p = rows["DB++"]["difference"], rows["DB++"]["p"]
    shown = bool(gain > 0 and p is not None and p < 0.05)
    certain = "" if p is None else f", p = {p:.2f}"
    return table, Claim(
        "Adaptive scale fusion finds more text than plain concatenation",
        "table 1",
        shown,
        f"After {TRAIN_STEPS} steps the pixels' average precision differs by {100 * gain:+.1f} points over "
        f"{TRAIN_SEEDS} seeds{certain}; chance is {100 * rows[CHANCE]['mean']:.1f}. "
        "The paper's gain comes after far longer training.",
    )


def _pixel_precision(
    detector: TextDetector, held_out: Sequence[Scene], truth: Sequence[Targets], pixels: Array
) -> float:
    """Average precision of the probability map's pixels as a finder of the shrunk text."""
    from sklearn.metrics import average_precision_score

    found = [detector.maps([scene.image])[0].prob for scene in held_out]
    prob = np.concatenate([one[labels.mask.numpy()] for one, labels in zip(found, truth, strict=True)])
    return float(average_precision_score(pixels, prob))


def fit(
    net: DBNet, data: TrainingSet, steps: int, *, seed: int = 0, batch_size: int = 6, lr: float = 3e-3
) -> DBNet:
    """A short training on one device: AdamW, one cycle, the default loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    loss_fn, random = DBLoss(), rng(seed, "order")
    net.train()
    for step in range(steps):
        data.set_epoch(step)
        images, targets = data.collate([data[int(at)] for at in random.integers(len(data), size=batch_size)])
        loss, _ = loss_fn(net(images), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return net.eval()


method = Method(
    name="dbnet-asf",
    package="dbnet-asf",
    title="DBNet++: text detection",
    paper=PAPER,
    url="https://arxiv.org/abs/2202.10304",
    summary="Finds text in photographs: a probability map, cut at a threshold that training made steep, from "
    "features whose scales are weighted per pixel.",
    demo=demo,
)

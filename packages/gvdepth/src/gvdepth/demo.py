"""The demo: one simulated camera to train with, six to test on; the verdict is what was measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_core.comparison import Comparison
from fusion_core.demo import Demo, Method
from fusion_core.errors import require_extra
from fusion_core.images import save_png
from fusion_core.plotting import clean_axes, new_figure, save_figure
from fusion_core.report import Claim, Figure
from gvdepth.calibration import calibrate
from gvdepth.data.simulated import RIGS, Simulated
from gvdepth.diagnosis import doctor
from gvdepth.experiment import BINS, TEST_RIGS, Scores, infer, measure, score, shipped, streets_of, train_all
from gvdepth.modeling import GVDepth
from gvdepth.train_checkpoints import MODELS
from gvdepth.viz import color_depth, colorize, sheet

PAPER = (
    "Karlo Koledić, Luka Petrović, Ivan Marković, Ivan Petrović: GVDepth: Zero-Shot Monocular Depth "
    "Estimation for "
    "Ground Vehicles based on Probabilistic Cue Fusion, ICCV 2025"
)
NAMES = {
    "direct": "direct",
    "direct-ground": "direct + ground embedding",
    "focal": "focal cue",
    "vertical": "vertical cue (offset)",
    "fusion": "fusion",
}
RULE_NAMES = {
    "scale": "weights 1/uncertainty (the paper's)",
    "variance": "weights 1/uncertainty^2",
    "mean": "plain mean",
    "select": "the surer cue",
    "focal": "its focal depth alone",
    "vertical": "its vertical depth alone",
}
FRAMES = 32
PITCH_ERROR = 1.0


def demo(out: Path, *, full: bool = False, seed: int = 0) -> Demo:
    """Compare the cues on cameras that no model was trained with.

    Args:
        out: gets the pictures.
        full: train the models anew, two seeds; else the shipped ones are measured.
        seed: the first.
    """
    require_extra("matplotlib", "demo", "gvdepth")
    seeds = [seed, seed + 1] if full else [seed]
    with tempfile.TemporaryDirectory() as folder:
        if full:
            models, steps = train_all(seeds, folder)
        else:
            models, steps = {(name, seed): shipped(name) for name in MODELS}, None
        scores = {job: measure(model) for job, model in models.items()}
    tables = [_cameras(scores, seeds), _rules(scores, seeds)]
    first = {name: models[name, seed] for name in MODELS}
    numbers, growth = _camera_block(first)
    figures = [_pictures(first, out / "demo.png"), _growth(growth, out / "pitch.png")]
    settings = {
        "training": f"{steps} steps, here" if steps else "shipped checkpoints, see checkpoints/MODEL_CARD.md",
        "train camera": _words("train"),
        "test cameras": {rig: _words(rig) for rig in TEST_RIGS},
        "images per camera": FRAMES,
        "depths": "1 to 80 m, mean over images",
        **numbers,
    }
    notes = _notes(scores, seeds, steps, numbers)
    return Demo(tables, _claims(scores, seeds), figures, notes, settings, seeds)


def _words(rig: str) -> str:
    camera, size = RIGS[rig]
    height, pitch = camera.camera_height, camera.pitch_deg
    return f"f {camera.fy:g} px, height {height:g} m, pitch {pitch:g} degrees, objects x{size:g}"


def _cameras(scores: Mapping[tuple[str, int], Scores], seeds: Sequence[int]) -> Comparison:
    metrics: dict[str, Any] = {f"abs_rel {rig}": {"better": "lower", "percent": True} for rig in TEST_RIGS}
    metrics["zero-shot abs_rel"] = {"better": "lower", "percent": True}
    metrics["zero-shot d1"] = {"better": "higher", "percent": True}
    title = "Trained on one camera (A is like it), tested on B to F: AbsRel and delta 1"
    table = Comparison(metrics, NAMES["direct"], list(seeds), title)
    for (name, number), found in scores.items():
        for rig in TEST_RIGS:
            table.add(NAMES[name], f"abs_rel {rig}", number, found.rigs[rig][0])
        table.add(NAMES[name], "zero-shot abs_rel", number, found.zero_shot[0])
        table.add(NAMES[name], "zero-shot d1", number, found.zero_shot[1])
    return table


def _rules(scores: Mapping[tuple[str, int], Scores], seeds: Sequence[int]) -> Comparison:
    metrics: dict[str, Any] = {
        "zero-shot abs_rel": {"better": "lower", "percent": True},
        "zero-shot d1": {"better": "higher", "percent": True},
    }
    title = "Rules of fusion on the same fusion model, mean over B to F"
    table = Comparison(metrics, RULE_NAMES["mean"], list(seeds), title)
    for number in seeds:
        for rule, pair in scores["fusion", number].rules.items():
            table.add(RULE_NAMES[rule], "zero-shot abs_rel", number, pair[0])
            table.add(RULE_NAMES[rule], "zero-shot d1", number, pair[1])
    return table


def _mean(
    scores: Mapping[tuple[str, int], Scores], seeds: Sequence[int], name: str, rig: str | None = None
) -> float:
    values = [scores[name, n].zero_shot[0] if rig is None else scores[name, n].rigs[rig][0] for n in seeds]
    return 100 * float(np.mean(values))


def _claims(scores: Mapping[tuple[str, int], Scores], seeds: Sequence[int]) -> list[Claim]:
    at = {name: _mean(scores, seeds, name) for name in MODELS}
    rules = {
        rule: 100 * float(np.mean([scores["fusion", n].rules[rule][0] for n in seeds])) for rule in RULE_NAMES
    }
    on_f = {name: _mean(scores, seeds, name, "F") for name in MODELS}
    listed = ", ".join(f"{NAMES[name]} {value:.1f}" for name, value in at.items())
    return [
        Claim(
            "Trained on one camera, the fusion of both cues has the lowest error on cameras never seen",
            "section 4, Table 3",
            at["fusion"] < min(at["direct"], at["focal"], at["vertical"]),
            f"Mean AbsRel % over the cameras B to F: {listed}.",
        ),
        Claim(
            "Depth regressed directly does not transfer to other cameras",
            "section 1",
            at["direct"] > 1.15 * at["fusion"],
            f"direct {at['direct']:.1f}, fusion {at['fusion']:.1f}. But direct regression that is SHOWN the "
            f"ground "
            f"depth as an input reaches {at['direct-ground']:.1f}: at this scale the embedding carries "
            f"{_share(at):.0f} % of the gain, and the paper does not say whether its baseline had it.",
        ),
        Claim(
            "The cues complement each other",
            "section 3.4",
            at["fusion"] < min(rules["focal"], rules["vertical"]),
            f"On the same model: focal depth alone {rules['focal']:.1f}, vertical depth alone "
            f"{rules['vertical']:.1f}, fused {rules['scale']:.1f}.",
        ),
        Claim(
            "Weighting by learned uncertainty beats a plain mean",
            "Eq. 4, Table 8",
            rules["scale"] < rules["mean"],
            f"1/uncertainty {rules['scale']:.1f}, 1/uncertainty^2 {rules['variance']:.1f}, mean "
            f"{rules['mean']:.1f}, "
            f"the surer cue {rules['select']:.1f}.",
        ),
        Claim(
            "Where objects are larger than in training, the vertical cue holds",
            "section 3.1",
            on_f["vertical"] < on_f["focal"],
            f"AbsRel % on F (objects 1.3 times larger): focal {on_f['focal']:.1f}, vertical "
            f"{on_f['vertical']:.1f}, "
            f"fusion {on_f['fusion']:.1f}.",
        ),
    ]


def _share(at: Mapping[str, float]) -> float:
    gain = at["direct"] - at["fusion"]
    return 100 * (at["direct"] - at["direct-ground"]) / gain if gain > 0 else float("nan")


def _camera_block(models: Mapping[str, GVDepth]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Calibration of camera D from its depth, the doctor on a pitch 1 degree wrong, and what it costs."""
    streets = Simulated("D", FRAMES, seed=1)
    frames = [streets.frame(index) for index in range(FRAMES)]
    truth = streets.camera
    found = calibrate([frame.depth for frame in frames], [frame.ground for frame in frames], truth)
    wrong = truth.rotate(pitch_deg=PITCH_ERROR)
    told = doctor([frame.depth for frame in frames], wrong)
    numbers: dict[str, Any] = {
        "calibrate D": f"height {found.camera_height:.4f} m, pitch {found.pitch_deg:.3f} degrees "
        f"(truth {truth.camera_height:g}, {truth.pitch_deg:g})",
        "doctor, pitch 1 degree too high": told.verdict,
    }
    tests, growth = streets_of("D"), dict[str, list[float]]()
    for name in ("fusion", "vertical"):
        for label, camera in (("right", truth), ("+1 degree", wrong)):
            depth = infer(models[name], tests, camera=camera)["model"].depth
            growth[f"{NAMES[name]}, {label}"] = (100 * score(depth, tests, bins=BINS)["abs_rel"]).tolist()
    return numbers, growth


def _notes(
    scores: Mapping[tuple[str, int], Scores],
    seeds: Sequence[int],
    steps: int | None,
    numbers: Mapping[str, Any],
) -> list[str]:
    focal, vertical = (100 * scores["fusion", seeds[0]].rules[rule][1] for rule in ("focal", "vertical"))
    fused = 100 * scores["fusion", seeds[0]].rules["scale"][1]
    notes = [
        "A simulated street, images of 48x120 pixels, networks of 0.13 million parameters, all "
        "under-trained: this is "
        "a test of the mechanism, not of driving. Nothing is downloaded.",
        f"{len(seeds)} seed(s) and {FRAMES} images per camera: differences below about 1.5 points mean "
        f"nothing.",
        "The direct network with the ground embedding is no model of the paper; without it the comparison "
        "would "
        "credit the cues with what the embedding does.",
        f"Inside the fusion model each cue alone is worse (delta 1 {focal:.0f} and {vertical:.0f} %) than "
        f"their fusion "
        f"({fused:.0f} %): depth_focal and depth_vertical are no results to use.",
        "The vertical cue in its offset form has an AbsRel tail on some cameras (values near the horizon "
        "that are too "
        "far); fusion removes most of it.",
        f"calibrate on the exact depth of camera D: {numbers['calibrate D']}.",
        f"doctor, told a pitch {PITCH_ERROR:g} degree too high: {numbers['doctor, pitch 1 degree too high']}",
    ]
    if steps is not None and steps < 300:
        notes.append(f"This machine was slow: {steps} training steps instead of 300.")
    return notes


def _pictures(models: Mapping[str, GVDepth], path: Path) -> Figure:
    """Image, truth, direct, fusion, weight of the focal cue and uncertainty, one column per camera."""
    names = ("image", "truth", "direct", "fusion", "focal weight", "uncertainty")
    rows: list[list[Any]] = [[] for _ in names]
    for rig in TEST_RIGS:
        tests = streets_of(rig)
        direct = infer(models["direct"], tests)["model"].depth[3, 0].numpy()
        fusion = infer(models["fusion"], tests)["model"]
        truth = tests.depth[3].numpy()
        picture = (tests.images[3] * 255).round().byte().permute(1, 2, 0).numpy()
        seen = np.where(truth < 80, truth, 0.0)
        tiles = [
            picture,
            color_depth(seen, min_depth=4.0),
            color_depth(direct, min_depth=4.0),
            color_depth(fusion.depth[3, 0].numpy(), min_depth=4.0),
            colorize(fusion.weight_focal[3, 0].numpy(), 1.0, 0.0),
            colorize(torch.log10(fusion.uncertainty[3, 0].clamp_min(1e-3)).numpy(), 1.5, -1.0),
        ]
        for row, tile in zip(rows, tiles, strict=True):
            row.append(tile)
    save_png(path, sheet(rows, [f"camera {rig}" for rig in TEST_RIGS], names))
    return Figure(
        path,
        "Street pictures of six cameras with true depth, depth by direct regression and by fusion, the "
        "focal cue's "
        "weight and the uncertainty",
        "Near is dark, far is pale, sky is gray in the truth. Weight: pale = focal cue. Uncertainty: pale = "
        "large.",
    )


def _growth(growth: Mapping[str, Sequence[float]], path: Path) -> Figure:
    figure = new_figure(6.4, 3.6, "gvdepth", "demo")
    ax = figure.subplots()
    colors = {"fusion": "#3b6ea5", "vertical cue (offset)": "#c44e52"}
    places = np.arange(len(BINS) - 1)
    for label, values in growth.items():
        name, _, what = label.rpartition(", ")
        ax.plot(places, values, "o-" if what == "right" else "o--", color=colors[name], label=label)
    ax.set_xticks(places, [f"{low:g}-{high:g} m" for low, high in pairwise(BINS)])
    clean_axes(ax, "Camera D: what a pitch that is 1 degree wrong costs", y="AbsRel %")
    ax.legend(fontsize=8)
    save_figure(figure, path)
    return Figure(
        path,
        "AbsRel per distance of the fusion and the vertical model, with the right pitch and with one degree "
        "too much",
        "A wrong pitch costs the more the farther away; the vertical cue suffers from it.",
    )


method = Method(
    name="gvdepth",
    package="gvdepth",
    title="GVDepth: metric depth for any vehicle's camera",
    paper=PAPER,
    url="https://arxiv.org/abs/2412.06080",
    summary="Object size and place on the road, fused by uncertainty: trained on one camera, used with any.",
    demo=demo,
)

"""The simulated experiment of section 6: one camera to train with, six to test on, and what is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.images import to_tensor
from gvdepth.camera import Camera
from gvdepth.config import Fusion
from gvdepth.data.simulated import RIGS, Simulated
from gvdepth.measures import error_sums, from_sums
from gvdepth.modeling import GVDepth, load_model
from gvdepth.modeling_head import fuse_cues
from gvdepth.train_checkpoints import MODELS, STEPS, fit, training_streets

TEST_RIGS = tuple(name for name in RIGS if name != "train")
RULES: tuple[Fusion, ...] = ("scale", "variance", "mean", "select", "focal", "vertical")
BINS = (1.0, 5.0, 10.0, 20.0, 40.0, 80.0)
TEST_SEED, TEST_IMAGES = 1, 32
_LEAST, _MOST = 1.0, 80.0
_TRIAL_STEPS, _TRIAL_SECONDS = 20, 4.0


@dataclass(frozen=True, slots=True)
class Streets:
    """The streets that one rig sees.

    Args:
        images: (n, 3, H, W) in [0, 1].
        depth: (n, H, W) metres, 0 = sky.
        camera: the rig.
    """

    images: Tensor
    depth: Tensor
    camera: Camera


def streets_of(rig: str, count: int = TEST_IMAGES) -> Streets:
    """The test images of a rig; they are none of the training streets, and are rendered once."""
    return _rendered(rig, count)


@lru_cache(maxsize=16)
def _rendered(rig: str, count: int) -> Streets:
    streets = Simulated(rig, count, seed=TEST_SEED)
    samples = [streets[index] for index in range(count)]
    images = torch.stack([to_tensor(sample.image) for sample in samples])
    depth = torch.from_numpy(np.stack([sample.depth for sample in samples]))
    return Streets(images, depth, streets.camera)


@torch.inference_mode()
def infer(
    model: GVDepth, seen: Streets, *, camera: Camera | None = None, rules: Sequence[Fusion] = ()
) -> dict[str, Any]:
    """Depth of every test image, by the model's rule and by others on the same two cues.

    Args:
        model: in eval mode.
        seen: the images.
        camera: what the model is told; by default the truth.
        rules: further fusion rules.

    Returns:
        ``"model"`` and each rule -> :class:`gvdepth.modeling.Output`.
    """
    told = (camera or seen.camera).tensor()[None].expand(len(seen.images), 7)
    cues = model.cues(seen.images, told, roll=False)
    size = seen.images.shape[-2:]
    found = {"model": model.assemble(cues, fuse_cues(cues, model.config), size)}
    return found | {rule: model.assemble(cues, fuse_cues(cues, model.config, rule), size) for rule in rules}


def score(
    depth: Tensor, seen: Streets, bins: Sequence[float] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Metrics, each the mean over images, of depths in [1, 80] metres; per distance with ``bins``."""
    sums = error_sums(
        depth[:, 0].clamp(1e-3, _MOST), seen.depth, max_depth=_MOST, mask=seen.depth >= _LEAST, bins=bins
    )
    with np.errstate(invalid="ignore"):
        return {name: np.nanmean(values, axis=0) for name, values in from_sums(sums).items()}


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one model: rig -> (AbsRel, delta 1), and rule -> the same, mean over the unseen rigs."""

    rigs: Mapping[str, tuple[float, float]]
    rules: Mapping[str, tuple[float, float]]

    @property
    def zero_shot(self) -> tuple[float, float]:
        """Mean over the rigs B to F."""
        unseen = np.array([self.rigs[rig] for rig in TEST_RIGS if rig != "A"])
        return float(unseen[:, 0].mean()), float(unseen[:, 1].mean())


def measure(model: GVDepth, count: int = TEST_IMAGES) -> Scores:
    """A model on all six rigs; of a fusion model every rule too."""
    rules = RULES if model.config.cue == "fusion" else ()
    rigs: dict[str, tuple[float, float]] = {}
    by_rule: dict[str, list[tuple[float, float]]] = {rule: [] for rule in rules}
    for rig in TEST_RIGS:
        seen = streets_of(rig, count)
        for name, output in infer(model, seen, rules=rules).items():
            found = score(output.depth, seen)
            pair = float(found["abs_rel"]), float(found["d1"])
            if name == "model":
                rigs[rig] = pair
            elif rig != "A":
                by_rule[name].append(pair)
    means = {rule: np.mean(pairs, axis=0) for rule, pairs in by_rule.items()}
    return Scores(rigs, {rule: (float(pair[0]), float(pair[1])) for rule, pair in means.items()})


def shipped(name: str) -> GVDepth:
    """The shipped model of :data:`MODELS`."""
    return load_model(f"tiny-{name}")


@lru_cache(maxsize=2)
def _streets(seed: int) -> Simulated:
    return training_streets(seed)


def _job(name: str, seed: int, steps: int, folder: str) -> str:
    torch.set_num_threads(1)
    place = Path(folder) / f"{name}-{seed}"
    fit(name, _streets(seed), steps=steps, seed=seed).save_pretrained(place)
    return str(place)


def trial_seconds(steps: int = _TRIAL_STEPS) -> float:
    """How long some training steps take here, the rendering of their streets not counted."""
    streets = training_streets(0, 16)
    for index in range(len(streets)):
        streets[index]
    start = time.perf_counter()
    fit("fusion", streets, steps=steps)
    return time.perf_counter() - start


def train_all(
    seeds: Sequence[int], folder: str | Path, *, steps: int | None = None
) -> tuple[dict[tuple[str, int], GVDepth], int]:
    """Train every model of :data:`MODELS` on every seed, in as many processes as there are cores.

    Args:
        seeds: of weights, streets and draws.
        folder: where the models go.
        steps: of each; None takes the demo's, halved where this machine is too slow.

    Returns:
        The models by name and seed, and the steps.
    """
    if steps is None:
        steps = STEPS["demo"] if trial_seconds() <= _TRIAL_SECONDS else STEPS["demo"] // 2
    jobs = [(name, seed) for seed in seeds for name in MODELS]
    workers = min(len(jobs), os.cpu_count() or 1, 8)
    if workers == 1:
        places = [_job(name, seed, steps, str(folder)) for name, seed in jobs]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            futures = [pool.submit(_job, name, seed, steps, str(folder)) for name, seed in jobs]
            places = [future.result() for future in futures]
    return {job: GVDepth.from_pretrained(place) for job, place in zip(jobs, places, strict=True)}, steps

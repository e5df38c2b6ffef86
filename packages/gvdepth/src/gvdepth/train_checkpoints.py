"""Train the demo's models on simulated streets.

``python -m gvdepth.train_checkpoints [OUT] [--steps 2000] [--seed 0]`` (some minutes a model on one core).
The
protocol is section 6's: ONE camera, random crops of its images, nothing but the simulator.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusion_core.atomic import atomic_write
from gvdepth.config import AugmentConfig, GVDepthConfig, TrainConfig
from gvdepth.data.base import Samples
from gvdepth.data.simulated import Simulated
from gvdepth.modeling import GVDepth
from gvdepth.train import StepSampler, Views, collate_views, make_scheduler, train_step

MODELS: dict[str, dict[str, Any]] = {
    "direct": {"cue": "direct"},
    "direct-ground": {"cue": "direct", "embedding": True},
    "focal": {"cue": "focal"},
    "vertical": {"cue": "vertical"},
    "fusion": {"cue": "fusion"},
}
"""The models of the experiment; direct-ground is the baseline that is also shown the ground depth."""

IMAGES = 700
STEPS = {"shipped": 2000, "demo": 300}


def training_streets(seed: int = 0, count: int = IMAGES) -> Simulated:
    """The images to train with: one camera, one series of streets for each seed."""
    return Simulated("train", count, seed=1000 + seed, keep=True)


def recipe(steps: int, seed: int) -> TrainConfig:
    """AdamW, one cycle to 3e-3, batches of 8 random crops at 48x120."""
    return TrainConfig(
        steps=steps,
        batch_size=8,
        lr=3e-3,
        final_lr=0.0,
        schedule="onecycle",
        weight_decay=1e-2,
        consistency_weight=0.0,
        seed=seed,
        augment=AugmentConfig(size=(48, 120), crop_area=(0.25, 1.0), keep_aspect=True, flip=0.5, color=0.2),
    )


def new_model(name: str, seed: int) -> GVDepth:
    """An untrained model of :data:`MODELS`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GVDepth(GVDepthConfig.tiny(input_height=48, **MODELS[name]))


def fit(
    name: str,
    samples: Samples,
    *,
    steps: int,
    seed: int = 0,
    told: Callable[[int, float], None] | None = None,
) -> GVDepth:
    """Train one model, in this process and on one device; see :class:`gvdepth.Trainer` for the real loop.

    Args:
        name: of :data:`MODELS`.
        samples: to train with.
        steps: optimizer steps.
        seed: of the weights and the draws.
        told: gets the number of each step and its loss.
    """
    model, config = new_model(name, seed).train(), recipe(steps, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    scheduler = make_scheduler(optimizer, config)
    sampler = StepSampler(len(samples), config.batch_size, 1, seed)
    views = Views(samples, config, sampler)
    step = 0
    for epoch in itertools.count():
        views.set_epoch(epoch)
        for keys in sampler:
            losses = train_step(model, collate_views([views[key] for key in keys]), across_ranks=False)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm or 1.0)
            optimizer.step()
            scheduler.step()
            step += 1
            if told is not None:
                told(step, float(losses["loss"].detach()))
            if step == steps:
                return model.eval()
    raise AssertionError


def main() -> None:
    """Write the checkpoints and what they were made of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS["shipped"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = training_streets(options.seed)
    for name in options.models:
        started = time.monotonic()

        def told(step: int, loss: float, name: str = name) -> None:
            if step % 100 == 0:
                sys.stdout.write(f"{name} step {step}: loss {loss:.3f}\n")
                sys.stdout.flush()

        model = fit(name, samples, steps=options.steps, seed=options.seed, told=told)
        folder = options.out / f"tiny-{name}"
        model.half().save_pretrained(folder)
        (folder / "README.md").unlink()  # one card for all of them
        record = {
            "data": "simulated streets only (gvdepth.simulate), one camera (RIGS['train'])",
            "streets": IMAGES,
            "steps": options.steps,
            "seed": options.seed,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "recipe": recipe(options.steps, options.seed).to_dict(),
        }
        with atomic_write(folder / "training.json", "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

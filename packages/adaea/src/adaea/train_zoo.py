"""Train the nine shipped networks and cut the shipped test crops: ``python -m adaea.train_zoo --out DIR``.

Needs scikit-image and scikit-learn for their photographs. One thread, so that a machine gives the same
weights again.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaea.scenes import FOLDER, make_scenes
from adaea.zoo import make_network
from fusion_core.checkpoint import atomic_write, save_tensors
from fusion_core.results import dump_json
from fusion_core.seeding import generator

_EPSILON = 8 / 255


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained: AdamW, weight decay 1e-3, one-cycle schedule, batches of 64."""

    epochs: int
    lr: float = 2e-3
    adversarial: bool = False


RECIPES = {
    "res16": Recipe(6),
    "inc16": Recipe(6),
    "vit8": Recipe(10),
    "vit8m": Recipe(10),
    "vgg12": Recipe(5),
    "vit16": Recipe(10),
    "mixer8": Recipe(10),
    "res12x2": Recipe(5),
    "res16_AT": Recipe(5, adversarial=True),
}


def train(network: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, *, seed: int) -> None:
    """Train a network in place.

    Args:
        network: takes images in [0, 1].
        images: ``(n, 3, 32, 32)`` float32 in [0, 1].
        labels: ``(n,)`` int64.
        recipe: epochs and kind; an adversarial one takes one-step linf examples of 8/255.
        seed: of the order of the samples.
    """
    batches = -(-len(images) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * batches)
    draw = generator(seed, "order")
    network.train()
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(images), generator=draw).split(64):
            x, y = images[rows], labels[rows]
            if recipe.adversarial:
                x = _one_step(network, x, y, draw)
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def _one_step(network: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """An FGSM example from a random start inside the ball of 8/255."""
    start = torch.empty_like(images).uniform_(-_EPSILON, _EPSILON, generator=draw)
    x = (images + start).clamp(0, 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), labels), x)
    moved = x.detach() + 1.25 * _EPSILON * gradient.sign()
    return torch.clamp(images + (moved - images).clamp(-_EPSILON, _EPSILON), 0, 1)


def train_zoo(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Train all networks; writes ``zoo.safetensors``, ``scenes.npz`` and ``zoo.json`` into ``out``.

    Returns:
        Name -> test accuracy, parameters, epochs, seconds.
    """
    images, labels = make_scenes(2500, "train", seed)
    test_images, test_labels = make_scenes(600, "test", seed)
    x, x_test = images.float() / 255, test_images.float() / 255
    state: dict[str, Tensor] = {}
    record: dict[str, Any] = {}
    for place, (name, recipe) in enumerate(RECIPES.items()):
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1000 + place)
            network = make_network(name)
        train(network, x, labels, recipe, seed=seed * 1000 + place)
        with torch.no_grad():
            accuracy = float((network(x_test).argmax(1) == test_labels).float().mean())
        state |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        record[name] = {
            "accuracy": round(accuracy, 4),
            "parameters": sum(p.numel() for p in network.parameters()),
            "epochs": recipe.epochs,
            "adversarial": recipe.adversarial,
            "seconds": round(time.perf_counter() - start, 1),
        }
        sys.stderr.write(f"{name}: {record[name]}\n")
    save_tensors(out / "zoo.safetensors", state)
    with atomic_write(out / "scenes.npz") as file:
        np.savez_compressed(file, images=test_images.numpy(), labels=test_labels.numpy().astype(np.int8))
    with atomic_write(out / "zoo.json", "w") as file:
        file.write(dump_json({"seed": seed, "torch": torch.__version__, "networks": record}))
    return record


def main() -> None:
    """Read ``--out`` and ``--seed`` and train."""
    parser = argparse.ArgumentParser(description="Train the networks that adaea ships (about 2 minutes).")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_zoo(options.out, seed=options.seed)


if __name__ == "__main__":
    main()

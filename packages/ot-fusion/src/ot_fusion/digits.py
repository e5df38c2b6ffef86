"""The demo's task: digits of scikit-learn, multilayer perceptrons and a tiny vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion_core.errors import require_extra
from fusion_core.seeding import generator

__all__ = ["Digits", "TinyViT", "accuracy", "fit", "load_digits", "train_mlp", "train_vit"]


@dataclass(frozen=True, eq=False)
class Digits:
    """1297 training and 500 test images of 8 x 8 pixels, in [0, 1]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The digits that ship with scikit-learn, in the fixed order of the recorded experiment.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    datasets: Any = require_extra("sklearn.datasets", "demo", "ot-fusion")
    found = datasets.load_digits()
    order = np.random.RandomState(0).permutation(len(found.data))
    images = torch.tensor(found.data[order] / 16, dtype=torch.float32)
    labels = torch.tensor(found.target[order])
    return Digits(images[:1297], labels[:1297], images[1297:], labels[1297:])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch: int = 64,
    one_cycle: bool = False,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> nn.Module:
    """Train a classifier in place; Adam at a fixed rate, or AdamW on one cycle."""
    draws = generator(seed, "fit")
    steps = epochs * -(-len(images) // batch)
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr) if one_cycle else torch.optim.Adam(model.parameters(), lr)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps) if one_cycle else None
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=draws).split(batch):
            x = images[rows] if augment is None else augment(images[rows], draws)
            loss = nn.functional.cross_entropy(model(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return model.eval()


def train_mlp(data: Digits, width: int, seed: int, *, epochs: int = 40) -> nn.Sequential:
    """64 - width - width - 10 with ReLU."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
    fit(model, data.train, data.train_labels, epochs=epochs, lr=1e-3, seed=seed)
    return model


class TinyViT(nn.Module):
    """A pre-norm vision transformer for 8 x 8 pixels.

    Patches of 2 x 2, width 32, 4 heads, MLP 64, 3 blocks.
    """

    def __init__(self, width: int = 32, heads: int = 4, inner: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads, inner) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of flat images ``(batch, 64)``."""
        h = self.patches(x.view(-1, 1, 8, 8)).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def _shifted(x: Tensor, draws: torch.Generator) -> Tensor:
    """Images moved by at most one pixel, all of a batch alike."""
    down, right = (int(n) for n in torch.randint(-1, 2, (2,), generator=draws))
    padded = nn.functional.pad(x.view(-1, 8, 8), (1, 1, 1, 1))
    return padded[:, 1 + down : 9 + down, 1 + right : 9 + right].flatten(1)


def train_vit(
    data: Digits, seed: int, *, epochs: int = 60, lr: float = 3e-3, model: nn.Module | None = None
) -> nn.Module:
    """A tiny vision transformer, from scratch or from a given model."""
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = TinyViT()
    return fit(
        model,
        data.train,
        data.train_labels,
        epochs=epochs,
        lr=lr,
        seed=seed,
        one_cycle=True,
        augment=_shifted,
    )

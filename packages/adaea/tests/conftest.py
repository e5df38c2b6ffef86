"""Tiny surrogates that the tests of the attack share."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def _smooth(channels, classes, seed, dtype, width, symmetric):
    """A smooth network of any image size; with ``symmetric`` it does not see whether an image is mirrored."""
    made = torch.Generator().manual_seed(seed)
    layers = [
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    ]
    net = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(
                torch.randn(p.shape, generator=made, dtype=torch.float64) * (2.0 if p.dim() == 2 else 0.5)
            )
            if symmetric and p.dim() == 4:
                p.copy_((p + p.flip(-1)) / 2)
    return net


@pytest.fixture
def nets():
    """``nets(3, channels=3, classes=4)``: name -> network, in training mode as a user may leave it."""

    def make(count=3, *, channels=3, classes=4, dtype=torch.float64, width=6, symmetric=False, first=0):
        return {
            f"net{k}": _smooth(channels, classes, first + k, dtype, width, symmetric) for k in range(count)
        }

    return make


@pytest.fixture
def batch():
    """``batch(2, channels=3, size=8)``: images in [0.2, 0.8] and labels below 4."""

    def make(count=2, *, channels=3, size=8, dtype=torch.float64, seed=0, classes=4):
        made = torch.Generator().manual_seed(seed)
        shape = (count, channels, size, size) if isinstance(size, int) else (count, channels, *size)
        images = 0.2 + 0.6 * torch.rand(shape, generator=made, dtype=torch.float64)
        return images.to(dtype), torch.randint(0, classes, (count,), generator=made)

    return make

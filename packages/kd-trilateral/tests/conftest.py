"""A small distillation problem that the tests of this package share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kd_trilateral as kdt
from fusion_core.modules import logits_of


@dataclass
class Problem:
    """A student, a loss and a batch; ``step`` takes one whole bilevel step."""

    student: nn.Module
    loss: kdt.TrilateralKD
    x: Any
    zt: Tensor
    y: Tensor
    xv: Any
    yv: Tensor
    ztv: Tensor

    def sgd(self, lr=0.1, **options):
        return torch.optim.SGD(self.student.parameters(), lr=lr, **options)

    def bilevel(self, engine="jvp", optimizer=None, **options):
        held_out = [(self.xv, self.yv, self.ztv)]
        options = {"every": 1, "outer_loss": "ce", "val_batches": held_out, **options}
        return kdt.Bilevel(self.student, self.loss, optimizer or self.sgd(), hypergradient=engine, **options)

    def logits(self):
        return logits_of(self.student(**self.x) if isinstance(self.x, dict) else self.student(self.x))

    def step(self, bilevel):
        out = self.loss(self.logits(), self.zt, self.y)
        bilevel.optimizer.zero_grad()
        bilevel.backward(out)
        bilevel.step(self.x, out)
        return out


@pytest.fixture(scope="session")
def problem():
    """Builds a :class:`Problem`; every random number in it follows from ``seed``."""

    def make(
        student=None,
        *,
        batch=6,
        inputs=5,
        classes=3,
        shape=None,
        dtype=torch.float64,
        device="cpu",
        seed=0,
        task="multiclass",
        wide_head=True,
        **options,
    ):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            outputs = classes if wide_head else 1
            if student is None:
                student = lambda: nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs))
            built = student().to(device, dtype)
        loss = kdt.TrilateralKD(
            classes, **{"seed": seed, "preset": "paper", "task": task, "temperature": 2.0, **options}
        ).to(device, torch.promote_types(dtype, torch.float32))
        place = (inputs,) if shape is None else shape
        x, xv = draw(batch, *place), draw(batch, *place)
        zt, ztv = 2.0 * draw(batch, outputs), 2.0 * draw(batch, outputs)
        y, yv = (torch.randint(classes, (batch,), generator=generator).to(device) for _ in range(2))
        if loss.geometry.needs_class_mean and loss.tbar_from == "train":
            loss.fit_class_mean(zt, y)
        return Problem(built, loss, x, zt, y, xv, yv, ztv)

    return make


@pytest.fixture(scope="session")
def relative_error():
    """Largest error over the largest entry, as the package's tolerances are stated."""

    def error(actual, expected):
        return float((actual - expected).abs().max() / expected.abs().max())

    return error

"""Optimizers and learning-rate schedules of the training (section 2.6)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from mantis_photoz.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """NAdam as torch has it (the authors'), or AdamW."""
    kind: Any = {"nadam": torch.optim.NAdam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


class Plateau(ReduceLROnPlateau):
    """The authors' schedule: the rate is halved after ``patience`` epochs without a lower validation loss.

    It also counts the epochs since the best one, for the early stop. ``step()`` without a number, which the
    loop calls after each epoch, does nothing; the validation calls :meth:`observe`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        factor = 0.5 if config.schedule == "plateau" else 1.0 - 1e-12
        super().__init__(optimizer, factor=factor, patience=config.patience, min_lr=config.min_lr)
        self.active = config.schedule == "plateau"
        self.lowest, self.waited = math.inf, 0

    def step(self, metrics: Any = None, epoch: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Does nothing; see :meth:`observe`."""

    def observe(self, loss: float) -> None:
        """Take an epoch's validation loss."""
        self.waited = 0 if loss < self.lowest else self.waited + 1
        self.lowest = min(self.lowest, loss)
        if self.active:
            super().step(loss)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> tuple[Any, Any]:
    """The schedule and what it is stepped by: ``"step"`` or ``"epoch"``.

    Args:
        optimizer: whose rate it sets.
        config: ``schedule``, ``warmup``, ``min_lr``.
        steps: optimizer steps in all.
    """
    if config.schedule == "onecycle":
        share = min(max(config.warmup, 1e-6), 1 - 1e-6)
        return OneCycleLR(optimizer, config.lr, total_steps=steps + 1, pct_start=share), "step"
    if config.schedule == "cosine":
        warm, floor = max(1, round(config.warmup * steps)), config.min_lr / config.lr

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            done = min((step - warm) / max(steps - warm, 1), 1.0)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

        return LambdaLR(optimizer, factor), "step"
    return Plateau(optimizer, config), "epoch"

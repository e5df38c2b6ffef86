"""Pieces of the training loop: the teacher's logits by row, the order of rows, optimiser and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.checkpoint import digest
from fusion_core.errors import ShapeError
from fusion_core.seeding import generator
from kd_trilateral.cache import TeacherCache
from kd_trilateral.config import Config
from kd_trilateral.module import TrilateralKD
from kd_trilateral.rowsource import Rows, check_teacher, moved, teacher_logits

Teacher = TeacherCache | Tensor | nn.Module


class TeacherSource:
    """The teacher's logits by training row, whatever they come from."""

    def __init__(
        self, teacher: Teacher, rows: Rows, device: torch.device, num_workers: int, task: str
    ) -> None:
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        if isinstance(teacher, nn.Module):
            check_teacher(teacher)
            index = torch.arange(len(rows))
            self.logits: Tensor | None = teacher_logits(teacher, rows, index, num_workers=num_workers)
        else:
            self.logits = None if self.cache is not None else torch.as_tensor(teacher)
        count = (
            len(self.cache) if self.cache is not None else len(self.logits) if self.logits is not None else 0
        )
        if count != len(rows):
            raise ShapeError(f"the teacher has logits of {count} rows, the training data {len(rows)}")
        if self.logits is not None and task == "binary" and self.logits.dim() == 1:
            self.logits = self.logits.unsqueeze(-1)
        self.device = device
        if self.logits is not None:
            self.logits = self.logits.to(device)

    @property
    def num_classes(self) -> int:
        """K, 2 for a single logit."""
        if self.cache is not None:
            return self.cache.num_classes
        assert self.logits is not None
        return max(int(self.logits.shape[-1]), 2)

    def __getitem__(self, index: Tensor) -> Tensor:
        if self.cache is not None:
            return self.cache.logits(index).to(self.device, non_blocking=True)
        assert self.logits is not None
        return self.logits[index.to(self.device)]

    def fill(self, loss: TrilateralKD, rows: Rows) -> None:
        """Give a loss the T-bar of these rows."""
        if self.cache is not None:
            loss.set_class_mean(self.cache.class_mean(loss.geometry_temperature).to(loss.tbar))
        else:
            assert self.logits is not None
            loss.fit_class_mean(self.logits, rows.labels().long())

    def digest(self) -> str:
        """Of what the logits are, for the fingerprint of a run."""
        if self.cache is not None:
            return digest(self.cache.store.fingerprint)
        assert self.logits is not None
        return digest(self.logits.cpu())


def row_order(count: int, batch_size: int, seed: int, epoch: int, weights: Tensor | None) -> list[Tensor]:
    """Row numbers of each step of an epoch; a stream of its own, so that any epoch can be made again."""
    draw = generator(seed, "order", epoch)
    if weights is None:
        index = torch.randperm(count, generator=draw)
    else:
        index = torch.multinomial(weights, count, replacement=True, generator=draw)
    batches = list(index.split(batch_size))
    # A last batch of one row has no variance for batch normalisation.
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


def make_optimizer(config: Config, student: nn.Module) -> torch.optim.Optimizer:
    """The student's optimiser that the settings name."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **common)
    return (torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW)(parameters, **common)


def set_lr(optimizer: torch.optim.Optimizer, config: Config, step: int, total: int) -> None:
    """Cosine to 0 over ``total`` steps, or constant."""
    factor = 0.5 * (1.0 + math.cos(math.pi * step / total)) if config.schedule == "cosine" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor


def held_out_draws(
    rows: Rows, teacher: Tensor | None, size: int, seed: int, device: torch.device
) -> Callable[[int], tuple[Any, Tensor, Tensor | None]]:
    """Held-out batch of any outer step: a function of its number, so that a resumed run draws the same."""

    def draw(outer_step: int) -> tuple[Any, Tensor, Tensor | None]:
        index = torch.randint(len(rows), (size,), generator=generator(seed, "held-out", outer_step))
        x, y = rows[index]
        return moved(x, device), y.to(device), None if teacher is None else teacher[index]

    return draw

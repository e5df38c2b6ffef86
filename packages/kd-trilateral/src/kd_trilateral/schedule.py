"""Pieces of the training loop: the teacher's logits by row, the order of rows, optimiser and schedule."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion_core.checkpoint import digest
from fusion_core.errors import DataError, InputError, ShapeError
from fusion_core.seeding import generator
from kd_trilateral.cache import TeacherCache
from kd_trilateral.config import Config
from kd_trilateral.losses import as_pair
from kd_trilateral.module import TrilateralKD
from kd_trilateral.rowsource import Rows, check_teacher, moved, teacher_logits

Teacher = TeacherCache | Tensor | nn.Module | str | os.PathLike[str]
_CHUNK = 16384


class TeacherSource:
    """The teacher's logits by row number: training rows first, then held-out rows given apart.

    Args:
        teacher: a cache, the path of one, logits ``(rows, classes)``, or a module (run once over the rows).
        rows: all training rows, before any are held out.
        held: held-out rows given apart; None where they are drawn from ``rows``.
        held_teacher: logits of ``held``; None = from a module, else unknown.
        with_held: whether the logits of ``held`` will be asked for.
        device: where logits go.
        config: says the task and what to do with rows that are not finite.
        num_workers: loader processes.

    Raises:
        InputError: no teacher, or something else than one.
        ShapeError: another number of rows.
        DataError: logits that are not finite, by row, or logits of held-out rows that are needed and missing.
    """

    def __init__(
        self,
        teacher: Teacher,
        rows: Rows,
        held: Rows | None,
        held_teacher: Tensor | None,
        with_held: bool,
        device: torch.device,
        config: Config,
        num_workers: int = 0,
    ) -> None:
        self.device, self.binary = device, config.task == "binary"
        if isinstance(teacher, (str, os.PathLike)):
            teacher = TeacherCache.open(teacher, data=rows)
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        self.logits: Tensor | None = None
        if isinstance(teacher, nn.Module):
            check_teacher(teacher)
            self.logits = teacher_logits(teacher, rows, num_workers=num_workers)
            if held is not None and with_held and held_teacher is None:
                held_teacher = teacher_logits(teacher, held, num_workers=num_workers)
        elif self.cache is None:
            if not isinstance(teacher, (Tensor, np.ndarray)):
                raise InputError(
                    f"teacher is a {type(teacher).__name__}, wanted a TeacherCache or its path, logits "
                    "(rows, classes) "
                    "of the training rows, or a module"
                )
            self.logits = torch.as_tensor(teacher)
        own = self.cache if self.logits is None else self.logits
        self.count = 0 if own is None else len(own)
        if self.count != len(rows):
            raise ShapeError(f"the teacher has logits of {self.count} rows, the training data {len(rows)}")
        self.held: Tensor | None = None
        if held is not None and held_teacher is not None:
            self.held = self._ready("val_teacher", torch.as_tensor(held_teacher), len(held), config)
        if held is not None and with_held and self.held is None:
            raise DataError(
                "refit and val_mix need the teacher's logits of the held-out rows too; pass val_teacher"
            )
        if self.logits is not None:
            self.logits = self._ready("teacher", self.logits, len(rows), config)

    def _ready(self, name: str, logits: Tensor, count: int, config: Config) -> Tensor:
        logits = as_pair(logits) if self.binary else logits
        if logits.dim() != 2 or len(logits) != count:
            raise ShapeError(f"{name} has shape {tuple(logits.shape)}, wanted ({count}, classes)")
        bad = ~torch.isfinite(logits).all(-1)
        if config.on_bad_teacher == "error" and bool(bad.any()):
            raise DataError(
                f"{name} holds NaN or infinity in rows {bad.nonzero().flatten()[:8].tolist()} "
                f"({int(bad.sum())} in "
                "all); mend them, or pass on_bad_teacher='zero_alpha' to learn from the label alone there"
            )
        return logits.to(self.device)

    @property
    def views(self) -> int:
        """How many fixed versions of a random data set there are logits of."""
        return 1 if self.cache is None else self.cache.views

    @property
    def num_classes(self) -> int:
        """K."""
        if self.cache is not None:
            return self.cache.num_classes
        assert self.logits is not None
        return int(self.logits.shape[-1])

    def get(self, ids: Tensor, view: int = 0) -> Tensor:
        """Logits of rows by number; held-out rows given apart are counted after the training rows."""
        mine = ids < self.count
        if bool(mine.all()):
            return self._own(ids, view)
        assert self.held is not None
        out = self.held.new_empty(len(ids), self.held.shape[1])
        if bool(mine.any()):
            out[mine.to(self.device)] = self._own(ids[mine], view).to(out)
        out[~mine.to(self.device)] = self.held[(ids[~mine] - self.count).to(self.device)]
        return out

    def _own(self, ids: Tensor, view: int) -> Tensor:
        if self.cache is not None:
            return self.cache.logits(ids, view).to(self.device, non_blocking=True)
        assert self.logits is not None
        return self.logits[ids.to(self.device)]

    def fill(self, loss: TrilateralKD, ids: Tensor, labels: Tensor) -> None:
        """Give a loss the T-bar of some rows, all views of them."""
        state = None
        for part, y in zip(ids.split(_CHUNK), labels.split(_CHUNK), strict=True):
            for view in range(self.views):
                state = loss.fit_class_mean(self.get(part, view), y, state)

    def digest(self) -> str:
        """Of what the logits are, for the fingerprint of a run."""
        parts = [None if t is None else t.cpu() for t in (self.logits, self.held)]
        return digest(parts, None if self.cache is None else self.cache.store.fingerprint)


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
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
    make = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return make(parameters, lr=lr, weight_decay=decay)


def set_lr(optimizer: torch.optim.Optimizer, config: Config, step: int, total: int) -> None:
    """Cosine to 0 over ``total`` steps, or constant."""
    factor = 0.5 * (1.0 + math.cos(math.pi * step / total)) if config.schedule == "cosine" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor


def held_out_draws(
    rows: Rows, logits: Callable[[Tensor], Tensor] | None, size: int, seed: int, device: torch.device
) -> Callable[[int], tuple[Any, Tensor, Tensor | None]]:
    """Held-out batch of any outer step: a function of its number, so that a resumed run draws the same.

    Args:
        rows: held-out rows.
        logits: the teacher's, by place among them; None where no engine asks.
        size: rows per batch.
        seed: of the draws.
        device: where batches go.
    """

    def draw(outer_step: int) -> tuple[Any, Tensor, Tensor | None]:
        index = torch.randint(len(rows), (size,), generator=generator(seed, "held-out", outer_step))
        x, y = rows[index]
        return moved(x, device), y.to(device), None if logits is None else logits(index)

    return draw

"""Small distillation problems on data that ships in wheels, with known wrong teachers and wrong labels.

``digits`` and ``cancer`` are scikit-learn's bundled sets; ``ctr`` is a simulation of click logs (no such data
ships in a wheel). Each draw of a task is fixed by its seed, and remembers which rows were spoilt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.errors import ConfigError, check_range, require_extra
from fusion_core.seeding import generator, rng
from kd_trilateral.training import Splits

CLEAN, TEACHER_WRONG, LABEL_WRONG, BOTH_WRONG = range(4)


@dataclass
class Task:
    """One draw of a problem.

    Attributes:
        splits: training rows (spoilt), held-out rows, test rows, the teacher's (spoilt) logits.
        kind: per training row ``CLEAN``, ``TEACHER_WRONG``, ``LABEL_WRONG`` or ``BOTH_WRONG``.
        student: makes a fresh student; the same weights for the same seed.
        settings: of the training run.
        teacher_accuracy: of the clean teacher on the test rows, in [0, 1].
    """

    splits: Splits
    kind: Tensor
    student: Callable[[], nn.Module]
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    teacher_accuracy: float = 0.0


def mlp(sizes: list[int], seed: int) -> nn.Sequential:
    """A ReLU multilayer perceptron whose initial weights follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "mlp", *sizes).initial_seed())
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 1):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def _train_teacher(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    seed: int,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
) -> nn.Module:
    draw = generator(seed, "teacher batches")
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        index = torch.randint(len(x), (batch_size,), generator=draw)
        loss = F.cross_entropy(net(x[index]), y[index], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def _spoil(
    logits: Tensor, y: Tensor, teacher: float, label: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Roll the logits of some rows by 1..K-1 classes (confidently wrong), move the labels of others."""
    check_range("noise of the teacher", teacher, 0.0, 1.0)
    check_range("noise of the labels", label, 0.0, 1.0)
    count, classes = logits.shape
    draw = generator(seed, "noise")
    bad_teacher = torch.rand(count, generator=draw) < teacher
    bad_label = torch.rand(count, generator=draw) < label
    shift = torch.randint(1, classes, (count,), generator=draw)
    moved = torch.randint(1, classes, (count,), generator=draw)
    columns = (torch.arange(classes) - torch.where(bad_teacher, shift, 0).unsqueeze(-1)) % classes
    labels = torch.where(bad_label, (y + moved) % classes, y)
    kind = bad_teacher.long() * TEACHER_WRONG + bad_label.long() * LABEL_WRONG
    return logits.gather(-1, columns), labels, kind


def _flip(y: Tensor, classes: int, share: float, seed: int) -> Tensor:
    draw = generator(seed, "held-out noise")
    bad = torch.rand(len(y), generator=draw) < share
    return torch.where(bad, (y + torch.randint(1, classes, (len(y),), generator=draw)) % classes, y)


def _make(
    teacher: nn.Module,
    parts: list[tuple[Tensor, Tensor]],
    noise: tuple[float, float],
    val_noise: float,
    seed: int,
    student: list[int],
    settings: dict[str, Any],
) -> Task:
    (x, y), (xv, yv), (xt, yt) = parts
    classes = student[-1]
    with torch.no_grad():
        logits, val_logits, test_logits = (teacher(part) for part in (x, xv, xt))
    spoilt, labels, kind = _spoil(logits, y, *noise, seed)
    splits = Splits(
        train=(x, labels),
        val=(xv, _flip(yv, classes, val_noise, seed)),
        test=(xt, yt),
        teacher=spoilt,
        val_teacher=val_logits,
        num_classes=classes,
    )
    accuracy = float((test_logits.argmax(-1) == yt).double().mean())
    return Task(splits, kind, lambda: mlp(student, seed + 1), settings, accuracy)


def _cut(x: Tensor, y: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    ends = np.cumsum(sizes).tolist()
    return [(x[end - size : end], y[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def digits(
    seed: int = 0,
    *,
    noise: tuple[float, float] = (0.3, 0.3),
    val_noise: float = 0.0,
    rows: int = 600,
    held: int = 150,
) -> Task:
    """Handwritten digits (1797 x 64, scikit-learn), 599 test rows; the teacher learns on the clean pool.

    Args:
        seed: of shuffle, noise and initial weights.
        noise: shares of training rows with a confidently wrong teacher and with a wrong label, drawn
            independently.
        val_noise: share of held-out rows with a wrong label.
        rows: training rows of the student.
        held: held-out rows.
    """
    datasets = require_extra("sklearn.datasets", "demo", "kd-trilateral")
    data = datasets.load_digits()
    order = rng(seed, "digits").permutation(len(data.target))
    x = torch.tensor(data.data[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(data.target[order], dtype=torch.int64)
    third = len(y) // 3
    pool = x[third:], y[third:]
    teacher = _train_teacher(
        mlp([64, 128, 128, 10], seed), *pool, seed, steps=300, batch_size=128, lr=3e-3, label_smoothing=0.05
    )
    parts = [*_cut(*pool, rows, held), (x[:third], y[:third])]
    settings = {"temperature": 4.0, "steps": 300, "batch_size": 64, "lr": 1e-2, "weight_decay": 1e-4}
    return _make(teacher, parts, noise, val_noise, seed, [64, 32, 10], settings)


def cancer(seed: int = 0, *, noise: tuple[float, float] = (0.3, 0.3), val_noise: float = 0.0) -> Task:
    """Breast-cancer cells (569 x 30, scikit-learn): 189 test, 200 training and 60 held-out rows."""
    datasets = require_extra("sklearn.datasets", "demo", "kd-trilateral")
    data = datasets.load_breast_cancer()
    order = rng(seed, "cancer").permutation(len(data.target))
    x = torch.tensor(data.data[order], dtype=torch.float32)
    y = torch.tensor(data.target[order], dtype=torch.int64)
    third = len(y) // 3
    x = (x - x[third:].mean(0)) / x[third:].std(0)
    pool = x[third:], y[third:]
    teacher = _train_teacher(
        mlp([30, 64, 64, 2], seed), *pool, seed, steps=200, batch_size=128, lr=3e-3, label_smoothing=0.05
    )
    parts = [*_cut(*pool, 200, 60), (x[:third], y[:third])]
    settings = {"temperature": 2.0, "steps": 200, "batch_size": 64, "lr": 1e-2, "weight_decay": 1e-4}
    return _make(teacher, parts, noise, val_noise, seed, [30, 8, 2], settings)


def ctr(seed: int = 0, *, noise: tuple[float, float] = (0.0, 0.0), val_noise: float = 0.0) -> Task:
    """Simulated click logs: 8 categorical fields, a factorisation machine as the truth, about 19 % clicks.

    Ids follow zipf(1.6) clipped to 30; logit = sum of weights (sd 0.5) + pairwise factors (k = 4, sd 0.45) -
    2.2. The teacher learns on 6000 rows, the student on 1200 others; 300 are held out, 3000 are test rows.
    """
    draw = rng(seed, "ctr")
    fields, values, factors, count = 8, 30, 4, 10500
    ids = np.minimum(draw.zipf(1.6, (count, fields)), values) - 1
    weight = draw.normal(0.0, 0.5, (fields, values))
    factor = draw.normal(0.0, 0.45, (fields, values, factors))
    place = np.arange(fields)
    chosen = factor[place, ids]
    pairs = 0.5 * (chosen.sum(1) ** 2 - (chosen**2).sum(1)).sum(1)
    logit = weight[place, ids].sum(1) + pairs - 2.2
    y = torch.tensor(draw.random(count) < 1.0 / (1.0 + np.exp(-logit))).long()
    x = F.one_hot(torch.from_numpy(ids), values).float().flatten(1)
    own, train, held, test = _cut(x, y, 6000, 1200, 300, 3000)
    width = fields * values
    teacher = _train_teacher(
        mlp([width, 64, 32, 2], seed), *own, seed, steps=350, batch_size=256, lr=2e-3, weight_decay=1e-3
    )
    settings = {"temperature": 2.0, "steps": 200, "batch_size": 128, "lr": 5e-3, "weight_decay": 0.0}
    return _make(teacher, [train, held, test], noise, val_noise, seed, [width, 16, 2], settings)


TASKS: dict[str, Callable[..., Task]] = {"digits": digits, "cancer": cancer, "ctr": ctr}


def make_task(name: str, seed: int, noise: tuple[float, float] | None = None, val_noise: float = 0.0) -> Task:
    """A task by name; ``noise`` None = the task's own.

    Raises:
        ConfigError: unknown name.
    """
    if name not in TASKS:
        raise ConfigError(f"task is {name!r}, wanted one of {sorted(TASKS)}")
    options: dict[str, Any] = {} if noise is None else {"noise": noise}
    return TASKS[name](seed, val_noise=val_noise, **options)


def digits_splits(seed: int = 0) -> Splits:
    """The digits task's rows, for ``data = "kd_trilateral.tasks:digits_splits"`` in a settings file."""
    return digits(seed).splits


def digits_student(seed: int = 0) -> nn.Module:
    """The digits task's student, for ``student = "kd_trilateral.tasks:digits_student"`` in settings."""
    return mlp([64, 32, 10], seed + 1)

"""Learning rates: the authors' decay per epoch, the paper's per iteration, and one cycle."""

from __future__ import annotations

import math

from dbnet_asf.config import TrainConfig

_WARMUP, _FIRST, _LAST = 0.1, 1 / 25, 1e-4


def polynomial_lr(epoch: float, *, lr: float = 0.007, epochs: float = 1200, power: float = 0.9) -> float:
    """Polynomial decay lr (1 - epoch / (epochs + 1))^power, as the authors' code has it (section 2.4).

    Args:
        epoch: from 0; iterations with ``epochs`` counted in them give the paper's decay.
        lr: at the start.
        epochs: of the whole training.
        power: 1 is a straight line.

    Example:
        >>> polynomial_lr(0), round(polynomial_lr(600), 6)
        (0.007, 0.003754)
    """
    return lr * max(0.0, 1 - epoch / (epochs + 1)) ** power


def one_cycle(progress: float) -> float:
    """Factor of the learning rate over a training: a cosine up in its first tenth, then one down to nothing.

    Example:
        >>> [round(one_cycle(x), 3) for x in (0.0, 0.1, 1.0)]
        [0.04, 1.0, 0.0]
    """
    if progress < _WARMUP:
        return _FIRST + (1 - _FIRST) * (1 - math.cos(math.pi * progress / _WARMUP)) / 2
    done = min((progress - _WARMUP) / (1 - _WARMUP), 1.0)
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * done)) / 2


def learning_rate(config: TrainConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of an optimizer step.

    Args:
        config: schedule, power, epochs.
        step: from 0.
        steps: of the whole training.
        steps_per_epoch: optimizer steps in a pass over the data.
    """
    options = {"lr": config.lr, "power": config.power}
    match config.schedule:
        case "epoch":
            epochs = config.epochs if config.steps is None else math.ceil(steps / steps_per_epoch)
            return polynomial_lr(step // steps_per_epoch, epochs=epochs, **options)
        case "iteration":
            return config.lr * max(0.0, 1 - step / steps) ** config.power
        case "one_cycle":
            return config.lr * one_cycle(step / max(steps - 1, 1))
        case _:
            return config.lr

"""Training of the fused judge: cached pictures, batches of like length, every second one without a debate."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fusion_core.checkpoint import atomic_directory, load_strict, load_tensors
from fusion_core.errors import ConfigError, DataError
from fusion_core.seeding import generator
from fusion_core.training import Loop, LoopResult

from .ablations import labels_of, paired
from .batches import JudgeBatches, JudgeTrainConfig
from .calibrate import calibrate
from .features import Features, image_features
from .fused import gather, score_memes, share_of_rank
from .judge import Judge
from .meme import Debate, Meme
from .scoring import check_labels, metrics

__all__ = ["JudgeBatches", "JudgeTrainConfig", "decay_groups", "linear_schedule", "train_judge"]

_NORM = re.compile(r"(^|\.)norm\d*\.")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The authors' two groups: modules named ``norm`` or ``LayerNorm``, and biases, do not decay.

    T5 calls its norms ``layer_norm``, so their weights do decay, as with the authors. Frozen parameters
    are in neither group.

    Args:
        model: whose parameters.
        weight_decay: of the first group.
    """
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        quiet = "bias" in name or "LayerNorm" in name or _NORM.search(name) is not None
        (plain if quiet else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def linear_schedule(optimizer: Optimizer, steps: int, warmup: float) -> LambdaLR:
    """The rate rises linearly over ``warmup`` of the steps, then falls linearly to 0."""
    rise = round(steps * warmup)

    def factor(step: int) -> float:
        if step < rise:
            return step / max(1, rise)
        return max(0.0, (steps - step) / max(1, steps - rise))

    return LambdaLR(optimizer, factor)


def step(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy of a batch."""
    return {"loss": model(**batch).loss}


def train_judge(
    judge: Judge,
    memes: Sequence[Meme],
    debates: Iterable[Debate] | Mapping[str, Debate] | None = None,
    config: JudgeTrainConfig | None = None,
    *,
    out: str | Path,
    validation: tuple[Sequence[Meme], Iterable[Debate] | Mapping[str, Debate] | None] | None = None,
    features: str | Path | None = None,
    costs: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    progress: bool | None = None,
) -> LoopResult:
    """Train a fused judge; the tower stays frozen and sees each picture once.

    On several processes (``accelerate launch``) every one of them ends with the same judge; the first writes.

    Writes into ``out``: ``train.json`` (all settings), the loop's ``metrics.jsonl`` and checkpoints, and the
    finished judge as ``judge/``.

    Args:
        judge: trained in place; it has a tokenizer.
        memes: with labels.
        debates: of these memes.
        config: see :class:`JudgeTrainConfig`.
        out: the run's directory.
        validation: other memes with labels and their debates; they choose the best epoch and calibrate.
        features: folder of the pictures' states, made or used again; None keeps them in memory.
        costs: ``miss``, ``alarm``, ``coverage``, ``max_error`` of the calibration.
        resume: go on with the run in ``out``.
        overwrite: replace the run in ``out``.
        device: ``"auto"`` or ``"cpu"``.
        progress: None shows a bar on a terminal.

    Raises:
        DataError: a meme without label, one class only, an id twice, a debate of no meme.
        InputError: ``out`` holds another run; a picture cannot be read.
        ConfigError: ``features`` with ``augment``: changed pictures have no states to keep.
        StoreError: ``features`` are of another tower or preprocessing.
    """
    config = config or JudgeTrainConfig()
    if config.augment and features is not None:
        raise ConfigError(
            f"features is {features} and augment is on; states of changed pictures cannot be kept"
        )
    rows, found = list(memes), paired(memes, debates)
    labels = check_labels(labels_of(rows))
    if len(np.unique(labels)) < 2:
        raise DataError("memes holds one class only; a judge learns from harmless and harmful memes")
    for parameter in (*judge.image_transformer.parameters(), *judge.idle_parameters()):
        parameter.requires_grad_(False)  # else several processes would wait for its gradient
    optimizer = AdamW(decay_groups(judge, config.weight_decay), lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
    per_epoch = math.ceil(len(rows) / config.batch_size)
    processes = _processes()
    per_epoch = math.ceil(math.ceil(per_epoch / processes) / config.accumulate)
    steps = config.steps if config.steps is not None else config.epochs * per_epoch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.seed, "dropout").initial_seed())
        loop = Loop(
            judge,
            optimizer,
            scheduler=linear_schedule(optimizer, steps, config.warmup),
            out=out,
            steps=steps,
            mixed_precision=config.mixed_precision,
            accumulate=config.accumulate,
            max_grad_norm=config.max_grad_norm,
            save_every=config.save_every,
            resume=resume,
            overwrite=overwrite,
            seed=config.seed,
            device=device,
            progress=progress,
        )
        states = None
        if judge.fusion != "none" and judge.settings.image and not config.augment:
            images = [meme.image for meme in rows]
            bar = progress is not False and sys.stderr.isatty()
            with loop.accelerator.main_process_first() if features else contextlib.nullcontext():
                states = image_features(judge, images, features, progress=bar)  # one writes, the others read
        batches = JudgeBatches(
            judge,
            rows,
            found,
            config,
            states,
            processes=processes,
            rank=int(loop.accelerator.process_index),
        )
        main = bool(loop.accelerator.is_main_process)
        if main:
            _write_config(Path(out), config, judge, len(rows))
        validate = None if validation is None else _Validation(judge, *validation, config.metric)
        result = loop.run(batches, step, validate)
    judge.eval()
    for parameter in judge.idle_parameters():
        parameter.requires_grad_(True)
    loop.accelerator.wait_for_everyone()  # the first process has written the chosen weights; all take them
    load_strict(judge, load_tensors(Path(out) / "model.safetensors"))
    judge.to(loop.accelerator.device)
    if validate is not None:
        judge.calibration = calibrate(validate.scores(judge), validate.labels, **(costs or {}))
    if main:
        save_judge(judge, Path(out) / "judge", overwrite=True)
    loop.accelerator.wait_for_everyone()
    return result


def _processes() -> int:
    import os

    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def _write_config(out: Path, config: JudgeTrainConfig, judge: Judge, count: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": "meme-debate.train/1",
        "train": config.to_dict(),
        "settings": judge.settings.to_dict(),
        "fusion": judge.fusion,
        "text_config": judge.text_config.to_diff_dict(),
        "vision_config": judge.vision_config.to_diff_dict(),
        "memes": count,
    }
    (out / "train.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


class _Validation:
    """Metrics of held-out memes after an epoch; exact over any number of processes."""

    def __init__(
        self,
        judge: Judge,
        memes: Sequence[Meme],
        debates: Iterable[Debate] | Mapping[str, Debate] | None,
        metric: str,
    ) -> None:
        self.judge, self.memes, self.metric = judge, list(memes), metric
        self.debates = paired(self.memes, debates)
        self.labels = check_labels(labels_of(self.memes))
        if metric not in metrics([0.5], [1]):
            raise ConfigError(f"metric is {metric!r}, wanted one of {sorted(metrics([0.5], [1]))}")
        self._features: Features | None = None

    def scores(self, judge: Judge) -> NDArray[np.float64]:
        """Raw scores of all memes."""
        if self._features is None and judge.fusion != "none" and judge.settings.image:
            self._features = image_features(judge, [meme.image for meme in self.memes])
        rows = share_of_rank(len(self.memes))
        part = None if self._features is None else self._features.part(rows)
        found = score_memes(
            judge,
            [self.memes[i] for i in rows],
            [self.debates[i] for i in rows],
            calibrated=False,
            features=part,
        )
        return gather(found, len(self.memes))

    def __call__(self, _model: nn.Module) -> dict[str, float]:
        found = metrics(self.scores(self.judge), self.labels)
        return {**found, "score": found[self.metric]}


def save_judge(judge: Judge, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a fused judge's folder, whole or not at all."""
    with atomic_directory(folder, overwrite=overwrite) as place:
        judge.save_pretrained(place)

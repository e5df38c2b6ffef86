"""Training of the fused judge: cached pictures, batches of like length, every second one without a debate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fusion_core.checkpoint import atomic_directory, load_strict, load_tensors
from fusion_core.config import Config
from fusion_core.errors import ConfigError, DataError, check_range
from fusion_core.seeding import generator, rng
from fusion_core.training import Loop, LoopResult

from .ablations import labels_of, paired
from .calibrate import calibrate
from .encoding import Encoded, collate
from .features import Features, image_features
from .fused import encode, gather, pad_id, picture_batch, score_memes, share_of_rank
from .judge import Judge
from .lengths import WINDOW, window_batches
from .meme import Debate, Meme
from .metrics import check_labels, metrics

__all__ = ["JudgeBatches", "JudgeTrainConfig", "decay_groups", "linear_schedule", "train_judge"]

Metric = Literal["accuracy", "macro_f1", "f1", "auroc", "auprc"]
_NORM = re.compile(r"(^|\.)norm\d*\.")


@dataclass(frozen=True)
class JudgeTrainConfig(Config):
    """Settings of a training; the defaults are the authors' command line, but for ``debate_dropout``.

    Args:
        epochs: passes over the memes; unused where ``steps`` is given.
        steps: optimizer steps in all.
        batch_size: memes a batch.
        accumulate: batches an optimizer step.
        lr: peak learning rate.
        weight_decay: of the parameters that :func:`decay_groups` says.
        warmup: share of the steps in which the rate rises from 0.
        debate_dropout: share of the batches that have no debate, so that one judge serves memes with and
            without; 0 = the authors'.
        window: batches that are sorted by length together.
        max_grad_norm: clip the gradient's norm; None = the authors'.
        mixed_precision: ``"no"``, ``"bf16"``, ``"fp16"``.
        metric: that chooses the best epoch (the authors' is accuracy).
        seed: of order and dropout.
        save_every: optimizer steps between checkpoints.

    Raises:
        ConfigError: a number out of its range.
    """

    epochs: int = 10
    steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 5e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    debate_dropout: float = 0.5
    window: int = WINDOW
    max_grad_norm: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    metric: Metric = "macro_f1"
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, wanted at least 1")
        check_range("lr", self.lr, 0.0, math.inf, open=True)
        check_range("weight_decay", self.weight_decay, 0.0, math.inf)
        check_range("warmup", self.warmup, 0.0, 1.0)
        check_range("debate_dropout", self.debate_dropout, 0.0, 1.0)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The authors' two groups: modules named ``norm`` or ``LayerNorm``, and biases, do not decay.

    T5 calls its norms ``layer_norm``, so their weights do decay, as with the authors. Frozen parameters are
    in
    neither group.

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


class JudgeBatches:
    """An epoch's batches of tokens, pictures and labels; set the epoch, then iterate.

    Args:
        judge: its tokenizer, settings and fusion.
        memes: N memes with labels.
        debates: N debates, None = without.
        config: batch size, ``debate_dropout``, window and seed.
        features: states of the N pictures; None runs the tower in every step.
        processes: the batches are shared by so many.
        rank: number of this one.

    Raises:
        DataError: a meme without label.
    """

    def __init__(
        self,
        judge: Judge,
        memes: Sequence[Meme],
        debates: Sequence[Debate | None],
        config: JudgeTrainConfig,
        features: Features | None = None,
        *,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.judge, self.memes, self.debates, self.config = judge, memes, debates, config
        self.features, self.processes, self.rank, self.epoch = features, processes, rank, 0
        self.labels = check_labels(labels_of(memes))
        self.pad = pad_id(judge)

    @cached_property
    def whole(self) -> list[Encoded]:
        """Texts with debate."""
        return encode(self.judge, self.memes, self.debates)

    @cached_property
    def short(self) -> list[Encoded]:
        """Texts without debate."""
        return encode(self.judge, self.memes, self.debates, without=True)

    def set_epoch(self, epoch: int) -> None:
        """Another order each epoch."""
        self.epoch = epoch

    def plan(self) -> list[tuple[NDArray[np.int64], bool]]:
        """Rows of each batch of the epoch, and whether its debates are left out.

        Of a run of batches every ``1 / debate_dropout``-th has no debate, from a place that the seed draws;
        each kind is sorted by its own lengths.
        """
        config, count = self.config, len(self.memes)
        share = config.debate_dropout
        batches = math.ceil(count / config.batch_size)
        draws = rng(config.seed, "debate dropout", self.epoch)
        marks = np.floor(share * np.arange(1, batches + 1) + (offset := float(draws.random())))
        dropped = np.diff(marks, prepend=np.floor(offset)) > 0
        order = draws.permutation(count)
        cut = min(count, int(dropped.sum()) * config.batch_size)
        plans: list[list[NDArray[np.int64]]] = []
        for part, texts in ((order[:cut], self.short), (order[cut:], self.whole)):
            if not len(part):
                plans.append([])
                continue
            lengths = [len(texts[i]) for i in part]
            made = window_batches(
                lengths, config.batch_size, seed=config.seed, epoch=self.epoch, window=config.window
            )
            plans.append([part[rows] for rows in made])
        kinds = [True] * len(plans[0]) + [False] * len(plans[1])
        both = list(zip([*plans[0], *plans[1]], kinds, strict=True))
        return [both[i] for i in rng(config.seed, "kinds", self.epoch).permutation(len(both))]

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.memes) / self.config.batch_size) / self.processes)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        plan = self.plan()
        plan = (plan * 2)[: len(self) * self.processes] if self.processes > 1 else plan
        for rows, dropped in plan[self.rank :: self.processes]:
            yield self.batch(rows, dropped=dropped)

    def batch(self, rows: NDArray[np.int64], *, dropped: bool = False) -> dict[str, Tensor]:
        """One batch as the judge's ``forward`` takes it."""
        texts = self.short if dropped else self.whole
        made = collate([texts[i].ids for i in rows], self.pad, self.labels[rows].tolist())
        if self.judge.fusion != "none":
            made |= picture_batch(self.judge, self.memes, rows.tolist(), self.features)
        return made

    def padding_share(self) -> float:
        """The share of the epoch's places that hold padding."""
        lengths = {True: [len(t) for t in self.short], False: [len(t) for t in self.whole]}
        plan = self.plan()
        places = sum(max(lengths[kind][i] for i in rows) * len(rows) for rows, kind in plan)
        full = sum(sum(lengths[kind][i] for i in rows) for rows, kind in plan)
        return 1 - full / places if places else 0.0


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
        StoreError: ``features`` are of another tower or preprocessing.
    """
    config = config or JudgeTrainConfig()
    rows, found = list(memes), paired(memes, debates)
    labels = check_labels(labels_of(rows))
    if len(np.unique(labels)) < 2:
        raise DataError("memes holds one class only; a judge learns from harmless and harmful memes")
    for parameter in judge.image_transformer.parameters():
        parameter.requires_grad_(False)
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
        if judge.fusion != "none" and judge.settings.image:
            states = image_features(judge, [meme.image for meme in rows], features)
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
    if main:
        load_strict(judge, load_tensors(Path(out) / "model.safetensors"))
        judge.to(loop.accelerator.device)
        if validate is not None:
            judge.calibration = calibrate(validate.scores(judge), validate.labels, **(costs or {}))
        save_judge(judge, Path(out) / "judge", overwrite=True)
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
        part = None if self._features is None else Features(
            self._features.states, self._features.place[rows]
        )  # fmt: skip
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

"""The fused judge's training batches: like lengths together, every second one without a debate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.config import Config
from fusion_core.errors import LARGEST_SEED
from fusion_core.seeding import rng

from .ablations import labels_of
from .augment import RandAugment
from .encoding import Encoded, collate
from .features import Features
from .fused import encode, pad_id, picture_batch
from .judge import Judge
from .lengths import WINDOW, window_batches
from .meme import Debate, Meme
from .scoring import check_labels

__all__ = ["JudgeBatches", "JudgeTrainConfig"]

Metric = Literal["accuracy", "macro_f1", "f1", "auroc", "auprc"]


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
        augment: change each picture anew in every epoch (RandAugment, as the authors do); the tower then runs
            in every step, as the states of its pictures cannot be kept.
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
    augment: bool = False
    max_grad_norm: float | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    metric: Metric = "macro_f1"
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        self.check_fields("epochs", "steps", "batch_size", "accumulate", "window", "save_every", low=1)
        self.check_fields("lr", "max_grad_norm", open=True)
        self.check_fields("weight_decay")
        self.check_fields("warmup", "debate_dropout", high=1.0)
        self.check_fields("seed", high=LARGEST_SEED)

    @classmethod
    def official(cls) -> JudgeTrainConfig:
        """The authors' settings: every batch has its debate, pictures are changed, accuracy chooses."""
        return cls(debate_dropout=0.0, augment=True, metric="accuracy", window=1)


class JudgeBatches:
    """An epoch's batches of tokens, pictures and labels; set the epoch, then iterate.

    Args:
        judge: its tokenizer, settings and fusion.
        memes: N memes with labels.
        debates: N debates, None = without.
        config: batch size, ``debate_dropout``, window and seed.
        features: states of the N pictures; None runs the tower in every step, as ``augment`` does.
        processes: the batches are shared by so many.
        rank: number of this one.

    Raises:
        DataError: a meme without label.
        MissingExtraError: ``augment`` needs torchvision.
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
        self.change = RandAugment(config.seed) if config.augment and judge.fusion != "none" else None

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
            change = None
            if (random := self.change) is not None:
                change = lambda image, row: random(image, self.epoch, row)
            made |= picture_batch(self.judge, self.memes, rows.tolist(), self.features, change)
        return made

    def padding_share(self) -> float:
        """The share of the epoch's places that hold padding."""
        lengths = {True: [len(t) for t in self.short], False: [len(t) for t in self.whole]}
        plan = self.plan()
        places = sum(max(lengths[kind][i] for i in rows) * len(rows) for rows, kind in plan)
        full = sum(sum(lengths[kind][i] for i in rows) for rows, kind in plan)
        return 1 - full / places if places else 0.0

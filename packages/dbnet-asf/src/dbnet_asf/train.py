"""Training on one process or many: data, loss, optimizer and schedule put into the shared loop."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from dbnet_asf.config import TrainConfig
from dbnet_asf.data.dataset import Preparation, TrainingSet
from dbnet_asf.losses import DBLoss
from dbnet_asf.model.dbnet import DBNet
from dbnet_asf.schedule import learning_rate, polynomial_lr
from dbnet_asf.targets import Targets
from fusion_core.atomic import PathLike
from fusion_core.errors import ConfigError, InputError
from fusion_core.hub import CONFIG
from fusion_core.training import Loop, LoopResult

SETTINGS = "training.json"
_MAPS = ("gt", "mask", "thresh_map", "thresh_mask")


class Trainer:
    """Trains a network on annotated pictures (section 2.4).

    Runs on whatever ``accelerate launch`` or ``torchrun`` starts; resumes exactly.

    Args:
        net: trained in place; it needs its threshold head.
        train: a data set of :mod:`dbnet_asf.datasets`, or anything indexable that gives ``(image, polygons,
            ignore, name)``.
        test: one to validate on after each epoch (by the harmonic mean of the IoU protocol), or None.
        config: :class:`TrainConfig`; its defaults are the authors'.
        device: ``"auto"`` or ``"cpu"``.
        **settings: fields of :class:`TrainConfig` to change, such as ``epochs=100, batch_size=8, crop=640``.

    Raises:
        ConfigError: an unknown or bad setting, or a network without its threshold head.
        InputError: an empty training set.
    """

    def __init__(
        self,
        net: DBNet,
        train: Any,
        test: Any = None,
        config: TrainConfig | None = None,
        *,
        device: str = "auto",
        **settings: Any,
    ) -> None:
        self.config = (config or TrainConfig()).replace(**settings)
        if "thresh" not in net.head:
            raise ConfigError("net has no threshold head and cannot train; take the one before fuse()")
        if not len(train):
            raise InputError("train is empty, wanted at least one annotated picture")
        self.net, self.train, self.test, self.device = net, train, test, device

    def fit(
        self,
        out: PathLike,
        *,
        resume: bool = False,
        overwrite: bool = False,
        validate_every: int | None = None,
        progress: bool | None = None,
    ) -> LoopResult:
        """Train to the end.

        In ``out``: ``model.safetensors`` and ``config.json`` (which :meth:`DBNet.from_pretrained` reads),
        ``training.json`` (the settings), ``metrics.jsonl``, ``last.pt`` and ``best.safetensors``.

        Args:
            out: directory of the run.
            resume: go on from where a run in ``out`` stopped.
            overwrite: start anew in a directory that holds another run.
            validate_every: optimizer steps between validations; None for each epoch's end.
            progress: None shows a bar on a terminal only.

        Raises:
            InputError: ``out`` holds a run, with neither ``resume`` nor ``overwrite``.
            FusionError: the loss is not finite.
            MissingExtraError: accelerate is not installed (extra ``train``).
        """
        config, processes = self.config, int(os.environ.get("WORLD_SIZE", "1"))
        net = self._prepared(processes)
        optimizer = make_optimizer(net, config)
        loader = self._loader(processes)
        per_epoch = max(1, math.ceil(len(loader) / processes / config.accumulate))
        scheduler, interval = make_scheduler(optimizer, config, per_epoch)
        loop = Loop(
            net,
            optimizer,
            out=out,
            scheduler=scheduler,
            steps=config.steps,
            epochs=None if config.steps is not None else config.epochs,
            mixed_precision=config.mixed_precision,
            accumulate=config.accumulate,
            max_grad_norm=config.max_grad_norm,
            ema=config.ema,
            interval=interval,
            save_every=config.save_every,
            validate_every=validate_every,
            resume=resume,
            overwrite=overwrite,
            seed=config.seed,
            device=self.device,
            progress=progress,
        )
        if loop.accelerator.is_main_process:
            Path(out).mkdir(parents=True, exist_ok=True)
            self.net.config.save(Path(out) / CONFIG)
            config.save(Path(out) / SETTINGS)
        validate = None if self.test is None else self._validate
        return loop.run(
            loader,
            Step(
                DBLoss(config.alpha, config.beta, config.loss, global_ohem=config.global_ohem),
                training_layout(net),
            ),
            validate,
        )

    def _prepared(self, processes: int) -> nn.Module:
        net: nn.Module = self.net
        if self.config.sync_bn and processes > 1 and torch.cuda.is_available() and self.device != "cpu":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return net.to(memory_format=training_layout(net))  # pyright: ignore[reportCallIssue]

    def _loader(self, processes: int) -> DataLoader[Any]:
        config = self.config
        how = Preparation(config.crop, config.labels, config.augment, self.net.config, config.seed)
        data = TrainingSet(self.train, how)
        return DataLoader(
            data,
            batch_size=config.batch_size,
            shuffle=True,
            num_workers=config.num_workers,
            collate_fn=collate,
            drop_last=len(data) >= config.batch_size * processes,
            pin_memory=torch.cuda.is_available() and self.device != "cpu",
        )

    def _validate(self, net: nn.Module) -> Mapping[str, float]:
        from dbnet_asf.detect import TextDetector
        from dbnet_asf.evaluation import evaluate

        detector = TextDetector(net, device=next(net.parameters()).device)  # pyright: ignore[reportArgumentType]
        found = evaluate(detector, self.test, progress=False)
        return {"score": found.hmean, "precision": found.precision, "recall": found.recall}


def training_layout(net: nn.Module) -> torch.memory_format:
    """The memory format to train in: channels last where PyTorch can.

    On a CPU with AVX-512 the weight's gradient of a strided 1x1 convolution of fewer than 16 channels writes
    beyond its memory there (torch 2.15, oneDNN), which ends the process.
    """
    narrow = any(
        isinstance(part, nn.Conv2d)
        and part.kernel_size == (1, 1)
        and part.stride != (1, 1)
        and part.in_channels < 16
        for part in net.modules()
    )
    return torch.contiguous_format if narrow else torch.channels_last


class Step:
    """From a batch to the loss and its parts.

    Args:
        loss: which.
        layout: of the images; see :func:`training_layout`.
    """

    def __init__(self, loss: DBLoss, layout: torch.memory_format = torch.channels_last) -> None:
        self.loss, self.layout = loss, layout

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss under ``"loss"``, and its parts by their names."""
        images = batch["images"].contiguous(memory_format=self.layout)
        total, parts = self.loss(
            model(images), Targets(batch["gt"], batch["mask"], batch["thresh_map"], batch["thresh_mask"])
        )
        return {"loss": total, **parts}


def collate(items: Sequence[tuple[Tensor, Targets]]) -> dict[str, Tensor]:
    """A batch as a dictionary of tensors: ``images`` and the four label maps."""
    targets = Targets.stack([target for _, target in items])
    maps = {name: getattr(targets, name) for name in _MAPS}
    return {"images": torch.stack([image for image, _ in items]), **maps}


def make_optimizer(net: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD with momentum (the authors') or AdamW."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        net.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def make_scheduler(optimizer: Optimizer, config: TrainConfig, per_epoch: int) -> tuple[LambdaLR, Any]:
    """The schedule, and whether it is stepped by ``"step"`` or by ``"epoch"``."""
    steps = config.steps if config.steps is not None else config.epochs * per_epoch
    if config.schedule == "epoch":
        epochs = config.epochs if config.steps is None else math.ceil(steps / per_epoch)
        options = {"lr": 1.0, "epochs": epochs, "power": config.power}
        return LambdaLR(optimizer, lambda epoch: polynomial_lr(epoch, **options)), "epoch"
    relative = config.replace(lr=1.0)
    return LambdaLR(optimizer, lambda step: learning_rate(relative, step, steps, per_epoch)), "step"

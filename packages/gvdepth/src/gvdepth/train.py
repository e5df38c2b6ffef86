"""Training: batches of one drawn resolution per step, two views of each image, exact resume (section 2.7)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from fusion_core.atomic import PathLike
from fusion_core.errors import DataError, InputError
from fusion_core.seeding import rng
from fusion_core.training import Loop, LoopResult
from gvdepth.augment import augment, collate, draw_size
from gvdepth.config import AugmentConfig, TrainConfig
from gvdepth.data.base import Samples
from gvdepth.losses import consistency_loss
from gvdepth.modeling import GVDepth

__all__ = ["AugmentConfig", "TrainConfig", "Trainer", "build_model", "check_views", "train_step"]

Key = tuple[int, int, int, int]
"""Epoch, place of the sample in the epoch, index of the sample, number of the batch that draws the sizes."""


class StepSampler(Sampler[list[Key]]):
    """Batches of keys. The batches that the ranks work on at one time share their number, so their sizes too.

    The order, the sizes and every draw follow from the seed, the epoch and the place alone: not from the
    rank,
    the number of loader processes, or what was drawn before.

    Args:
        count: samples in the data set.
        batch_size: per rank.
        world_size: ranks.
        seed: of the order.
    """

    def __init__(self, count: int, batch_size: int, world_size: int, seed: int) -> None:
        self.count, self.batch_size, self.world_size, self.seed = count, batch_size, world_size, seed
        self.drop_last, self.epoch = True, 0
        self.together = batch_size * world_size
        if count < 1:
            raise DataError("the data set is empty")

    def __len__(self) -> int:
        return max(self.count // self.together, 1) * self.world_size

    def __iter__(self) -> Iterator[list[Key]]:
        order = rng(self.seed, "order", self.epoch).permutation(self.count).tolist()
        while len(order) < self.together:  # fewer samples than one step takes: some come twice
            order += order[: self.together - len(order)]
        for batch in range(len(self)):
            start = batch * self.batch_size
            yield [
                (self.epoch, place, order[place], batch // self.world_size)
                for place in range(start, start + self.batch_size)
            ]


class Views(Dataset[Any]):
    """The augmented views of a data set, by :data:`Key`.

    Args:
        samples: the data set.
        config: augmentation and number of views.
        sampler: told of each new epoch.
    """

    def __init__(self, samples: Samples, config: TrainConfig, sampler: StepSampler) -> None:
        self.samples, self.config, self.sampler = samples, config, sampler
        self.views = 2 if config.consistency_weight > 0 else 1
        first = samples[0].camera
        self.aspect = first.width / first.height

    def set_epoch(self, epoch: int) -> None:
        """Draw another order and other views from now on."""
        self.sampler.epoch = epoch

    def __getitem__(self, key: Key) -> list[Any]:
        epoch, place, index, batch = key
        seed, config = self.config.seed, self.config.augment
        sample = self.samples[index]
        found: list[Any] = []
        for number in range(self.views):
            size = draw_size(config, self.aspect, rng(seed, "size", epoch, batch, number))
            found.append(augment(sample, size, config, rng(seed, "augment", epoch, place, number)))
        return found


def collate_views(items: list[list[Any]]) -> list[dict[str, Tensor]]:
    """A batch: one dictionary of tensors per view."""
    return [collate(list(view)) for view in zip(*items, strict=True)]


def train_step(
    model: nn.Module,
    batch: list[dict[str, Tensor]],
    *,
    consistency_weight: float = 0.1,
    across_ranks: bool = True,
) -> dict[str, Tensor]:
    """The losses of one batch.

    Args:
        model: a :class:`GVDepth`, perhaps wrapped for several processes.
        batch: one dictionary per view; see :func:`collate_views`.
        consistency_weight: of L_con, where there are two views.
        across_ranks: means over the valid pixels of all ranks.

    Returns:
        ``loss`` and its parts: ``silog``, ``uncertainty``, ``consistency``.
    """
    raw: GVDepth = getattr(model, "module", model)  # pyright: ignore[reportAssignmentType]
    outputs = [model(view["pixel_values"], view["camera"]) for view in batch]
    consistency = None
    with torch.autocast(batch[0]["labels"].device.type, enabled=False):
        if len(batch) == 2 and consistency_weight > 0:
            consistency = consistency_loss(
                outputs[0].depth,
                outputs[1].depth,
                batch[0]["view"],
                batch[1]["view"],
                across_ranks=across_ranks,
            )
        parts = [
            raw.loss(output, view["labels"], across_ranks=across_ranks)
            for output, view in zip(outputs, batch, strict=True)
        ]
        total = torch.stack([part.total for part in parts]).mean()
        losses = {
            "silog": torch.stack([part.silog for part in parts]).mean(),
            "uncertainty": torch.stack([part.uncertainty for part in parts]).mean(),
        }
        if consistency is not None:
            total = total + consistency_weight * consistency
            losses["consistency"] = consistency
    return {"loss": total, **losses}


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Any:
    """Linear warm-up and cosine from ``lr`` to ``final_lr``, or one cycle."""
    if config.schedule == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=config.steps + 1)
    floor, warm = config.final_lr / config.lr, config.warmup_steps

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(config.steps - warm, 1)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def build_model(config: TrainConfig) -> GVDepth:
    """A new model of the recipe, its weights drawn from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GVDepth(config.model)


def check_views(config: TrainConfig, model: GVDepth) -> None:
    """Check that the views that a recipe cuts out are large enough for a model.

    Raises:
        InputError: they are not.
    """
    least = min(config.augment.size or (config.augment.min_height,))
    if least < model.least_size:
        raise InputError(
            f"augment.size or min_height is {least}, wanted at least {model.least_size}: the model's least "
            "size"
        )


class Trainer:
    """Train a model on a data set; run it under ``accelerate launch`` for several processes.

    Args:
        model: trained in place.
        samples: the data set.
        config: the recipe.
        out: the run's directory: ``metrics.jsonl``, checkpoints, and the model in the end (:meth:`GVDepth.
            from_pretrained` takes it).
        validate: ``model -> {"score": higher is better, ...}``.
        resume: go on with the run in ``out``.
        overwrite: start anew in a directory that holds another run.
        device: ``"auto"`` or ``"cpu"``.
        progress: None shows a bar on a terminal only.

    Raises:
        InputError: ``out`` holds another run, or views would be smaller than the model takes.
        MissingExtraError: accelerate is not installed.

    Example:
        >>> trainer = Trainer(model, samples, TrainConfig(steps=100), out="run")  # doctest: +SKIP
        >>> trainer.fit()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: GVDepth,
        samples: Samples,
        config: TrainConfig | None = None,
        *,
        out: PathLike,
        validate: Any = None,
        resume: bool = False,
        overwrite: bool = False,
        device: str = "auto",
        progress: bool | None = None,
    ) -> None:
        self.model, self.config, self.out, self.validate = model, config or TrainConfig(), Path(out), validate
        config = self.config
        check_views(config, model)
        optimizer = torch.optim.AdamW(
            model.parameter_groups(config.lr, config.encoder_lr_scale),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.loop = Loop(
            model,
            optimizer,
            scheduler=make_scheduler(optimizer, config),
            out=self.out,
            steps=config.steps,
            mixed_precision=config.mixed_precision,
            accumulate=config.accumulate,
            max_grad_norm=config.max_grad_norm,
            save_every=config.save_every,
            log_every=min(20, config.steps),
            resume=resume,
            overwrite=overwrite,
            seed=config.seed,
            device=device,
            progress=progress,
        )
        world = self.loop.accelerator.num_processes
        sampler = StepSampler(len(samples), config.batch_size, world, config.seed)
        self.loader: Any = DataLoader(
            Views(samples, config, sampler),
            batch_sampler=sampler,
            collate_fn=collate_views,
            num_workers=config.num_workers,
        )

    def _step(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        return train_step(
            model,
            batch,
            consistency_weight=self.config.consistency_weight,
            across_ranks=self.config.global_mask_norm,
        )

    def fit(self) -> LoopResult:
        """Train to the end; the model in ``out`` is then whole.

        Raises:
            FusionError: the loss is not finite.
            KeyboardInterrupt: after Ctrl-C, with a checkpoint written.
        """
        result = self.loop.run(self.loader, self._step, self.validate)
        if self.loop.accelerator.is_main_process:
            if result.best is not None:
                from fusion_core.checkpoint import load_strict, load_tensors

                load_strict(self.model, load_tensors(self.out / "model.safetensors"))
            self.model.eval().save_pretrained(self.out)
        return result

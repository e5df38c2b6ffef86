"""Training (section 2.6): loss, optimizer, schedule, augmentation; a trainer on the shared loop."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from fusion_core.atomic import PathLike
from fusion_core.checkpoint import load_strict, load_tensors
from fusion_core.errors import ConfigError, InputError
from fusion_core.seeding import generator, rng
from mantis_photoz.config import FusionConfig, TrainConfig, dropout_chances
from mantis_photoz.fusion import FusionModel, quantile_levels
from mantis_photoz.grid import grid_nodes, nearest_node, training_edges
from mantis_photoz.losses import classifier_loss, mixture_loss, pinball_loss, quantiles_from
from mantis_photoz.predicting import predict, prepared
from mantis_photoz.samplers import WeightedSampler, sampler_weights
from mantis_photoz.samples import Batch, CutoutArrays, batch_of, blocks, redshifts
from mantis_photoz.schedules import Plateau, make_optimizer, make_scheduler
from mantis_photoz.views import augment, drop_surveys, official_draw, turn

SETTINGS = "training.json"
CHUNK = 256


def training_loss(
    outputs: Float[Tensor, "batch outputs"], z: Float[Tensor, " batch"], config: TrainConfig
) -> Tensor:
    """The loss of the configuration for what the last layer says: a scalar, at least float32.

    Logits of bins take ``config.loss`` on the training grid, a mixture its negative log-likelihood,
    quantiles the
    pinball loss.
    """
    model = config.model
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if model.head == "mdn":
        return mixture_loss(outputs, z.to(outputs))
    if model.head == "quantile":
        quantiles = quantiles_from(outputs, model.z_max)
        return pinball_loss(quantiles, z.to(outputs), quantile_levels(model).to(outputs))
    edges = training_edges(model.bins, model.z_max).to(z.device)
    nodes = grid_nodes(model.bins, model.z_max).to(z.device)
    return classifier_loss(outputs, z, edges, nodes, loss=config.loss, spread=config.soft_width)


class RowSampler(Sampler[int]):
    """Every row once an epoch, in an order that the epoch and the seed fix."""

    def __init__(self, count: int, size: int, *, seed: int) -> None:
        self.count, self.size, self.seed, self.epoch = count, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = rng(self.seed, "order", self.epoch).permutation(self.count)
        yield from order[: self.size].tolist()


def make_sampler(samples: Any, config: TrainConfig) -> Any:
    """The sampler of the configuration over the redshift classes of the samples.

    Raises:
        DataError: redshifts are unknown.
        InputError: no object has a redshift between 0 and z_max, or colours cannot be had.
    """
    z, model = redshifts(samples), config.model
    inside = (z > 0) & (z < model.z_max)
    if not inside.any():
        raise InputError(
            f"train has no object with 0 < z < z_max, which is {model.z_max:g}: nothing to train on"
        )
    size = min(len(z), config.max_steps * config.batch_size)
    if config.sampler == "natural" and inside.all():
        return RowSampler(len(z), size, seed=config.seed)
    labels = nearest_node(torch.from_numpy(z[inside]), grid_nodes(model.bins, model.z_max))
    colours = _colours(samples, np.flatnonzero(inside)) if config.sampler == "colour-z" else ()
    weights = np.zeros(len(z))
    weights[inside] = np.asarray(sampler_weights(labels, sampler=config.sampler, colours=colours))
    return WeightedSampler(weights, size, seed=config.seed)


def _colours(samples: Any, rows: Any) -> tuple[Any, ...]:
    """Differences of asinh of summed flux, g - r and r - W1, as labels of cells."""
    images = getattr(samples, "images", None)
    if images is None or not {"ps1", "unwise"} <= set(images):
        raise InputError(
            "sampler 'colour-z' takes g, r and W1 of cutouts in memory (CutoutArrays with ps1 and unwise)"
        )
    at = torch.from_numpy(rows)
    flux = {name: torch.nan_to_num(images[name][at]).sum(dim=(2, 3)).double() for name in ("ps1", "unwise")}
    g, r, w1 = (torch.asinh(value) for value in (flux["ps1"][:, 0], flux["ps1"][:, 1], flux["unwise"][:, 0]))
    return r - g, w1 - r


def is_exact(config: TrainConfig) -> bool:
    """Whether the augmentation turns and flips the finished view, which can then be made once for all."""
    return config.augment in ("d4", "d4-batch", "none") and config.jitter == 0


def augmented(
    batch: Batch, config: TrainConfig, draw: torch.Generator, *, ready: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """What the network sees of a batch in training, and which surveys are left to each object.

    Exact turns and flips are made of the finished view; other turns and shifts come before the crop, so that
    their corners are cut off.

    Args:
        batch: on its device, before scaling.
        config: of the training.
        draw: of the augmentation, on the CPU.
        ready: its images are finished views already (only where :func:`is_exact`).
    """
    model, images = config.model, batch.images
    if config.augment == "official":
        images = turn(images, official_draw(np.random.RandomState(draw.initial_seed() % 2**32)))
    exact = is_exact(config)
    scales = {name: one.pixel_scale for name, one in model.inputs.items()}
    kind: Any = "none" if config.augment == "official" else config.augment
    if not exact and (kind != "none" or config.jitter > 0):
        images = augment(images, generator=draw, kind=kind, jitter=config.jitter, pixel_scales=scales)
    made = images
    if not ready:
        made = prepared(dataclasses.replace(batch, images=images), model)
    if (exact and kind != "none") or config.noise > 0:
        made = augment(made, generator=draw, kind=kind if exact else "none", noise=config.noise)
    present = batch.present
    if config.survey_dropout:
        chances = torch.tensor([dropout_chances(config)[name] for name in model.surveys])
        present = drop_surveys(present, chances, generator=draw)
    return made, present


def train_step(
    model: nn.Module, batch: Batch, config: TrainConfig, step: int, *, ready: bool = False
) -> dict[str, Tensor]:
    """The losses of one batch; its augmentation follows from the seed and the number of the step.

    Returns:
        ``loss``.
    """
    draw = generator(config.seed, "augment", step)
    images, present = augmented(batch, config, draw, ready=ready)
    outputs = model(images, batch.ebv, present, raw=True)
    with torch.autocast(batch.ebv.device.type, enabled=False):
        loss = training_loss(outputs, batch.z.to(outputs.device), config)
    return {"loss": loss}


def collate(samples: Any, config: TrainConfig) -> Callable[[list[int]], Batch]:
    """From the rows of a batch to the batch."""
    return lambda rows: batch_of(samples, rows, config.model)


class _Rows(Dataset[int]):
    """The rows themselves; the batch is read by :func:`collate`, all at once."""

    def __init__(self, count: int, sampler: Any) -> None:
        self.count, self.sampler = count, sampler

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> int:
        return row


def steps_per_epoch(sampler: Any, config: TrainConfig) -> int:
    """Whole batches of an epoch; at least one."""
    return max(1, len(sampler) // config.batch_size)


def make_loader(samples: Any, config: TrainConfig, sampler: Any) -> DataLoader[Any]:
    """Batches in the sampler's order; a last part of a batch is left out where there are whole ones."""
    return DataLoader(
        _Rows(len(samples), sampler),
        batch_size=config.batch_size,
        sampler=sampler,
        drop_last=len(sampler) >= config.batch_size,
        collate_fn=collate(samples, config),
    )


def new_model(config: FusionConfig, seed: int, *, pretrained: bool = False) -> FusionModel:
    """An untrained network, its weights drawn from the seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FusionModel(config, pretrained=pretrained)


def fit_plain(
    config: TrainConfig, samples: Any, *, told: Callable[[int, int, float], None] | None = None
) -> FusionModel:
    """Train in this process without accelerate, validation or checkpoints: for demos and small experiments.

    Args:
        config: of the training.
        samples: :class:`~mantis_photoz.samples.CutoutArrays`; where the augmentation is exact, the views
            are made
            once.
        told: gets the epoch, the step and the loss of each epoch's last step.
    """
    model = new_model(config.model, config.seed).train()
    ready = is_exact(config)
    samples = viewed(samples, config.model) if ready else samples
    optimizer, sampler = make_optimizer(model, config), make_sampler(samples, config)
    per_epoch = steps_per_epoch(sampler, config)
    scheduler, interval = make_scheduler(optimizer, config, per_epoch * config.epochs)
    step = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for epoch in range(config.epochs):
            sampler.set_epoch(epoch)
            loss = torch.zeros(())
            for batch in make_loader(samples, config, sampler):
                loss = train_step(model, batch, config, step, ready=ready)["loss"]
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if config.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                step += 1
                if interval == "step":
                    scheduler.step()
            if told is not None:
                told(epoch + 1, step, float(loss.detach()))
    return model.eval()


def viewed(samples: CutoutArrays, config: FusionConfig) -> CutoutArrays:
    """The finished views of cutouts in memory, in the place of their images."""
    parts = list[dict[str, Tensor]]()
    for rows in blocks(len(samples), CHUNK):
        batch = batch_of(samples, rows, config)
        parts.append(prepared(batch, config))
    images = {name: torch.cat([part[name] for part in parts]) for name in config.surveys}
    order = [samples.surveys.index(name) for name in config.surveys]
    return CutoutArrays(images, samples.ebv, samples.z, samples.present[:, order], samples.ids)


class Trainer:
    """Train a network on cutouts; run it under ``accelerate launch`` for several processes.

    Args:
        model: a network, or the settings of a new one.
        config: of the training; its ``model`` is replaced by the first argument's.
        out: directory of the run: the network (:meth:`FusionModel.from_pretrained` takes it),
            ``training.json``,
            ``metrics.jsonl``, ``last.pt``, ``best.safetensors``; None leaves nothing behind.
        pretrained: start the encoders from timm's weights.
        resume: go on with the run in ``out``; it equals an uninterrupted one.
        overwrite: start anew in a directory that holds another run.
        device: ``"auto"`` or ``"cpu"``.
        progress: None shows a bar on a terminal only.
        **settings: fields of :class:`TrainConfig` to change; ``precision`` is taken for ``mixed_precision``.

    Example:
        >>> from mantis_photoz.simulate import model_inputs, simulate
        >>> config = FusionConfig(
        ...     inputs=model_inputs(), encoders={"early": "small-4"}, bins=24, z_max=1.2, hidden=16, size=32,
        ...     align="wcs", scaling="noise", missing="mask",
        ... )
        >>> trainer = Trainer(config, epochs=1, batch_size=8, device="cpu")
        >>> trainer.fit(simulate(16)).config.bins
        24
    """

    def __init__(
        self,
        model: FusionModel | FusionConfig,
        config: TrainConfig | None = None,
        *,
        out: PathLike | None = None,
        pretrained: bool = False,
        resume: bool = False,
        overwrite: bool = False,
        device: str = "auto",
        progress: bool | None = None,
        **settings: Any,
    ) -> None:
        if "precision" in settings:
            settings["mixed_precision"] = settings.pop("precision")
        network = model if isinstance(model, FusionConfig) else model.config
        base = TrainConfig() if config is None else config
        data = base.to_dict() | {"model": network.to_dict()} | settings
        self.config = TrainConfig.from_dict(data)
        made = isinstance(model, FusionConfig)
        self.model = new_model(network, self.config.seed, pretrained=pretrained) if made else model
        self.out, self.device, self.progress = out, device, progress
        self.resume, self.overwrite = resume, overwrite
        self.result: Any = None

    def fit(self, train: Any, val: Any = None) -> FusionModel:
        """Train to the end.

        Args:
            train: :class:`~mantis_photoz.samples.CutoutArrays`, :class:`~mantis_photoz.cutouts.Cutouts`, or
                anything with ``batch(rows)`` and ``z``.
            val: another of these; decides about the best weights, the plateau and the early stop.

        Returns:
            The network with its best weights (the last without ``val``), in eval mode.

        Raises:
            InputError: ``out`` holds another run, or no object can be trained with.
            DataError: redshifts are unknown.
            ConfigError: the plateau or the early stop without ``val``.
            FusionError: the loss is not finite.
            MissingExtraError: accelerate is not installed (extra ``train``).
        """
        if self.config.early_stop is not None and val is None:
            raise ConfigError("early_stop is set without val, wanted a validation set")
        if self.out is not None:
            return self._fit(train, val, Path(self.out))
        with tempfile.TemporaryDirectory() as folder:
            return self._fit(train, val, Path(folder))

    def _fit(self, train: Any, val: Any, out: Path) -> FusionModel:
        from fusion_core.training import Loop

        config, model = self.config, self.model
        sampler = make_sampler(train, config)
        optimizer = make_optimizer(model, config)
        scheduler, interval = make_scheduler(
            optimizer, config, steps_per_epoch(sampler, config) * config.epochs
        )
        loop = Loop(
            model,
            optimizer,
            scheduler=scheduler,
            out=out,
            epochs=config.epochs,
            mixed_precision=config.mixed_precision,
            max_grad_norm=config.max_grad_norm,
            ema=config.ema,
            interval=interval,
            save_every=config.save_every,
            resume=self.resume,
            overwrite=self.overwrite,
            seed=config.seed,
            device=self.device,
            progress=self.progress,
        )
        if loop.accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            config.save(out / SETTINGS)

        def step(network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
            return train_step(network, batch.to(loop.accelerator.device), config, loop.at.step)

        def validate(network: nn.Module) -> Mapping[str, float]:
            found = validation(network, val, config)
            if isinstance(scheduler, Plateau):
                scheduler.observe(found["loss"])
            best = loop.at.best
            since = 0 if best is None or -found["loss"] > best["score"] else loop.at.epoch - best["epoch"]
            if config.early_stop is not None and since >= config.early_stop:
                loop.epochs = loop.at.epoch
            return found | {"score": -found["loss"], "epoch": float(loop.at.epoch)}

        self.result = loop.run(make_loader(train, config, sampler), step, None if val is None else validate)
        if loop.accelerator.is_main_process:
            load_strict(model, load_tensors(out / "model.safetensors"))
            model.eval().save_pretrained(out)
        return model.eval()


def validation(model: Any, samples: Any, config: TrainConfig) -> dict[str, float]:
    """Loss, NMAD, share of outliers and CRPS on a set, with the fixed view."""
    from mantis_photoz import metrics

    prediction = predict(model, samples, batch_size=config.batch_size, config=config.model)
    z = torch.from_numpy(redshifts(samples))
    loss = classifier_loss(
        prediction.logits.double(),
        z,
        training_edges(config.model.bins, config.model.z_max),
        grid_nodes(config.model.bins, config.model.z_max),
        loss=config.loss,
        spread=config.soft_width,
    )
    scores = metrics.point_metrics(prediction.pdf.mean(), z)
    return {
        "loss": float(loss),
        "nmad": float(scores["nmad"]),
        "eta_0.05": float(scores["eta_0.05"]),
        "crps": float(prediction.pdf.crps(z).mean()),
    }

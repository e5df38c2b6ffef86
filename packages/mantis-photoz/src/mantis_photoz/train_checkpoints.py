"""Train the models that ship with the package, on simulated galaxies only (sections 6.1 and 6.2).

``python -m mantis_photoz.train_checkpoints [OUT] [--objects 6000] [--epochs 12] [--seeds 2] [--models NAME
...]``
takes about two minutes a model on one core. Each folder gets the network in 16 bits, its recipe, a
temperature
and PIT map fitted on a calibration split, and the statistics for the out-of-distribution score.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_core.atomic import atomic_write
from fusion_core.checkpoint import save_tensors
from mantis_photoz import calibrate, metrics
from mantis_photoz.config import EARLY, FusionConfig, TrainConfig
from mantis_photoz.fusion import FusionModel
from mantis_photoz.grid import grid_nodes, nearest_node
from mantis_photoz.loading import OOD, PRIOR, RECALIBRATION
from mantis_photoz.ood import OutOfDistribution
from mantis_photoz.predicting import predict
from mantis_photoz.samples import CutoutArrays
from mantis_photoz.simulate import model_inputs, simulate
from mantis_photoz.training import fit_plain

MODELS = ("sim-ps1", "sim-early", "sim-late", "sim-early-dropout")
"""PS1 only; nine bands on one sky; an encoder each; nine bands, trained with surveys dropped at random."""

DROPOUT = {"galex": 0.15, "ps1": 0.05, "unwise": 0.15}
OBJECTS, EPOCHS, CALIBRATION, SEEN = 3000, 8, 1000, 3000
TRAIN_SEED, CALIBRATION_SEED, TEST_SEED = 100, 900, 7
"""Seeds of the simulated sets: training (plus the model's seed), calibration, and the demo's test set."""


def model_config(name: str) -> FusionConfig:
    """The settings of a model of :data:`MODELS`."""
    common: dict[str, Any] = {"bins": 120, "z_max": 1.2, "hidden": 128, "dropout": 0.1, "ebv_scale": 10.0}
    common |= {
        "scaling": "noise",
        "size": 32,
        "data": "simulation (mantis_photoz.simulate), no real galaxies",
    }
    if name == "sim-late":
        encoders = {"galex": "small-10", "ps1": "small-20", "unwise": "small-10"}
        return FusionConfig(fusion="late", inputs=model_inputs(), encoders=encoders, align="native", **common)
    surveys = ("ps1",) if name == "sim-ps1" else None
    return FusionConfig(
        inputs=model_inputs(surveys=surveys),
        encoders={EARLY: "small-24"},
        align="wcs",
        missing="mask" if name == "sim-early-dropout" else "zeros",
        **common,
    )


def recipe(name: str, *, epochs: int = EPOCHS, seed: int = 0) -> TrainConfig:
    """The training of a model of :data:`MODELS` (section 6.2)."""
    return TrainConfig(
        model=model_config(name),
        optimizer="adamw",
        lr=2e-3,
        weight_decay=1e-4,
        schedule="onecycle",
        epochs=epochs,
        batch_size=64,
        sampler="natural",
        augment="d4-batch",
        survey_dropout=DROPOUT if name == "sim-early-dropout" else {},
        seed=seed,
    )


def only(samples: CutoutArrays, config: FusionConfig) -> CutoutArrays:
    """The surveys that a network takes."""
    at = [samples.surveys.index(name) for name in config.surveys]
    images = {name: samples.images[name] for name in config.surveys}
    wcs = {name: samples.wcs[name] for name in config.surveys if name in samples.wcs}
    return CutoutArrays(images, samples.ebv, samples.z, samples.present[:, at], samples.ids, wcs)


def train(name: str, samples: CutoutArrays, *, epochs: int, seed: int, quiet: bool = False) -> FusionModel:
    """One model of :data:`MODELS`, trained on the samples."""

    def told(epoch: int, step: int, loss: float) -> None:
        if not quiet:
            sys.stdout.write(f"{name} seed {seed}: epoch {epoch}, step {step}, loss {loss:.3f}\n")
            sys.stdout.flush()

    config = recipe(name, epochs=epochs, seed=seed)
    return fit_plain(config, only(samples, config.model), told=told)


def folder_name(name: str, seed: int) -> str:
    """Seed 0 has the model's own name."""
    return name if seed == 0 else f"{name}-{seed}"


def store(model: FusionModel, folder: Path, samples: CutoutArrays, held: CutoutArrays, facts: Any) -> None:
    """Write the network, its calibration, its out-of-distribution statistics and its record."""
    model.half().save_pretrained(folder)
    (folder / "README.md").unlink()  # one card for all of them
    model.float()
    config = model.config
    found = predict(model, only(held, config))
    fitted = calibrate.fit(found.pdf, held.z)
    split = {"set": "simulation", "seed": CALIBRATION_SEED, "objects": len(held)}
    calibrate.save(fitted, folder / RECALIBRATION[0], **split)
    seen = predict(model, only(samples, config).take(slice(0, SEEN)))
    known = OutOfDistribution.fit(seen.features).state_dict()
    save_tensors(folder / OOD, {key: value.float() for key, value in known.items()})
    with atomic_write(folder / PRIOR, "w") as file:
        file.write(json.dumps({"n_train": drawn_masses(samples, config)}) + "\n")
    z = np.asarray(held.z)
    scores = metrics.point_metrics(np.asarray(found.pdf.mean()), z)
    record = facts | {"calibration split": split, "nmad": scores["nmad"], "eta_0.05": scores["eta_0.05"]}
    with atomic_write(folder / "training.json", "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")


def drawn_masses(samples: CutoutArrays, config: FusionConfig) -> list[float]:
    """Masses of the training redshifts in the bins; a bin without any counts as half an object."""
    labels = nearest_node(samples.z, grid_nodes(config.bins, config.z_max))
    counts = torch.bincount(labels, minlength=config.bins).double().clamp(min=0.5)
    return [round(value, 8) for value in (counts / counts.sum()).tolist()]


def main() -> None:
    """Write the checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument("--objects", type=int, default=OBJECTS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    held = simulate(CALIBRATION, seed=CALIBRATION_SEED)
    for seed in options.seeds:
        samples = simulate(options.objects, seed=TRAIN_SEED + seed)
        for name in options.models:
            started = time.monotonic()
            model = train(name, samples, epochs=options.epochs, seed=seed)
            facts: dict[str, Any] = {
                "data": "simulation (mantis_photoz.simulate), no real galaxies",
                "objects": options.objects,
                "simulation seed": TRAIN_SEED + seed,
                "seed": seed,
                "minutes": round((time.monotonic() - started) / 60, 1),
                "recipe": recipe(name, epochs=options.epochs, seed=seed).to_dict(),
            }
            store(model, options.out / folder_name(name, seed), samples, held, facts)


if __name__ == "__main__":
    main()

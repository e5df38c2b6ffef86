"""A model's folder: network, recalibration, memory of the training set, and training prior."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.checkpoint import load_tensors
from fusion_core.errors import CheckpointError, reading

RECALIBRATION = ("recalibration.json", "recalibration.safetensors")
OOD = "ood.safetensors"
PRIOR = "prior.json"
"""``{"n_train": [...]}``: (bins,) masses of the training set as the sampler drew it."""


def load_parts(name: str | os.PathLike[str], recalibration: Any = None) -> dict[str, Any]:
    """The arguments of :class:`~mantis_photoz.PhotoZ` that a model's folder gives.

    Args:
        name: folder, one that ships, or a name on the hub.
        recalibration: a map, a file, None for the folder's own, False for none.

    Raises:
        CheckpointError: no such model, or broken files.
    """
    from mantis_photoz.fusion import load_model, shipped

    text = os.fspath(name)
    own = shipped()
    folder = own[text] if text in own and not Path(text).is_dir() else Path(text)
    model = load_model(name)
    found: dict[str, Any] = {"model": model, "name": Path(text).name}
    if recalibration is None:
        recalibration = next((folder / file for file in RECALIBRATION if (folder / file).is_file()), None)
    if isinstance(recalibration, str | os.PathLike):
        from mantis_photoz import calibrate

        recalibration = calibrate.load(recalibration)
    found["recalibration"] = None if recalibration is False else recalibration
    if (folder / OOD).is_file():
        from mantis_photoz.ood import OutOfDistribution

        found["ood"] = OutOfDistribution.from_state_dict(load_tensors(folder / OOD))
    if (folder / PRIOR).is_file():
        with reading(folder / PRIOR, "holds no n_train", CheckpointError):
            told = json.loads((folder / PRIOR).read_text(encoding="utf-8"))["n_train"]
            masses = np.asarray(told, np.float64)
            if masses.shape != (model.config.bins,):
                raise CheckpointError(f"n_train is of {masses.shape}, the model has {model.config.bins} bins")
            if not (np.isfinite(masses).all() and (masses >= 0).all() and masses.any()):
                raise CheckpointError("n_train holds no masses: wanted numbers >= 0, one of them above")
        found["train_prior"] = masses
    return found

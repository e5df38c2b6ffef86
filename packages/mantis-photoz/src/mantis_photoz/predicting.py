"""Batches of cutouts through a network: logits, densities, hidden features; one view or the mean of 8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_core.errors import ConfigError
from fusion_core.modules import untouched
from mantis_photoz.config import FusionConfig
from mantis_photoz.inputs import Images, prepare
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.samples import Batch, batch_of, blocks
from mantis_photoz.views import d4_views


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a network says of some objects.

    Args:
        logits: (n, bins) float32, on the CPU; with ``tta="d4"`` the logarithm of the mean PMF.
        features: (n, hidden) of the last hidden layer, on the CPU.
        z_max: of the grid.
    """

    logits: Tensor
    features: Tensor
    z_max: float

    @property
    def pdf(self) -> BinnedPDF:
        """The densities, float64."""
        return BinnedPDF.from_logits(self.logits, z_max=self.z_max)


def prepared(batch: Batch, config: FusionConfig) -> Images:
    """The views of a batch as training and evaluation make them, on its device: gaps are zeros."""
    options: dict[str, Any] = {"wcs": batch.wcs or None, "ebv": batch.ebv, "nan": "zero"}
    return prepare(batch.images, config, device=batch.ebv.device, **options)


def predict(
    model: Any,
    samples: Any,
    *,
    batch_size: int = 256,
    tta: str = "none",
    present: Tensor | None = None,
    config: FusionConfig | None = None,
) -> Prediction:
    """Predict for cutouts in memory or in files; mode and gradients of the model come back as they were.

    Args:
        model: a :class:`~mantis_photoz.fusion.FusionModel`, perhaps wrapped.
        samples: as :class:`~mantis_photoz.training.Trainer` takes them.
        batch_size: objects per forward pass.
        tta: ``"none"`` (one fixed view) or ``"d4"`` (mean PMF of the 8 turns and flips).
        present: (n, surveys) instead of what the samples say.
        config: of the network; the model's own by default.

    Raises:
        ConfigError: ``batch_size`` below 1, or another ``tta``.
    """
    if tta not in ("none", "d4"):
        raise ConfigError(f"tta is {tta!r}, wanted 'none' or 'd4'")
    network: Any = getattr(model, "module", model)
    settings: FusionConfig = network.config if config is None else config
    device = next(network.parameters()).device
    logits, features = list[Tensor](), list[Tensor]()
    with torch.no_grad(), untouched(network):
        for rows in blocks(len(samples), batch_size):
            batch = batch_of(samples, rows, settings).to(device)
            images = prepared(batch, settings)
            seen = batch.present if present is None else present[rows].to(device)
            views = d4_views(images) if tta == "d4" else [images]
            hidden = [network.penultimate(view, batch.ebv, seen).float() for view in views]
            found = torch.stack([network.classify(one).float() for one in hidden])
            mean = found[0] if len(views) == 1 else found.double().softmax(-1).mean(0).clamp_min(1e-38).log()
            logits.append(mean.float().cpu())
            features.append(torch.stack(hidden).mean(0).cpu())
    empty = torch.zeros(0, settings.bins), torch.zeros(0, network.head[0].out_features)
    return Prediction(
        torch.cat(logits) if logits else empty[0],
        torch.cat(features) if features else empty[1],
        settings.z_max,
    )

"""What a model loses without a survey, without neighbours, without morphology (section 2.10).

Nothing is trained anew here: a survey is masked, pixels outside of an aperture are dropped, or the pixels
inside of it are shuffled. For ablation by retraining give :class:`~mantis_photoz.FusionConfig` fewer inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_core.errors import check_range
from fusion_core.modules import untouched
from fusion_core.progress import track
from fusion_core.report import Report
from fusion_core.seeding import generator as seeded
from mantis_photoz import metrics
from mantis_photoz.attribution import aperture_pixels, scramble_pixels
from mantis_photoz.inputs import Images, view_scales
from mantis_photoz.pdf import BinnedPDF
from mantis_photoz.predicting import prepared
from mantis_photoz.samples import batch_of, blocks, redshifts

__all__ = ["ablation"]

Change = Callable[[Images, Tensor], tuple[Images, Tensor]]
_SHOWN = ("bias", "nmad", "eta_0.05", "eta_0.15")


def ablation(
    model: Any,
    samples: Any,
    *,
    radius: float = 3.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Scores of a model on images that lack something.

    Args:
        model: a :class:`~mantis_photoz.fusion.FusionModel`.
        samples: cutouts with redshifts, as :class:`~mantis_photoz.training.Trainer` takes them.
        radius: of the aperture, arc seconds.
        batch_size: objects per pass.
        seed: of the shuffles.
        progress: a bar on stderr; None decides by the terminal.

    Returns:
        A row each for whole images, the aperture alone, shuffled apertures, and without each survey: point
        metrics of the mean redshift, CRPS, and the CRPS beside that of whole images.

    Raises:
        DataError: redshifts are unknown.
    """
    check_range("radius", radius, 0.0, 1e4, open=True)
    config, device = model.config, next(model.parameters()).device
    z, changes = redshifts(samples), _changes(config, radius, seed)
    logits: dict[str, list[Tensor]] = {name: [] for name in changes}
    with torch.no_grad(), untouched(model):
        for rows in track(blocks(len(samples), batch_size), "ablation", enabled=progress):
            batch = batch_of(samples, rows, config).to(device)
            images = prepared(batch, config)
            for name, change in changes.items():
                seen, present = change(images, batch.present)
                logits[name].append(model(seen, batch.ebv, present).float().cpu())
    rows_out: list[dict[str, Any]] = []
    for name, parts in logits.items():
        pdf = BinnedPDF.from_logits(torch.cat(parts), z_max=config.z_max).numpy()
        points = metrics.point_metrics(pdf.mean(), z)
        row = {"images": name} | {key: float(points[key]) for key in _SHOWN}
        rows_out.append(row | {"crps": float(pdf.crps(z).mean())})
    whole = rows_out[0]["crps"]
    return Report(
        title=f"What the model loses ({len(z)} objects, aperture of {radius:g} arc seconds)",
        rows=[row | {"crps_lost": row["crps"] - whole} for row in rows_out],
    )


def _changes(config: Any, radius: float, seed: int) -> dict[str, Change]:
    scales = view_scales(config)
    each = lambda images, change: {n: change(x, radius / scales[n]) for n, x in images.items()}

    def shuffled(planes: Tensor, pixels: float) -> Tensor:
        return scramble_pixels(planes, pixels, generator=seeded(seed, "scramble"))

    def without(number: int) -> Change:
        def change(images: Images, present: Tensor) -> tuple[Images, Tensor]:
            told = present.clone()
            told[:, number] = False
            return images, told

        return change

    found: dict[str, Change] = {
        "whole": lambda images, present: (images, present),
        "aperture only": lambda images, present: (each(images, aperture_pixels), present),
        "aperture, shuffled": lambda images, present: (
            each(each(images, aperture_pixels), shuffled),
            present,
        ),
    }
    return found | {f"without {name}": without(k) for k, name in enumerate(config.surveys)}

"""A picture for the demo: why 22 pixels of two surveys, stretched to one size, are not one sky (B9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.errors import require_extra
from fusion_core.images import read_image
from mantis_photoz import inputs, plots
from mantis_photoz.config import FusionConfig
from mantis_photoz.surveys import SURVEYS
from mantis_photoz.wcs import Tan, match_psf, resample

__all__ = ["draw", "stacks", "windows"]

SCALE = 0.14
"""Arc seconds per pixel of the picture: 2.3 arc minutes over its 1000 pixels, about."""

_GALAXY = (612.0, 330.0)  # of the picture's middle square
_SHARP = 0.2


def windows() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The Hubble deep field of scikit-image in gray, as each survey would have it.

    Returns:
        survey -> (1, 1, pixels, pixels) blurred as it sees, and survey -> (1, 8) coordinates.

    Raises:
        MissingExtraError: scikit-image is not installed (extra ``demo``).
    """
    folder = Path(str(require_extra("skimage", "demo", "mantis-photoz").__file__)).parent
    picture = read_image(folder / "data" / "hubble_deep_field.jpg")
    side = min(picture.shape[:2])
    top, left = ((size - side) // 2 for size in picture.shape[:2])
    gray = picture[top : top + side, left : left + side].mean(-1, dtype=np.float32) / 255
    flux = torch.from_numpy(np.ascontiguousarray(gray) ** 2)[None, None]  # the picture is stretched
    source = Tan.centered(150.0, 2.2, pixels=side, scale=SCALE)
    ra, dec = source.to_sky(*_GALAXY)
    images, places = dict[str, Tensor](), dict[str, Tensor]()
    for name, survey in SURVEYS.items():
        seen = match_psf(flux, (_SHARP,), float(np.mean(survey.psf_fwhm)), SCALE)
        target = Tan.centered(ra, dec, pixels=survey.pixels, scale=survey.pixel_scale)
        rows = [torch.tensor([tan.row()], dtype=torch.float64) for tan in (source, target)]
        images[name] = resample(seen, rows[0], rows[1], (survey.pixels, survey.pixels), outside=0.0)
        places[name] = rows[1]
    return images, places


def stacks(images: dict[str, Tensor], places: dict[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """The authors' stack of crops that are stretched, and the sky-true one: (size, size, 3) colours.

    Args:
        images: of :func:`windows`.
        places: of :func:`windows`.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for align in ("stretch", "wcs"):
        views = inputs.view(images, FusionConfig.official("early", align=align), places)
        layers = [_shown(views[name][0, 0].numpy()) for name in ("unwise", "ps1", "galex")]
        found[align] = np.stack(layers, -1)
    return found


def _shown(plane: NDArray[Any]) -> NDArray[np.float32]:
    low, high = np.percentile(plane, (5, 99.7))
    return np.clip((plane - low) / max(float(high - low), 1e-9), 0, 1).astype(np.float32) ** 0.5


def draw() -> Any:
    """One place on the sky in three surveys: native cutouts, and the two ways to stack them.

    Returns:
        The matplotlib figure.
    """
    images, places = windows()
    figure = plots.new_figure(11.0, 2.9)
    axes = figure.subplots(1, 5)
    labels = {"ps1": "Pan-STARRS1", "galex": "GALEX", "unwise": "unWISE"}
    for ax, (name, label) in zip(axes, labels.items(), strict=False):
        survey = SURVEYS[name]
        ax.imshow(_shown(images[name][0, 0].numpy()), cmap="gray", origin="lower")
        ax.set_title(f'{label}: {survey.field_arcsec:g}" of {survey.pixel_scale:g}"/px', fontsize=8)
    made = stacks(images, places)
    words = {"stretch": "crops stretched to one size", "wcs": "the same, on one sky"}
    for ax, (align, label) in zip(axes[3:], words.items(), strict=True):
        ax.imshow(made[align], origin="lower")
        ax.set_title(label, fontsize=8)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
    return figure

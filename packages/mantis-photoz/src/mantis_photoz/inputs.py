"""From planes as read to what a network is fed: gaps filled, flux scaled, one view (steps 5 to 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_core.errors import ConfigError
from mantis_photoz.config import FusionConfig, SurveyInput
from mantis_photoz.dust import deredden
from mantis_photoz.nans import NanPolicy, clean_planes
from mantis_photoz.scaling import scale_pixels
from mantis_photoz.surveys import SURVEYS, Survey
from mantis_photoz.views import center_crop, resize
from mantis_photoz.wcs import match_psf, resample

Images = dict[str, Tensor]


def surveys_of(config: FusionConfig, registry: Mapping[str, Survey] = SURVEYS) -> dict[str, Survey]:
    """The surveys of a network, at the pixels that it takes.

    Args:
        config: of the network.
        registry: bands and scalings by name.

    Raises:
        ConfigError: a survey that the registry does not have, or with another number of bands.
    """
    found: dict[str, Survey] = {}
    for name, one in config.inputs.items():
        survey = registry.get(name)
        if survey is None or len(survey.bands) != one.bands:
            has = "unknown" if survey is None else f"one of {len(survey.bands)} bands"
            raise ConfigError(
                f"the model takes survey {name!r} with {one.bands} bands, which is {has}; describe it in a "
                "file of surveys"
            )
        found[name] = survey.replace(pixels=one.pixels, pixel_scale=one.pixel_scale, crop=one.side)
    return found


def fill_gaps(planes: Mapping[str, Tensor], nan: NanPolicy = "inpaint") -> Images:
    """Planes without NaN; batches that have none pass as they are.

    Args:
        planes: survey -> (batch, bands, height, width) on the CPU.
        nan: see :func:`mantis_photoz.nans.clean_planes`.

    Raises:
        MissingExtraError: ``nan="inpaint"`` meets a gap and OpenCV is not installed.
    """
    found: Images = {}
    for name, images in planes.items():
        bad = ~torch.isfinite(images).flatten(1).all(1)
        filled = images.clone() if bool(bad.any()) else images
        for row in bad.nonzero().flatten().tolist():
            filled[row] = torch.from_numpy(clean_planes(images[row].numpy(), nan=nan)[0])
        found[name] = filled
    return found


def scale(
    planes: Mapping[str, Tensor],
    config: FusionConfig,
    registry: Mapping[str, Survey] = SURVEYS,
    ebv: Tensor | None = None,
) -> Images:
    """Network inputs from flux, by the scaling that the network was trained with (section 2.2).

    Args:
        planes: survey -> (batch, bands, height, width) flux without NaN.
        config: of the network.
        registry: scalings by name.
        ebv: (batch, 2) E(B-V) of CSFD and Planck, for ``deredden``; the first is taken.

    Raises:
        ConfigError: ``deredden`` without ``ebv``, or a survey without R_b.
    """
    found: Images = {}
    for name, one in config.inputs.items():
        images = planes[name]
        if config.deredden:
            images = _dereddened(images, name, registry, ebv)
        if config.scaling == "noise":
            sigma = torch.tensor(one.noise, dtype=images.dtype, device=images.device)[:, None, None]
            found[name] = torch.asinh(images / (2 * sigma))
        else:
            signed = config.scaling == "official-signed"
            found[name] = scale_pixels(images, registry[name].scaling, signed=signed)
    return found


def _dereddened(images: Tensor, name: str, registry: Mapping[str, Survey], ebv: Tensor | None) -> Tensor:
    coefficients = registry[name].dust if name in registry else ()
    if ebv is None or len(coefficients) != images.shape[1]:
        lacking = "ebv" if ebv is None else f"R_b of {images.shape[1]} bands of {name!r}"
        raise ConfigError(f"deredden needs {lacking}; pass it, or describe the survey with dust")
    return deredden(images, ebv[:, 0].to(images.device), coefficients=coefficients, plane=True)


def view(
    images: Mapping[str, Tensor], config: FusionConfig, wcs: Mapping[str, Tensor] | None = None
) -> Images:
    """The planes that the encoders see, one entry per survey.

    Args:
        images: survey -> (batch, bands, height, width), scaled.
        config: its ``align`` is ``"native"`` (center crops), ``"stretch"`` (crops stretched to one size),
            ``"wcs"`` (every survey resampled on the sky of the finest), or ``"psf"`` (then blurred alike).
        wcs: survey -> (batch, 8) rows of :meth:`mantis_photoz.wcs.Tan.row`, for ``"wcs"`` and ``"psf"``.

    Raises:
        ConfigError: ``wcs`` is missing where the view needs it.
    """
    inputs = config.inputs
    if config.align in ("native", "stretch"):
        cut = {name: center_crop(images[name], one.side) for name, one in inputs.items()}
        if config.align == "native":
            return cut
        return {name: resize(planes, config.size) for name, planes in cut.items()}
    if wcs is None:
        raise ConfigError(f"align {config.align!r} needs the coordinates of the cutouts; pass wcs")
    target, size = sky_grid(config, wcs)
    places = {name: wcs[name].to(target.device) for name in inputs}
    found = {name: resample(images[name], places[name], target, size, outside=0.0) for name in inputs}
    if config.align == "psf":
        step = next(iter(view_scales(config).values()))
        widths = [width for one in inputs.values() for width in one.fwhm or ()]
        broad = config.target_fwhm or max(widths)
        found = {
            name: match_psf(planes, inputs[name].fwhm or (), broad, step) for name, planes in found.items()
        }
    return found


def view_scales(config: FusionConfig) -> dict[str, float]:
    """Arc seconds per pixel of each survey's view."""
    if config.align == "native":
        return {name: one.pixel_scale for name, one in config.inputs.items()}
    common = None if config.align == "stretch" else _reference(config)[1]
    seen = {name: one if common is None else common for name, one in config.inputs.items()}
    return {name: one.pixel_scale * one.side / config.size for name, one in seen.items()}


def sky_grid(config: FusionConfig, wcs: Mapping[str, Tensor]) -> tuple[Tensor, tuple[int, int]]:
    """The common grid of sky-true views: the center of the finest survey, ``config.size`` pixels wide.

    Returns:
        (batch, 8) rows of coordinates, and (rows, columns).
    """
    name, one = _reference(config)
    found = wcs[name].clone()
    first = round((one.pixels - one.side) / 2)
    zoom = one.side / config.size
    found[:, 2:4] = (found[:, 2:4] - first - 0.5) / zoom + 0.5
    found[:, 4:] = found[:, 4:] * zoom
    return found, (config.size, config.size)


def _reference(config: FusionConfig) -> tuple[str, SurveyInput]:
    return min(config.inputs.items(), key=lambda item: item[1].pixel_scale)


def prepare(
    planes: Mapping[str, Tensor],
    config: FusionConfig,
    *,
    wcs: Mapping[str, Tensor] | None = None,
    ebv: Tensor | None = None,
    nan: NanPolicy = "inpaint",
    device: Any = "cpu",
    registry: Mapping[str, Survey] = SURVEYS,
) -> Images:
    """Gaps filled on the CPU, then scaling and view on the device.

    Args:
        planes: survey -> (batch, bands, height, width) flux as read.
        config: of the network.
        wcs: see :func:`view`.
        ebv: see :func:`scale`.
        nan: see :func:`fill_gaps`.
        device: where the images go.
        registry: see :func:`scale`.

    Returns:
        survey -> (batch, bands, rows, columns), as :class:`~mantis_photoz.fusion.FusionModel` takes them.

    Example:
        >>> config = FusionConfig(encoders={"early": "small-8"}, size=24)
        >>> planes = {s: torch.ones(1, one.bands, one.pixels, one.pixels) for s, one in config.inputs.items()}
        >>> {name: tuple(x.shape) for name, x in prepare(planes, config).items()}
        {'galex': (1, 2, 24, 24), 'ps1': (1, 5, 24, 24), 'unwise': (1, 2, 24, 24)}
    """
    filled = {name: images.to(device) for name, images in fill_gaps(planes, nan).items()}
    return view(scale(filled, config, registry, ebv), config, wcs)

"""Images of galaxies: Sersic profiles, blurred in Fourier space, noise; in batches."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.seeding import generator, rng
from mantis_photoz.simulate.bands import FWHM, SURVEY_BANDS
from mantis_photoz.simulate.population import Galaxies, SimulationConfig, population

OVERSAMPLE = {"galex": 3, "ps1": 2, "unwise": 3}
B_DISC, B_BULGE = 1.6783469900166605, 7.669249442500804  # of Sersic 1 and 4
GROUP = 64  # galaxies that are rendered at a time
NEAREST, FARTHEST = 2.5, 12.0
POOL = 128  # galaxies that neighbours are taken from


def sersic(
    radius: Tensor, axis_ratio: Tensor, angle: Tensor, shift: Tensor, *, index: int, pixels: int, scale: float
) -> Tensor:
    """Elliptical Sersic profiles, each with the sum of what falls into the image of a galaxy of flux 1.

    The profile is sampled and normalised by its sum times the share of the light within the image's
    half-width (the incomplete gamma function), so that small galaxies lose nothing to the sampling and large
    ones keep what lies outside.

    Args:
        radius: (n,) half-light radius of the major axis, arcsec.
        axis_ratio: (n,) in (0, 1].
        angle: (n,) of the major axis, radians.
        shift: (n, 2) of the centre in x and y, arcsec.
        index: 1 (disc) or 4 (bulge).
        pixels: of the image's side.
        scale: arcsec per pixel.

    Returns:
        (n, pixels, pixels).
    """
    line = (torch.arange(pixels, dtype=radius.dtype) - (pixels - 1) / 2) * scale
    x = line[None, None, :] - shift[:, 0, None, None]
    y = line[None, :, None] - shift[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = x * cos + y * sin, (y * cos - x * sin) / axis_ratio[:, None, None]
    # A galaxy of no size would be a point between the samples; half a pixel keeps its light in place.
    square = (along**2 + across**2) / radius[:, None, None] ** 2
    square = square + (0.25 * scale / radius[:, None, None]) ** 2
    power, b = (square.sqrt(), B_DISC) if index == 1 else (square.sqrt().sqrt().sqrt(), B_BULGE)
    profile = torch.exp(-b * power)
    reach = (pixels * scale / 2) / radius
    within = torch.special.gammainc(torch.tensor(2.0 * index), b * reach ** (1 / index))
    return profile * (within / profile.sum(dim=(1, 2)))[:, None, None]


@lru_cache(maxsize=16)
def _transfer(survey: str, side: int, fine: float) -> Tensor:
    """(bands, side, side // 2 + 1) Fourier transform of the Gaussian point-spread functions."""
    fx, fy = torch.fft.rfftfreq(side, fine), torch.fft.fftfreq(side, fine)
    square = fy[:, None] ** 2 + fx[None, :] ** 2
    sigma = torch.tensor(FWHM[SURVEY_BANDS[survey]], dtype=torch.float32) / 2.354820045
    return torch.exp(-2 * math.pi**2 * sigma[:, None, None] ** 2 * square)


def _parts(galaxies: Galaxies, shift: NDArray[np.float64], pixels: int, scale: float) -> list[Tensor]:
    """Profiles of bulges and discs."""
    as_tensor = lambda values: torch.from_numpy(np.asarray(values, dtype=np.float32))
    radius, ratio = as_tensor(galaxies.radius), as_tensor(galaxies.axis_ratio)
    angle, moved = as_tensor(galaxies.angle), as_tensor(shift)
    shape: Any = {"pixels": pixels, "scale": scale}
    return [
        sersic(radius / 2, (1 + ratio) / 2, angle, moved, index=4, **shape),
        sersic(radius, ratio, angle, moved, index=1, **shape),
    ]


def clean_images(
    galaxies: Galaxies,
    survey: str,
    pixels: int,
    scale: float,
    *,
    neighbours: Galaxies | None = None,
    whose: NDArray[np.int64] | None = None,
    shift: NDArray[np.float64] | None = None,
) -> Tensor:
    """Images without noise.

    Args:
        galaxies: n of them, in the middle of their images.
        survey: ``"galex"``, ``"ps1"`` or ``"unwise"``.
        pixels: of a side.
        scale: arcsec per pixel.
        neighbours: other galaxies in some of the images, at half their flux.
        whose: the image that each is in.
        shift: (neighbours, 2) where, arcsec from the middle in x and y.

    Returns:
        (n, bands, pixels, pixels) float32, in the units of the survey.
    """
    times = OVERSAMPLE[survey]
    side, fine, bands = pixels * times, scale / times, SURVEY_BANDS[survey]
    spectrum = _spectrum(galaxies, np.zeros((len(galaxies), 2)), bands, side, fine, 1.0)
    if neighbours is not None and len(neighbours) and whose is not None and shift is not None:
        spectrum.index_add_(0, torch.from_numpy(whose), _spectrum(neighbours, shift, bands, side, fine, 0.5))
    images = torch.fft.irfft2(spectrum * _transfer(survey, side, fine), s=(side, side))
    return torch.nn.functional.avg_pool2d(images, times) * times**2


def _spectrum(
    galaxies: Galaxies, shift: NDArray[np.float64], bands: slice, side: int, fine: float, factor: float
) -> Tensor:
    total = 0.0
    for flux, profile in zip(
        (galaxies.bulge, galaxies.disc), _parts(galaxies, shift, side, fine), strict=True
    ):
        weight = torch.from_numpy((factor * flux[:, bands]).astype(np.float32))
        total = total + weight[:, :, None, None] * torch.fft.rfft2(profile)[:, None]
    return torch.as_tensor(total)


@lru_cache(maxsize=4)
def _pool(config: SimulationConfig, seed: int) -> Galaxies:
    return population(POOL, config, seed=seed, stream="neighbours")


def render(
    galaxies: Galaxies, config: SimulationConfig | None = None, *, seed: int = 0, start: int = 0
) -> tuple[dict[str, Tensor], NDArray[np.bool_]]:
    """Noisy images of all surveys.

    The draws of an object depend on ``seed`` and its number only.

    Args:
        galaxies: n of them.
        config: sizes, noise, neighbours, coverage.
        seed: of neighbours, noise and coverage.
        start: number of the first galaxy, for a piece of a longer series.

    Returns:
        survey -> (n, bands, pixels, pixels) float32; and (n, 3) which surveys cover the object, in that
        order.
    """
    config = config or SimulationConfig()
    count = len(galaxies)
    draw = [rng(seed, "scene", start + i) for i in range(count)]
    facts = np.array([one.random(5) for one in draw]).reshape(count, 5)
    pool = _pool(config, seed)
    other = (facts[:, 4] * POOL).astype(np.int64)
    whose = np.flatnonzero(facts[:, 0] < config.neighbour)
    present = np.ones((count, 3), dtype=bool)
    present[:, 0] = facts[:, 1] >= config.no_galex
    distance = NEAREST + (FARTHEST - NEAREST) * facts[whose, 2]
    turn = 2 * np.pi * facts[whose, 3]
    shift = np.stack([distance * np.cos(turn), distance * np.sin(turn)], axis=1)
    images = {
        name: torch.empty(count, SURVEY_BANDS[name].stop - SURVEY_BANDS[name].start, pixels, pixels)
        for name, (pixels, _) in config.geometry.items()
    }
    for low in range(0, count, GROUP):
        part = slice(low, min(low + GROUP, count))
        here = (whose >= low) & (whose < low + GROUP)
        scene: Any = {
            "neighbours": pool.take(other[whose[here]]),
            "whose": whose[here] - low,
            "shift": shift[here],
        }
        for name, (pixels, scale) in config.geometry.items():
            images[name][part] = clean_images(galaxies.take(part), name, pixels, scale, **scene)
    _add_noise(images, config, seed, start)
    images["galex"][torch.from_numpy(~present[:, 0])] = 0.0
    return images, present


def _add_noise(images: dict[str, Tensor], config: SimulationConfig, seed: int, start: int) -> None:
    for name, planes in images.items():
        sigma = torch.tensor(config.noise[SURVEY_BANDS[name]], dtype=torch.float32)[:, None, None]
        for number in range(planes.shape[0]):
            source = generator(seed, "noise", name, start + number)
            planes[number] += sigma * torch.randn(planes.shape[1:], generator=source)

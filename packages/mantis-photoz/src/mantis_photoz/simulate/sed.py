"""Spectra of old and young stars with lines and dust, and their fluxes in the bands (section 6.1).

A galaxy's spectrum is a sum of three templates, each times dust; on a grid that is even in ln(lambda) a
redshift is a shift, so that the fluxes of all objects are gathers and one matrix product.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mantis_photoz.simulate.bands import HIGH, LOW, POINTS, logistic, transmission

Vector = NDArray[np.float64]
NORM = 5500.0
Z_MAX = 1.6
LYMAN, ESCAPE = 912.0, 0.02
_LINES = (
    (1216.0, 25.0),
    (3727.0, 45.0),
    (4861.0, 15.0),
    (4959.0, 18.0),
    (5007.0, 55.0),
    (6563.0, 90.0),
    (6725.0, 12.0),
    (9069.0, 12.0),
    (9532.0, 25.0),
)
"""Wavelength and equivalent width at u = 1, Angstrom: Ly a, [OII], H b, [OIII], H a, [SII], [SIII]."""

_STEP = np.log(HIGH / LOW) / (POINTS - 1)
_BELOW = int(np.ceil(np.log1p(Z_MAX) / _STEP)) + 2  # points under LOW that a redshift reaches


def planck(at: Vector, temperature: float) -> Vector:
    """f_lambda of a black body, 1 at 5500 Angstrom."""
    x = 1.438776877e8 / temperature
    return (NORM / at) ** 5 * np.expm1(x / NORM) / np.expm1(x / at)


def old(at: Vector) -> Vector:
    """f_lambda of an old population: cool stars, 4000 Angstrom break, ultraviolet upturn, 1.6 micron bump."""
    stars = planck(at, 4600.0) * (0.5 + 0.5 * logistic((at - 3950) / 60))
    stars *= (0.35 + 0.65 * logistic((at - 2700) / 120)) * logistic((at - 1800) / 150)
    upturn = 0.01 * (at / 2000) ** -2 * ((at < 3500) & (at > LYMAN))
    return (stars + upturn) * _bump(at)


def _bump(at: Vector) -> Vector:
    return 1 + 0.5 * np.exp(-0.5 * (np.log(at / 16000) / 0.22) ** 2)


def young(at: Vector) -> Vector:
    """f_lambda of a young population: hot stars with the Lyman and Balmer breaks, and a few cool ones."""
    hot = (at / NORM) ** -2 * logistic((at - LYMAN) / 3) * (0.7 + 0.3 * logistic((at - 3646) / 40))
    return hot + 0.1 * planck(at, 4600.0) * logistic((at - 3950) / 60) * _bump(at)


def nebula(at: Vector) -> Vector:
    """f_lambda of what comes with star formation at u = 1: lines, the 3.3 micron feature and hot dust."""
    found = np.zeros_like(at)
    for center, width in _LINES:
        level = young(np.array([center + 1.0]))[0]
        sigma = 0.004 * center
        found += level * width * np.exp(-0.5 * ((at - center) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    feature = 0.03 * np.exp(-0.5 * ((at - 33000) / 500) ** 2)
    dust = 0.02 * (planck(at, 900.0) / planck(np.array([33000.0]), 900.0)[0])
    return found + feature + dust


def calzetti(at: Vector) -> Vector:
    """A(lambda) / A_V of Calzetti et al. (2000), held at its ends, never below 0."""
    micron = np.clip(at / 1e4, 0.12, 2.2)
    short = 2.659 * (-2.156 + 1.509 / micron - 0.198 / micron**2 + 0.011 / micron**3)
    long = 2.659 * (-1.857 + 1.040 / micron)
    curve = np.where(micron < 0.63, short, long) + 4.05
    fade = np.where(at > 22000, (22000 / at) ** 2, 1.0)
    return np.maximum(curve, 0.0) / 4.05 * fade


@lru_cache(maxsize=1)
def templates() -> tuple[Vector, Vector]:
    """(3, n) f_nu of old stars, young stars and nebula over the value at 5500, and (n,) Calzetti's curve.

    The grid is that of the bands, continued to shorter wavelengths as far as a redshift of 1.6 reaches.
    """
    at = LOW * np.exp(_STEP * np.arange(-_BELOW, POINTS))
    shapes = np.stack([old(at), young(at), nebula(at)])
    reference = np.array([old(np.array([NORM]))[0], young(np.array([NORM]))[0], young(np.array([NORM]))[0]])
    shapes *= (at / NORM) ** 2 / reference[:, None]
    shapes *= np.where(at < LYMAN, ESCAPE, 1.0)
    return shapes, calzetti(at)


@lru_cache(maxsize=4)
def _seen(bands: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The grid points that some bands see at all, and the passbands there, each with sum 1."""
    curves = transmission()[list(bands)]
    at = np.flatnonzero((curves > 1e-6 * curves.max(axis=1, keepdims=True)).any(axis=0))
    cut = curves[:, at]
    return at, (cut / cut.sum(axis=1, keepdims=True)).astype(np.float32)


def component_fluxes(
    z: Vector, mix: Vector, glow: Vector, a_v: Vector, *, bands: tuple[int, ...] = tuple(range(9))
) -> NDArray[np.float64]:
    """Band fluxes of stellar components over their rest-frame flux at 5500 Angstrom before dust.

    Args:
        z: (n,) redshifts in [0, 1.6].
        mix: (n,) share of young stars at 5500 Angstrom.
        glow: (n,) strength u of lines and hot dust, in [0, 1].
        a_v: (n,) attenuation, magnitudes.
        bands: numbers of the bands.

    Returns:
        (n, bands) mean f_nu in each band over f_nu(5500), before distance; accurate to 1e-5.
    """
    shapes, curve = templates()
    at, curves = _seen(bands)
    place = np.log1p(z) / _STEP
    whole = place.astype(np.int64)
    part = (place - whole).astype(np.float32)[:, None]
    high = (_BELOW - whole)[:, None] + at[None]  # rest wavelength of each observed one
    low = high - 1

    def shifted(table: Vector) -> NDArray[np.float32]:
        single = table.astype(np.float32)
        upper = single[high]
        return upper + part * (single[low] - upper)

    columns = (values.astype(np.float32)[:, None] for values in (mix, glow, a_v))
    young, lines, dust = columns
    light = (1 - young) * shifted(shapes[0])
    if young.any():
        light += young * (shifted(shapes[1]) + lines * shifted(shapes[2]))
    if dust.any():
        light *= np.exp(np.float32(-0.4 * np.log(10)) * dust * shifted(curve))
    return (light @ curves.T).astype(np.float64)

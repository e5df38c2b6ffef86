"""The nine passbands of the simulator, their depths and units (section 6.1), in the order of the tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("nuv", "fuv", "g", "r", "i", "z", "y", "w1", "w2")
SURVEY_BANDS = {"galex": slice(0, 2), "ps1": slice(2, 7), "unwise": slice(7, 9)}
CENTER = np.array([2271, 1528, 4866, 6215, 7545, 8679, 9633, 33526, 46028], dtype=np.float64)
WIDTH = np.array([1060, 442, 1166, 1318, 1243, 966, 615, 6626, 10422], dtype=np.float64)
FWHM = np.array([5.3, 4.2, 1.31, 1.19, 1.11, 1.07, 1.02, 6.1, 6.4])
"""Of the point-spread functions, arcsec."""

DEPTH = np.array([20.8, 20.0, 23.3, 23.2, 23.1, 22.3, 21.4, 20.7, 20.0])
"""AB magnitude of a point source at 5 sigma."""

ZERO_POINT = np.array([20.08, 18.82, 25, 25, 25, 25, 25, 22.5 + 2.699, 22.5 + 3.339])
"""AB magnitude of one unit of flux: GALEX counts/s, PS1 counts of one second, unWISE Vega nanomaggies."""

R_BAND = np.array([7.95, 8.06, 3.172, 2.271, 1.682, 1.322, 1.087, 0.184, 0.113])
"""Extinction per E(B-V) (section 2.11)."""

POINTS = 6000
LOW, HIGH = 700.0, 70000.0


@lru_cache(maxsize=1)
def wavelengths() -> NDArray[np.float64]:
    """(6000,) observed wavelengths, Angstrom, even in the logarithm."""
    return np.geomspace(LOW, HIGH, POINTS)


@lru_cache(maxsize=1)
def transmission() -> NDArray[np.float64]:
    """(9, 6000) passbands, each with sum 1, so that a product with f_nu is the AB flux (photon counting).

    AB flux = int f_lambda lambda T / int T / lambda; with f_lambda = f_nu / lambda^2 that is the mean of f_nu
    weighted by T / lambda, and on a grid even in ln(lambda) the weights are T.
    """
    at = wavelengths()[None]
    center, width = CENTER[:, None], WIDTH[:, None]
    rise = logistic((at - (center - width / 2)) / (0.06 * width))
    fall = logistic(((center + width / 2) - at) / (0.06 * width))
    product = rise * fall
    return product / product.sum(axis=1, keepdims=True)


def logistic(x: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def flux_of(magnitude: Any, zero_point: Any = ZERO_POINT) -> Any:
    """Flux of an AB magnitude in the units of the images."""
    return 10.0 ** (-0.4 * (np.asarray(magnitude) - zero_point))


def pixel_noise(pixel_scale: Any, depth: Any = DEPTH) -> NDArray[np.float64]:
    """(9,) standard deviation of a pixel, from the 5-sigma depth of a point source.

    sigma_flux = sigma_pixel sqrt(N_eff), N_eff = 4 pi sigma_psf^2 / pixel^2.

    Args:
        pixel_scale: arcsec, one number or one per band.
        depth: AB magnitudes.
    """
    effective = 4 * np.pi * (FWHM / 2.354820045) ** 2 / np.asarray(pixel_scale) ** 2
    return flux_of(depth) / 5 / np.sqrt(effective)

"""Galaxies drawn from the recipe of section 6.1: redshifts, stars, sizes, dust, limits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusion_core.config import Config
from fusion_core.errors import ConfigError, check_range
from fusion_core.seeding import rng
from mantis_photoz.simulate.bands import DEPTH, R_BAND, ZERO_POINT, pixel_noise
from mantis_photoz.simulate.sed import component_fluxes

Array = NDArray[np.float64]
CANDIDATES = 512  # drawn at a time, so that the first n objects do not depend on how many are asked for
SPEED_OF_LIGHT, HUBBLE = 299792.458, 70.0  # km/s, km/s/Mpc
R = 3  # number of the band r
GROUP = 64  # objects whose spectra are held at a time


@dataclass(frozen=True)
class SimulationConfig(Config):
    """What is simulated.

    Args:
        ps1_pixels: of a cutout's side; ``SimulationConfig.full()`` has the paper's.
        ps1_scale: arcsec.
        galex_pixels: at 1.5 arcsec.
        unwise_pixels: at 2.75 arcsec.
        galex_survey: ``"AIS"`` has the recorded depths, ``"MIS"`` is 2.5 magnitudes deeper.
        neighbour: share of the objects with another galaxy 2.5 to 12 arcsec away.
        no_galex: share of the objects without GALEX.
        r_bright: kept where the observed r is fainter than this
        r_faint: and brighter than this, AB magnitudes.
    """

    ps1_pixels: int = 32
    ps1_scale: float = 0.5
    galex_pixels: int = 16
    unwise_pixels: int = 16
    galex_survey: Literal["AIS", "MIS"] = "AIS"
    neighbour: float = 0.35
    no_galex: float = 0.10
    r_bright: float = 14.5
    r_faint: float = 21.5

    def __post_init__(self) -> None:
        self.check_fields("ps1_pixels", "galex_pixels", "unwise_pixels", low=4, high=65_536)
        self.check_fields("r_bright", "r_faint", low=-100.0, high=100.0)
        check_range("ps1_scale", self.ps1_scale, 0.0, 10.0, open=True)
        check_range("neighbour", self.neighbour, 0.0, 1.0)
        check_range("no_galex", self.no_galex, 0.0, 1.0)
        if not self.r_bright < self.r_faint:
            raise ConfigError(f"r_bright is {self.r_bright}, wanted less than r_faint, {self.r_faint}")

    @classmethod
    def full(cls, **changes: Any) -> SimulationConfig:
        """Cutouts as large as the paper's: PS1 170 px at 0.25 arcsec, the others 32 px."""
        sizes: dict[str, Any] = {
            "ps1_pixels": 170,
            "ps1_scale": 0.25,
            "galex_pixels": 32,
            "unwise_pixels": 32,
        }
        return cls(**(sizes | changes))

    @property
    def geometry(self) -> dict[str, tuple[int, float]]:
        """Survey -> pixels of a side, arcsec per pixel."""
        return {
            "galex": (self.galex_pixels, 1.5),
            "ps1": (self.ps1_pixels, self.ps1_scale),
            "unwise": (self.unwise_pixels, 2.75),
        }

    @property
    def depth(self) -> Array:
        """(9,) AB magnitude of a point source at 5 sigma."""
        deeper = np.zeros(9)
        deeper[:2] = 2.5 if self.galex_survey == "MIS" else 0.0
        return DEPTH + deeper

    @property
    def noise(self) -> Array:
        """(9,) standard deviation of a pixel."""
        scale = [self.geometry[name][1] for name in ("galex",) * 2 + ("ps1",) * 5 + ("unwise",) * 2]
        return pixel_noise(np.array(scale), self.depth)


@dataclass(frozen=True, slots=True)
class Galaxies:
    """Galaxies; every field has one entry (row) each.

    Args:
        z: redshifts.
        red: of the red half.
        ebv: E(B-V) of our Galaxy.
        bulge: (n, 9) flux of the bulge in each band, in the units of the images, reddened by our Galaxy.
        disc: (n, 9) of the disc.
        radius: half-light radius of the disc, arcsec; the bulge's is half of it.
        axis_ratio: of the disc; the bulge is rounder.
        angle: position angle, radians.
    """

    z: Array
    red: NDArray[np.bool_]
    ebv: Array
    bulge: Array
    disc: Array
    radius: Array
    axis_ratio: Array
    angle: Array

    @property
    def flux(self) -> Array:
        """(n, 9) flux in each band."""
        return self.bulge + self.disc

    @property
    def magnitude(self) -> Array:
        """(n, 9) AB magnitudes."""
        return ZERO_POINT - 2.5 * np.log10(self.flux)

    def __len__(self) -> int:
        return len(self.z)

    def take(self, index: Any) -> Galaxies:
        """Some of the galaxies."""
        return Galaxies(*(getattr(self, name)[index] for name in self.__slots__))

    @staticmethod
    def joined(parts: list[Galaxies]) -> Galaxies:
        """Several sets as one."""
        names = Galaxies.__slots__
        return Galaxies(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@lru_cache(maxsize=1)
def _distances() -> tuple[Array, Array, Array]:
    """Redshifts, luminosity distance in parsec, kiloparsec per arcsec: astropy's, without its import."""
    z = np.linspace(0.0, 1.6, 8001)
    inverse = 1 / np.sqrt(0.3 * (1 + z) ** 3 + 0.7)
    steps = 0.5 * (inverse[1:] + inverse[:-1]) * np.diff(z)
    comoving = SPEED_OF_LIGHT / HUBBLE * 1e6 * np.concatenate([[0.0], np.cumsum(steps)])
    parsec_per_arcsec = comoving / (1 + z) * np.pi / 180 / 3600
    return z[1:], (comoving * (1 + z))[1:], parsec_per_arcsec[1:] / 1e3


def distance(z: Array) -> tuple[Array, Array]:
    """Luminosity distance in parsec and kiloparsec per arcsec, flat LCDM with H0 = 70 and Omega_m = 0.3."""
    grid, parsec, scale = _distances()
    return np.exp(np.interp(np.log(z), np.log(grid), np.log(parsec))), np.interp(z, grid, scale)


def _redshifts(draw: np.random.Generator, count: int) -> Array:
    kind = draw.random(count)
    near, middle = draw.gamma(3.0, 0.07, count), draw.normal(0.55, 0.12, count)
    z = np.where(kind < 0.4, near, np.where(kind < 0.7, middle, draw.uniform(0.02, 1.2, count)))
    return np.clip(z, 0.005, 1.199)


def draw_galaxies(
    draw: np.random.Generator, count: int, limits: tuple[float, float] | None = None
) -> Galaxies:
    """Galaxies by the recipe.

    Args:
        draw: the stream; it is advanced.
        count: how many are drawn.
        limits: only those with an r magnitude between these come back; None = all.
    """
    z, red = _redshifts(draw, count), draw.random(count) < 0.5

    def either(first: Array, second: Array) -> Array:
        return np.where(red, first, second)

    bulge_share = either(draw.beta(4, 1.5, count), draw.beta(1, 4, count))
    mix = either(draw.beta(1, 20, count), draw.beta(2, 4, count))
    glow = either(draw.beta(1, 12, count), draw.beta(2, 2, count))
    a_v = either(draw.exponential(0.1, count), draw.exponential(0.3, count))
    absolute = either(draw.normal(-21.6, 1.0, count), draw.normal(-20.8, 1.2, count)) - 1.2 * np.minimum(z, 1)
    size = 4.5 * np.exp(draw.normal(0.0, 0.35, count))
    axis_ratio, angle = draw.uniform(0.3, 1.0, count), draw.uniform(0.0, np.pi, count)
    ebv = np.minimum(0.04 * np.exp(draw.normal(0.0, 0.7, count)), 0.4)
    parsec, kpc = distance(z)
    total = 10 ** (-0.4 * absolute) * (10 / parsec) ** 2 * (1 + z)
    stars = _Stars(z, total * bulge_share, total * (1 - bulge_share), mix, glow, a_v, ebv)
    keep = np.arange(count)
    if limits is not None:
        r = stars.magnitude(R)
        keep = np.flatnonzero((r > limits[0]) & (r < limits[1]))
    bulge, disc = stars.take(keep).fluxes(tuple(range(9)))
    return Galaxies(
        z=z[keep],
        red=red[keep],
        ebv=ebv[keep],
        bulge=bulge,
        disc=disc,
        radius=(size / kpc)[keep],
        axis_ratio=axis_ratio[keep],
        angle=angle[keep],
    )


class _Stars(NamedTuple):
    """What fluxes follow from; ``bulge`` and ``disc`` are f_nu at rest 5500 Angstrom, AB maggies."""

    z: Array
    bulge: Array
    disc: Array
    mix: Array
    glow: Array
    a_v: Array
    ebv: Array

    def take(self, index: NDArray[Any]) -> _Stars:
        return _Stars(*(values[index] for values in self))

    def fluxes(self, bands: tuple[int, ...]) -> tuple[Array, Array]:
        """(n, bands) of bulges and of discs, reddened, in the units of the images."""
        unit = 10 ** (0.4 * (ZERO_POINT - self.ebv[:, None] * R_BAND))[:, list(bands)]
        parts = list[tuple[Array, Array]]()
        for start in range(0, len(self.z), GROUP):
            one = self.take(np.arange(start, min(start + GROUP, len(self.z))))
            none, faint = np.zeros(len(one.z)), np.full(len(one.z), 0.1)
            first = component_fluxes(one.z, none, none, faint, bands=bands)
            second = component_fluxes(one.z, one.mix, one.glow, one.a_v, bands=bands)
            parts.append((one.bulge[:, None] * first, one.disc[:, None] * second))
        if not parts:
            return np.zeros((0, len(bands))), np.zeros((0, len(bands)))
        bulge, disc = (np.concatenate(column) for column in zip(*parts, strict=True))
        return bulge * unit, disc * unit

    def magnitude(self, band: int) -> Array:
        """(n,) AB magnitudes in one band."""
        bulge, disc = self.fluxes((band,))
        return ZERO_POINT[band] - 2.5 * np.log10((bulge + disc)[:, 0])


def population(
    count: int, config: SimulationConfig | None = None, *, seed: int = 0, stream: str = "galaxies"
) -> Galaxies:
    """The first ``count`` galaxies that the magnitude limits keep; more of them begin with the same.

    Args:
        count: at least 0.
        config: of the limits.
        seed: of the draws.
        stream: names the series; another gives other galaxies.

    Raises:
        ConfigError: a negative count, or limits that keep next to nothing.

    Example:
        >>> first, more = population(3, seed=1), population(5, seed=1)
        >>> bool((first.z == more.z[:3]).all())
        True
    """
    config = config or SimulationConfig()
    if count < 0:
        raise ConfigError(f"count is {count}, wanted at least 0")
    kept, found, tries = list[Galaxies](), 0, 0
    while found < count or not kept:
        limits = (config.r_bright, config.r_faint)
        kept.append(draw_galaxies(rng(seed, stream, tries), CANDIDATES, limits))
        found, tries = found + len(kept[-1]), tries + 1
        if tries >= 4 and found < tries:
            raise ConfigError(
                f"r_bright {config.r_bright} and r_faint {config.r_faint} keep {found} of "
                f"{tries * CANDIDATES} "
                "galaxies; widen them"
            )
    return Galaxies.joined(kept).take(slice(0, count))

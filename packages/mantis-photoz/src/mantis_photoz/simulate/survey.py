"""Galaxies, images, dust and positions put together, in memory or as a directory of FITS files."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion_core.atomic import PathLike
from fusion_core.seeding import rng
from mantis_photoz.config import SurveyInput
from mantis_photoz.samples import CutoutArrays
from mantis_photoz.simulate.bands import FWHM, SURVEY_BANDS
from mantis_photoz.simulate.population import Galaxies, SimulationConfig, population
from mantis_photoz.simulate.render import render
from mantis_photoz.wcs import Tan

SOUTH = -30.0


def simulate(count: int, config: SimulationConfig | None = None, *, seed: int = 0) -> CutoutArrays:
    """Cutouts of simulated galaxies, in the units of their surveys.

    The first n objects do not depend on ``count``.

    Args:
        count: how many.
        config: sizes, depths, neighbours; the recorded recipe by default.
        seed: of everything.

    Returns:
        Images of ``galex`` (NUV, FUV), ``ps1`` (g r i z y) and ``unwise`` (W1 W2), E(B-V), true redshifts,
        and
        which surveys cover each object.

    Raises:
        ConfigError: a negative count, or limits that keep no galaxies.

    Example:
        >>> found = simulate(2)
        >>> {name: tuple(planes.shape) for name, planes in found.images.items()}
        {'galex': (2, 2, 16, 16), 'ps1': (2, 5, 32, 32), 'unwise': (2, 2, 16, 16)}
    """
    return _made(population(count, config, seed=seed), config or SimulationConfig(), seed)


def _made(galaxies: Galaxies, config: SimulationConfig, seed: int) -> CutoutArrays:
    images, present = render(galaxies, config, seed=seed)
    draw = rng(seed, "dust maps")
    # Two maps of the same dust do not agree: Planck's scatters by a tenth round CSFD's.
    planck = galaxies.ebv * np.exp(0.1 * draw.standard_normal(len(galaxies)))
    ebv = torch.from_numpy(np.stack([galaxies.ebv, planck], axis=1).astype(np.float32))
    ids = tuple(f"sim{seed}-{number:06d}" for number in range(len(galaxies)))
    wcs, sky = dict[str, Tensor](), torch.from_numpy(positions(len(galaxies), seed))
    for name, (pixels, scale) in config.geometry.items():
        row = torch.tensor(Tan.centered(0.0, 0.0, pixels=pixels, scale=scale).row(), dtype=torch.float64)
        wcs[name] = torch.cat([sky, row[2:].expand(len(galaxies), -1)], dim=1)
    return CutoutArrays(images, ebv, torch.from_numpy(galaxies.z), torch.from_numpy(present), ids, wcs)


def positions(count: int, seed: int = 0) -> NDArray[np.float64]:
    """(count, 2) random right ascensions and declinations north of -30 degrees, in degrees."""
    draw = rng(seed, "sky").random((count, 2))
    low = np.sin(np.radians(SOUTH + 1))
    return np.stack([360 * draw[:, 0], np.degrees(np.arcsin(low + (1 - low) * 0.999 * draw[:, 1]))], axis=1)


def write(
    count: int,
    out: PathLike,
    config: SimulationConfig | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Any:
    """Simulate a survey into a directory of FITS files with a catalogue; see :func:`simulate`.

    Args:
        count: how many.
        out: the directory; it appears whole or not at all.
        config: as in :func:`simulate`.
        seed: of everything.
        overwrite: replace a directory.
        progress: None shows a bar on a terminal only.

    Returns:
        The path of ``catalog.ecsv``: id, ra, dec, ebv_csfd, ebv_planck, z_spec, mag_r, kind, simulation.

    Raises:
        InputError: ``out`` is there already and not empty.
    """
    from mantis_photoz.simulate.fitsio import write_survey

    config = config or SimulationConfig()
    galaxies = population(count, config, seed=seed)
    return write_survey(
        _made(galaxies, config, seed),
        out,
        sky=positions(count, seed),
        scales={name: scale for name, (_, scale) in config.geometry.items()},
        overwrite=overwrite,
        progress=progress,
        mag_r=galaxies.magnitude[:, 3].round(4),
        kind=np.where(galaxies.red, "red", "blue"),
        simulation=[json.dumps({"seed": seed}, separators=(",", ":"))] * count,
    )


def model_inputs(config: SimulationConfig | None = None, surveys: Any = None) -> dict[str, SurveyInput]:
    """The inputs of a network for simulated cutouts, with their pixel noise and point-spread functions.

    Args:
        config: of the simulation.
        surveys: names; None = all.
    """
    config = config or SimulationConfig()
    found: dict[str, SurveyInput] = {}
    for name in surveys or config.geometry:
        part, (pixels, scale) = SURVEY_BANDS[name], config.geometry[name]
        noise, widths = (tuple(round(float(v), 9) for v in values[part]) for values in (config.noise, FWHM))
        found[name] = SurveyInput(part.stop - part.start, pixels, scale, None, noise, widths)
    return found

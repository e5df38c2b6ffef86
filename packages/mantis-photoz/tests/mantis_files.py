"""FITS files of made-up galaxies, for the tests of readers and of estimate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table

from fusion_core.seeding import rng
from mantis_photoz.config import EARLY, FusionConfig
from mantis_photoz.simulate import model_inputs
from mantis_photoz.surveys import SURVEYS
from mantis_photoz.wcs import Tan

SMALL = {name: survey.replace(pixels=12, crop=12, pixel_scale=scale) for (name, survey), scale in
         zip(SURVEYS.items(), (1.5, 0.5, 2.75), strict=True)}  # fmt: skip


TINY = FusionConfig(
    inputs=model_inputs(),
    encoders={EARLY: "small-4"},
    bins=24,
    z_max=1.2,
    hidden=16,
    size=32,
    align="wcs",
    scaling="noise",
)


def planes(survey, key=0, seed=0):
    noise = rng(seed, survey.name, key).normal(size=(len(survey.bands), survey.pixels, survey.pixels))
    y, x = np.mgrid[: survey.pixels, : survey.pixels] - (survey.pixels - 1) / 2
    return (noise + 20 * np.exp(-(x**2 + y**2) / 8)).astype(np.float32)


def write(path, data, tan=None, *, bands=None, **cards):
    header = fits.Header()
    header.update({} if tan is None else tan.cards())
    if bands is not None:
        header["BANDS"] = ",".join(bands)
        header.update({f"BAND{k}": band for k, band in enumerate(bands)})
    header.update(cards)
    fits.PrimaryHDU(np.asarray(data, np.float32), header).writeto(path, overwrite=True)
    return Path(path)


def write_object(folder, identifier, ra, dec, surveys=SMALL, seed=0):
    for name, survey in surveys.items():
        tan = Tan.centered(ra, dec, pixels=survey.pixels, scale=survey.pixel_scale)
        write(folder / f"{identifier}.{name}.fits", planes(survey, identifier, seed), tan, bands=survey.bands,
              EXPTIME=100.0)  # fmt: skip


def table(n=4, **columns):
    draw = rng(0, "table", n)
    found = Table(
        {"id": [f"g{k}" for k in range(n)], "ra": draw.uniform(0, 360, n), "dec": draw.uniform(-20, 80, n)}
    )
    found["ebv_csfd"], found["ebv_planck"] = 0.03, 0.02
    for name, value in columns.items():
        found[name] = value
    return found


def folder_of(path, catalog, surveys=SMALL):
    path.mkdir(parents=True, exist_ok=True)
    for row in catalog:
        write_object(path, row["id"], row["ra"], row["dec"], surveys)
    return path

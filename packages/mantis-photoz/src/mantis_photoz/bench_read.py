"""Benchmark rows of the readers and of ``estimate``: FITS ingest, sky resampling, shares of time, memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_core.bench import Row, check_target, memory_row, paired, peak_memory
from fusion_core.errors import FusionError
from fusion_core.seeding import generator, rng
from mantis_photoz.config import FusionConfig, SurveyInput
from mantis_photoz.surveys import SURVEYS, Survey
from mantis_photoz.wcs import Tan, resample

FITS_TARGET, SKY_TARGET, NETWORK_TARGET, MEMORY_TARGET = ">= 10", ">= 50", ">= 0.85", ">= 0.5"
_BATCH = 64
_POSITION = (150.1, 2.2)
_SMALL: dict[str, Any] = {"encoders": {"early": "small-24"}, "hidden": 128}
_DEMO = {"galex": (16, 1.5), "ps1": (32, 0.5), "unwise": (16, 2.75)}


def _write(path: Path, data: Any, tan: Tan, survey: Survey) -> None:
    from astropy.io import fits

    cards = {**tan.cards(), "BANDS": ",".join(survey.bands), "EXPTIME": 100.0}
    cards |= {f"BAND{k}": band for k, band in enumerate(survey.bands)}
    fits.PrimaryHDU(np.asarray(data, np.float32), fits.Header(cards)).writeto(path, overwrite=True)


def _official_files(folder: Path) -> list[Path]:
    """The seven files of one object at their full sizes: two cubes and five single planes."""
    draw, files = rng(0, "bench"), list[Path]()
    for survey in SURVEYS.values():
        tan = Tan.centered(*_POSITION, pixels=survey.pixels, scale=survey.pixel_scale)
        planes = draw.normal(size=(len(survey.bands), survey.pixels, survey.pixels))
        parts = (
            {survey.name: planes} if survey.name != "ps1" else dict(zip(survey.bands, planes, strict=True))
        )
        for name, data in parts.items():
            files.append(folder / f"a.{name}.fits")
            _write(files[-1], data, tan, survey)
    return files


def fits_rows(repeats: int, device: str) -> list[Row]:  # noqa: ARG001
    """The seven files of an object, read by the fast path and by astropy.

    Raises:
        FusionError: the two give other pixels.
    """
    from astropy.io import fits

    from mantis_photoz.fits_fast import read_fits

    with tempfile.TemporaryDirectory() as name:
        files = _official_files(Path(name))

        def ours() -> list[Any]:
            return [read_fits(path)[0].data.astype(np.float32) for path in files]

        def reference() -> list[Any]:
            found: list[Any] = []
            for path in files:
                with fits.open(path) as units:
                    unit: Any = units[0]
                    found.append(np.atleast_3d(np.asarray(unit.data, np.float32)))
            return found

        for a, b in zip(ours(), reference(), strict=True):
            if a.sum() != np.asarray(b).sum() and not np.isclose(
                float(a.sum()), float(np.asarray(b).sum()), rtol=1e-4
            ):
                raise FusionError("the fast FITS reader gives other pixels than astropy")
        row = paired(
            "FITS ingest, 7 files",
            ours,
            reference,
            repeats=repeats,
            target=FITS_TARGET,
            dtype="float32",
            against="astropy.io.fits",
            note="the cutouts of one object at full size, to native float32",
        )
    return [row]


def sky_rows(repeats: int, device: str) -> list[Row]:
    """One band of a batch on the PS1 sky, against reproject_interp object by object (extra ``sky``).

    Raises:
        FusionError: the two differ in the interior.
        MissingExtraError: reproject is not installed.
    """
    from astropy.io import fits
    from astropy.wcs import WCS

    from fusion_core.errors import require_extra

    reproject: Any = require_extra("reproject", "sky", "mantis-photoz")
    size = 120
    source = Tan.centered(*_POSITION, pixels=32, scale=1.5)
    target = Tan.centered(*_POSITION, pixels=size, scale=0.25)
    images = torch.randn(_BATCH, 1, 32, 32, generator=generator(0, "bench")).to(device)
    rows = [
        torch.tensor([tan.row()], dtype=torch.float64, device=device).expand(_BATCH, -1)
        for tan in (source, target)
    ]
    systems = [WCS(fits.Header(tan.cards())) for tan in (source, target)]
    planes = images.cpu().numpy()[:, 0]

    def ours() -> Any:
        return resample(images, rows[0], rows[1], (size, size))

    def reference() -> Any:
        return reproject.reproject_interp((planes[0], systems[0]), systems[1], shape_out=(size, size))[0]

    gap = np.abs(ours()[0, 0].cpu().numpy() - reference())
    if not np.nanmax(gap) < 1e-4:
        raise FusionError(f"resampling differs from reproject_interp by {np.nanmax(gap):.2g}")
    both = paired(
        "sky-true stacking, one band",
        ours,
        reference,
        repeats=repeats,
        device=device,
        dtype="float32",
        against="reproject_interp",
        note=f"32 -> {size} px; per band of one object, ours in a batch of {_BATCH}",
    )
    return [_per_object(both, _BATCH, SKY_TARGET)]


def _per_object(row: Row, batch: int, target: str) -> Row:
    """A row whose own side did a batch, and the reference one object."""
    import dataclasses

    ratio = row.ratio * batch
    return dataclasses.replace(
        row,
        ratio=ratio,
        ours_s=None if row.ours_s is None else row.ours_s / batch,
        ratio_low=None if row.ratio_low is None else row.ratio_low * batch,
        ratio_high=None if row.ratio_high is None else row.ratio_high * batch,
        target=target,
        met=check_target(ratio, target),
    )


def demo_config(width: int = 24) -> FusionConfig:
    """A small early network at the demo's cutout sizes."""
    inputs = {
        name: SurveyInput(len(SURVEYS[name].bands), pixels, scale, noise=(1.0,) * len(SURVEYS[name].bands))
        for name, (pixels, scale) in _DEMO.items()
    }
    return FusionConfig(
        inputs=inputs,
        encoders={"early": f"small-{width}"},
        bins=120,
        z_max=1.2,
        hidden=128,
        size=32,
        align="wcs",
        scaling="noise",
    )


class Repeated:
    """A source that gives every object the files of a few, so that thousands need no disk."""

    def __init__(self, source: Any, count: int) -> None:
        self.source, self.count, self.path = source, count, source.path

    def read(self, identifier: str, survey: Survey, ra: float, dec: float) -> Any:
        """The reading of object ``identifier`` modulo the number of files."""
        found = self.source.read(f"g{int(identifier[1:]) % self.count}", survey, ra, dec)
        self.source.checksums.clear()
        return found


def demo_sky(folder: Path, objects: int, files: int = 16, *, full: bool = False) -> tuple[Any, Any]:
    """A catalogue of so many objects at one place, and their cutouts at the paper's or the demo's size."""
    from astropy.table import Table

    from mantis_photoz.cutouts import FitsDirectory

    small = {name: SURVEYS[name].replace(pixels=p, crop=p, pixel_scale=s) for name, (p, s) in _DEMO.items()}
    surveys = dict(SURVEYS) if full else small
    draw = rng(0, "demo sky")
    for number in range(files):
        for name, survey in surveys.items():
            tan = Tan.centered(*_POSITION, pixels=survey.pixels, scale=survey.pixel_scale)
            data = draw.normal(size=(len(survey.bands), survey.pixels, survey.pixels))
            _write(folder / f"g{number}.{name}.fits", data, tan, survey)
    ids = [f"g{number}" for number in range(objects)]
    ra, dec = (np.full(objects, value) for value in _POSITION)
    table = Table({"id": ids, "ra": ra, "dec": dec, "ebv": np.full(objects, 0.03)})
    return table, Repeated(FitsDirectory(folder), files)


def run_estimate(objects: int, width: int = 24) -> Any:
    """``estimate`` on the CPU from local FITS files of the demo's size, with a small network."""
    from mantis_photoz.estimate import PhotoZ
    from mantis_photoz.fusion import FusionModel

    with tempfile.TemporaryDirectory() as name:
        table, source = demo_sky(Path(name), objects)
        photoz = PhotoZ(FusionModel(demo_config(width)), device="cpu")
        return photoz.estimate(table, source, batch_size=_BATCH, num_workers=1, progress=False)


def share_rows(repeats: int, device: str) -> list[Row]:  # noqa: ARG001
    """The network's share of ``estimate``'s time on the CPU from local files.

    The first row is a small network on cutouts of the paper's size and view, the second the demo's, whose
    network takes less than reading does. Reading and scaling run ahead in one thread.
    """
    from mantis_photoz.estimate import PhotoZ
    from mantis_photoz.fusion import FusionModel

    cases = [
        (
            "estimate, the network's share of the time",
            "small-24",
            FusionConfig.official("early", **_SMALL),
            160,
            True,
        ),
        ("estimate, the same at the demo's size", "small-24", demo_config(), 256, False),
    ]
    rows: list[Row] = []
    for title, encoder, config, objects, full in cases:
        with tempfile.TemporaryDirectory() as name:
            table, source = demo_sky(Path(name), objects, full=full)
            photoz = PhotoZ(FusionModel(config), device="cpu")
            options: dict[str, Any] = {"batch_size": 16, "num_workers": 1, "progress": False}
            photoz.estimate(table[:16], source, **options)  # what is imported on first use
            found = [
                photoz.estimate(table, source, **options).throughput() for _ in range(max(1, min(repeats, 2)))
            ]
        shares = sorted(float(one["network_share"]) for one in found)
        rates = ", ".join(f"{key} {rate:.0f}" for key, rate in found[-1]["objects_per_s"].items() if rate)
        share, target = shares[len(shares) // 2], NETWORK_TARGET if full else None
        rows.append(
            Row(
                name=title,
                ratio=share,
                threads=torch.get_num_threads(),
                dtype="float32",
                ours_s=found[-1]["wall_s"] / objects,
                reference="the whole of estimate",
                ratio_low=shares[0],
                ratio_high=shares[-1],
                repeats=len(shares),
                target=target,
                met=check_target(share, target),
                note=f"{encoder}; objects/s: {rates}",
            )
        )
    return rows


def memory_small() -> None:
    """500 objects; for :func:`fusion_core.bench.peak_memory`."""
    run_estimate(500, 8)


def memory_large() -> None:
    """5,000 objects."""
    run_estimate(5000, 8)


def memory_rows(repeats: int, device: str) -> list[Row]:  # noqa: ARG001
    """Memory of ``estimate`` at 500 and at 5,000 objects: bounded by the batch, but for the result itself."""
    small, large = (
        peak_memory(f"mantis_photoz.bench_read:{name}") for name in ("memory_small", "memory_large")
    )
    return [
        memory_row(
            "estimate, memory at 500 over 5,000 objects",
            large,
            small,
            target=MEMORY_TARGET,
            against="500 objects",
            note=f"with the libraries that it imports; {(large - small) / 1e6:.0f} MB more for 4,500 more "
            "objects, their rows and densities included",
        )
    ]


Measure = Callable[[int, str], Sequence[Row]]
ROWS: dict[str, Measure] = {
    "fits": fits_rows,
    "sky": sky_rows,
    "share": share_rows,
    "memory": memory_rows,
}


def rows() -> dict[str, Measure]:
    """The measures of this module by name."""
    return dict(ROWS)

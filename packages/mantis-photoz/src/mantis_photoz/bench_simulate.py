"""Benchmark rows of the simulator and of the network: whole batches against one object at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fusion_core.bench import Row, check_target, paired
from fusion_core.errors import FusionError
from mantis_photoz.fusion import FusionModel
from mantis_photoz.inputs import prepare
from mantis_photoz.simulate import SimulationConfig, simulate
from mantis_photoz.simulate.bands import FWHM, SURVEY_BANDS
from mantis_photoz.simulate.population import Galaxies, population
from mantis_photoz.simulate.render import OVERSAMPLE, clean_images
from mantis_photoz.train_checkpoints import model_config
from mantis_photoz.training import new_model

Measure = Callable[[int, str], list[Row]]
RATE_TARGET, BATCH_TARGET = ">= 150", ">= 1.5"
COUNT, OBJECTS = 512, 32


def rate_row(repeats: int, device: str) -> list[Row]:  # noqa: ARG001
    """Objects per second and core, drawing, rendering and noise included."""
    simulate(8)
    seconds = list[float]()
    for number in range(repeats):
        start = time.process_time()
        simulate(COUNT, seed=number)
        seconds.append((time.process_time() - start) / COUNT)
    each = float(np.median(seconds))
    low, high = float(np.min(seconds)), float(np.max(seconds))
    rate = 1 / each
    return [
        Row(
            name="simulate: objects per second of one core",
            device="cpu",
            threads=torch.get_num_threads(),
            dtype="float32",
            ours_s=each,
            reference_s=1.0,
            reference="one second",
            ratio=rate,
            ratio_low=1 / high,
            ratio_high=1 / low,
            repeats=repeats,
            target=RATE_TARGET,
            met=check_target(rate, RATE_TARGET),
            note=f"process time, {COUNT} objects, population and images",
        )
    ]


def plain_images(galaxies: Galaxies, config: SimulationConfig) -> dict[str, list[np.ndarray]]:
    """The same clean images by numpy, one object, survey and band at a time."""
    from scipy.special import gammainc

    found: dict[str, list[np.ndarray]] = {}
    for name, (pixels, scale) in config.geometry.items():
        times, part, images = OVERSAMPLE[name], SURVEY_BANDS[name], list[np.ndarray]()
        side, fine = pixels * times, scale / times
        line = (np.arange(side) - (side - 1) / 2) * fine
        fx, fy = np.fft.rfftfreq(side, fine), np.fft.fftfreq(side, fine)
        for i in range(len(galaxies)):
            cos, sin = np.cos(galaxies.angle[i]), np.sin(galaxies.angle[i])
            radius, ratio = galaxies.radius[i], galaxies.axis_ratio[i]
            profiles = list[np.ndarray]()
            for r, q, n, b in (
                (radius / 2, (1 + ratio) / 2, 4, 7.669249442500804),
                (radius, ratio, 1, 1.6783469900166605),
            ):
                along = line[None] * cos + line[:, None] * sin
                across = (line[:, None] * cos - line[None] * sin) / q
                square = (along**2 + across**2) / r**2 + (0.25 * fine / r) ** 2
                profile = np.exp(-b * square ** (1 / (2 * n)))
                within = gammainc(2 * n, b * (side * fine / 2 / r) ** (1 / n))
                profiles.append(profile * within / profile.sum())
            planes = list[np.ndarray]()
            for k, width in enumerate(FWHM[part]):
                image = galaxies.bulge[i, part][k] * profiles[0] + galaxies.disc[i, part][k] * profiles[1]
                sigma = width / 2.354820045
                blur = np.exp(-2 * np.pi**2 * sigma**2 * (fx[None] ** 2 + fy[:, None] ** 2))
                image = np.fft.irfft2(np.fft.rfft2(image) * blur, s=image.shape)
                planes.append(image.reshape(pixels, times, pixels, times).sum(axis=(1, 3)))
            images.append(np.stack(planes))
        found[name] = images
    return found


def render_rows(repeats: int, device: str) -> list[Row]:  # noqa: ARG001
    """Images of a batch against a loop over objects and bands.

    Raises:
        FusionError: the two give other images.
    """
    config, galaxies = SimulationConfig(), population(OBJECTS, seed=3)

    def ours() -> dict[str, torch.Tensor]:
        return {name: clean_images(galaxies, name, *size) for name, size in config.geometry.items()}

    plain = plain_images(galaxies, config)
    for name, images in ours().items():
        wanted = torch.from_numpy(np.stack(plain[name])).float()
        if not torch.allclose(images, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
            raise FusionError(f"the two renderers differ on {name}; the ratio would mean nothing")
    row = paired(
        f"simulate: images of {OBJECTS} galaxies",
        ours,
        lambda: plain_images(galaxies, config),
        repeats=repeats,
        against="numpy, a loop over objects and bands",
        note="without noise",
    )
    return [row]


def network_rows(repeats: int, device: str) -> list[Row]:
    """A small network on a batch against one object at a time, as the authors' ``evaluate`` does it (B18)."""
    samples, config = simulate(OBJECTS, seed=4), model_config("sim-early")
    model: FusionModel = new_model(config, 0).eval().to(device)
    images = {name: x.to(device) for name, x in prepare(samples.images, config, wcs=samples.wcs).items()}
    ebv = samples.ebv.to(device)

    def batched() -> torch.Tensor:
        with torch.inference_mode():
            return model(images, ebv)

    def single() -> torch.Tensor:
        with torch.inference_mode():
            parts = [
                model({name: x[i : i + 1] for name, x in images.items()}, ebv[i : i + 1])
                for i in range(OBJECTS)
            ]
            return torch.cat(parts)

    if not torch.allclose(batched(), single(), atol=1e-4):
        raise FusionError("batch and single objects differ; the ratio would mean nothing")
    row = paired(
        f"network: {OBJECTS} objects in a batch",
        batched,
        single,
        repeats=repeats,
        target=BATCH_TARGET,
        device=device,
        against="one object at a time",
        note="early fusion, 0.16 million parameters",
    )
    return [row]


ROWS: dict[str, Measure] = {"simulate": rate_row, "render": render_rows, "network": network_rows}


def rows(repeats: int = 5, device: str = "cpu", only: Sequence[str] = ()) -> list[Row]:
    """All rows, or those of the measures named."""
    return [
        row for name, measure in ROWS.items() if not only or name in only for row in measure(repeats, device)
    ]

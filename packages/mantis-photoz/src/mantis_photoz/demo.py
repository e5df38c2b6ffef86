"""The demo: simulated surveys as FITS files through ``estimate``; verdicts are what was measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusion_core.comparison import Comparison
from fusion_core.demo import Demo, Method
from fusion_core.device import threads
from fusion_core.errors import CheckpointError, require_extra
from fusion_core.report import Claim, Figure
from mantis_photoz import metrics
from mantis_photoz.pdf import BinnedPDF

PAPER = (
    "Andrew Engel, Nell Byler, Adam Tsou, Gautham Narayan, Emmanuel Bonilla, Ian Smith: Mantis Shrimp: "
    "Exploring "
    "Photometric Band Utilization in Computer Vision Networks for Photometric Redshift Estimation, 2025"
)
NAMES = {
    "sim-ps1": "Pan-STARRS1 only",
    "sim-early": "early fusion, 9 bands",
    "sim-late": "late fusion, 9 bands",
}
RECALIBRATED = "early fusion, recalibrated"
DROPOUT = "sim-early-dropout"
OBJECTS = {"quick": 800, "full": 1500}
EXPLAINED = {"quick": 200, "full": 500}
ALIKE = 0.05  # relative difference of NMAD below which two models count as alike
METRICS: dict[str, Any] = {
    "nmad": {"better": "lower"},
    "eta_0.05": {"better": "lower", "percent": True},
    "eta_0.15": {"better": "lower", "percent": True},
    "crps": {"better": "lower"},
    "cde_loss": {"better": "lower"},
    "pit_ks": {"better": "lower"},
}


@dataclass(frozen=True, slots=True)
class Sky:
    """A simulated survey on disk."""

    folder: Path
    catalog: Path
    z: NDArray[np.float64]
    mag_r: NDArray[np.float64]


@threads(1)
def demo(out: Path, *, full: bool = False, seed: int = 0) -> Demo:
    """Compare fusions on simulated galaxies whose redshifts are known.

    Args:
        out: gets the pictures.
        full: train the three models here, on 3000 galaxies; else those that ship are measured.
        seed: of the test galaxies, and of the training in full mode.
    """
    for module in ("matplotlib", "skimage"):
        require_extra(module, "demo", "mantis-photoz")
    mode = "full" if full else "quick"
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sky = _sky(place / "sky", OBJECTS[mode], seed)
        models = _trained(place, seed) if full else _shipped()
        seeds = sorted({number for _, number in models})
        results = {job: _estimate(folder, sky) for job, folder in models.items()}
        raw = {job: result.pdf for job, result in results.items()}
        better = {
            number: _recalibrated(models["sim-early", number], raw["sim-early", number]) for number in seeds
        }
        use = _band_use(sky, EXPLAINED[mode])
        table = _table(raw, better, sky.z, seeds)
        first = seeds[0]
        figures = _figures(out, sky, raw["sim-early", first], better[first], use)
        stages = results["sim-early", first].throughput()
    settings: dict[str, Any] = {
        "test galaxies": len(sky.z),
        "training": "3000 galaxies, 8 epochs, here"
        if full
        else "shipped checkpoints, see checkpoints/MODEL_CARD.md",
        "path": "FITS files, mantis_photoz.PhotoZ.estimate",
        "objects per second of each stage": stages,
        "Shapley values of -CRPS": {row["player"]: row["shapley"] for row in use.rows},
    }
    return Demo([table], _claims(table, use, seeds, len(sky.z)), figures, _notes(use, seeds), settings, seeds)


def _sky(folder: Path, count: int, seed: int) -> Sky:
    from astropy.table import Table

    from mantis_photoz.simulate import write
    from mantis_photoz.train_checkpoints import TEST_SEED

    catalog = write(count, folder, seed=TEST_SEED + 1000 * seed, progress=False)
    table = Table.read(catalog)
    return Sky(folder, catalog, np.asarray(table["z_spec"]), np.asarray(table["mag_r"]))


def _shipped() -> dict[tuple[str, int], Path]:
    """The models that ship: (name, seed) -> folder.

    Raises:
        CheckpointError: they are not there.
    """
    from mantis_photoz.fusion import shipped

    own, found = shipped(), dict[tuple[str, int], Path]()
    for name in NAMES:
        for folder in own:
            number = folder.removeprefix(name).removeprefix("-") or "0"
            if folder.startswith(name) and number.isdecimal():
                found[name, int(number)] = own[folder]
    if lacking := [name for name in (*NAMES, DROPOUT) if name not in own]:
        raise CheckpointError(f"models {lacking} did not come with the package; make them: {_MAKE}")
    return found


_MAKE = "python -m mantis_photoz.train_checkpoints"


def _trained(place: Path, seed: int) -> dict[tuple[str, int], Path]:
    from mantis_photoz.simulate import simulate
    from mantis_photoz.train_checkpoints import (
        CALIBRATION_SEED,
        EPOCHS,
        OBJECTS,
        TRAIN_SEED,
        folder_name,
        store,
        train,
    )

    samples, held = simulate(OBJECTS, seed=TRAIN_SEED + seed), simulate(500, seed=CALIBRATION_SEED)
    found = dict[tuple[str, int], Path]()
    for name in NAMES:
        model = train(name, samples, epochs=EPOCHS, seed=seed, quiet=True)
        found[name, seed] = place / folder_name(name, seed)
        store(model, found[name, seed], samples, held, {"seed": seed})
    return found


def _estimate(folder: Path, sky: Sky) -> Any:
    """The whole pipeline on the files, without recalibration."""
    from mantis_photoz.estimate import PhotoZ

    photoz = PhotoZ.from_pretrained(folder, device="cpu", recalibration=False)
    return photoz.estimate(sky.catalog, sky.folder, batch_size=100, num_workers=0, progress=False)


def _recalibrated(folder: Path, pdf: BinnedPDF) -> BinnedPDF:
    from mantis_photoz import calibrate
    from mantis_photoz.loading import RECALIBRATION

    return calibrate.load(folder / RECALIBRATION[0])(pdf)


def _band_use(sky: Sky, count: int) -> Any:
    from mantis_photoz.band_use import band_use
    from mantis_photoz.cutouts import Cutouts
    from mantis_photoz.fusion import load_model
    from mantis_photoz.inputs import surveys_of

    model = load_model(DROPOUT)
    samples = Cutouts.from_directory(sky.folder, sky.catalog, surveys_of(model.config))
    return band_use(model, samples.take(range(count)), baseline="absent", progress=False)


def _table(
    raw: Mapping[tuple[str, int], BinnedPDF],
    better: Mapping[int, BinnedPDF],
    z: NDArray[np.float64],
    seeds: Sequence[int],
) -> Comparison:
    title = f"{len(z)} simulated galaxies, never trained with; z_mean and densities"
    table = Comparison(METRICS, NAMES["sim-ps1"], list(seeds), title)

    def add(method: str, number: int, pdf: BinnedPDF) -> None:
        found = {
            **metrics.point_metrics(np.asarray(pdf.numpy().mean()), z),
            **metrics.density_metrics(pdf, z),
        }
        for metric in METRICS:
            table.add(method, metric, number, float(found[metric]))

    for (name, number), pdf in raw.items():
        add(NAMES[name], number, pdf)
    for number, pdf in better.items():
        add(RECALIBRATED, number, pdf)
    return table


def _values(table: Comparison, method: str, metric: str) -> NDArray[np.float64]:
    row = next(row for row in table.rows() if (row["method"], row["metric"]) == (method, metric))
    return np.asarray(row["values"], np.float64)


def _claims(table: Comparison, use: Any, seeds: Sequence[int], count: int) -> list[Claim]:
    nmad = {name: _values(table, NAMES[name], "nmad") for name in NAMES}
    outliers = {name: 100 * _values(table, NAMES[name], "eta_0.05") for name in NAMES}
    ks = {name: _values(table, name, "pit_ks") for name in (NAMES["sim-early"], RECALIBRATED)}
    shown = ", ".join(f"{NAMES[name]} {values.mean():.4f}" for name, values in nmad.items())
    pairs = ", ".join(f"{a:.3f} -> {b:.3f}" for a, b in zip(*ks.values(), strict=True))
    gap = float(nmad["sim-late"].mean() / nmad["sim-early"].mean() - 1)
    alike = abs(gap) < ALIKE
    phi = {row["player"]: (row["shapley"], row["error"]) for row in use.rows}
    parts = ", ".join(f"{name} {value:+.4f} ± {error:.4f}" for name, (value, error) in phi.items())
    many = f"{len(seeds)} seed" + ("s" if len(seeds) > 1 else "")
    return [
        Claim(
            "Adding surveys to the optical images helps",
            "abstract",
            bool(
                (nmad["sim-early"] < nmad["sim-ps1"]).all()
                and (outliers["sim-early"] < outliers["sim-ps1"]).all()
            ),
            f"NMAD {nmad['sim-ps1'].mean():.4f} -> {nmad['sim-early'].mean():.4f}, outliers over 0.05 "
            f"{outliers['sim-ps1'].mean():.1f} -> {outliers['sim-early'].mean():.1f} % with early fusion "
            f"({many}).",
        ),
        Claim(
            "Early and late fusion perform alike",
            "abstract",
            alike,
            f"NMAD: {shown} ({many}); late is {100 * gap:+.0f} % beside early"
            + (
                "."
                if alike
                else ": not shown at this scale. Stacking gives colours per pixel at once; small encoders "
                "that were trained briefly have to learn them through a pooled head."
            ),
        ),
        Claim(
            "Recalibration brings the PIT nearer to uniform",
            "section on calibration; here temperature and PIT map, not Cal-PIT",
            bool(ks[RECALIBRATED].mean() < ks[NAMES["sim-early"]].mean()),
            f"Kolmogorov-Smirnov distance {ks[NAMES['sim-early']].mean():.3f} -> "
            f"{ks[RECALIBRATED].mean():.3f}, seed by seed {pairs}; fitted on other galaxies. "
            f"Draws of {count} from uniform PITs give about {0.87 / count**0.5:.3f}.",
        ),
        Claim(
            "Every survey contributes",
            "abstract",
            all(value - error > 0 for value, error in phi.values()),
            f"Exact Shapley values of -CRPS of a model trained with surveys dropped at random: {parts}.",
        ),
        Claim(
            "NMAD 0.0244 and 17.5 % outliers on spectroscopic galaxies",
            "abstract",
            None,
            "Takes the authors' weights and surveys; these are simulated galaxies and networks of 0.16 "
            "million "
            "parameters.",
        ),
    ]


def _notes(use: Any, seeds: Sequence[int]) -> list[str]:
    notes = [
        "Simulated galaxies with known redshifts: a test of the mechanism, not of the sky. Nothing is "
        "downloaded, and "
        "the shipped models know nothing of real galaxies.",
        f"Shapley values: {len(use.z)} galaxies, one model; an absent survey is what the model was "
        f"taught as absent.",
        "Simulated GALEX (AIS depth) detects few galaxies beyond z = 0.1, so the ultraviolet can add "
        "little here.",
    ]
    if len(seeds) < 3:
        notes.append(f"{len(seeds)} seed(s) of training: differences of NMAD below about 0.002 mean nothing.")
    return notes


def _figures(out: Path, sky: Sky, raw: BinnedPDF, better: BinnedPDF, use: Any) -> list[Figure]:
    from mantis_photoz import plots, stacks

    near = _bright_blue(sky)
    planes, z = _one(sky, near), float(sky.z[near])
    drawn = {
        "cutouts.png": plots.cutout_grid(
            planes, title=f"One simulated galaxy, z = {z:.3f}, r = {sky.mag_r[near]:.1f}"
        ),
        "zz.png": plots.zz(sky.z, raw.numpy().mean(), label=NAMES["sim-early"]),
        "pit.png": plots.pit({"raw": raw.numpy().pit(sky.z), "recalibrated": better.numpy().pit(sky.z)}),
        "shapley.png": plots.shares_by_redshift(use.z, use.phi, use.players, bins=6),
        "stacks.png": stacks.draw(),
    }
    words = {
        "cutouts.png": (
            "The galaxy in nine bands from ultraviolet to infrared.",
            "Native pixels, asinh stretched.",
        ),
        "zz.png": (
            "Estimated against true redshifts.",
            "z_mean of early fusion; dashed: |dz| = 0.05 (1 + z).",
        ),
        "pit.png": ("PIT histograms before and after recalibration.", "Flat is calibrated."),
        "shapley.png": (
            "Shapley value of each survey against redshift.",
            "Gain in -CRPS; above 0 the survey helps.",
        ),
        "stacks.png": (
            "One place on the sky in three surveys, stacked by stretched crops and by coordinates.",
            "A picture, not a measurement: scikit-image's Hubble deep field at each survey's pixels and "
            "blur. Red is unWISE, green Pan-STARRS1, blue GALEX. The published stack puts neighbours in "
            "different places.",
        ),
    }
    return [Figure(plots.save(drawn[name], out / name), *words[name]) for name in drawn]


def _bright_blue(sky: Sky) -> int:
    """A star-forming galaxy that every survey has seen."""
    from astropy.table import Table

    table = Table.read(sky.catalog)
    seen = np.array([(sky.folder / f"{name}.galex.fits").is_file() for name in table["id"]])
    usable = seen & (np.asarray(table["kind"]) == "blue")
    return int(np.argmin(np.abs(sky.mag_r - 16.5) + 99.0 * ~usable))


def _one(sky: Sky, row: int) -> dict[str, torch.Tensor]:
    from mantis_photoz.cutouts import Cutouts
    from mantis_photoz.inputs import surveys_of
    from mantis_photoz.train_checkpoints import model_config

    cutouts = Cutouts.from_directory(sky.folder, sky.catalog, surveys_of(model_config("sim-early")))
    return {name: planes[0] for name, planes in cutouts.batch([row]).planes.items()}


method = Method(
    name="mantis-photoz",
    package="mantis-photoz",
    title="Mantis Shrimp: redshift densities from the images of several surveys",
    paper=PAPER,
    url="https://arxiv.org/abs/2501.09112",
    summary="p(z) of galaxies from ultraviolet, optical and infrared cutouts: fused early or late, "
    "recalibrated, explained by exact Shapley values.",
    demo=demo,
)

"""The simulator: sanity against the recorded fractions, prefixes, photometry, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammainc

from fusion_core.errors import ConfigError, InputError
from mantis_photoz.cutouts import Cutouts
from mantis_photoz.inputs import prepare, surveys_of
from mantis_photoz.samples import batch_of
from mantis_photoz.simulate import SimulationConfig, simulate, write
from mantis_photoz.simulate.bands import CENTER, DEPTH, SURVEY_BANDS, transmission, wavelengths
from mantis_photoz.simulate.population import Galaxies, distance, draw_galaxies, population
from mantis_photoz.simulate.render import clean_images, sersic
from mantis_photoz.simulate.sed import component_fluxes, templates
from mantis_photoz.train_checkpoints import model_config


@pytest.fixture(scope="module")
def galaxies() -> Galaxies:
    return population(1500, seed=0)


def test_redshifts_are_as_recorded(galaxies: Galaxies) -> None:
    found = np.percentile(galaxies.z, (5, 25, 50, 75, 95))
    np.testing.assert_allclose(found, (0.07, 0.15, 0.25, 0.41, 0.59), atol=0.03)


@pytest.mark.parametrize(
    ("band", "wanted"), [(1, (0.32, 0.09, 0.01)), (0, (0.49, 0.19, 0.04))], ids=["fuv", "nuv"]
)
def test_ultraviolet_is_detected_as_recorded(
    galaxies: Galaxies, band: int, wanted: tuple[float, ...]
) -> None:
    seen = galaxies.magnitude[:, band] < DEPTH[band]
    parts = [(galaxies.z > low) & (galaxies.z <= high) for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 2))]
    np.testing.assert_allclose([seen[part].mean() for part in parts], wanted, atol=0.06)


def test_limits_only_leave_out() -> None:
    from fusion_core.seeding import rng

    every = draw_galaxies(rng(0, "x"), 100)
    some = draw_galaxies(rng(0, "x"), 100, (14.5, 21.5))
    r = every.magnitude[:, 3]
    inside = (r > 14.5) & (r < 21.5)
    np.testing.assert_allclose(some.flux, every.flux[inside], rtol=1e-4)
    np.testing.assert_array_equal(some.z, every.z[inside])


def test_limits_and_ranges(galaxies: Galaxies) -> None:
    r = galaxies.magnitude[:, 3]
    assert 14.5 < r.min() < r.max() < 21.5
    assert 0 < galaxies.ebv.min() < galaxies.ebv.max() <= 0.4
    assert 0.3 <= galaxies.axis_ratio.min() <= galaxies.axis_ratio.max() <= 1
    assert 0.3 < galaxies.red.mean() < 0.7


def test_the_break_reddens_old_galaxies_with_redshift() -> None:
    z, one = np.array([0.05, 0.2, 0.35]), np.ones(3)
    old = component_fluxes(z, 0 * one, 0 * one, 0 * one)
    young = component_fluxes(z, one, 0 * one, 0 * one)
    g_r = -2.5 * np.log10(old[:, 2] / old[:, 3])
    assert (np.diff(g_r) > 0.1).all()
    assert (-2.5 * np.log10(young[:, 2] / young[:, 3]) < g_r).all()


def test_dust_dims_blue_more_than_red() -> None:
    one = np.ones(1)
    ratio = component_fluxes(0.1 * one, one, one, one) / component_fluxes(0.1 * one, one, one, 0 * one)
    assert (ratio < 1).all()
    order = np.argsort(CENTER)
    assert (np.diff(ratio[0, order]) > 0).all()


def test_lyman_break_leaves_two_percent() -> None:
    shapes, _ = templates()
    at = 700 * np.exp(np.log(100) / 5999 * (np.arange(shapes.shape[1]) - (shapes.shape[1] - 6000)))
    old = shapes[0]
    assert old[at < 905].max() < 0.05 * old[(at > 915) & (at < 1000)].max()


def test_passbands_sum_to_one_and_peak_at_their_centers() -> None:
    curves = transmission()
    np.testing.assert_allclose(curves.sum(1), 1)
    mean = curves @ np.log(wavelengths())
    np.testing.assert_allclose(np.exp(mean) / CENTER, 1, atol=0.04)


def test_distance_is_that_of_flat_lcdm() -> None:
    astropy = pytest.importorskip("astropy.cosmology")
    cosmos = astropy.FlatLambdaCDM(H0=70, Om0=0.3)
    z = np.array([0.01, 0.3, 1.1])
    parsec, kpc = distance(z)
    np.testing.assert_allclose(parsec, cosmos.luminosity_distance(z).to_value("pc"), rtol=1e-4)
    np.testing.assert_allclose(kpc, cosmos.kpc_proper_per_arcmin(z).value / 60, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.3, 6), st.floats(0.3, 1), st.floats(0, 3), st.sampled_from([1, 4]))
def test_profiles_hold_the_light_within_the_image(
    radius: float, ratio: float, angle: float, index: int
) -> None:
    profile = sersic(
        *(torch.tensor([v]) for v in (radius, ratio, angle)),
        torch.zeros(1, 2),
        index=index,
        pixels=64,
        scale=0.25,
    )
    b = {1: 1.6783469900166605, 4: 7.669249442500804}[index]
    wanted = gammainc(2 * index, b * (8 / radius) ** (1 / index))
    assert profile.sum().item() == pytest.approx(wanted, rel=1e-4)
    assert profile.min() >= 0


def test_images_hold_the_flux(galaxies: Galaxies) -> None:
    some = galaxies.take(slice(0, 40))
    for name, (pixels, scale) in SimulationConfig().geometry.items():
        images = clean_images(some, name, pixels, scale)
        share = images.sum(dim=(2, 3)).numpy() / some.flux[:, SURVEY_BANDS[name]]
        assert np.median(share) > 0.97
        assert share.max() < 1.0001


def test_first_objects_do_not_depend_on_how_many() -> None:
    few, more = simulate(5, seed=3), simulate(40, seed=3)
    for name in few.images:
        torch.testing.assert_close(few.images[name], more.images[name][:5], rtol=0, atol=0)
    assert torch.equal(few.z, more.z[:5])
    assert torch.equal(few.present, more.present[:5])
    assert not torch.equal(few.z, simulate(5, seed=4).z)


def test_noise_coverage_and_neighbours() -> None:
    config = SimulationConfig(neighbour=0.0)
    found = simulate(300, config, seed=1)
    assert 0.04 < 1 - found.present[:, 0].float().mean() < 0.18
    assert bool((found.images["galex"][~found.present[:, 0]] == 0).all())
    corner = found.images["galex"][found.present[:, 0]][:, :, :3, :3]
    spread = corner.std(dim=(0, 2, 3)).numpy()
    np.testing.assert_allclose(spread, config.noise[:2], rtol=0.15)
    crowded = simulate(300, SimulationConfig(neighbour=1.0), seed=1)
    assert crowded.images["ps1"].sum() > 1.05 * found.images["ps1"].sum()


def test_mis_is_deeper() -> None:
    deep, shallow = SimulationConfig(galex_survey="MIS"), SimulationConfig()
    np.testing.assert_allclose(shallow.noise[:2] / deep.noise[:2], 10, rtol=1e-9)
    np.testing.assert_allclose(shallow.noise[2:], deep.noise[2:])


def test_full_size_is_the_papers() -> None:
    found = simulate(1, SimulationConfig.full())
    assert {name: planes.shape[-1] for name, planes in found.images.items()} == {
        "galex": 32,
        "ps1": 170,
        "unwise": 32,
    }


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    from astropy.io import fits
    from astropy.table import Table
    from astropy.wcs import WCS

    catalog = write(12, tmp_path / "sky", seed=2)
    memory, config = simulate(12, seed=2), model_config("sim-early")
    cutouts = Cutouts.from_directory(tmp_path / "sky", catalog, surveys_of(config))
    batch = batch_of(cutouts, range(12), config)
    assert torch.equal(batch.present, memory.present)
    for name, planes in memory.images.items():
        torch.testing.assert_close(batch.images[name], planes, rtol=0, atol=0)
    ours, theirs = (
        prepare(memory.images, config, wcs=memory.wcs),
        prepare(batch.images, config, wcs=batch.wcs),
    )
    for name, planes in ours.items():
        torch.testing.assert_close(planes, theirs[name], atol=1e-5, rtol=0)
    found = cutouts.batch(range(12))
    assert not (found.flags & ~1).any()  # nothing but missing surveys
    table = Table.read(catalog)
    header = fits.getheader(tmp_path / "sky" / f"{table['id'][0]}.ps1.fits")
    assert [header[f"BAND{i}"] for i in range(5)] == ["g", "r", "i", "z", "y"]
    sky = WCS(header).celestial.pixel_to_world(15.5, 15.5)
    np.testing.assert_allclose((sky.ra.deg, sky.dec.deg), (table["ra"][0], table["dec"][0]), atol=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: population(-1), "count is -1"),
        (lambda: SimulationConfig(ps1_pixels=1), r"ps1_pixels is 1, wanted a number in \[4, "),
        (lambda: SimulationConfig(neighbour=1.5), "neighbour is 1.5"),
        (lambda: SimulationConfig(r_bright=22.0), "r_bright is 22.0"),
        (lambda: population(50, SimulationConfig(r_bright=5.0, r_faint=5.1)), "widen them"),
    ],
)
def test_bad_settings(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()


def test_a_directory_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write(1, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"

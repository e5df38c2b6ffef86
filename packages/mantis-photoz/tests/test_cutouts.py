"""Cutouts: the fast reader equals astropy, and every bad file is told apart."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st
from mantis_files import SMALL, folder_of, planes, table, write

from fusion_core.errors import InputError
from fusion_core.seeding import rng
from mantis_photoz import CutoutError, Cutouts
from mantis_photoz.cutouts import FitsDirectory
from mantis_photoz.fits_fast import read_fits
from mantis_photoz.flags import Flag, describe
from mantis_photoz.reading import header_bands
from mantis_photoz.wcs import Tan, match_psf, pixel_to_sky, resample, sky_to_pixel

PS1, GALEX = SMALL["ps1"], SMALL["galex"]
RA, DEC = 150.1, 2.2


def center(survey=PS1, **options):
    settings = {"pixels": survey.pixels, "scale": survey.pixel_scale} | options
    return Tan.centered(RA, DEC, **settings)


def read(tmp_path, survey=PS1, **options):
    return FitsDirectory(tmp_path, **options).read("a", survey, RA, DEC)


def put(tmp_path, data=None, tan=None, survey=PS1, bands=True, **cards):
    data = planes(survey) if data is None else data
    cards = {"EXPTIME": 30.0} | cards
    return write(tmp_path / f"a.{survey.name}.fits", data, center(survey) if tan is None else tan,
                 bands=survey.bands if bands else None, **cards)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 80), st.integers(0, 99))
def test_the_fast_reader_equals_astropy(tmp_path_factory, bands, height, width, cards, seed):
    path = tmp_path_factory.mktemp("fits") / "a.fits"
    data = rng(seed).normal(size=(bands, height, width)).astype(np.float32)
    header = fits.Header({f"K{k}": k * 1.5 for k in range(cards)})
    header["NAME"], header["GOOD"], header["LONG"] = "it's so", True, 1.5e300
    header["HIERARCH FPA.FILTER"] = "g.00000"
    fits.PrimaryHDU(data if bands > 1 else data[0], header).writeto(path)
    fast, slow = read_fits(path)[0], read_fits(path, fast=False)[0]
    assert fast.data.dtype == np.dtype(">f4")  # the fast path was taken
    np.testing.assert_array_equal(fast.data, slow.data)
    for key in ("NAME", "GOOD", "LONG", "NAXIS", "BITPIX", "FPA.FILTER", *header):
        if key not in ("COMMENT", ""):
            assert fast.header[key] == slow.header[key], key


def test_other_files_go_to_astropy(tmp_path):
    data = np.arange(12).reshape(3, 4)
    fits.PrimaryHDU(data.astype(np.int16)).writeto(tmp_path / "int.fits")
    fits.PrimaryHDU(data.astype(np.float32)).writeto(tmp_path / "z.fits.gz")
    scaled = fits.PrimaryHDU(data.astype(np.float32))
    scaled.header["BSCALE"] = 2.0
    scaled.writeto(tmp_path / "scaled.fits", output_verify="ignore")
    fits.HDUList(
        [fits.PrimaryHDU(), fits.CompImageHDU(data.astype(np.float32), name="G", quantize_level=0)]
    ).writeto(tmp_path / "packed.fits")
    for name in ("int.fits", "z.fits.gz", "packed.fits"):
        np.testing.assert_allclose(read_fits(tmp_path / name)[0].data[0], data)
    assert read_fits(tmp_path / "scaled.fits")[0].data.dtype == np.float32
    assert read_fits(tmp_path / "packed.fits")[0].name == "G"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>429</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"GIF89a", "is no FITS file"),
        (b"\x1f\x8bgz", "damaged gzip"),
        ("half", "is cut off: .* its header promises"),
        ("header", "cut off within its header"),
    ],
)
def test_files_that_are_none(tmp_path, content, words):
    path = put(tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"half": whole[:3000], "header": whole[:800]}.get(content, content))
    with pytest.raises(CutoutError, match=words):
        read_fits(path)
    found = read(tmp_path)
    assert not found.present
    assert found.flags & Flag.BAD_CUTOUT
    assert found.flags & Flag.MISSING_SURVEY
    assert "a.ps1.fits" in found.notes[0]


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(CutoutError, match="cannot be read"):
        read_fits(tmp_path / "none.fits")
    fits.PrimaryHDU().writeto(tmp_path / "empty.fits")
    with pytest.raises(CutoutError, match="no image"):
        read_fits(tmp_path / "empty.fits")
    fits.PrimaryHDU(np.zeros((40, 40), np.float64)).writeto(tmp_path / "cut.fits")
    content = (tmp_path / "cut.fits").read_bytes()
    (tmp_path / "cut.fits").write_bytes(content[:6000])
    with pytest.raises(CutoutError, match="cut off or damaged"):
        read_fits(tmp_path / "cut.fits")
    with pytest.raises(InputError, match="wanted a directory"):
        FitsDirectory(tmp_path / "none")
    assert read(tmp_path).notes == ("ps1: no file",)


def test_bands_come_from_the_header(tmp_path):
    data = planes(GALEX)
    put(tmp_path, data[::-1], survey=GALEX, bands=False, BANDS="fn")
    np.testing.assert_array_equal(read(tmp_path, GALEX).planes, data)
    put(tmp_path, data, survey=GALEX, bands=False)
    found = read(tmp_path, GALEX)
    assert found.flags & Flag.ASSUMED_BANDS
    assert "no BANDS in the header" in found.notes[0]
    other = read(tmp_path, GALEX, band_order={"galex": ("fuv", "nuv")})
    np.testing.assert_array_equal(other.planes, data[::-1])
    assert not other.flags & Flag.ASSUMED_BANDS
    assert header_bands({"BANDS": "w1w2"}, 2) == ["w1", "w2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": np.ones((3, 12, 12)), "bands": False}, "has 3 planes, wanted 5"),
        ({"BANDS": "g,r,i,z,q", "BAND4": "q"}, "another survey's file"),
        ({"bands": False, "BANDS": "grizg"}, "band g is there twice"),
        ({"tan": Tan.centered(RA + 1, DEC, pixels=12, scale=0.5)}, "shows another place"),
        ({"CRVAL1": "east"}, "WCS lacks"),
        ({"CD1_1": 0.0, "CD1_2": 0.0}, "scale of 0.0"),
    ],
)
def test_bad_planes(tmp_path, options, words):
    put(tmp_path, **options)
    found = read(tmp_path)
    assert not found.present
    assert words in found.notes[-1]
    assert found.flags & Flag.BAD_CUTOUT


def test_official_names_and_extensions(tmp_path):
    data = planes(PS1)
    for band, plane in zip(PS1.bands, data, strict=True):
        write(tmp_path / f"a.{band}.fits", plane, center(), EXPTIME=30.0)
    write(tmp_path / "a.Galex.fits", planes(GALEX), center(GALEX), bands=GALEX.bands)
    np.testing.assert_array_equal(read(tmp_path).planes, data)
    assert read(tmp_path).flags == 0
    assert read(tmp_path, GALEX).present
    (tmp_path / "a.z.fits").unlink()
    assert "bands z are missing" in read(tmp_path).notes[0]
    write(tmp_path / "a.z.fits", data[3], center(), EXPTIME=30.0, FILTER="y")
    assert "file of band z says it is y" in read(tmp_path).notes[0]
    whole = fits.HDUList([fits.PrimaryHDU()])
    for band, plane in zip(PS1.bands, data, strict=True):
        whole.append(fits.ImageHDU(plane, fits.Header(center().cards() | {"EXPTIME": 1.0}), name=band))
    whole.append(
        fits.ImageHDU(planes(GALEX), fits.Header(center(GALEX).cards() | {"BANDS": "nf"}), name="GALEX")
    )
    whole.writeto(tmp_path / "b.fits")
    source = FitsDirectory(tmp_path)
    np.testing.assert_array_equal(source.read("b", PS1, RA, DEC).planes, data)
    np.testing.assert_array_equal(source.read("b", GALEX, RA, DEC).planes, planes(GALEX))
    assert source.read("b", SMALL["unwise"], RA, DEC).notes == ("unwise: no extension",)


def test_scale_parity_place_and_size_are_mended(tmp_path):
    put(tmp_path, planes(PS1.replace(pixels=24, crop=24)), center(scale=0.25, pixels=24))
    found = read(tmp_path)
    assert found.flags == Flag.RESAMPLED
    assert found.planes.shape == (5, 12, 12)
    assert found.wcs.scale == pytest.approx(0.5)
    assert '0.25"/px instead of 0.5' in found.notes[0]
    straight = center()
    flipped = Tan(
        straight.crval, straight.crpix, tuple(-c if k in (0, 2) else c for k, c in enumerate(straight.cd))
    )
    data = planes(PS1)
    put(tmp_path, data[..., ::-1], flipped)
    found = read(tmp_path)
    assert found.flags == Flag.RESAMPLED
    np.testing.assert_allclose(found.planes, data, atol=2e-4)
    put(tmp_path, data, center().shifted(4, 0))
    found = read(tmp_path)
    assert found.flags == Flag.OFF_CENTRE | Flag.NAN_PIXELS  # a third of the field is not in the file
    np.testing.assert_allclose(found.planes[..., 4:], data[..., :8], atol=2e-4)
    put(tmp_path, data[:, 1:11, 1:11], center(pixels=10))
    found = read(tmp_path)
    assert found.flags == Flag.PADDED
    np.testing.assert_array_equal(found.planes[:, 1:11, 1:11], data[:, 1:11, 1:11])
    assert found.wcs.row() == pytest.approx(center().row(), abs=1e-15)
    put(tmp_path, planes(PS1.replace(pixels=20, crop=20)), center(pixels=20))
    found = read(tmp_path)
    assert found.flags == 0
    np.testing.assert_array_equal(found.planes, planes(PS1.replace(pixels=20, crop=20))[:, 4:16, 4:16])


def test_no_wcs(tmp_path):
    write(tmp_path / "a.ps1.fits", planes(PS1), None, bands=PS1.bands, EXPTIME=1.0)
    assert read(tmp_path).flags == 0
    write(tmp_path / "a.ps1.fits", planes(PS1), None, bands=PS1.bands, EXPTIME=1.0, PIXSCALE=0.25)
    assert "no WCS to resample by" in read(tmp_path).notes[0]


def test_both_infinities_are_gaps_without_a_warning(tmp_path):
    data = planes(PS1)
    data[1, 3, 3], data[1, 3, 4] = np.inf, -np.inf
    put(tmp_path, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert read(tmp_path, nan_limit=0.1).flags == Flag.INF_PIXELS


def test_gaps(tmp_path):
    data = planes(PS1)
    data[1, 3, 3], data[2, 4, 4:8] = np.inf, np.nan
    put(tmp_path, data)
    found = read(tmp_path)
    assert found.present
    assert found.flags == Flag.INF_PIXELS | Flag.NAN_PIXELS
    assert found.nan_fraction == pytest.approx(4 / 144)
    assert read(tmp_path, nan_limit=0.1).flags == Flag.INF_PIXELS
    data[3] = np.nan
    put(tmp_path, data)
    found = read(tmp_path)
    assert not found.present
    assert "z all NaN" in found.notes[-1]
    put(tmp_path, np.zeros((5, 12, 12)))
    assert read(tmp_path).notes == ("ps1: all pixels are zero",)
    (tmp_path / "a.ps1.fits").unlink()
    write(tmp_path / "a.ps1.fits", planes(PS1), center(), bands=PS1.bands)
    assert read(tmp_path).flags == Flag.NO_ZERO_POINT


def test_compressed_stacks_are_made_linear(tmp_path):
    flux = planes(PS1)
    stored = 2.5 / np.log(10) * np.arcsinh((flux - 0.5) / (2 * 3.0))
    put(tmp_path, stored, BSOFTEN=3.0, BOFFSET=0.5)
    np.testing.assert_allclose(read(tmp_path).planes, flux, rtol=1e-5, atol=1e-5)


def test_old_and_other_projections(tmp_path):
    data, tan = planes(PS1), center()
    step = PS1.pixel_scale / 3600
    cards = {k: v for k, v in tan.cards().items() if not k.startswith("CD")}
    for style in ({"PC001001": -1.0, "PC002002": 1.0}, {"PC1_1": -1.0}):
        write(
            tmp_path / "a.ps1.fits",
            data,
            None,
            bands=PS1.bands,
            EXPTIME=1.0,
            CDELT1=step,
            CDELT2=step,
            **cards,
            **style,
        )
        found = read(tmp_path)
        assert found.flags == 0
        np.testing.assert_allclose(found.wcs.cd, tan.cd, atol=1e-15)
    cards |= {"CTYPE1": "RA---SIN", "CTYPE2": "DEC--SIN"}
    write(
        tmp_path / "a.ps1.fits", data, None, bands=PS1.bands, EXPTIME=1.0, CDELT1=-step, CDELT2=step, **cards
    )
    found = read(tmp_path)
    assert found.flags == 0
    np.testing.assert_allclose(found.wcs.cd, tan.cd, atol=1e-9)


def test_batches_and_objects(tmp_path):
    catalog = table(5)
    folder_of(tmp_path / "c", catalog[:4])
    (tmp_path / "c" / "g1.galex.fits").unlink()
    ds = Cutouts.from_directory(tmp_path / "c", catalog, SMALL)
    found = ds.batch([0, 1, 4])
    assert found.ids == ("g0", "g1", "g4")
    assert found.present.tolist() == [[True] * 3, [False, True, True], [False] * 3]
    assert found.flags.tolist() == [0, 1, 3]
    assert describe(int(found.flags[1]), ["galex"]) == "MISSING_GALEX"
    assert found.planes["ps1"].shape == (3, 5, 12, 12)
    assert found.planes["ps1"].dtype == torch.float32
    item = ds[1]
    torch.testing.assert_close(item["planes"]["ps1"], found.planes["ps1"][1])
    assert "z" not in item
    assert len(ds.batch([])) == 0
    assert ds.batch([]).planes["ps1"].shape == (0, 5, 12, 12)


def test_splits_do_not_depend_on_the_rest(tmp_path):
    tmp_path.joinpath("c").mkdir()
    whole = Cutouts.from_directory(tmp_path / "c", table(300), SMALL)
    parts = {name: set(whole.split(name).catalog.ids) for name in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 300
    assert 200 < len(parts["train"]) < 270
    few = Cutouts.from_directory(tmp_path / "c", table(300)[::7], SMALL)
    assert set(few.split("train").catalog.ids) <= parts["train"]
    with pytest.raises(InputError, match="wanted one of train, val, test"):
        whole.split("dev")
    named = Cutouts.from_directory(
        tmp_path / "c", table(3, split=["a", "b", "a"], z_spec=[0.1, 0.2, 0.3]), SMALL
    )
    assert named.split("a").catalog.ids == ("g0", "g2")
    np.testing.assert_array_equal(named.split("a").z, [0.1, 0.3])


angles = st.floats(0, 359.9)
decs = st.floats(-85, 85)


@settings(max_examples=50, deadline=None)
@given(angles, decs, st.floats(-180, 180), st.floats(-30, 30), st.floats(-30, 30))
def test_sky_and_pixels_are_inverse_and_agree_with_astropy(ra, dec, rotation, x, y):
    from astropy.wcs import WCS

    tan = Tan.centered(ra, dec, pixels=32, scale=1.5, rotation=rotation)
    row = torch.tensor([tan.row()], dtype=torch.float64)
    sky = pixel_to_sky(row, torch.tensor([[[x, y]]], dtype=torch.float64))
    back = sky_to_pixel(row, sky)
    torch.testing.assert_close(back[0, 0], torch.tensor([x, y], dtype=torch.float64), atol=1e-6, rtol=0)
    np.testing.assert_allclose(tan.to_pixel(*tan.to_sky(x, y)), (x, y), atol=1e-6)
    system = WCS(fits.Header(tan.cards()))
    want = system.pixel_to_world_values(x, y)
    np.testing.assert_allclose(sky[0, 0].numpy(), want, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.4, 3.0), st.floats(-180, 180), st.integers(0, 99))
def test_invariant_11_flux_is_conserved(scale, rotation, seed):
    from mantis_photoz.wcs import resample_exact

    image = np.abs(rng(seed).normal(size=(6, 6)))
    source = Tan.centered(RA, DEC, pixels=6, scale=1.0, rotation=rotation)
    pixels = int(np.ceil(10 / scale)) + 2
    values, footprint = resample_exact(
        image, source, Tan.centered(RA, DEC, pixels=pixels, scale=scale), (pixels, pixels)
    )
    assert np.nansum(values * footprint) * scale**2 == pytest.approx(image.sum(), rel=1e-5)


def test_a_bent_map_is_followed_pixel_by_pixel():
    source = Tan.centered(10.0, 60.0, pixels=60, scale=1000.0)
    target = Tan.centered(12.0, 61.0, pixels=20, scale=1500.0)
    rows = [torch.tensor([tan.row()], dtype=torch.float64) for tan in (source, target)]
    y, x = torch.meshgrid(*(torch.arange(60, dtype=torch.float64),) * 2, indexing="ij")
    found = resample(torch.stack([x, y])[None], *rows, (20, 20))[0]
    place = source.to_pixel(*target.to_sky(4, 7))
    np.testing.assert_allclose(found[:, 7, 4].numpy(), place, atol=1e-6)


def test_resampling_has_a_gradient():
    rows = torch.tensor([center().row()], dtype=torch.float64)
    other = torch.tensor([center(pixels=8, scale=0.7).row()], dtype=torch.float64)
    images = torch.rand(1, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: resample(a, rows, other, (8, 8), outside=0.0), images)
    assert torch.autograd.gradcheck(lambda a: match_psf(a, [1.0], 2.0, 0.5), images)


def test_psfs_are_matched():
    tan, fwhm, target = torch.zeros(1, 2, 41, 41, dtype=torch.float64), (2.0, 3.0), 4.0
    y, x = np.mgrid[:41, :41] - 20
    gauss = lambda width: np.exp(-4 * np.log(2) * (x**2 + y**2) / width**2) / width**2
    tan = torch.tensor(np.stack([gauss(width) for width in fwhm]))[None]
    found = match_psf(tan, fwhm, target, 1.0)[0]
    np.testing.assert_allclose(found[0], gauss(target), atol=3e-3 * gauss(target).max())
    np.testing.assert_allclose(found[1], found[0], atol=3e-3 * gauss(target).max())
    with pytest.raises(InputError, match="target is 1"):
        match_psf(tan, fwhm, 1.0, 1.0)

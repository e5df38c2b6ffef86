"""Catalogues: formats, columns that are found, and bad ones."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import QTable, Table
from hypothesis import given, settings
from hypothesis import strategies as st
from mantis_files import table

from fusion_core.errors import DataError, InputError
from mantis_photoz.catalog import file_name, read_catalog
from mantis_photoz.ebv import find_ebv
from mantis_photoz.errors import CatalogError
from mantis_photoz.flags import Flag


@pytest.mark.parametrize("suffix", [".ecsv", ".csv", ".fits", ".parquet", ".vot"])
def test_formats(tmp_path, suffix):
    found = table(3, mag=[17.5, np.nan, 19.0])
    path = tmp_path / f"cat{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({name: found[name].tolist() for name in found.colnames}), path)
    else:
        form = {".ecsv": "ascii.ecsv", ".csv": "ascii.csv", ".fits": "fits", ".vot": "votable"}[suffix]
        found.write(path, format=form)
    catalog = read_catalog(path)
    assert catalog.ids == ("g0", "g1", "g2")
    np.testing.assert_allclose(catalog.ra, found["ra"], rtol=1e-14)
    np.testing.assert_allclose(catalog.dec, found["dec"], rtol=1e-14)
    assert catalog.column("mag")[2] == 19.0
    assert np.isnan(catalog.column("mag")[1])


def test_columns_by_ucd_name_and_unit():
    named = Table({"objID": [7], "RAJ2000": [10.0], "DEJ2000": [-5.0]})
    assert read_catalog(named).columns == {"id": "objID", "ra": "RAJ2000", "dec": "DEJ2000"}
    assert read_catalog(named).ids == ("7",)
    coded = Table({"name": ["a"], "ra": [1.0], "alpha": [2.0], "beta": [3.0]})
    coded["alpha"].meta["ucd"], coded["beta"].meta["ucd"] = "pos.eq.ra;meta.main", "POS_EQ_DEC_MAIN"
    assert read_catalog(coded).columns == {"id": "name", "ra": "alpha", "dec": "beta"}
    hours = QTable({"id": ["a"], "lon": [1.0] * u.hourangle, "dec": [0.1] * u.rad})
    catalog = read_catalog(hours)
    assert catalog.ra[0] == pytest.approx(15.0)
    assert catalog.dec[0] == pytest.approx(np.degrees(0.1))
    assert read_catalog(named, id="RAJ2000").ids == ("10.0",)


def test_sexagesimal_and_skycoord():
    text = Table({"id": ["a", "b"], "ra": ["10:00:24.0", "150.1"], "dec": ["+02:12:00", "2.2"]})
    catalog = read_catalog(text)
    np.testing.assert_allclose(catalog.ra, 150.1, atol=1e-9)
    np.testing.assert_allclose(catalog.dec, 2.2, atol=1e-9)
    sky = QTable({"id": ["a"], "where": SkyCoord([150.1] * u.deg, [2.2] * u.deg)})
    assert read_catalog(sky).ra[0] == pytest.approx(150.1)
    galactic = SkyCoord([150.1] * u.deg, [2.2] * u.deg).galactic
    found = read_catalog(QTable({"id": ["a"], "where": galactic}), ra="where", dec="where")
    assert found.dec[0] == pytest.approx(2.2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.remove_column("ra"),
            "no column for ra; it has id, dec, ebv_csfd, ebv_planck: name one with --ra",
        ),
        (lambda t: t.remove_column("id"), "no column for id"),
        (lambda t: t.replace_column("id", ["a", "b", "a"]), "'a' stands in rows 0 and 2"),
        (lambda t: t.replace_column("id", ["a", "", "b"]), "row 1: id is empty"),
        (
            lambda t: t.replace_column("ra", [1.0, 360.0, 3.0]),
            r"row 1 \(g1\): ra is 360, wanted \[0, 360\) degrees",
        ),
        (lambda t: t.replace_column("ra", [1.0, -1.0, 3.0]), "add 360 to negative"),
        (lambda t: t.replace_column("ra", [1.0, np.nan, 3.0]), "ra is nan"),
        (
            lambda t: t.replace_column("dec", [1.0, 2.0, 90.5]),
            r"row 2 \(g2\): dec is 90.5, wanted \[-90, 90\]",
        ),
        (
            lambda t: t.replace_column("ra", ["1", "far", "3"]),
            "row 1: ra is 'far', wanted degrees or sexagesimal",
        ),
        (lambda t: t.replace_column("ra", [1, 2, 3] * u.m), "unit m, wanted an angle"),
        (lambda t: t.add_column([1, 2, 3], name="RA"), "columns ra, RA may all be ra: name one with --ra"),
        (lambda t: t.replace_column("ebv_csfd", [0.1, -0.1, 0.0]), "E(B-V) is -0.1"),
    ],
)
def test_bad_catalogues(change, words):
    found = table(3)
    change(found)
    escaped = words if "\\" in words else words.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(CatalogError, match=escaped):
        find_ebv(read_catalog(found))


def test_what_is_wrong_with_a_file_names_it(tmp_path):
    found = table(3)
    found.replace_column("id", ["a", "b", "a"])
    found.write(tmp_path / "mine.ecsv")
    with pytest.raises(CatalogError, match=r"mine\.ecsv: id 'a' stands in rows 0 and 2"):
        read_catalog(tmp_path / "mine.ecsv")


def test_bad_files(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.fits").write_text("x")
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "a.csv").write_text("x" * 400_001)
    for name, words in {
        "a.txt": "suffix '.txt', wanted one of .ecsv",
        "none.csv": "is not there",
        "a.fits": "cannot be read as fits",
        "a.parquet": "cannot be read as parquet",
        "a.csv": "has no names of columns in its first 400000 bytes",
    }.items():
        with pytest.raises(InputError, match=words):
            read_catalog(tmp_path / name)
    with pytest.raises(InputError, match="catalog is a int"):
        read_catalog(3)
    with pytest.raises(DataError, match="--ra names 'alpha'"):
        read_catalog(table(2), ra="alpha")
    with pytest.raises(DataError, match="no column 'z_spec'"):
        read_catalog(table(2)).column("z_spec")
    with pytest.raises(DataError, match="wanted numbers"):
        read_catalog(table(2)).column("id")


def test_an_empty_catalogue_keeps_its_columns(tmp_path):
    empty = table(2)[:0]
    empty.write(tmp_path / "e.ecsv", format="ascii.ecsv")
    catalog = read_catalog(tmp_path / "e.ecsv")
    assert len(catalog) == 0
    assert catalog.table.colnames == ["id", "ra", "dec", "ebv_csfd", "ebv_planck"]


def test_dust_is_never_silently_zero():
    found = table(3)
    found["ebv_csfd"] = [0.1, np.nan, 2.0]
    values, flags = find_ebv(read_catalog(found))
    assert values[1].tolist() == [0.02, 0.02]  # the other map stands in
    assert flags.tolist() == [0, 0, int(Flag.HIGH_DUST)]
    found.remove_columns(["ebv_csfd", "ebv_planck"])
    values, flags = find_ebv(read_catalog(found))
    assert (values == 0).all()
    assert (flags == Flag.NO_DUST).all()
    with pytest.raises(InputError, match=r"wanted \(3, 2\)"):
        find_ebv(read_catalog(found), np.zeros(3))


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_file_names_never_leave_the_folder(text):
    name = file_name(text)
    assert "/" not in name
    assert "\\" not in name
    assert name not in (".", "..")
    assert file_name("SDSS J1000+02.2") == "SDSS J1000+02.2"

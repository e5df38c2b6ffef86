"""Packed cutouts give back what the files gave."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from mantis_files import SMALL, folder_of, planes, table, write

from fusion_core.errors import ConfigError, InputError
from mantis_photoz import CutoutError, Cutouts
from mantis_photoz.flags import Flag
from mantis_photoz.pack import PackedCutouts, pack
from mantis_photoz.wcs import Tan


@pytest.fixture
def sky(tmp_path):
    catalog = table(5, z_spec=np.linspace(0.1, 0.5, 5))
    folder_of(tmp_path / "c", catalog[:4])
    (tmp_path / "c" / "g1.galex.fits").unlink()
    data = planes(SMALL["ps1"])
    data[0, 2, 2:6] = np.nan
    tan = Tan.centered(catalog["ra"][2], catalog["dec"][2], pixels=12, scale=0.5)
    write(tmp_path / "c" / "g2.ps1.fits", data, tan, bands=SMALL["ps1"].bands, EXPTIME=1.0)
    return catalog, tmp_path / "c"


def test_invariant_14_packed_cutouts_come_back(sky, tmp_path):
    catalog, folder = sky
    data = Cutouts.from_directory(folder, catalog, SMALL)
    out = tmp_path / "p" / "cutouts.h5"
    assert pack(data, out, batch_size=2) == 5
    for place in (out, out.parent):
        back = Cutouts.from_directory(place, catalog, SMALL).batch([4, 2, 0, 1])
        whole = data.batch([4, 2, 0, 1])
        for name in SMALL:
            np.testing.assert_array_equal(back.planes[name], whole.planes[name])
            np.testing.assert_array_equal(back.wcs[name], whole.wcs[name])
        np.testing.assert_array_equal(back.present, whole.present)
        np.testing.assert_array_equal(back.flags, whole.flags)
        np.testing.assert_array_equal(back.nan_fraction, whole.nan_fraction)
        assert back.notes == whole.notes
        assert whole.flags[1] & Flag.NAN_PIXELS
    facts = PackedCutouts(out).facts()
    assert facts["objects"] == 5
    assert facts["redshifts"]
    assert facts["ps1"].endswith("4 present")
    assert len(PackedCutouts(out).checksum) == 64


def test_half_precision(sky, tmp_path):
    data = Cutouts.from_directory(sky[1], sky[0], SMALL)
    pack(data, tmp_path / "h.h5", dtype="float16")
    back = Cutouts.from_directory(tmp_path / "h.h5", sky[0], SMALL).batch(range(5))
    np.testing.assert_allclose(
        back.planes["unwise"], data.batch(range(5)).planes["unwise"], rtol=1e-3, atol=1e-4
    )
    tan = Tan.centered(sky[0]["ra"][0], sky[0]["dec"][0], pixels=12, scale=0.5)
    write(sky[1] / "g0.ps1.fits", np.full((5, 12, 12), 1e6), tan, bands=SMALL["ps1"].bands, EXPTIME=1.0)
    with pytest.raises(CutoutError, match="float16 cannot hold; pack as float32"):
        pack(data, tmp_path / "i.h5", dtype="float16")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["h.h5"]


def test_bad_input(sky, tmp_path):
    data = Cutouts.from_directory(sky[1], sky[0], SMALL)
    with pytest.raises(InputError, match=r"wanted a file in .h5"):
        pack(data, tmp_path / "a.npz")
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        pack(data, tmp_path / "a.h5", dtype="int8")
    pack(data, tmp_path / "a.h5")
    with pytest.raises(InputError, match="is there already"):
        pack(data, tmp_path / "a.h5")
    pack(data, tmp_path / "a.h5", overwrite=True)
    (tmp_path / "b.h5").write_text("x")
    with pytest.raises(InputError, match="is no packed file"):
        PackedCutouts(tmp_path / "b.h5")
    other = {"ps1": SMALL["ps1"].replace(pixels=16, crop=16)}
    found = Cutouts.from_directory(tmp_path / "a.h5", sky[0], other).read(0)["ps1"]
    assert not found.present
    assert "packed with 12 px" in found.notes[0]
    assert Cutouts.from_directory(tmp_path / "a.h5", table(9), SMALL).read(8)["ps1"].notes == (
        "ps1: not in a.h5",
    )


def test_what_describes_the_data_has_checksums(sky, tmp_path):
    """HDF5 reads some damaged files of its first format, and texts of any length, without end."""
    pack(Cutouts.from_directory(sky[1], sky[0], SMALL), tmp_path / "a.h5")
    assert (tmp_path / "a.h5").read_bytes()[8] == 3  # the version of the superblock
    kinds = []
    with h5py.File(tmp_path / "a.h5") as file:
        file.visititems(lambda name, item: kinds.append(getattr(item, "dtype", None)))
    texts = [found for kind in kinds if kind is not None and (found := h5py.check_string_dtype(kind))]
    assert len(texts) == 1 + len(SMALL)
    assert all(text.length and text.encoding == "utf-8" for text in texts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.attrs.__setitem__("surveys", 0), "is no packed file .* TypeError"),
        (lambda f: f.attrs.__setitem__("surveys", "{}"), "surveys is empty, wanted at least one"),
        (lambda f: f.attrs.__setitem__("schema", "x/1"), "schema is 'x/1', wanted"),
        (lambda f: f["ps1"].__delitem__("notes"), "is no packed file .* KeyError"),
        (lambda f: put(f["ps1"], "wcs", np.zeros((5, 3))), r"ps1/wcs has shape \(5, 3\), wanted \(5, 8\)"),
        (lambda f: put(f["ps1"], "flags", np.full(5, b"x")), "ps1/flags is of .*, wanted integers"),
        (
            lambda f: put(f["ps1"], "present", np.full(5, np.nan)),
            "present is of .*, wanted true or false",
        ),
        (
            lambda f: put(f["ps1"], "nan_fraction", np.zeros(5, int)),
            "nan_fraction is of .*, wanted float",
        ),
    ],
)
def test_a_damaged_file_is_named(sky, tmp_path, change, words):
    pack(Cutouts.from_directory(sky[1], sky[0], SMALL), tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        change(file)
    with pytest.raises(InputError, match=words) as told:
        PackedCutouts(tmp_path / "a.h5")
    assert str(tmp_path / "a.h5") in str(told.value)


def put(group, name, values):
    del group[name]
    group[name] = values

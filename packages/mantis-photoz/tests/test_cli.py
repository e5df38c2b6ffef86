"""The command line: estimate, inspect, pack; exit codes, one line per error, outputs whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from astropy.table import Table
from mantis_files import SMALL, folder_of, table
from test_estimate import network

from fusion_core.testing import run_cli
from mantis_photoz import __version__, calibrate
from mantis_photoz.calibrate import Temperature
from mantis_photoz.cli import main
from mantis_photoz.qpio import read_qp

VERBS = (
    *("estimate", "fetch", "train", "evaluate", "calibrate", "explain", "simulate", "convert", "inspect"),
    *("pack", "demo", "bench"),
)


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    catalog = table(5)
    catalog.write(place / "hosts.ecsv")
    folder_of(place / "cutouts", catalog)
    network().save_pretrained(place / "model")
    return place


def run(sky, *args, catalog="hosts.ecsv", cutouts="cutouts", model="model"):
    options = ["--cutouts", sky / cutouts, "--model", sky / model, "--device", "cpu", "--num-workers", 0]
    return run_cli(main, "estimate", sky / catalog, *options, *args)


def refuse(words, done, code=2):
    assert done.code == code, done
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert words in lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb):
    done = run_cli(main, verb, "--help")
    assert done.code == 0
    assert f"Example: mantis-photoz {verb}" in " ".join(done.stdout.replace("│", " ").split())


def test_version():
    assert run_cli(main, "--version").stdout.strip() == f"mantis-photoz {__version__}"


def test_estimate_writes_table_densities_and_provenance(sky, tmp_path):
    out, pdf = tmp_path / "z.ecsv", tmp_path / "z.hdf5"
    done = run(sky, "--out", out, "--pdf", pdf, "--tta", "d4", "--json")
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["objects"], summary["flagged"], summary["failed"]) == (5, 0, 0)
    assert "0 of 5 objects flagged" in done.stderr
    assert "bottleneck:" in done.stderr
    assert "network" in done.stderr
    rows = Table.read(out)
    assert list(rows["id"]) == [f"g{k}" for k in range(5)]
    back, ancil = read_qp(pdf)
    np.testing.assert_allclose(back.mean(), rows["z_mean"], atol=1e-9)
    assert list(ancil["id"]) == list(rows["id"])
    record = json.loads((tmp_path / "z.provenance.json").read_text())
    assert record["settings"]["tta"] == "d4"
    assert len(record["files"]) == 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["z.ecsv", "z.hdf5", "z.provenance.json"]
    refuse("is there already; pass --overwrite", run(sky, "--out", out))
    assert run(sky, "--out", out, "--overwrite", "--quiet").code == 0


def test_stdout_is_the_table(sky):
    done = run(sky, "--quiet", "--limit", 2, "--format-columns", "rail")
    assert done.code == 0, done.stderr
    rows = Table.read(done.stdout, format="ascii.ecsv")
    assert len(rows) == 2
    assert "zmode" in rows.colnames
    assert "bottleneck" not in done.stderr


def test_corrections_and_views(sky, tmp_path):
    calibrate.save(Temperature(0.3), tmp_path / "t.json")
    (tmp_path / "nz.json").write_text('{"z": [0, 0.4, 1.6], "n": [1, 1, 0]}')
    both = ("--recalibrate", tmp_path / "t.json", "--prior", tmp_path / "nz.json")
    assert run(sky, *both, "--out", tmp_path / "a.fits", "--tta", 2, "--nan", "zero", "--quiet").code == 0
    assert (
        run(sky, "--out", tmp_path / "b.parquet", "--grid", "official-infer", "--official-points").code == 0
    )
    record = json.loads((tmp_path / "a.provenance.json").read_text())
    assert record["settings"]["recalibration"] == ["temperature"]
    assert record["uses"][-2:] == ["temperature", "prior"]
    assert Table.read(tmp_path / "a.fits")["z_spread"].min() > 0


def test_strict_is_a_gate(sky, tmp_path):
    more = table(6)
    more.write(tmp_path / "more.ecsv")
    done = run(sky, "--strict", "--json", catalog=tmp_path / "more.ecsv")
    assert done.code == 3, done.stderr
    assert json.loads(done.stdout)["failed"] >= 1
    assert run(sky, "--json", catalog=tmp_path / "more.ecsv").code == 0
    assert run(sky, "--strict", "--json").code == 0


def test_a_killed_run_is_resumed(sky, tmp_path):
    out = tmp_path / "z.ecsv"
    first = [sys.executable, "-c", """
import sys
from mantis_photoz import runs, cli
add = runs.Run.add
def once(self, part, *args, **facts):
    add(self, part, *args, **facts)
    if part == 1:
        import os; os._exit(9)
runs.Run.add = once
cli.main()
""", "estimate", str(sky / "hosts.ecsv"), "--cutouts", str(sky / "cutouts"), "--model", str(sky / "model"),
        "--out", str(out), "--batch-size", "2", "--device", "cpu"]  # fmt: skip
    assert subprocess.run(first, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 9
    assert not out.exists()
    assert (tmp_path / "z.ecsv.run").is_dir()
    refuse("holds an unfinished run; pass --resume", run(sky, "--out", out, "--batch-size", 2))
    done = run(sky, "--out", out, "--batch-size", 2, "--resume", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["objects"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["z.ecsv", "z.provenance.json"]
    assert run(sky, "--out", tmp_path / "w.ecsv").code == 0
    np.testing.assert_allclose(
        Table.read(out)["z_mean"], Table.read(tmp_path / "w.ecsv")["z_mean"], atol=1e-6
    )


def test_bad_input_is_one_line(sky, tmp_path):
    bad = table(3)
    bad["ra"][1] = 400.0
    bad.write(tmp_path / "bad.ecsv")
    refuse("row 1 (g1): ra is 400", run(sky, catalog=tmp_path / "bad.ecsv"))
    refuse("is not there", run(sky, catalog="none.ecsv"))
    refuse("wanted a directory", run(sky, cutouts="none"))
    refuse("neither a folder", run(sky, model="none"))
    refuse("wanted a file in .ecsv, .fits, .parquet", run(sky, "--out", tmp_path / "z.txt"))
    refuse("wanted a file in .hdf5", run(sky, "--pdf", tmp_path / "z.fits"))
    refuse("tta is 'often'", run(sky, "--tta", "often"))
    refuse("are not of the model", run(sky, "--surveys", "sdss"))
    refuse("--ra names 'alpha'", run(sky, "--ra", "alpha"))
    refuse("recalibration", run(sky, "--recalibrate", tmp_path / "none.json"))
    refuse("--prior", run(sky, "--prior", tmp_path / "none.json"))
    refuse("--cutouts is missing", run_cli(main, "estimate", sky / "hosts.ecsv", "--model", sky / "model"))
    (sky / "model" / "model.safetensors").rename(tmp_path / "kept")
    try:
        (sky / "model" / "model.safetensors").write_bytes(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        )
        refuse("LFS", run(sky))
    finally:
        (tmp_path / "kept").replace(sky / "model" / "model.safetensors")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("z")]
    assert run_cli(main, "estimate").code == 2


def test_inspect(sky):
    done = run_cli(main, "inspect", sky / "cutouts" / "g0.ps1.fits", "--json")
    rows = json.loads(done.stdout)
    assert [row["band"] for row in rows] == list("grizy")
    assert rows[0]["scale_arcsec"] == 0.5
    assert rows[0]["mirrored"] is False
    assert rows[0]["exptime"] == 100.0
    facts = json.loads(run_cli(main, "inspect", sky / "model", "--json").stdout)
    assert facts["bins"] == 20
    assert facts["parameters"] > 100
    assert run_cli(main, "inspect", sky / "cutouts" / "g0.ps1.fits").code == 0
    refuse("is neither FITS", run_cli(main, "inspect", sky / "hosts.ecsv"))


def test_pack(sky, tmp_path):
    out = tmp_path / "c.h5"
    done = run_cli(main, "pack", sky / "hosts.ecsv", "--cutouts", sky / "cutouts", "--model", sky / "model",
                   "--out", out, "--json")  # fmt: skip
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["objects"] == 5
    plain, packed = run(sky, "--quiet"), run(sky, "--quiet", cutouts=out)
    assert packed.stdout == plain.stdout
    assert json.loads(run_cli(main, "inspect", out, "--json").stdout)["objects"] == 5
    assert SMALL["ps1"].pixels == 12

"""The fetcher against a local server that fails in every way: valid file or recorded error, never less."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections import Counter
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mantis_files import SMALL, table

import fusion_core.http
from fusion_core.errors import InputError
from fusion_core.testing import run_cli
from fusion_core.testing.server import FaultServer, Reply
from mantis_photoz import Cutouts
from mantis_photoz.catalog import read_catalog
from mantis_photoz.cli import main
from mantis_photoz.ebv import dust_maps, find_ebv
from mantis_photoz.errors import CutoutError
from mantis_photoz.fetch import Cache, fetch, fetch_dust
from mantis_photoz.fetch import services as services_module
from mantis_photoz.fetch.services import canonical, parse_ps1_table, plan_ps1, ps1_form, verify
from mantis_photoz.fits_fast import parse_fits
from mantis_photoz.flags import Flag
from mantis_photoz.wcs import Tan

PS1 = SMALL["ps1"].replace(pixel_scale=0.25)
SURVEYS = {**SMALL, "ps1": PS1}


def image(query, planes):
    size, scale = int(query["size"]), float(query.get("pixscale", 0.25))
    tan = Tan.centered(float(query["ra"]), float(query["dec"]), pixels=size, scale=scale)
    header = fits.Header({**tan.cards(), "EXPTIME": 40.0})
    if planes > 1:
        header["BANDS"] = {"galex": "nf", "unwise-neo7": "12"}[query["layer"]]
    else:
        header["HIERARCH FPA.FILTER"] = f"{query['red'][-6]}.00000"
    buffer = io.BytesIO()
    data = np.full((planes, size, size), float(query["ra"]), np.float32)
    fits.PrimaryHDU(data[0] if planes == 1 else data, header).writeto(buffer)
    return buffer.getvalue()


def rows_of(body):
    lines = re.search(rb"text/plain\r\n\r\n(.*?)\r\n--", body, re.DOTALL)[1].decode().splitlines()
    rows = ["projcell subcell ra dec filter mjd type filename shortname badflag"]
    for number, line in enumerate(reversed(lines)):  # the order is not ours to rely on
        ra, dec = line.split()
        rows += [
            f"{1000 + number % 3} 07 {ra} {dec} {band} 0 stack /rings/{number}.{band}.fits x 0"
            for band in "grizy"
        ]
    return "\n".join(rows)


def healthy(request):
    parts = urlsplit(request.path)
    query = {key: value[0] for key, value in parse_qs(parts.query).items()}
    if parts.path == "/names":
        return Reply(body=rows_of(request.body), content_type="text/plain")
    planes = 1 if parts.path == "/cut" else 2
    return Reply(body=image(query, planes), content_type="image/fits")


def services(server):
    return {
        "viewer": f"{server.url}/viewer",
        "ps1names": f"{server.url}/names",
        "ps1cut": f"{server.url}/cut",
    }


def run(server, catalog, out, **options):
    options = {
        "surveys": SURVEYS,
        "rate": None,
        "services": services(server),
        "retries": 2,
        "timeout": 5.0,
    } | options
    return fetch(catalog, out, **options)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(fusion_core.http, "_FIRST_WAIT", 0.001)


def asked(server):
    return Counter(request.path for request in server.requests)


def test_everything_comes_once(tmp_path):
    catalog = table(4)
    with FaultServer(healthy) as server:
        found = run(server, catalog, tmp_path / "c")
        assert (found.files, found.fetched, found.failures) == (28, 28, {})
        assert max(asked(server).values()) == 1
        assert len(server.requests) == found.requests == 29  # one table for all positions (bug B6)
        scales = {
            parse_qs(urlsplit(r.path).query)["pixscale"][0] for r in server.requests if "unwise" in r.path
        }
        assert scales == {"2.75"}  # bug B4: 1.5 in the authors' live service
        agents = {request.headers["user-agent"] for request in server.requests}
        assert all(agent.startswith("mantis-photoz/") for agent in agents)
        again = run(server, catalog, tmp_path / "c", resume=True)
        assert (again.kept, again.requests) == (28, 0)
        with pytest.raises(InputError, match="holds a run"):
            run(server, catalog, tmp_path / "c")
        order = [
            parse_qs(urlsplit(r.path).query)["red"][0] for r in server.requests if r.path.startswith("/cut")
        ]
        assert len(order) == 20
    data = Cutouts.from_directory(tmp_path / "c", catalog, SURVEYS)
    batch = data.batch(range(4))
    assert batch.flags.tolist() == [0] * 4
    for name in SURVEYS:  # each object got its own pixels, each band its own file (bug B5)
        wanted = np.repeat(np.asarray(catalog["ra"])[:, None], len(SURVEYS[name].bands), 1)
        np.testing.assert_allclose(batch.planes[name][:, :, 3, 3], wanted, rtol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "c" / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 28
    assert {"key", "status", "url", "tries", "bytes", "sha256", "seconds"} == set(lines[0])


def test_the_cache_serves_other_catalogues(tmp_path):
    with FaultServer(healthy) as server:
        first = run(server, table(2), tmp_path / "a", cache=tmp_path / "cache")
        assert first.fetched == 14
        before = len(server.requests)
        again = run(server, table(2), tmp_path / "b", cache=tmp_path / "cache")
        assert (again.fetched, again.cached) == (0, 14)
        assert len(server.requests) == before + 1  # the table of files only
        galex = {"galex": SURVEYS["galex"]}
        assert run(server, table(2), tmp_path / "d", cache=tmp_path / "cache", surveys=galex).requests == 0
        damaged = next((tmp_path / "cache").glob("??/*.fits"))
        damaged.write_bytes(damaged.read_bytes()[:100])
        assert run(server, table(2), tmp_path / "e", cache=tmp_path / "cache").fetched == 1
        same = table(2)
        same["ra"][1], same["dec"][1] = same["ra"][0], same["dec"][0]
        twins = run(server, same, tmp_path / "f", surveys=galex)
        assert (twins.fetched, twins.requests) == (2, 1)  # one address, two files


FAULTS = {
    "ok": None,
    "html": {"body": "<html>please wait</html>", "content_type": "text/html"},
    "empty": {"body": b""},
    "busy": {"status": 429, "retry_after": 0},
    "broken": {"status": 503},
    "cut": {"cut": 900},
    "dropped": {"cut": -1},
    "short": {"keep": 3000},
    "slow": {"delay": 0.7},
    "gone": {"status": 404},
    "shape": {"shape": True},
}


def faulty(plans):
    """Each address meets its own list of faults, then health."""
    seen = Counter()

    def script(request):
        number = seen[request.path]
        seen[request.path] += 1
        faults = plans[sum(request.path.encode()) % len(plans)]
        fault = faults[number] if number < len(faults) else "ok"
        reply = healthy(request)
        told = FAULTS[fault]
        if told is None:
            return reply
        if fault == "short":
            return Reply(body=reply.body[: told["keep"]])
        if fault == "shape":
            return Reply(body=fits_of((3, 4, 4)))
        if fault in ("cut", "slow"):
            return Reply(body=reply.body, **told)
        return Reply(**told)

    return script


def fits_of(shape):
    buffer = io.BytesIO()
    fits.PrimaryHDU(np.ones(shape, np.float32)).writeto(buffer)
    return buffer.getvalue()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans=st.lists(st.lists(st.sampled_from(sorted(FAULTS)), max_size=3), min_size=1, max_size=4))
def test_invariant_18_valid_file_or_recorded_error(tmp_path_factory, plans):
    out, catalog = tmp_path_factory.mktemp("f") / "c", table(2)
    retries = 1
    with FaultServer(faulty(plans)) as server:
        found = run(server, catalog, out, retries=retries, timeout=0.5, cache=out.parent / "cache")
        tries = asked(server)
        assert max(tries.values()) <= retries + 1
        names = {f"{one}.{part}.fits" for one in catalog["id"] for part in ("galex", "unwise", *"grizy")}
        there = {path.name for path in out.iterdir()} - {"manifest.jsonl"}
        assert there.isdisjoint(found.failures)
        assert there | set(found.failures) == names  # no object is lost, no other file is left
        for path in out.glob("*.fits"):
            assert parse_fits(path.read_bytes(), path.name)[0].data.shape[1:] == (12, 12)
        entries = {json.loads(line)["key"]: json.loads(line) for line in (out / "manifest.jsonl").open()}
        assert set(entries) == names
        assert all(("error" in entries[name]) == (name in found.failures) for name in names)
        good = catalog[
            [not any(name.startswith(f"{one}.") for name in found.failures) for one in catalog["id"]]
        ]
        galex = {"galex": SURVEYS["galex"]}
        assert (
            run(server, good, out.parent / "again", surveys=galex, cache=out.parent / "cache").requests == 0
        )


def test_a_resumed_run_asks_for_what_failed(tmp_path):
    catalog, sick = table(3), {"g1"}

    def script(request):
        query = parse_qs(urlsplit(request.path).query)
        mine = (
            sick
            and query.get("layer") == ["galex"]
            and query["ra"] == [services_module.number(catalog["ra"][1])]
        )
        return Reply(status=404) if mine else healthy(request)

    with FaultServer(script) as server:
        first = run(server, catalog, tmp_path / "c")
        assert list(first.failures) == ["g1.galex.fits"]
        assert "status 404" in first.failures["g1.galex.fits"]
        assert first.requests == 22  # a 404 is not tried again
        sick.clear()
        again = run(server, catalog, tmp_path / "c", resume=True)
        assert (again.fetched, again.kept, again.failures, again.requests) == (1, 20, {}, 1)


def test_footprint_and_tables(tmp_path):
    catalog = table(3)
    catalog["dec"][2] = -45.0
    with FaultServer(healthy) as server:
        found = run(server, catalog, tmp_path / "c", surveys={"ps1": PS1})
        assert found.fetched == 10
        assert set(found.failures.values()) == {"outside of the Pan-STARRS1 footprint"}
    with FaultServer([{"status": 200, "body": "sorry, down for maintenance"}]) as server:
        found = run(server, catalog[:1], tmp_path / "d", surveys={"ps1": PS1})
        assert len(found.failures) == 5
        assert "no table of files" in found.failures["g0.g.fits"]
        assert found.requests == 3
    with FaultServer([{"body": "projcell subcell ra dec filter filename\n"}]) as server:
        found = run(server, catalog[:1], tmp_path / "e", surveys={"ps1": PS1})
        assert set(found.failures.values()) == {"Pan-STARRS1 has no stack here"}


def test_many_positions_go_in_few_tables():
    catalog = read_catalog(table(30))
    body, headers = ps1_form(catalog, "grizy")
    assert headers["Content-Type"].startswith("multipart/form-data")
    rows = parse_ps1_table(rows_of(body))
    jobs, missing = plan_ps1(catalog, PS1, rows)
    assert missing == {}
    assert len({job.file for job in jobs}) == 150
    assert [job.order for job in jobs] == sorted(job.order for job in jobs)
    for job in jobs:
        row = int(job.file.partition(".")[0][1:])
        query = parse_qs(urlsplit(job.url).query)
        assert query["red"][0] == f"/rings/{29 - row}.{job.file.split('.')[1]}.fits"
    for text, words in (
        ("", "no table"),
        ("ra dec filter filename\n1 2 g", "cut off"),
        ("ra dec filter filename\nx 2 g f", "is none"),
    ):
        with pytest.raises(CutoutError, match=words):
            parse_ps1_table(text)


def test_bodies_are_checked():
    job = plan_ps1(read_catalog(table(1)), PS1, parse_ps1_table("ra dec filter filename\n"))
    assert len(job[1]) == 5
    from mantis_photoz.fetch.services import Job

    wanted = Job("a.fits", "http://h/a", (2, 12, 12))
    verify(fits_of((2, 12, 12)), wanted)
    with pytest.raises(CutoutError, match="has shape"):
        verify(fits_of((2, 12, 13)), wanted)
    buffer = io.BytesIO()
    fits.PrimaryHDU(np.full((2, 12, 12), np.nan, np.float32)).writeto(buffer)
    with pytest.raises(CutoutError, match="no finite pixel in its center"):
        verify(buffer.getvalue(), wanted)
    assert canonical("http://h/x", {"b": "/r/1.fits", "a": 1}) == "http://h/x?a=1&b=/r/1.fits"


def test_the_cache_keeps_its_size(tmp_path):
    import os

    cache = Cache(tmp_path / "k", max_bytes=30)
    for number, key in enumerate("abcd"):
        cache.put(key * 64, b"0123456789")
        os.utime(cache._file(key * 64), (number, number)) if cache._file(key * 64).exists() else None
    assert cache.size() <= 30
    assert cache.get("a" * 64) is None
    assert cache.get("d" * 64) == b"0123456789"
    cache.put("e" * 64, b"x" * 31)
    assert cache.get("e" * 64) is None


def test_counting_sends_nothing(tmp_path):
    catalog = table(3)
    catalog["dec"][0] = -45
    found = fetch(catalog, tmp_path / "c", dry_run=True)
    assert (found.files, found.requests) == (21, 6 + 10 + 1)
    assert not (tmp_path / "c").exists()


def test_within_a_running_loop(tmp_path):
    async def notebook(server):
        return run(server, table(1), tmp_path / "c", surveys={"galex": SURVEYS["galex"]})

    with FaultServer(healthy) as server:
        assert asyncio.run(notebook(server)).fetched == 1


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="have no service here"):
        fetch(table(1), tmp_path, surveys={"sdss": SURVEYS["galex"].replace(name="sdss")})
    with pytest.raises(InputError, match="cannot write"):
        fetch(table(1), "/proc/none/c")
    with pytest.raises(InputError, match="concurrency is 0"):
        fetch(table(1), tmp_path / "c", concurrency=0)


def test_dust_maps_are_fetched_by_dustmaps(tmp_path, monkeypatch):
    csfd = pytest.importorskip("dustmaps.csfd")
    from dustmaps import planck
    from dustmaps.config import config

    places = []
    monkeypatch.setattr(csfd, "fetch", lambda: places.append(config["data_dir"]))

    def fails():
        raise OSError("no network")

    monkeypatch.setattr(planck, "fetch", fails)
    before = dict(config._options)
    assert fetch_dust(tmp_path / "d") == {"csfd": "ok", "planck": "no network"}
    assert places == [str(tmp_path / "d")]
    assert config._options == before
    with pytest.raises(InputError, match="unknown; wanted some of csfd, planck"):
        fetch_dust(tmp_path, ["sfd"])


def test_maps_that_are_not_there_are_said(tmp_path):
    pytest.importorskip("dustmaps.csfd")
    catalog = read_catalog(table(2))
    values = dust_maps(catalog, tmp_path)
    assert np.isnan(values).all()
    found, flags = find_ebv(catalog, values)
    assert (found == 0).all()
    assert (flags == Flag.NO_DUST).all()


def test_command_line(tmp_path):
    table(2).write(tmp_path / "hosts.ecsv")
    with FaultServer(healthy) as server:
        bases = [word for name, url in services(server).items() for word in ("--service", f"{name}={url}")]
        args = [
            "fetch",
            tmp_path / "hosts.ecsv",
            "--out",
            tmp_path / "c",
            "--rate",
            1000,
            "--surveys",
            "galex,unwise",
        ]
        done = run_cli(main, *args, *bases, "--json", "--strict", "--unwise-pixscale", 1.5)
        assert done.code == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["fetched"] == 4
        assert any("pixscale=1.5&" in r.path + "&" and "unwise" in r.path for r in server.requests)
        assert run_cli(main, *args, *bases).code == 2
    with FaultServer([404]) as server:
        bases = [word for name, url in services(server).items() for word in ("--service", f"{name}={url}")]
        args[3] = tmp_path / "d"
        done = run_cli(main, *args[:3], tmp_path / "d", *args[4:], *bases, "--strict")
        assert done.code == 3
        assert done.stderr.count("not fetched: ") == 4
        assert "error: --service is 'x'" in run_cli(main, *args, "--service", "x").stderr
    done = run_cli(main, *args, "--dry-run", "--json")
    assert json.loads(done.stdout)["requests"] == 4

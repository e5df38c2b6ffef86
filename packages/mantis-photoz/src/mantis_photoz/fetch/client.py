"""Fetch the cutouts of a catalogue: each file once, whole and verified, or its error on record."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fusion_core.atomic import atomic_write
from fusion_core.errors import InputError, require_extra
from fusion_core.results import Result
from fusion_core.store import Manifest
from mantis_photoz.catalog import Catalog, file_name, read_catalog
from mantis_photoz.errors import CutoutError
from mantis_photoz.fetch.cache import Cache
from mantis_photoz.fetch.services import (
    LAYERS,
    PS1_ROWS,
    PS1_SCALE,
    SERVICES,
    Job,
    digest_url,
    parse_ps1_table,
    plan_ps1,
    plan_viewer,
    ps1_form,
    verify,
)
from mantis_photoz.surveys import PS1_SOUTH, SURVEYS, Survey

AGENT = f"mantis-photoz/{version('mantis-photoz')} (cutouts for photometric redshifts)"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetched(Result):
    """What a run over a catalogue did.

    Args:
        files: that the catalogue asks for.
        fetched: that came from a service now.
        cached: that came from the cache.
        kept: that an earlier run had left here.
        failures: file -> why it is not here.
        requests: sent, the tries again included.
        received_bytes: of all answers.
        seconds: of the run.
    """

    files: int
    fetched: int
    cached: int
    kept: int
    failures: dict[str, str]
    requests: int
    received_bytes: int
    seconds: float


@dataclass(slots=True)
class _Plan:
    """Files to get, and those that no service has."""

    jobs: list[Job] = field(default_factory=list[Job])
    missing: dict[str, str] = field(default_factory=dict[str, str])


def fetch(
    catalog: Any,
    out: str | os.PathLike[str],
    *,
    surveys: Mapping[str, Survey] | None = None,
    concurrency: int = 8,
    rate: float | None = 5.0,
    retries: int = 5,
    timeout: float = 60.0,
    cache: str | os.PathLike[str] | Cache | None = None,
    cache_bytes: int = 20_000_000_000,
    services: Mapping[str, str] = SERVICES,
    dry_run: bool = False,
    resume: bool = False,
    progress: bool | None = None,
) -> Fetched:
    """Fetch cutouts from the Legacy viewer (GALEX, unWISE) and from Pan-STARRS1.

    Every file is asked for at most ``retries + 1`` times, is accepted only where it is a whole FITS image of
    the right shape, and appears whole or not at all; ``manifest.jsonl`` has a line for each, with its error
    where there is one. What the cache holds costs no request.

    Args:
        catalog: what :func:`~mantis_photoz.catalog.read_catalog` takes.
        out: directory for ``{id}.galex.fits``, ``{id}.g.fits`` ... ``{id}.unwise.fits``.
        surveys: name -> survey, at the pixels that are wanted; all by default.
        concurrency: requests in flight.
        rate: requests per second and host; None for no limit.
        retries: tries after the first.
        timeout: seconds of one try.
        cache: directory of what was fetched before.
        cache_bytes: the cache's largest size.
        services: base addresses.
        dry_run: plan only; the table of Pan-STARRS1 files is not asked for, so five files are counted each.
        resume: go on in a directory that an earlier run left.
        progress: None shows a bar on a terminal only.

    Returns:
        See :class:`Fetched`; a file that cannot be had is a failure there, not an exception.

    Raises:
        InputError: a survey without a service, or ``out`` holds a run and ``resume`` is False.
        DataError: a bad catalogue.
        MissingExtraError: pyreqwest is not installed.
    """
    found = read_catalog(catalog)
    chosen = dict(SURVEYS if surveys is None else surveys)
    if unknown := [name for name in chosen if name not in LAYERS and name != "ps1"]:
        raise InputError(f"surveys {unknown} have no service here, wanted some of ps1, {', '.join(LAYERS)}")
    if dry_run:
        return _counted(found, chosen)
    require_extra("pyreqwest", "fetch", "mantis-photoz")
    place = Path(out)
    path = place / "manifest.jsonl"
    if path.exists() and not resume:
        raise InputError(f"--out {place} holds a run ({path.name}); pass --resume, or name another directory")
    try:
        place.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(path)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror or error}; name a writable place") from error
    kept = cache if isinstance(cache, Cache) or cache is None else Cache(cache, max_bytes=cache_bytes)
    run = _Fetcher(place, manifest, kept, services, progress)
    numbers = {"concurrency": concurrency, "rate": rate, "retries": retries, "timeout": timeout}
    return _run(run.all(found, chosen, numbers))


def _counted(catalog: Catalog, surveys: Mapping[str, Survey]) -> Fetched:
    north = int((catalog.dec >= PS1_SOUTH).sum())
    files = sum(len(catalog) for name in surveys if name in LAYERS)
    requests = files
    if "ps1" in surveys:
        files += len(catalog) * len(surveys["ps1"].bands)
        requests += north * len(surveys["ps1"].bands) + -(-north // PS1_ROWS)
    return Fetched(files, 0, 0, 0, {}, requests, 0, 0.0)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, also where an event loop is running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    found: list[Any] = []

    def target() -> None:
        try:
            found.append((True, asyncio.run(work)))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            found.append((False, error))

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    done, value = found[0]
    if not done:
        raise value
    return value


class _Fetcher:
    """One run: plan, then workers that take jobs until none is left."""

    def __init__(
        self,
        place: Path,
        manifest: Manifest,
        cache: Cache | None,
        services: Mapping[str, str],
        progress: bool | None,
    ) -> None:
        self.place, self.manifest, self.cache = place, manifest, cache
        self.services = {**SERVICES, **services}
        self.progress = progress
        self.count = {"fetched": 0, "cached": 0, "kept": 0}
        self.failures: dict[str, str] = {}

    async def all(self, catalog: Catalog, surveys: Mapping[str, Survey], numbers: dict[str, Any]) -> Fetched:
        from fusion_core.http import Client

        start = time.perf_counter()
        async with Client(headers={"User-Agent": AGENT}, **numbers) as client:
            plan = await self._plan(client, catalog, surveys)
            for name, why in plan.missing.items():
                self._fail(name, why)
            await self._work(client, plan.jobs, 2 * numbers["concurrency"])
            stats = client.stats
        files = len(plan.jobs) + len(plan.missing)
        return Fetched(
            files,
            **self.count,
            failures=dict(self.failures),
            requests=stats.tries,
            received_bytes=stats.received_bytes,
            seconds=time.perf_counter() - start,
        )

    async def _plan(self, client: Any, catalog: Catalog, surveys: Mapping[str, Survey]) -> _Plan:
        plan = _Plan()
        for name, survey in surveys.items():
            if name in LAYERS:
                plan.jobs += plan_viewer(catalog, survey, self.services["viewer"])
        if "ps1" not in surveys:
            return plan
        survey = surveys["ps1"]
        south = np.flatnonzero(catalog.dec < PS1_SOUTH)
        plan.missing |= self._named(catalog.take(south), survey, "outside of the Pan-STARRS1 footprint")
        north = [int(row) for row in np.flatnonzero(catalog.dec >= PS1_SOUTH)]
        done = [row for row in north if self._has_all(catalog, survey, row)]
        todo = sorted(set(north) - set(done))
        for row in done:
            for name in self._named(catalog.take([row]), survey, ""):
                plan.jobs.append(Job(name, self._address(name), (1, 0, 0)))
        for first in range(0, len(todo), PS1_ROWS):
            some = catalog.take(todo[first : first + PS1_ROWS])
            try:
                rows = await self._table(client, some, survey)
            except CutoutError as error:
                plan.missing |= self._named(some, survey, f"no table of files: {error}")
                continue
            jobs, missing = plan_ps1(some, survey, rows, self.services["ps1cut"])
            plan.jobs += jobs
            plan.missing |= missing
        return plan

    async def _table(self, client: Any, catalog: Catalog, survey: Survey) -> list[dict[str, str]]:
        from fusion_core.http import RequestError

        body, headers = ps1_form(catalog, survey.bands)
        refuse = _refusal(lambda answer: parse_ps1_table(answer.text))
        try:
            answer = await client.request(
                "POST", self.services["ps1names"], refuse=refuse, data=body, headers=headers
            )
        except RequestError as error:
            raise CutoutError(" ".join(str(error).split())) from error
        return parse_ps1_table(answer.text)

    def _named(self, catalog: Catalog, survey: Survey, why: str) -> dict[str, str]:
        return {f"{file_name(one)}.{band}.fits": why for one in catalog.ids for band in survey.bands}

    def _has_all(self, catalog: Catalog, survey: Survey, row: int) -> bool:
        pixels = round(survey.field_arcsec / PS1_SCALE)
        names = self._named(catalog.take([row]), survey, "")
        return all(self._has(Job(name, self._address(name), (1, pixels, pixels))) for name in names)

    def _address(self, name: str) -> str:
        return str(self.manifest.entries.get(name, {}).get("url", ""))

    def _has(self, job: Job) -> bool:
        """Whether a file is here: by the manifest, or by itself (a kill before its line, a user's own)."""
        place = self.place / job.file
        if not place.is_file():
            return False
        if job.file in self.manifest.entries:
            return job.file in self.manifest and self._address(job.file) == job.url
        try:
            verify(place.read_bytes(), job)
        except (CutoutError, OSError):
            return False
        self.manifest.add(job.file, status="found", url=job.url)
        return True

    async def _work(self, client: Any, jobs: Sequence[Job], workers: int) -> None:
        from fusion_core.progress import track

        bar = iter(track(range(len(jobs)), "fetching", len(jobs), self.progress))
        pending = iter(_by_address(jobs))

        async def worker() -> None:
            for group in pending:  # workers share the iterator: each job is taken once
                await self._get(client, group)
                for _ in group:
                    next(bar, None)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(workers, max(len(jobs), 1))):
                    tasks.create_task(worker())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        next(bar, None)

    async def _get(self, client: Any, group: Sequence[Job]) -> None:
        """One address, for all files that come from it."""
        from fusion_core.http import RequestError

        todo = [job for job in group if not self._has(job)]
        self.count["kept"] += len(group) - len(todo)
        if not todo:
            return
        url, key, start = todo[0].url, digest_url(todo[0].url), time.perf_counter()
        body, tries = self._from_cache(key, todo[0]), 0
        if body is None:
            try:
                refuse = _refusal(lambda answer: verify(answer.body, todo[0]))
                answer = await client.request("GET", url, refuse=refuse)
            except (RequestError, InputError) as error:
                for job in todo:
                    self._fail(
                        job.file, " ".join(str(error).split()), url=url, tries=getattr(error, "tries", 0)
                    )
                return
            body, tries = answer.body, answer.tries
            if self.cache is not None:
                self.cache.put(key, body)
        facts: dict[str, Any] = {
            "url": url,
            "tries": tries,
            "bytes": len(body),
            "sha256": sha256(body).hexdigest(),
        }
        facts["seconds"] = round(time.perf_counter() - start, 4)
        for job in todo:
            with atomic_write(self.place / job.file) as file:
                file.write(body)
            status = "fetched" if tries else "cached"
            self.count[status] += 1
            self.manifest.add(job.file, status=status, **facts)

    def _from_cache(self, key: str, job: Job) -> bytes | None:
        body = None if self.cache is None else self.cache.get(key)
        if body is None:
            return None
        try:
            verify(body, job)
        except CutoutError:  # damaged since it was kept: fetch it anew
            if self.cache is not None:
                self.cache.drop(key)
            return None
        return body

    def _fail(self, name: str, why: str, **facts: Any) -> None:
        self.failures[name] = why
        self.manifest.add(name, error=why, **facts)


def _by_address(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs of one address together, in order: nothing is asked for twice."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.url, []).append(job)
    return iter(groups.values())


def _refusal(check: Callable[[Any], Any]) -> Callable[[Any], str | None]:
    """What :meth:`fusion_core.http.Client.request` asks: the words of a check that raises CutoutError."""

    def refuse(answer: Any) -> str | None:
        try:
            check(answer)
        except CutoutError as error:
            return " ".join(str(error).split())
        return None

    return refuse

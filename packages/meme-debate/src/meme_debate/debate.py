"""Debates about many memes: backends by name, concurrency, cache, and the report of what it cost."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from fusion_core.errors import (
    ConfigError,
    DataError,
    FusionError,
    InputError,
    MissingExtraError,
    StoreError,
    check_range,
)
from fusion_core.progress import track
from fusion_core.results import Result
from meme_debate.backends import Ask, Backend, FunctionBackend
from meme_debate.cache import ReplyCache
from meme_debate.errors import BackendError
from meme_debate.meme import Debate, Meme, check_shown
from meme_debate.neighbors import Neighbors
from meme_debate.pictures import MAX_SIDE
from meme_debate.policy import Policy
from meme_debate.talking import Session, Settings

_ENDS_THE_RUN = (ConfigError, StoreError, MissingExtraError)
_SILENCES = 3  # memes in a row, at least, to which a server that never answered may fail to answer


@dataclass(frozen=True, slots=True)
class DebateReport(Result):
    """What a run did.

    Attributes:
        memes: that were debated.
        failed: id and reason of those that could not be (``on_error="skip"``).
        calls: replies that were used, also those of the cache.
        cached: of the calls, answered without asking.
        prompt_tokens: read by the server in this run.
        completion_tokens: written by it.
        prefix_tokens: of the prompt tokens, found in the server's prefix cache, as it says.
        cost: in the currency of ``price``; None without one.
        flags: how many debates have each flag.
        verdicts: number of debates by verdict: harmful, harmless, none.
        transport: requests, tries, retries, bytes, seconds waited.
        seconds: of the whole run.
    """

    memes: int
    failed: tuple[tuple[str, str], ...]
    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    prefix_tokens: int
    cost: float | None
    flags: dict[str, int]
    verdicts: dict[str, int]
    transport: dict[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0


class Debates(list[Debate]):
    """Debates in the order of the memes, with ``report``."""

    report: DebateReport


class Debater:
    """Two sides and a verdict for each meme, by a vision language model.

    Args:
        backend: the URL of a server with the chat-completions schema, ``"openai:MODEL"`` or an
            ``openai.AsyncOpenAI`` (extra ``openai``), ``"transformers:MODEL"`` (in this process),
            ``"recorded:FILE"`` (a ``debates.jsonl``), or an ``async (messages) -> str``.
        model: its name on the server, and in the records.
        policy: what is asked about each meme.
        cache: SQLite file of replies; with it a run that was stopped continues where it was.
        rounds: 1: statements; more: each side answers the other's last one.
        swap: ask the verdict in both orders; disagreement means no verdict.
        verdict: ask for one at all.
        verdict_model: another model for the verdict, on the same server, or another backend's name.
        stances: ``"serial"`` (the second call reuses the prefix of the first) or ``"parallel"``.
        on_label: what happens to a statement that names a label: ``"keep"``, ``"mask"``, ``"retry"`` once.
        on_refusal: a side that was refused twice is left ``"empty"``, or the refusal stands as its statement
            (``"keep"``); it is flagged either way.
        neighbors: decided memes that are shown to the debaters where they are like the meme (ExplainHM++).
        structured: ask servers for JSON by schema in the verdict.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
        max_side: pictures with a longer side are made smaller.
        price: cost of a million prompt and completion tokens, for the report.
        **options: of the backend: ``timeout``, ``retries``, ``rate``, ``key_variable``, ``extra`` for a URL;
            ``processor``, ``device``, ``dtype`` for transformers; ``timeout``, ``retries``, ``extra`` for
            openai.

    Raises:
        InputError: a backend, model or setting that is none; the message names it.

    Example:
        >>> async def stub(messages):
        ...     return '{"better": "A"}' if "Statement A" in messages[1]["content"][-1]["text"] else "A cup."
        >>> debates = Debater(stub, swap=False).run([Meme("m1", None, "cold again")])
        >>> debates[0].harmful, debates.report.calls
        ('A cup.', 2)
    """

    def __init__(
        self,
        backend: str | Ask | Backend,
        model: str = "",
        *,
        policy: Policy | None = None,
        cache: str | os.PathLike[str] | None = None,
        rounds: int = 1,
        swap: bool = True,
        verdict: bool = True,
        verdict_model: str | None = None,
        stances: Literal["serial", "parallel"] = "serial",
        on_label: Literal["keep", "mask", "retry"] = "keep",
        on_refusal: Literal["empty", "keep"] = "empty",
        neighbors: Neighbors | None = None,
        structured: bool = False,
        temperature: float = 0.0,
        seed: int = 0,
        max_side: int = MAX_SIDE,
        price: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        for name, value, takes in (
            ("stances", stances, ("serial", "parallel")),
            ("on_label", on_label, ("keep", "mask", "retry")),
            ("on_refusal", on_refusal, ("empty", "keep")),
        ):
            if value not in takes:
                raise InputError(f"{name} is {value!r}, wanted one of {', '.join(map(repr, takes))}")
        check_range("rounds", rounds, 1, 16)
        check_range("temperature", temperature, 0.0, 10.0)
        check_range("max_side", max_side, 16, 1 << 16)
        self.settings = Settings(
            policy or Policy(),
            rounds,
            swap,
            verdict,
            stances,
            on_label,
            structured,
            temperature,
            seed,
            max_side,
            on_refusal,
            neighbors,
        )
        self._given = backend
        self.backend = make_backend(backend, model, options)
        self.verdict_backend = self._for_verdict(verdict_model, model, options)
        self.cache = cache
        self.price = price

    def _for_verdict(self, wanted: str | None, model: str, options: dict[str, Any]) -> Any:
        if wanted is None:
            return self.backend
        kind, given = (str(name).partition(":")[0].replace("https", "http") for name in (wanted, self._given))
        if kind in ("http", "openai", "transformers"):
            return make_backend(wanted, model, options if kind == given else {})
        for_model = getattr(self.backend, "for_model", None)
        if for_model is None:
            raise InputError(
                f"verdict_model is {wanted!r}: a name needs a backend that is a URL; give a URL or "
                "transformers:MODEL"
            )
        return for_model(wanted)

    def run(
        self,
        memes: Iterable[Meme],
        concurrency: int = 16,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> Debates:
        """Hold the debates; also where an event loop runs already, as in a notebook.

        Args:
            memes: with ids that differ.
            concurrency: memes at once.
            on_error: ``"skip"`` goes on without memes that cannot be debated (``report.failed`` lists them),
                unless the server answers nobody.
            progress: None shows a bar on a terminal.

        Returns:
            The debates in the order of the memes, whatever the concurrency.

        Raises:
            DataError: an id that occurs twice, a meme with nothing to see.
            InputError: a picture that cannot be read.
            ConfigError: the server wants another key, or does not know the model.
            BackendError: it gave no answer that can be used.
        """
        work = lambda: asyncio.run(self.arun(memes, concurrency, on_error=on_error, progress=progress))
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return work()
        found: list[Debates | BaseException] = []

        def apart() -> None:
            try:
                found.append(work())
            except BaseException as error:  # noqa: BLE001 - raised where it was asked for
                found.append(error)

        thread = threading.Thread(target=apart, daemon=True)
        thread.start()
        thread.join()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    async def arun(
        self,
        memes: Iterable[Meme],
        concurrency: int = 16,
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool | None = None,
    ) -> Debates:
        """:meth:`run` for use inside an event loop."""
        check_range("concurrency", concurrency, 1, 1 << 16)
        if on_error not in ("raise", "skip"):
            raise InputError(f"on_error is {on_error!r}, wanted 'raise' or 'skip'")
        wanted = _checked(memes)
        start = time.perf_counter()
        found: list[Debate | None] = [None] * len(wanted)
        failed: list[tuple[int, str]] = []
        silent = min(len(wanted), max(concurrency, _SILENCES))
        places = iter(range(len(wanted)))
        bar = iter(track(range(len(wanted)), "debating", enabled=progress))
        async with self.open(concurrency) as session:

            async def work() -> None:
                nonlocal silent
                for place in places:
                    try:
                        found[place] = await session.debate(wanted[place])
                    except FusionError as error:
                        if on_error == "raise" or isinstance(error, _ENDS_THE_RUN):
                            raise
                        silent -= isinstance(error, BackendError)
                        if silent <= 0 and not any(found):  # nobody answers; the others would wait in vain
                            raise
                        failed.append((place, str(error)))
                    next(bar, None)

            await _together([work() for _ in range(min(concurrency, len(wanted)))])
            next(bar, None)
            transport = _summed(self.backend, self.verdict_backend)
        done = Debates(debate for debate in found if debate is not None)
        done.report = self._report(
            session, done, [(wanted[place].id, why) for place, why in sorted(failed)], transport,
            time.perf_counter() - start,
        )  # fmt: skip
        return done

    @asynccontextmanager
    async def open(self, concurrency: int = 16) -> AsyncGenerator[Session, None]:
        """An open session, whose ``debate(meme)`` may be awaited many times at once.

        Args:
            concurrency: calls in flight, and twice as many with ``stances="parallel"``.
        """
        calls = concurrency * (2 if self.settings.stances == "parallel" else 1)
        recorded = getattr(self.backend, "debate", None)
        async with AsyncExitStack() as stack:
            stack.enter_context(_old_objects_rest())
            if recorded is not None:
                yield cast("Session", _Recorded(self.settings, recorded))
                return
            cache = None if self.cache is None else ReplyCache(self.cache)
            if cache is not None:
                stack.callback(cache.close)
            await stack.enter_async_context(self.backend.open(calls))
            if self.verdict_backend is not self.backend:
                await stack.enter_async_context(self.verdict_backend.open(calls))
            yield Session(self.settings, self.backend, self.verdict_backend, cache)

    def _report(
        self, session: Session, done: Debates, failed: list[tuple[str, str]], transport: dict[str, float],
        seconds: float,
    ) -> DebateReport:  # fmt: skip
        counts = session.counts
        cost = None
        if self.price is not None:
            cost = (
                self.price[0] * counts.paid_prompt_tokens + self.price[1] * counts.paid_completion_tokens
            ) / 1e6
        verdicts = {"harmful": 0, "harmless": 0, "none": 0}
        for debate in done:
            verdicts[debate.side or "none"] += 1
        return DebateReport(
            memes=len(done), failed=tuple(failed), calls=counts.calls, cached=counts.cached,
            prompt_tokens=counts.paid_prompt_tokens, completion_tokens=counts.paid_completion_tokens,
            prefix_tokens=counts.prefix_tokens, cost=cost, flags=dict(sorted(counts.flags.items())),
            verdicts=verdicts, transport=transport, seconds=seconds,
        )  # fmt: skip


class _Recorded(Session):
    """Looks debates up instead of holding them."""

    def __init__(self, settings: Settings, lookup: Any) -> None:
        nothing: Any = FunctionBackend(lookup)
        super().__init__(settings, nothing, nothing, None)
        self._lookup = lookup

    async def debate(self, meme: Meme) -> Debate:
        """The recorded debate."""
        found: Debate = self._lookup(meme)
        for flag in found.flags:
            self.counts.flags[flag] = self.counts.flags.get(flag, 0) + 1
        return found


def make_backend(spec: Any, model: str, options: Mapping[str, Any]) -> Any:
    """The backend that an argument names.

    Raises:
        InputError: it names none, or an option that the backend does not have.
    """
    try:
        if isinstance(spec, str):
            kind, _, rest = spec.partition(":")
            if kind in ("http", "https"):
                from meme_debate.backends.http import HttpBackend

                return HttpBackend(spec, model, **options)
            if kind == "openai" and rest:
                from meme_debate.backends.openai_client import OpenAIBackend

                return OpenAIBackend(rest, **options)
            if kind == "transformers" and rest:
                from meme_debate.backends.local import LocalBackend

                return LocalBackend(rest, **options)
            if kind == "recorded" and rest:
                from meme_debate.backends.recorded import RecordedBackend

                return RecordedBackend(rest, **options)
            raise InputError(
                f"backend is {spec[:80]!r}, wanted a URL, 'openai:MODEL', 'transformers:MODEL', "
                "'recorded:FILE' or an async function of messages"
            )
        if hasattr(spec, "ask") or hasattr(spec, "debate"):
            return spec
        if hasattr(spec, "chat"):  # an openai.AsyncOpenAI, or one of its relatives
            from meme_debate.backends.openai_client import OpenAIBackend

            return OpenAIBackend(model, client=spec, **options)
        return FunctionBackend(spec, model, **options)
    except TypeError as error:
        raise InputError(f"backend {str(spec)[:80]!r}: {error}") from error


def _checked(memes: Iterable[Meme]) -> list[Meme]:
    wanted: dict[str, Meme] = {}
    for meme in memes:
        if meme.id in wanted:
            raise DataError(f"meme id {meme.id!r} is there twice; ids have to differ")
        wanted[meme.id] = check_shown(meme)
    return list(wanted.values())


@contextmanager
def _old_objects_rest() -> Generator[None]:
    """Leave what is there already out of garbage collections: PyTorch alone makes one take 50 ms and more."""
    if gc.get_freeze_count():  # somebody else does so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _together(work: list[Any]) -> None:
    """Await all; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as several:
        first = several.exceptions[0]
        raise first from first.__cause__


def _summed(*backends: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for backend in {id(backend): backend for backend in backends}.values():
        for name, value in (backend.counts() if hasattr(backend, "counts") else {}).items():
            total[name] = total.get(name, 0) + value
    return total

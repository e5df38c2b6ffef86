"""The client's benchmark: debates per second, latency that it adds, and prompt tokens that calls share."""

from __future__ import annotations

import asyncio
import io
import math
import random
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusion_core.bench import Row, check_target
from fusion_core.errors import InputError, require_extra
from meme_debate import prompts
from meme_debate.backends.http import HttpBackend
from meme_debate.bench_pulse import pulse
from meme_debate.bench_stub import STATEMENT, stub_process
from meme_debate.debate import Debater
from meme_debate.meme import Debate, Meme, load_debates, load_memes
from meme_debate.pictures import Picture, picture
from meme_debate.policy import Policy
from meme_debate.prompts import Call, Prompt

RATE_TARGET, LATENCY_TARGET = 500.0, 0.010
Span = tuple[float, float]
"""Start and end, seconds of the monotonic clock."""
IMAGE_TOKENS, CHARACTERS = 576, 4.3
CONCURRENCY, PICTURES = 64, 32
_WORDS = "when you find out that the thing you praised all week is not what anybody thought it was"
_CAPTION = (
    "a photograph of a large thing on a wooden table before a window, with a person behind it in daylight"
)


def made_memes(folder: Path, count: int, size: int = 40_000, name: str = "m") -> list[Meme]:
    """Memes whose pictures are JPEG files of about ``size`` bytes."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    draw = random.Random(0)  # noqa: S311 - noise, no secret
    for number in range(PICTURES):
        path = folder / f"{size}-{number}.jpg"
        if not path.exists():
            side = round(math.sqrt(size / 0.26))
            out = io.BytesIO()
            noise = Image.frombytes("RGB", (side, side), draw.randbytes(3 * side * side))
            noise.save(out, "JPEG", quality=25)
            path.write_bytes(out.getvalue())
        paths.append(path)
    return [Meme(f"{name}{i}", paths[i % PICTURES], f"{_WORDS} {name} {i}", _CAPTION) for i in range(count)]


class Took(NamedTuple):
    """Seconds of the clock, and of this process's processor time."""

    clock: float
    processor: float


def _since(start: Took) -> Took:
    return Took(time.perf_counter() - start.clock, time.process_time() - start.processor)


def _now() -> Took:
    return Took(time.perf_counter(), time.process_time())


async def _hold(debater: Debater, memes: Sequence[Meme]) -> Took:
    """What all debates took, the opening of session and cache not counted."""
    async with debater.open(CONCURRENCY) as session:
        left = iter(memes)

        async def work() -> None:
            for meme in left:
                await session.debate(meme)

        start = _now()
        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        return _since(start)


@asynccontextmanager
async def _posting(url: str) -> AsyncGenerator[Callable[[bytes], Awaitable[None]], None]:
    """Gives what posts a body by aiohttp alone and reads the answer."""
    aiohttp: Any = require_extra("aiohttp", "bench", "meme-debate")
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post(body: bytes) -> None:
            async with session.post(f"{url}/chat/completions", data=body, headers=headers) as answer:
                await answer.read()

        yield post


async def _bare(url: str, bodies: Sequence[bytes]) -> Took:
    """What the same posts take by aiohttp alone."""
    async with _posting(url) as post:
        left = iter(bodies)

        async def work() -> None:
            for body in left:
                await post(body)

        start = _now()
        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        return _since(start)


async def _arriving(job: Callable[[int], Awaitable[object]], count: int, rate: float) -> list[Span]:
    """Each job's planned start and its end, starts being a Poisson process; job 0 warms up."""
    draw = random.Random(1)  # noqa: S311 - arrivals, no secret
    spans: list[Span] = []
    await job(0)
    clock = asyncio.get_running_loop().time
    at = clock() + 0.05

    async def one(number: int, planned: float) -> None:
        await job(number)
        spans.append((planned, clock()))

    tasks: list[asyncio.Task[None]] = []
    for number in range(1, count):
        at += draw.expovariate(rate)
        if (wait := at - clock()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(number, at)))
    await asyncio.gather(*tasks)
    return spans


async def _offered(debater: Debater, memes: Sequence[Meme], rate: float) -> list[Span]:
    """Start and end of each debate where ``rate`` of them begin in a second."""
    async with debater.open(CONCURRENCY * 4) as session:
        return await _arriving(lambda number: session.debate(memes[number]), len(memes), rate)


async def _offered_bare(url: str, bodies: Sequence[bytes], calls: int, rate: float) -> list[Span]:
    """The same for as many posts one after the other, by aiohttp alone."""
    async with _posting(url) as post:

        async def talk(number: int) -> None:
            for body in bodies[number * calls : (number + 1) * calls]:
                await post(body)

        return await _arriving(talk, len(bodies) // calls, rate)


def _bodies(memes: Sequence[Meme], swap: bool) -> list[bytes]:
    backend = HttpBackend("http://127.0.0.1/v1", "stub")
    return [
        backend.body(call) for meme in memes for call in calls(meme, "A " + STATEMENT, STATEMENT, swap=swap)
    ]


def calls(
    meme: Meme, harmful: str, harmless: str, *, swap: bool = True, policy: Policy | None = None
) -> list[Call]:
    """The calls of one round about a meme, as :class:`Debater` makes them."""
    policy = policy or Policy()
    shown = None if meme.image is None else _picture(meme.image)
    prompt = Prompt(prompts.system(policy), shown, prompts.prefix(meme.text, meme.caption))
    tasks = [
        (prompts.stance("harmful", policy), 256),
        (prompts.stance("harmless", policy), 256),
        (prompts.verdict(harmful, harmless), 32),
        (prompts.verdict(harmless, harmful), 32),
    ]
    return [Call("", prompt, suffix, tokens) for suffix, tokens in tasks[: 4 if swap else 3]]


def _picture(image: Any) -> Picture:
    return image if isinstance(image, Picture) else picture(image)


def rate_rows(folder: Path, url: str, *, debates: int, repeats: int, size: int, swap: bool) -> list[Row]:
    """Debates per second with the cache on, and calls per second against aiohttp alone, in turn."""
    runs: tuple[list[Took], list[Took]] = ([], [])
    number = 4 if swap else 3
    for turn in range(repeats + 1):
        memes = made_memes(folder, debates, size, f"t{turn}-{size}-{number}-")
        debater = Debater(url, "stub", cache=folder / f"{turn}-{size}-{number}.sqlite", swap=swap)
        bodies = _bodies(memes, swap)
        jobs = [lambda d=debater, m=memes: _hold(d, m), lambda b=bodies: _bare(url, b)]
        for which in ((0, 1), (1, 0))[turn % 2]:
            took = asyncio.run(jobs[which]())
            if turn:  # the first turn warms up
                runs[which].append(took)
    ours, bare = ([took.clock for took in run] for run in runs)
    cpu = [statistics.median(took.processor for took in run) / debates / number * 1e3 for run in runs]
    label = f"{size // 1000} kB pictures, {number} calls a debate, cache on"
    rate = debates / statistics.median(ours)
    each = [t / debates / number for t in (statistics.median(ours), statistics.median(bare))]
    ratios = sorted(b / a for a, b in zip(ours, bare, strict=True))
    return [
        Row(
            name=f"debates/s, {label}", ratio=rate / RATE_TARGET, ours_s=1.0 / rate,
            reference_s=1.0 / RATE_TARGET, reference="the target, 500 debates/s", repeats=repeats,
            target=">= 1", met=check_target(rate / RATE_TARGET, ">= 1"), note=f"{rate:.0f} debates/s",
        ),
        Row(
            name=f"calls/s against bare aiohttp, {label}", ratio=each[1] / each[0], ours_s=each[0],
            reference_s=each[1], reference="aiohttp, the same bodies", ratio_low=ratios[0],
            ratio_high=ratios[-1], repeats=repeats, target=">= 0.5",
            met=check_target(each[1] / each[0], ">= 0.5"),
            note=f"{1 / each[0]:.0f} of {1 / each[1]:.0f} calls/s; the interval is the range; processor time "
            f"a call {cpu[0]:.2f} and {cpu[1]:.2f} ms, {cpu[1] / cpu[0]:.2f}",
        ),
    ]  # fmt: skip


def latency_rows(
    folder: Path,
    url: str,
    *,
    rate: float,
    seconds: float,
    repeats: int,
    swap: bool,
    target: str | None = ">= 1",
) -> list[Row]:
    """The 99th percentile of what a debate takes beside a server that answers at once, median of runs.

    Of all debates, and of those that no slowness of the machine met (:mod:`meme_debate.bench_pulse`).
    """
    number = 4 if swap else 3
    ours, bare = _Runs(), _Runs()
    for turn in range(repeats):
        memes = made_memes(folder, round(rate * seconds), 40_000, f"l{turn}-{number}-{rate:g}-")
        debater = Debater(url, "stub", cache=folder / f"latency-{turn}-{number}-{rate:g}.sqlite", swap=swap)
        bodies = _bodies(memes, swap)
        bare.add(lambda b=bodies: _offered_bare(url, b, number, rate))
        ours.add(lambda d=debater, m=memes: _offered(d, m, rate))
    name = f"added latency p99, {rate:.0f} debates/s offered, {number} calls"
    kept = f"; {ours.kept:.0%} of the debates, {bare.kept:.0%} of aiohttp's"
    slow = f"; {(ours.slow + bare.slow) / 2:.1%} of the beats were slow"
    found: list[Row] = []
    for which, label, more in ((0, name, slow), (1, f"{name}, while the machine keeps its speed", kept)):
        p50, p99 = ours.percentiles(which)
        median = statistics.median(p99) / 1e3
        ratio = LATENCY_TARGET / median
        row = Row(
            name=label, ratio=ratio, ours_s=median, reference_s=LATENCY_TARGET,
            reference="the target, 10 ms", repeats=repeats, target=target,
            met=None if target is None else check_target(ratio, target),
            note=f"p50 {_median_of(p50)} ms, p99 {_median_of(p99)} ms, the stub's own time counted as added; "
            f"bare aiohttp with the same posts {' and '.join(map(_median_of, bare.percentiles(which)))} ms; "
            f"medians and ranges{more}",
        )  # fmt: skip
        found.append(row)
    return found


class _Runs:
    """Debates that arrived by themselves, in several runs, with the machine's pulse meanwhile."""

    def __init__(self) -> None:
        self.all: list[NDArray[np.float64]] = []
        self.steady: list[NDArray[np.float64]] = []
        self.beats: list[NDArray[np.bool_]] = []

    def add(self, run: Callable[[], Coroutine[Any, Any, list[Span]]]) -> None:
        with pulse() as machine:
            spans = asyncio.run(run())
        took = np.diff(np.array(spans))[:, 0]
        self.all.append(took)
        self.steady.append(took[machine.steady(spans)])
        self.beats.append(machine.slow)

    @property
    def kept(self) -> float:
        """The share of debates that no slowness met."""
        return sum(map(len, self.steady)) / sum(map(len, self.all))

    @property
    def slow(self) -> float:
        """The share of slow beats."""
        return float(np.concatenate(self.beats).mean())

    def percentiles(self, steady: int) -> list[list[float]]:
        """The 50th and the 99th percentile of each run, ms, each sorted."""
        runs = [run for run in (self.steady if steady else self.all) if len(run)] or [np.array([np.nan])]
        return [
            sorted(float(np.quantile(run, q, method="inverted_cdf")) * 1e3 for run in runs)
            for q in (0.5, 0.99)
        ]


def _median_of(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} [{values[0]:.1f}, {values[-1]:.1f}]"


def cached_row(folder: Path, url: str, *, debates: int) -> Row:
    """Debates per second where every reply is in the cache; no target."""
    memes = made_memes(folder, debates, 40_000, "c")
    debater = Debater(url, "stub", cache=folder / "cached.sqlite")
    first = asyncio.run(_hold(debater, memes)).clock
    second = asyncio.run(_hold(debater, memes)).clock
    return Row(
        name="second run, all replies cached", ratio=first / second, ours_s=second / debates,
        reference_s=first / debates, reference="the first run", note=f"{debates / second:.0f} debates/s",
    )  # fmt: skip


def encode_row(*, side: int = 2000, repeats: int = 5) -> Row:
    """A picture that is made smaller, against one that is sent as it is; no target."""
    from PIL import Image

    def data(size: int) -> bytes:
        out = io.BytesIO()
        Image.effect_mandelbrot((size, size), (-2, -1.5, 1, 1.5), 60).convert("RGB").save(out, "JPEG")
        return out.getvalue()

    def clock(content: bytes) -> float:
        start = time.perf_counter()
        picture(content)
        return time.perf_counter() - start

    large, small = data(side), data(640)
    slow = statistics.median(clock(large) for _ in range(repeats))
    fast = statistics.median(clock(small) for _ in range(repeats))
    return Row(
        name=f"picture of {side} px made smaller", ratio=fast / slow, ours_s=slow, reference_s=fast,
        reference="one of 640 px sent as it is", repeats=repeats,
        note="in a thread where a file has over 1 MiB; not part of the rows above",
    )  # fmt: skip


def _tokens(call: Call) -> list[tuple[str, float]]:
    image = [] if call.prompt.picture is None else [(call.prompt.picture.digest, float(IMAGE_TOKENS))]
    texts = (call.prompt.system, call.prompt.prefix, call.suffix)
    parts = [(text, len(text) / CHARACTERS) for text in texts]
    return [parts[0], *image, *parts[1:]]


def shared_tokens(call: Call, first: Call) -> tuple[float, float]:
    """Prompt tokens that a call has in common with the first from the start on, and all of its tokens.

    A token is 4.3 characters of text; a picture is 576.
    """
    common = 0.0
    for (ours, tokens), (theirs, _) in zip(_tokens(call), _tokens(first), strict=True):
        if ours != theirs:
            same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            common += same / CHARACTERS
            break
        common += tokens
    return common, sum(tokens for _, tokens in _tokens(call))


def prefix_rows(memes: Sequence[Meme], debates: Sequence[Debate]) -> list[Row]:
    """Shares of the prompt that a server with a prefix cache does not read again."""
    stance: list[float] = []
    verdict: list[float] = []
    whole = paid = 0.0
    for meme, debate in zip(memes, debates, strict=True):
        first, second, *verdicts = calls(meme, debate.harmful, debate.harmless)
        shares = [shared_tokens(call, first) for call in (second, *verdicts)]
        stance.append(shares[0][0] / shares[0][1])
        verdict += [common / total for common, total in shares[1:]]
        length = shared_tokens(first, first)[1]
        whole += length + sum(total for _, total in shares)
        paid += length + sum(total - common for common, total in shares)
    rows: list[Row] = []
    for name, ratio, target in (
        ("prompt tokens shared with the first call, second stance", statistics.mean(stance), ">= 0.9"),
        ("prompt tokens shared with the first call, verdict", statistics.mean(verdict), ">= 0.65"),
        ("prefill of four calls, without / with prefix cache", whole / paid, ">= 2.3"),
    ):
        rows.append(
            Row(
                name=name, ratio=ratio, reference="no sharing", target=target,
                met=check_target(ratio, target),
                note=f"counted over {len(memes)} memes, {IMAGE_TOKENS} image tokens, 4.3 characters a token",
            )
        )  # fmt: skip
    return rows


def _texts(memes: Path | None, debates: Path | None) -> tuple[list[Meme], list[Debate]]:
    shown: Any = Picture("0", "image/jpeg", b"")
    if memes is None or debates is None:
        made = [Meme(f"m{i}", shown, f"{_WORDS} {i}", _CAPTION) for i in range(100)]
        return made, [Debate(meme.id, STATEMENT, "Again: " + STATEMENT) for meme in made]
    found = load_memes(memes)
    known = {debate.id: debate for debate in load_debates(debates)}
    pairs = [(meme, known[meme.id]) for meme in found if meme.id in known]
    if not pairs:
        raise InputError(f"{debates} holds no debate about a meme of {memes}")
    return [Meme(m.id, shown, m.text, m.caption) for m, _ in pairs], [debate for _, debate in pairs]


def rows(
    *,
    debates: int = 500,
    repeats: int = 5,
    rate: float = 250.0,
    seconds: float = 4.0,
    memes: Path | None = None,
    recorded: Path | None = None,
) -> Iterator[Row]:
    """Measure the client against a stub in another process.

    Args:
        debates: of each timed run.
        repeats: timed runs, of the latency too.
        rate: debates a second that are offered for the latency.
        seconds: so long in each run.
        memes: count shared prompt tokens over these memes (with ``recorded``) instead of made ones.
        recorded: ``debates.jsonl`` of them.
    """
    with tempfile.TemporaryDirectory() as name, stub_process() as url:
        folder = Path(name)
        for swap in (True, False):
            yield from rate_rows(folder, url, debates=debates, repeats=repeats, size=40_000, swap=swap)
            offered: Any = {"seconds": seconds, "repeats": repeats, "swap": swap}
            yield from latency_rows(folder, url, rate=rate, **offered)
            if not swap:  # what the whole rate is to a machine twice as fast
                yield from latency_rows(folder, url, rate=rate / 2, target=None, **offered)
        yield cached_row(folder, url, debates=debates)
    yield encode_row()
    yield from prefix_rows(*_texts(memes, recorded))

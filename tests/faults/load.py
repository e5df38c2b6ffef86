"""Load every server with good, slow and broken clients: no error but the clients', flat memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.forking import Child, command, serving
from faults.kill import fill

EXPECTED = ("listening on ", "WARNING:  Invalid HTTP request received.")
"""What a server may say: where it is, and uvicorn's line about a client that does not speak HTTP."""
CLIENTS = {
    "good": 33, "reconnecting": 6, "slow": 8, "cuts its request": 4, "cuts the answer": 4, "garbage": 3,
    "garbage after the answer": 1, "too large": 3, "wrong method": 1, "health": 1,
}  # fmt: skip
"""64 clients at once, by what they do."""
GOOD = ("good", "reconnecting", "slow", "health")
PACE = 0.1
LIMIT = 8 << 20
GROWTH = 2 << 20
"""What the memory may grow by in the second half, in bytes: more is a leak at any load worth serving."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A command line that serves.

    Args:
        name: as people call it.
        main: ``module:function``.
        argv: its words; it has to take port 0 and say where it listens.
        make: fills the folder of inputs.
        request: a well-formed body for the path; two differ.
        path: that takes it by POST.
        health: that answers a GET.
        serve: gives the script of a server that it asks.
    """

    name: str
    main: str
    argv: tuple[str, ...]
    make: Callable[[Path], None]
    request: Callable[[random.Random], Any]
    path: str
    health: str = "/healthz"
    serve: Callable[[], Any] | None = None


@dataclass
class Told:
    """What the clients were told."""

    answers: dict[str, Counter[str]] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)

    def note(self, kind: str, answer: str) -> None:
        """Count an answer."""
        self.answers.setdefault(kind, Counter())[answer] += 1


class Client:
    """One client among many, until the time is over.

    Args:
        server: what is loaded.
        port: where it listens.
        kind: of :data:`CLIENTS`.
        number: of the client, for its draws.
        told: takes the answers.
        pace: seconds between two bytes of a slow client.
    """

    def __init__(
        self, server: Server, port: int, kind: str, number: int, told: Told, pace: float = PACE
    ) -> None:
        self.server, self.port, self.kind, self.told, self.pace = server, port, kind, told, pace
        self.draw = random.Random(number)
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def run(self, end: float) -> None:
        """Ask again and again."""
        acts: dict[str, Callable[[], Awaitable[None]]] = {
            "good": self._good,
            "reconnecting": self._good,
            "slow": self._slow,
            "cuts its request": self._cut_request,
            "cuts the answer": self._cut_answer,
            "garbage": self._garbage,
            "garbage after the answer": self._garbage_late,
            "too large": self._too_large,
            "wrong method": self._wrong_method,
            "health": self._health,
        }
        while time.monotonic() < end:
            try:
                await acts[self.kind]()
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                self.told.note(self.kind, type(error).__name__)
                if self.kind in GOOD:
                    self.told.wrong.append(f"{self.kind}: {type(error).__name__} {error}")
                self.close()
            if self.kind != "good":
                self.close()
        self.close()

    def close(self) -> None:
        """Leave."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.reader is None or self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self.reader, self.writer

    def _body(self) -> bytes:
        return json.dumps(self.server.request(self.draw)).encode()

    def _message(self, body: bytes, *more: str, method: str = "POST", length: int | None = None) -> bytes:
        size = len(body) if length is None else length
        lines = [f"{method} {self.server.path} HTTP/1.1", "Host: x", "Content-Type: application/json", *more]
        return "\r\n".join([*lines, f"Content-Length: {size}", "", ""]).encode() + body

    async def _answer(self) -> tuple[int, dict[str, str], bytes]:
        reader, _ = await self._connected()
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await asyncio.wait_for(reader.readexactly(int(headers.get("content-length", 0))), 60)
        return int(first.split()[1]), headers, body

    async def _judge(self) -> int:
        """Read an answer to a good request; only 200, or a busy server that says when to come again."""
        status, headers, body = await self._answer()
        self.told.note(self.kind, str(status))
        if status in (429, 503) and headers.get("retry-after", "").isdigit():
            self.close()
            await asyncio.sleep(min(float(headers["retry-after"]), 2.0))
        elif status != 200:
            self.told.wrong.append(f"{self.kind}: {status} {headers.get('retry-after')} {body[:160]!r}")
        elif headers.get("connection") == "close":
            self.close()
        return status

    async def _good(self) -> None:
        _, writer = await self._connected()
        start = time.monotonic()
        writer.write(self._message(self._body()))
        await writer.drain()
        if await self._judge() == 200:
            self.told.latencies.append(time.monotonic() - start)

    async def _health(self) -> None:
        _, writer = await self._connected()
        writer.write(f"GET {self.server.health} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await writer.drain()
        await self._judge()
        await asyncio.sleep(0.2)

    async def _slow(self) -> None:
        """A byte each tenth of a second; the answer's first line is read so, too."""
        reader, writer = await self._connected()
        body = min((self._body() for _ in range(8)), key=len)
        for byte in self._message(body):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(self.pace)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await asyncio.wait_for(reader.readexactly(1), 60)
            if len(head) < 20:
                await asyncio.sleep(self.pace)
        status = head.split()[1].decode()
        self.told.note(self.kind, status)
        if status != "200" and not (status in ("429", "503") and b"retry-after" in head.lower()):
            self.told.wrong.append(f"slow: {head[:200]!r}")

    async def _cut_request(self) -> None:
        _, writer = await self._connected()
        message = self._message(self._body())
        writer.write(message[: self.draw.randrange(1, len(message))])
        await writer.drain()
        await asyncio.sleep(self.draw.random() * 0.3)
        writer.transport.abort() if self.draw.random() < 0.5 else None
        self.told.note(self.kind, "gone")

    async def _cut_answer(self) -> None:
        reader, writer = await self._connected()
        writer.write(self._message(self._body()))
        await writer.drain()
        if self.draw.random() < 0.5:
            await asyncio.wait_for(reader.read(1 + self.draw.randrange(60)), 60)
        writer.transport.abort()
        self.told.note(self.kind, "gone")
        await asyncio.sleep(0.05)

    async def _garbage(self) -> None:
        _, writer = await self._connected()
        junk = self.draw.randbytes(self.draw.randrange(1, 3000))
        choices = [
            junk + b"\r\n\r\n",
            self._message(junk),
            self._message(b"[" * 100_000),
            self._message(b'{"memes": ' + b"9" * 5000 + b"}"),
            self._message(b'{"x": "\\ud800"}'),
            self._message(b'{"memes": NaN}'),
            self._message(b'{"memes": [{"text": "\\ud800", "id": 1e999}]}'),
            b"POST " + self.server.path.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
            b"GET /%00%ff/../.. HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"b" * 70_000 + b"\r\n\r\n",
            self._message(b"zz\r\n{}", "Transfer-Encoding: chunked"),
        ]
        writer.write(self.draw.choice(choices))
        await writer.drain()
        await self._clients_fault()

    async def _garbage_late(self) -> None:
        """A body that goes on, and turns bad, when the answer is there already."""
        reader, writer = await self._connected()
        writer.write(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        await writer.drain()
        await self._clients_fault()
        writer.write(b"zz\r\n" + self.draw.randbytes(self.draw.randrange(100)))
        await writer.drain()
        await asyncio.wait_for(reader.read(), 60)
        await asyncio.sleep(0.1)

    async def _too_large(self) -> None:
        _, writer = await self._connected()
        if self.draw.random() < 0.5:
            writer.write(self._message(b"", length=LIMIT + 1))
        else:
            head = f"POST {self.server.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
            piece = b"x" * (1 << 16)
            for _ in range((LIMIT >> 16) + 2):
                writer.write(b"10000\r\n" + piece + b"\r\n")
                await writer.drain()
        await writer.drain()
        await self._clients_fault()
        await asyncio.sleep(0.3)

    async def _wrong_method(self) -> None:
        _, writer = await self._connected()
        method, path = (
            self.draw.choice(("PUT", "DELETE", "GET")),
            self.draw.choice((self.server.path, "/nowhere")),
        )
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        await self._clients_fault()
        await asyncio.sleep(0.1)

    async def _clients_fault(self) -> None:
        """The answer to a bad request is that it is bad, or the connection is closed."""
        status, headers, body = await self._answer()
        self.told.note(self.kind, str(status))
        busy = status in (429, 503) and "retry-after" in headers
        if not (400 <= status < 500 or busy):
            self.told.wrong.append(f"{self.kind}: {status} {body[:160]!r}")


async def _all(server: Server, port: int, pid: int, seconds: float, seed: int) -> Told:
    told, end = Told(), time.monotonic() + seconds
    kinds = [kind for kind, count in CLIENTS.items() for _ in range(count)]
    pace = PACE * min(1.0, seconds / 60)
    clients = [Client(server, port, kind, seed * 1000 + n, told, pace) for n, kind in enumerate(kinds)]

    async def watch() -> None:
        start = time.monotonic()
        while time.monotonic() < end:
            told.memory.append((time.monotonic() - start, _memory(pid)))
            await asyncio.sleep(max(0.02, min(0.5, seconds / 60)))

    await asyncio.gather(watch(), *(client.run(end) for client in clients))
    return told


def _memory(pid: int) -> float:
    """Resident bytes; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return float(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0.0


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The line through the later half: its rise over that half, and the spread around it.

    Args:
        points: (seconds, bytes), in order.

    Example:
        >>> slope([(0, 5), (1, 5), (2, 7), (3, 8)])
        (1.0, 0.0)
    """
    later = list(points[len(points) // 2 :])
    if len(later) < 2:
        return 0.0, 0.0
    times, values = zip(*later, strict=True)
    rise, base = statistics.linear_regression(times, values)
    spread = statistics.pstdev([v - (rise * t + base) for t, v in later])
    return rise * (times[-1] - times[0]), spread


def load(server: Server, place: Path, inputs: Path, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Load one server for some seconds, end it, and tell what came of it.

    Args:
        server: which.
        place: a folder to work in.
        inputs: filled by ``server.make``.
        seconds: how long.
        seed: of the clients' draws.
    """
    place.mkdir(parents=True, exist_ok=True)
    with serving(server.serve) as url:
        words = [word.replace("{in}", str(inputs)).replace("{url}", url) for word in server.argv]
        child = Child(command(server.main, words), place, timeout=3600)
        try:
            port = _port(child)
            told = asyncio.run(_all(server, port, child.pid, seconds, seed))
            left = asyncio.run(_metrics(port))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
            asked = time.monotonic()
        done = child.wait(patience=30)
    return _row(server, told, left, done, time.monotonic() - asked, seconds)


def _row(server: Server, told: Told, left: str, done: Any, ended: float, seconds: float) -> dict[str, Any]:
    took = sorted(told.latencies)
    rise, spread = slope(told.memory)
    wrong = sorted(set(told.wrong))
    if not took:
        wrong.append("no good request was answered")
    if rise > max(GROWTH, 2 * spread):
        wrong.append(f"memory grew by {rise / 2**20:.1f} MiB in the second half, spread {spread / 2**20:.1f}")
    if "http_requests_in_flight 0" not in left:
        wrong.append("requests are in flight although all clients are gone")
    if done.code not in (0, -signal.SIGTERM):
        wrong.append(f"ended with {done.code} after SIGTERM")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(EXPECTED)]
    if lines:
        wrong.append(f"on stderr: {' / '.join(lines[-6:])[:600]}")
    at = lambda share: round(took[min(int(share * len(took)), len(took) - 1)], 4) if took else None
    return {
        "name": server.name, "clients": sum(CLIENTS.values()), "seconds": seconds, "good": len(took),
        "p50_s": at(0.5), "p99_s": at(0.99), "answers": {k: dict(v) for k, v in sorted(told.answers.items())},
        "memory_mib": round(told.memory[-1][1] / 2**20, 1) if told.memory else None,
        "rise_mib": round(rise / 2**20, 3), "spread_mib": round(spread / 2**20, 3), "end_s": round(ended, 2),
        "wrong": wrong,
    }  # fmt: skip


def _port(child: Child) -> int:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", child.said("stderr")):
            return int(found[1])
        time.sleep(0.05)
    raise TimeoutError(f"the server does not listen: {child.said('stderr')[-1000:]}")


async def _metrics(port: int) -> str:
    """What the server counts once all clients are gone."""
    await asyncio.sleep(1.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    text = (await asyncio.wait_for(reader.read(), 30)).decode()
    writer.close()
    return text


def run(
    servers: Sequence[Server], place: Path, seconds: int, seed: int, report: Callable[[Any], None]
) -> bool:
    """Load every server of a list; true where nothing went wrong.

    Args:
        servers: which.
        place: a folder to work in.
        seconds: for each.
        seed: of the clients' draws.
        report: called with the row of each server as it is done.
    """
    good = True
    for server in servers:
        row = load(server, place / "load", fill(server.make, place), seconds, seed)
        good = good and not row["wrong"]
        report(row)
        sys.stderr.write(f"{json.dumps({k: v for k, v in row.items() if k != 'wrong'})}\n")
        sys.stderr.write("".join(f"    {words}\n" for words in row["wrong"]))
    return good

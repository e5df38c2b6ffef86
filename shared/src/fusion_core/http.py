"""Many requests to few hosts: one pooled session, retries that listen to the server, a rate per host.

The transport is pyreqwest (extra ``http``), loaded by the first :class:`Client` that is entered: it sends and
receives in a thread outside of Python's lock, so that the event loop has little to do for a call.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from fusion_core.errors import FusionError, InputError, check_range, require_extra

if TYPE_CHECKING:
    import pyreqwest.client
    import pyreqwest.response
    import pyreqwest.types

_IDLE = timedelta(seconds=15)  # of a kept connection; many servers close theirs after some more
_LONGEST = 1e9  # seconds, some thirty years: a timedelta ends somewhere
_SECRET = ("authorization", "api-key", "x-api-key", "cookie", "proxy-authorization")
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0


class RequestError(FusionError):
    """A request that was given up.

    Attributes:
        tries: how often it was sent.
        status: the last status, None where no answer came.
        body: the beginning of the last answer, without the credentials that the request carried.
    """

    def __init__(self, message: str, *, tries: int = 1, status: int | None = None, body: str = "") -> None:
        super().__init__(message)
        self.tries = tries
        self.status = status
        self.body = body


class Response(NamedTuple):
    """An answer that was read to its end.

    Attributes:
        status: 200 to 299.
        headers: case-insensitive.
        body: bytes.
        tries: how often the request was sent, at least 1.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    tries: int = 1

    @property
    def text(self) -> str:
        """The body as UTF-8; what is none becomes the replacement sign."""
        return self.body.decode("utf-8", errors="replace")

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            RequestError: it is none; the message says what came instead.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            kind = self.headers.get("Content-Type", "nothing named")
            raise RequestError(
                f"wanted JSON, got {len(self.body)} bytes of {kind}: {self.text[:80]!r}",
                tries=self.tries, status=self.status, body=self.text[:500],
            ) from error  # fmt: skip


@dataclass(slots=True)
class Stats:
    """What a client did so far; ``waited`` is seconds, summed over requests."""

    requests: int = 0
    tries: int = 0
    retries: int = 0
    failed: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    waited: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """The counters by name."""
        return asdict(self)


class _Host:
    """A token bucket, and the pause that the host asked for."""

    __slots__ = ("at", "paused", "rate", "tokens")

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self.tokens = max(1.0, rate or 1.0)
        self.at = time.monotonic()
        self.paused = 0.0

    def delay(self) -> float:
        """Take a token; seconds until it is there."""
        if self.rate is None and not self.paused:
            return 0.0
        now = time.monotonic()
        wait = max(self.paused - now, 0.0)
        if self.rate is not None:
            self.tokens = min(max(1.0, self.rate), self.tokens + (now - self.at) * self.rate) - 1.0
            self.at = now
            wait = max(wait, -self.tokens / self.rate)
        return wait


class _Asking(NamedTuple):
    """What a request sends, the same in each try."""

    method: str
    url: str
    data: bytes | None
    json: Any
    params: pyreqwest.types.QueryParams | None
    headers: Mapping[str, str] | None


class Client:
    """An asynchronous HTTP client for many requests.

    A try that meets 408, 429, 5xx, a timeout or a cut connection is repeated after an exponentially growing
    wait with jitter, or after what ``Retry-After`` says (then every request to that host waits). Any other
    status of 300 and more is an error at once. Connections, cookies and credentials are not shared between
    clients; nothing is read from the environment, and nothing of a request's headers is ever in a message.

    Args:
        concurrency: requests in flight, >= 1; one that waits for its next try does not count.
        rate: most requests per second and host, None for no limit; a second's worth may go at once.
        retries: tries after the first, >= 0.
        timeout: seconds of one try, from its connection to the last byte.
        headers: sent with every request.
        max_body: longest answer that is read, in bytes.
        max_wait: longest ``Retry-After`` that is heeded, in seconds; a longer one ends the request.
        follow_redirects: go where a 3xx points to, ten times at most; without it a 3xx is an error.

    Raises:
        ConfigError: a number outside its range.
        InputError: a header that cannot be sent (on entering).
        MissingExtraError: pyreqwest is not installed (on entering).

    Example:
        >>> from fusion_core.testing.server import FaultServer
        >>> async def ask(url):
        ...     async with Client(retries=1) as client:
        ...         return (await client.request("GET", url)).json()
        >>> with FaultServer([{"status": 503, "retry_after": 0}, {"json": {"answer": 42}}]) as server:
        ...     asyncio.run(ask(server.url))
        {'answer': 42}
    """

    def __init__(
        self,
        concurrency: int = 8,
        rate: float | None = None,
        retries: int = 5,
        timeout: float = 60.0,
        headers: Mapping[str, str] | None = None,
        *,
        max_body: int = 64 << 20,
        max_wait: float = 120.0,
        follow_redirects: bool = True,
    ) -> None:
        self.concurrency = int(check_range("concurrency", concurrency, 1, float("inf")))
        self.rate = None if rate is None else check_range("rate", rate, 0, float("inf"), open=True)
        self.retries = int(check_range("retries", retries, 0, float("inf")))
        self.timeout = check_range("timeout", timeout, 0, float("inf"), open=True)
        self.headers = dict(headers or {})
        self.max_body = max_body
        self.max_wait = max_wait
        self.follow_redirects = follow_redirects
        self.stats = Stats()
        self._hosts: dict[str, _Host] = {}
        self._urls: dict[str, _Host] = {}
        self._random = random.SystemRandom()
        self._session: pyreqwest.client.Client | None = None
        self._errors: Any = None
        self._slots = asyncio.Semaphore(self.concurrency)

    async def __aenter__(self) -> Client:
        """Open the session."""
        require_extra("pyreqwest", "http", "fusion-core")
        import pyreqwest.client
        import pyreqwest.exceptions

        self._errors = pyreqwest.exceptions
        self._session = (
            pyreqwest.client.ClientBuilder()
            .default_headers(_sendable(self.headers))
            .timeout(timedelta(seconds=min(self.timeout, _LONGEST)))
            .pool_idle_timeout(_IDLE)
            .follow_redirects(self.follow_redirects)
            .referer(False)
            .no_proxy()
            .build()
        )
        self._slots = asyncio.Semaphore(self.concurrency)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session and its connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(
        self,
        method: str,
        url: str,
        *,
        data: bytes | None = None,
        json: Any = None,
        params: pyreqwest.types.QueryParams | None = None,
        headers: Mapping[str, str] | None = None,
        refuse: Callable[[Response], str | None] | None = None,
    ) -> Response:
        """Send a request until it is answered or given up.

        Args:
            method: such as ``"GET"``.
            url: absolute, http or https.
            data: the body.
            json: a body as JSON in place of ``data``, None for none.
            params: of the query, behind those of the URL.
            headers: further ones, which take the place of the client's.
            refuse: looks at an answer of status 200 to 299; words on what is wrong with it make it a failed
                try, as a 5xx is: a page in place of an image is a server's passing fault.

        Returns:
            The answer, status 200 to 299.

        Raises:
            RequestError: another status, or no whole answer after all tries; it has ``tries``, ``status``.
            InputError: no URL, method or header that can be sent, or the client was not entered.
        """
        if self._session is None:
            raise InputError("the client is closed; use it as: async with Client(...) as client")
        host = self._host(url)
        asking = _Asking(method, url, data, json, params, headers)
        stats = self.stats
        stats.requests += 1
        tries = 0
        while True:
            if (wait := host.delay()) > 0:
                stats.waited += wait
                await asyncio.sleep(wait)
            tries += 1
            stats.tries += 1
            status, reason, body, asked, bad = None, "", "", None, False
            try:
                async with self._slots:
                    answer = await self._once(asking, tries)
            except ValueError as error:
                raise InputError(f"url is {_shown(url)!r}, method {method!r}: {_reason(error)}") from error
            except TimeoutError:
                reason = f"no whole answer within {self.timeout:g} s"
            except self._errors.RequestError as error:
                reason = _reason(error)
            else:
                status = answer.status
                if 200 <= status < 300:
                    wrong = None if refuse is None else refuse(answer)
                    if wrong is None:
                        return answer
                    body, bad = wrong, True
                else:
                    body, bad = self._clean(answer.text[:2000], headers or {})[:500], False
                reason = f"status {status}"
                asked = _retry_after(answer.headers.get("Retry-After"))
            again = bad or status is None or status in (408, 429) or status >= 500
            if again and asked is not None and asked > self.max_wait:
                reason += f", which asks to wait {asked:.0f} s, longer than max_wait={self.max_wait:g}"
                again = False
            if not again or tries > self.retries:
                stats.failed += 1
                told = f": {' '.join(body.split())[:200]}" if body else ""
                times = "one try" if tries == 1 else f"{tries} tries"
                raise RequestError(
                    f"{method} {_shown(url)} failed after {times}, {reason}{told}",
                    tries=tries, status=status, body=body,
                )  # fmt: skip
            stats.retries += 1
            if asked is not None:
                host.paused = max(host.paused, time.monotonic() + asked)
                continue
            pause = min(_FIRST_WAIT * 2.0 ** (tries - 1), _LONGEST_WAIT) * self._random.uniform(0.5, 1.0)
            stats.waited += pause
            await asyncio.sleep(pause)

    def _host(self, url: str) -> _Host:
        if (known := self._urls.get(url)) is not None:
            return known
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = None
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url is {_shown(url)!r}, wanted one that begins with http:// or https://")
        host = self._hosts.get(parts.netloc)
        if host is None:
            host = self._hosts[parts.netloc] = _Host(self.rate)
        if len(self._urls) < 1024:
            self._urls[url] = host
        return host

    async def _once(self, asking: _Asking, tries: int) -> Response:
        assert self._session is not None
        request = self._session.request(asking.method, asking.url)
        if asking.headers:
            request = request.headers(_sendable(asking.headers))
        if asking.params is not None:
            request = request.query(asking.params)
        if asking.data is not None:
            self.stats.sent_bytes += len(asking.data)
            request = request.body_bytes(asking.data)
        elif asking.json is not None:
            request = request.body_json(asking.json)
        async with request.build_streamed() as answer:
            body = await self._read(answer, asking.url, tries)
        self.stats.received_bytes += len(body)
        return Response(answer.status, answer.headers, body, tries)

    async def _read(self, answer: pyreqwest.response.Response, url: str, tries: int) -> bytes:
        length = answer.get_header("Content-Length")  # none where the body is compressed
        if length is not None and length.isdecimal() and int(length) <= self.max_body:
            return (await answer.bytes()).to_bytes()
        pieces: list[bytes] = []
        size = 0
        while (piece := await answer.body_reader.read_chunk()) is not None:
            size += len(piece)
            if size > self.max_body:
                self.stats.failed += 1
                raise RequestError(
                    f"{_shown(url)} sent more than max_body={self.max_body} bytes",
                    tries=tries, status=answer.status,
                )  # fmt: skip
            pieces.append(piece.to_bytes())
        return b"".join(pieces)

    def _clean(self, text: str, headers: Mapping[str, str]) -> str:
        """A server's words without the credentials that the request carried."""
        for name, value in {**self.headers, **headers}.items():
            if str(name).lower() in _SECRET:
                for word in str(value).split():
                    text = text.replace(word, "***") if len(word) > 6 else text
        return text


def _sendable(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Headers that a request can carry; what is wrong is told without the value, which may be a key."""
    from pyreqwest.http import HeaderMap

    made = HeaderMap()
    for name, value in headers.items():
        try:
            made[name] = value
        except ValueError:
            raise InputError(
                f"the header {name!r} has a name or a value that cannot be sent; look for a line break in it"
            ) from None
    return made


def _reason(error: Exception) -> str:
    """Why a try failed: the innermost cause, whose words hold no URL."""
    details: dict[str, Any] = getattr(error, "details", None) or {}
    causes: list[dict[str, str]] = details.get("causes") or []
    words = causes[-1]["message"] if causes else str(error)
    return type(error).__name__ if "://" in words else words


def _shown(url: str) -> str:
    """A URL for messages: without the password and the query, where keys may stand."""
    try:
        parts = urlsplit(url)
        name = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "(not shown)"
    return f"{parts.scheme}://{name}{port}{parts.path}" if parts.scheme else parts.path


def _retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header: a number or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if seconds == seconds and seconds != float("inf") else None

"""What every server of a package has: a limit of the body, health, metrics; and uvicorn (extra ``serve``)."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

from fusion_core.errors import InputError, check_range, require_extra

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
ServedApp = TypeVar("ServedApp", bound=Any)

MAX_BODY = 8 << 20
HEALTH = ("/health", "/healthz")
METRICS = "/metrics"
_RETRY_SECONDS = 1
_MISFITS = 20
_CONNECTIONS = 16  # for each request at once: idle and slow ones are held, a flood is not
_OWN_BYTES = 128 << 10  # what glibc begins with
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class _TooLarge(Exception):  # noqa: N818 - a signal inside this module
    pass


class Guard:
    """ASGI middleware: 413 for a body over the limit, ``/health``, ``/metrics``, and the counts behind it.

    Args:
        app: what answers everything else.
        max_body: largest request body in bytes.
        gauges: further numbers of ``/metrics``: name -> value, asked at each call.
    """

    def __init__(
        self, app: App, max_body: int = MAX_BODY, gauges: Callable[[], Mapping[str, float]] | None = None
    ) -> None:
        self.app = app
        self.max_body = max_body
        self.gauges = gauges
        self.answers: dict[tuple[str, int], int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        self.in_flight = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] in ("GET", "HEAD") and scope["path"] in HEALTH:
            return await _answer(send, 200, json.dumps({"status": "ok"}), "application/json")
        if scope["method"] in ("GET", "HEAD") and scope["path"] == METRICS:
            return await _answer(send, 200, self.metrics(), _TEXT)
        start, code, started = time.perf_counter(), 500, False
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        size, announced, over = 0, int(said) if said.isdigit() else 0, False

        async def counted() -> Message:
            nonlocal size, over
            message = {} if announced > self.max_body else await receive()
            size += len(message.get("body", b""))
            if over := max(size, announced) > self.max_body:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal code, started
            if over and not started:  # the application may have made another answer of our exception
                raise _TooLarge
            if message["type"] == "http.response.start":
                code, started = message["status"], True
            await send(message)

        self.in_flight += 1
        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            code = 413
            if not started:
                words = f"the body is larger than {self.max_body} bytes"
                await _answer(send, 413, json.dumps({"detail": words}), "application/json", close=True)
        finally:
            self.in_flight -= 1
            # The route's pattern, not the path: whoever asks for made-up paths adds no series.
            route = getattr(scope.get("route"), "path", "other")
            self.answers[route, code] += 1
            self.seconds[route] += time.perf_counter() - start
        return None

    def metrics(self) -> str:
        """The counts in Prometheus' text format."""
        lines = ["# TYPE http_requests_total counter"]
        lines += [
            f'http_requests_total{{route="{route}",status="{code}"}} {count}'
            for (route, code), count in sorted(self.answers.items())
        ]
        lines.append("# TYPE http_request_seconds_total counter")
        lines += [
            f'http_request_seconds_total{{route="{route}"}} {spent:.6f}'
            for route, spent in sorted(self.seconds.items())
        ]
        lines += ["# TYPE http_requests_in_flight gauge", f"http_requests_in_flight {self.in_flight}"]
        for name, value in (self.gauges() if self.gauges else {}).items():
            lines += [f"# TYPE {name} gauge", f"{name} {float(value):g}"]
        return "\n".join(lines) + "\n"


class Limit:
    """ASGI middleware: 503 with ``Retry-After`` where too many requests are being answered.

    Health and metrics are answered always.

    Args:
        app: what answers the requests.
        concurrency: most requests at once.
    """

    def __init__(self, app: App, concurrency: int) -> None:
        self.app, self.concurrency, self.in_flight = app, concurrency, 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] != "http" or scope["path"] in (*HEALTH, METRICS):
            return await self.app(scope, receive, send)
        if self.in_flight >= self.concurrency:
            words = f"{self.concurrency} requests are being answered; come again in {_RETRY_SECONDS} s"
            return await _answer(
                send, 503, json.dumps({"detail": words}), "application/json", close=True, busy=True
            )
        self.in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.in_flight -= 1
        return None


async def _answer(
    send: Send, status: int, text: str, kind: str, *, close: bool = False, busy: bool = False
) -> None:
    body = text.encode()
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    if close:
        headers.append((b"connection", b"close"))
    if busy:
        headers.append((b"retry-after", str(_RETRY_SECONDS).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def secure(
    app: ServedApp, max_body: int = MAX_BODY, *, gauges: Callable[[], Mapping[str, float]] | None = None
) -> ServedApp:
    """Give an application limits, ``GET /health`` (alias ``/healthz``) and ``GET /metrics``.

    A body that does not fit its model gets 422 with place and reason of each misfit, without what was sent:
    it may be large, and what JSON can carry but not say (NaN, half a surrogate pair) would make the answer
    itself fail.

    Args:
        app: a FastAPI or Starlette application, changed in place.
        max_body: largest request body in bytes; a larger one gets 413, announced or not.
        gauges: further numbers of ``/metrics``: name -> value, asked at each call.

    Returns:
        The application.

    Raises:
        ConfigError: ``max_body`` is under 1.
    """
    check_range("max_body", max_body, 1, float("inf"))
    app.add_middleware(Guard, max_body=max_body, gauges=gauges)
    exceptions: Any = require_extra("fastapi.exceptions", "serve", "fusion-core")
    app.add_exception_handler(exceptions.RequestValidationError, _misfit)
    return app


async def _misfit(_: Any, error: Any) -> Any:
    responses: Any = require_extra("fastapi.responses", "serve", "fusion-core")
    found = [{key: entry[key] for key in ("type", "loc", "msg")} for entry in error.errors()[:_MISFITS]]
    return responses.Response(json.dumps({"detail": found}), 422, media_type="application/json")


def serve(app: Any, host: str = "127.0.0.1", port: int = 8000, concurrency: int = 64) -> None:
    """Run an application on uvicorn until Ctrl-C or SIGTERM; requests in flight are finished first.

    Args:
        app: any ASGI application.
        host: address to listen on; the default is reached from this machine only.
        port: 0 takes a free one.
        concurrency: requests at once, beyond which 503 with ``Retry-After`` is answered.

    Raises:
        InputError: the address cannot be used.
        MissingExtraError: uvicorn is not installed.
    """
    check_range("port", port, 0, 65535)
    check_range("concurrency", concurrency, 1, float("inf"))
    uvicorn: Any = require_extra("uvicorn", "serve", "fusion-core")
    config = uvicorn.Config(
        Limit(app, concurrency), host=host, port=port, http=_protocol(), timeout_keep_alive=5,
        limit_concurrency=_CONNECTIONS * concurrency,
        timeout_graceful_shutdown=10, server_header=False, log_level="warning",
    )  # fmt: skip
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(512)
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; name another --host or --port"
            ) from error
        give_memory_back()
        _announce(host, listener.getsockname()[1])
        uvicorn.Server(config).run(sockets=[listener])


def give_memory_back() -> bool:
    """Let blocks of 128 KiB and more go back to the system when they are freed, for the rest of the process.

    glibc begins so, and stops doing that for sizes that it has seen freed, up to 32 MiB: the bodies of
    requests then come to lie between longer-lived objects, and a server grows for hours. Whoever sets
    ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES`` is not overruled.

    Returns:
        Whether the allocator was told so; it is glibc's only that can be.
    """
    if any(os.environ.get(name) for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _OWN_BYTES))


def _protocol() -> Any:
    """The HTTP/1.1 of uvicorn on h11, which limits the size of headers, whatever else is installed.

    Where a request turns out bad after its answer has begun, uvicorn tries to answer 400 all the same, and
    that ends in a traceback; here the connection is closed.
    """
    h11: Any = require_extra("h11", "serve", "fusion-core")
    found: Any = require_extra("uvicorn.protocols.http.h11_impl", "serve", "fusion-core")

    class Protocol(found.H11Protocol):
        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:
                self.transport.close()

    return Protocol


def _announce(host: str, port: int) -> None:
    name = f"[{host}]" if ":" in host else host
    sys.stderr.write(f"listening on http://{name}:{port} (Ctrl-C stops)\n")
    sys.stderr.flush()

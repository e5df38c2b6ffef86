"""A loopback HTTP server that answers, fails, stalls and lies as a script says. Stdlib only."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """A request that came in; ``headers`` have lower-case names, ``at`` is ``time.monotonic()``."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the server does with one request.

    Attributes:
        status: of the answer.
        body: bytes or text; ``json`` takes its place where it is not None.
        json: any JSON value.
        content_type: of the answer, as it is claimed.
        headers: further ones.
        retry_after: of the header, seconds or a date.
        delay: seconds before the answer.
        cut: close the connection after so many bytes of the body, of which the full length was announced;
            -1 closes it before the status line.
        hang: never answer; the connection stays open until the server closes.
    """

    status: int = 200
    body: bytes | str = b""
    json: Any = None
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    retry_after: float | str | None = None
    delay: float = 0.0
    cut: int | None = None
    hang: bool = False


Step = Reply | Mapping[str, Any] | int
Script = Sequence[Step] | Callable[[Request], Step]


def _reply(step: Step) -> Reply:
    if isinstance(step, Reply):
        return step
    if isinstance(step, int):
        return Reply(status=step)
    if unknown := set(step) - {entry.name for entry in fields(Reply)}:
        raise TypeError(f"a reply has no {sorted(unknown)}; it takes the fields of Reply")
    return Reply(**step)


class FaultServer:
    """A server on 127.0.0.1 whose answers are given; a context manager.

    Args:
        script: the steps in order, the last of which repeats; or a function of the request that gives one
            (called by several threads at once). A step is a :class:`Reply`, a mapping of its fields, or a
            status.

    Attributes:
        requests: what came in, in order.

    Example:
        >>> import urllib.request
        >>> with FaultServer([{"json": {"ok": True}}]) as server:
        ...     urllib.request.urlopen(server.url + "/x").read(), server.requests[0].path
        (b'{"ok": true}', '/x')
    """

    def __init__(self, script: Script) -> None:
        self._script = script if callable(script) else [_reply(step) for step in script]
        if not self._script:
            raise TypeError("script is empty, wanted at least one step")
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """Base address, without a slash at its end."""
        if self._server is None:
            raise RuntimeError("the server is not running; use it as: with FaultServer(...) as server")
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultServer:
        """Start listening on a free port."""
        outer = self

        class Handler(_Handler):
            owner = outer

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; connections that hang are closed."""
        self._closing.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def answer(self, request: Request) -> Reply:
        """Log a request and give its reply."""
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
        if callable(self._script):
            return _reply(self._script(request))
        return self._script[min(number, len(self._script) - 1)]

    def wait(self, seconds: float | None) -> bool:
        """Sleep until the time is over or the server closes; True where it closes."""
        return self._closing.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one piece

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Stay silent."""

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        names = {name.lower(): value for name, value in self.headers.items()}
        reply = self.owner.answer(Request(self.command, self.path, names, body, time.monotonic()))
        if reply.hang:
            self.owner.wait(None)
            return self._drop()
        if reply.delay and self.owner.wait(reply.delay):
            return self._drop()
        if reply.cut is not None and reply.cut < 0:
            return self._drop()
        content = reply.body if reply.json is None else json.dumps(reply.json)
        data = content.encode() if isinstance(content, str) else content
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(data)))
        if reply.retry_after is not None:
            self.send_header("Retry-After", str(reply.retry_after))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if reply.cut is None else data[: reply.cut])
        self.wfile.flush()
        if reply.cut is not None:
            self._drop()
        return None

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle  # noqa: N815

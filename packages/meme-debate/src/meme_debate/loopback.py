"""A small HTTP/1.1 server on the loopback address, for stubs in processes of their own; stdlib only."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

__all__ = ["answer", "serve"]

_REASONS = {200: "OK", 503: "Service Unavailable"}


def answer(body: bytes, status: int = 200, headers: str = "") -> bytes:
    r"""A whole answer of JSON.

    Args:
        body: the document.
        status: of the answer.
        headers: further ones, each with its ``"\r\n"``.
    """
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Connection(asyncio.Protocol):
    """Reads whole requests and writes what is answered."""

    def __init__(self, reply: Callable[[bytes], bytes]) -> None:
        self.reply = reply
        self.buffer = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer
        buffer += data
        while (end := buffer.find(b"\r\n\r\n", 0, 4096)) >= 0:
            head = bytes(buffer[:end]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            whole = end + 4 + length
            if len(buffer) < whole:
                return
            body = bytes(memoryview(buffer)[end + 4 : whole])
            del buffer[:whole]
            assert self.transport is not None
            self.transport.write(self.reply(body))


async def _serve(reply: Callable[[bytes], bytes]) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(reply), "127.0.0.1", 0, backlog=512)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


def serve(reply: Callable[[bytes], bytes]) -> None:
    """Serve on a free port, which is printed, until standard input ends.

    Args:
        reply: a request's body -> a whole answer; see :func:`answer`.
    """
    asyncio.run(_serve(reply))

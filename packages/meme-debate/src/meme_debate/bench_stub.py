"""A chat-completions server that answers at once, for the benchmark: ``python -m meme_debate.bench_stub``.

It prints its port, reads whole requests and gives one of four fixed replies; it ends when its input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

STATEMENT = (
    "The picture shows a thing on a plain ground, and the words call it by a name that does not fit, "
    "so that praise turns into mockery once both are read together. "
) * 5
_TAIL = 6_000


def reply(content: str) -> bytes:
    """A whole HTTP answer."""
    body = json.dumps(
        {
            "id": "stub",
            "object": "chat.completion",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 1200, "completion_tokens": 160},
        }
    ).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


_HARMFUL, _HARMLESS = reply("Against: " + STATEMENT), reply("For: " + STATEMENT)
_A, _B = reply('{"better": "A"}'), reply('{"better": "B"}')


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
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
            tail = bytes(buffer[max(end + 4, whole - _TAIL) : whole])
            del buffer[:whole]
            assert self.transport is not None
            self.transport.write(_answer(tail))


def _answer(tail: bytes) -> bytes:
    if (at := tail.find(b"Statement A:")) >= 0:  # the side whose words begin with "Against" is always better
        return _A if b"Against" in tail[at : at + 100] else _B
    return _HARMLESS if b"does not fall under the policy. Speak" in tail else _HARMFUL


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", 0, backlog=512)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


@contextmanager
def stub_process() -> Generator[str, None, None]:
    """The server in a process of its own; gives its URL and ends it afterwards."""
    with subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(_serve())

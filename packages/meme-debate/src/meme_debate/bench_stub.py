"""A chat-completions server that answers at once, for the benchmark: ``python -m meme_debate.bench_stub``.

It prints its port, reads whole requests and gives one of four fixed replies; it ends when its input does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

from .loopback import answer, serve

STATEMENT = (
    "The picture shows a thing on a plain ground, and the words call it by a name that does not fit, "
    "so that praise turns into mockery once both are read together. "
) * 5
_TAIL = 6_000


def reply(content: str) -> bytes:
    """A whole HTTP answer."""
    message = {"role": "assistant", "content": content}
    document = {
        "id": "stub",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1200, "completion_tokens": 160},
    }
    return answer(json.dumps(document).encode())


_HARMFUL, _HARMLESS = reply("Against: " + STATEMENT), reply("For: " + STATEMENT)
_A, _B = reply('{"better": "A"}'), reply('{"better": "B"}')


def _answer(body: bytes) -> bytes:
    tail = body[-_TAIL:]
    if (at := tail.find(b"Statement A:")) >= 0:  # the side whose words begin with "Against" is always better
        return _A if b"Against" in tail[at : at + 100] else _B
    return _HARMLESS if b"does not fall under the policy. Speak" in tail else _HARMFUL


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
    serve(_answer)

import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from fusion_core.errors import ConfigError, InputError
from fusion_core.serve import secure, serve

APP = """
import time
from fastapi import FastAPI, Request
from pydantic import BaseModel
from fusion_core.serve import secure, serve

class Words(BaseModel, extra="forbid"):
    words: list[str]

app = secure(FastAPI(), max_body=1000, gauges=lambda: {"cards_total": 7})

@app.post("/size/{name}")
async def size(name: str, request: Request):
    return {"name": name, "size": len(await request.body())}

@app.post("/json")
def read_json(body: dict):
    return body

@app.post("/words")
def words(body: Words):
    return body

@app.get("/slow")
def slow():
    time.sleep(0.5)
    return "done"

@app.post("/parts")
def parts():
    from fastapi.responses import StreamingResponse

    def made():
        for _ in range(20):
            yield b"part"
            time.sleep(0.02)

    return StreamingResponse(made())

@app.get("/broken")
def broken():
    raise RuntimeError("no")

serve(app, port=0, concurrency=2)
"""


@contextlib.contextmanager
def started(said):
    """A server's URL; what it said is appended to the list when it has ended."""
    process = subprocess.Popen([sys.executable, "-c", APP], stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line
    yield found[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) in (0, -signal.SIGTERM)
    said += process.stderr.read().splitlines()
    process.stderr.close()


@pytest.fixture(scope="module")
def server():
    with started([]) as url:
        yield url


def get(url, data=None, headers=None):
    request = urllib.request.Request(url, data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_limits_health_metrics(server):
    assert get(server + "/health") == get(server + "/healthz") == (200, '{"status": "ok"}')
    assert get(server + "/size/a", b"x" * 1000) == (200, '{"name":"a","size":1000}')
    assert get(server + "/size/b", b"x" * 1001) == (413, '{"detail": "the body is larger than 1000 bytes"}')
    assert get(server + "/broken")[0] == 500
    for made_up in ("/x1", "/x2"):
        assert get(server + made_up)[0] == 404
    code, text = get(server + "/metrics")
    assert code == 200
    assert 'http_requests_total{route="/size/{name}",status="200"} 1' in text
    assert 'http_requests_total{route="/size/{name}",status="413"} 1' in text
    assert 'http_requests_total{route="/broken",status="500"} 1' in text
    assert 'http_requests_total{route="other",status="404"} 2' in text
    assert "http_requests_in_flight 0" in text
    assert "cards_total 7" in text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"words": "\\ud800"}', "valid list"),
        (b'{"words": NaN}', "valid list"),
        (b'{"words": [], "x": Infinity}', "not permitted"),
        (b'{"words": [], "\\udfff": 1}', "raw data as a unicode string"),
        (b'{"words": [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3]}', "valid string"),
    ],
)
def test_a_body_that_does_not_fit_is_told_so_and_not_sent_back(server, body, words):
    code, text = get(server + "/words", body, {"Content-Type": "application/json"})
    assert (code, words in text) == (422, True), text
    found = json.loads(text)["detail"]
    assert all(entry.keys() == {"type", "loc", "msg"} for entry in found)
    assert len(found) <= 20


def test_unannounced_body_is_limited_too(server):
    host, port = server.removeprefix("http://").split(":")
    for path in (b"/size/c", b"/json"):  # the second's framework would say 400
        with socket.create_connection((host, int(port)), timeout=10) as wire:
            head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            wire.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            wire.sendall((b"200\r\n" + b"y" * 512 + b"\r\n") * 3 + b"0\r\n\r\n")
            assert wire.recv(100).startswith(b"HTTP/1.1 413")
    assert get(server + "/json", b"{" + b"y" * 2000, {"Content-Type": "application/json"})[0] == 413


def test_a_request_that_turns_bad_after_its_answer_began_is_cut_off():
    said = []
    with started(said) as url:
        host, port = url.removeprefix("http://").split(":")
        for path, first in ((b"/nowhere", b"HTTP/1.1 404"), (b"/parts", b"HTTP/1.1 200")):
            with socket.create_connection((host, int(port)), timeout=10) as wire:
                wire.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
                assert wire.recv(100).startswith(first)
                wire.sendall(b"zz\r\n")
                while wire.recv(1000):
                    pass
        assert get(url + "/healthz")[0] == 200
    assert said == ["WARNING:  Invalid HTTP request received."] * 2


def test_busy_server_says_when_to_come_again(server):
    host, port = server.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=10) for _ in range(8)]
    try:
        for wire in idle[:2]:
            wire.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(server + "/json", data=b"{}", timeout=10)
        assert told.value.code == 503
        assert told.value.headers["Retry-After"] == "1"
        assert "2 requests are being answered" in told.value.read().decode()
        assert get(server + "/healthz")[0] == 200
        assert [wire.recv(100)[:12] for wire in idle[:2]] == [b"HTTP/1.1 200"] * 2
        assert get(server + "/slow") == (200, '"done"'), "connections that ask nothing do not count"
    finally:
        for wire in idle:
            wire.close()


def test_place_is_taken():
    from fastapi import FastAPI

    with socket.socket() as wire:
        wire.bind(("127.0.0.1", 0))
        wire.listen()
        port = wire.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}: .*; name another --host"):
            serve(FastAPI(), port=port)
    with pytest.raises(ConfigError, match="port is 70000"):
        serve(FastAPI(), port=70000)
    with pytest.raises(ConfigError, match="max_body is 0"):
        secure(FastAPI(), max_body=0)


BLOCKS = """
import ctypes
from fusion_core.serve import give_memory_back

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

libc.mallinfo2.restype = Info
told = give_memory_back()
libc.free(libc.malloc(16 << 20))
before = libc.mallinfo2().hblks
blocks = [libc.malloc(2 << 20) for _ in range(5)]
print(told, libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
@pytest.mark.parametrize(("settings", "said"), [({}, "True 5"), ({"GLIBC_TUNABLES": "a.b=1"}, "False 0")])
def test_large_blocks_are_the_systems_own(settings, said):
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_")}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS], env=clean | settings, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == said

import asyncio
import email.utils
import gzip
import itertools
import time

import pytest

from fusion_core.errors import ConfigError, InputError
from fusion_core.http import Client, RequestError
from fusion_core.testing.server import FaultServer, Reply

NOW = {"retry_after": 0}


def ask(server, *calls, method="GET", path="/", **options):
    async def main():
        async with Client(**{"retries": 3, "timeout": 5.0, **options}) as client:
            wanted = calls or ({},)
            got = await asyncio.gather(
                *(client.request(method, server.url + path, **call) for call in wanted),
                return_exceptions=True,
            )
            return got, client.stats

    got, stats = asyncio.run(main())
    return (got if len(calls) > 1 else got[0]), stats


def test_answer_is_read_to_its_end():
    with FaultServer([{"json": {"x": [1, 2]}, "headers": {"X-Mark": "a"}}]) as server:
        answer, stats = ask(server, {"data": b"body", "headers": {"A": "b"}}, method="POST", path="/v1?q=1")
    assert answer.json() == {"x": [1, 2]}
    assert (answer.status, answer.tries, answer.headers["x-mark"]) == (200, 1, "a")
    seen = server.requests[0]
    assert (seen.method, seen.path, seen.body, seen.headers["a"]) == ("POST", "/v1?q=1", b"body", "b")
    assert (stats.requests, stats.tries, stats.retries, stats.sent_bytes) == (1, 1, 0, 4)


@pytest.mark.parametrize(
    "fault",
    [{"status": 429, **NOW}, {"status": 500, **NOW}, {"status": 503, **NOW}, {"status": 408, **NOW}],
    ids=lambda f: str(f["status"]),
)
def test_busy_server_is_asked_again(fault):
    with FaultServer([fault, fault, {"json": 1}]) as server:
        answer, stats = ask(server)
    assert (answer.json(), answer.tries, stats.retries, len(server.requests)) == (1, 3, 2, 3)


@pytest.mark.parametrize("cut", [-1, 0, 3])
def test_cut_connection_is_asked_again(cut, monkeypatch):
    monkeypatch.setattr("fusion_core.http._FIRST_WAIT", 0.01)
    with FaultServer([{"json": "a long answer", "cut": cut}, {"json": "whole"}]) as server:
        answer, _ = ask(server, method="POST")
    assert (answer.json(), answer.tries) == ("whole", 2)


def test_hanging_server_times_out(monkeypatch):
    monkeypatch.setattr("fusion_core.http._FIRST_WAIT", 0.01)
    with FaultServer([{"hang": True}, {"json": 1}, {"hang": True}]) as server:
        answer, _ = ask(server, timeout=0.3)
        assert (answer.json(), answer.tries) == (1, 2)
        error, stats = ask(server, timeout=0.2, retries=1)
    assert isinstance(error, RequestError)
    assert "after 2 tries, no whole answer within 0.2 s" in str(error)
    assert (error.tries, error.status, stats.failed) == (2, None, 1)


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_refusal_is_final(status):
    with FaultServer([{"status": status, "body": "no such model"}]) as server:
        error, stats = ask(server)
    assert isinstance(error, RequestError)
    assert f"failed after one try, status {status}: no such model" in str(error)
    assert (error.tries, error.status, error.body, stats.tries) == (1, status, "no such model", 1)


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr("fusion_core.http._FIRST_WAIT", 0.01)
    with FaultServer([200]) as server:
        pass
    error, _ = ask(server, retries=1)
    assert isinstance(error, RequestError)
    assert "2 tries" in str(error)
    assert "refused" in str(error)


def test_wait_grows(monkeypatch):
    monkeypatch.setattr("fusion_core.http._FIRST_WAIT", 0.05)
    with FaultServer([500]) as server:
        error, stats = ask(server, retries=3)
    assert error.tries == 4
    at = [request.at for request in server.requests]
    gaps = [b - a for a, b in itertools.pairwise(at)]
    assert all(gap >= 0.5 * 0.05 * 2**turn for turn, gap in enumerate(gaps))
    assert 0.175 <= stats.waited <= 0.35


def test_retry_after_seconds_hold_back_the_whole_host():
    with FaultServer([{"status": 429, "retry_after": 0.4}, {"json": 1}]) as server:

        async def main():
            async with Client() as client:
                first = asyncio.create_task(client.request("GET", server.url))
                while not server.requests:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                return await asyncio.gather(first, client.request("GET", server.url))

        asyncio.run(main())
    start = server.requests[0].at
    assert all(request.at - start >= 0.39 for request in server.requests[1:])


def test_retry_after_as_a_date():
    soon = email.utils.formatdate(time.time() + 2, usegmt=True)
    with FaultServer([{"status": 503, "retry_after": soon}, {"json": 1}]) as server:
        answer, stats = ask(server)
    assert answer.tries == 2
    assert 0.9 <= stats.waited <= 2.0


def test_retry_after_too_long_ends_it():
    with FaultServer([{"status": 429, "retry_after": 3600}]) as server:
        error, _ = ask(server)
    assert "asks to wait 3600 s, longer than max_wait=120" in str(error)
    assert error.tries == 1


def test_rate_is_kept():
    start = time.monotonic()  # not the first request: a busy machine may take that late
    with FaultServer([{"json": 1}]) as server:
        _, stats = ask(server, *[{}] * 30, rate=20.0, concurrency=30)
    last = max(request.at for request in server.requests)
    assert last - start >= 0.4  # 20 at once, ten more at 20 a second
    assert stats.waited > 0


def test_concurrency_is_kept():
    at_once, most = 0, 0

    def slow(request):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        at_once -= 1
        return {"json": 1}

    with FaultServer(slow) as server:
        ask(server, *[{}] * 12, concurrency=3)
    assert most == 3


def test_large_body_is_sent_again_whole():
    data = b"x" * (3 << 20)
    with FaultServer([{"status": 500, **NOW}, {"json": 1}]) as server:
        ask(server, {"data": data}, method="POST")
    assert [request.body == data for request in server.requests] == [True, True]


def test_endless_answer_is_cut():
    with FaultServer([{"body": b"x" * 5000}]) as server:
        error, _ = ask(server, max_body=1000)
    assert "sent more than max_body=1000 bytes" in str(error)


def test_compressed_answer_is_measured_as_it_unfolds():
    packed = gzip.compress(b"x" * 500_000)
    assert len(packed) < 1000
    step = {"body": packed, "headers": {"Content-Encoding": "gzip"}}
    with FaultServer([step]) as server:
        answer, _ = ask(server)
        assert answer.body == b"x" * 500_000
        error, _ = ask(server, max_body=1000)
    assert "sent more than max_body=1000 bytes" in str(error)


def test_damaged_compression_is_a_failed_try(monkeypatch):
    monkeypatch.setattr("fusion_core.http._FIRST_WAIT", 0.01)
    with FaultServer([{"body": b"no gzip", "headers": {"Content-Encoding": "gzip"}}, {"json": 1}]) as server:
        answer, _ = ask(server)
    assert (answer.json(), answer.tries) == (1, 2)


def test_json_params_and_headers():
    with FaultServer([{"json": 1}]) as server:
        call = {"json": {"a": ["ä"]}, "params": {"q": "x y", "n": 2}, "headers": {"X-Mark": "call"}}
        ask(server, call, method="POST", path="/p?q=1", headers={"X-Mark": "client", "X-Other": "client"})
    seen = server.requests[0]
    assert (seen.json(), seen.path) == ({"a": ["ä"]}, "/p?q=1&q=x+y&n=2")
    assert (seen.headers["x-mark"], seen.headers["x-other"]) == ("call", "client")
    assert seen.headers["content-type"] == "application/json"


def test_redirects_are_followed_unless_they_must_not_be(monkeypatch):
    monkeypatch.setattr("fusion_core.http._FIRST_WAIT", 0.01)
    moved = {"status": 302, "headers": {"Location": "/there"}}
    with FaultServer([moved, {"json": 1}]) as server:
        answer, _ = ask(server)
        assert (answer.json(), [request.path for request in server.requests]) == (1, ["/", "/there"])
    with FaultServer([moved]) as server:
        error, _ = ask(server, follow_redirects=False)
        assert (error.status, error.tries, len(server.requests)) == (302, 1, 1)
        error, _ = ask(server, retries=0)
        assert "too many redirects" in str(error)
        assert len(server.requests) == 1 + 11


def test_the_environment_changes_nothing(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FaultServer([{"json": 1, "headers": {"Set-Cookie": "a=b"}}]) as server:
        answer, _ = ask(server, {}, {}, concurrency=1)
    assert answer[1].json() == 1
    assert all("cookie" not in request.headers for request in server.requests)


def test_a_cancelled_request_frees_its_place():
    async def main(url):
        async with Client(1, retries=0) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.request("GET", url), 0.2)
            return await client.request("GET", url)

    with FaultServer([{"hang": True}, {"json": 1}]) as server:
        assert asyncio.run(main(server.url)).json() == 1


@pytest.mark.parametrize("where", ["client", "call"])
def test_a_header_that_cannot_be_sent_is_told_without_its_value(where):
    headers = {"Authorization": "Bearer sk-secret\n"}

    async def main():
        async with Client(headers=headers if where == "client" else None) as client:
            await client.request("GET", "http://127.0.0.1:9", headers=headers)

    with pytest.raises(InputError, match=r"the header 'Authorization' .* line break") as caught:
        asyncio.run(main())
    assert "sk-secret" not in repr(caught.value)
    assert caught.value.__suppress_context__


def test_no_method():
    async def main():
        async with Client() as client:
            await client.request("GE T", "http://127.0.0.1:9")

    with pytest.raises(InputError, match="method 'GE T'"):
        asyncio.run(main())


def test_wrong_type():
    with FaultServer([{"body": "<html>busy</html>", "content_type": "text/html"}]) as server:
        answer, _ = ask(server)
    with pytest.raises(RequestError, match=r"wanted JSON, got 17 bytes of text/html: '<html>busy"):
        answer.json()


def test_secrets_stay_out_of_messages():
    key = "sk-very-secret-0123"

    def echo(request):
        return Reply(status=401, body="bad key " + request.headers["authorization"])

    with FaultServer(echo) as server:
        headers = {"Authorization": f"Bearer {key}"}
        error, _ = ask(server, headers=headers, path="/v1?key=also-secret")
    assert key not in str(error) + error.body + repr(error)
    assert "also-secret" not in str(error)
    assert "***" in error.body


@pytest.mark.parametrize("url", ["ftp://host/x", "host/x", "http://", "http://[::1/"])
def test_no_address(url):
    async def main():
        async with Client() as client:
            await client.request("GET", url)

    with pytest.raises(InputError, match="url is"):
        asyncio.run(main())


def test_needs_to_be_open():
    with pytest.raises(InputError, match="async with Client"):
        asyncio.run(Client().request("GET", "http://127.0.0.1"))


@pytest.mark.parametrize(
    ("name", "value"), [("concurrency", 0), ("rate", 0.0), ("retries", -1), ("timeout", 0.0)]
)
def test_bad_settings(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}, wanted a number"):
        Client(**{name: value})


def test_script_of_the_server():
    with pytest.raises(TypeError, match="no \\['stat'\\]"):
        FaultServer([{"stat": 200}])
    with pytest.raises(TypeError, match="empty"):
        FaultServer([])
    with pytest.raises(RuntimeError, match="with FaultServer"):
        _ = FaultServer([200]).url


def test_a_refused_answer_is_a_failed_try():
    refuse = lambda answer: None if answer.body == b"image" else f"a page of {len(answer.body)} bytes"

    async def ask(url, retries):
        async with Client(retries=retries) as client:
            return await client.request("GET", url, refuse=refuse)

    with FaultServer([{"body": b"sorry", "retry_after": 0}, {"body": b"image", "retry_after": 0}]) as server:
        answer = asyncio.run(ask(server.url, 1))
        assert (answer.body, answer.tries) == (b"image", 2)
    with FaultServer([{"body": b"sorry", "retry_after": 0}]) as server:
        with pytest.raises(RequestError, match=r"2 tries, status 200: a page of 5 bytes") as caught:
            asyncio.run(ask(server.url, 1))
        assert len(server.requests) == caught.value.tries == 2

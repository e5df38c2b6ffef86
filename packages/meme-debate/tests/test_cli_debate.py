"""The commands ``debate``, ``serve``, ``bench``, and the server behind the second."""

import base64
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from debate_stub import Stub, answer, jpeg, memes

from fusion_core.errors import InputError
from fusion_core.testing import heed_ctrl_c, run_cli
from meme_debate import Debate, Debater, Meme, TextJudge
from meme_debate.cli import main
from meme_debate.meme import save_memes


@pytest.fixture
def given(tmp_path):
    save_memes(tmp_path / "memes.jsonl", memes(tmp_path, 3))
    return tmp_path / "memes.jsonl"


def debate(server, given, *more):
    out = given.with_name("d.jsonl")
    return run_cli(main, "debate", given, "--url", server.v1, "--model", "stub", "--out", out, "-q", *more)


def test_debate(given):
    with Stub() as server:
        done = debate(server, given, "--price", "3,15")
        assert (done.code, done.stderr) == (0, "")
        assert re.search(r"calls\W+12", done.stdout)
        assert re.search(r"cost\W+0\.0324", done.stdout)
        first = given.with_name("d.jsonl").read_bytes()
        again = debate(server, given)
        assert again.code == 2
        assert "d.jsonl is there already; pass --resume to complete it or --overwrite" in again.stderr
        resumed = debate(server, given, "--resume", "--json")
        report = json.loads(resumed.stdout)
        assert (report["cached"], report["calls"], report["memes"]) == (12, 12, 3)
        assert given.with_name("d.jsonl").read_bytes() == first
        assert len(server.requests) == 12


def test_policy_file_and_options(given, tmp_path):
    (tmp_path / "policy.toml").write_text(
        'name = "spam"\ndefinition = "unasked advertising."\npositive = "spam"\nnegative = "wanted"\n'
    )
    with Stub() as server:
        words = ("--policy", tmp_path / "policy.toml", "--rounds", 2, "--no-swap", "--limit", 1)
        assert debate(server, given, *words).code == 0
        assert len(server.requests) == 5
    system = server.requests[0].json()["messages"][0]["content"]
    assert 'Policy "spam": unasked advertising.' in system
    (tmp_path / "policy.toml").write_text('nam = "spam"')
    with Stub() as server:
        done = debate(server, given, "--policy", tmp_path / "policy.toml", "--overwrite")
    assert (done.code, "did you mean name" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--url is missing; name a server"),
        (("--url", "nowhere"), "backend is 'nowhere', wanted a URL"),
        (("--url", "http://127.0.0.1:9/v1"), "model is empty"),
        (("--url", "http://x", "--model", "m", "--price", "3"), "--price is '3', wanted two numbers"),
        (("--url", "http://x", "--model", "m", "--stances", "x"), "stances is 'x', wanted"),
        (("--url", "http://x", "--model", "m", "--on-error", "x"), "--on-error is 'x', wanted raise or skip"),
        (("--url", "http://x", "--model", "m", "--key-variable", "NO_KEY"), "variable NO_KEY is not set"),
    ],
)
def test_bad_words(words, told, given):
    done = run_cli(main, "debate", given, "--out", given.with_name("d.jsonl"), *words)
    assert done.code == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_that_never_answers(given, monkeypatch):
    monkeypatch.setattr("fusion_core.http._FIRST_WAIT", 0.01)
    with Stub() as server:
        url = server.v1
    done = run_cli(
        main,
        "debate",
        given,
        "--url",
        url,
        "--model",
        "m",
        "--retries",
        1,
        "-q",
        "--out",
        given.with_name("d"),
    )
    assert done.code == 1
    assert "failed after 2 tries, " in done.stderr
    assert "refused" in done.stderr


def test_ctrl_c_and_resume(given, tmp_path):
    started = threading.Event()

    def slow(request):
        if len(server.requests) > 6:
            started.set()
        time.sleep(0.05)
        return answer(request)

    code = "from meme_debate.cli import main; main()"
    out = given.with_name("d.jsonl")
    words = ["debate", given, "--model", "stub", "--out", out, "-q", "--concurrency", "1", "--url"]
    with Stub(make=slow) as server:
        command = [sys.executable, "-c", code, *map(str, words), server.v1]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c) as process:
            assert started.wait(60)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert "Traceback" not in process.stderr.read()
        assert not out.exists()
        before = len(server.requests)
        assert before < 12
        done = debate(server, given, "--json")
        assert json.loads(done.stdout)["cached"] >= 6
        assert len(server.requests) <= 13, "only the call that was in flight is made again"


def test_one_run_at_a_time(given):
    debater = None

    def make(request):
        with pytest.raises(InputError, match="this debater runs already"):
            debater.run([Meme("z", None, "z")], progress=False)
        return answer(request)

    with Stub(make=make) as server:
        debater = Debater(server.v1, "stub")
        assert len(debater.run([Meme("a", None, "x")], progress=False)) == 1


def judge():
    found = [Meme(str(i), None, f"{'giant' if i % 2 else 'tiny'} thing {i}", label=i % 2) for i in range(40)]
    debates = [
        Debate(m.id, "it mocks", "it is kind", m.label) for m in found
    ]  # fmt: skip
    return TextJudge().fit_memes(found, debates)


@pytest.fixture(scope="module")
def client():
    from fastapi.testclient import TestClient

    from meme_debate.server import Detector, create_app

    with Stub() as server:
        debater = Debater(server.v1, "stub")
        with TestClient(create_app(Detector(judge(), debater, max_memes=3), 200_000)) as http:
            yield http, server


def test_detect_over_http(client):
    http, server = client
    image = base64.b64encode(jpeg()).decode()
    own = {"harmful": "a", "harmless": "b", "verdict": 0}
    got = http.post(
        "/v1/detect",
        json={
            "memes": [
                {"id": "x", "text": "giant", "image": image},
                {"id": "y", "text": "tiny", "debate": own},
            ]
        },
    )
    assert got.status_code == 200, got.text
    cards = got.json()["cards"]
    assert [card["id"] for card in cards] == ["x", "y"]
    assert cards[0]["schema"] == "meme-debate.card/1"
    assert cards[0]["harmful"].startswith("The picture shows a rocket")
    assert cards[1]["harmful"] == "a"
    assert len(server.requests) == 4, "only the meme without a debate was argued about"
    url = http.post(
        "/v1/detect", json={"memes": [{"text": "giant", "image": "data:image/jpeg;base64," + image}]}
    )
    assert url.status_code == 200
    metrics = http.get("/metrics").text
    assert "meme_debate_calls 8" in metrics
    assert 'http_requests_total{route="/v1/detect",status="200"} 2' in metrics
    assert http.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ({"memes": [{"id": "a", "text": "x", "image": "http://host/x.jpg"}]}, 422, "no address is fetched"),
        (
            {"memes": [{"id": "a", "text": "x", "image": "AAAA"}]},
            422,
            "meme 'a': image of 3 bytes is no image",
        ),
        ({"memes": [{"id": "a", "text": " "}]}, 422, "meme 'a' has no image and no text"),
        ({"memes": [{"id": "a", "text": "x"}] * 2}, 422, "an id that is there twice"),
        ({"memes": [{"id": str(i), "text": "x"} for i in range(4)]}, 422, "4 entries, wanted at most 3"),
        ({"memes": []}, 422, "at least 1 item"),
        ({"memes": [{"text": 3}]}, 422, "valid string"),
        ({"meme": 1}, 422, "Field required"),
        ({"memes": [{"text": "x" * 300_000}]}, 413, "the body is larger than 200000 bytes"),
        (
            {"memes": [{"text": "x", "debate": {"harmful": "a", "harmless": "b", "verdict": 7}}]},
            422,
            "verdict is 7",
        ),
    ],
)
def test_bad_requests(body, code, told, client):
    got = client[0].post("/v1/detect", json=body)
    assert got.status_code == code
    assert told in got.text


def test_debater_that_fails(monkeypatch):
    from fastapi.testclient import TestClient

    from meme_debate.server import Detector, create_app

    with Stub(dict.fromkeys(range(9), 500)) as server:
        app = create_app(Detector(judge(), Debater(server.v1, "stub", retries=0)))
        with TestClient(app) as http:
            got = http.post("/v1/detect", json={"memes": [{"text": "x"}]})
    assert got.status_code == 502
    assert "status 500" in got.json()["detail"]


@pytest.mark.slow
def test_serve(tmp_path):
    judge().save(tmp_path / "judge")
    code = "from meme_debate.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--judge", tmp_path / "judge", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())[0]
        body = json.dumps({"memes": [{"id": "a", "text": "a giant"}]}).encode()
        request = urllib.request.Request(url + "/v1/detect", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as got:
            card = json.loads(got.read())["cards"][0]
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    assert card["inputs"][0] == "text"
    assert "no_debate" in card["flags"]


def test_prefix_shares_meet_the_targets():
    from meme_debate.bench_client import _texts, prefix_rows

    rows = prefix_rows(*_texts(None, None))
    assert all(row.met for row in rows), [(row.name, row.ratio) for row in rows]


def test_only_spans_that_no_slow_beat_met_are_steady():
    from meme_debate.bench_pulse import Pulse, pulse

    draws = np.random.default_rng(0)
    starts = np.cumsum(0.004 + draws.random(200) / 100)
    took = np.where(draws.random(200) < 0.05, 3e-4, 1e-4)
    beats = np.stack([starts, starts + 1e-3, took], 1)
    begin = draws.random(300) * 2
    spans = [(float(a), float(a + b)) for a, b in zip(begin, draws.random(300) / 50, strict=True)]
    met = [
        any(
            beats[max(i - 1, 0), 1] <= end and start <= beats[min(i + 1, 199), 0] + 0.05
            for i in np.flatnonzero(took > 2e-4)
        )
        for start, end in spans
    ]
    assert 50 < sum(met) < 250
    assert Pulse(beats).steady(spans).tolist() == [not hit for hit in met]
    assert Pulse().steady(spans).all()
    with pulse() as machine:
        start = time.monotonic()
        time.sleep(0.1)
    assert len(machine.beats) > 3
    assert start - 1 < machine.beats[0, 0] <= machine.beats[-1, 1] < time.monotonic()


@pytest.mark.slow
def test_bench_measures(tmp_path):
    from meme_debate.bench_client import rows

    found = {row.name: row for row in rows(debates=10, repeats=1, rate=20.0, seconds=0.5)}
    assert len(found) == 15
    for end in ("", ", while the machine keeps its speed"):
        whole, half = (found[f"added latency p99, {r} debates/s offered, 3 calls{end}"] for r in (20, 10))
        assert (whole.target, half.target, half.met) == (">= 1", None, None)
    assert all(row.ratio > 0 for row in found.values())

"""Debates over HTTP: order, verdict, cache, kill -9 and resume, concurrency, backends, report."""

import asyncio
import contextlib
import hashlib
import io
import json
import sqlite3
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from debate_stub import WORDS, Stub, answer, completion, jpeg, memes, sent_picture, task
from PIL import Image

from fusion_core.errors import ConfigError, DataError, InputError, StoreError
from fusion_core.testing import kill_when
from meme_debate import Debater, Meme, Policy, load_debates
from meme_debate.backends import Reply
from meme_debate.cache import ReplyCache
from meme_debate.errors import PromptVersionError
from meme_debate.meme import save_debates, save_memes
from meme_debate.verdict import first_side


def hold(server, wanted, concurrency=4, **options):
    return Debater(server.v1, "stub", retries=2, **options).run(wanted, concurrency, progress=False)


def text_of(debates, path):
    save_debates(path, debates)
    return path.read_bytes()


def test_a_debate_is_four_calls_in_order(tmp_path):
    with Stub() as server:
        debates = hold(server, memes(tmp_path, 1))
    assert server.tasks() == ["harmful/1", "harmless/1", "verdict", "verdict"]
    debate = debates[0]
    assert debate.harmful.startswith(WORDS["harmful"])
    assert debate.harmless.startswith(WORDS["harmless"])
    assert (debate.verdict, debate.agreement, debate.flags) == (1, True, ())
    first = [request.json()["messages"][1]["content"] for request in server.requests]
    assert [part["type"] for part in first[0]] == ["image_url", "text", "text"]
    assert all(content[:2] == first[0][:2] for content in first), "one prefix for all calls of a meme"
    assert len({request.json()["messages"][0]["content"] for request in server.requests}) == 1
    assert sent_picture(server.requests[0]) == (tmp_path / "0.jpg").read_bytes(), "the file as it is"
    sizes = [request.json()["max_tokens"] for request in server.requests]
    assert sizes == [256, 256, 32, 32]
    assert debates.report.calls == 4
    assert debates.report.prompt_tokens == 2800
    assert debates.report.prefix_tokens == 2400
    assert debates.report.verdicts == {"harmful": 1, "harmless": 0, "none": 0}


def test_record_is_the_schema(tmp_path):
    with Stub() as server:
        debates = hold(server, memes(tmp_path, 2), cache=tmp_path / "c.sqlite")
    record = json.loads(text_of(debates, tmp_path / "d.jsonl").splitlines()[0])
    assert list(record) == [
        "schema", "id", "harmful", "harmless", "verdict", "agreement", "votes", "rounds", "flags", "raw",
        "policy", "prompts", "model", "verdict_model", "sampling", "usage",
    ]  # fmt: skip
    assert record["schema"] == "meme-debate.debate/1"
    assert {vote["a"] for vote in record["votes"]} == {"harmful", "harmless"}
    assert record["votes"][0]["a"] == first_side("m0")
    assert record["policy"] == {"name": "harmful", "digest": Policy().digest()}
    assert record["sampling"] == {"temperature": 0, "seed": 0, "max_tokens": 256}
    assert '"temperature":0,' in json.dumps(record, separators=(",", ":"))
    assert record["usage"] == {"calls": 4, "prompt_tokens": 2800, "completion_tokens": 160}
    assert record["rounds"] == [{"harmful": record["harmful"], "harmless": record["harmless"]}]
    assert load_debates(tmp_path / "d.jsonl") == list(debates)
    assert (
        text_of(load_debates(tmp_path / "d.jsonl"), tmp_path / "e.jsonl")
        == (tmp_path / "d.jsonl").read_bytes()
    )


def test_a_position_preference_is_no_verdict(tmp_path):
    make = lambda r: completion('{"better": "A"}') if task(r) == "verdict" else answer(r)
    with Stub(make=make) as server:
        both = hold(server, memes(tmp_path, 1))[0]
        one = hold(server, memes(tmp_path, 1), swap=False)[0]
        none = hold(server, memes(tmp_path, 1), verdict=False)[0]
    assert (both.verdict, both.agreement) == (None, False)
    assert (one.verdict, one.agreement) == (int(first_side("m0") == "harmful"), None)
    assert (none.verdict, none.agreement, none.record["votes"]) == (None, None, [])


def test_rounds_quote_the_last_statements(tmp_path):
    with Stub() as server:
        debate = hold(server, memes(tmp_path, 1), rounds=3)[0]
    assert (
        server.tasks()
        == [f"{side}/{n}" for n in (1, 2, 2) for side in ("harmful", "harmless")] + ["verdict"] * 2
    )
    rounds = debate.record["rounds"]
    third = [r.json()["messages"][1]["content"][-1]["text"] for r in server.requests[4:6]]
    assert all(rounds[1]["harmful"] in text and rounds[1]["harmless"] in text for text in third)
    assert [r.json()["max_tokens"] for r in server.requests[2:6]] == [160] * 4
    assert debate.harmful == rounds[2]["harmful"]


def test_concurrency_and_order_of_the_stances_do_not_change_results(tmp_path):
    found = memes(tmp_path, 8)
    outs = []
    for concurrency, stances in ((1, "serial"), (8, "serial"), (3, "parallel")):
        with Stub() as server:
            outs.append(text_of(hold(server, found, concurrency, stances=stances), tmp_path / "d.jsonl"))
    assert outs[0] == outs[1] == outs[2]
    with Stub() as server:
        turned = hold(server, found[::-1])
    assert [debate.id for debate in turned] == [meme.id for meme in found[::-1]]
    assert text_of(turned[::-1], tmp_path / "d.jsonl") == outs[0]


def test_cache_answers_the_second_run(tmp_path):
    found, cache = memes(tmp_path, 3), tmp_path / "c.sqlite"
    with Stub() as server:
        first = hold(server, found, cache=cache)
        asked = len(server.requests)
        second = hold(server, found, cache=cache)
        assert len(server.requests) == asked == 12
        assert (second.report.cached, second.report.calls, second.report.prompt_tokens) == (12, 12, 0)
        assert text_of(first, tmp_path / "a") == text_of(second, tmp_path / "b")
        for change in (
            {"temperature": 0.5},
            {"seed": 1},
            {"policy": Policy(name="x")},
            {"extra": {"top_p": 0.5}},
        ):
            hold(server, found[:1], cache=cache, **change)
        assert len(server.requests) == asked + 4 * 4
        hold(server, [Meme("m0", found[0].image, found[0].text + "!", found[0].caption)], cache=cache)
        assert len(server.requests) == asked + 5 * 4


def test_one_meme_under_two_ids_is_asked_once(tmp_path):
    (tmp_path / "x.jpg").write_bytes(jpeg())
    same = [Meme(i, tmp_path / "x.jpg", "a giant") for i in ("a", "b", "c")]
    with Stub() as server:
        debates = hold(server, same, cache=tmp_path / "c.sqlite")
    assert len(server.requests) == 4
    assert len({debate.harmful for debate in debates}) == 1


def test_cost(tmp_path):
    with Stub() as server:
        report = hold(server, memes(tmp_path, 2), price=(3.0, 15.0)).report
    assert report.cost == pytest.approx((3.0 * 8 * 700 + 15.0 * 8 * 40) / 1e6)
    assert report.transport["tries"] == 8
    assert json.loads(json.dumps(report.to_dict()))["memes"] == 2


SCRIPT = """
import sys
from meme_debate import Debater, load_memes
from meme_debate.meme import save_debates
url, memes, cache, out = sys.argv[1:]
debates = Debater(url, "stub", cache=cache, retries=2).run(load_memes(memes), 3, progress=False)
save_debates(out, debates)
"""


@pytest.mark.slow
def test_kill_and_resume(tmp_path):
    """Killed without a chance to clean up, the next run gives the same bytes, no committed call twice."""
    save_memes(tmp_path / "memes.jsonl", memes(tmp_path, 10))
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def command(server, cache, out):
        names = (tmp_path / "memes.jsonl", tmp_path / cache, tmp_path / out)
        return [sys.executable, str(script), server.v1, *map(str, names)]

    with Stub() as server:
        subprocess.run(command(server, "whole.sqlite", "whole.jsonl"), check=True, timeout=60)
    marker = tmp_path / "kill"

    def slow(request):
        if len(server.requests) == 18:
            marker.touch()
        threading.Event().wait(0.02)
        return answer(request)

    with Stub(make=slow) as server:
        assert kill_when(command(server, "c.sqlite", "out.jsonl"), marker) == -9
        assert not (tmp_path / "out.jsonl").exists()
        with sqlite3.connect(tmp_path / "c.sqlite") as database:
            committed = database.execute("SELECT COUNT(*) FROM replies").fetchone()[0]
        before = len(server.requests)
        assert 8 <= committed < 40
        subprocess.run(command(server, "c.sqlite", "out.jsonl"), check=True, timeout=60)
        assert len(server.requests) - before == 40 - committed
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_two_processes_share_a_cache(tmp_path):
    save_memes(tmp_path / "memes.jsonl", memes(tmp_path, 6))
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    # Every call gets another answer: only the cache can make the two runs agree. A tenth of the calls fails.
    lock, numbers = threading.Lock(), iter(range(10**6))

    def make(request):
        with lock:
            number = next(numbers)
        if task(request) == "verdict":
            return answer(request)
        side = task(request).split("/")[0]
        return completion(f"{WORDS[side]} Number {number}.")

    faults = {number: {"status": 503, "retry_after": 0} for number in range(0, 200, 10)}
    with Stub(faults, make) as server:
        names = (tmp_path / "memes.jsonl", tmp_path / "c.sqlite")
        runs = [
            subprocess.Popen([sys.executable, str(script), server.v1, *map(str, names), str(tmp_path / out)])
            for out in ("a.jsonl", "b.jsonl")
        ]
        assert [run.wait(60) for run in runs] == [0, 0]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_many_open_a_new_cache_at_once(tmp_path):
    together = threading.Barrier(8)

    def use(path, key):
        together.wait()
        with contextlib.closing(ReplyCache(path)) as cache:
            cache.put(key, "harmful/1", Reply("words"))

    with ThreadPoolExecutor(8) as pool:
        for turn in range(100):  # one in some forty turns met a lock that SQLite does not wait for
            path, keys = tmp_path / f"{turn}.sqlite", [bytes([number]) * 32 for number in range(8)]
            list(pool.map(use, [path] * 8, keys))
            with contextlib.closing(ReplyCache(path)) as cache:
                assert len(cache) == 8


def test_cache_of_something_else(tmp_path):
    (tmp_path / "text.sqlite").write_text("no database, but long enough to be looked at " * 50)
    with sqlite3.connect(tmp_path / "other.sqlite") as database:
        database.execute("CREATE TABLE other (x)")
    run = lambda name: Debater(_never, cache=tmp_path / name).run([Meme("a", None, "x")])
    with pytest.raises(StoreError, match=r"text.sqlite is no debate cache, or broken"):
        run("text.sqlite")
    with pytest.raises(StoreError, match="database of something else; name another file"):
        run("other.sqlite")
    with pytest.raises(StoreError, match="cannot be opened"):
        run("text.sqlite/c.sqlite")


async def _never(_):
    raise AssertionError("not to be asked")


async def _usual(messages):
    text = messages[1]["content"][-1]["text"]
    return '{"better": "A"}' if "Statement A" in text else hashlib.sha256(text.encode()).hexdigest()


def test_cache_of_another_prompt_version(tmp_path):
    Debater(_usual, cache=tmp_path / "c.sqlite").run([Meme("a", None, "x")])
    with sqlite3.connect(tmp_path / "c.sqlite") as database:
        database.execute("UPDATE meme_debate SET value='meme-debate/0' WHERE name='prompts'")
    with pytest.raises(
        PromptVersionError, match="prompts 'meme-debate/0', this version asks 'meme-debate/1'"
    ):
        Debater(_usual, cache=tmp_path / "c.sqlite").run([Meme("a", None, "x")])


def test_recorded(tmp_path):
    with Stub() as server:
        debates = hold(server, memes(tmp_path, 2))
    save_debates(tmp_path / "d.jsonl", debates)
    again = Debater(f"recorded:{tmp_path / 'd.jsonl'}").run(memes(tmp_path, 2)[::-1])
    assert list(again) == list(debates)[::-1]
    assert again.report.calls == 0
    with pytest.raises(DataError, match="has no debate about meme 'other'"):
        Debater(f"recorded:{tmp_path / 'd.jsonl'}").run([Meme("other", None, "x")])


def test_any_async_function_and_a_running_loop():
    seen = []

    async def stub(messages):
        seen.append(messages)
        return await _usual(messages)

    async def notebook():
        return Debater(stub).run([Meme("a", Image.new("RGB", (8, 8)), "x")])

    debate = asyncio.run(notebook())[0]
    assert debate.record["model"] == "stub"
    assert seen[0][1]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")

    async def wrong(messages):
        return 3

    with pytest.raises(InputError, match="gave a int, wanted text"):
        Debater(wrong).run([Meme("a", None, "x")])


def test_verdict_model(tmp_path):
    with Stub() as server:
        debate = hold(server, memes(tmp_path, 1), verdict_model="other")[0]
    assert [r.json()["model"] for r in server.requests] == ["stub", "stub", "other", "other"]
    assert (debate.record["model"], debate.record["verdict_model"]) == ("stub", "other")
    with pytest.raises(InputError, match="verdict_model is 'other': a name needs"):
        Debater(_never, verdict_model="other")


def test_structured_asks_for_a_schema(tmp_path):
    with Stub() as server:
        hold(server, memes(tmp_path, 1), structured=True)
    formats = [r.json().get("response_format") for r in server.requests]
    assert formats[:2] == [None, None]
    assert formats[2]["json_schema"]["schema"]["properties"] == {
        "better": {"type": "string", "enum": ["A", "B"]}
    }


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("ftp://x", "m"), {}, "backend is 'ftp://x', wanted a URL"),
        (("http://", "m"), {}, "url is 'http://', wanted"),
        (("http://x/v1",), {}, "model is empty"),
        (("http://x/v1", "m"), {"speed": 3}, "unexpected keyword argument 'speed'"),
        ((3,), {}, "backend is a int, wanted"),
        (("recorded:nowhere.jsonl",), {}, "nowhere.jsonl is not there"),
        (("http://x/v1", "m"), {"stances": "both"}, "stances is 'both', wanted one of 'serial', 'parallel'"),
        (("http://x/v1", "m"), {"on_label": "drop"}, "on_label is 'drop', wanted one of"),
        (("http://x/v1", "m"), {"rounds": 0}, "rounds is 0, wanted a number in"),
        (("http://x/v1", "m"), {"temperature": -1}, "temperature is -1, wanted"),
    ],
)
def test_bad_settings(arguments, options, words):
    with pytest.raises(InputError, match=words):
        Debater(*arguments, **options)


def test_bad_memes(tmp_path):
    debater = Debater(_usual)
    with pytest.raises(DataError, match="meme id 'a' is there twice"):
        debater.run([Meme("a", None, "x"), Meme("a", None, "y")])
    with pytest.raises(DataError, match="meme 'a' has no image and no text"):
        debater.run([Meme("a", None, "  ")])
    (tmp_path / "cut.jpg").write_bytes(jpeg(size=(400, 300))[:-400])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "bomb.png").write_bytes(bomb(20_000))
    (tmp_path / "large.png").write_bytes(bomb(8_000))
    for name, words in (
        ("none.jpg", "'.*none.jpg' cannot be read: No such file"),
        ("cut.jpg", "cut.jpg' is broken or cut off"),
        ("text.jpg", "text.jpg' is no picture"),
        ("bomb.png", "has 20000 x 20000 pixels, more than 50000000"),
        ("large.png", "has 8000 x 8000 pixels, more than 50000000"),
    ):
        with pytest.raises(InputError, match=f"meme 'a': image .*{words}"):
            debater.run([Meme("a", tmp_path / name, "x")])
    good = Meme("b", None, "y")
    debates = debater.run([Meme("a", tmp_path / "cut.jpg", "x"), good], on_error="skip")
    assert [debate.id for debate in debates] == ["b"]
    assert [name for name, _ in debates.report.failed] == ["a"]
    with pytest.raises(InputError, match="on_error is 'stop'"):
        debater.run([good], on_error="stop")
    with pytest.raises(ConfigError, match="concurrency is 0"):
        debater.run([good], 0)


def bomb(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_large_and_foreign_pictures_become_jpeg(tmp_path):
    Image.new("RGB", (900, 300), (9, 9, 200)).save(tmp_path / "wide.png")
    Image.new("L", (40, 30)).save(tmp_path / "gray.bmp")
    with Stub() as server:
        hold(
            server,
            [Meme("a", tmp_path / "wide.png", "x"), Meme("b", tmp_path / "gray.bmp", "")],
            1,
            max_side=300,
        )
    sizes = [Image.open(io.BytesIO(sent_picture(server.requests[i]))).size for i in (0, 4)]
    assert sizes == [(300, 100), (40, 30)]


def test_without_picture_or_words(tmp_path):
    (tmp_path / "x.jpg").write_bytes(jpeg())
    with Stub() as server:
        hold(server, [Meme("a", None, "words only"), Meme("b", tmp_path / "x.jpg", "")], 1)
    first, second = (server.requests[i].json()["messages"][1]["content"] for i in (0, 4))
    assert [part["type"] for part in first] == ["text", "text"]
    assert first[0]["text"].startswith("There is no picture.\nWords printed")
    assert second[1]["text"] == "No words are printed on the meme.\n"


def test_import_is_light():
    code = "import sys, meme_debate; meme_debate.compose; print(*sorted(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"transformers", "sklearn", "aiohttp", "pyreqwest", "matplotlib", "pandas"} & set(found)

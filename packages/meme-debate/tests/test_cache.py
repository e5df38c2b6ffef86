"""The cache of replies: one transaction for those that come together, none of them used before it is over."""

import asyncio
import contextlib
import gc
import sqlite3

import pytest

from fusion_core.errors import StoreError
from meme_debate import Debater, Meme
from meme_debate import cache as caching
from meme_debate.backends import Reply
from meme_debate.cache import ReplyCache, cache_key, encode, prefixed

KEYS = [cache_key([str(i)]) for i in range(200)]


def reply(i):
    return Reply(f'words {i} "\u2028\n', "stop", "", i, 2, 3, 0)


def in_file(path):
    with sqlite3.connect(path) as database:
        return database.execute("SELECT COUNT(*) FROM replies").fetchone()[0]


def test_replies_that_come_together_share_transactions(tmp_path):
    cache = ReplyCache(tmp_path / "c.sqlite")
    statements = []
    cache._database.set_trace_callback(statements.append)

    async def main():
        async def one(i):
            held = await cache.commit(KEYS[i], "harmful/1", reply(i))
            assert in_file(tmp_path / "c.sqlite") >= 1, "on disk before anybody goes on"
            return held

        return await asyncio.gather(*(one(i) for i in range(100)))

    assert asyncio.run(main()) == [reply(i) for i in range(100)]
    assert len([s for s in statements if s.startswith("INSERT")]) == 2, "64 rows a statement"
    assert len(cache) == 100
    assert [cache.get(key) for key in KEYS[:101]] == [*(reply(i) for i in range(100)), None]
    assert (cache.hits, cache.misses) == (100, 1)


def test_of_two_replies_to_a_key_the_first_counts(tmp_path):
    cache, other = (ReplyCache(tmp_path / "c.sqlite") for _ in range(2))
    assert other.put(KEYS[1], "x", reply(7)) == reply(7)

    async def main():
        return await asyncio.gather(*(cache.commit(KEYS[i], "x", reply(i)) for i in range(3)))

    assert asyncio.run(main()) == [reply(0), reply(7), reply(2)]
    assert cache.put(KEYS[1], "x", reply(9)) == reply(7)


def test_who_waited_may_be_gone(tmp_path):
    cache = ReplyCache(tmp_path / "c.sqlite")

    async def main():
        waiting = [asyncio.create_task(cache.commit(KEYS[i], "x", reply(i))) for i in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        assert await waiting[1] == reply(1)

    asyncio.run(main())
    assert in_file(tmp_path / "c.sqlite") == 2, "what was paid for is kept"


def test_closing_commits_what_waits(tmp_path):
    cache = ReplyCache(tmp_path / "c.sqlite")

    async def main():
        task = asyncio.ensure_future(cache.commit(KEYS[0], "x", reply(0)))
        await asyncio.sleep(0)
        cache.close()
        assert await task == reply(0)

    asyncio.run(main())
    assert in_file(tmp_path / "c.sqlite") == 1


def test_a_broken_file_is_told_to_all_who_wait(tmp_path):
    cache = ReplyCache(tmp_path / "c.sqlite")
    cache._database.execute("DROP TABLE replies")

    async def main():
        return await asyncio.gather(
            *(cache.commit(KEYS[i], "x", reply(i)) for i in range(3)), return_exceptions=True
        )

    found = asyncio.run(main())
    assert [type(each) for each in found] == [StoreError] * 3
    assert "c.sqlite is no debate cache, or broken" in str(found[0])


def test_what_another_process_writes_is_found(tmp_path, monkeypatch):
    """Keys are known without a look into the file, until somebody else writes."""
    monkeypatch.setattr(caching, "_LOOK_SECONDS", 0.0)
    (first := ReplyCache(tmp_path / "c.sqlite")).put(KEYS[0], "x", reply(0))
    first.close()
    cache = ReplyCache(tmp_path / "c.sqlite")
    statements = []
    cache._database.set_trace_callback(statements.append)
    looks = lambda: len([s for s in statements if s.startswith("SELECT")])
    assert cache.get(KEYS[0]) == reply(0)
    assert cache.get(KEYS[1]) is None
    assert looks() == 1, "a key that is not there costs no look"
    cache.put(KEYS[1], "x", reply(1))
    assert cache.get(KEYS[1]) == reply(1)
    caching._checkpoint(cache.path)
    assert cache.get(KEYS[2]) is None
    assert looks() == 2, "moving the log is no news"
    other = ReplyCache(tmp_path / "c.sqlite")
    assert other.get(KEYS[1]) == reply(1)
    other.put(KEYS[2], "x", reply(2))
    assert cache.get(KEYS[2]) == reply(2)
    assert cache.get(KEYS[3]) is None
    assert looks() == 4, "from now on it looks each time"


def test_a_large_file_is_looked_into(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_MOST_KEYS", 3)
    cache = ReplyCache(tmp_path / "c.sqlite")
    for i in range(5):
        cache.put(KEYS[i], "x", reply(i))
    again = ReplyCache(tmp_path / "c.sqlite")
    assert again._keys is None
    assert [again.get(key) for key in KEYS[:6]] == [*map(reply, range(5)), None]


def test_the_log_is_moved_into_the_file_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_CHECKPOINT_ROWS", 50)
    cache = ReplyCache(tmp_path / "c.sqlite")
    for i in range(120):
        cache.put(KEYS[i], "x", reply(i))
        if cache._tidier is not None:
            cache._tidier.join()
    before = (tmp_path / "c.sqlite").stat().st_size
    assert before > 2 * 4096, "the file holds replies although nothing was closed"
    assert len(cache._keys) == 120
    assert len(cache) == 120
    cache.close()
    assert ReplyCache(tmp_path / "c.sqlite").get(KEYS[119]) == reply(119)


def test_fields_of_a_reply_come_back():
    for each in (reply(3), Reply("", "content_filter", "no"), Reply("\ufffd\U0001f600\\", pictures=2)):
        assert caching._reply(encode(each)) == each
    assert prefixed(["ab", "c"]) != prefixed(["a", "bc"])


def test_a_schema_in_damaged_words_is_a_broken_cache(tmp_path):
    path = tmp_path / "c.sqlite"
    ReplyCache(path).close()
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE replies", b"CREATE \xb0ABLE replies"))
    with pytest.raises(StoreError, match=r"c\.sqlite is no debate cache, or broken"):
        ReplyCache(path)


def test_old_objects_rest_while_debates_are_held():
    seen = []

    async def talk(messages):
        seen.append(gc.get_freeze_count())
        return "A cup."

    gc.unfreeze()  # whatever an earlier test left
    Debater(talk, verdict=False).run([Meme("a", None, "x")], progress=False)
    assert min(seen) > 1000
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("text", ["7", "{}", "[1]", "no JSON"])
def test_a_reply_that_is_none_is_a_broken_cache(tmp_path, text):
    with contextlib.closing(ReplyCache(tmp_path / "c.sqlite")) as cache:
        cache.put(KEYS[0], "harmful/1", reply(0))
        assert cache.get(KEYS[0]) == reply(0)
        cache._database.execute("UPDATE replies SET reply = ?", (text,))
        with pytest.raises(StoreError, match=r"c\.sqlite is no debate cache, or broken"):
            cache.get(KEYS[0])
        assert (cache.hits, cache.misses) == (1, 0)

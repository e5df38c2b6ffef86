"""Replies that were paid for once: SQLite in WAL mode, each committed before it is used."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fusion_core.errors import StoreError
from meme_debate.backends import Reply
from meme_debate.errors import PromptVersionError
from meme_debate.prompts import VERSION

_KIND = "meme-debate.cache/1"
_BUSY_SECONDS, _LOCKED_SECONDS = 30.0, 0.01
_SELECT = "SELECT reply FROM replies WHERE key=?"
_INSERT = "INSERT OR IGNORE INTO replies VALUES "
_ROWS = 64  # of one statement, which are kept prepared
_MOST_KEYS = 200_000  # are kept in memory, some 20 MB
_LOOK_SECONDS = 0.005
_CHECKPOINT_ROWS = 8_000  # the log is some 40 MB by then
_TEXT = json.JSONEncoder(ensure_ascii=False).encode
_REPLY = (
    '{"text":%s,"finish_reason":%s,"refusal":%s,"prompt_tokens":%d,"completion_tokens":%d,"cached_tokens":%d,'
    '"pictures":%d}'
)


def prefixed(fields: Iterable[str | bytes]) -> bytes:
    """Fields one after the other, each with its length in front."""
    parts: list[bytes] = []
    for field in fields:
        data = field.encode() if isinstance(field, str) else field
        parts += (len(data).to_bytes(8, "little"), data)
    return b"".join(parts)


def cache_key(fields: Iterable[str | bytes]) -> bytes:
    """Sha256 of fields with their lengths, so that no two lists of fields give the same bytes.

    Example:
        >>> cache_key(["ab", "c"]) == cache_key(["a", "bc"])
        False
    """
    return hashlib.sha256(prefixed(fields)).digest()


class ReplyCache:
    """Replies by key in a file.

    A reply is on disk when :meth:`put` returns, or :meth:`commit` was awaited, so a killed run asks nothing
    twice that was answered before. Several processes may share a file; of two replies to one key the first
    counts, for both.

    Args:
        path: the file; made where it is not there.

    Attributes:
        hits: replies that :meth:`get` found.
        misses: that it did not.

    Raises:
        StoreError: the file is something else, broken, or cannot be written.
        PromptVersionError: its replies answer prompts of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.hits = self.misses = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._since, self._looked, self._version = 0, 0.0, 0
            self._keys: set[bytes] | None = None
            self._tidier: threading.Thread | None = None
            self._batch: list[tuple[bytes, str, Reply, asyncio.Future[Reply]]] = []
            self._database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            self._open()
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:  # SQLite tells damage in damaged words
            raise self._broken(error) from error

    def _open(self) -> None:
        execute = self._database.execute
        self._write_ahead()
        execute("PRAGMA synchronous=NORMAL")
        execute("PRAGMA cache_size=-32768")
        execute("PRAGMA wal_autocheckpoint=0")  # it would wait for the disk inside a commit
        execute("BEGIN IMMEDIATE")
        known = {name for (name,) in execute("SELECT name FROM sqlite_master WHERE type='table'")}
        if known and "meme_debate" not in known:
            execute("ROLLBACK")
            self._database.close()
            raise StoreError(f"{self.path} is a database of something else; name another file for the cache")
        execute("CREATE TABLE IF NOT EXISTS meme_debate (name TEXT PRIMARY KEY, value TEXT)")
        execute("CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, call TEXT, reply TEXT)")
        execute("INSERT OR IGNORE INTO meme_debate VALUES ('kind', ?), ('prompts', ?)", (_KIND, VERSION))
        facts = dict(execute("SELECT name, value FROM meme_debate"))
        execute("COMMIT")
        self._version, self._looked = self._others_version(), time.monotonic()
        keys = {key for (key,) in execute("SELECT key FROM replies LIMIT ?", (_MOST_KEYS + 1,))}
        self._keys = keys if len(keys) <= _MOST_KEYS else None
        if facts["kind"] != _KIND:
            self._database.close()
            raise StoreError(f"{self.path} has the format {facts['kind']!r}, wanted {_KIND!r}")
        if facts["prompts"] != VERSION:
            self._database.close()
            raise PromptVersionError(
                f"{self.path} holds replies to prompts {facts['prompts']!r}, this version asks {VERSION!r}; "
                "name another file for the cache"
            )

    def _write_ahead(self) -> None:
        """Turn to a write-ahead log; SQLite does not wait for others here, whatever its timeout."""
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._database.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(_LOCKED_SECONDS)
            else:
                return

    def _broken(self, error: Exception) -> StoreError:
        if "unable to open" in str(error) or isinstance(error, OSError):
            return StoreError(f"{self.path} cannot be opened: {error}; name a writable place for the cache")
        if "locked" in str(error):
            return StoreError(f"{self.path} was locked for {_BUSY_SECONDS:g} s by another process")
        return StoreError(f"{self.path} is no debate cache, or broken: {error}")

    def get(self, key: bytes) -> Reply | None:
        """The reply to a key, None where there is none.

        Raises:
            StoreError: the file is broken.
        """
        try:
            row = None if self._absent(key) else self._database.execute(_SELECT, (key,)).fetchone()
            found = None if row is None else _reply(row[0])
        except (sqlite3.Error, TypeError, ValueError, RecursionError) as error:
            raise self._broken(error) from error
        self.misses += found is None
        self.hits += found is not None
        return found

    def _absent(self, key: bytes) -> bool:
        """Whether the file surely lacks a key, told without looking into it.

        That needs the keys in memory and no other process that writes; it is asked for those every few
        milliseconds.
        """
        if self._keys is None:
            return False
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            if self._others_version() != self._version:
                self._keys = None
                return False
        return key not in self._keys

    def _others_version(self) -> int:
        """A number that changes when another connection commits."""
        return self._database.execute("PRAGMA data_version").fetchone()[0]

    def put(self, key: bytes, call: str, reply: Reply) -> Reply:
        """Commit a reply.

        Args:
            key: of the call.
            call: its name, for people who look into the file.
            reply: what came.

        Returns:
            What the file holds now: another process's reply where that came first.

        Raises:
            StoreError: the file is broken, locked, or the disk is full.
        """
        return self._write([(key, call, reply)])[0]

    async def commit(self, key: bytes, call: str, reply: Reply) -> Reply:
        """:meth:`put` for use inside an event loop: replies that came in together share one transaction.

        It returns when the transaction is over, one turn of the loop later.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Reply] = loop.create_future()
        if not self._batch:
            loop.call_soon(self._flush)
        self._batch.append((key, call, reply, done))
        return await done

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        for start in range(0, len(batch), _ROWS):
            part = batch[start : start + _ROWS]
            try:
                held = self._write([row[:3] for row in part])
            except StoreError as error:
                for *_, done in part:
                    if not done.done():
                        done.set_exception(error)
                continue
            for (*_, done), reply in zip(part, held, strict=True):
                if not done.done():  # whoever waited may be gone
                    done.set_result(reply)

    def _write(self, rows: Sequence[tuple[bytes, str, Reply]]) -> list[Reply]:
        """Insert rows in one transaction; what the file then holds for their keys."""
        values = [part for key, call, reply in rows for part in (key, call, encode(reply))]
        insert = _INSERT + ",".join(["(?,?,?)"] * len(rows))
        try:
            new = self._database.execute(insert, values).rowcount
            self._tidy(new)
            if self._keys is not None:
                self._keys.update(key for key, _, _ in rows)
            if new == len(rows):
                return [reply for _, _, reply in rows]
            held = [self._database.execute(_SELECT, (key,)).fetchone() for key, _, _ in rows]
            return [_reply(row[0]) for row in held]
        except (sqlite3.Error, TypeError, ValueError, RecursionError) as error:
            raise self._broken(error) from error

    def _tidy(self, rows: int) -> None:
        """Move the log into the file now and then, beside the run: readers and writers do not wait for it."""
        self._since += rows
        if self._since >= _CHECKPOINT_ROWS and (self._tidier is None or not self._tidier.is_alive()):
            self._since = 0
            self._tidier = threading.Thread(target=_checkpoint, args=(self.path,), daemon=True)
            self._tidier.start()

    def __len__(self) -> int:
        """Number of replies."""
        return self._database.execute("SELECT COUNT(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        """Commit what waits, and close the file."""
        self._flush()
        if self._tidier is not None:
            self._tidier.join()
        self._database.close()


def _checkpoint(path: Path) -> None:
    harmless = contextlib.suppress(sqlite3.Error, UnicodeDecodeError)
    with harmless, contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(PASSIVE)")  # what cannot be done now is done next time


def encode(reply: Reply) -> str:
    """A reply as the file holds it: a JSON object of its fields."""
    return _REPLY % (_TEXT(reply.text), _TEXT(reply.finish_reason), _TEXT(reply.refusal), *reply[3:])


def _reply(text: str) -> Reply:
    fields: dict[str, Any] = json.loads(text)
    return Reply(**fields)

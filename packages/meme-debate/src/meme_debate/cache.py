"""Replies that were paid for once: SQLite in WAL mode, one commit a reply, any number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusion_core.errors import StoreError
from meme_debate.backends import Reply
from meme_debate.errors import PromptVersionError
from meme_debate.prompts import VERSION

_KIND = "meme-debate.cache/1"
_BUSY_SECONDS = 30.0
_CHECKPOINT_PAGES = 16_000  # a checkpoint waits for the disk; the log is some 64 MB by then
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode


def cache_key(fields: Iterable[str | bytes]) -> bytes:
    """Sha256 of fields, each with its length, so that no two lists of fields give the same bytes.

    Example:
        >>> cache_key(["ab", "c"]) == cache_key(["a", "bc"])
        False
    """
    parts: list[bytes] = []
    for field in fields:
        data = field.encode() if isinstance(field, str) else field
        parts += (len(data).to_bytes(8, "little"), data)
    return hashlib.sha256(b"".join(parts)).digest()


class ReplyCache:
    """Replies by key in a file.

    A reply is on disk when :meth:`put` returns, so a killed run asks nothing twice that was answered before.
    Several processes may share a file; of two replies to one key the first counts, for both.

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
            self._database = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            self._open()
        except (sqlite3.Error, OSError) as error:
            raise self._broken(error) from error

    def _open(self) -> None:
        execute = self._database.execute
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=NORMAL")
        execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
        execute("BEGIN IMMEDIATE")
        known = {name for (name,) in execute("SELECT name FROM sqlite_master WHERE type='table'")}
        if known and "meme_debate" not in known:
            execute("ROLLBACK")
            self._database.close()
            raise StoreError(f"{self.path} is a database of something else; name another file for the cache")
        execute("CREATE TABLE IF NOT EXISTS meme_debate (name TEXT PRIMARY KEY, value TEXT)")
        execute(
            "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, call TEXT, reply TEXT) WITHOUT ROWID"
        )
        execute("INSERT OR IGNORE INTO meme_debate VALUES ('kind', ?), ('prompts', ?)", (_KIND, VERSION))
        facts = dict(execute("SELECT name, value FROM meme_debate"))
        execute("COMMIT")
        if facts["kind"] != _KIND:
            self._database.close()
            raise StoreError(f"{self.path} has the format {facts['kind']!r}, wanted {_KIND!r}")
        if facts["prompts"] != VERSION:
            self._database.close()
            raise PromptVersionError(
                f"{self.path} holds replies to prompts {facts['prompts']!r}, this version asks {VERSION!r}; "
                "name another file for the cache"
            )

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
            row = self._database.execute("SELECT reply FROM replies WHERE key=?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._broken(error) from error
        if row is None:
            self.misses += 1
            return None
        self.hits += 1
        return _reply(row[0])

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
        text = _ENCODE({name: getattr(reply, name) for name in Reply.__slots__})
        try:
            done = self._database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", (key, call, text))
            if done.rowcount == 1:
                return reply
            row = self._database.execute("SELECT reply FROM replies WHERE key=?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._broken(error) from error
        return _reply(row[0])

    def __len__(self) -> int:
        """Number of replies."""
        return self._database.execute("SELECT COUNT(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _reply(text: str) -> Reply:
    fields: dict[str, Any] = json.loads(text)
    return Reply(**fields)

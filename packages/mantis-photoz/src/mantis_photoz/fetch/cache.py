"""Files by what was asked: the sha256 of the address is the name, the oldest go when the space is used up."""

from __future__ import annotations

import os
from pathlib import Path

from fusion_core.atomic import atomic_write
from fusion_core.errors import check_range


class Cache:
    """A directory of fetched files that many catalogues share.

    Args:
        path: made on the first :meth:`put`.
        max_bytes: the files used longest ago go beyond this.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = Cache(folder, max_bytes=10)
        ...     cache.put("a" * 64, b"123456")
        ...     cache.put("b" * 64, b"123456")
        ...     cache.get("a" * 64), cache.get("b" * 64)
        (None, b'123456')
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = 20_000_000_000) -> None:
        check_range("max_bytes", max_bytes, 0, float("inf"))
        self.path, self.max_bytes = Path(path), max_bytes
        self._size: int | None = None

    def _file(self, key: str) -> Path:
        return self.path / key[:2] / f"{key}.fits"

    def get(self, key: str) -> bytes | None:
        """A file's bytes, or None; it then counts as used now."""
        place = self._file(key)
        try:
            body = place.read_bytes()
            os.utime(place)
        except OSError:
            return None
        return body

    def put(self, key: str, body: bytes) -> None:
        """Keep a file, whole or not at all; older ones go if the space is used up."""
        if len(body) > self.max_bytes:
            return
        with atomic_write(self._file(key)) as file:
            file.write(body)
        self._size = self.size() if self._size is None else self._size + len(body)
        if self._size > self.max_bytes:
            self._evict(key)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.stat().st_size for entry in self.path.glob("??/*.fits"))

    def drop(self, key: str) -> None:
        """Forget a file."""
        self._file(key).unlink(missing_ok=True)

    def _evict(self, keep: str) -> None:
        entries = [
            (entry.stat().st_mtime, entry.stat().st_size, entry) for entry in self.path.glob("??/*.fits")
        ]
        self._size = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries, key=lambda item: item[0]):
            if self._size <= self.max_bytes:
                break
            if entry.stem != keep:
                entry.unlink(missing_ok=True)
                self._size -= size

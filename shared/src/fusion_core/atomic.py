"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from fusion_core.errors import InputError

PathLike = str | os.PathLike[str]


def _sibling_parent(path: Path) -> Path:
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; name a writable place") from error
    return parent


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a directory
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: PathLike, mode: Literal["wb", "w"] = "wb") -> Generator[IO[Any], None, None]:
    """Write a file that appears whole or not at all.

    The block writes to a temporary sibling; on success it is flushed to disk and renamed over ``path``, on
    any error (Ctrl-C included) it is removed and an older file at ``path`` stays as it was.

    Raises:
        InputError: the place cannot be written.
    """
    target = Path(path)
    parent = _sibling_parent(target)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; name a writable place") from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, mode, encoding=None if mode == "wb" else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_directory(path: PathLike, *, overwrite: bool = False) -> Generator[Path, None, None]:
    """Fill a directory that appears whole or not at all.

    The block gets a temporary sibling directory; on success it is renamed to ``path``, on any error removed.

    Args:
        path: the final directory.
        overwrite: replace a directory that is already there (it is moved aside, then removed).

    Raises:
        InputError: ``path`` exists and is not empty without ``overwrite``, or cannot be written.
    """
    target = Path(path)
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not overwrite:
        raise InputError(f"{path} is there already and not empty; name another or pass overwrite=True")
    parent = _sibling_parent(target)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; name a writable place") from error
    old: Path | None = None
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=parent)) / target.name
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old is not None and old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)
    _sync_directory(parent)

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
UNDER_WAY = "run.partial"
"""The file that marks a directory of :func:`resumable_directory` as unfinished, whatever else it holds."""


def is_file(path: PathLike) -> bool:
    """Whether a file is there; a name that no file can have, such as one that is too long, is no error."""
    return os.path.isfile(path)  # noqa: PTH113 - Path's raises where the system refuses the name


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
    any error (Ctrl-C included) it is removed and an older file at ``path`` stays as it was. Text is UTF-8;
    half a surrogate pair, as in scraped JSON, is written as its escape, which in JSON it is again.

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
        text: dict[str, Any] = {} if mode == "wb" else {"encoding": "utf-8", "errors": "backslashreplace"}
        with os.fdopen(descriptor, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        try:
            temporary.replace(target)
        except OSError as error:  # a directory of that name
            raise InputError(f"cannot write {path}: {error.strerror or error}; name another place") from error
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
    if occupied(target) and not overwrite:
        raise InputError(f"{path} is there already and not empty; name another or pass overwrite=True")
    parent = _sibling_parent(target)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; name a writable place") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        replace_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def occupied(path: PathLike) -> bool:
    """Whether a directory cannot be made at a path without replacing something: a file, or entries in it."""
    place = Path(path)
    return place.exists() and (not place.is_dir() or any(place.iterdir()))


def _left(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def entries(directory: PathLike) -> set[str]:
    """Names in a directory but for what a killed :func:`atomic_write` left; none where it is not there."""
    place = Path(directory)
    return {entry.name for entry in place.iterdir() if not _left(entry.name)} if place.is_dir() else set()


def sweep(directory: PathLike) -> None:
    """Remove what a killed :func:`atomic_write` left in a directory that nobody else writes in."""
    place = Path(directory)
    for entry in place.iterdir() if place.is_dir() else ():
        if _left(entry.name):
            entry.unlink(missing_ok=True)


@contextmanager
def resumable_directory(
    path: PathLike, fingerprint: str, *, overwrite: bool = False
) -> Generator[Path, None, None]:
    """Fill a directory over one or several runs; it appears whole or not at all.

    The block gets ``PATH.partial``, with what an interrupted run of the same fingerprint left in it; what
    another left is removed. On success it is renamed to ``path``, on any error or kill it stays for the next.

    Args:
        path: the final directory.
        fingerprint: of all that the contents depend on.
        overwrite: replace what is at ``path``.

    Raises:
        InputError: ``path`` exists and is not empty without ``overwrite``, or cannot be written.
    """
    target = Path(path)
    if occupied(target) and not overwrite:
        raise InputError(f"{path} is there already and not empty; name another or pass overwrite=True")
    work = _sibling_parent(target) / f"{target.name}.partial"
    mark = work / UNDER_WAY
    if work.exists() and not (mark.is_file() and mark.read_bytes() == fingerprint.encode()):
        shutil.rmtree(work)
    if not work.exists():
        try:
            work.mkdir()
        except OSError as error:
            raise InputError(
                f"cannot write {path}: {error.strerror or error}; name a writable place"
            ) from error
        with atomic_write(mark, "w") as file:
            file.write(fingerprint)
    yield work
    mark.unlink()
    replace_directory(work, target)


def replace_directory(source: PathLike, path: PathLike) -> None:
    """Give a finished directory its place; what is there is moved aside first and removed afterwards.

    A kill leaves the old one, the new one or, between two renames, none; never a part of one.

    Args:
        source: the finished directory, beside ``path``.
        path: where it belongs.
    """
    target = Path(path)
    old: Path | None = None
    try:
        if target.exists():
            aside = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent)
            old = Path(aside) / target.name
            target.rename(old)
        Path(source).rename(target)
    except BaseException:
        if old is not None and old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old.parent, ignore_errors=True)
    _sync_directory(target.parent)

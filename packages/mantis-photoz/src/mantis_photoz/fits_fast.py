"""Read the images of FITS files: a fast path for plain float32 images, astropy for everything else.

The fast path walks the 80-byte cards of the primary header and takes the data as one view of the bytes that
were read; header values are parsed when they are asked for. A file that is no FITS file at all (empty, cut
off, a web page, a Git LFS pointer) gives a :class:`CutoutError` that says which.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mantis_photoz.errors import CutoutError

_BLOCK, _CARD = 2880, 80
_GZIP = b"\x1f\x8b"
_END, _LONG = b"END     ", b"HIERARCH"
_BITPIX, _NAXIS = b"BITPIX  ", b"NAXIS   "
_SCALED = frozenset((b"BSCALE  ", b"BZERO   "))
_AXES = tuple(f"NAXIS{n}".ljust(8).encode() for n in (1, 2, 3))


class Header(Mapping[str, Any]):
    """The cards of a FITS header; a value is parsed when it is asked for.

    Example:
        >>> cards = {b"EXPTIME ": b"EXPTIME =                 43.0 / seconds".ljust(80)}
        >>> Header(cards).get("EXPTIME"), Header(cards).get("FILTER")
        (43.0, None)
    """

    __slots__ = ("_cards",)

    def __init__(self, cards: dict[bytes, bytes]) -> None:
        self._cards = cards

    def __getitem__(self, name: str) -> Any:
        return _value(self._cards[name.ljust(8).encode()])

    def __iter__(self) -> Iterator[str]:
        return (key.decode("ascii", "replace").rstrip() for key in self._cards)

    def __len__(self) -> int:
        return len(self._cards)

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or ``default`` where there is none."""
        card = self._cards.get(name.ljust(8).encode())
        return default if card is None else _value(card)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.ljust(8).encode() in self._cards


def _value(card: bytes) -> Any:
    """The value of a card: text, logical, integer or real; None where it has none."""
    if card[8:10] != b"= ":
        return None
    text = card[10:].decode("ascii", "replace").strip()
    if text.startswith("'"):
        end = 1
        while (end := text.find("'", end)) != -1 and text[end : end + 2] == "''":
            end += 2
        return text[1 : end if end != -1 else None].replace("''", "'").rstrip()
    word = text.partition("/")[0].strip()
    if word in ("T", "F"):
        return word == "T"
    for kind in (int, float):
        try:
            return kind(word.replace("D", "E") if kind is float else word)
        except ValueError:
            continue
    return word or None


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a FITS file.

    Args:
        data: (bands, height, width), as stored (big-endian float32 on the fast path) or float32.
        header: name -> value.
        name: the extension's name, upper case; empty for the primary one.
    """

    data: NDArray[np.floating[Any]]
    header: Mapping[str, Any]
    name: str = ""


def read_fits(path: str | os.PathLike[str], *, fast: bool = True) -> list[Image]:
    """All 2-D and 3-D images of a FITS file, the planes of each first.

    Args:
        path: the file; ``.gz`` is unpacked.
        fast: take the quick way where the file allows it; both give the same numbers.

    Returns:
        At least one image.

    Raises:
        CutoutError: missing, empty, cut off, a web page, a Git LFS pointer, or without any image.
    """
    return parse_fits(read_bytes(path), str(path), fast=fast)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes.

    Raises:
        CutoutError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a Path costs more than the reading
            return file.read()
    except OSError as error:
        raise CutoutError(f"{path} cannot be read: {error.strerror or error}; fetch it again") from error


def parse_fits(content: bytes, name: str, *, fast: bool = True) -> list[Image]:
    """The images in the bytes of a FITS file; see :func:`read_fits`.

    Args:
        content: the file's bytes; images of the fast path are views of them.
        name: of the file, for messages.
        fast: see :func:`read_fits`.

    Raises:
        CutoutError: see :func:`read_fits`.
    """
    if content[:2] == _GZIP:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise CutoutError(f"{name} is cut off or damaged gzip ({error}); fetch it again") from error
    if content[:9] != b"SIMPLE  =":
        raise CutoutError(f"{name} {_what(content)}; fetch it again")
    if fast and (found := _plain(content, name)) is not None:
        return [found]
    return _by_astropy(content, name)


def _what(content: bytes) -> str:
    start = content[:200].lstrip().lower()
    if not content:
        return "is empty (0 bytes)"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return "is a web page (HTML), not FITS: the server sent an error in words"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not FITS: run git lfs pull"
    return f"is no FITS file (it begins with {content[:12]!r})"


def _plain(content: bytes, name: str) -> Image | None:
    """The fast path: the primary image of a file without further extensions, float32, without scaling."""
    last = content.find(_END)
    while last % _CARD and last != -1:
        last = content.find(_END, last + 1)
    if last == -1:
        raise CutoutError(f"{name} is cut off within its header ({len(content)} bytes); fetch it again")
    end = last + _CARD
    cards = {content[start : start + 8]: content[start : start + _CARD] for start in range(0, last, _CARD)}
    if _LONG in cards:
        for start in range(0, last, _CARD):
            if content.startswith(_LONG, start):
                word, _, value = content[start + 9 : start + _CARD].partition(b"=")
                cards[word.strip()] = b"        = " + value.strip()
    axes = _value(cards.get(_NAXIS, b""))
    if _value(cards.get(_BITPIX, b"")) != -32 or axes not in (2, 3) or not _SCALED.isdisjoint(cards):
        return None
    shape = tuple(_value(cards.get(key, b"")) for key in reversed(_AXES[:axes]))
    if not all(isinstance(size, int) and size > 0 for size in shape):
        return None
    offset = -(-end // _BLOCK) * _BLOCK
    count = math.prod(shape)
    if offset + 4 * count > len(content):
        raise CutoutError(
            f"{name} is cut off: {len(content)} bytes, its header promises {offset + 4 * count}; fetch it "
            "again"
        )
    if len(content) > -(-(offset + 4 * count) // _BLOCK) * _BLOCK:  # more extensions follow
        return None
    data = np.frombuffer(content, ">f4", count, offset).reshape(shape if axes == 3 else (1, *shape))
    return Image(data, Header(cards))


def _by_astropy(content: bytes, name: str) -> list[Image]:
    import warnings

    from astropy.io import fits

    found: list[Image] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", fits.verify.VerifyWarning)
            warnings.filterwarnings("error", message=".*[Tt]runcated.*")
            with fits.open(io.BytesIO(content), memmap=False) as units:
                for unit in units:
                    if not isinstance(unit, fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU):
                        continue
                    data: Any = unit.data
                    if data is None or data.ndim not in (2, 3):
                        continue
                    planes = np.asarray(data, np.float32)
                    header = {key: value for key, value in unit.header.items() if key}
                    found.append(
                        Image(planes if data.ndim == 3 else planes[None], header, str(unit.name).upper())
                    )
    except Exception as error:  # whatever astropy meets, such as a KeyError for a missing NAXIS3
        raise CutoutError(
            f"{name} is cut off or damaged FITS ({' '.join(str(error).split())}); fetch it again"
        ) from error
    if not found:
        raise CutoutError(f"{name} holds no image of two or three dimensions")
    return [image if image.name != "PRIMARY" else Image(image.data, image.header) for image in found]

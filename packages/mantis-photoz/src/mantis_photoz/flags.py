"""Why a number may not be what it seems: one bit per reason, and its words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntFlag


class Flag(IntFlag):
    """The bits of the column ``flags``; :data:`MEANINGS` says what each tells."""

    MISSING_SURVEY = 1
    NO_IMAGES = 2
    BAD_CUTOUT = 4
    OUTSIDE_PS1 = 8
    OFF_CENTRE = 16
    RESAMPLED = 32
    PADDED = 64
    ASSUMED_BANDS = 128
    NAN_PIXELS = 256
    INF_PIXELS = 512
    NO_ZERO_POINT = 1024
    NO_DUST = 2048
    HIGH_DUST = 4096
    OUT_OF_DISTRIBUTION = 8192
    FAILED = 16384


MEANINGS: dict[Flag, str] = {
    Flag.MISSING_SURVEY: "a survey has no data here: no file, all zero, or all NaN (see survey_mask)",
    Flag.NO_IMAGES: "no survey has data; the density is uniform",
    Flag.BAD_CUTOUT: "a file could not be used (see notes); its survey counts as missing",
    Flag.OUTSIDE_PS1: "declination below -30 degrees: outside of the Pan-STARRS1 3pi footprint",
    Flag.OFF_CENTRE: "a cutout was centered over 1.5 arc seconds from the catalogue's position, and shifted",
    Flag.RESAMPLED: "a cutout had another pixel scale or was mirrored, and was resampled by its WCS",
    Flag.PADDED: "a cutout was too small and was padded with zeros",
    Flag.ASSUMED_BANDS: "a header does not say which plane is which band; the survey's order was assumed",
    Flag.NAN_PIXELS: "more than the limit of a plane's pixels are NaN",
    Flag.INF_PIXELS: "infinite pixels were taken as NaN",
    Flag.NO_ZERO_POINT: "neither exposure time nor zero point in the header of a stack in counts",
    Flag.NO_DUST: "E(B-V) was not to be had and was taken as 0",
    Flag.HIGH_DUST: "E(B-V) is above 1",
    Flag.OUT_OF_DISTRIBUTION: "unlike the training set",
    Flag.FAILED: "the network gave no finite numbers; the density is uniform",
}

UNUSABLE = Flag.NO_IMAGES | Flag.FAILED
"""Objects whose density says nothing."""


def describe(value: int, missing: Sequence[str] = ()) -> str:
    """The names of the bits that are set, by ``|``; missing surveys are named one by one.

    Args:
        value: of the column ``flags``.
        missing: surveys without data.

    Example:
        >>> describe(2049, ["galex"]), describe(0)
        ('MISSING_GALEX|NO_DUST', '')
    """
    words: list[str] = []
    for flag in Flag:
        if not value & flag:
            continue
        named = [f"MISSING_{name.upper()}" for name in missing] if flag is Flag.MISSING_SURVEY else []
        words += named or [str(flag.name)]
    return "|".join(words)


def legend() -> str:
    """The bits with their meanings on one line each, for the description of the column."""
    return "; ".join(f"{int(flag)} {flag.name}: {words}" for flag, words in MEANINGS.items())


def union(values: Iterable[int]) -> int:
    """All bits of some flags.

    Example:
        >>> union([1, 4])
        5
    """
    found = 0
    for value in values:
        found |= int(value)
    return found

"""Probability maps of huge images: overlapping tiles, blended before anything is cut out of the map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fusion_core.errors import ConfigError

from .geometry import Array

_HALF_ABOVE = 1 << 26  # pixels: larger maps are kept in half precision


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles along one side begin.

    Args:
        length: of the side, a multiple of 32.
        tile: of a tile, a multiple of 32.
        overlap: of neighbors, a multiple of 32 below ``tile``; the last two may overlap more.

    Returns:
        Starts, multiples of 32; the last tile ends with the side.

    Raises:
        ConfigError: other numbers.

    Example:
        >>> tile_starts(1024, 512, 128)
        [0, 384, 512]
    """
    for name, value, least in (("tile", tile, 32), ("overlap", overlap, 0)):
        if value % 32 or value < least:
            raise ConfigError(f"{name} is {value!r}, wanted a multiple of 32 of at least {least}")
    if overlap >= tile:
        raise ConfigError(f"overlap is {overlap!r} with tile {tile!r}, wanted less than the tile")
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def ramps(length: int, starts: Sequence[int], tile: int) -> list[Array]:
    """Weights of each tile along one side: linear over the overlaps, together 1 everywhere.

    Args:
        length: of the side.
        starts: see :func:`tile_starts`.
        tile: of a tile.

    Returns:
        A float32 array for each tile.
    """
    rows = np.zeros((len(starts), length), np.float64)
    for at, start in enumerate(starts):
        stop = min(start + tile, length)
        weight = np.ones(stop - start)
        if at:
            shared = starts[at - 1] + tile - start
            weight[:shared] = np.minimum(weight[:shared], (np.arange(shared) + 0.5) / shared)
        if at + 1 < len(starts):
            shared = stop - starts[at + 1]
            rest = stop - start - shared
            weight[rest:] = np.minimum(weight[rest:], (np.arange(shared, 0, -1) - 0.5) / shared)
        rows[at, start:stop] = weight
    rows /= rows.sum(0)
    stops = [min(start + tile, length) for start in starts]
    return [row[start:stop].astype(np.float32) for row, start, stop in zip(rows, starts, stops, strict=True)]


def tiled_map(
    image: Array,
    predict: Callable[[list[Array]], Iterator[Array]],
    *,
    tile: int = 1536,
    overlap: int = 256,
) -> Array:
    """The probability map of an image, tile by tile (section 9).

    Words that cross tiles stay whole, since regions are cut out of the blended map. A tile's values are
    weighted by a ramp that falls linearly over its overlap with each neighbor.

    Args:
        image: (height, width, channels), sides multiples of 32.
        predict: takes tiles of one shape and gives their maps (height, width), in order.
        tile: side of a tile, a multiple of 32.
        overlap: of neighboring tiles, a multiple of 32.

    Returns:
        float32 (height, width); float16 above 2**26 pixels. With one tile it is that tile's map.

    Raises:
        ConfigError: sides that are no multiples of 32, or an overlap that is not below the tile.
    """
    height, width = image.shape[:2]
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    tiles = [image[rows[i] : rows[i] + tile, columns[j] : columns[j] + tile] for i, j in places]
    if len(tiles) == 1:
        return next(predict(tiles))
    down, across = ramps(height, rows, tile), ramps(width, columns, tile)
    merged = np.zeros((height, width), np.float16 if height * width > _HALF_ABOVE else np.float32)
    for (i, j), prob in zip(places, predict(tiles), strict=True):
        window = merged[rows[i] : rows[i] + tile, columns[j] : columns[j] + tile]
        window += (prob * down[i][:, None] * across[j][None, :]).astype(merged.dtype)
    return np.clip(merged, 0, 1, out=merged)

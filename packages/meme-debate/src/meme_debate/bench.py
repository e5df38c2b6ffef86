"""The benchmark: the client against a stub, training and the light judge against plain schemes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fusion_core.bench import Bench, Row
from fusion_core.errors import ConfigError


def run(
    *,
    repeats: int = 5,
    client: bool = True,
    judges: bool = True,
    base: bool = False,
    memes: Path | None = None,
    recorded: Path | None = None,
    quiet: bool = False,
) -> Bench:
    """Measure everything that the package promises of its speed; each row is told on stderr when it is there.

    Args:
        repeats: pairs per row, at least 1.
        client: measure the HTTP client.
        judges: measure training and the light judge.
        base: measure training at the size of Flan-T5-base too, which takes some minutes.
        memes: count shared prompt tokens over these memes instead of made ones.
        recorded: ``debates.jsonl`` about them.
        quiet: say nothing on stderr.

    Raises:
        ConfigError: fewer than one repeat.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, wanted at least 1")
    bench, start = Bench("meme-debate"), time.perf_counter()
    for row in _rows(repeats, client, judges, base, memes, recorded):
        bench.add(row)
        if not quiet:
            target = f" ({row.target}: {'met' if row.met else 'missed'})" if row.target else ""
            seconds = time.perf_counter() - start
            sys.stderr.write(f"{seconds:5.0f} s  {row.name}: {row.ratio:.2f}{target} {row.note}\n")
    return bench


def _rows(
    repeats: int, client: bool, judges: bool, base: bool, memes: Path | None, recorded: Path | None
) -> Iterator[Row]:
    if client:
        from meme_debate import bench_client

        yield from bench_client.rows(repeats=repeats, memes=memes, recorded=recorded)
    if judges:
        from meme_debate import bench_judge

        yield from bench_judge.rows(repeats, base=base)

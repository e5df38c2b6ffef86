"""The benchmark: the client against a stub, training and the light judge against plain schemes."""

from __future__ import annotations

from pathlib import Path

from fusion_core.bench import Bench
from fusion_core.errors import ConfigError


def run(
    *,
    repeats: int = 5,
    client: bool = True,
    judges: bool = True,
    memes: Path | None = None,
    recorded: Path | None = None,
) -> Bench:
    """Measure everything that the package promises of its speed.

    Args:
        repeats: pairs per row, at least 1.
        client: measure the HTTP client.
        judges: measure training and the light judge.
        memes: count shared prompt tokens over these memes instead of made ones.
        recorded: ``debates.jsonl`` about them.

    Raises:
        ConfigError: fewer than one repeat.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, wanted at least 1")
    bench = Bench("meme-debate")
    if client:
        from meme_debate import bench_client

        for row in bench_client.rows(repeats=repeats, memes=memes, recorded=recorded):
            bench.add(row)
    if judges:
        from meme_debate import bench_judge

        for row in bench_judge.rows(repeats):
            bench.add(row)
    return bench

"""Measure AdaEA against the plain loop: ``python packages/adaea/benchmarks/run.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from adaea.bench import run


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="pairs per row")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="speed only")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    bench = run(
        repeats=options.repeats,
        batch=options.batch,
        size=options.size,
        steps=options.steps,
        device=options.device,
        memory=not options.no_memory,
        threads=options.threads,
    )
    bench.print()
    bench.save(options.out)


if __name__ == "__main__":
    main()

"""Measure labels, network, post-processing and detector: ``python packages/dbnet-asf/benchmarks/run.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from dbnet_asf.bench import run


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="pairs per row")
    parser.add_argument("--threads", type=int, default=1, help="of both sides of a pair")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="speed only")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    bench = run(
        repeats=options.repeats,
        threads=options.threads,
        device=options.device,
        memory=not options.no_memory,
    )
    bench.print()
    bench.save(options.out)


if __name__ == "__main__":
    main()

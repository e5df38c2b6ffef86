"""Measure alignment, the loss and merging: ``python packages/fusechat/benchmarks/run.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from fusechat.bench import run


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="pairs per row")
    parser.add_argument("--tokens", type=int, default=1024, help="of the aligned pair")
    parser.add_argument("--no-memory", action="store_true", help="speed only")
    parser.add_argument("--merging", type=Path, help="a folder with 4 GB of room: compare with mergekit")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    options_of_run = {"tokens": options.tokens, "memory": not options.no_memory}
    bench = run(repeats=options.repeats, merging=options.merging, **options_of_run)
    bench.print()
    bench.save(options.out)


if __name__ == "__main__":
    main()

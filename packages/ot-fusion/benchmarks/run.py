"""Measure ot-fusion: ``python packages/ot-fusion/benchmarks/run.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ot_fusion.bench import run_bench


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    bench = run_bench(
        options.device, quick=options.quick, memory=not options.no_memory, threads=options.threads
    )
    bench.print()
    bench.save(options.out)


if __name__ == "__main__":
    main()

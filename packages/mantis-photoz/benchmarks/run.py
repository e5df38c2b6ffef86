"""Measure recalibration, scores, reading, simulating: ``python packages/mantis-photoz/benchmarks/run.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mantis_photoz.bench import run


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="pairs per row")
    parser.add_argument("--only", nargs="*", default=(), help="words in the names of measures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    bench = run(repeats=options.repeats, only=options.only, device=options.device)
    bench.print()
    bench.save(options.out)


if __name__ == "__main__":
    main()

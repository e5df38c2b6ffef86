"""Measure the solvers and whole generation: ``python packages/logit-fusion/benchmarks/run.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from logit_fusion.bench import run


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="pairs per row")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the members")
    parser.add_argument("--layers", type=int, default=8, help="of each member")
    parser.add_argument("--no-members", action="store_true", help="solvers only, no models")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    bench = run(
        repeats=options.repeats,
        device=options.device,
        members=not options.no_members,
        hidden=options.hidden,
        layers=options.layers,
    )
    bench.print()
    bench.save(options.out)


if __name__ == "__main__":
    main()

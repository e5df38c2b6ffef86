"""Measure the engines against plain distillation: ``python packages/kd-trilateral/benchmarks/run.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kd_trilateral.bench import run


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="all", choices=["resnet", "mlp", "all"])
    parser.add_argument("--engines", nargs="*", help="engines to measure; all by default")
    parser.add_argument("--repeats", type=int, default=7, help="pairs per row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    bench = run(options.student, options.engines, options.repeats, device=options.device)
    bench.print()
    bench.save(options.out)


if __name__ == "__main__":
    main()

"""Measure the client and the judges: ``python packages/meme-debate/benchmarks/run.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from meme_debate.bench import run


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="pairs per row")
    parser.add_argument("--no-client", action="store_true", help="judges only")
    parser.add_argument("--no-judges", action="store_true", help="client only")
    parser.add_argument("--base", action="store_true", help="training at the size of Flan-T5-base too")
    parser.add_argument("--memes", type=Path, help="count shared prompt tokens over these memes")
    parser.add_argument("--debates", type=Path, help="debates about them")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    bench = run(
        repeats=options.repeats,
        client=not options.no_client,
        judges=not options.no_judges,
        base=options.base,
        memes=options.memes,
        recorded=options.debates,
    )
    bench.print()
    bench.save(options.out)


if __name__ == "__main__":
    main()

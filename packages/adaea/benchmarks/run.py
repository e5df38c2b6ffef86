"""Measure AdaEA against the plain loop: ``adaea bench``, with its options."""

from adaea.cli import app
from fusion_core import cli

if __name__ == "__main__":
    cli.run(app, "bench")

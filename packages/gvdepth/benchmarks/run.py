"""Measure geometry, metrics, head and prediction: ``gvdepth bench``, with its options."""

from fusion_core import cli
from gvdepth.cli import app

if __name__ == "__main__":
    cli.run(app, "bench")

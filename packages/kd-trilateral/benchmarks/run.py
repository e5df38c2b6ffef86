"""Measure the engines against plain distillation: ``kd-trilateral bench``, with its options."""

from fusion_core import cli
from kd_trilateral.cli import app

if __name__ == "__main__":
    cli.run(app, "bench")

"""Measure the solvers and whole generation: ``logit-fusion bench``, with its options."""

from fusion_core import cli
from logit_fusion.cli import app

if __name__ == "__main__":
    cli.run(app, "bench")

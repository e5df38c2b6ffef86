"""Measure fusing, costs, solvers and memory: ``ot-fusion bench``, with its options."""

from fusion_core import cli
from ot_fusion.cli import app

if __name__ == "__main__":
    cli.run(app, "bench")

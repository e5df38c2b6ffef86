"""Measure labels, network, post-processing and detector: ``dbnet-asf bench``, with its options."""

from dbnet_asf.cli import app
from fusion_core import cli

if __name__ == "__main__":
    cli.run(app, "bench")

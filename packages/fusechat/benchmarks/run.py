"""Measure alignment, the loss and merging: ``fusechat bench``, with its options."""

from fusechat.cli import app
from fusion_core import cli

if __name__ == "__main__":
    cli.run(app, "bench")

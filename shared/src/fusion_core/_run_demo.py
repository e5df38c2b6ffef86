"""The child process of ``fusion demo``: one method's demo, whose crash takes no other along.

Called as ``python -m fusion_core._run_demo NAME OUT SEED quick|full``.
"""

from __future__ import annotations

import sys

from fusion_core.demo import discover, run_demo
from fusion_core.errors import FusionError


def main(name: str, out: str, seed: str, mode: str) -> None:
    """Run the demo of the installed method ``name`` into ``out``."""
    try:
        run_demo(discover({}, [name])[name], out, full=mode == "full", seed=int(seed))
    except FusionError as error:  # a missing extra: the remedy says it all
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])

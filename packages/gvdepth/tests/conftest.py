"""Makes the helpers beside the tests importable, also in the processes that tests start: tests are no package."""

from __future__ import annotations

import sys
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))

"""Makes the helpers beside the tests importable, also in processes that tests start."""

from __future__ import annotations

import sys
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))

# test_golden.py runs these too, so that `test_golden.py --golden DIR` checks every file of a folder.
collect_ignore = ["test_golden_models.py", "test_golden_resample.py"]

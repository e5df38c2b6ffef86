"""The tools fork, which Windows cannot."""

import os

collect_ignore_glob = [] if hasattr(os, "fork") else ["*.py"]

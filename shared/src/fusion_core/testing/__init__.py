"""Helpers for the test suites of the fusion packages; none loads torch or pytest before it is used."""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

if TYPE_CHECKING:
    from fusion_core.testing import detfill, strategies, tiny
    from fusion_core.testing.detfill import array, fill_state_dict, parameter
    from fusion_core.testing.plugin import Golden
    from fusion_core.testing.processes import heed_ctrl_c, kill_when, run_cli, spawn
    from fusion_core.testing.server import FaultServer

__all__ = [
    "FaultServer",
    "Golden",
    "array",
    "detfill",
    "fill_state_dict",
    "heed_ctrl_c",
    "kill_when",
    "parameter",
    "run_cli",
    "spawn",
    "strategies",
    "tiny",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "FaultServer": "server",
        "Golden": "plugin",
        "array": "detfill",
        "detfill": "detfill",
        "fill_state_dict": "detfill",
        "heed_ctrl_c": "processes",
        "kill_when": "processes",
        "parameter": "detfill",
        "run_cli": "processes",
        "spawn": "processes",
        "strategies": "strategies",
        "tiny": "tiny",
    },
)

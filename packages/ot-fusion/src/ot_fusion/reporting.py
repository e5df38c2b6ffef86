"""Tables of maps."""

from collections.abc import Mapping
from typing import Any

from ot_fusion.plan import Plan

__all__ = ["plan_rows"]


def plan_rows(maps: Mapping[str, Plan], costs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per map: sizes, transport cost, share of mass on its own index, softness, iterations."""
    rows: list[dict[str, Any]] = []
    for name, plan in maps.items():
        note = {**plan.info, **costs.get(name, {})}
        n0, n1 = plan.matrix.shape
        rows.append(
            {
                "map": name,
                "source": n0,
                "anchor": n1,
                "cost": note.get("cost"),
                "identity_share": plan.identity_share(),
                "softness": plan.entropy(),
                "solver": note.get("solver", "merged"),
                "iterations": note.get("iterations"),
            }
        )
    return rows

"""Pictures: maps before and after sorting, barriers, cost per layer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fusion_core.atomic import PathLike, atomic_write
from fusion_core.errors import require_extra
from fusion_core.report import Figure, Report
from ot_fusion.metrics import Curve
from ot_fusion.plan import Plan

__all__ = ["barrier_figure", "cost_figure", "map_figure", "save_map_report"]


def _plt() -> Any:
    matplotlib = require_extra("matplotlib", "plot", "ot-fusion")
    matplotlib.use("Agg", force=False)
    return require_extra("matplotlib.pyplot", "plot", "ot-fusion")


def _sorted(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows in the order of their centre of mass."""
    mass = matrix.sum(1, keepdims=True)
    centre = (matrix / np.where(mass > 0, mass, 1)) @ np.arange(matrix.shape[1])
    return matrix[np.argsort(centre, kind="stable")]


def _save(figure: Any, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def map_figure(maps: Mapping[str, Plan], path: Path, *, most: int = 3) -> Figure:
    """Heat maps of some maps, as they are and with the source's neurons sorted by their partners.

    Args:
        maps: by name.
        path: of the PNG.
        most: how many maps.
    """
    plt = _plt()
    chosen = list(maps.items())[:most]
    figure, axes = plt.subplots(2, len(chosen), figsize=(3.2 * len(chosen), 6.2), squeeze=False)
    for column, (name, plan) in enumerate(chosen):
        matrix = plan.out_map().detach().cpu().double().numpy()
        for row, (values, label) in enumerate(((matrix, "as they come"), (_sorted(matrix), "source sorted"))):
            axes[row][column].imshow(values, cmap="magma", aspect="auto", interpolation="nearest")
            axes[row][column].set_title(f"{name}\n{label}" if row == 0 else label, fontsize=9)
            axes[row][column].set_xlabel("anchor neuron")
            axes[row][column].set_ylabel("source neuron")
    figure.tight_layout()
    _save(figure, path)
    plt.close(figure)
    return Figure(
        path,
        f"Heat maps of the maps {', '.join(name for name, _ in chosen)}, before and after sorting",
        "Each column shows where one anchor neuron comes from. A clear diagonal after sorting: one partner "
        "each.",
    )


def barrier_figure(curves: Mapping[str, Curve], path: Path, label: str) -> Figure:
    """Values along the line between two models, one curve each.

    Args:
        curves: by name.
        path: of the PNG.
        label: of the vertical axis.
    """
    plt = _plt()
    figure, ax = plt.subplots(figsize=(6, 3.8))
    for name, curve in curves.items():
        curve.plot(ax, label=name)
    ax.set_ylabel(label)
    ax.legend()
    ax.grid(alpha=0.3)
    figure.tight_layout()
    _save(figure, path)
    plt.close(figure)
    return Figure(
        path,
        f"{label} along the straight line between two models: {', '.join(curves)}",
        "t = 0 is the source, t = 1 the anchor. A dip between the ends is the barrier that alignment "
        "removes.",
    )


def cost_figure(rows: list[dict[str, Any]], path: Path) -> Figure:
    """Bars of the transport cost of every map.

    Args:
        rows: of a fusion's report.
        path: of the PNG.
    """
    plt = _plt()
    known = [row for row in rows if row.get("cost") is not None]
    figure, ax = plt.subplots(figsize=(6, max(2.0, 0.28 * len(known) + 1)))
    ax.barh([row["map"] for row in known], [row["cost"] for row in known], color="#3b6ea5")
    ax.invert_yaxis()
    ax.set_xlabel("transport cost (of the normalised ground cost)")
    figure.tight_layout()
    _save(figure, path)
    plt.close(figure)
    return Figure(
        path, "Transport cost of every map", "Low: the two models' layers hold much the same features."
    )


def save_map_report(report: Report, maps: Mapping[str, Plan], out: PathLike) -> None:
    """Write a fusion's table with heat maps of its largest maps and the cost of every layer.

    Args:
        report: of the fusion.
        maps: its plans.
        out: a directory.
    """
    with tempfile.TemporaryDirectory() as folder:
        chosen = dict(sorted(maps.items(), key=lambda item: -item[1].matrix.numel())[:3])
        pictures = [map_figure(chosen, Path(folder) / "maps.png")] if chosen else []
        if any(row["cost"] is not None for row in report.rows):
            pictures.append(cost_figure([dict(row) for row in report.rows], Path(folder) / "costs.png"))
        replace(report, figures=pictures).save(out)

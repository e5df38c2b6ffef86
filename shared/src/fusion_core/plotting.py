"""Pictures by matplotlib without pyplot: no backend is chosen, no window opens, nothing stays behind.

matplotlib is an extra of the packages, so each call names the package whose extra brings it.
"""

from __future__ import annotations

import os
from typing import Any

from fusion_core.atomic import atomic_write
from fusion_core.errors import require_extra

DPI = 120


def new_figure(width: float, height: float, package: str, extra: str = "plot") -> Any:
    """An empty ``matplotlib.figure.Figure`` on white, whose parts keep out of each other's way.

    Args:
        width: inches.
        height: inches.
        package: the distribution that asks.
        extra: of it that brings matplotlib.

    Raises:
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> ax = new_figure(4.0, 3.0, "kd-trilateral").subplots()
        >>> clean_axes(ax, "loss", "step", "nats").get_xlabel()
        'step'
    """
    module = require_extra("matplotlib.figure", extra, package)
    return module.Figure(figsize=(width, height), layout="constrained", dpi=DPI, facecolor="white")


def axes_or_new(ax: Any, package: str, width: float = 6.4, height: float = 4.0) -> Any:
    """The axes that were given, or those of a new figure; for methods ``plot(ax=None)``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return new_figure(width, height, package).subplots() if ax is None else ax


def clean_axes(ax: Any, title: str = "", x: str = "", y: str = "") -> Any:
    """Axes in the style of all our pictures: a title on the left, a faint grid, two spines.

    Returns:
        The axes.
    """
    ax.set_title(title, fontsize=10, loc="left", fontweight="bold")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)

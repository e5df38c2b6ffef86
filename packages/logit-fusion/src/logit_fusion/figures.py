"""The demo's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_core.errors import require_extra
from fusion_core.plotting import clean_axes, new_figure, save_figure
from fusion_core.report import Figure

__all__ = ["alpha_histogram", "alpha_text", "loss_bars"]


def _figure(width: float, height: float) -> Any:
    return new_figure(width, height, "logit-fusion", "demo")


def loss_bars(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, colors: Mapping[str, str]
) -> Figure:
    """Bars of the loss of every method, one panel per held-out text.

    Args:
        panels: title -> method -> mean and standard deviation, in nats per token.
        path: of the picture.
        colors: method -> color; others are gray.
    """
    tall = max(len(methods) for methods in panels.values())
    figure = _figure(3.6 * len(panels) + 1.2, 0.32 * tall + 1.3)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=False)
    for ax, (title, methods) in zip(axes[0], panels.items(), strict=True):
        names = list(methods)[::-1]
        means, spreads = zip(*(methods[name] for name in names), strict=True)
        ax.barh(names, means, xerr=spreads, color=[colors.get(name, "#b5b5b5") for name in names], height=0.7)
        for place, mean in enumerate(means):
            ax.text(mean + max(means) * 0.03, place, f"{mean:.2f}", va="center", fontsize=8)
        ax.set_xlim(0, max(means) * 1.25)
        clean_axes(ax, title, "nats per token")
    save_figure(figure, path)
    return Figure(
        path,
        "Bars of the loss per token of every method on held-out texts",
        "Negative log-likelihood, lower is better; the line is the standard deviation over groups of "
        "windows.",
    )


def alpha_histogram(alphas: Mapping[str, Sequence[float]], path: Path) -> Figure:
    """How often which strength was chosen.

    Args:
        alphas: held-out text -> strengths of all its tokens.
        path: of the picture.
    """
    figure = _figure(6, 3)
    ax = figure.subplots()
    colors = ("#0072B2", "#D55E00", "#009E73")
    for color, (name, values) in zip(colors, alphas.items(), strict=False):
        ax.hist(values, bins=40, range=(0, 2), histtype="step", lw=1.8, label=name, density=True, color=color)
    ax.axvline(1.0, color="#888888", ls="--", lw=1)
    top = ax.get_ylim()[1]
    ax.set_ylim(0, top * 1.15)
    ax.text(1.01, top * 1.05, "proxy-tuning", fontsize=8, color="#555555")
    clean_axes(ax, x="alpha of a token", y="density")
    ax.legend(frameon=False)
    save_figure(figure, path)
    return Figure(
        path,
        "Histograms of the dynamic strength alpha on three held-out texts",
        "The strength that matches the small model's shift, token by token; static fusion takes one for all.",
    )


def alpha_text(words: Sequence[str], alphas: Sequence[float], path: Path, width: int = 78) -> Figure:
    """A paragraph whose background is alpha.

    Args:
        words: the tokens' texts.
        alphas: strength with which each was predicted.
        path: of the picture.
        width: characters of a line.
    """
    matplotlib: Any = require_extra("matplotlib", "demo", "logit-fusion")
    patches: Any = require_extra("matplotlib.patches", "demo", "logit-fusion")
    cm: Any = require_extra("matplotlib.cm", "demo", "logit-fusion")
    colors = matplotlib.colormaps["YlOrRd"]
    cells: list[tuple[int, int, str, float]] = []
    line = column = 0
    for word, alpha in zip(words, alphas, strict=True):
        for letter in word:
            if letter == "\n" or column >= width:
                line, column = line + 1, 0
            if letter != "\n":
                cells.append((line, column, letter, alpha))
                column += 1
    figure = _figure(10, 0.24 * (line + 1) + 0.9)
    ax = figure.subplots()
    for row, place, letter, alpha in cells:
        ax.add_patch(patches.Rectangle((place, -row - 1), 1, 1, color=colors(alpha / 2 * 0.85), lw=0))
        ax.text(place + 0.5, -row - 0.5, letter, family="monospace", fontsize=8.5, ha="center", va="center")
    ax.set_xlim(0, width)
    ax.set_ylim(-line - 1, 0)
    ax.axis("off")
    scale = cm.ScalarMappable(cmap=colors, norm=matplotlib.colors.Normalize(0, 2 / 0.85))
    bar = figure.colorbar(scale, ax=ax, fraction=0.025, pad=0.01, boundaries=[i / 20 for i in range(41)])
    bar.set_label("alpha", fontsize=8)
    bar.set_ticks([0, 1, 2])
    save_figure(figure, path)
    return Figure(
        path,
        "A held-out paragraph of the language reference, its background the strength alpha",
        "Each token on the strength with which it was predicted.",
    )

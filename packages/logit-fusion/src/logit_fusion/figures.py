"""The demo's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_core.errors import require_extra
from fusion_core.report import Figure

__all__ = ["alpha_histogram", "alpha_text", "loss_bars"]


def _pyplot() -> Any:
    matplotlib: Any = require_extra("matplotlib", "demo", "logit-fusion")
    matplotlib.use("Agg", force=False)
    return require_extra("matplotlib.pyplot", "demo", "logit-fusion")


def loss_bars(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, colors: Mapping[str, str]
) -> Figure:
    """Bars of the loss of every method, one panel per held-out text.

    Args:
        panels: title -> method -> mean and standard deviation, in nats per token.
        path: of the picture.
        colors: method -> color; others are gray.
    """
    plt = _pyplot()
    tall = max(len(methods) for methods in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels) + 1.2, 0.32 * tall + 1.3), squeeze=False, sharey=False
    )
    for ax, (title, methods) in zip(axes[0], panels.items(), strict=True):
        names = list(methods)[::-1]
        means, spreads = zip(*(methods[name] for name in names), strict=True)
        ax.barh(names, means, xerr=spreads, color=[colors.get(name, "#b5b5b5") for name in names], height=0.7)
        for place, mean in enumerate(means):
            ax.text(mean + max(means) * 0.03, place, f"{mean:.2f}", va="center", fontsize=8)
        ax.set_xlim(0, max(means) * 1.25)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("nats per token", fontsize=8)
        ax.tick_params(labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
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
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(6, 3))
    colors = ("#0072B2", "#D55E00", "#009E73")
    for color, (name, values) in zip(colors, alphas.items(), strict=False):
        ax.hist(values, bins=40, range=(0, 2), histtype="step", lw=1.8, label=name, density=True, color=color)
    ax.axvline(1.0, color="#888888", ls="--", lw=1)
    top = ax.get_ylim()[1]
    ax.set_ylim(0, top * 1.15)
    ax.text(1.01, top * 1.05, "proxy-tuning", fontsize=8, color="#555555")
    ax.set_xlabel("alpha of a token")
    ax.set_ylabel("density")
    ax.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
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
    plt = _pyplot()
    colors = plt.get_cmap("YlOrRd")
    cells: list[tuple[int, int, str, float]] = []
    line = column = 0
    for word, alpha in zip(words, alphas, strict=True):
        for letter in word:
            if letter == "\n" or column >= width:
                line, column = line + 1, 0
            if letter != "\n":
                cells.append((line, column, letter, alpha))
                column += 1
    figure, ax = plt.subplots(figsize=(10, 0.24 * (line + 1) + 0.9))
    for row, place, letter, alpha in cells:
        ax.add_patch(plt.Rectangle((place, -row - 1), 1, 1, color=colors(alpha / 2 * 0.85), lw=0))
        ax.text(place + 0.5, -row - 0.5, letter, family="monospace", fontsize=8.5, ha="center", va="center")
    ax.set_xlim(0, width)
    ax.set_ylim(-line - 1, 0)
    ax.axis("off")
    scale = plt.cm.ScalarMappable(cmap=colors, norm=plt.Normalize(0, 2 / 0.85))
    bar = figure.colorbar(scale, ax=ax, fraction=0.025, pad=0.01, boundaries=[i / 20 for i in range(41)])
    bar.set_label("alpha", fontsize=8)
    bar.set_ticks([0, 1, 2])
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return Figure(
        path,
        "A held-out paragraph of the language reference, its background the strength alpha",
        "Each token on the strength with which it was predicted.",
    )

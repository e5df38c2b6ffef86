"""The pictures of an audit: image grid, success over the budget, weights over the steps. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fusion_core.plotting import new_figure, save_figure
from fusion_core.report import Figure
from fusion_core.stats import Interval

# Okabe and Ito's colors: told apart with any color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#B8A000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _plain_axes(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#888888")
    ax.tick_params(colors="#444444", labelsize=9)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)


def _picture(image: Tensor) -> Any:
    array = image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


def grid(
    path: Path,
    clean: Tensor,
    adversarial: Tensor,
    keep: Tensor | None,
    titles: Sequence[tuple[str, str, str]],
    *,
    eps: float,
    attack: str,
    model: str,
) -> Figure:
    """Clean images, perturbations times 10, adversarial images and the mask of the filter, one column each.

    Args:
        path: of the PNG file.
        clean: ``(columns, channels, height, width)`` in [0, 1].
        adversarial: likewise.
        keep: bool ``(columns, 1, height, width)``, True where the filter lets the gradient pass; None leaves
            the row out.
        titles: true class, class predicted before, class predicted after.
        eps: budget, for the caption.
        attack: its name.
        model: name of the audited model.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = len(clean)
    rows = 3 if keep is None else 4
    figure = new_figure(1.5 * columns + 1.15, 1.72 * rows + 0.75, "adaea")
    axes = figure.subplots(rows, columns, squeeze=False)
    labels = ("clean", "perturbation\ntimes 10", "adversarial", "filter keeps\n(first step)")
    change = ((adversarial - clean) * 10 + 0.5).clamp(0, 1)
    for column in range(columns):
        truth, before, after = titles[column]
        shown: list[Any] = [_picture(clean[column]), _picture(change[column]), _picture(adversarial[column])]
        if keep is not None:
            shown.append(keep[column, 0].cpu().numpy().astype(float))
        for row, picture in enumerate(shown):
            ax = axes[row, column]
            gray = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0} if picture.ndim == 2 else {}
            ax.imshow(picture, interpolation="nearest", **gray)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if column == 0:
                ax.set_ylabel(labels[row], fontsize=10, color="#222222", labelpad=8)
        _title(axes[0, column], f"{truth}", before == truth, f"says {before}")
        _title(axes[2, column], None, after == truth, f"says {after}")
        if keep is not None:
            share = float(keep[column].float().mean())
            axes[3, column].set_xlabel(f"{100 * share:.0f} % kept", fontsize=8.5, color="#555555")
    figure.suptitle(
        f"{attack}, eps {_fraction(eps)}, seen by {model}", fontsize=12, color="#222222", fontweight="bold"
    )
    save_figure(figure, path)
    fooled = sum(before == truth != after for truth, before, after in titles)
    filter_words = (
        "" if keep is None else " The last row is white where the disparity filter lets a pixel move."
    )
    return Figure(
        path,
        f"{columns} images: clean, perturbation times ten, adversarial; {fooled} fool {model}",
        f"What {model} sees. Green: named rightly; red: wrongly.{filter_words}",
    )


def _title(ax: Any, first: str | None, right: bool, words: str) -> None:
    color = "#1a7f37" if right else "#c62828"
    if first is not None:
        ax.text(
            0.5, 1.21, first, transform=ax.transAxes, ha="center", va="bottom", fontsize=10, fontweight="bold"
        )
    ax.set_title(words, fontsize=9, color=color, pad=4)


def _fraction(eps: float) -> str:
    top = eps * 255
    return f"{round(top)}/255" if abs(top - round(top)) < 1e-6 else f"{eps:g}"


def curves(path: Path, series: Mapping[str, Mapping[str, Mapping[float, Interval]]], *, rate: str) -> Figure:
    """Attack success over the budget with 95 % bands, one panel per model, one line per attack.

    Args:
        path: of the PNG file.
        series: model -> attack -> eps -> rate in [0, 1] with its interval.
        rate: name of the rate, for the axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = min(len(series), 3)
    rows = -(-len(series) // columns)
    figure = new_figure(max(3.5 * columns, 4.6) + 0.4, 2.75 * rows + 0.75, "adaea")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    every = sorted({eps for attacks in series.values() for points in attacks.values() for eps in points})
    step = min((b - a for a, b in pairwise(every)), default=every[0] or 1.0)
    handles: dict[str, Any] = {}
    for ax in axes.flat[len(series) :]:
        ax.set_visible(False)
    for ax, (model, attacks) in zip(axes.flat, series.items(), strict=False):
        for number, (attack, points) in enumerate(attacks.items()):
            eps = sorted(points)
            color = COLORS[number % len(COLORS)]
            shift = (number - (len(attacks) - 1) / 2) * 0.06 * step  # so that equal intervals are both seen
            x = [value + shift for value in eps]
            middle = [100 * points[value].value for value in eps]
            low = [100 * max(points[value].value - points[value].low, 0.0) for value in eps]
            high = [100 * max(points[value].high - points[value].value, 0.0) for value in eps]
            handles[attack] = ax.errorbar(
                x,
                middle,
                yerr=[low, high],
                color=color,
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                linewidth=1.8,
                elinewidth=1.1,
                capsize=2.5,
            )
        ax.set_title(model, fontsize=10.5, color="#222222", fontweight="bold")
        ax.set_xticks(every, [_fraction(eps) for eps in every])
        ax.set_ylim(-2, 100)
        ax.set_xlim(every[0] - 0.5 * step, every[-1] + 0.5 * step)
        ax.set_xlabel("eps", fontsize=9.5, color="#444444")
        _plain_axes(ax)
    for ax in axes[:, 0]:
        ax.set_ylabel(f"{rate} %", fontsize=9.5, color="#444444")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(len(handles), 4),
        frameon=False,
    )
    save_figure(figure, path)
    return Figure(
        path,
        f"{rate} over the budget for {', '.join(series)}",
        f"{rate} over the budget; bars are 95 % intervals. Higher is worse for the model.",
    )


def weights(path: Path, traces: Mapping[str, Any], names: Sequence[str]) -> Figure:
    """The weight of each surrogate over the steps: mean over images, band from 10th to 90th percentile.

    Args:
        path: of the PNG file.
        traces: attack -> array ``(images, steps, surrogates)``; each sums to 1 over the last axis.
        names: of the surrogates.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(max(4.1 * len(traces), 5.4), 3.5, "adaea")
    axes = figure.subplots(1, len(traces), squeeze=False, sharey=True)[0]
    lines: list[Any] = []
    top = 0.0
    for ax, (attack, values) in zip(axes, traces.items(), strict=True):
        array = np.asarray(values)
        steps = np.arange(1, array.shape[1] + 1)
        mean = array.mean(0)
        low, high = np.percentile(array, [10, 90], axis=0)
        top = max(top, float(high.max()))
        for k, name in enumerate(names):
            color, mark = COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)]
            ax.fill_between(steps, low[:, k], high[:, k], color=color, alpha=0.13, linewidth=0)
            (line,) = ax.plot(
                steps, mean[:, k], color=color, marker=mark, markersize=4, linewidth=1.8, label=name
            )
            lines += [line] if ax is axes[0] else []
        ax.axhline(1 / len(names), color="#777777", linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate(
            f"even 1/{len(names)}",
            (1, 1 / len(names)),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#666666",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
        )
        ax.set_title(attack, fontsize=10.5, color="#222222", fontweight="bold")
        ax.set_xlabel("step", fontsize=9.5, color="#444444")
        ax.xaxis.get_major_locator().set_params(integer=True)
        _plain_axes(ax)
    axes[0].set_ylabel("weight of the surrogate", fontsize=9.5, color="#444444")
    axes[0].set_ylim(0, min(1.0, 1.12 * top))
    figure.legend(lines, names, loc="outside upper center", ncols=min(len(names), 5), frameon=False)
    save_figure(figure, path)
    return Figure(
        path,
        f"Weights of {', '.join(names)} over the steps",
        "How much each surrogate counts in the fused gradient; the band holds 80 % of the images.",
    )

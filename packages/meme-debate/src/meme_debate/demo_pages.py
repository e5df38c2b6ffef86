"""Pictures of the demo: the calibration plot, and cards for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import require_extra
from fusion_core.images import read_image
from fusion_core.report import Figure, Page

from .calibrate import Calibration
from .cards import card_html
from .detection import Card
from .plots import plot_reliability
from .stand_in_memes import StandIn

Floats = NDArray[np.float64]
NAMES = ("fits, no jibe", "a jibe")


def _pyplot() -> Any:
    """Matplotlib with the backend that draws files only, and no global state of a caller's."""
    return require_extra("matplotlib.figure", "demo", "meme-debate").Figure


def calibration_figure(
    out: Path, before: Floats, after: Floats, labels: NDArray[np.int64], calibration: Calibration
) -> Figure:
    """Score against the share of jibes, before and after the temperature; band and threshold."""
    figure = _pyplot()(figsize=(7.5, 3.6))
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.14, top=0.9, wspace=0.25)
    axes = figure.subplots(1, 2)
    for scores, name, color in ((before, "as trained", "#888888"), (after, "calibrated", "#1f6fb4")):
        plot_reliability(scores, labels, axes[0], name=name, color=color)
    axes[0].set(ylabel="share of jibes", title="Reliability")
    edges = np.linspace(0, 1, 21)
    for label, color in ((0, "#2e7dbe"), (1, "#d64541")):
        axes[1].hist(after[labels == label], edges, alpha=0.6, color=color, label=NAMES[label])
    if calibration.band is not None:
        axes[1].axvspan(*calibration.band, color="#b07d00", alpha=0.25, label="left to a person")
    axes[1].axvline(calibration.threshold, color="black", linewidth=1)
    axes[1].set(xlabel="calibrated score", ylabel="memes", title=f"T = {calibration.temperature:.2f}")
    axes[1].legend(fontsize=8, loc="upper center")
    figure.savefig(out / "calibration.png", dpi=110)
    return Figure(
        "calibration.png",
        "Left: score against the share of jibes before and after temperature scaling. Right: histograms "
        "of the calibrated score of both classes with the band that is left to a person.",
        "Temperature and band come from one half of the test memes, the plot shows the other half.",
    )


def choose_cards(cards: Sequence[Card]) -> dict[str, Card]:
    """One card that is right, one wrong, one left to a person, one with a refused side, if any."""

    def correct(card: Card) -> bool:
        return card.decision == ("harmful" if card.meme.label else "harmless")

    kinds = {
        "right": [c for c in cards if c.decision == "harmful" and correct(c) and c.meme.image is not None],
        "wrong": [c for c in cards if c.decision != "abstain" and not correct(c)],
        "left to a person": [c for c in cards if c.decision == "abstain"],
        "one side refused": [c for c in cards if any(f.startswith("refused_") for f in c.flags)],
    }
    chosen: dict[str, Card] = {}
    for name, found in kinds.items():
        fresh = [card for card in found if card not in chosen.values()]
        if fresh:
            ranked = sorted(fresh, key=lambda c: abs(c.score - 0.5), reverse=name in ("right", "wrong"))
            chosen[name] = ranked[0]
    return chosen


def cards_page(chosen: Mapping[str, Card]) -> Page:
    """The cards on one page."""
    page = Page("Stand-in memes: four cards")
    page.text(
        "Stand-in memes over photographs of scikit-image; a jibe is praise or blame of size that does "
        "not fit the picture. A gray picture was withheld from the judge."
    )
    for name, card in chosen.items():
        page.heading(name)
        page.raw(card_html(card, NAMES))
    return page


def cards_figure(out: Path, chosen: Mapping[str, Card], items: Mapping[str, StandIn]) -> Figure:
    """The chosen memes side by side, with score, decision and the case decided for."""
    figure = _pyplot()(figsize=(3.1 * len(chosen), 4.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(chosen)))
    for axis, (name, card) in zip(axes, chosen.items(), strict=True):
        item = items[card.id]
        axis.imshow(read_image(item.meme.image))
        axis.set_xticks([])
        axis.set_yticks([])
        hidden = " (withheld from the judge)" if item.hidden else ""
        truth = NAMES[int(item.meme.label or 0)]
        axis.set_title(f"{name}\nscore {card.score:.2f}: {_decision(card)}\ntruth: {truth}", fontsize=9)
        axis.set_xlabel("\n".join(_lines(card.explanation or _no_reason(card))) + f"\n{hidden}", fontsize=8)
    figure.savefig(out / "cards.png", dpi=110)
    return Figure(
        "cards.png",
        "Four stand-in memes with score, decision and reason: " + ", ".join(chosen),
        "The same cards with both cases, words and patches are in cards.html.",
    )


def _decision(card: Card) -> str:
    return {"harmful": NAMES[1], "harmless": NAMES[0], "abstain": "a person decides"}[card.decision]


def _no_reason(card: Card) -> str:
    refused = card.decision != "abstain" and f"refused_{card.decision}" in card.flags
    return "(this side's case was refused)" if refused else "(both cases are on the card)"


def _lines(text: str, width: int = 38) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)[:4]

"""Cards for people: HTML in which everything that came from a meme or a model is escaped."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fusion_core.errors import InputError
from fusion_core.images import read_image
from fusion_core.report import Page, Report

from .ablations import splits_of
from .detection import Card
from .meme import MAX_PIXELS, save_lines
from .scoring import metrics, reversed_labels

__all__ = ["CardReport", "card_html", "card_report"]

SIDE = 320
NAMES = ("harmless", "harmful")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    loader = PackageLoader("meme_debate", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _names(card: Card) -> Sequence[str]:
    """The policy's words for a meme that does not fall under it, and for one that does."""
    return card.judge.get("labels") or NAMES


def card_html(card: Card, names: Sequence[str] | None = None) -> Markup:
    """One card as a piece of a page.

    Args:
        card: of :func:`meme_debate.detect`.
        names: of the classes harmless and harmful; None takes those of the judge's policy.
    """
    names = _names(card) if names is None else names
    picture = _thumbnail(card.meme.image)
    overlay = None
    if picture is not None and card.patches is not None:
        overlay = _overlay(picture, card.patches.weights)
    texts = {"text": card.meme.text, "caption": card.meme.caption, "harmful": card.harmful,
             "harmless": card.harmless}  # fmt: skip
    strongest = max((abs(word.weight) for word in card.words), default=0.0)
    fields = {name: _segments(text, name, card, strongest) for name, text in texts.items()}
    sides = ["harmful", "harmless"]
    if card.explanation_side == "harmless":
        sides.reverse()
    template = _environment().get_template("card.html")
    document = template.render(
        card=card,
        names=names,
        fields=fields,
        sides=sides,
        picture=None if picture is None else _data_url(picture),
        overlay=None if overlay is None else _data_url(overlay),
    )
    return Markup(document)  # noqa: S704 - rendered with autoescape


def _segments(text: str, field: str, card: Card, strongest: float) -> list[dict[str, Any]]:
    """The text in pieces, each with its strength and side."""
    found: list[dict[str, Any]] = []
    at = 0
    for word in sorted((w for w in card.words if w.field == field), key=lambda w: w.start):
        if word.start < at or word.end > len(text):
            continue
        found.append({"text": text[at : word.start], "strength": 0.0})
        found.append(
            {
                "text": text[word.start : word.end],
                "strength": abs(word.weight) / strongest if strongest else 0.0,
                "weight": word.weight,
                "side": "harmful" if word.weight > 0 else "harmless",
            }
        )
        at = word.end
    found.append({"text": text[at:], "strength": 0.0})
    return found


def _thumbnail(image: Any) -> Any:
    if image is None:
        return None
    from PIL import Image

    try:
        picture = Image.fromarray(read_image(image, max_pixels=MAX_PIXELS))
    except InputError:  # it was readable when the meme was judged; the card stands without it
        return None
    picture.thumbnail((SIDE, SIDE))
    return picture


def _overlay(picture: Any, weights: list[list[float]]) -> Any:
    """The center square of the picture with the patches in red and blue over it."""
    from PIL import Image

    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    array = np.asarray(weights, np.float64)
    strength = np.abs(array) / max(float(np.abs(array).max()), 1e-12)
    colors = np.where(array[..., None] > 0, (214, 69, 65), (46, 125, 190)).astype(np.uint8)
    size, nearest = square.size, Image.Resampling.NEAREST
    heat = Image.fromarray(colors).resize(size, nearest)
    mask = Image.fromarray((strength * 150).astype(np.uint8)).resize(size, nearest)
    return Image.composite(heat, square.convert("L").convert("RGB"), mask)


def _data_url(picture: Any) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True, kw_only=True)
class CardReport(Report):
    """All cards of a run: counts, metrics where labels are known, and the cards themselves.

    Args:
        cards: in the memes' order.
        shown: most cards on the page; the file holds all.
    """

    cards: Sequence[Card] = ()
    shown: int = 200

    def page(self) -> Page:
        """Counts, notes, then the cards, those left to a person first."""
        page = super().page()
        if len(self.cards) > self.shown:
            page.text(f"The page shows {self.shown} of {len(self.cards)} cards; cards.jsonl holds all.")
        ranked = sorted(self.cards, key=lambda card: (card.decision != "abstain", -card.score))
        for card in ranked[: self.shown]:
            page.raw(card_html(card))
        return page

    def save(self, directory: str | os.PathLike[str]) -> None:
        """``report.html``, ``report.json``, ``table.csv`` and ``cards.jsonl``."""
        super().save(directory)
        save_lines(Path(directory) / "cards.jsonl", self.cards, lambda card: card.to_dict())


def card_report(cards: Sequence[Card], title: str = "Memes and reasons") -> CardReport:
    """Count what the cards say, and compare with the labels of the memes that have one."""
    total = len(cards)
    if cards:
        title = f"{title}: {splits_of([card.meme for card in cards])}, policy {cards[0].judge['policy']}"
    rows: list[dict[str, Any]] = []
    names = _names(cards[0]) if cards else NAMES
    for decision, what in {"harmful": names[1], "harmless": names[0], "abstain": "abstain"}.items():
        count = sum(card.decision == decision for card in cards)
        rows.append({"what": what, "count": count, "share": count / total if total else None})
    for flag in sorted({flag for card in cards for flag in card.flags}):
        count = sum(flag in card.flags for card in cards)
        rows.append({"what": f"flag: {flag}", "count": count, "share": count / total})
    tested = [card for card in cards if card.faithfulness]
    if tested:
        flips = sum(bool(card.faithfulness and card.faithfulness["flips"]) for card in tested)
        what = "decision changes without the chosen case"
        rows.append({"what": what, "count": flips, "share": flips / len(tested)})
    labeled = [card for card in cards if card.meme.label is not None]
    if labeled:
        found = metrics(
            [card.score for card in labeled],
            [int(card.meme.label or 0) for card in labeled],
            labeled[0].threshold,
        )
        for name, value in found.items():
            rows.append({"what": name, "count": len(labeled), "share": value})
        if question := reversed_labels(found):
            rows.append({"what": question, "count": len(labeled), "share": found["auroc"]})
    return CardReport(title=title, rows=rows, cards=list(cards))

"""What a judge does to groups, to swapped words, to the order of the statements, and to look-alikes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import ConfigError, DataError, check_range
from fusion_core.report import Report
from fusion_core.stats import wilson

from .ablations import paired, splits_of
from .detection import AnyJudge, score
from .meme import Debate, Meme
from .scoring import kappa, metrics, reversed_labels

__all__ = ["AuditReport", "audit", "confounder_pairs", "swap_words"]

Floats = NDArray[np.float64]
LEAST = 10  # memes of a group below which its numbers are only printed


@dataclass(frozen=True, kw_only=True)
class AuditReport(Report):
    """What an audit found; ``rows`` are one line a check and group.

    Args:
        gap: largest difference of false alarm rates between groups of ten or more harmless memes; nan = none.
        flips: share of memes whose decision changes when words are swapped; nan = not tested.
        order: mean difference of the score between the harmful side first and last; nan = no debates.
        order_flips: share of memes whose decision depends on the order.
        agreement: Cohen's kappa of the decisions and the people who labeled; nan = one class only.
        pairs: image-confounder pairs that are both right, as a share; nan = there are none.
        question: asked where the scores rank the wrong way round.
    """

    gap: float = math.nan
    flips: float = math.nan
    order: float = math.nan
    order_flips: float = math.nan
    agreement: float = math.nan
    pairs: float = math.nan
    question: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        names = ("gap", "flips", "order", "order_flips", "agreement", "pairs")
        numbers = {name: None if math.isnan(getattr(self, name)) else getattr(self, name) for name in names}
        return {**super().to_dict(), **numbers, "question": self.question}


def swap_words(text: str, swaps: Sequence[tuple[str, str]]) -> str:
    """The text with words exchanged for their counterparts, both ways, whole words, keeping capitals.

    Args:
        text: any.
        swaps: pairs such as ``("women", "men")``.

    Example:
        >>> swap_words("Women and men", [("women", "men")])
        'Men and women'
    """
    both = {a.lower(): b for a, b in swaps} | {b.lower(): a for a, b in swaps}
    if not both:
        return text
    pattern = re.compile(
        rf"(?<!\w)({'|'.join(map(re.escape, sorted(both, key=len, reverse=True)))})(?!\w)", re.I
    )

    def other(found: re.Match[str]) -> str:
        word = found[0]
        new = both[word.lower()]
        if word.isupper() and len(word) > 1:
            return new.upper()
        return new[:1].upper() + new[1:] if word[:1].isupper() else new

    return pattern.sub(other, text)


def confounder_pairs(memes: Sequence[Meme]) -> list[tuple[int, int]]:
    """Rows of memes with the same text, other pictures and opposite labels, as Facebook's set has them."""
    by_text: dict[str, list[int]] = {}
    for row, meme in enumerate(memes):
        if meme.image is not None and meme.label is not None and meme.text.strip():
            by_text.setdefault(" ".join(meme.text.lower().split()), []).append(row)
    return [
        (a, b)
        for rows in by_text.values()
        for a in rows
        for b in rows
        if memes[a].label == 1 and memes[b].label == 0
    ]


def audit(
    memes: Iterable[Meme],
    debates: Iterable[Debate] | Mapping[str, Debate] | None,
    judge: AnyJudge,
    *,
    threshold: float | None = None,
    swaps: Sequence[tuple[str, str]] = (),
    batch_size: int = 32,
) -> AuditReport:
    """Error rates by group, agreement with people, counterfactual words, order, and image-confounder pairs.

    Args:
        memes: with labels; ``group`` says whom a meme is about.
        debates: of these memes, or None.
        judge: either kind.
        threshold: None takes the judge's.
        swaps: pairs of words to exchange in text, caption and statements.
        batch_size: memes a forward pass.

    Raises:
        DataError: no labeled memes, an id twice, or a debate of no meme.
        ConfigError: a swap that is no pair of different words.
    """
    rows = list(memes)
    found = paired(rows, debates)
    if not rows or any(meme.label is None for meme in rows):
        raise DataError("memes holds some without a label (or none at all); an audit needs the truth of each")
    for pair in swaps:
        if len(pair) != 2 or not all(word.strip() for word in pair) or pair[0].lower() == pair[1].lower():
            raise ConfigError(f"swaps holds {pair!r}, wanted pairs of two different words")
    level = judge.calibration.threshold
    if threshold is not None:
        level = check_range("threshold", threshold, 0.0, 1.0)
    truth = np.array([meme.label for meme in rows], np.int64)
    scores = score(judge, rows, found, batch_size=batch_size)
    called = scores >= level
    lines = [_line("all", "all memes", called, truth)]
    lines += _groups(rows, called, truth)
    facts: dict[str, Any] = {"question": reversed_labels(metrics(scores, truth))}
    rates = [line["false_alarms"] for line in lines[1:] if line["harmless"] >= LEAST]
    if len(rates) > 1:
        facts["gap"] = max(rates) - min(rates)
    facts["agreement"] = _people(found, called, truth, lines)
    if swaps:
        facts["flips"] = _swapped(judge, rows, found, scores, level, swaps, lines, batch_size)
    if any(debate is not None for debate in found):
        facts |= _order(judge, rows, found, level, lines, batch_size)
    pairs = confounder_pairs(rows)
    if pairs:
        right = [bool(called[a] and not called[b]) for a, b in pairs]
        facts["pairs"] = float(np.mean(right))
        apart = float(np.mean([scores[a] > scores[b] for a, b in pairs]))
        lines.append(
            {"check": "confounders", "what": "same words, other picture: both right", "memes": len(pairs),
             "rate": facts["pairs"]}
        )  # fmt: skip
        lines.append({"check": "confounders", "what": "ranked rightly", "memes": len(pairs), "rate": apart})
    title = f"Audit of {judge.settings.name}, policy {judge.settings.policy}, {splits_of(rows)}"
    return AuditReport(title=title, rows=lines, **facts)


def _line(check: str, what: str, called: NDArray[np.bool_], truth: NDArray[np.int64]) -> dict[str, Any]:
    harmless, harmful = int((truth == 0).sum()), int((truth == 1).sum())
    alarms, missed = int((called & (truth == 0)).sum()), int((~called & (truth == 1)).sum())
    alarm_range = wilson(alarms, harmless) if harmless else None
    miss_range = wilson(missed, harmful) if harmful else None
    return {
        "check": check,
        "what": what,
        "memes": len(truth),
        "accuracy": float((called == (truth == 1)).mean()),
        "harmless": harmless,
        "false_alarms": alarms / harmless if harmless else None,
        "false_alarms_low": alarm_range and alarm_range.low,
        "false_alarms_high": alarm_range and alarm_range.high,
        "harmful": harmful,
        "missed": missed / harmful if harmful else None,
        "missed_low": miss_range and miss_range.low,
        "missed_high": miss_range and miss_range.high,
    }


def _people(
    debates: Sequence[Debate | None],
    called: NDArray[np.bool_],
    truth: NDArray[np.int64],
    lines: list[dict[str, Any]],
) -> float:
    """Agreement with the labels beyond chance: the judge's, and the debating model's verdict's."""
    found = kappa(called, truth == 1)
    lines.append({"check": "people", "what": "judge and labels", "memes": len(truth), "kappa": found})
    said = [i for i, debate in enumerate(debates) if debate is not None and debate.verdict is not None]
    if said:
        verdicts = np.array([getattr(debates[i], "verdict", 0) == 1 for i in said])
        theirs = kappa(verdicts, truth[said] == 1)
        lines.append({"check": "people", "what": "verdict and labels", "memes": len(said), "kappa": theirs})
        both = kappa(verdicts, called[said])
        lines.append({"check": "people", "what": "verdict and judge", "memes": len(said), "kappa": both})
    return found


def _groups(
    rows: Sequence[Meme], called: NDArray[np.bool_], truth: NDArray[np.int64]
) -> list[dict[str, Any]]:
    groups = sorted({meme.group for meme in rows if meme.group is not None})
    lines: list[dict[str, Any]] = []
    for group in groups:
        here = np.array([meme.group == group for meme in rows])
        lines.append(_line("group", group, called[here], truth[here]))
    return lines


def _swapped(
    judge: AnyJudge,
    rows: Sequence[Meme],
    debates: Sequence[Debate | None],
    scores: Floats,
    level: float,
    swaps: Sequence[tuple[str, str]],
    lines: list[dict[str, Any]],
    batch_size: int,
) -> float:
    memes = [
        replace(meme, text=swap_words(meme.text, swaps), caption=swap_words(meme.caption, swaps))
        for meme in rows
    ]
    said = [
        None
        if debate is None
        else replace(
            debate, harmful=swap_words(debate.harmful, swaps), harmless=swap_words(debate.harmless, swaps)
        )
        for debate in debates
    ]
    touched = [
        i
        for i, (meme, new) in enumerate(zip(rows, memes, strict=True))
        if (meme.text, meme.caption, debates[i]) != (new.text, new.caption, said[i])
    ]
    if not touched:
        lines.append({"check": "swap", "what": "no meme has any of the words", "memes": 0})
        return math.nan
    other = score(judge, [memes[i] for i in touched], [said[i] for i in touched], batch_size=batch_size)
    before = scores[touched]
    flips = float(((other >= level) != (before >= level)).mean())
    lines.append(
        {"check": "swap", "what": "decisions that change", "memes": len(touched), "rate": flips,
         "difference": float((other - before).mean()), "largest": float(np.abs(other - before).max())}
    )  # fmt: skip
    return flips


def _order(
    judge: AnyJudge,
    rows: Sequence[Meme],
    debates: Sequence[Debate | None],
    level: float,
    lines: list[dict[str, Any]],
    batch_size: int,
) -> dict[str, float]:
    with_debate = [i for i, debate in enumerate(debates) if debate is not None]
    memes, said = [rows[i] for i in with_debate], [debates[i] for i in with_debate]
    one, two = (
        score(judge, memes, said, first=side, batch_size=batch_size) for side in ("harmful", "harmless")
    )
    flips = float(((one >= level) != (two >= level)).mean())
    order = float((one - two).mean())
    lines.append(
        {"check": "order", "what": "harmful side first against last", "memes": len(memes), "rate": flips,
         "difference": order, "largest": float(np.abs(one - two).max())}
    )  # fmt: skip
    return {"order": order, "order_flips": flips}

"""The demo's words: names of the rows, what each claim's numbers say, and the notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusion_core.comparison import Comparison
from fusion_core.report import Claim

TEXT_ONLY = "text only (light judge)"
PICTURE_ONLY = "picture only (linear on features)"
VERDICT = "the debating model's verdict"
LIGHT = "debate, light judge"
_NAMES = {
    "none": 'fusion="none" (released code)',
    "final": 'fusion="final"',
    "layerwise": 'fusion="layerwise"',
}


def without_debate(fusion: str) -> str:
    """The row of a fused judge that reads text and picture only."""
    return f"text + picture, {_NAMES[fusion]}"


def with_debate(fusion: str) -> str:
    """The row of a fused judge that reads the debate too."""
    return f"debate + picture, {_NAMES[fusion]}"


def order(fusions: Sequence[str]) -> list[str]:
    """The rows as the table has them."""
    alone = [without_debate(fusion) for fusion in fusions]
    return [TEXT_ONLY, PICTURE_ONLY, VERDICT, *alone, LIGHT, *(with_debate(fusion) for fusion in fusions)]


def _values(table: Comparison, metric: str) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in table.rows() if row["metric"] == metric}


def claims(table: Comparison, fusions: Sequence[str], *, unseen: bool) -> list[Claim]:
    """Each claim with what this run's numbers say.

    Args:
        table: of the demo.
        fusions: that were run.
        unseen: whether memes over unseen photographs were judged.
    """
    rows = _values(table, "accuracy")
    mean = {name: float(row["mean"]) for name, row in rows.items()}
    none, layer = without_debate("none"), without_debate("layerwise")
    ours = with_debate("layerwise")
    blind = with_debate("none")
    found = [
        Claim(
            "Looking at the picture matters: with the cross-attention left out, as in the released code, the "
            "judge cannot tell these memes from their text",
            "the authors' code",
            bool(abs(mean[none] - 0.5) < 0.08 and mean[layer] > mean[none] + 0.15),
            f"Without debate accuracy is {mean[none]:.3f} without and {mean[layer]:.3f} with the layer-wise "
            "fusion; 0.500 is chance, 0.800 the best possible, as 40 % of the pictures are withheld.",
        ),
        Claim(
            "The debate helps the judge",
            "ablation w/o MD",
            _all_above(rows, ours, layer),
            f"{mean[layer]:.3f} without and {mean[ours]:.3f} with the debate; debate without the picture "
            f"gives {mean[blind]:.3f}.",
        ),
        Claim(
            "The small judge beats the debating model's own verdict",
            "ablation w/o SLMJ",
            _all_above(rows, ours, VERDICT),
            f"{mean[VERDICT]:.3f} for the verdict, {mean[ours]:.3f} for the judge, {mean[LIGHT]:.3f} for the "
            "light judge.",
        ),
        _layers(rows, fusions),
    ]
    if unseen:
        found.append(_unseen(_values(table, "unseen photographs"), ours, layer))
    return found


def _all_above(rows: dict[str, dict[str, Any]], one: str, other: str) -> bool:
    return all(a > b for a, b in zip(rows[one]["values"], rows[other]["values"], strict=True))


def _layers(rows: dict[str, dict[str, Any]], fusions: Sequence[str]) -> Claim:
    text = "Fusion after each encoder block beats one fusion at the end"
    if "final" not in fusions:
        return Claim(text, "section 3", None, 'The quick run does not train fusion="final"; run with --full.')
    ours, last = rows[with_debate("layerwise")], rows[with_debate("final")]
    gaps = [a - b for a, b in zip(ours["values"], last["values"], strict=True)]
    spread = max(gaps) - min(gaps)
    return Claim(
        text,
        "section 3",
        bool(min(gaps) > 0 and sum(gaps) / len(gaps) > 0.02),
        f"{ours['mean']:.3f} layer-wise and {last['mean']:.3f} at the end with debate; over the seeds the "
        f"difference lies between {min(gaps):+.3f} and {max(gaps):+.3f} (width {spread:.3f}).",
    )


def _unseen(rows: dict[str, dict[str, Any]], ours: str, layer: str) -> Claim:
    light, fused = float(rows[LIGHT]["mean"]), float(rows[ours]["mean"])
    return Claim(
        "The fused judge also serves pictures that it has never seen",
        "limit of this demo",
        bool(fused >= light),
        f"Over two photographs held out of everything, the fused judge has {fused:.3f} with and "
        f"{float(rows[layer]['mean']):.3f} without debate, the light judge {light:.3f}: a tower that "
        "knows six photographs takes moon and coins for the wrong kind.",
    )


def notes(
    scale: Any, reports: Sequence[Mapping[str, Any]], again: Mapping[str, Any], cards: Sequence[Any]
) -> list[str]:
    """Plain sentences about data, calls and limits."""
    calls = sum(report["calls"] for report in reports)
    tokens = sum(report["prompt_tokens"] + report["completion_tokens"] for report in reports)
    seconds = sum(report["seconds"] for report in reports)
    retries = sum(int(report["transport"].get("retries", 0)) for report in reports)
    refused = sum(report["flags"].get("refused_harmful", 0) for report in reports)
    tested = [card for card in cards if card.faithfulness]
    flips = sum(bool(card.faithfulness["flips"]) for card in tested)
    left = sum(card.decision == "abstain" for card in cards)
    return [
        "A stand-in, no data set of memes: photographs that ship with scikit-image, with words about the "
        "size of a thing or a pet written on them; teasing = the words do not fit the picture. No number "
        "here compares with the paper's.",
        "The debater is a script behind a local server of the chat-completions schema: it sees the wrong "
        "kind of thing in a fifth of the pictures and gives its own verdict with noise. The client, its "
        "retries and its cache are those of real use.",
        f"{calls} calls, {tokens} tokens (as the server counts), {retries} retries after 503, {refused} "
        f"refused sides, {seconds:.1f} s; a second run over the first seed's memes took {again['cached']} "
        f"of {again['calls']} replies from the cache.",
        f"Of {len(cards)} calibrated cards {left} are left to a person; deleting the case that was "
        f"decided for changes {flips} of {len(tested)} decisions. cards.html shows one right, one wrong, "
        "one left to a person, one with a refused side.",
        f"{scale.train} training and {scale.test} test memes, {scale.steps} steps of 32, every second batch "
        "without a debate, so that one judge gives both rows.",
    ]


def abstention(shares: Sequence[float]) -> str:
    """The note about unseen photographs and the band."""
    return (
        "With the band that leaves a fifth of the test memes to a person, the judge abstains on "
        f"{sum(shares) / len(shares):.0%} of the memes over unseen photographs: it does not notice that "
        "they are new."
    )

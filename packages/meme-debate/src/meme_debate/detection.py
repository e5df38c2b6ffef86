"""From memes and debates to cards: a calibrated decision, and the reason that a person can contest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import CheckpointError, ConfigError, InputError, check_range, reading
from fusion_core.results import plain

from .ablations import paired
from .calibrate import decide
from .composing import First
from .explain import explain
from .meme import CARD_SCHEMA, Debate, Meme
from .reasons import Patches, Word
from .text_judge import TextJudge

if TYPE_CHECKING:  # a light judge needs no transformers
    from .features import Features
    from .judge import Judge

__all__ = ["AnyJudge", "Card", "detect", "load_judge", "score"]

AnyJudge: TypeAlias = "TextJudge | Judge"
Floats = NDArray[np.float64]
CHUNK = 256
_DIGITS = 6
Decision = Literal["harmful", "harmless", "abstain"]
Side = Literal["harmful", "harmless"]


@dataclass(frozen=True, slots=True)
class Card:
    """One meme's decision with its reason; ``to_dict`` is a line of ``cards.jsonl``.

    Args:
        id: the meme's.
        score: probability of harmful, calibrated where the judge is.
        decision: ``"harmful"``, ``"harmless"`` or ``"abstain"``.
        threshold: harmful where score >= threshold.
        band: scores that are left to a person, or None.
        explanation: the rationale of the side decided for; None where the judge abstains or has no debate.
        explanation_side: that side.
        harmful: the harmful side's rationale.
        harmless: the harmless side's rationale.
        verdict: of the LLM judge.
        agreement: whether it gave the same verdict in both orders.
        judge: kind, fusion, name, digest, policy, calibrated, and the policy's words for classes 0 and 1.
        inputs: what was read: text, image, caption, debate.
        words: the words that moved the score most.
        patches: what the patches of the picture did.
        faithfulness: the score without the explanation, and whether that flips the decision.
        flags: what a reader should know, such as ``no_debate`` or ``refused_harmful``.
        meme: the meme; not written to the file.
    """

    id: str
    score: float
    decision: Decision
    threshold: float
    band: tuple[float, float] | None
    explanation: str | None
    explanation_side: Side | None
    harmful: str
    harmless: str
    verdict: int | None
    agreement: bool | None
    judge: Mapping[str, Any]
    inputs: Sequence[str]
    words: Sequence[Word]
    patches: Patches | None
    faithfulness: Mapping[str, Any] | None
    flags: Sequence[str]
    meme: Meme = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The line of ``cards.jsonl``, schema ``meme-debate.card/1``."""
        names = [name for name in self.__slots__ if name != "meme"]
        return {"schema": CARD_SCHEMA, **{name: plain(getattr(self, name)) for name in names}}

    def html(self) -> str:
        """The card as a piece of a page; everything in it is escaped."""
        from .cards import card_html

        return str(card_html(self))

    def _repr_html_(self) -> str:
        return self.html()


def load_judge(folder: str | Path, device: str = "cpu") -> AnyJudge:
    """The judge of a folder, whichever kind it is.

    Args:
        folder: what `judge train` wrote.
        device: where a fused judge computes; a light one needs none.

    Raises:
        CheckpointError: no judge there, or a damaged one.
    """
    import json

    place = Path(folder)
    if not (place / "config.json").is_file() and (place / "judge" / "config.json").is_file():
        place = place / "judge"  # the directory of a training
    with reading(folder, "holds no judge: config.json", CheckpointError):
        config = json.loads((place / "config.json").read_text("utf-8"))
        kind = "text" if config.get("kind") == "text" else "fused" if "text_config" in config else None
    if kind is None:
        raise CheckpointError(f"{folder} holds no judge of ours; wanted one that `judge train` wrote")
    if kind == "text":
        return TextJudge.load(place)
    from fusion_core.device import resolve_device

    from .judge import Judge

    return Judge.from_pretrained(place).to(resolve_device(device))


def check_judge(judge: Any) -> Any:
    """A judge of either kind, as it is.

    Raises:
        InputError: something else.
    """
    if getattr(judge, "kind", None) not in ("text", "fused"):
        raise InputError(f"judge is {type(judge).__name__}, wanted a TextJudge or a Judge")
    return judge


def score(
    judge: AnyJudge,
    memes: Sequence[Meme],
    debates: Sequence[Debate | None],
    *,
    first: First = "verdict",
    calibrated: bool = True,
    batch_size: int = 32,
    features: Features | None = None,
) -> Floats:
    """Scores (N,) of memes by either kind of judge.

    Args:
        judge: a fitted :class:`TextJudge` or a trained :class:`Judge`.
        memes: N memes.
        debates: N debates, None = without.
        first: see :func:`meme_debate.composing.order`.
        calibrated: whether the judge's temperature is applied.
        batch_size: memes a forward pass.
        features: states of the N pictures; None computes them where the judge looks.

    Raises:
        InputError: no judge, or a picture that cannot be read.
    """
    if isinstance(judge, TextJudge):
        return judge.score_memes(memes, debates, first=first, calibrated=calibrated)
    fused = check_judge(judge)
    from .fused import score_memes

    return score_memes(
        fused, memes, debates, first=first, calibrated=calibrated, batch_size=batch_size, features=features
    )


def detect(
    memes: Iterable[Meme],
    debates: Iterable[Debate] | Mapping[str, Debate] | None,
    judge: AnyJudge,
    *,
    threshold: float | None = None,
    words: int = 20,
    faithfulness: bool = True,
    batch_size: int = 32,
) -> Iterator[Card]:
    """Decide on memes, one card each, in their order.

    A meme without a debate is judged by its text and picture, and its card says so.

    Args:
        memes: to be judged; labels are not looked at.
        debates: of these memes, or None.
        judge: a fitted :class:`TextJudge` or a trained :class:`Judge`.
        threshold: None takes the judge's; another one moves the judge's band with it.
        words: most words a card; 0 leaves words and patches out.
        faithfulness: whether the score without the explanation is computed too.
        batch_size: memes a forward pass.

    Raises:
        InputError: no judge, or debates made for another policy than the judge's.
        DataError: an id twice, or a debate of no meme.
        ConfigError: a threshold outside [0, 1].
    """
    rows = list(memes)
    check_judge(judge)
    if words < 0:
        raise ConfigError(f"words is {words}, wanted at least 0")
    calibration = judge.calibration
    level = calibration.threshold if threshold is None else check_range("threshold", threshold, 0.0, 1.0)
    band = calibration.band
    if band is not None and level != calibration.threshold:
        move = level - calibration.threshold
        band = max(0.0, band[0] + move), min(1.0, band[1] + move)
    listed = list(debates.values()) if isinstance(debates, Mapping) else list(debates or ())
    found = paired(rows, listed)
    said = {debate.id: debate for debate in listed}
    _check_policy(judge, said.values())
    return _cards(judge, rows, found, said, level, band, words, faithfulness, batch_size)


def _check_policy(judge: AnyJudge, debates: Iterable[Debate]) -> None:
    settings = judge.settings
    for debate in debates:
        policy = (debate.record or {}).get("policy")
        if not isinstance(policy, Mapping):
            continue
        name, digest = policy.get("name"), str(policy.get("digest") or "")
        other = settings.policy_digest and digest and digest != settings.policy_digest
        if name not in (None, settings.policy) or other:
            raise InputError(
                f"the judge learned the policy {settings.policy!r}, debate {debate.id!r} was made for "
                f"{name!r}"
                + (" with another definition" if name == settings.policy else "")
                + "; take a judge and debates of one policy"
            )


def _cards(
    judge: AnyJudge,
    memes: list[Meme],
    debates: list[Debate | None],
    said: Mapping[str, Debate],
    level: float,
    band: tuple[float, float] | None,
    words: int,
    faithful: bool,
    batch_size: int,
) -> Iterator[Card]:
    about = {
        "kind": judge.kind,
        "fusion": judge.fusion,
        "name": judge.settings.name,
        "digest": judge.digest(),
        "policy": judge.settings.policy,
        "calibrated": judge.calibration.calibrated,
        "labels": list(judge.settings.labels),
    }
    for start in range(0, len(memes), CHUNK):
        part, heard = memes[start : start + CHUNK], debates[start : start + CHUNK]
        seen = _states(judge, part, batch_size)
        scores = np.round(score(judge, part, heard, batch_size=batch_size, features=seen), _DIGITS)
        decisions = [decide(float(value), level, band) for value in scores]
        without = _without(judge, part, heard, decisions, seen, batch_size) if faithful else {}
        explained = None
        if words:
            explained = explain(judge, part, heard, top=words, batch_size=batch_size, features=seen)
        for at, (meme, debate) in enumerate(zip(part, heard, strict=True)):
            decision, spoken = decisions[at], said.get(meme.id)
            side = None if decision == "abstain" or debate is None else decision
            reason = getattr(debate, side) or None if side else None
            left = without.get(at)
            yield Card(
                id=meme.id,
                score=float(scores[at]),
                decision=cast("Decision", decision),
                threshold=level,
                band=band,
                explanation=reason,
                explanation_side=cast("Side", side) if reason else None,
                harmful=spoken.harmful if spoken else "",
                harmless=spoken.harmless if spoken else "",
                verdict=spoken.verdict if spoken else None,
                agreement=spoken.agreement if spoken else None,
                judge=about,
                inputs=_inputs(judge, meme, debate),
                words=explained[at].words if explained else [],
                patches=explained[at].patches if explained else None,
                faithfulness=None
                if left is None or not reason
                else {"score_without": left, "flips": decide(left, level) != decision},
                flags=_flags(judge, meme, debate, spoken),
                meme=meme,
            )


def _states(judge: AnyJudge, memes: Sequence[Meme], batch_size: int) -> Features | None:
    """The tower's states of the pictures, where the judge looks: scores and reasons need each three times."""
    if judge.kind == "text" or judge.fusion == "none" or not judge.settings.image:
        return None
    from .features import image_features

    return image_features(judge, [meme.image for meme in memes], batch_size=batch_size)


def _without(
    judge: AnyJudge,
    memes: list[Meme],
    debates: list[Debate | None],
    decisions: Sequence[str],
    seen: Features | None,
    batch_size: int,
) -> dict[int, float]:
    """Scores without the explanation, by row."""
    rows = [
        i
        for i, (debate, decision) in enumerate(zip(debates, decisions, strict=True))
        if debate is not None and decision != "abstain" and getattr(debate, decision)
    ]
    cut = [replace(debates[i], **{decisions[i]: ""}) for i in rows]  # type: ignore[type-var]
    part = None if seen is None else seen.part(rows)
    found = score(judge, [memes[i] for i in rows], cut, batch_size=batch_size, features=part)
    return {i: round(float(value), _DIGITS) for i, value in zip(rows, found, strict=True)}


def _inputs(judge: AnyJudge, meme: Meme, debate: Debate | None) -> list[str]:
    looks = judge.fusion not in (None, "none") and judge.settings.image and meme.image is not None
    read = {
        "text": bool(meme.text),
        "image": looks,
        "caption": bool(meme.caption) and judge.settings.caption,
        "debate": debate is not None and judge.settings.ablation not in ("w/o MD", "w/o SLMJ"),
    }
    return [name for name, there in read.items() if there]


def _flags(judge: AnyJudge, meme: Meme, debate: Debate | None, said: Debate | None) -> list[str]:
    flags = list(said.flags) if said else []
    if debate is None:
        flags.append("no_debate")
    if meme.image is None and judge.kind == "fused":
        flags.append("no_image")
    if said is not None and not said.empty:
        flags += [
            f"empty_{side}"
            for side in ("harmful", "harmless")
            if not getattr(said, side) and f"refused_{side}" not in flags
        ]
    return list(dict.fromkeys(flags))

"""Judges and the paper's ablations on labeled memes, in one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.comparison import Comparison
from fusion_core.errors import ConfigError, DataError
from fusion_core.progress import track
from fusion_core.report import Claim, Report

from .ablations import ABLATIONS, judge_text, labels_of, paired, splits_of
from .detection import AnyJudge, score
from .difficulty import by_difficulty
from .meme import Debate, Meme
from .scoring import check_labels, metrics, reversed_labels
from .text_judge import TextJudge

__all__ = ["ablation_names", "evaluate"]

Floats = NDArray[np.float64]
ALL, LIGHT, FOLDS = "all", "light judge, five folds of these memes", 5
NOTE = (
    "Published: every ablation hurts, w/o SLMJ and w/o MF most, w/o HlD more than w/o HfD. With a light "
    "judge on the 354 Harm-C test memes (accuracy / macro-F1, three foldings): all .852 / .834, w/o LLMJ "
    ".852 / .834, w/o HlD .839 / .819, w/o HfD .834 / .813, w/o UR .832 / .809, w/o MD .823 / .802: there "
    "the harmful rationale carries the gain and the order none. One standard error of an accuracy is .019 "
    "there."
)


def ablation_names(words: Sequence[str]) -> list[str]:
    """The paper's names for what a person types: ``MD`` or ``w/o MD``; ``all`` = each.

    Raises:
        ConfigError: another name.
    """
    if "all" in words:
        return list(ABLATIONS)
    short = {name.removeprefix("w/o ").lower(): name for name in ABLATIONS}
    found: list[str] = []
    for word in words:
        name = short.get(word.strip().removeprefix("w/o").strip().lower())
        if name is None:
            raise ConfigError(f"ablate is {word!r}, wanted one of all, {', '.join(n[4:] for n in ABLATIONS)}")
        found.append(name)
    return list(dict.fromkeys(found))


def _verdicts(debates: Sequence[Debate | None]) -> Floats:
    return np.array([0.5 if d is None or d.verdict is None else float(d.verdict) for d in debates])


def _trained(
    judge: AnyJudge,
    memes: Sequence[Meme],
    debates: Sequence[Debate | None],
    name: str,
    batch_size: int,
) -> Floats:
    """Scores of a trained judge that reads what the ablation leaves."""
    if name == "w/o SLMJ":
        return _verdicts(debates)
    before = judge.settings
    fusion = judge.fusion
    try:
        judge.settings = before.replace(ablation=name)
        if name == "w/o MF":
            judge.settings = judge.settings.replace(caption=True)
            if judge.kind == "fused":
                judge.fusion = "none"
        return score(judge, memes, debates, batch_size=batch_size)
    finally:
        judge.settings = before
        if judge.kind == "fused":
            judge.fusion = fusion or "none"


def _crossed(
    memes: Sequence[Meme], debates: Sequence[Debate | None], truth: NDArray[np.int64], name: str, seed: int
) -> Floats:
    """Held-out scores of a light judge that learned from what the ablation leaves."""
    if name == "w/o SLMJ":
        return _verdicts(debates)
    texts = [judge_text(meme, said, ablation=name) for meme, said in zip(memes, debates, strict=True)]
    return TextJudge().cross_scores(texts, truth, seed=seed)


def evaluate(
    memes: Iterable[Meme],
    debates: Iterable[Debate] | Mapping[str, Debate] | None,
    judge: AnyJudge | None = None,
    *,
    ablations: Sequence[str] = (),
    seeds: Iterable[int] = (0, 1, 2),
    batch_size: int = 32,
    progress: bool | None = None,
) -> Report:
    """Metrics of a judge on labeled memes, whole and with the paper's parts left out.

    Args:
        memes: with labels.
        debates: of these memes, or None.
        judge: a trained one, which stays as it is and reads less in each ablation; None = a light judge is
            cross-validated by five folds, which learns anew what each ablation leaves.
        ablations: keys of :data:`meme_debate.ablations.ABLATIONS`.
        seeds: of the foldings; a trained judge has one row of numbers.
        batch_size: memes a forward pass.
        progress: None shows a bar on a terminal.

    Returns:
        A report whose comparison has ``all`` and the ablations as rows, differences against ``all``; beside a
        fused judge a light one, cross-validated on the same memes. Where there are debates, its ``rows`` tell
        what they do to the memes of which the judge is sure without them, and to the others; see
        :func:`meme_debate.difficulty.by_difficulty`.

    Raises:
        DataError: a meme without label, an id twice, one class only.
        ConfigError: an ablation that does not exist.
    """
    rows = list(memes)
    found, truth = paired(rows, debates), check_labels(labels_of(rows))
    if len(np.unique(truth)) < 2:
        raise DataError(f"labels holds only class {truth[0] if len(truth) else '-'}; both are needed")
    for name in ablations:
        if name not in ABLATIONS:
            raise ConfigError(f"ablations holds {name!r}, wanted some of {list(ABLATIONS)}")
    used = [0] if judge is not None else list(seeds)
    what = "a light judge, five folds" if judge is None else f"{judge.settings.name} ({judge.kind})"
    shown: dict[str, Any] = {
        name: {"better": "higher"} for name in ("accuracy", "macro_f1", "auroc", "auprc")
    }
    shown["ece"] = {"better": "lower"}
    table = Comparison(shown, ALL, used, f"{splits_of(rows)}, {what}")
    debated = any(debate is not None for debate in found)
    level = 0.5 if judge is None else judge.calibration.threshold
    names = ["", *ablations, *(["w/o MD"] if debated and "w/o MD" not in ablations else [])]
    scores: dict[str, list[Floats]] = {}
    jobs = [(name, seed) for name in names for seed in used]
    for name, seed in track(jobs, "evaluating", enabled=progress):
        if judge is None:
            scores.setdefault(name, []).append(_crossed(rows, found, truth, name, seed))
        else:
            scores.setdefault(name, []).append(_trained(judge, rows, found, name, batch_size))
    question: str | None = None
    for name in ["", *ablations]:
        for seed, each in zip(used, scores[name], strict=True):
            numbers = metrics(each, truth, 0.5 if name == "w/o SLMJ" else level)
            question = question or (reversed_labels(numbers) if not name else None)
            for metric in shown:
                table.add(f"{name}: {ABLATIONS[name]}" if name else ALL, metric, seed, numbers[metric])
    if judge is not None and judge.kind == "fused" and np.bincount(truth, minlength=2).min() >= FOLDS:
        numbers = metrics(_crossed(rows, found, truth, "", used[0]), truth)
        for metric in shown:
            table.add(LIGHT, metric, used[0], numbers[metric])
    claims = [_claim(table, ablations)] if ablations else []
    if question:
        claims.append(Claim(question, "", None, "Scores rank the wrong way round."))
    hard = by_difficulty(scores["w/o MD"], scores[""], truth, level) if debated else []
    return Report(title="Evaluation of a judge", comparison=table, rows=hard, claims=claims)


def _claim(table: Comparison, ablations: Sequence[str]) -> Claim:
    hurt = [
        row["method"]
        for row in table.rows()
        if row["method"] not in (ALL, LIGHT)
        and row["metric"] == "macro_f1"
        and row["difference"] is not None
        and row["difference"] < 0
    ]
    return Claim(
        "Every part of the method helps: each ablation lowers macro-F1",
        "the paper's ablations",
        len(hurt) == len(ablations),
        f"{len(hurt)} of {len(ablations)} ablations lower it here. {NOTE}",
    )

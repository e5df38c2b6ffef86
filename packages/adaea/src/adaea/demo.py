"""The demo: AdaEA beside Ens on crops of photographs, with intervals, paired tests and an honest verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion_core.comparison import Comparison
from fusion_core.demo import Demo, Method
from fusion_core.device import threads
from fusion_core.errors import require_extra
from fusion_core.processes import Start, second_process
from fusion_core.report import Claim, Figure
from fusion_core.results import plain
from fusion_core.seeding import generator
from fusion_core.stats import Interval, mcnemar, wilson

EPS = 16 / 255
SETTINGS = {"alpha": 2 / 255, "steps": 12}
BUDGETS = (4 / 255, 8 / 255, 16 / 255)
SEEDS = 3
IMAGES = {"quick": 48, "full": 106}
QUICK = {"Ens": "ens+mi", "AdaEA": "adaea+mi", "AdaEA (linear AGM)": "adaea+mi+linear"}
FULL = {
    **QUICK,
    "AdaEA (AGM only)": "adaea+mi+no-drf",
    "AdaEA (DRF only)": "adaea+mi+no-agm",
    "Ens + DI": "ens+mi+di",
    "AdaEA + DI": "adaea+mi+di",
    "AdaEA (linear AGM) + DI": "adaea+mi+di+linear",
}
PAPER = (
    "Bin Chen, Jia-Li Yin, Shukai Chen, Bohao Chen, Ximeng Liu: An Adaptive Model Ensemble Adversarial "
    "Attack for Boosting Adversarial Transferability, ICCV 2023"
)
NOTES = (
    "A faithful small-scale task, not ImageNet: 32x32 crops of ten photographs, nine networks of 12 to 117 "
    "thousand parameters, shipped with the package. Nothing is downloaded.",
    "Images: only those that all four surrogates name rightly. Strict ASR: of the images that the attacked "
    "model named rightly before, the share named wrongly after.",
    "For models that you own or may test; adaea ships no client for remote services.",
)


@dataclass(frozen=True, eq=False)
class _Outcome:
    """One attack over all seeds: which strict attempts there were and which succeeded, model by model."""

    right: Mapping[str, list[Tensor]]
    won: Mapping[str, list[Tensor]]
    weights: Sequence[Any]
    shares: Sequence[float]
    adversarial: Tensor
    keep: Tensor

    @property
    def kept(self) -> float:
        """Share of the pixels that the filter kept."""
        return sum(self.shares) / len(self.shares)


def black_boxes() -> dict[str, nn.Module]:
    """The six models under audit; ``res_squeeze`` is res12x2 behind 4-bit quantization and a 3x3 box blur."""
    from adaea.defences import BitDepth, BoxBlur
    from adaea.zoo import BLACK_BOXES, load_network

    found: dict[str, nn.Module] = {name: load_network(name) for name in BLACK_BOXES}
    found["res_squeeze"] = BitDepth(BoxBlur(load_network("res12x2"), 3), 4).eval()
    return found


def chosen_images(surrogates: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor]:
    """The shipped crops that every surrogate names rightly."""
    from adaea.evaluation import predictions
    from adaea.scenes import load_scenes

    images, labels = load_scenes()
    right = torch.ones(len(labels), dtype=torch.bool)
    for model in surrogates.values():
        right &= predictions(model, images, batch_size=200) == labels
    return images[right], labels[right]


def _parts(count: int, seeds: Sequence[int], *, full: bool) -> dict[int, Tensor]:
    """Rows for each seed; no image serves two seeds, so that all of them together are independent."""
    order = torch.randperm(count, generator=generator(seeds[0], "demo"))
    size = min(IMAGES["full" if full else "quick"], count // len(seeds))
    return {seed: order[i * size : (i + 1) * size].sort().values for i, seed in enumerate(seeds)}


@dataclass(frozen=True)
class _Lab:
    """The networks, the images that may serve, and the settings of all attacks."""

    surrogates: Mapping[str, nn.Module]
    targets: Mapping[str, nn.Module]
    data: tuple[Tensor, Tensor]
    settings: Mapping[str, Any]


def _lab(settings: Mapping[str, Any]) -> _Lab:
    from adaea.zoo import SURROGATES, load_network

    surrogates = {name: load_network(name) for name in SURROGATES}
    return _Lab(surrogates, black_boxes(), chosen_images(surrogates), settings)


def _attack(words: str, eps: float, parts: Mapping[int, Tensor], lab: _Lab) -> _Outcome:
    from adaea.evaluation import predictions
    from adaea.runs import run_attack
    from adaea.words import parse_attack

    images, labels = lab.data
    everyone = {**lab.surrogates, **lab.targets}
    attack = parse_attack(words, eps=eps, **lab.settings)
    right: dict[str, list[Tensor]] = {name: [] for name in everyone}
    won: dict[str, list[Tensor]] = {name: [] for name in right}
    runs: list[Any] = []
    for seed, rows in parts.items():
        run = run_attack(words, attack, lab.surrogates, images[rows], labels[rows], seed=seed)
        runs.append(run)
        for name, model in everyone.items():
            before = predictions(model, images[rows], batch_size=200)
            after = predictions(model, run.set.adversarial, batch_size=200)
            right[name].append(before == labels[rows])
            won[name].append((before == labels[rows]) & (after != labels[rows]))
    weights, shares = [run.weights for run in runs], [float(run.kept.mean()) for run in runs]
    return _Outcome(right, won, weights, shares, runs[0].set.adversarial, runs[0].keep)


def _attacks_beside(
    jobs: Sequence[tuple[str, float, Mapping[int, list[int]]]], settings: Mapping[str, Any]
) -> list[tuple[Any, ...]]:
    """What a second process does: attacks of some words and budgets on rows by seed, as plain values."""
    lab = _lab(settings)
    found: list[tuple[Any, ...]] = []
    for words, eps, rows in jobs:
        parts = {seed: torch.tensor(listed) for seed, listed in rows.items()}
        made = _attack(words, eps, parts, lab)
        counts = [{k: [t.tolist() for t in v] for k, v in one.items()} for one in (made.right, made.won)]
        found.append((*counts, made.weights, made.shares))
    return found


def _unpacked(values: tuple[Any, ...]) -> _Outcome:
    """An outcome of the second process; without the pictures, which are of the first seed."""
    right, won = ({k: [torch.tensor(t) for t in v] for k, v in one.items()} for one in values[:2])
    return _Outcome(right, won, values[2], values[3], torch.empty(0), torch.empty(0))


def _joined(first: _Outcome, second: _Outcome) -> _Outcome:
    """One outcome of two over different seeds."""
    right = {name: [*first.right[name], *second.right[name]] for name in first.right}
    won = {name: [*first.won[name], *second.won[name]] for name in first.won}
    weights, shares = [*first.weights, *second.weights], [*first.shares, *second.shares]
    return replace(first, right=right, won=won, weights=weights, shares=shares)


def _rate(outcome: _Outcome, name: str) -> Interval:
    """Strict rate over all seeds together."""
    return wilson(int(torch.cat(outcome.won[name]).sum()), int(torch.cat(outcome.right[name]).sum()))


def sign_test(ours: _Outcome, other: _Outcome, names: Sequence[str]) -> tuple[int, int, float]:
    """Images on which each attack fools more of the models, and the exact two-sided sign test between them.

    Images are independent of each other, models on one image are not: so the image is counted, once.
    """
    first = torch.stack([torch.cat(ours.won[name]) for name in names]).sum(0)
    second = torch.stack([torch.cat(other.won[name]) for name in names]).sum(0)
    more, fewer = int((first > second).sum()), int((first < second).sum())
    return more, fewer, mcnemar(more, fewer)


def _table(
    outcomes: Mapping[str, _Outcome],
    seeds: Sequence[int],
    white: Sequence[str],
    black: Sequence[str],
    title: str,
) -> Comparison:
    metrics: dict[str, Any] = {
        name: {"better": "higher", "percent": True} for name in ("white-box mean", "black-box mean", *black)
    }
    table = Comparison(metrics, "Ens", seeds, title)
    for method, outcome in outcomes.items():
        for i, seed in enumerate(seeds):
            rate = {
                name: float(outcome.won[name][i].sum()) / max(int(outcome.right[name][i].sum()), 1)
                for name in (*white, *black)
            }
            table.add(method, "white-box mean", seed, sum(rate[name] for name in white) / len(white))
            table.add(method, "black-box mean", seed, sum(rate[name] for name in black) / len(black))
            for name in black:
                table.add(method, name, seed, rate[name])
    return table


def _pairs(outcomes: Mapping[str, _Outcome], black: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Per model: pooled rates with Wilson intervals and McNemar's exact test, as records and as sentences."""
    records: list[dict[str, Any]] = []
    lines: list[str] = []
    ens, ours = outcomes["Ens"], outcomes["AdaEA"]
    for name in black:
        a, b = torch.cat(ours.won[name]), torch.cat(ens.won[name])
        only_ours, only_ens = int((a & ~b).sum()), int((b & ~a).sum())
        p, rates = mcnemar(only_ours, only_ens), {"Ens": _rate(ens, name), "AdaEA": _rate(ours, name)}
        counts = {"only_adaea": only_ours, "only_ens": only_ens}
        records.append(plain({"model": name, **rates, **counts, "p": p}))
        lines.append(
            f"{name}: Ens {_percent(rates['Ens'])}, AdaEA {_percent(rates['AdaEA'])} (strict ASR %, 95 % "
            f"Wilson); only AdaEA / only Ens succeeds {only_ours} / {only_ens}, exact McNemar p "
            f"{_p(p)}."
        )
    return records, lines


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _claims(
    outcomes: Mapping[str, _Outcome], surrogates: Sequence[str], black: Sequence[str], images: int
) -> list[Claim]:
    ours = outcomes["AdaEA"]

    def verdict(first: str, second: str) -> tuple[bool, str]:
        more, fewer, p = sign_test(outcomes[first], outcomes[second], black)
        mean = {m: sum(_rate(outcomes[m], n).value for n in black) / len(black) for m in (first, second)}
        words = (
            f"black-box mean {100 * mean[first]:.1f} % against {100 * mean[second]:.1f} % of {second}; "
            f"{first} fools more of the models on {more} images, {second} on {fewer} "
            f"(of {images}; exact sign test, p {_p(p)})"
        )
        return more > fewer and p < 0.05, words

    shown, words = verdict("AdaEA", "Ens")
    claims = [
        Claim(
            "AdaEA transfers better to unseen models than the even ensemble (Ens).",
            "abstract",
            shown,
            f"With momentum at eps 16/255: {words}.",
        )
    ]
    if "Ens + DI" in outcomes:
        shown, words = verdict("AdaEA + DI", "Ens + DI")
        claims.append(
            Claim("The same with input diversity (DI).", "abstract", shown, f"{words[0].upper()}{words[1:]}.")
        )
    mean = np.mean([weights.mean((0, 1)) for weights in ours.weights], axis=0)
    spread = float(mean.max() - mean.min())
    listed = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(surrogates, mean, strict=True))
    claims.append(
        Claim(
            "AGM weighs the surrogates by how much their steps harm the others, not evenly.",
            "abstract",
            spread > 0.02,
            f"Mean weights: {listed}; even would be {1 / len(surrogates):.2f}.",
        )
    )
    if "AdaEA (DRF only)" in outcomes:
        shown, words = verdict("AdaEA (DRF only)", "Ens")
        kept = f"at eta -0.3 the filter keeps {100 * ours.kept:.1f} % of the pixels"
        words = f"{words[0].upper()}{words[1:]}; {kept}."
        claims.append(Claim("The disparity-reduced filter alone helps transfer.", "abstract", shown, words))
    else:
        words = f"At eta -0.3 it keeps {100 * ours.kept:.1f} % of the pixels; --full tests it alone."
        claims.append(Claim("The disparity-reduced filter alone helps transfer.", "abstract", None, words))
    return claims


def demo(out: Path, *, full: bool = False, seed: int = 0) -> Demo:
    """Attack four small surrogates and see what six other models make of it.

    Args:
        out: gets ``grid.png``, ``weights.png`` and ``curve.png``.
        full: all images, the parts of AdaEA apart, and input diversity.
        seed: the first of three.

    Returns:
        Strict ASR over the seeds with Ens as baseline, claims, pictures, and per model the Wilson intervals
        and McNemar's exact test.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with threads(), second_process() as start:
        require_extra("matplotlib.figure", "demo", "adaea")  # meanwhile the other process loads torch
        return _demo(out, start, full=full, seed=seed)


def _demo(out: Path, start: Start, *, full: bool, seed: int) -> Demo:
    lab, attacks = _lab(SETTINGS), FULL if full else QUICK
    seeds = list(range(seed, seed + SEEDS))
    parts = _parts(len(lab.data[1]), seeds, full=full)
    rows = {number: part.tolist() for number, part in parts.items()}
    last, first = {seeds[-1]: rows[seeds[-1]]}, {seeds[0]: rows[seeds[0]]}
    curve = [(label, eps) for label in ("Ens", "AdaEA") for eps in BUDGETS if eps != EPS]
    jobs = [(words, EPS, last) for words in attacks.values()]
    jobs += [(QUICK[label], eps, first) for label, eps in curve[1:]]
    # The other process takes the last seed and most of the other budgets: half of the work.
    beside = start(_attacks_beside, jobs, SETTINGS)
    label, eps = curve[0]
    budget = _attack(QUICK[label], eps, {seeds[0]: parts[seeds[0]]}, lab)
    mine = {number: parts[number] for number in seeds[:-1]}
    outcomes = {label: _attack(words, EPS, mine, lab) for label, words in attacks.items()}
    others = [_unpacked(values) for values in beside()]
    joined = zip(outcomes.items(), others, strict=False)  # the other budgets come after
    outcomes = {label: _joined(outcome, other) for (label, outcome), other in joined}
    budgets: dict[str, dict[float, _Outcome]] = {"Ens": {}, "AdaEA": {}}
    for (label, eps), outcome in zip(curve, [budget, *others[len(attacks) :]], strict=True):
        budgets[label][eps] = outcome
    white, black = list(lab.surrogates), list(lab.targets)
    each = len(next(iter(parts.values())))
    title = f"Strict ASR, momentum 0.9, eps 16/255, step 2/255, 12 steps; {each} images per seed"
    count = each * len(seeds)
    records, lines = _pairs(outcomes, black)
    figures = _figures(out, outcomes, budgets, lab, parts)
    settings = {
        "eps": EPS,
        **SETTINGS,
        "attacks": attacks,
        "images": count,
        "surrogates": white,
        "black_boxes": black,
        "pairs": records,
        "kept": {label: outcome.kept for label, outcome in outcomes.items()},
    }
    return Demo(
        tables=[_table(outcomes, seeds, white, black, title)],
        claims=_claims(outcomes, white, black, count),
        figures=figures,
        notes=[*lines, *NOTES],
        settings=settings,
        seeds=seeds,
    )


def _figures(
    out: Path,
    outcomes: Mapping[str, _Outcome],
    curve: Mapping[str, Mapping[float, _Outcome]],
    lab: _Lab,
    parts: Mapping[int, Tensor],
) -> list[Figure]:
    from adaea import figures
    from adaea.auditreport import pick_columns
    from adaea.evaluation import predictions
    from adaea.scenes import CAPTIONS

    rows = next(iter(parts.values()))
    images, labels = lab.data[0][rows], lab.data[1][rows]
    adversarial = outcomes["AdaEA"].adversarial
    audited = "vgg12"
    before, after = (predictions(lab.targets[audited], x, batch_size=200) for x in (images, adversarial))
    shown = pick_columns(labels, before, after)
    name = lambda number: CAPTIONS[int(number)]
    titles = [(name(labels[i]), name(before[i]), name(after[i])) for i in shown]
    mask = outcomes["AdaEA"].keep[shown]
    grid = figures.grid(
        out / "grid.png",
        images[shown],
        adversarial[shown],
        mask,
        titles,
        eps=EPS,
        attack="AdaEA",
        model=audited,
    )
    adaptive = {label: outcomes[label].weights[0] for label in ("AdaEA", "AdaEA (linear AGM)")}
    weights = figures.weights(out / "weights.png", adaptive, list(lab.surrogates))
    part = slice(0, 1)
    series = {
        name: {
            label: {
                eps: _rate(_cut(curve[label][eps] if eps in curve[label] else outcomes[label], part), name)
                for eps in BUDGETS
            }
            for label in curve
        }
        for name in lab.targets
    }
    return [grid, weights, figures.curves(out / "curve.png", series, rate="strict ASR")]


def _cut(outcome: _Outcome, part: slice) -> _Outcome:
    right = {name: listed[part] for name, listed in outcome.right.items()}
    won = {name: listed[part] for name, listed in outcome.won.items()}
    return _Outcome(
        right, won, outcome.weights[part], outcome.shares[part], outcome.adversarial, outcome.keep
    )


method = Method(
    name="adaea",
    package="adaea",
    title="AdaEA: adaptive model-ensemble transfer attacks",
    paper=PAPER,
    url="https://arxiv.org/abs/2308.02897",
    summary="Audits a classifier that you own or may test: do attacks on other models transfer to it?",
    demo=demo,
)

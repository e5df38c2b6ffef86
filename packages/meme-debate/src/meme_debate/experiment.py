"""The demo's experiment: debates over a real server, and every judge in one table."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_core.comparison import Comparison
from fusion_core.demo import Demo
from fusion_core.device import threads
from fusion_core.errors import require_extra
from fusion_core.report import Figure, Page

from . import demo_claims as words
from .ablations import judge_text
from .calibrate import calibrate, scale_scores
from .debate import Debater
from .demo_pages import calibration_figure, cards_figure, cards_page, choose_cards
from .detection import Card, detect
from .encoding import pixels_of
from .features import Features
from .fused import score_memes
from .judge import Fusion, Judge
from .meme import Debate, Meme
from .scoring import metrics
from .shipped import checkpoint, load_judges
from .stand_in import (
    HELD_OUT,
    StandIn,
    debater,
    make_judge,
    make_memes,
    read_pixels,
    train_tower,
)
from .text_judge import TextJudge
from .training import JudgeBatches, JudgeTrainConfig, decay_groups, linear_schedule

Floats = NDArray[np.float64]


class Scale(NamedTuple):
    """How much of everything."""

    train: int
    test: int
    unseen: int
    seeds: int
    steps: int
    lr: float
    fusions: tuple[Fusion, ...]
    new_memes: bool


SCALES = {
    "quick": Scale(768, 400, 0, 3, 160, 3e-3, ("none", "layerwise"), False),
    "full": Scale(1024, 512, 256, 5, 400, 2e-3, ("none", "final", "layerwise"), True),
}
ACCURACY = "accuracy"
UNSEEN = "unseen photographs"
WORKERS = 2


@dataclass
class Set:
    """Memes of one part, as the judge sees them, with debates and labels."""

    items: list[StandIn]
    debates: list[Debate]
    pixels: Tensor

    @property
    def memes(self) -> list[Meme]:
        """As the judge sees them."""
        return [each.judged for each in self.items]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) 1 = a jibe."""
        return np.array([each.meme.label for each in self.items], np.int64)


def _memes(folder: Path, scale: Scale, seed: int) -> dict[str, list[StandIn]]:
    parts = {"train": scale.train, "test": scale.test}
    found = {
        name: make_memes(folder / f"{seed}", count, seed=seed, split=name) for name, count in parts.items()
    }
    if scale.unseen:
        found["unseen"] = make_memes(
            folder / f"{seed}", scale.unseen, seed=seed, split="unseen", things=HELD_OUT
        )
    return found


def _debates(
    folder: Path,
    url: str,
    parts: dict[str, list[StandIn]],
    pixels: dict[str, Tensor],
    seed: int,
) -> tuple[dict[str, Set], Any]:
    """Debates over HTTP by the real client, with a cache; and its report."""
    who = Debater(url, f"stand-in-{seed}", cache=folder / f"debates-{seed}.sqlite", swap=False)
    everything = [each.meme for part in parts.values() for each in part]
    found = who.run(everything, 32, progress=False)
    by_id = {debate.id: debate for debate in found}
    sets = {
        name: Set(part, [by_id[each.meme.id] for each in part], pixels[name]) for name, part in parts.items()
    }
    return sets, found.report


def fit(judge: Judge, data: Set, features: Features, scale: Scale, seed: int) -> None:
    """AdamW with the authors' decay groups, warm-up and linear decay; half of the batches without debate."""
    config = JudgeTrainConfig(
        steps=scale.steps, batch_size=32, lr=scale.lr, debate_dropout=0.5, max_grad_norm=1.0, seed=seed
    )
    batches = JudgeBatches(judge, data.memes, list(data.debates), config, features)
    optimizer = torch.optim.AdamW(decay_groups(judge, config.weight_decay), lr=config.lr, fused=True)
    schedule = linear_schedule(optimizer, scale.steps, config.warmup)
    judge.train()
    for batch in _endless(batches, scale.steps):
        judge(**batch).loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    judge.eval()


def _endless(batches: JudgeBatches, steps: int) -> Iterator[dict[str, Tensor]]:
    epoch = 0
    while steps > 0:
        batches.set_epoch(epoch)
        for batch in batches:
            if steps == 0:
                return
            steps -= 1
            yield batch
        epoch += 1


def _accuracy(scores: Floats, labels: NDArray[np.int64]) -> float:
    return metrics(np.clip(scores, 0, 1), labels)["accuracy"]


def _picture_only(features: dict[str, Features], sets: dict[str, Set]) -> dict[str, Floats]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def rows(name: str) -> Any:
        return features[name][np.arange(len(features[name]))][:, 0].numpy()

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(rows("train"), sets["train"].labels)
    return {name: model.predict_proba(rows(name))[:, 1] for name in sets if name != "train"}


def _light(sets: dict[str, Set], *, debate: bool) -> dict[str, Floats]:
    def texts(part: Set) -> list[str]:
        pairs = zip(part.memes, part.debates, strict=True)
        return [judge_text(meme, said if debate else None) for meme, said in pairs]

    judge = TextJudge(min_df=2).fit(texts(sets["train"]), sets["train"].labels)
    return {name: judge.predict_proba(texts(part)) for name, part in sets.items() if name != "train"}


@torch.no_grad()
def _states(judge: Judge, part: Set) -> Features:
    """The tower's states of a part's pictures, and of the gray one where a picture is withheld."""
    gray = pixels_of(None, part.pixels.shape[-1])[None]
    pictures = torch.cat([part.pixels, gray])
    states = [judge.image_states(rows) for rows in pictures.split(256)]
    place = np.array([len(part.items) if each.hidden else i for i, each in enumerate(part.items)], np.int64)
    return Features(torch.cat(states).numpy(), place)


@dataclass
class Prepared:
    """One seed's judges before their training, with the trained tower, and the states of all pictures."""

    sets: dict[str, Set]
    judges: dict[Fusion, Judge]
    features: dict[str, Features]


def _prepare(sets: dict[str, Set], scale: Scale, seed: int, shipped: bool = False) -> Prepared:
    train = sets["train"]
    texts = [judge_text(meme, said) for meme, said in zip(train.memes, train.debates, strict=True)]
    judges: dict[Fusion, Judge] = {fusion: make_judge(texts, fusion, seed) for fusion in scale.fusions}
    first = judges["layerwise"]
    if shipped:
        load_judges(judges, checkpoint(seed))
    else:
        train_tower(first, train.items, train.pixels, seed=seed)
    for judge in judges.values():
        judge.image_transformer.load_state_dict(first.image_transformer.state_dict())
        judge.image_transformer.requires_grad_(False)
    return Prepared(sets, judges, {name: _states(first, part) for name, part in sets.items()})


def _fused(made: Prepared, fusion: Fusion) -> dict[str, dict[str, Floats]]:
    """Scores of one trained judge, with and without debate."""
    judge, sets = made.judges[fusion], made.sets
    found: dict[str, dict[str, Floats]] = {}
    for name, part in sets.items():
        if name == "train":
            continue
        nothing: list[Debate | None] = [None] * len(part.items)
        for said, row in (
            (nothing, words.without_debate(fusion)),
            (list(part.debates), words.with_debate(fusion)),
        ):
            found.setdefault(row, {})[name] = score_memes(
                judge, part.memes, said, features=made.features[name], batch_size=128
            )
    return found


def _others(made: Prepared) -> dict[str, dict[str, Floats]]:
    """Scores of the judges that need no network."""
    return {
        words.TEXT_ONLY: _light(made.sets, debate=False),
        words.PICTURE_ONLY: _picture_only(made.features, made.sets),
        words.VERDICT: {
            name: np.array([0.5 if d.verdict is None else d.verdict for d in part.debates], np.float64)
            for name, part in made.sets.items()
            if name != "train"
        },
        words.LIGHT: _light(made.sets, debate=True),
    }


def _is_shipped(seeds: Sequence[int], scale: Scale) -> bool:
    """Whether trained judges for these seeds come with the package: the quick demo's own."""
    return scale == SCALES["quick"] and seeds[0] == 0 and all(checkpoint(seed).exists() for seed in seeds)


def _train(
    sets: Mapping[int, dict[str, Set]], scale: Scale, pool: ThreadPoolExecutor, *, shipped: bool
) -> dict[int, Prepared]:
    """Every seed's judges, trained here unless they are shipped."""
    seeds = list(sets)
    prepare = partial(_prepare, scale=scale, shipped=shipped)
    made = dict(zip(seeds, pool.map(lambda seed: prepare(sets[seed], seed=seed), seeds), strict=True))
    if not shipped:
        jobs = [(seed, fusion) for seed in seeds for fusion in scale.fusions]

        def train(job: tuple[int, Fusion]) -> None:
            seed, fusion = job
            one = made[seed]
            fit(one.judges[fusion], one.sets["train"], one.features["train"], scale, seed)

        list(pool.map(train, jobs))
    return made


@threads()
def train_seeds(sets: Mapping[int, dict[str, Set]], scale: Scale) -> dict[int, dict[Fusion, Judge]]:
    """Train the judges of every seed: what :mod:`meme_debate.train_checkpoints` writes."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return {seed: one.judges for seed, one in _train(sets, scale, pool, shipped=False).items()}


@threads()
def run_seeds(
    sets: Mapping[int, dict[str, Set]], scale: Scale
) -> dict[int, tuple[dict[str, dict[str, Floats]], Judge]]:
    """Scores of every judge on every part by the row's name, and the layer-wise judge, for each seed.

    Torch runs on one thread; seeds and fusions are shared by two, which tiny networks use better.
    """
    seeds = list(sets)
    jobs = [(seed, fusion) for seed in seeds for fusion in scale.fusions]
    with ThreadPoolExecutor(WORKERS) as pool:
        made = _train(sets, scale, pool, shipped=_is_shipped(seeds, scale))
        found = list(pool.map(lambda job: _fused(made[job[0]], job[1]), jobs))
    scores: dict[int, dict[str, dict[str, Floats]]] = {seed: _others(made[seed]) for seed in seeds}
    for (seed, _), rows in zip(jobs, found, strict=True):
        scores[seed] |= rows
    order = words.order(scale.fusions)
    return {
        seed: ({name: scores[seed][name] for name in order}, made[seed].judges["layerwise"]) for seed in seeds
    }


def _debated(
    folder: Path, scale: Scale, seeds: Sequence[int]
) -> tuple[dict[int, dict[str, Set]], list[Any], Any]:
    """The seeds' memes with debates, the debater's report of each, and that of a second run of the first."""
    made: dict[int, dict[str, list[StandIn]]] = {}
    pixels: dict[int, dict[str, Tensor]] = {}
    for each in seeds:
        if scale.new_memes or each == seeds[0]:
            made[each] = _memes(folder, scale, each)
            pixels[each] = {name: read_pixels(part) for name, part in made[each].items()}
        else:
            made[each], pixels[each] = made[seeds[0]], pixels[seeds[0]]
    known = [item for each in seeds for part in made[each].values() for item in part]
    sets: dict[int, dict[str, Set]] = {}
    reports: list[Any] = []
    with debater(known, folder) as url:
        for each in seeds:
            sets[each], report = _debates(folder, url, made[each], pixels[each], each)
            reports.append(report)
        again = _debates(folder, url, made[seeds[0]], pixels[seeds[0]], seeds[0])[1]
    return sets, reports, again


def quick_sets(folder: Path, scale: Scale) -> dict[int, dict[str, Set]]:
    """Memes and debates of the quick demo's seeds."""
    return _debated(folder, scale, list(range(scale.seeds)))[0]


def experiment(out: Path, *, full: bool = False, seed: int = 0) -> Demo:
    """Debates over HTTP, then every judge on held-out stand-in memes.

    Args:
        out: gets the pictures and ``cards.html``.
        full: five seeds with memes of their own, longer training, all fusions, and unseen photographs.
        seed: first of the seeds.

    Raises:
        MissingExtraError: scikit-image or matplotlib is not installed.
    """
    require_extra("matplotlib", "demo", "meme-debate")
    scale = SCALES["full" if full else "quick"]
    seeds = list(range(seed, seed + scale.seeds))
    shown: dict[str, Any] = {ACCURACY: {"better": "higher", "percent": True}}
    if scale.unseen:
        shown[UNSEEN] = {"better": "higher", "percent": True}
    title = "Stand-in memes: teasing, told from words, picture and debate"
    table = Comparison(shown, words.LIGHT, seeds, title)
    with tempfile.TemporaryDirectory() as place:
        sets, reports, again = _debated(Path(place), scale, seeds)
        first: tuple[Judge, Set, Floats] | None = None
        abstained: list[float] = []
        for each, (rows, judge) in run_seeds(sets, scale).items():
            _add(table, rows, sets[each], each)
            scores = rows[words.with_debate("layerwise")]
            if first is None:
                first = judge, sets[each]["test"], scores["test"]
            if "unseen" in scores:
                abstained.append(_abstention(scores, sets[each]["test"].labels))
        assert first is not None
        cards, figures = _show(out, *first)
    notes = words.notes(scale, reports, again, cards)
    if abstained:
        notes.append(words.abstention(abstained))
    return Demo(
        tables=[table],
        claims=words.claims(table, scale.fusions, unseen=bool(scale.unseen)),
        figures=figures,
        notes=notes,
        settings={**scale._asdict(), "debate_dropout": 0.5, "shipped judges": _is_shipped(seeds, scale)},
        seeds=seeds,
    )


def _add(table: Comparison, rows: dict[str, dict[str, Floats]], sets: dict[str, Set], seed: int) -> None:
    for method, parts in rows.items():
        table.add(method, ACCURACY, seed, _accuracy(parts["test"], sets["test"].labels))
        if "unseen" in parts:
            table.add(method, UNSEEN, seed, _accuracy(parts["unseen"], sets["unseen"].labels))


def _abstention(scores: dict[str, Floats], labels: NDArray[np.int64]) -> float:
    """Share of memes over unseen photographs in a band that holds a fifth of the test memes."""
    made = calibrate(scores["test"], labels, coverage=0.8)
    if made.band is None:
        return 0.0
    scaled = made.apply(scores["unseen"])
    return float(((scaled >= made.band[0]) & (scaled <= made.band[1])).mean())


def _show(out: Path, judge: Judge, test: Set, scores: Floats) -> tuple[Sequence[Card], list[Figure]]:
    """Calibrate on one half of the test memes; plot and make cards of the other."""
    half = len(test.items) // 2
    labels = test.labels
    judge.calibration = calibrate(scores[:half], labels[:half], coverage=0.85)
    after = scale_scores(scores[half:], judge.calibration.temperature)
    figures = [calibration_figure(out, scores[half:], after, labels[half:], judge.calibration)]
    memes = test.memes[half:]
    cards = list(detect(memes, test.debates[half:], judge, words=12, batch_size=64))
    chosen = choose_cards(cards)
    page: Page = cards_page(chosen)
    page.save(out / "cards.html")
    figures.append(cards_figure(out, chosen, {each.meme.id: each for each in test.items}))
    return cards, figures

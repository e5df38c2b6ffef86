"""The demo's experiment: debates over a real server, and every judge in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_core.checkpoint import load_tensors, save_tensors
from fusion_core.comparison import Comparison
from fusion_core.demo import Demo
from fusion_core.device import threads
from fusion_core.processes import second_process
from fusion_core.report import Figure, Page

from . import demo_claims as words
from .ablations import judge_text
from .batches import JudgeBatches, JudgeTrainConfig
from .calibrate import calibrate, scale_scores
from .demo_pages import calibration_figure, cards_figure, cards_page, choose_cards
from .detection import Card, detect
from .encoding import pixels_of
from .features import Features
from .fused import score_memes
from .judge import Fusion, Judge
from .meme import Debate, Meme
from .scoring import metrics
from .shipped import checkpoint, load_judges, shipped_tokenizer
from .stand_in import make_judge, train_tower
from .stand_in_memes import StandIn
from .stand_in_work import LIGHT, SCALES, TEXT_ONLY, VERDICT, Scale, Worker, read_parts
from .tokens import word_tokenizer
from .training import decay_groups, linear_schedule

Floats = NDArray[np.float64]
Scores = dict[str, dict[str, Floats]]
ACCURACY = "accuracy"
UNSEEN = "unseen photographs"
WORKERS = 2
_ROWS = {words.TEXT_ONLY: TEXT_ONLY, words.VERDICT: VERDICT, words.LIGHT: LIGHT}


@dataclass
class Set:
    """Memes of one part, as the judge sees them, with debates and labels."""

    items: list[StandIn]
    debates: list[Debate]

    @property
    def memes(self) -> list[Meme]:
        """As the judge sees them."""
        return [each.judged for each in self.items]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) 1 = a jibe."""
        return np.array([each.meme.label for each in self.items], np.int64)


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


@torch.no_grad()
def _states(judge: Judge, part: Set, pixels: Tensor) -> Features:
    """The tower's states of a part's pictures, and of the gray one where a picture is withheld."""
    gray = pixels_of(None, pixels.shape[-1])[None]
    states = [judge.image_states(rows) for rows in torch.cat([pixels, gray]).split(256)]
    place = np.array([len(part.items) if each.hidden else i for i, each in enumerate(part.items)], np.int64)
    return Features(torch.cat(states).numpy(), place)


@dataclass
class Prepared:
    """One seed's judges before their training, with the trained tower, and the states of all pictures."""

    sets: dict[str, Set]
    judges: dict[Fusion, Judge]
    features: dict[str, Features]


def _untrained(train: Set, fusions: Sequence[Fusion], seed: int) -> dict[Fusion, Judge]:
    pairs = zip(train.memes, train.debates, strict=True)
    tokenizer = word_tokenizer([judge_text(meme, said) for meme, said in pairs])
    return {fusion: make_judge(tokenizer, fusion, seed) for fusion in fusions}


def _give_tower(judges: dict[Fusion, Judge], tower: dict[str, Tensor]) -> None:
    for judge in judges.values():
        judge.image_transformer.load_state_dict(tower)
        judge.image_transformer.requires_grad_(False)


def _prepare(
    sets: dict[str, Set], pixels: dict[str, Tensor], scale: Scale, seed: int, *, shipped: bool = False
) -> Prepared:
    train = sets["train"]
    if shipped:
        tokenizer = shipped_tokenizer(checkpoint(seed))
        judges: dict[Fusion, Judge] = {
            fusion: make_judge(tokenizer, fusion, seed) for fusion in scale.fusions
        }
        load_judges(judges, checkpoint(seed))
    else:
        judges = _untrained(train, scale.fusions, seed)
        train_tower(judges["layerwise"], train.items, pixels["train"], seed=seed)
    first = judges["layerwise"]
    _give_tower(judges, first.image_transformer.state_dict())
    return Prepared(sets, judges, {name: _states(first, part, pixels[name]) for name, part in sets.items()})


def _write_prepared(made: Prepared, path: Path) -> None:
    """The tower and the states of all pictures, for another process."""
    tower = made.judges["layerwise"].image_transformer.state_dict()
    state = {f"tower.{key}": value for key, value in tower.items()}
    for name, part in made.features.items():
        assert isinstance(part.states, np.ndarray)
        state |= {
            f"states.{name}": torch.from_numpy(part.states),
            f"place.{name}": torch.from_numpy(part.place),
        }
    save_tensors(path, state)


def _read_prepared(path: Path, parts: dict[str, Set], fusions: Sequence[Fusion], seed: int) -> Prepared:
    """What :func:`_write_prepared` wrote, with judges as they were before their training."""
    state = load_tensors(path)
    judges = _untrained(parts["train"], fusions, seed)
    _give_tower(
        judges,
        {key.removeprefix("tower."): value for key, value in state.items() if key.startswith("tower.")},
    )
    features = {
        name: Features(state[f"states.{name}"].numpy(), state[f"place.{name}"].numpy()) for name in parts
    }
    return Prepared(parts, judges, features)


def _fused(made: Prepared, fusion: Fusion) -> Scores:
    """Scores of one trained judge, with and without debate."""
    judge, sets = made.judges[fusion], made.sets
    found: Scores = {}
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


def _trained(made: Prepared, scale: Scale, seed: int) -> Scores:
    """Train all judges; their scores."""
    found: Scores = {}
    for fusion, judge in made.judges.items():
        fit(judge, made.sets["train"], made.features["train"], scale, seed)
        found |= _fused(made, fusion)
    return found


def _trained_beside(folder: Path, memes: int, seed: int, scale: Scale, fusions: Sequence[Fusion]) -> Scores:
    """The same in a second process, from the worker's folder."""
    parts = {name: Set(*part) for name, part in read_parts(folder, memes, seed).items()}
    return _trained(_read_prepared(_prepared_file(folder, seed), parts, fusions, seed), scale, seed)


def _prepared_file(folder: Path, seed: int) -> Path:
    return folder / f"prepared-{seed}.safetensors"


def is_shipped(seeds: Sequence[int], scale: Scale) -> bool:
    """Whether trained judges for these seeds come with the package: the quick demo's own."""
    return scale == SCALES["quick"] and seeds[0] == 0 and all(checkpoint(seed).exists() for seed in seeds)


def prepared(worker: Worker, *, shipped: bool = False) -> Iterator[tuple[int, Prepared]]:
    """Each seed's judges, memes, debates and states of pictures, as soon as the worker has what they need."""
    pixels: dict[int, dict[str, Tensor]] = {}
    for seed in worker.seeds:
        sets = {name: Set(*part) for name, part in worker.parts(seed).items()}
        known = worker.memes_seed(seed)
        if known not in pixels:
            pixels = {known: {name: torch.from_numpy(each) for name, each in worker.pixels(seed).items()}}
        yield seed, _prepare(sets, pixels[known], worker.scale, seed, shipped=shipped)


@threads()
def train_seeds(worker: Worker) -> dict[int, dict[Fusion, Judge]]:
    """Train the judges of every seed: what :mod:`meme_debate.train_checkpoints` writes."""
    found: dict[int, dict[Fusion, Judge]] = {}
    for seed, made in prepared(worker):
        for judge in made.judges.values():
            fit(judge, made.sets["train"], made.features["train"], worker.scale, seed)
        found[seed] = made.judges
    return found


def _share(fusions: Sequence[Fusion], number: int) -> tuple[list[Fusion], list[Fusion]]:
    """Which judges of a seed are trained here, layer-wise among them, and which in the second process.

    Over two seeds each has as many, and of an odd number of seeds the second process, which does nothing
    else, has more.

    Example:
        >>> _share(["none", "final", "layerwise"], 0), _share(["none", "final", "layerwise"], 1)
        ((['layerwise'], ['none', 'final']), (['layerwise', 'none'], ['final']))
    """
    order = sorted(fusions, key=lambda fusion: fusion != "layerwise")
    own = (len(order) + number % 2) // 2
    return order[:own], order[own:]


@threads()
def run_seeds(worker: Worker) -> dict[int, tuple[Scores, Judge, dict[str, Set]]]:
    """Scores of every judge on every part by the row's name, the layer-wise judge, and the memes, by seed.

    Torch runs on one thread; judges that are not trained yet are shared with a second process, as two threads
    of tiny networks mostly wait for each other.
    """
    scale, shipped = worker.scale, is_shipped(worker.seeds, worker.scale)
    made: dict[int, Prepared] = {}
    scores: dict[int, list[Callable[[], Scores]]] = {}
    with second_process(not shipped) as start, ThreadPoolExecutor(WORKERS) as pool:
        pool.submit(import_module, "matplotlib.figure")  # which the pictures need, while the networks compute
        for number, (seed, one) in enumerate(prepared(worker, shipped=shipped)):
            made[seed] = one
            states = {name: part[np.arange(len(part))][:, 0].numpy() for name, part in one.features.items()}
            worker.ask_pictures(seed, states)
            if shipped:
                scores[seed] = [pool.submit(_fused, one, fusion).result for fusion in scale.fusions]
                continue
            own, others = _share(scale.fusions, number)
            _write_prepared(one, _prepared_file(worker.folder, seed))
            there = worker.folder, worker.memes_seed(seed), seed, scale, others
            later = start(_trained_beside, *there)
            one.judges = {fusion: one.judges[fusion] for fusion in own}
            here = _trained(one, scale, seed)
            scores[seed] = [lambda found=here: found, later]
        found: dict[int, tuple[Scores, Judge, dict[str, Set]]] = {}
        for seed, one in made.items():
            light = worker.light(seed)
            rows = {name: light[key] for name, key in _ROWS.items()}
            rows[words.PICTURE_ONLY] = worker.pictures(seed)
            for score in scores[seed]:
                rows |= score()
            found[seed] = (
                {name: rows[name] for name in words.order(scale.fusions)},
                one.judges["layerwise"],
                one.sets,
            )
    return found


def experiment(out: Path, worker: Worker) -> Demo:
    """Every judge on held-out stand-in memes, whose debates a worker holds.

    Args:
        out: gets the pictures and ``cards.html``.
        worker: started already, so that it works while this module is loaded.
    """
    scale, seeds = worker.scale, worker.seeds
    shown: dict[str, Any] = {ACCURACY: {"better": "higher", "percent": True}}
    if scale.unseen:
        shown[UNSEEN] = {"better": "higher", "percent": True}
    title = "Stand-in memes: teasing, told from words, picture and debate"
    table = Comparison(shown, words.LIGHT, seeds, title)
    abstained: list[float] = []
    judged = run_seeds(worker)
    for seed, (rows, _, sets) in judged.items():
        _add(table, rows, sets, seed)
        scores = rows[words.with_debate("layerwise")]
        if "unseen" in scores:
            abstained.append(_abstention(scores, sets["test"].labels))
    rows, judge, sets = judged[seeds[0]]
    cards, figures = _show(out, judge, sets["test"], rows[words.with_debate("layerwise")]["test"])
    reports = [worker.report(seed) for seed in seeds]
    notes = words.notes(scale, reports, worker.report(seeds[0], again=True), cards)
    if abstained:
        notes.append(words.abstention(abstained))
    return Demo(
        tables=[table],
        claims=words.claims(table, scale.fusions, unseen=bool(scale.unseen)),
        figures=figures,
        notes=notes,
        settings={**scale._asdict(), "debate_dropout": 0.5, "shipped judges": is_shipped(seeds, scale)},
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
    cards = list(detect(memes, test.debates[half:], judge, words=0, batch_size=64))
    chosen = choose_cards(cards)
    wanted = {card.id for card in chosen.values()}
    few = [meme for meme in memes if meme.id in wanted]
    said = [debate for debate in test.debates[half:] if debate.id in wanted]
    whole = {card.id: card for card in detect(few, said, judge, words=12)}  # with words and patches
    chosen = {name: whole[card.id] for name, card in chosen.items()}
    page: Page = cards_page(chosen)
    page.save(out / "cards.html")
    figures.append(cards_figure(out, chosen, {each.meme.id: each for each in test.items}))
    return cards, figures

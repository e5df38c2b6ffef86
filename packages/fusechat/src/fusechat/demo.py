"""The demo: a tiny pivot learns from two sources with other tokenizers; the verdict is what was measured."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusechat import merge
from fusechat.corpus import load_corpus
from fusechat.tiny import BATCH, LENGTH, bits_per_character, load_model, load_tokenizer
from fusion_core.comparison import Comparison
from fusion_core.demo import Demo, Method
from fusion_core.device import threads
from fusion_core.errors import require_extra
from fusion_core.plotting import new_figure, save_figure
from fusion_core.processes import second_process
from fusion_core.report import Claim, Figure
from fusion_core.seeding import generator
from fusion_core.testing import tiny

PAPER = (
    "Fanqi Wan, Longguang Zhong, Ziyi Yang, Ruijun Chen, Xiaojun Quan: FuseChat: Knowledge Fusion of "
    "Chat Models, EMNLP 2025"
)
METRIC = "bits_per_character"
SFT = "fine-tuning only"
STEPS, LR = {"quick": 80, "full": 110}, 2e-3
HELD_OUT: dict[str, int | None] = {"quick": 60, "full": None}  # texts to count on; None = all 120
SEEDS = {"quick": 2, "full": 5}
TARGETS = {
    "source 1, lambda 0.9 (paper)": ("source1", 0.1),
    "source 1, lambda 0.5": ("source1", 0.5),
    "source 1, lambda 0.2": ("source1", 0.8),
    "source 2, lambda 0.5": ("source2", 0.5),
    "control: the pivot itself, lambda 0.5": ("pivot", 0.5),
}
CONTROL = "control: the pivot itself, lambda 0.5"
SLOW = ("source 1, lambda 0.2",)  # of the full mode only
PARENTS = ("source 1, lambda 0.5", "source 2, lambda 0.5")
NOTES = (
    "A small-scale task, not chat models: docstrings of Python's standard library, three byte-pair "
    "tokenizers, Llamas of 0.1 to "
    "0.2 million parameters that ship with the package. Nothing is downloaded.",
    "Held-out bits per character compare models of different tokenizers. MinCE follows the source for "
    "nearly all texts here, "
    "so it changes nothing.",
)


def _stores(texts: Sequence[str], folder: Path) -> None:
    """Top-10 distributions of the three models on the pivot's texts."""
    from fusechat.collecting import collect

    for name in ("pivot", "source1", "source2"):
        collect(
            load_model(name),
            texts,
            out=folder / name,
            tokenizer=load_tokenizer(name),
            max_length=256,
            progress=False,
        )


def batches(texts: Sequence[str], stores: Mapping[str, Any], seed: int, steps: int) -> dict[str, list[Any]]:
    """The batches of one run by source: random texts with that source's aligned distributions.

    Args:
        texts: for the pivot.
        stores: top-10 distributions by model, the pivot's among them.
        seed: of the draws; the same rows for every source.
        steps: how many.
    """
    from fusechat.collate import FusionCollator

    collate = FusionCollator(
        load_tokenizer("pivot"),
        list(stores.values()),
        tokenizers=[load_tokenizer(name) for name in stores],
        pivot=stores["pivot"],
        mask="all",
        vocab="prefix",
        unaligned="onehot",
        max_length=LENGTH,
    )
    draws = generator(seed, "demo")
    rows = [torch.randint(0, len(texts), (BATCH,), generator=draws).tolist() for _ in range(steps)]
    picked: list[list[Any]] = [[texts[i] for i in row] for row in rows]
    made = [collate(batch) for batch in picked]  # a text is encoded once for all sources
    return {
        name: [replace(batch, sources=batch.sources[n : n + 1]) for batch in made]
        for n, name in enumerate(stores)
    }


def tuned(made: Sequence[Any], weight: float) -> Any:
    """The pivot fine-tuned on batches with a share of fusion.

    Args:
        made: of :func:`batches`.
        weight: share of the fusion term; the paper's lambda is 1 - weight.
    """
    from fusechat.objective import FusionLoss

    model, objective, order = load_model("pivot"), FusionLoss(weight=weight), iter(made)

    def loss() -> Tensor:
        batch = next(order)
        return objective(model(**batch.inputs).logits, batch).total

    return tiny.fit(model, loss, len(made), LR)


def _merged(parents: Sequence[Any], base: Any) -> dict[str, Any]:
    """The two targets merged by three rules."""
    states = [parent.state_dict() for parent in parents]
    pivot = base.state_dict()
    rules = {
        "merge: linear": merge.linear(states),
        "merge: VaRM": merge.varm(states, base=pivot),
        "merge: SCE, tau 1": merge.sce(states, base=pivot, tau=1.0),
    }
    found: dict[str, Any] = {}
    for name, rule in rules.items():
        found[name] = copy.deepcopy(base)
        found[name].load_state_dict(rule.state_dict())
    return found


def bits_before(held_out: int | None) -> dict[str, float]:
    """Held-out bits per character of the three models as they ship, each with its own tokenizer.

    Args:
        held_out: texts to count on; None takes all.
    """
    texts = load_corpus().held_out[:held_out]
    return {
        name: bits_per_character(load_model(name), load_tokenizer(name), texts)
        for name in ("source1", "source2", "pivot")
    }


def tune_and_merge(
    folder: Path, number: int, targets: Sequence[str], steps: int, held_out: int | None
) -> dict[str, float]:
    """Held-out bits per character of all networks of one seed.

    Args:
        folder: of the stores.
        number: the seed.
        targets: of ``TARGETS``, the parents of the merges among them.
        steps: of each tuning.
        held_out: texts to count on; None takes all.
    """
    from fusechat.store import TopKStore

    corpus, pivot = load_corpus(), load_tokenizer("pivot")
    stores = {name: TopKStore(folder / name) for name in ("pivot", "source1", "source2")}
    made = batches(corpus.tuning, stores, number, steps)
    models = {SFT: tuned(made["source1"], 0.0)}
    for name in targets:
        source, weight = TARGETS[name]
        models[name] = tuned(made[source], weight)
    models |= _merged([models[name] for name in PARENTS], load_model("pivot"))
    texts = corpus.held_out[:held_out]
    return {name: bits_per_character(model, pivot, texts) for name, model in models.items()}


@threads()
def demo(out: Path, *, full: bool = False, seed: int = 0) -> Demo:
    """Collect, fuse, merge, compare.

    Args:
        out: gets the pictures.
        full: five seeds instead of two, more steps, and all held-out texts.
        seed: the first.
    """
    mode = "full" if full else "quick"
    seeds = [seed + n for n in range(SEEDS[mode])]
    with tempfile.TemporaryDirectory() as folder, second_process() as start:
        require_extra("matplotlib", "demo", "fusechat")
        before = start(bits_before, HELD_OUT[mode])  # what the other process needs is loaded meanwhile
        corpus = load_corpus()
        _stores(corpus.tuning, Path(folder))

        def job(number: int) -> Any:
            chosen = [
                name for name in TARGETS if full or (name not in SLOW and (number == seed or name != CONTROL))
            ]
            return Path(folder), number, chosen, STEPS[mode], HELD_OUT[mode]

        # Tiny networks are mostly Python's work, which threads do not share: every other seed goes there.
        beside = {number: start(tune_and_merge, *job(number)) for number in seeds[1::2]}
        here = {number: tune_and_merge(*job(number)) for number in seeds[::2]}
        found = here | {number: wait() for number, wait in beside.items()}
        alone = before()
    table = Comparison({METRIC: {"better": "lower"}}, SFT, seeds, "Held-out bits per character")
    for number in seeds:
        for name, value in alone.items():
            label = "pivot before" if name == "pivot" else f"{name[:-1]} {name[-1]} (own tokenizer)"
            table.add(label, METRIC, number, value)
        for name, value in found[number].items():
            table.add(name, METRIC, number, value)
    figures = [_points(table, out / "bits.png"), _strip(corpus.held_out, out / "strip.png")]
    settings = {
        "steps": STEPS[mode],
        "lr": LR,
        "k": 10,
        "alignment": "span",
        "vocabulary map": "prefix",
        "unaligned": "onehot",
    }
    return Demo([table], _claims(table), figures, list(NOTES), settings, seeds)


def _mean(table: Comparison, method: str) -> float:
    return next(float(row["mean"]) for row in table.rows() if row["method"] == method)


def _claims(table: Comparison) -> list[Claim]:
    at = {method: _mean(table, method) for method in table.methods}
    paper, half = at["source 1, lambda 0.9 (paper)"], at["source 1, lambda 0.5"]
    parents = [at[name] for name in PARENTS]
    middle = sum(parents) / 2
    rules = {name: at[f"merge: {name}"] for name in ("linear", "VaRM", "SCE, tau 1")}
    gap = max(rules.values()) - min(rules.values())
    control = at[CONTROL]
    return [
        Claim(
            "Pairwise fusion of a source with another tokenizer beats fine-tuning alone",
            "section 4",
            half < at[SFT] and paper < at[SFT],
            f"Bits per character: fine-tuning {at[SFT]:.3f}, fused at lambda 0.9 {paper:.3f}, at 0.5 "
            f"{half:.3f}; distilling the "
            f"pivot into itself {control:.3f}, so the gain is the source's knowledge.",
        ),
        Claim(
            "Merging the targets keeps the best of both",
            "section 4",
            rules["linear"] < middle,
            f"The parents have {parents[0]:.3f} and {parents[1]:.3f}, their merge {rules['linear']:.3f}.",
        ),
        Claim(
            "VaRM and SCE merge better than plain averaging",
            "section 5",
            min(rules["VaRM"], rules["SCE, tau 1"]) < rules["linear"] - 0.005,
            f"linear {rules['linear']:.3f}, VaRM {rules['VaRM']:.3f}, SCE {rules['SCE, tau 1']:.3f}: they "
            f"differ by {gap:.3f}, "
            "less than the seeds do."
            if gap < 0.005
            else f"linear {rules['linear']:.3f}, VaRM {rules['VaRM']:.3f}, SCE {rules['SCE, tau 1']:.3f}.",
        ),
    ]


def _points(table: Comparison, path: Path) -> Figure:
    names = table.methods[::-1]
    figure = new_figure(7, 4.6, "fusechat", "demo")
    ax = figure.subplots()
    values = [_mean(table, name) for name in names]
    colors = [
        "#999999" if "own" in n or "before" in n else "#c44e52" if n == SFT else "#3b6ea5" for n in names
    ]
    ax.scatter(values, names, color=colors, zorder=2)  # points, as the axis does not begin at 0
    ax.grid(axis="y", linewidth=0.5)
    for place, value in enumerate(values):
        ax.text(value, place, f" {value:.3f}", va="bottom", fontsize=8)
    ax.set_xlim(left=min(values) * 0.95, right=max(values) * 1.05)
    ax.set_xlabel("held-out bits per character (lower is better)")
    save_figure(figure, path)
    return Figure(path, "Bits per character of every model", "Red: the pivot fine-tuned alone.")


def _strip(texts: Sequence[str], path: Path) -> Figure:
    """One text cut by two tokenizers; spans whose ends agree are joined."""
    from fusechat.align import span
    from fusechat.spans import encode
    from fusechat.texts import Text

    text = next(t for t in texts if len(t) > 90)[:72]
    whole = Text(text, (), whole=True)
    ends = [encode(load_tokenizer(name), whole).ends for name in ("source1", "pivot")]
    pairs = span(ends[1], ends[0])
    joined = {int(ends[1][i]) for i in pairs.pivot}
    figure = new_figure(11, 1.9, "fusechat", "demo")
    ax = figure.subplots()
    for row, marks in enumerate(ends):
        start = 0
        for number, stop in enumerate(sorted({int(e) for e in marks if 0 < e <= len(text)})):
            ax.barh(row, stop - start, left=start, height=0.7, color=("#d8e2ef", "#b9cbe3")[number % 2])
            ax.text(
                (start + stop) / 2,
                row,
                text[start:stop],
                ha="center",
                va="center",
                fontsize=8,
                family="monospace",
            )
            start = stop
    for end in joined:
        if 0 < end <= len(text):
            ax.plot([end, end], [0.35, 0.65], color="#2a7f3f", lw=1.2)
    ax.set_yticks([0, 1], ["source 1", "pivot"])
    ax.set_xticks([])
    ax.set_xlim(0, len(text))
    save_figure(figure, path)
    return Figure(
        path,
        f"The text {text!r} cut into tokens by two tokenizers",
        "Green: both end at the same character, so both predict what follows the same text.",
    )


method = Method(
    name="fusechat",
    package="fusechat",
    title="FuseChat: knowledge fusion across tokenizers",
    paper=PAPER,
    url="https://arxiv.org/abs/2408.07990",
    summary="A pivot learns aligned distributions of models with other tokenizers; the targets are merged.",
    demo=demo,
)

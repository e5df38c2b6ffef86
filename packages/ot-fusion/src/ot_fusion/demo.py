"""The demo: digits classifiers trained apart, fused with and without transport.

The verdict is what was measured.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusion_core.comparison import Comparison
from fusion_core.demo import Demo, Method
from fusion_core.device import threads
from fusion_core.errors import require_extra
from fusion_core.report import Claim, Figure
from ot_fusion.config import FusionConfig
from ot_fusion.digits import Digits, accuracy, load_digits, train_mlp, train_vit

PAPER = (
    "Moritz Imfeld, Jacopo Graldi, Marco Giordano, Thomas Hofmann, Sotiris Anagnostidis, Sidak Pal Singh: "
    "Transformer "
    "Fusion with Optimal Transport, ICLR 2024"
)
WIDTHS = (32, 128)
PAIRS = ((0, 1), (1, 2), (2, 0))
PLAIN = FusionConfig(transform="none", solver="emd", samples=200)
METHODS: dict[str, FusionConfig] = {
    "transport, activations, exact": PLAIN,
    "transport, weights, exact": PLAIN.replace(features="wts"),
    "transport, activations, Sinkhorn 0.05": PLAIN.replace(solver="sinkhorn", reg=0.05),
    "transport, weights, Sinkhorn 0.05": PLAIN.replace(features="wts", solver="sinkhorn", reg=0.05),
}
VANILLA = "plain average"
NOTES = (
    "A small-scale task, not CIFAR or ImageNet: scikit-learn's digits, networks trained here from three "
    "seeds. Nothing is "
    "downloaded.",
    "'Fused models beat both parents after finetuning' (the paper's second claim) is not tested by the "
    "quick mode; with "
    "--full the table of finetuned vision transformers shows what came out here.",
)


def average(first: nn.Module, second: nn.Module, alpha: float = 0.5) -> nn.Module:
    """The plain average of two models' weights; alpha is the weight of the second."""
    model = copy.deepcopy(second)
    own = first.state_dict()
    model.load_state_dict({k: torch.lerp(own[k], v, alpha) for k, v in second.state_dict().items()})
    return model


def _mlps(data: Digits, seed: int, table: Comparison) -> dict[int, list[nn.Sequential]]:
    from ot_fusion.fusing import fuse

    found: dict[int, list[nn.Sequential]] = {}
    for width in WIDTHS:
        metric = f"accuracy_width_{width}"
        nets = found[width] = [train_mlp(data, width, seed + number) for number in range(3)]
        for number, (i, j) in enumerate(PAIRS):
            pair = [nets[i], nets[j]]

            def add(name: str, value: float, number: int = number, metric: str = metric) -> None:
                table.add(name, metric, seed + number, value)

            add("the anchor alone", accuracy(pair[1], data.test, data.test_labels))
            with torch.no_grad():
                both = sum((net(data.test).softmax(1) for net in pair), torch.zeros(()))
            add("ensemble (two networks)", float((both.argmax(1) == data.test_labels).float().mean()))
            add(VANILLA, accuracy(average(pair[0], pair[1]), data.test, data.test_labels))
            for name, config in METHODS.items():
                model: Any = fuse(pair, data=data.train, config=config).model
                add(name, accuracy(model, data.test, data.test_labels))
    return found


def _duplicated(net: nn.Sequential, times: int, draws: torch.Generator) -> nn.Sequential:
    """A network that computes the same with every hidden neuron copied and shuffled."""
    first_layer: Any = net[0]
    width = int(first_layer.weight.shape[0])
    order = [torch.randperm(width * times, generator=draws) for _ in range(2)]
    wide = nn.Sequential(
        nn.Linear(64, width * times),
        nn.ReLU(),
        nn.Linear(width * times, width * times),
        nn.ReLU(),
        nn.Linear(width * times, 10),
    )
    first, second = (torch.arange(width).repeat_interleave(times)[o] for o in order)
    state = net.state_dict()
    wide.load_state_dict(
        {
            "0.weight": state["0.weight"][first],
            "0.bias": state["0.bias"][first],
            "2.weight": state["2.weight"][second][:, first] / times,
            "2.bias": state["2.bias"][second],
            "4.weight": state["4.weight"][:, second] / times,
            "4.bias": state["4.bias"],
        }
    )
    return wide


def _widths(data: Digits, seed: int, small: nn.Sequential) -> tuple[Comparison, Comparison, dict[str, float]]:
    """Duplicates fused back, and a wide network fused into a narrow one."""
    from ot_fusion.fusing import fuse
    from ot_fusion.metrics import check_equivalence

    back = Comparison({"logit_difference": {"better": "lower"}}, "paper maps", [seed])
    wide = _duplicated(small, 2, torch.Generator().manual_seed(seed))
    gaps: dict[str, float] = {}
    for rule in ("exact", "paper", "official"):
        config = PLAIN.replace(features="wts", alpha=0.0, normalization=rule, row_norm=False)
        model: Any = fuse([wide, small], config=config).model
        gaps[rule] = check_equivalence(small, model, data.test).max_abs
        back.add(f"{rule} maps", "logit_difference", seed, gaps[rule])
    big = train_mlp(data, 256, seed + 10)
    metrics: dict[str, Any] = {
        f"accuracy_alpha_{alpha}": {"better": "higher", "percent": True} for alpha in (0.0, 0.5, 0.7)
    }
    into = Comparison(metrics, "paper maps", [seed])
    for rule in ("exact", "paper", "official"):
        for alpha in (0.0, 0.5, 0.7):
            config = PLAIN.replace(alpha=alpha, normalization=rule)
            model = fuse([big, small], data=data.train, config=config).model
            into.add(
                f"{rule} maps", f"accuracy_alpha_{alpha}", seed, accuracy(model, data.test, data.test_labels)
            )
    return back, into, gaps


def _vits(data: Digits, seed: int) -> tuple[Comparison, Comparison]:
    """Tiny vision transformers: one-shot, and after a short finetuning."""
    from ot_fusion.fusing import align, fuse
    from ot_fusion.spec import infer_spec

    nets = [train_vit(data, seed + number) for number in range(3)]
    spec = infer_spec(nets[0], data.train[:2])
    base = FusionConfig(samples=200, last_block_tokens="same")
    configs = {
        "acts, Sinkhorn 0.08, mean": base,
        "acts, Sinkhorn 0.2, mean": base.replace(reg=0.2),
        "acts, exact, mean": base.replace(solver="emd"),
        "wts, Sinkhorn 0.06, mean": base.replace(features="wts"),
        "wts, exact, mean": base.replace(features="wts", solver="emd"),
        "one hard plan per space": base.replace(strategy="consistent", solver="lsa", legal="enforce"),
    }
    seeds = [seed + number for number in range(3)]
    shot = Comparison({"accuracy": {"better": "higher", "percent": True}}, VANILLA, seeds)
    tuned = Comparison(
        {"accuracy_after_12_epochs": {"better": "higher", "percent": True}}, f"from the {VANILLA}", seeds[:2]
    )
    for number, (i, j) in enumerate(PAIRS):
        pair = [nets[i], nets[j]]

        def score(model: Any) -> float:
            return accuracy(model, data.test, data.test_labels)

        starts: dict[str, Any] = {VANILLA: average(pair[0], pair[1])}
        starts |= {
            name: fuse(pair, data=data.train, config=config, spec=spec).model
            for name, config in configs.items()
        }
        shot.add("the anchor alone", "accuracy", seeds[number], score(pair[1]))
        aligned = align(pair[0], pair[1], data=data.train, spec=spec)
        shot.add("the source, aligned, not mixed", "accuracy", seeds[number], score(aligned.model))
        for name, model in starts.items():
            shot.add(name, "accuracy", seeds[number], score(model))
        if number == 2:
            continue
        chosen = {
            f"from the {VANILLA}": starts[VANILLA],
            "from acts, Sinkhorn 0.2": starts["acts, Sinkhorn 0.2, mean"],
            "from wts, Sinkhorn 0.06": starts["wts, Sinkhorn 0.06, mean"],
            "the anchor, trained on": copy.deepcopy(pair[1]),
        }
        for name, model in chosen.items():
            after = train_vit(data, seed + 20, epochs=12, lr=2e-3, model=model)
            tuned.add(name, "accuracy_after_12_epochs", seeds[number], score(after))
        scratch = train_vit(data, seed + 30, epochs=12, lr=2e-3)
        tuned.add("from scratch", "accuracy_after_12_epochs", seeds[number], score(scratch))
    return shot, tuned


def _mean(table: Comparison, method: str, metric: str) -> float:
    return next(
        float(row["mean"]) for row in table.rows() if row["method"] == method and row["metric"] == metric
    )


def _claims(table: Comparison, gaps: Mapping[str, float]) -> list[Claim]:
    def at(name: str, width: int) -> float:
        return 100 * _mean(table, name, f"accuracy_width_{width}")

    exact, soft = "transport, activations, exact", "transport, activations, Sinkhorn 0.05"
    lost = at("the anchor alone", 32) - at(VANILLA, 32)
    kept = at("the anchor alone", 32) - at(exact, 32)
    return [
        Claim(
            "Averaging networks trained apart destroys them; transported fusion keeps most of the accuracy",
            "abstract",
            lost > 3 * max(kept, 1.0),
            f"Width 32: anchor {at('the anchor alone', 32):.1f} %, plain average {at(VANILLA, 32):.1f} %, "
            "transport "
            f"{at(exact, 32):.1f} %; width 128: {at('the anchor alone', 128):.1f}, {at(VANILLA, 128):.1f}, "
            f"{at(exact, 128):.1f} %.",
        ),
        Claim(
            "Soft maps (Sinkhorn) fuse better than hard ones",
            "section 5",
            at(soft, 32) > at(exact, 32),
            f"Width 32: soft {at(soft, 32):.1f} %, hard {at(exact, 32):.1f} %. The paper says so of vision "
            "transformers; for "
            "these perceptrons "
            + ("it holds too." if at(soft, 32) > at(exact, 32) else "the opposite holds."),
        ),
        Claim(
            "One fused network reaches the ensemble of both",
            "section 5",
            at(exact, 128) >= at("ensemble (two networks)", 128),
            f"Width 128: fused {at(exact, 128):.1f} %, ensemble {at('ensemble (two networks)', 128):.1f} %.",
        ),
        Claim(
            "A network whose neurons were duplicated is fused back without loss (exact maps, ours)",
            "",
            gaps["exact"] < 1e-4,
            f"Largest logit difference: exact maps {gaps['exact']:.2g}, the paper's {gaps['paper']:.2g}, the "
            "authors' code "
            f"{gaps['official']:.2g}.",
        ),
    ]


def _vit_claims(shot: Comparison, tuned: Comparison) -> list[Claim]:
    def once(name: str) -> float:
        return 100 * _mean(shot, name, "accuracy")

    def after(name: str) -> float:
        return 100 * _mean(tuned, name, "accuracy_after_12_epochs")

    best = max(
        once("acts, Sinkhorn 0.08, mean"), once("acts, Sinkhorn 0.2, mean"), once("wts, Sinkhorn 0.06, mean")
    )
    hard = max(once("acts, exact, mean"), once("wts, exact, mean"))
    start = max(after("from acts, Sinkhorn 0.2"), after("from wts, Sinkhorn 0.06"))
    return [
        Claim(
            "Vision transformers: soft transport beats hard transport beats averaging",
            "section 5",
            best > hard > once(VANILLA),
            f"One-shot: soft {best:.1f} %, hard {hard:.1f} %, average {once(VANILLA):.1f} %; the anchor has "
            f"{once('the anchor alone'):.1f} %.",
        ),
        Claim(
            "Vision transformers: a fused start recovers more than an averaged one in the same budget",
            "section 5",
            start > after(f"from the {VANILLA}"),
            f"After 12 epochs: {start:.1f} % against {after(f'from the {VANILLA}'):.1f} %.",
        ),
        Claim(
            "Vision transformers: a fused start passes the parents after finetuning",
            "section 5",
            start > after("the anchor, trained on"),
            f"After 12 epochs: {start:.1f} %; the anchor trained as long "
            f"{after('the anchor, trained on'):.1f} %.",
        ),
    ]


def _figures(data: Digits, nets: list[nn.Sequential], out: Path) -> list[Figure]:
    from ot_fusion.figures import barrier_figure, cost_figure, map_figure
    from ot_fusion.fusing import align, fuse
    from ot_fusion.metrics import interpolate

    def score(model: nn.Module) -> float:
        return 100 * accuracy(model, data.test, data.test_labels)

    aligned: Any = align(nets[0], nets[1], data=data.train, config=PLAIN.replace(strategy="consistent")).model
    curves = {
        "as they are": interpolate(nets[0], nets[1]).evaluate(score),
        "source aligned": interpolate(aligned, nets[1]).evaluate(score),
    }
    fused = fuse([nets[0], nets[1]], data=data.train, config=PLAIN)
    soft = fuse([nets[0], nets[1]], data=data.train, config=METHODS["transport, activations, Sinkhorn 0.05"])
    maps = {
        "first layer, exact": fused.maps["0"],
        "second layer, exact": fused.maps["2"],
        "second layer, Sinkhorn": soft.maps["2"],
    }
    return [
        barrier_figure(curves, out / "barrier.png", "test accuracy %"),
        map_figure(maps, out / "maps.png"),
        cost_figure(fused.report.flat_rows(), out / "costs.png"),
    ]


@threads()
def demo(out: Path, *, full: bool = False, seed: int = 0) -> Demo:
    """Train, fuse, compare.

    Args:
        out: gets the pictures.
        full: add the tiny vision transformers.
        seed: first of three.
    """
    require_extra("matplotlib", "demo", "ot-fusion")
    data = load_digits()
    seeds = [seed, seed + 1, seed + 2]
    metrics: dict[str, Any] = {
        f"accuracy_width_{width}": {"better": "higher", "percent": True} for width in WIDTHS
    }
    table = Comparison(metrics, VANILLA, seeds)
    nets = _mlps(data, seed, table)
    back, into, gaps = _widths(data, seed, nets[32][0])
    back.title, into.title = (
        "A network with duplicated neurons, fused back (alpha 0)",
        "256 neurons into 32, by weight of the anchor",
    )
    table.title = "Perceptrons on digits, one-shot, alpha 0.5"
    tables, claims = [table, back, into], _claims(table, gaps)
    if full:
        shot, tuned = _vits(data, seed)
        shot.title, tuned.title = "Tiny vision transformers, one-shot", "Tiny vision transformers, finetuned"
        tables += [shot, tuned]
        claims += _vit_claims(shot, tuned)
    settings = {name: config.to_dict() for name, config in METHODS.items()}
    return Demo(
        tables,
        claims,
        _figures(data, nets[32], out),
        list(NOTES),
        {"methods": settings, "widths": WIDTHS},
        seeds,
    )


method = Method(
    name="ot-fusion",
    package="ot-fusion",
    title="Transformer fusion by optimal transport",
    paper=PAPER,
    url="https://arxiv.org/abs/2310.05719",
    summary="Networks trained apart are aligned neuron by neuron by optimal transport and averaged into one.",
    demo=demo,
)

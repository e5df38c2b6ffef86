"""The demo: a tiny large model is steered by tiny experts; the verdict is what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_core.comparison import Comparison
from fusion_core.demo import Demo, Method
from fusion_core.device import threads
from fusion_core.errors import require_extra
from fusion_core.report import Claim
from logit_fusion.calibrate import compare
from logit_fusion.config import FusionConfig
from logit_fusion.corpus import DOMAINS, load_tokenizer, load_windows
from logit_fusion.figures import alpha_histogram, alpha_text, loss_bars
from logit_fusion.score import Encoded, Scores
from logit_fusion.tiny import load_model

PAPER = (
    "Chenghao Fan, Zhenyi Lu, Wei Wei, Jie Tian, Xiaoye Qu, Dangyang Chen, Yu Cheng: On Giant's Shoulders: "
    "Effortless Weak to Strong by Dynamic Logits Fusion, NeurIPS 2024"
)
TOKENS, SEEN = 97, 33
GROUPS = 3
STATIC = (0.5, 1.0, 1.5)
PROXY = "static 1 (proxy-tuning)"
BOTH = ("docs", "qa")  # the experts of the second table
OTHERS = (*BOTH, "web", "general")
COLORS = {"dynamic": "#c44e52", "pool, evidence": "#c44e52", PROXY: "#3b6ea5", "single (paper)": "#3b6ea5"}
NOTES = (
    "A small-scale task, not a 13B model: Llamas of 0.13 and 0.67 million parameters, trained on Python's "
    "standard "
    "library, ship with the package. Nothing is downloaded.",
    "docs: the language reference; web: source of email, http, urllib, html, xml; qa: sums in words. No "
    "model has "
    "seen the held-out windows.",
    "Both gap measures take the expert as the target: the papers' 'gap closed' is a ratio of scores, here "
    "of top-1 "
    "shares; the other is (large - method) / (large - expert) of the loss.",
)

Models = Mapping[str, Any]


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [list(tokenizer(text)["input_ids"])[:TOKENS] for text in texts]


def _name(alpha: float) -> str:
    return PROXY if alpha == 1.0 else f"static {alpha:g}"


def _values(scores: Scores, groups: int) -> tuple[list[float], list[float]]:
    """Loss per token and top-1 share, group of windows by group of windows."""
    parts = [scores.text % groups == group for group in range(groups)]
    return (
        [float(-scores.log_probs[part].mean()) for part in parts],
        [float(scores.hit[part].mean()) for part in parts],
    )


def _fused(models: Models, names: Sequence[str]) -> Any:
    from logit_fusion.model import FusedModel

    return FusedModel(models["large"], models["small"], {name: models[name] for name in names})


def single_task(
    models: Models, tokenizer: Any, windows: Mapping[str, Sequence[str]], groups: int
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """One expert on its own domain: domain -> method -> losses and top-1 shares of the groups."""
    methods = {_name(alpha): FusionConfig(alpha=alpha) for alpha in STATIC}
    methods |= {"dynamic, grid (paper)": FusionConfig(strategy="single", solver="grid")}
    methods |= {"dynamic": FusionConfig(strategy="single")}
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for domain in DOMAINS:
        rows = [Encoded(ids[:1], ids[1:]) for ids in _ids(tokenizer, windows[domain])]
        scores, _ = compare(_fused(models, [domain]), rows, methods, batch_size=16, progress=False)
        named = {"base": "small base", domain: "expert"}
        found[domain] = {named.get(name, name): _values(entry, groups) for name, entry in scores.items()}
    return found


def multi_task(
    models: Models, tokenizer: Any, windows: Mapping[str, Sequence[str]], groups: int
) -> dict[str, dict[str, list[float]]]:
    """Two experts on four texts, two of which no expert knows: text -> method -> losses of the groups.

    The first 32 tokens of a window are read, the rest is scored.
    """
    methods = {
        "single (paper)": FusionConfig(strategy="single"),
        "pool, uniform": FusionConfig(strategy="pool"),
        "pool, evidence": FusionConfig(strategy="pool", weights="evidence"),
    }
    for name in BOTH:
        methods[name] = FusionConfig(weights=tuple(float(name == other) for other in BOTH))
    fused = _fused(models, BOTH)
    found: dict[str, dict[str, list[float]]] = {}
    for text in OTHERS:
        rows = [Encoded(ids[:SEEN], ids[SEEN:]) for ids in _ids(tokenizer, windows[text])]
        asked = {f"oracle {name}" if name in BOTH else name: config for name, config in methods.items()}
        scores, _ = compare(fused, rows, asked, batch_size=16, progress=False)
        losses = {name: _values(entry, groups)[0] for name, entry in scores.items()}
        # Where no expert knows the text, who knows best leaves the large model alone.
        oracle = losses[f"oracle {text}"] if text in BOTH else losses["large"]
        kept = ("large", "single (paper)", "pool, uniform", "pool, evidence")
        found[text] = {name: losses[name] for name in kept} | {"oracle (knows the expert)": oracle}
    return found


@torch.no_grad()
def _alphas(models: Models, tokenizer: Any, windows: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for domain in DOMAINS:
        ids = _ids(tokenizer, windows[domain])
        shortest = min(map(len, ids))
        step = _fused(models, [domain])(torch.tensor([row[:shortest] for row in ids]), use_cache=False).step
        found[domain] = step.alpha[..., 0].flatten().tolist()
    return found


@torch.no_grad()
def _paragraph(models: Models, tokenizer: Any, text: str) -> tuple[list[str], list[float]]:
    ids = list(tokenizer(text)["input_ids"])
    step = _fused(models, ["docs"])(torch.tensor([ids]), use_cache=False).step
    words = [tokenizer.decode([i]) for i in ids[1:]]
    return words, step.alpha[0, :-1, 0].tolist()


def demo(out: Path, *, full: bool = False, seed: int = 0) -> Demo:
    """Steer, score, compare.

    Args:
        out: gets the pictures and ``trace.html``.
        full: train the models anew, twice, with seeds ``seed`` and ``seed + 1``.
        seed: of the training; the quick mode trains nothing, its seeds number groups of held-out windows.
    """
    require_extra("matplotlib", "demo", "logit-fusion")
    with threads():
        return _demo(out, full, seed)


def _demo(out: Path, full: bool, seed: int) -> Demo:
    single: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    multi: dict[str, dict[str, list[float]]] = {}
    models: Models = {}
    if full:
        from logit_fusion.train_checkpoints import train

        seeds = [seed, seed + 1]
        tokenizer, windows = None, {}
        for number in seeds:
            models, tokenizer, windows = train(number)
            _extend(single, single_task(models, tokenizer, windows, 1))
            _extend(multi, multi_task(models, tokenizer, windows, 1))
    else:
        seeds = list(range(GROUPS))
        models = {name: load_model(name) for name in ("large", "small", *DOMAINS)}
        tokenizer, windows = load_tokenizer(), load_windows()
        single = single_task(models, tokenizer, windows, GROUPS)
        multi = multi_task(models, tokenizer, windows, GROUPS)
    tables = _tables(single, multi, seeds)
    panels = {f"{d}: one expert": {m: _spread(v[0]) for m, v in single[d].items()} for d in DOMAINS}
    several = {f"{t}: experts for docs, qa": {m: _spread(v) for m, v in multi[t].items()} for t in OTHERS}
    words, strengths = _paragraph(
        models, tokenizer, next(filter(str.isascii, windows["docs"]), windows["docs"][0])
    )
    figures = [
        loss_bars(panels, out / "one_expert.png", COLORS),
        loss_bars(several, out / "two_experts.png", COLORS),
        alpha_histogram(_alphas(models, tokenizer, windows), out / "alpha.png"),
        alpha_text(words, strengths, out / "paragraph.png"),
    ]
    _trace(models, tokenizer, windows["docs"][1][:120], out / "trace.html")
    kind = "two trainings" if full else f"{GROUPS} groups of held-out windows, one training"
    notes = [*NOTES, f"Means and spreads are over {kind}. trace.html shows a generated text."]
    settings = {
        "windows": {name: len(texts) for name, texts in windows.items()},
        "tokens": TOKENS,
        "alpha_range": [0.0, 2.0],
        "step": 0.1,
        "evidence_decay": FusionConfig().evidence_decay,
    }
    return Demo(tables, _claims(single, multi), figures, notes, settings, seeds)


def _extend(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Append one training's values to those of the former ones."""
    for text, methods in part.items():
        known = whole.setdefault(text, {})
        for name, values in methods.items():
            if isinstance(values, tuple):
                losses, hits = known.get(name, ([], []))
                known[name] = (losses + values[0], hits + values[1])
            else:
                known[name] = known.get(name, []) + values


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _tables(single: Any, multi: Any, seeds: list[int]) -> list[Comparison]:
    lower: Any = {domain: {"better": "lower"} for domain in DOMAINS}
    losses = Comparison(lower, PROXY, seeds, "One expert: loss in nats per token on its domain, held out")
    higher: Any = {domain: {"better": "higher", "percent": True} for domain in DOMAINS}
    hits = Comparison(higher, PROXY, seeds, "One expert: top-1 share")
    both: Any = {
        f"{domain}_{name}": {"better": "higher", "percent": True}
        for domain in ("docs", "qa")
        for name in ("ratio_of_scores", "gap_closed")
    }
    gaps = Comparison(both, PROXY, seeds, "Two measures of the gap between the large model and the expert")
    for domain, methods in single.items():
        large, expert = methods["large"], methods["expert"]
        for name, (loss, hit) in methods.items():
            for i, number in enumerate(seeds):
                losses.add(name, domain, number, loss[i])
                hits.add(name, domain, number, hit[i])
                if domain in ("docs", "qa") and name.startswith(("static", "dynamic")):
                    gaps.add(name, f"{domain}_ratio_of_scores", number, hit[i] / expert[1][i])
                    share = (large[0][i] - loss[i]) / (large[0][i] - expert[0][i])
                    gaps.add(name, f"{domain}_gap_closed", number, share)
    lower = {text: {"better": "lower"} for text in OTHERS}
    title = "Experts for docs and qa: loss after 32 tokens; no expert knows web and general"
    several = Comparison(lower, "large", seeds, title)
    for text, methods in multi.items():
        for name, values in methods.items():
            for number, value in zip(seeds, values, strict=True):
                several.add(name, text, number, value)
    return [losses, hits, gaps, several]


def _claims(single: Any, multi: Any) -> list[Claim]:
    at = {domain: {m: float(np.mean(v[0])) for m, v in single[domain].items()} for domain in DOMAINS}
    mean = {text: {m: float(np.mean(v)) for m, v in multi[text].items()} for text in OTHERS}

    def against(name: str) -> tuple[bool, str]:
        words = [f"{d} {at[d]['dynamic']:.3f} / {at[d][name]:.3f}" for d in DOMAINS]
        return all(at[d]["dynamic"] < at[d][name] for d in DOMAINS), ", ".join(words)

    best = {d: min((_name(a) for a in STATIC), key=lambda name, d=d: at[d][name]) for d in DOMAINS}
    versus_best = ", ".join(f"{d} {at[d]['dynamic']:.3f} / {at[d][best[d]]:.3f} ({best[d]})" for d in DOMAINS)
    found: list[Claim] = []
    for text, name in (
        ("Dynamic fusion beats static alpha = 1", PROXY),
        ("Dynamic fusion beats the large model", "large"),
        ("Dynamic fusion beats the small expert", "expert"),
    ):
        shown, words = against(name)
        found.append(Claim(text, "section 4, table 1", shown, f"Loss, dynamic / {name}: {words}."))
    found.append(
        Claim(
            "Dynamic fusion beats every static alpha of 0.5, 1 and 1.5",
            "section 5, ablation",
            all(at[d]["dynamic"] < at[d][best[d]] for d in DOMAINS),
            f"Loss, dynamic / best static strength, which a user would have to find: {versus_best}.",
        )
    )
    paper = ", ".join(f"{t} {mean[t]['single (paper)']:.3f} / {mean[t]['large']:.3f}" for t in OTHERS)
    found.append(
        Claim(
            "Several experts, one active per step, help where one fits and do no harm elsewhere",
            "section 4, table 2",
            all(mean[t]["single (paper)"] < mean[t]["large"] + 0.01 for t in OTHERS),
            f"Loss, one active expert / large model: {paper}.",
        )
    )
    oracle = "oracle (knows the expert)"
    pool = ", ".join(f"{t} {mean[t]['pool, evidence']:.3f} / {mean[t][oracle]:.3f}" for t in OTHERS)
    found.append(
        Claim(
            "Pooling by evidence comes within 0.02 nats of who knows the right expert",
            "this package's own rule",
            all(mean[t]["pool, evidence"] < mean[t][oracle] + 0.02 for t in OTHERS),
            f"Loss, pool by evidence / oracle: {pool}.",
        )
    )
    return found


def _trace(models: Models, tokenizer: Any, prompt: str, path: Path) -> None:
    from logit_fusion.model import FusedModel

    experts = {name: models[name] for name in DOMAINS}
    fused = FusedModel(models["large"], models["small"], experts, weights="evidence", tokenizer=tokenizer)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = fused.generate(ids, max_new_tokens=80, do_sample=False, repetition_penalty=1.2, trace=True)
    out.trace.to_html(path, "A text continued with three experts, pooled by evidence")


method = Method(
    name="logit-fusion",
    package="logit-fusion",
    title="On Giant's Shoulders: dynamic logits fusion",
    paper=PAPER,
    url="https://arxiv.org/abs/2406.15480",
    summary="Small experts steer a large language model while it decodes, as strongly as each token allows.",
    demo=demo,
)

"""Scoring saved adversarial sets: against models, against each other, and surrogate by surrogate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from adaea.advset import AdversarialSet
from adaea.metrics import Perturbation, Scores, paired_counts, perturbation, score, strict_asr
from adaea.models import load_models
from adaea.wrappers import half_precision, predict
from fusion_core.batching import map_batches
from fusion_core.device import resolve_device
from fusion_core.errors import DataError, InputError
from fusion_core.modules import untouched
from fusion_core.report import Report
from fusion_core.stats import mcnemar

Pixels = Literal["exact", "uint8"]
Callables = Callable[[Tensor], Any]
Models = str | Callables | Mapping[str, "str | Callables"] | Sequence[str]


def name_models(models: Models, name: str = "my_model") -> dict[str, Callables]:
    """Models by name, loaded where they are words.

    Args:
        models: a module or callable (called ``name``), a name of :func:`~adaea.models.load_model` or several
            separated by commas, a sequence of names, or a mapping from names to any of these.
        name: of a single module.

    Raises:
        InputError: none, or something that is no model.
    """
    if isinstance(models, str):
        return cast("dict[str, Callables]", load_models(models))
    if isinstance(models, Mapping):
        named = cast("Mapping[str, Any]", models)
        found = {
            key: next(iter(load_models([m]).values())) if isinstance(m, str) else m
            for key, m in named.items()
        }
    elif isinstance(models, nn.Module) or callable(models):
        found = {name: models}
    else:
        return cast("dict[str, Callables]", load_models(list(models)))
    wrong = [f"{key}: {type(model).__name__}" for key, model in found.items() if not callable(model)]
    if wrong or not found:
        raise InputError(
            f"models is {wrong or 'empty'}, wanted modules, callables or names such as timm:resnet18"
        )
    return cast("dict[str, Callables]", found)


def predictions(
    model: Callables,
    images: Tensor,
    *,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: bool | None = None,
) -> Tensor:
    """The classes a model names for many images, int64 ``(images,)`` on the CPU; the model stays as it was.

    Args:
        model: a module or any callable, see :func:`~adaea.wrappers.predict`.
        images: ``(images, channels, height, width)`` in [0, 1].
        batch_size: images per forward, halved by itself where memory runs out.
        device: where the model runs.
        dtype: of its forward; ``"auto"`` is float32, half dtypes go through autocast.
        progress: show a bar.

    Raises:
        InputError: the model returns neither logits nor labels.
    """
    where = resolve_device(device)

    def run(part: Tensor) -> Tensor:
        with half_precision(where, dtype):
            return predict(model, part.to(where))

    if not isinstance(model, nn.Module):
        return torch.cat(list(map_batches(run, images, batch_size, progress=progress)))
    home = next((p.device for p in model.parameters()), where)
    try:
        model.to(where)
        with untouched(model):
            return torch.cat(list(map_batches(run, images, batch_size, progress=progress)))
    finally:
        model.to(home)


def score_row(
    attack: str, eps: float, model: str, kind: str, pixels: str, scores: Scores, change: Perturbation
) -> dict[str, Any]:
    """One line of the table of an audit, flat; every rate in [0, 1]."""
    row: dict[str, Any] = {"attack": attack, "eps": eps, "model": model, "kind": kind, "pixels": pixels}
    row["images"] = scores.images
    for name in ("clean", "adversarial", "strict", "official", "fooling", "targeted"):
        interval = getattr(scores, name)
        label = f"{name}_accuracy" if name in ("clean", "adversarial") else name
        for key, end in ((label, "value"), (f"{label}_low", "low"), (f"{label}_high", "high")):
            row[key] = None if interval is None else getattr(interval, end)
    return {**row, "linf": change.linf, "l2": change.l2, "psnr": change.psnr, "ssim": change.ssim}


class ScoreReport(Report):
    """Rates of saved sets against models; rows as :func:`score_row` makes them."""

    def shown_rows(self) -> list[dict[str, Any]]:
        """One line per model and kind of pixels, rates in percent with their intervals."""
        from adaea.auditreport import printed_row

        return [{k: v for k, v in printed_row(row).items() if k != "kind"} for row in self.rows]


def evaluate(
    adversarial: AdversarialSet | str,
    models: Models,
    *,
    clean: Tensor | None = None,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    progress: bool | None = None,
) -> Report:
    """Score a saved adversarial set against models, exactly and after rounding to uint8.

    Args:
        adversarial: the set, or its path; its clean images tell which images were right before.
        models: modules, callables, names, or a mapping of them.
        clean: images of the data that the set was made from, where it does not hold its own; ``index`` of the
            set says which.
        batch_size: images per forward.
        device: where the models run.
        progress: show bars.

    Returns:
        A report with one row per model and kind of pixels: accuracies, the three success rates with 95 %
        intervals, targeted success, mean linf, l2, PSNR and SSIM.

    Raises:
        DataError: the set has no clean images.
        InputError: no models.

    Example:
        >>> x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> made = AdversarialSet(x, torch.zeros(4, dtype=torch.long), clean=x, info={"eps": 0.0})
        >>> evaluate(made, "zoo:vit16").rows[0]["pixels"]
        'exact'
    """
    found = AdversarialSet.load(adversarial) if isinstance(adversarial, str) else adversarial
    if found.clean is None and clean is not None:
        found = with_clean(found, clean)
    if found.clean is None:
        raise DataError("the set has no clean images, so which were right before is not known; give its data")
    named = name_models(models)
    name, eps = str(found.info.get("attack", "attack")), float(found.info.get("eps", float("nan")))
    versions: dict[Pixels, AdversarialSet] = {"exact": found}
    if "eps" in found.info:
        versions["uint8"] = found.rounded()
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress}
    for model_name, model in named.items():
        before = predictions(model, found.clean, **options)
        for pixels, version in versions.items():
            after = predictions(model, version.adversarial, **options)
            change = perturbation(found.clean, version.adversarial)
            scores = score(found.labels, before, after, found.targets)
            rows.append(score_row(name, eps, model_name, "target", pixels, scores, change))
    return ScoreReport(title=f"{name} against {', '.join(named)}", rows=rows)


def with_clean(found: AdversarialSet, clean: Tensor) -> AdversarialSet:
    """The set with the clean images of its rows, taken from the data it was made from.

    Raises:
        DataError: the data has too few rows.
    """
    index = torch.arange(len(found)) if found.index is None else found.index
    if len(index) and int(index.max()) >= len(clean):
        raise DataError(f"the set holds row {int(index.max())}, but the data has {len(clean)} images only")
    return replace(found, clean=clean[index].to(found.adversarial.dtype))


def compare(
    first: AdversarialSet | str,
    second: AdversarialSet | str,
    models: Models,
    *,
    batch_size: int = 32,
    device: str | torch.device = "auto",
) -> Report:
    """Two saved sets on the same images: strict success of each, and McNemar's exact test between them.

    Args:
        first: a set, or its path.
        second: another of the same images.
        models: modules, callables, names, or a mapping of them.
        batch_size: images per forward.
        device: where the models run.

    Returns:
        A report with one row per model: both rates with intervals, successes of one set alone, p.

    Raises:
        DataError: no clean images, no image in common, or labels or clean images that differ.

    Example:
        >>> x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> made = AdversarialSet(x, torch.zeros(4, dtype=torch.long), clean=x)
        >>> compare(made, made, "zoo:vit16").rows[0]["p"]
        1.0
    """
    a, b = (AdversarialSet.load(one) if isinstance(one, str) else one for one in (first, second))
    rows_a, rows_b = _common(a, b)
    assert a.clean is not None
    clean, labels = a.clean[rows_a], a.labels[rows_a]
    names = [str(one.info.get("attack", word)) for one, word in ((a, "first"), (b, "second"))]
    if names[0] == names[1]:
        names = [f"{names[0]} (first)", f"{names[1]} (second)"]
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"batch_size": batch_size, "device": device}
    for model_name, model in name_models(models).items():
        before, after_a, after_b = (
            predictions(model, images, **options)
            for images in (clean, a.adversarial[rows_a], b.adversarial[rows_b])
        )
        only_a, only_b = paired_counts(labels, before, after_a, after_b)
        rate_a, rate_b = (strict_asr(labels, before, after) for after in (after_a, after_b))
        rows.append(
            {
                "model": model_name,
                "images": len(labels),
                f"strict, {names[0]}": rate_a.value,
                "low a": rate_a.low,
                "high a": rate_a.high,
                f"strict, {names[1]}": rate_b.value,
                "low b": rate_b.low,
                "high b": rate_b.high,
                f"only {names[0]}": only_a,
                f"only {names[1]}": only_b,
                "p": mcnemar(only_a, only_b),
            }
        )
    return Report(title=f"{names[0]} against {names[1]}, the same images", rows=rows)


def _common(a: AdversarialSet, b: AdversarialSet) -> tuple[Tensor, Tensor]:
    """The places in both sets of the images that both hold."""
    if a.clean is None:
        raise DataError("the first set has no clean images, so which images were right before is not known")
    index_a, index_b = (torch.arange(len(s)) if s.index is None else s.index for s in (a, b))
    places = {int(row): i for i, row in enumerate(index_b)}
    pairs = [(i, places[int(row)]) for i, row in enumerate(index_a) if int(row) in places]
    if not pairs:
        raise DataError("the sets have no image in common, wanted two sets of the same data")
    rows_a, rows_b = torch.tensor(pairs).unbind(1)
    if not bool((a.labels[rows_a] == b.labels[rows_b]).all()):
        raise DataError(
            "the sets have different labels for the same images, wanted two sets of the same data"
        )
    same = b.clean is None or (
        a.clean.shape[1:] == b.clean.shape[1:] and torch.allclose(a.clean[rows_a], b.clean[rows_b], atol=1e-6)
    )
    if not same:
        raise DataError("the sets have different clean images, wanted two sets of the same data")
    return rows_a, rows_b


def importance(
    model: Models,
    *,
    surrogates: Models,
    data: Any,
    attack: Any = None,
    eps: float = 8 / 255,
    seed: int = 0,
    batch_size: int = 32,
    limit: int | None = None,
    size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    name: str = "my_model",
    progress: bool | None = None,
) -> Report:
    """Which public model endangers yours most? The attack again with each surrogate left out in turn.

    Args:
        model: the classifier under audit, see :func:`adaea.audit`.
        surrogates: at least two, by name.
        data: images and labels, see :func:`adaea.images.load_data`.
        attack: ``AdaEA()`` by default.
        eps: budget, in units of [0, 1].
        seed: of every draw; the same draws with and without a surrogate.
        batch_size: images attacked together.
        limit: use the first n images.
        size: resize image files to squares of so many pixels.
        device: where attack and models run.
        dtype: of the forwards; ``"auto"`` is float32, half dtypes go through autocast.
        name: of a single audited model.
        progress: show bars.

    Returns:
        A report with a row per model and surrogate left out ("none" first, then by how much it mattered):
        strict rate with its interval, its fall, images won only with and only without it, and McNemar's p.

    Raises:
        InputError: fewer than two surrogates.

    Example:
        >>> from adaea import AdaEA
        >>> found = importance("zoo:vgg12", surrogates="zoo:res16,zoo:vit8", data="zoo:scenes", limit=4,
        ...                    attack=AdaEA(steps=1), device="cpu")
        >>> found.rows[0]["left out"], len(found.rows)
        ('none', 3)
    """
    from adaea.attack import AdaEA
    from adaea.images import load_data
    from adaea.runs import run_attack

    targets, stand_ins = name_models(model, name), white_boxes(name_models(surrogates, "surrogate"))
    if len(stand_ins) < 2:
        raise InputError(f"surrogates is {list(stand_ins)}, wanted at least two, to leave one out")
    images, labels = load_data(data, limit, size=size)
    images = images.float()
    bound = (AdaEA() if attack is None else attack).with_(eps=eps)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "progress": progress,
    }
    sets: dict[str, Tensor] = {}
    for left_out in ("none", *stand_ins):
        rest = {key: value for key, value in stand_ins.items() if key != left_out}
        label = "all surrogates" if left_out == "none" else f"without {left_out}"
        made = run_attack(label, bound, rest, images, labels, seed=seed, **options)
        sets[left_out] = made.set.adversarial
    rows: list[dict[str, Any]] = []
    for model_name, target in targets.items():
        before = predictions(target, images, **options)
        after = {key: predictions(target, adversarial, **options) for key, adversarial in sets.items()}
        whole = strict_asr(labels, before, after["none"])
        found: list[dict[str, Any]] = []
        for key, predicted in after.items():
            rate = strict_asr(labels, before, predicted)
            only_with, only_without = paired_counts(labels, before, after["none"], predicted)
            found.append(
                {
                    "model": model_name,
                    "left out": key,
                    "strict": rate.value,
                    "low": rate.low,
                    "high": rate.high,
                    "fall": whole.value - rate.value,
                    "only with it": only_with,
                    "only without it": only_without,
                    "p": mcnemar(only_with, only_without),
                }
            )
        rows += [found[0], *sorted(found[1:], key=lambda row: -row["fall"])]
    return Report(title=f"Which surrogate endangers {', '.join(targets)} most?", rows=rows)


def white_boxes(models: dict[str, Callables]) -> dict[str, nn.Module]:
    """The models as modules with gradients, which surrogates must be.

    Raises:
        InputError: one is a plain callable.
    """
    for key, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputError(
                f"surrogate {key!r} is a {type(model).__name__}, wanted a torch.nn.Module with gradients"
            )
    return cast("dict[str, nn.Module]", models)

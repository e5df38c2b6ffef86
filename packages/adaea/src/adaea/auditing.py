"""From "my model and some images" to how exposed it is: the whole audit in one call."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaea.advset import AdversarialSet
from adaea.auditreport import SCHEMA, AuditReport, pick_columns
from adaea.defences import parse_defence
from adaea.evaluation import Callables, Models, name_models, predictions, score_row, white_boxes
from adaea.images import load_data
from adaea.metrics import paired_counts, perturbation, score
from adaea.runs import AttackRun, run_attack, wanted_labels
from adaea.targets import Target
from fusion_core.errors import LARGEST, ConfigError, InputError, reading
from fusion_core.stats import mcnemar


def audit(
    model: Models,
    *,
    surrogates: Models,
    data: Any,
    attacks: Mapping[str, Any] | None = None,
    eps: float | Sequence[float] = 8 / 255,
    seed: int = 0,
    defences: Sequence[str] = (),
    target: Target | str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    name: str = "my_model",
    class_names: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    png: bool = False,
    progress: bool | None = None,
) -> AuditReport:
    """Attack surrogates, show the results to your model, and count with intervals.

    The audited model is asked for its answers only: any callable from images to logits or labels will do. All
    models come back as they were.

    Args:
        model: the classifier under audit: a module or callable (called ``name``), a name such as
            ``"timm:resnet50"``, or a mapping of several. Takes images in [0, 1].
        surrogates: white-box stand-ins, at least one: modules by name, or ``"timm:resnet18,timm:..."``.
        data: ``(images, labels)``, a loader, a folder or a file; see :func:`adaea.images.load_data`.
        attacks: name -> attack; ``{"Ens": Ens(), "AdaEA": AdaEA()}`` by default. The first is the baseline of
            the paired tests.
        eps: budget or budgets, in units of [0, 1].
        seed: of every draw.
        defences: words such as ``"jpeg:75"``; each is one more target, in front of each model.
        target: None = untargeted; a label, ``"random"``, ``"least-likely"``, or of labels and logits.
        batch_size: images attacked together; batch-mean AGM depends on it.
        limit: use the first n images.
        size: resize image files to squares of so many pixels.
        device: where attacks and models run.
        dtype: of the forwards; ``"auto"`` is float32, half dtypes go through autocast.
        name: of a single audited model.
        class_names: for the pictures.
        out: directory of the report; finished batches are kept there while the audit runs.
        resume: go on with the audit in ``out``.
        overwrite: replace what is in ``out``.
        png: also write PNG folders into ``out``.
        progress: show bars; None = on a terminal.

    Returns:
        The report; with ``out`` it is saved there too.

    Raises:
        InputError: a model, attack or source of data that cannot be used, or a non-empty ``out``.
        DataError: images or labels outside what is taken.
        StoreError: ``resume`` with other settings than before; the differing ones are named.

    Example:
        >>> from adaea import AdaEA, Ens
        >>> report = audit("zoo:vgg12", surrogates="zoo:res16,zoo:vit8", data="zoo:scenes", limit=8,
        ...                attacks={"Ens": Ens(steps=2), "AdaEA": AdaEA(steps=2)}, device="cpu")
        >>> 0 <= report.asr("AdaEA", "vgg12").low <= report.asr("AdaEA", "vgg12").high <= 1
        True
    """
    place = _prepare(out, resume=resume, overwrite=overwrite)
    budgets = _budgets(eps)
    images, labels = load_data(data, limit, size=size)
    images = images.float()
    targets = _with_defences(name_models(model, name), defences, seed)
    stand_ins = white_boxes(name_models(surrogates, "surrogate"))
    if clash := sorted(targets.keys() & stand_ins.keys()):
        stand_ins = {(f"{key} as surrogate" if key in clash else key): m for key, m in stand_ins.items()}
    chosen = dict(attacks) if attacks is not None else default_attacks()
    if not chosen:
        raise InputError("attacks is empty, wanted name -> attack such as {'AdaEA': AdaEA()}")
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "progress": progress,
    }
    wanted = None
    if target is not None:
        wanted = wanted_labels(target, images, labels, stand_ins, seed=seed, batch_size=batch_size)
    aim = {} if wanted is None else {"targeted": True}
    runs: dict[tuple[str, float], AttackRun] = {}
    for label, attack in chosen.items():
        for budget in budgets:
            runs[label, budget] = run_attack(
                label,
                attack.with_(eps=budget, **aim),
                stand_ins,
                images,
                labels,
                seed=seed,
                targets=wanted,
                folder=None if place is None else place / "adv",
                **options,
            )
    rows, tests, pictures = _score(targets, stand_ins, runs, images, labels, class_names, options)
    settings = {
        "images": len(images),
        "seed": seed,
        "batch_size": batch_size,
        "norm": next(iter(runs.values())).set.norm,
        "target": target if isinstance(target, int | str) else None if target is None else "a function",
        "eps": budgets,
        "attacks": {label: attack.config() for label, attack in chosen.items()},
        "surrogates": {label: type(m).__name__ for label, m in stand_ins.items()},
        "defences": list(defences),
    }
    report = AuditReport(
        title=f"Transfer audit of {', '.join(targets)}",
        rows=rows,
        tests=tests,
        runs=runs,
        targets=list(targets),
        surrogates=list(stand_ins),
        settings=settings,
        pictures=pictures,
    )
    if place is not None:
        report.save(place, png=png)
    return report


def attack_images(
    name: str,
    attack: Any,
    *,
    surrogates: Models,
    data: Any,
    seed: int = 0,
    target: Target | str | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    size: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: bool | None = None,
) -> AdversarialSet:
    """Adversarial images alone, with the record of how they were made; arguments as in :func:`audit`.

    Raises:
        InputError: a surrogate or source of data that cannot be used.
        DataError: images or labels outside what is taken.
    """
    images, labels = load_data(data, limit, size=size)
    images = images.float()
    stand_ins = white_boxes(name_models(surrogates, "surrogate"))
    wanted = None
    if target is not None:
        wanted = wanted_labels(target, images, labels, stand_ins, seed=seed, batch_size=batch_size)
        attack = attack.with_(targeted=True)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "progress": progress,
    }
    return run_attack(name, attack, stand_ins, images, labels, seed=seed, targets=wanted, **options).set


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a finished audit, from its ``asr.json``.

    Raises:
        InputError: no audit there.
    """
    path = Path(directory) / "asr.json"
    with reading(path, "is of no finished audit"):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise InputError(f"{path} has schema {document['schema']!r}, wanted {SCHEMA!r}")
        settings: dict[str, Any] = dict(document["settings"])
    return settings


def default_attacks() -> dict[str, Any]:
    """Ens and AdaEA at their defaults."""
    from adaea.attack import AdaEA
    from adaea.baselines import Ens

    return {"Ens": Ens(), "AdaEA": AdaEA()}


def _prepare(out: str | os.PathLike[str] | None, *, resume: bool, overwrite: bool) -> Path | None:
    if out is None:
        if resume or overwrite:
            raise ConfigError("resume and overwrite need out, the directory of the audit")
        return None
    place = Path(out)
    occupied = place.exists() and (not place.is_dir() or any(place.iterdir()))
    ours = place.is_dir() and ((place / "adv").is_dir() or (place / "asr.json").is_file())
    if occupied and not (ours and (resume or overwrite)):
        remedy = "name another directory" + (", pass resume=True or overwrite=True" if ours else "")
        raise InputError(f"out {place} is not empty; {remedy}")
    if occupied and overwrite:
        for name in ("adv", "png"):
            shutil.rmtree(place / name, ignore_errors=True)
    return place


def _budgets(eps: float | Sequence[float]) -> list[float]:
    listed = [float(eps)] if isinstance(eps, int | float) else [float(value) for value in eps]
    if not listed or any(not 0 <= value <= LARGEST for value in listed):
        raise ConfigError(f"eps is {eps!r}, wanted numbers >= 0 such as [4/255, 8/255]")
    return sorted(set(listed))


def _with_defences(models: dict[str, Callables], words: Sequence[str], seed: int) -> dict[str, Callables]:
    found = dict(models)
    for word in words:
        build = parse_defence(word)
        for key, model in models.items():
            inner = model if isinstance(model, nn.Module) else _Called(model)
            found[f"{key}+{word}"] = build(inner, seed=seed)
    return found


class _Called(nn.Module):
    """A plain callable as a module, so that defences can stand in front of it."""

    def __init__(self, function: Callables) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        return self.function(images)


def _score(
    targets: Mapping[str, Callables],
    surrogates: Mapping[str, nn.Module],
    runs: Mapping[tuple[str, float], AttackRun],
    images: Tensor,
    labels: Tensor,
    class_names: Sequence[str] | None,
    options: dict[str, Any],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Rows, paired tests and the content of the image grid."""
    rows: list[dict[str, Any]] = []
    tests: list[dict[str, Any]] = []
    pictures: dict[str, Any] = {}
    rounded = {key: run.set.rounded() for key, run in runs.items()}
    changes = {
        (key, pixels): perturbation(images, version.adversarial)
        for key, run in runs.items()
        for pixels, version in (("exact", run.set), ("uint8", rounded[key]))
    }
    baseline = next(iter(runs))[0]
    for model_name, model in {**targets, **surrogates}.items():
        kind = "target" if model_name in targets else "surrogate"
        before = predictions(model, images, **options)
        after: dict[tuple[str, float], Tensor] = {}
        for key, run in runs.items():
            versions: dict[str, AdversarialSet] = {"exact": run.set, "uint8": rounded[key]}
            for pixels, version in versions.items():
                found = predictions(model, version.adversarial, **options)
                if pixels == "exact":
                    after[key] = found
                scores = score(labels, before, found, run.set.targets)
                rows.append(score_row(*key, model_name, kind, pixels, scores, changes[key, pixels]))
        if kind == "surrogate":
            continue
        for attack, eps in runs:
            if attack != baseline:
                counts = paired_counts(labels, before, after[attack, eps], after[baseline, eps])
                tests.append(_test(attack, baseline, eps, model_name, counts, int((before == labels).sum())))
        pictures = pictures or _pictures(model_name, runs, images, labels, before, after, class_names)
    return rows, tests, pictures


def _test(
    attack: str, baseline: str, eps: float, model: str, counts: tuple[int, int], right: int
) -> dict[str, Any]:
    return {
        "attack": attack,
        "baseline": baseline,
        "eps": eps,
        "model": model,
        "right before": right,
        "only attack": counts[0],
        "only baseline": counts[1],
        "p": mcnemar(*counts),
    }


def _pictures(
    model: str,
    runs: Mapping[tuple[str, float], AttackRun],
    images: Tensor,
    labels: Tensor,
    before: Tensor,
    after: Mapping[tuple[str, float], Tensor],
    class_names: Sequence[str] | None,
) -> dict[str, Any]:
    """The grid's content: the last attack at the largest budget, seen by the first audited model."""
    last = list(runs)[-1][0]
    key = (last, max(eps for name, eps in runs if name == last))
    run, rows = runs[key], pick_columns(labels, before, after[key])
    word = lambda label: class_names[label] if class_names and label < len(class_names) else f"class {label}"
    titles = [(word(int(labels[i])), word(int(before[i])), word(int(after[key][i]))) for i in rows]
    return {
        "clean": images[rows],
        "adversarial": run.set.adversarial[rows],
        "titles": titles,
        "eps": key[1],
        "attack": key[0],
        "model": model,
        "keep": None if bool(run.keep.all()) else run.keep[rows],
    }

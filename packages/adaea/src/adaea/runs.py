"""Running one attack over many images: in batches, kept on disk as it goes, resumed after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaea.advset import AdversarialSet
from adaea.wrappers import half_precision
from fusion_core.batching import map_batches
from fusion_core.checkpoint import digest, digest_state, load_tensors, save_tensors
from fusion_core.device import resolve_device
from fusion_core.errors import CheckpointError, InputError, StoreError, check_shape, reading
from fusion_core.modules import logits_of, untouched
from fusion_core.progress import track
from fusion_core.results import plain
from fusion_core.seeding import generator
from fusion_core.store import ShardStore

_FORMAT = 1
_WORK = ".work"


@dataclass(frozen=True, eq=False)
class AttackRun:
    """What one attack made of all images.

    Attributes:
        set: the adversarial images with their record.
        weights: of the surrogates, ``(images, steps, surrogates)``; rows of a batch are equal unless the
            attack weighs per sample.
        kept: share of pixels that the filter lets move, ``(images, steps)``.
        losses: of each surrogate, ``(images, steps, surrogates)``.
        keep: the filter of the first step, bool ``(images, 1, height, width)``.
    """

    set: AdversarialSet
    weights: np.ndarray[Any, Any]
    kept: np.ndarray[Any, Any]
    losses: np.ndarray[Any, Any]
    keep: Tensor


def wanted_labels(
    target: Any,
    images: Tensor,
    labels: Tensor,
    surrogates: Mapping[str, nn.Module],
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """The class that each image shall be taken for, int64 ``(images,)``; see :mod:`adaea.targets`.

    Args:
        target: a class, ``"random"``, ``"least-likely"``, or a function of labels and logits.
        images: ``(images, channels, height, width)`` in [0, 1].
        labels: true classes ``(images,)``.
        surrogates: whose logits on the clean images decide.
        seed: of the random targets.
        batch_size: images per forward.

    Raises:
        ConfigError: another word.
        DataError: classes out of range, or every image wanted as what it is.
    """
    from adaea.targets import target_labels

    def logits(part: Tensor) -> Tensor:
        found: list[Tensor] = []
        for model in surrogates.values():
            place = next((p.device for p in model.parameters()), part.device)
            found.append(logits_of(model(part.to(place))).float().cpu())
        return torch.stack(found)

    with torch.no_grad(), untouched(*surrogates.values()):
        every = torch.cat(list(map_batches(logits, images, batch_size)), dim=1)
    return target_labels(target, labels, every, generator(seed, "targets"))


def fingerprint(
    attack: Any,
    surrogates: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    batch_size: int,
    targets: Tensor | None,
) -> dict[str, Any]:
    """What an adversarial set depends on, as JSON values; a set is reused only where all of it is equal."""
    return plain(
        {
            "format": _FORMAT,
            "attack": attack.config(),
            "surrogates": {name: digest_state(model.state_dict()) for name, model in surrogates.items()},
            "data": digest(images, labels),
            "targets": None if targets is None else digest(targets),
            "images": len(images),
            "seed": seed,
            "batch_size": batch_size,
        }
    )


def run_attack(
    name: str,
    attack: Any,
    surrogates: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 32,
    targets: Tensor | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    folder: Path | None = None,
    progress: bool | None = None,
) -> AttackRun:
    """Attack all images, batch by batch.

    Noise and draws of a batch follow from the seed and the batch's number alone, so a run that was stopped
    goes on to the same result.

    Args:
        name: of the attack, for the record and the file names.
        attack: an :class:`~adaea.attack.AdaEA` without surrogates of its own.
        surrogates: name -> model.
        images: ``(images, channels, height, width)`` in [0, 1].
        labels: int64 ``(images,)``.
        seed: of all draws.
        batch_size: images attacked together; batch-mean AGM depends on it.
        targets: classes wanted by a targeted attack.
        device: where the attack runs.
        dtype: of the models' forwards; ``"auto"`` is float32, half dtypes go through autocast. Images and
            perturbation stay float32.
        folder: of the finished sets and of what is under way; None keeps everything in memory.
        progress: show a bar.

    Returns:
        The adversarial set with weights, kept share and losses of every step.

    Raises:
        StoreError: ``folder`` holds a run of other settings; the differing ones are named.
        InputError: as the attack.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, wanted at least 1")
    made_from = fingerprint(
        attack, surrogates, images, labels, seed=seed, batch_size=batch_size, targets=targets
    )
    made_from["dtype"] = str(dtype)
    key = file_key(name, attack)
    if folder is not None and (found := _finished(folder, key, made_from)) is not None:
        _clear(folder, key)  # a kill may have left it
        return found
    where = resolve_device(device)
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    store: ShardStore | None = None
    cuts = [(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)]
    if folder is not None and (folder / _WORK / key / "manifest.json").exists():
        store = ShardStore.open(folder / _WORK / key, made_from)
        cuts = [cut for cut in cuts if cut in _whole(store.missing(len(images)), batch_size)]
    homes = {id(m): next((p.device for p in m.parameters()), where) for m in surrogates.values()}
    try:
        for model in surrogates.values():
            model.to(where)
        for start, stop in track(cuts, f"{name}, eps {attack.eps:.4g}", enabled=progress):
            with half_precision(where, dtype):
                rows = _batch(
                    attack, surrogates, images, labels, targets, (start, stop), seed, batch_size, where
                )
            if folder is None:
                parts.append(rows)
                continue
            if store is None:
                schema = {field: (array.dtype.name, array.shape[1:]) for field, array in rows.items()}
                store = ShardStore.create(
                    folder / _WORK / key, made_from, schema, kind="adaea adversarial set"
                )
            store.append(rows, (start, stop))
    finally:
        for model in surrogates.values():
            model.to(homes[id(model)])
    if store is not None:
        store.finish(len(images))
        rows = store[0 : len(images)]
    else:
        rows = {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}
    info = {
        "attack": name,
        "config": attack.config(),
        "eps": float(attack.eps),
        "norm": attack.norm,
        "surrogates": {label: _describe(model) for label, model in surrogates.items()},
        "seed": seed,
        "fingerprint": made_from,
        "versions": _versions(),
    }
    whole = AdversarialSet(
        torch.from_numpy(rows["adv"]).to(images.dtype),
        labels,
        clean=images,
        targets=targets,
        index=torch.arange(len(images)),
        info=plain(info),
    )
    run = AttackRun(
        whole, rows["weights"], rows["kept"], rows["losses"], torch.from_numpy(rows["keep"].astype(bool))
    )
    if folder is not None:
        save_run(run, folder, key)
        _clear(folder, key)
    return run


def _clear(folder: Path, key: str) -> None:
    """Remove the shards of an attack whose set is there."""
    work = folder / _WORK
    shutil.rmtree(work / key, ignore_errors=True)
    if work.is_dir() and not any(work.iterdir()):
        work.rmdir()


def _whole(gaps: list[tuple[int, int]], batch_size: int) -> set[tuple[int, int]]:
    """The batches inside the gaps; a store holds whole batches only."""
    return {
        (start, min(start + batch_size, stop))
        for first, stop in gaps
        for start in range(first, stop, batch_size)
    }


def _batch(
    attack: Any,
    surrogates: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    cut: tuple[int, int],
    seed: int,
    batch_size: int,
    where: torch.device,
) -> dict[str, np.ndarray[Any, Any]]:
    start, stop = cut
    x = images[start:stop].to(where)
    wanted = labels if targets is None else targets
    draws = generator(seed, "attack", start // batch_size)
    adv, trace = attack(
        x, wanted[start:stop].to(where), trace=True, surrogates=dict(surrogates), generator=draws
    )
    count = stop - start
    weights = trace.weights.detach().float().cpu()
    if weights.ndim == 2:
        weights = weights.unsqueeze(-1)
    weights = weights.expand(-1, -1, count)
    return {
        "adv": adv.detach().float().cpu().numpy(),
        "weights": np.ascontiguousarray(weights.permute(2, 0, 1).numpy()),
        "kept": np.ascontiguousarray(trace.kept.detach().float().cpu().T.numpy()),
        "losses": np.ascontiguousarray(trace.losses.detach().float().cpu().permute(2, 0, 1).numpy()),
        "keep": _first(trace.keep, x).cpu().numpy().astype(np.uint8),
    }


def _first(keep: Tensor, images: Tensor) -> Tensor:
    return keep[0] if len(keep) else torch.ones_like(images[:, :1], dtype=torch.bool)


def file_key(name: str, attack: Any) -> str:
    """The file name of an attack at its budget, such as ``AdaEA-eps16``.

    Example:
        >>> from types import SimpleNamespace
        >>> file_key("adaea+mi", SimpleNamespace(eps=16 / 255, norm="linf"))
        'adaea+mi-eps16'
    """
    top = attack.eps * 255 if attack.norm == "linf" else attack.eps
    words = f"{round(top)}" if abs(top - round(top)) < 1e-9 else f"{top:.4g}".replace(".", "_")
    safe = "".join(c if c.isalnum() or c in "+-_" else "_" for c in name)
    return f"{safe}-{'eps' if attack.norm == 'linf' else 'l2_'}{words}"


def save_run(run: AttackRun, folder: Path, key: str) -> None:
    """Write ``KEY.safetensors``, ``KEY.json`` and ``KEY.trace.safetensors``; the set comes last."""
    trace = {name: torch.from_numpy(getattr(run, name).copy()) for name in ("weights", "kept", "losses")}
    trace["keep"] = run.keep
    save_tensors(folder / f"{key}.trace.safetensors", trace)
    run.set.save(folder / f"{key}.safetensors")


def _finished(folder: Path, key: str, made_from: dict[str, Any]) -> AttackRun | None:
    """The run that an earlier call finished, if it was made from the same things."""
    if not (folder / f"{key}.safetensors").is_file():
        return None
    try:
        found = AdversarialSet.load(folder / f"{key}.safetensors")
        run = _with_trace(found, folder / f"{key}.trace.safetensors")
    except (CheckpointError, InputError):
        return None
    before = found.info.get("fingerprint")
    before = before if isinstance(before, dict) else {}
    if differing := sorted(key for key in {*before, *made_from} if before.get(key) != made_from.get(key)):
        raise StoreError(
            f"{folder / key}.safetensors was made with other settings ({', '.join(differing)} differ); name "
            "another directory or pass overwrite"
        )
    return run


def _with_trace(found: AdversarialSet, path: Path) -> AttackRun:
    """A set with the trace of its attack.

    Raises:
        CheckpointError: the trace is missing, damaged, or of other images.
    """
    count, _, height, width = found.adversarial.shape
    with reading(path, "is no trace of the set", CheckpointError):
        trace = load_tensors(path)
        sizes = check_shape("weights", trace["weights"], "images steps surrogates", images=count)
        check_shape("kept", trace["kept"], "images steps", images=count, steps=sizes["steps"])
        check_shape("losses", trace["losses"], "images steps surrogates", **sizes)
        check_shape("keep", trace["keep"], "images 1 height width", images=count, height=height, width=width)
        weights, kept, losses = (trace[name].float().numpy() for name in ("weights", "kept", "losses"))
        return AttackRun(found, weights, kept, losses, trace["keep"].bool())


def _describe(model: nn.Module) -> dict[str, Any]:
    """Class, mean and std of a surrogate, for the record."""
    found: dict[str, Any] = {"class": type(getattr(model, "model", model)).__name__}
    for name in ("mean", "std"):
        value = getattr(model, name, None)
        if isinstance(value, Tensor):
            found[name] = value.flatten().tolist()
    return found


def _versions() -> dict[str, str]:
    from fusion_core.demo import package_version

    return {"adaea": package_version("adaea"), "torch": torch.__version__}

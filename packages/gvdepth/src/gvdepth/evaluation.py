"""Evaluation on labelled data: eleven metrics, per distance, with bootstrap intervals over images.

One pass over the data fills a table of sums per image and distance bin; every number of the report comes
from it, so shards of an evaluation add up to the whole, bit by bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fusion_core.errors import ConfigError, DataError, ShapeError
from fusion_core.progress import track
from fusion_core.report import Report
from fusion_core.results import plain
from fusion_core.store import parse_shard
from gvdepth.measures import METRICS, Crop, Pooling, error_sums, from_sums, pool
from gvdepth.resampling import resample_counts

__all__ = ["BINS", "Evaluation", "evaluate", "merge_evaluations"]

BINS = (0.0, 10.0, 20.0, 40.0, 80.0)
_HIGHER = ("d1", "d2", "d3")
_SHOWN = ("abs_rel", "rmse", "silog", "d1")


@dataclass(frozen=True, kw_only=True)
class Evaluation(Report):
    """The report of an evaluation.

    Attributes:
        sums: of each method, (images, 1 + bins, 12): all distances first, see
            :func:`gvdepth.measures.error_sums`.
        ids: of the images.
        indices: of the images in the whole data set, for :func:`merge_evaluations`.
        settings: what was evaluated how.
    """

    sums: Mapping[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    ids: Sequence[str] = ()
    indices: Sequence[int] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Each method's metrics over all distances."""
        return {name: pool(table[:, 0], self.settings["pooling"]) for name, table in self.sums.items()}

    def per_image(self, method: str | None = None) -> list[dict[str, Any]]:
        """One row per image: id and metrics over all distances (NaN without valid pixels)."""
        table = self.sums[next(iter(self.sums)) if method is None else method]
        found = from_sums(table[:, 0])
        return [
            {"id": name} | {key: float(values[i]) for key, values in found.items()}
            for i, name in enumerate(self.ids)
        ]

    def shown_rows(self) -> list[dict[str, Any]]:
        """The rows with few metrics, as text."""
        shown: list[dict[str, Any]] = []
        for row in self.rows:
            line: dict[str, Any] = {"method": row["method"], "distance": row["distance"]}
            for metric in _SHOWN:
                scale, unit = (100.0, " %") if metric in ("abs_rel", "d1") else (1.0, "")
                line[metric + unit] = _interval(row, metric, scale)
                if row.get(f"{metric}_difference") is not None:
                    line[metric + unit] += f" ({row[f'{metric}_difference'] * scale:+.3g})"
            shown.append(line | {"pixels": row["valid"]})
        return shown

    def to_dict(self) -> dict[str, Any]:
        """The report's document with settings and the metrics of every image."""
        more = {"settings": dict(self.settings), "metrics": self.metrics, "ids": list(self.ids)}
        return super().to_dict() | plain(more | {"per_image": {n: self.per_image(n) for n in self.sums}})


def _interval(row: Mapping[str, Any], metric: str, scale: float) -> str:
    value, low, high = (row[metric + end] for end in ("", "_low", "_high"))
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value * scale:.3g} [{low * scale:.3g}, {high * scale:.3g}]"


def evaluate(
    model: Any,
    data: Any,
    *,
    max_depth: float = 80.0,
    min_depth: float = 1e-3,
    crop: Crop = None,
    bins: Sequence[float] | None = BINS,
    pooling: Pooling = "image",
    baseline: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    shard: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool | None = None,
) -> Evaluation:
    """Evaluate one model or several on labelled images.

    Args:
        model: something with ``predict(images, cameras)``, a function ``(image, camera) -> depth``, a
            directory with ``ID.depth.npy`` (or ``.npy``, ``.png``) of every image, or a mapping of names to
            such models.
        data: sequence of samples with ``image``, ``depth`` (height, width; metres), ``valid`` (bool or None),
            ``camera`` and ``id``.
        max_depth: cap, metres.
        min_depth: metres.
        crop: ``"garg"``, ``"eigen"``, fractions ``(top, bottom, left, right)``, or None.
        bins: edges of distance bins, metres; None for none.
        pooling: ``"image"``, the mean of the images' metrics, or ``"pixel"``.
        baseline: of several models, the one that the others are compared with; the first by default.
        batch_size: images per call of ``predict``.
        limit: the first so many samples.
        shard: ``"i/n"``, 0-based: every n-th sample from the i-th; see :func:`merge_evaluations`.
        resamples: of the bootstrap over images.
        seed: of the bootstrap.
        progress: bar on a terminal; None finds out.

    Returns:
        The report: a row per model and distance bin, each metric with its 95 % interval; with several models
        the paired difference to the baseline.

    Raises:
        DataError: no samples, or a prediction that is no depth map.
        ConfigError: a cap, crop, bin or baseline that makes no sense.
    """
    methods = dict(model) if isinstance(model, Mapping) else {_name(model): model}
    if not methods:
        raise ConfigError("model is an empty mapping, wanted at least one model")
    if baseline is not None and baseline not in methods:
        raise ConfigError(f"baseline is {baseline!r}, wanted one of {', '.join(methods)}")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, wanted at least 1")
    indices = list(range(len(data)))[:limit]
    if shard is not None:
        first, count = parse_shard(shard)
        indices = indices[first::count]
    if not indices:
        raise DataError("data is empty, wanted at least one sample")
    options: dict[str, Any] = {"max_depth": max_depth, "min_depth": min_depth, "crop": crop}
    predictors = {name: _predictor(one) for name, one in methods.items()}
    tables: dict[str, list[NDArray[np.float64]]] = {name: [] for name in methods}
    ids: list[str] = []
    steps = track(_batches(data, indices, batch_size), "evaluating", total=-(-len(indices) // batch_size))
    for batch in steps if progress is not False else _batches(data, indices, batch_size):
        ids += [str(sample.id) for sample in batch]
        for name, predictor in predictors.items():
            tables[name] += [
                _sums(depth, sample, bins, options)
                for depth, sample in zip(predictor(batch), batch, strict=True)
            ]
    settings = options | {"crop": crop if crop is None or isinstance(crop, str) else list(crop)}
    settings |= {"bins": None if bins is None else list(bins), "pooling": pooling, "resamples": resamples}
    settings |= {"seed": seed, "baseline": baseline or next(iter(methods)), "samples": len(data)}
    made = Evaluation(
        title="Depth evaluation",
        sums={name: np.stack(rows) for name, rows in tables.items()},
        ids=ids,
        indices=indices,
        settings=settings,
    )
    return replace(made, rows=_rows(made))


def merge_evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of all images from those of its shards; equal to the unsharded one, bit by bit.

    Raises:
        DataError: no parts, other settings, or an image twice.
    """
    if not parts:
        raise DataError("parts is empty, wanted the evaluations of all shards")
    first = parts[0]
    if any(part.settings != first.settings or list(part.sums) != list(first.sums) for part in parts):
        raise DataError(
            "the parts were evaluated with other settings or models; wanted shards of one evaluation"
        )
    order = sorted((index, i, j) for i, part in enumerate(parts) for j, index in enumerate(part.indices))
    if len({index for index, _, _ in order}) != len(order):
        raise DataError("an image is in two parts; wanted different shards of one evaluation")
    whole = Evaluation(
        title=first.title,
        sums={name: np.stack([parts[i].sums[name][j] for _, i, j in order]) for name in first.sums},
        ids=[parts[i].ids[j] for _, i, j in order],
        indices=[index for index, _, _ in order],
        settings=first.settings,
    )
    return replace(whole, rows=_rows(whole))


def _name(model: Any) -> str:
    return Path(model).name if isinstance(model, str | os.PathLike) else "model"


def _batches(data: Any, indices: Sequence[int], batch_size: int) -> Iterator[list[Any]]:
    samples = (data[index] for index in indices)
    while batch := list(islice(samples, batch_size)):
        yield batch


def _predictor(model: Any) -> Callable[[list[Any]], list[Any]]:
    if isinstance(model, str | os.PathLike):
        folder = Path(model)
        if not folder.is_dir():
            raise DataError(f"{folder} is no directory of depth maps")
        return lambda batch: [_stored(folder, str(sample.id)) for sample in batch]
    if hasattr(model, "predict"):
        return lambda batch: list(model.predict([s.image for s in batch], [s.camera for s in batch]))
    if not callable(model):
        raise ConfigError(
            f"model is {type(model).__name__}, wanted predict(images, cameras), a function or a folder"
        )
    return lambda batch: [model(sample.image, sample.camera) for sample in batch]


def _stored(folder: Path, name: str) -> Any:
    from gvdepth.data.base import read_depth

    stem = name.replace(" ", "_")
    for suffix in (".depth.npy", ".npy", ".depth.png", ".png"):
        if (path := folder / f"{stem}{suffix}").is_file():
            return read_depth(path)
    raise DataError(f"{folder} has no {stem}.depth.npy (or .npy, .png)")


def _sums(
    output: Any, sample: Any, bins: Sequence[float] | None, options: dict[str, Any]
) -> NDArray[np.float64]:
    depth = getattr(output, "depth", output)
    found = torch.as_tensor(depth).detach().to("cpu")
    target = np.asarray(sample.depth)
    if found.ndim < 2 or found.numel() == 0 or found.numel() != found.shape[-1] * found.shape[-2]:
        raise ShapeError(
            f"the prediction of {sample.id} has shape {tuple(found.shape)}, wanted (height, width)"
        )
    found = found.reshape(1, 1, *found.shape[-2:]).float()
    if found.shape[-2:] != target.shape:
        found = F.interpolate(found, target.shape, mode="bilinear", align_corners=False)
    valid = None if getattr(sample, "valid", None) is None else np.asarray(sample.valid)
    everything = error_sums(found[0, 0], target, mask=valid, **options)[:, None]
    if bins is None:
        return everything[0]
    parts = error_sums(found[0, 0], target, mask=valid, bins=bins, **options)
    return np.concatenate([everything, parts], 1)[0]


def _resampled(table: NDArray[np.float64], counts: NDArray[np.float64], pooling: Pooling) -> dict[str, Any]:
    """Metrics of every resample of the images, each (resamples,)."""
    if pooling == "pixel":
        return from_sums(counts @ table)
    seen = table[:, 0] > 0
    images = counts @ seen
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            name: counts @ np.where(seen, values, 0.0) / images for name, values in from_sums(table).items()
        }


def _rows(report: Evaluation) -> list[dict[str, Any]]:
    settings = report.settings
    pooling, baseline = settings["pooling"], settings["baseline"]
    edges = settings["bins"]
    names = ["all"] + [
        f"{low:g}-{high:g} m" for low, high in zip(edges or [], (edges or [])[1:], strict=False)
    ]
    counts = resample_counts(len(report.ids), settings["resamples"], settings["seed"])
    rows: list[dict[str, Any]] = []
    for k, distance in enumerate(names):
        drawn = {name: _resampled(table[:, k], counts, pooling) for name, table in report.sums.items()}
        values = {name: pool(table[:, k], pooling) for name, table in report.sums.items()}
        for name in report.sums:
            row: dict[str, Any] = {"method": name, "distance": distance, "valid": values[name]["valid"]}
            for metric in METRICS:
                row[metric] = values[name][metric]
                row[f"{metric}_low"], row[f"{metric}_high"] = _quantiles(drawn[name][metric])
                if name != baseline and len(report.sums) > 1:
                    gap = drawn[name][metric] - drawn[baseline][metric]
                    row[f"{metric}_difference"] = row[metric] - values[baseline][metric]
                    ends = _quantiles(gap)
                    row[f"{metric}_difference_low"], row[f"{metric}_difference_high"] = ends
                    row[f"{metric}_p"] = _p_value(gap)
            rows.append(row)
    return rows


def _quantiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    kept = drawn[np.isfinite(drawn)]
    if not kept.size:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, (0.025, 0.975))
    return float(low), float(high)


def _p_value(gap: NDArray[np.float64]) -> float:
    kept = gap[np.isfinite(gap)]
    if not kept.size:
        return float("nan")
    fewer = min(np.count_nonzero(kept <= 0), np.count_nonzero(kept >= 0))
    return min(1.0, 2.0 * (fewer + 1) / (kept.size + 1))

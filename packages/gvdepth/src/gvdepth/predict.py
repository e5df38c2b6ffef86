"""Prediction of images in memory and of whole folders, where reading, network and writing overlap."""

from __future__ import annotations

import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from fusion_core.atomic import PathLike
from fusion_core.device import autocast, resolve_device, resolve_dtype
from fusion_core.errors import FusionWarning, InputError
from fusion_core.images import list_images, read_image
from fusion_core.progress import track
from fusion_core.results import Result
from fusion_core.store import Manifest, parse_shard, take_shard
from gvdepth.camera import Camera
from gvdepth.config import Fusion
from gvdepth.geometry import height_above_road
from gvdepth.modeling import GVDepth, Output
from gvdepth.outputs import FORMATS, DepthOutput, check_formats
from gvdepth.processing import Prepared, batch, is_batch, pair, prepare, undo
from gvdepth.vertical import check_ground, sees_ground

__all__ = ["FORMATS", "DepthOutput", "Summary", "predict", "predict_folder"]

CalibStd = tuple[float, float]
_LEAST_DEPTH = 1e-3


@dataclass(frozen=True, slots=True)
class Settings:
    """How to predict; see :func:`predict`."""

    calib_std: CalibStd | None = None
    clip: bool = True
    fusion: Fusion | None = None
    height: int | None = None
    dtype: str | torch.dtype = "float32"


def predict(
    model: GVDepth,
    images: Any,
    cameras: Camera | Sequence[Camera],
    *,
    calib_std: CalibStd | None = None,
    clip: bool = True,
    fusion: Fusion | None = None,
    height: int | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
) -> Any:
    """Metric depth of one image, or of several with one camera each.

    Args:
        model: on its device; it is used in eval mode.
        images: a path, bytes, PIL image, (H, W, 3) uint8 array or (3, H, W) tensor; or a list, or an array or
            tensor of four dimensions. Sizes may differ.
        cameras: of the image, or one for each; one camera serves all.
        calib_std: standard deviations of the camera's height (metres) and pitch (degrees): the vertical cue
            is
            trusted less where they matter.
        clip: keep the depth within [1e-3, max_depth] metres.
        fusion: another rule than the model's.
        height: rows of the network's image; None = ``config.input_height``, else the image as it is.
        batch_size: images of one size per forward pass.
        device: move the model there first.
        dtype: of the trunk; geometry and heads stay float32.

    Returns:
        A :class:`DepthOutput`, or a list of them.

    Raises:
        CameraError: a camera does not fit its image.
        GeometryError: a whole image lies above the horizon, and the model has the vertical cue only.
        InputError: no image, or other numbers of images and cameras.
    """
    settings = Settings(calib_std, clip, fusion, height, dtype)
    if device is not None:
        model.to(resolve_device(device))
    loaded = (
        prepare(source, camera, height=_height(model, settings), name=_name(source, number))
        for number, (source, camera) in enumerate(pair(images, cameras))
    )
    found: list[DepthOutput] = []
    for group in _groups(loaded, batch_size):
        found += forward(model, group, settings)
    return found if is_batch(images) else found[0]


def _name(source: Any, number: int) -> str:
    return Path(source).stem if isinstance(source, str | os.PathLike) else f"image-{number:05d}"


def _height(model: GVDepth, settings: Settings) -> int | None:
    return settings.height or model.config.input_height


def _groups(items: Iterable[Prepared], batch_size: int) -> Iterator[list[Prepared]]:
    """Neighbours that can share a forward pass, in order."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, wanted at least 1")
    key: Callable[[Prepared], Any] = lambda item: (item.size, sees_ground(item.network_camera))
    for _, group in itertools.groupby(items, key):
        while part := list(itertools.islice(group, batch_size)):
            yield part


def forward(model: GVDepth, items: Sequence[Prepared], settings: Settings) -> list[DepthOutput]:
    """One forward pass over images of one size; the results are on the CPU when they are looked at.

    Raises:
        GeometryError: see :func:`predict`.
    """
    config, rule = model.config, settings.fusion
    if config.cue in ("vertical", "fusion") and not sees_ground(items[0].network_camera):
        if config.cue == "vertical":
            check_ground(items[0].network_camera)
        warnings.warn(
            f"{items[0].id} lies above the horizon as a whole: the focal cue is used alone",
            FusionWarning,
            stacklevel=3,
        )
        rule = "focal"
    was_training, device = model.training, model.device
    std = None
    if settings.calib_std is not None:
        if min(settings.calib_std) < 0 or not np.isfinite(settings.calib_std).all():
            raise InputError(
                f"calib_std is {settings.calib_std}, wanted standard deviations of the height in metres and "
                f"of the "
                "pitch in degrees, >= 0"
            )
        std = torch.tensor([settings.calib_std] * len(items), dtype=torch.float32, device=device)
    try:
        model.eval()
        with torch.inference_mode(), autocast(device, resolve_dtype(settings.dtype, device)):
            images, cameras = batch(items, device)
            roll = any(item.camera.roll_deg != 0 for item in items)
            output = model(images, cameras, calib_std=std, fusion=rule, roll=roll)
    finally:
        model.train(was_training)
    return [
        _result(output, number, item, config.max_depth, settings.clip) for number, item in enumerate(items)
    ]


def _result(output: Output, number: int, item: Prepared, max_depth: float, clip: bool) -> DepthOutput:
    one = slice(number, number + 1)
    names = (
        "depth", "depth_focal", "depth_vertical", "log_uncertainty_focal", "log_uncertainty_vertical",
        "uncertainty", "weight_focal",
    )  # fmt: skip
    maps = undo(torch.cat([getattr(output, name)[one] for name in names], 1).float(), item.camera.size)[0]
    depth, focal, vertical = maps[:3].clamp(_LEAST_DEPTH, max_depth) if clip else maps[:3]
    return DepthOutput(
        depth=depth,
        uncertainty=maps[5],
        depth_focal=focal,
        depth_vertical=vertical,
        uncertainty_focal=maps[3].exp(),
        uncertainty_vertical=maps[4].exp(),
        weight_focal=maps[6],
        height_above_road=height_above_road(depth, item.camera, roll=item.camera.roll_deg != 0),
        image=item.image,
        camera=item.camera,
        id=item.id,
    )


@dataclass(frozen=True, slots=True)
class Summary(Result):
    """What a run over a folder did.

    Args:
        done: images predicted now.
        skipped: images that an earlier run had done.
        failures: image -> what was wrong with it.
        out: where the files are.
    """

    done: int
    skipped: int
    failures: dict[str, str]
    out: Path


def predict_folder(
    model: GVDepth,
    paths: PathLike | Iterable[PathLike],
    camera: Camera | Callable[[Path], Camera],
    out: PathLike,
    *,
    formats: Sequence[str] = ("npy",),
    calib_std: CalibStd | None = None,
    clip: bool = True,
    fusion: Fusion | None = None,
    height: int | None = None,
    rectify: Callable[[Any], Any] | None = None,
    batch_size: int = 1,
    num_workers: int = 2,
    limit: int | None = None,
    shard: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dtype: str | torch.dtype = "float32",
    progress: bool | None = None,
) -> Summary:
    """Predict files and folders of images; threads read ahead and write behind while the network runs.

    Files are written whole or not at all, ``manifest.jsonl`` lists what was done, and an image that cannot be
    read
    does not stop the others.

    Args:
        model: on its device.
        paths: image files, and folders whose images are taken.
        camera: of all images, or a function from a path to its camera.
        out: the directory; subfolders are kept.
        formats: of :data:`FORMATS`.
        calib_std: as of :func:`predict`.
        clip: as of :func:`predict`.
        fusion: as of :func:`predict`.
        height: as of :func:`predict`.
        rectify: takes the lens distortion out of each image, such as :func:`gvdepth.rectify.read_rectifier`
            gives; ``camera`` is then that of the rectified images.
        batch_size: images per forward pass.
        num_workers: threads that read, and as many that write; 0 = one thing after the other.
        limit: the first so many.
        shard: ``"i/n"``: every n-th image from the i-th on; shards may write to one directory.
        resume: skip what the manifest lists.
        overwrite: do all of it again.
        dtype: as of :func:`predict`.
        progress: None shows a bar on a terminal only.

    Returns:
        See :class:`Summary`.

    Raises:
        InputError: no images, two that would get the same files, or ``out`` holds another run.
    """
    check_formats(formats)
    place = Path(out)
    jobs = _jobs([paths] if isinstance(paths, str | os.PathLike) else list(paths), shard, limit)
    index, count = parse_shard(shard)
    path = place / ("manifest.jsonl" if count == 1 else f"manifest-{index}-of-{count}.jsonl")
    if path.exists() and not (resume or overwrite):
        raise InputError(f"out {str(out)!r} holds a run ({path.name}); pass resume or overwrite")
    place.mkdir(parents=True, exist_ok=True)
    if overwrite and not resume:
        path.unlink(missing_ok=True)
    manifest = Manifest(path)
    todo = [job for job in jobs if job[0] not in manifest]
    settings = Settings(calib_std, clip, fusion, height, dtype)
    pipeline = _Pipeline(model, camera, place, tuple(formats), settings, manifest)
    pipeline.rectify = rectify
    with pipeline.threads(num_workers):
        bar = iter(track(range(len(todo)), "predicting", enabled=progress))
        for _ in pipeline.run(todo, batch_size):
            next(bar, None)
        next(bar, None)
    failures = {
        name: words for name, words in manifest.failures().items() if name in {job[0] for job in jobs}
    }
    return Summary(
        len(todo) - len(set(failures) & {job[0] for job in todo}), len(jobs) - len(todo), failures, place
    )


def _jobs(paths: Sequence[PathLike], shard: str | None, limit: int | None) -> list[tuple[str, Path]]:
    """(name, file) of every image; names are relative to the folder that was given, without suffix."""
    found: dict[str, Path] = {}
    for given in map(Path, paths):
        for file in list_images(given):
            inner = file.relative_to(given) if given.is_dir() else Path(file.name)
            name = inner.with_suffix("").as_posix()
            if name in found and found[name] != file:
                raise InputError(
                    f"{found[name]} and {file} would both be written as {name}; give them one by one"
                )
            found[name] = file
    return take_shard(list(found.items()), shard)[:limit]


class _Pipeline:
    """Readers, the network and writers; at most ``ahead`` images wait on either side."""

    def __init__(
        self,
        model: GVDepth,
        camera: Camera | Callable[[Path], Camera],
        out: Path,
        formats: tuple[str, ...],
        settings: Settings,
        manifest: Manifest,
    ) -> None:
        self.model, self.out, self.formats, self.settings = model, out, formats, settings
        self.camera: Callable[[Path], Camera] = (lambda _: camera) if isinstance(camera, Camera) else camera
        self.manifest, self.lock = manifest, Lock()
        self.height = _height(model, settings)
        self.readers: ThreadPoolExecutor | None = None
        self.writers: ThreadPoolExecutor | None = None
        self.ahead = 1
        self.rectify: Callable[[Any], Any] | None = None

    def threads(self, count: int) -> _Threads:
        return _Threads(self, count)

    def _note(self, name: str, **facts: Any) -> None:
        with self.lock:
            self.manifest.add(name, **facts)

    def _read(self, job: tuple[str, Path]) -> Prepared | None:
        name, path = job
        try:
            source = path if self.rectify is None else self.rectify(read_image(path))
            return prepare(source, self.camera(path), height=self.height, name=name)
        except InputError as error:
            self._note(name, error=" ".join(str(error).split()))
            return None

    def _write(self, output: DepthOutput) -> tuple[str, list[str]]:
        written = output.save(self.out, formats=self.formats, max_depth=self.model.config.max_depth)
        return output.id, [path.relative_to(self.out).as_posix() for path in written]

    def _written(self, done: tuple[str, list[str]]) -> None:
        """List an image; in the order of the images, whichever thread was first."""
        self._note(done[0], files=done[1])

    def _loaded(self, jobs: Sequence[tuple[str, Path]]) -> Iterator[Prepared]:
        if self.readers is None:
            found: Iterator[Prepared | None] = map(self._read, jobs)
        else:
            found = _ahead(self.readers, self._read, jobs, self.ahead)
        return (item for item in found if item is not None)

    def run(self, jobs: Sequence[tuple[str, Path]], batch_size: int) -> Iterator[str]:
        """Predict and write; yields each image's name as it goes to the writers."""
        pending: deque[Future[tuple[str, list[str]]]] = deque()
        for group in _groups(self._loaded(jobs), batch_size):
            try:
                outputs = forward(self.model, group, self.settings)
            except InputError as error:
                for item in group:
                    self._note(item.id, error=" ".join(str(error).split()))
                continue
            for output in outputs:
                if self.writers is None:
                    self._written(self._write(output))
                else:
                    pending.append(self.writers.submit(self._write, output))
                yield output.id
            while len(pending) > self.ahead:
                self._written(pending.popleft().result())
        for future in pending:
            self._written(future.result())


class _Threads:
    """The pools of a pipeline; leaving the block ends them, after an error without waiting for the rest."""

    def __init__(self, pipeline: _Pipeline, count: int) -> None:
        if count < 0:
            raise InputError(f"num_workers is {count}, wanted at least 0")
        self.pipeline, self.count = pipeline, count

    def __enter__(self) -> None:
        if self.count:
            self.pipeline.readers = ThreadPoolExecutor(self.count, "read")
            self.pipeline.writers = ThreadPoolExecutor(self.count, "write")
            self.pipeline.ahead = 2 * self.count + 2

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for pool in (self.pipeline.readers, self.pipeline.writers):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=kind is not None)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any], depth: int
) -> Iterator[Any]:
    """``map`` in threads that keeps at most ``depth`` results waiting."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

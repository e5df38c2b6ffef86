"""Work on many files: detecting into a folder, rendering a data set, drawing labels; resumable."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fusion_core.atomic import PathLike, atomic_write
from fusion_core.errors import InputError, reading
from fusion_core.images import list_images, read_image, save_png
from fusion_core.progress import track
from fusion_core.results import dump_json
from fusion_core.store import Manifest, take_shard

from . import draw
from .config import LabelConfig
from .data import formats
from .data.dataset import UNFINISHED, find_annotation
from .data.synth import render
from .detect import TextDetector
from .detection import Detection
from .geometry import Array
from .targets import make_targets

OUTPUTS = ("json", "txt")


def names_of(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for the results of each picture: its stem, longer where two pictures share it.

    Example:
        >>> list(names_of([Path("a/x.jpg"), Path("b/x.jpg"), Path("b/y.png")]).values())
        ['a_x', 'b_x', 'y']
    """
    names: dict[Path, str] = {}
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        for path in paths:
            if path not in names or depth == 1:
                names[path] = "_".join((*path.parts[-depth:-1], path.stem)).replace("/", "").strip("_")
        count = Counter(names.values())
        if all(number == 1 for number in count.values()):
            return {path: names[path] for path in paths}
        names = {path: name for path, name in names.items() if count[name] == 1}
    return {path: names.get(path, f"{path.stem}-{at}") for at, path in enumerate(paths)}


def detect_files(
    detector: TextDetector,
    images: Iterable[PathLike],
    out: PathLike,
    *,
    format: str = "json",  # noqa: A002
    pictures: bool = True,
    crops: bool = False,
    shard: str | None = None,
    limit: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    num_workers: int = 2,
    progress: bool | None = None,
) -> tuple[list[Detection], dict[str, str]]:
    """Find the text of picture files and write one result a picture into a folder.

    Each picture NAME.ext gives NAME.json (or res_NAME.txt in the ICDAR form) and NAME.annotated.png;
    ``manifest.jsonl`` lists what is done and what failed, ``config.json`` the settings.

    Args:
        detector: the detector.
        images: files and folders.
        out: the folder, made if need be.
        format: ``"json"`` or ``"txt"``.
        pictures: write the annotated pictures.
        crops: write the straightened regions into NAME.crops.
        shard: ``"i/n"``: only every n-th picture from the i-th on.
        limit: only the first so many.
        resume: leave out what the manifest has; the settings have to be the same.
        overwrite: forget an earlier run in ``out``.
        num_workers: threads.
        progress: None shows a bar on a terminal only.

    Returns:
        The detections without their pixels, and path -> reason of the pictures that failed.

    Raises:
        InputError: no such file; ``out`` holds another run; other settings than those to be resumed.
    """
    if format not in OUTPUTS:
        raise InputError(f"format is {format!r}, wanted one of {list(OUTPUTS)}")
    listed = list_images(list(images))
    names = names_of(listed)
    wanted = take_shard(listed, shard)[:limit]
    target = Path(out)
    manifest = _open(target, _settings(detector, format), resume=resume, overwrite=overwrite)
    todo = [path for path in wanted if str(path) not in manifest]
    failed: dict[str, str] = {}

    def note(path: Any, error: InputError) -> None:
        failed[str(path)] = str(error)
        manifest.add(str(path), error=str(error))

    found: list[Detection] = []
    stream = detector.stream(todo, num_workers=num_workers, failed=note)
    for result in track(stream, "pictures", total=len(todo), enabled=progress):
        path = Path(str(result.source))
        _write(result, target, names[path], format, pictures=pictures, crops=crops)
        manifest.add(str(path), regions=len(result), seconds=round(sum(result.timings.values()), 4))
        found.append(result)
    return found, failed


def _settings(detector: TextDetector, format: str) -> dict[str, Any]:  # noqa: A002
    return {"model": detector.name, "format": format, "detect": detector.config.to_dict()}


def _open(target: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> Manifest:
    target.mkdir(parents=True, exist_ok=True)
    manifest, config = target / "manifest.jsonl", target / "config.json"
    if manifest.exists() and overwrite:
        manifest.unlink()
    elif manifest.exists() and not resume:
        raise InputError(f"out is {str(target)!r}, which holds another run; resume it, or overwrite it")
    elif manifest.exists() and config.is_file():
        with reading(config, "is damaged; overwrite the run"):
            before = dict(json.loads(config.read_text(encoding="utf-8")))
        if different := [key for key in settings if before.get(key) != settings[key]]:
            raise InputError(
                f"out is {str(target)!r}, whose run had other settings of {different}; overwrite it"
            )
    with atomic_write(config, "w") as file:
        file.write(dump_json(settings))
    return Manifest(manifest)


def _write(
    result: Detection,
    target: Path,
    name: str,
    kind: str,
    *,
    pictures: bool,
    crops: bool,
) -> None:
    result.save(target / (f"{name}.json" if kind == "json" else f"res_{name}.txt"))
    if pictures:
        result.save(target / f"{name}.annotated.png")
    if crops:
        folder = target / f"{name}.crops"
        folder.mkdir(exist_ok=True)
        for at, strip in enumerate(result.crops()):
            save_png(folder / f"{at:04d}.png", strip)


def render_files(
    out: PathLike,
    count: int,
    *,
    seed: int = 0,
    size: int | tuple[int, int] = 640,
    photos: PathLike | None = None,
    first: int = 0,
    num_workers: int = 1,
    progress: bool | None = None,
) -> int:
    """Render synthetic scenes into ``out/images`` and their words into ``out/gts``; what is there stays.

    Until all are there, ``out`` holds a mark with which no data set is read from it.

    The annotations are lines of 2K numbers and ``word``, or ``###`` for words to ignore: read them with
    ``datasets.totaltext(out)``.

    Args:
        out: the folder.
        count: how many scenes.
        seed: of the series.
        size: side, or (height, width), in pixels.
        photos: folder of photographs without text, in place of the installed ones.
        first: index of the first scene.
        num_workers: processes.
        progress: None shows a bar on a terminal only.

    Returns:
        How many scenes were made.

    Raises:
        InputError: ``count`` below 1, or no photographs.
    """
    if count < 1:
        raise InputError(f"count is {count!r}, wanted at least 1")
    target = Path(out)
    for name in ("images", "gts"):
        (target / name).mkdir(parents=True, exist_ok=True)
    todo = [
        (target, index, seed, size, str(photos) if photos else None)
        for index in range(first, first + count)
        if not (target / "gts" / f"gt_scene_{index:06d}.txt").is_file()
    ]
    mark = target / f"scenes-{first}-{first + count}{UNFINISHED}"  # others may render other scenes here
    if todo:
        mark.touch()
    if num_workers <= 1 or len(todo) < 2:
        for _ in track(map(_render_file, todo), "scenes", total=len(todo), enabled=progress):
            pass
    else:
        with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
            done = pool.imap_unordered(_render_file, todo, chunksize=8)
            for _ in track(done, "scenes", total=len(todo), enabled=progress):
                pass
    mark.unlink(missing_ok=True)
    return len(todo)


def _render_file(job: tuple[Path, int, int, Any, str | None]) -> None:
    target, index, seed, size, photos = job
    image, polygons, ignore = render(index, seed, size, photos=photos)
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    with atomic_write(target / "images" / f"scene_{index:06d}.jpg") as file:
        file.write(data.tobytes())
    with atomic_write(target / "gts" / f"gt_scene_{index:06d}.txt", "w") as file:
        for polygon, skip in zip(polygons, ignore, strict=True):
            numbers = ",".join(f"{value:.1f}" for value in np.asarray(polygon).reshape(-1).tolist())
            file.write(f"{numbers},{'###' if skip else 'word'}\n")


def label_pictures(
    image: PathLike,
    annotation: PathLike,
    out: PathLike,
    *,
    format: str = "icdar2015",  # noqa: A002
    labels: LabelConfig | None = None,
) -> list[Path]:
    """Draw what a network would learn from one picture: shrink map, mask, threshold map and its mask.

    Args:
        image: the picture.
        annotation: its words; a folder is searched for the picture's own file.
        out: a folder for four PNGs and an overview, made if need be.
        format: ``"icdar2015"`` or ``"totaltext"``.
        labels: how labels are made.

    Returns:
        The files.

    Raises:
        InputError: no image, or another format.
        AnnotationError: a line of another form; file and line are named.
    """
    readers = {"icdar2015": formats.icdar2015, "totaltext": formats.totaltext}
    if format not in readers:
        raise InputError(f"format is {format!r}, wanted one of {sorted(readers)}")
    picture, place = read_image(image), Path(annotation)
    words = readers[format](find_annotation(Path(image), place) if place.is_dir() else place)
    made = make_targets(words.polygons, words.ignore, (picture.shape[0], picture.shape[1]), labels)
    config = labels or LabelConfig()
    maps: dict[str, Array] = {
        "shrink": made.gt.numpy().astype(np.uint8) * 255,
        "mask": made.mask.numpy().astype(np.uint8) * 255,
        "threshold": draw.heat(made.thresh_map.numpy(), low=config.thresh_min, high=config.thresh_max),
        "threshold_mask": made.thresh_mask.numpy().astype(np.uint8) * 255,
    }
    target, stem = Path(out), Path(image).stem
    target.mkdir(parents=True, exist_ok=True)
    files = [save_png(target / f"{stem}.{name}.png", array) for name, array in maps.items()]
    shown = [draw.outlines(picture, words.polygons)]
    shown += [array if array.ndim == 3 else np.repeat(array[..., None], 3, 2) for array in maps.values()]
    titles = ["words", "shrink map G", "mask M", "threshold map", "its mask"]
    files.append(save_png(target / f"{stem}.labels.png", draw.panels(shown, titles)))
    return files

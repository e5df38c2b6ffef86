"""The detector: pictures in, regions out."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple, Self, cast, overload

import cv2
import numpy as np
import torch
from torch import Tensor

from fusion_core.batching import map_batches
from fusion_core.config import Config
from fusion_core.device import resolve_device
from fusion_core.errors import ConfigError, InputError, ShapeError
from fusion_core.images import read_image

from .config import PostConfig
from .detection import Detection, Region
from .geometry import Array, minimum_rectangle, order_corners, reading_order, rectangle_corners
from .model.dbnet import DBNet
from .postprocess import regions_from_map
from .tiling import tile_starts, tiled_map

__all__ = ["DetectConfig", "Detection", "MapOutput", "Region", "TextDetector"]


@dataclass(frozen=True)
class DetectConfig(Config):
    """How images are resized, batched and read.

    Attributes:
        resize: ``"short"`` brings the short side to ``short_side``; ``"height"`` the height (the authors'
            evaluation); ``"long"`` the long side to ``long_side``; ``"native"`` keeps the pixels and pads.
            Sides become multiples of 32, so the aspect ratio bends by less than 32 pixels.
        short_side: in pixels.
        long_side: in pixels, for ``"long"``.
        max_side: no side is made longer than this by enlarging; the image is made smaller as a whole.
        tile: side of the tiles for images that are larger after resizing, or None.
        overlap: of neighboring tiles.
        scales: the network runs at each of these multiples of the size and the largest probability counts.
        batch_size: images of one size in a forward pass.
        columns: read columns one after the other.
        keep_map: keep the probability map in the result.
        post: post-processing.
    """

    resize: Literal["short", "height", "long", "native"] = "short"
    short_side: int = 736
    long_side: int = 1280
    max_side: int = 4096
    tile: int | None = None
    overlap: int = 256
    scales: tuple[float, ...] = (1.0,)
    batch_size: int = 8
    columns: bool = False
    keep_map: bool = False
    post: PostConfig = field(default_factory=PostConfig)

    def __post_init__(self) -> None:
        if self.resize not in ("short", "height", "long", "native"):
            raise ConfigError(f"resize is {self.resize!r}, wanted 'short', 'height', 'long' or 'native'")
        self.check_fields("short_side", "long_side", "max_side", "tile", "batch_size", low=1)
        self.check_fields("overlap")
        self.check_fields("scales", open=True)
        if not self.scales:
            raise ConfigError("scales is empty, wanted positive numbers")
        if self.tile is not None:
            tile_starts(self.tile, self.tile, self.overlap)


class MapOutput(NamedTuple):
    """What the network says about one image.

    Attributes:
        prob: float32 (height', width') in [0, 1], over the whole image.
        attention: weights of p5, p4, p3, p2, float32 (4, rows, columns), or None: for a network without
            adaptive scale fusion, and for images in tiles.
        seconds: in the network.
    """

    prob: Array
    attention: Array | None
    seconds: float


class TextDetector:
    """Finds text in images.

    Args:
        net: a :class:`DBNet`; a copy made for inference is used.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:i"``, ``"mps"``.
        dtype: of the convolutions; ``"auto"`` takes bfloat16 where the device computes in it.
        config: :class:`DetectConfig`; by default the network's own size and post-processing.
        name: of the model, for the results.
        **settings: fields of :class:`DetectConfig` and :class:`PostConfig` to change, such as
            ``short_side=512, mode="polygon", box_thresh=0.5``.

    Raises:
        ConfigError: unknown or bad settings.
        InputError: no such device.

    Example:
        >>> from dbnet_asf import DBConfig, DBNet
        >>> detector = TextDetector(DBNet(DBConfig.nano()), device="cpu", short_side=64)
        >>> detector(np.full((40, 60, 3), 255, np.uint8)).size
        (40, 60)
    """

    def __init__(
        self,
        net: DBNet,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        config: DetectConfig | None = None,
        name: str = "",
        **settings: Any,
    ) -> None:
        self.device = resolve_device(device)
        self.network = net.config
        base = config or DetectConfig(
            resize=net.config.resize, short_side=net.config.short_side, post=net.config.post
        )
        post = {key: settings.pop(key) for key in list(settings) if key in _POST_FIELDS}
        if post:
            settings["post"] = settings.get("post", base.post).replace(**post)
        self.config = base.replace(**settings) if settings else base
        self.name = name
        self._net = net.to(self.device).fuse(dtype)
        spread = [float(value) for value in self.network.std]
        self._mean = torch.tensor(self.network.mean, device=self.device).view(1, 3, 1, 1)
        self._scale = (1 / torch.tensor(spread, device=self.device)).view(1, 3, 1, 1)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = "nano",
        *,
        hub: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Self:
        """A detector with trained weights; without arguments those inside the package, no download.

        Args:
            name_or_path: ``"nano"``, a folder that :meth:`DBNet.save_pretrained` wrote, or a repository of
                the Hugging Face hub.
            hub: ``revision``, ``token`` ... for the hub.
            **settings: of :class:`TextDetector`.

        Raises:
            CheckpointError: not there, damaged, or of another architecture.
        """
        net = DBNet.from_pretrained(name_or_path, **(hub or {}))
        return cls(net, name=settings.pop("name", str(name_or_path)), **settings)

    @overload
    def __call__(self, images: str | os.PathLike[str] | bytes | Array) -> Detection: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Detection]: ...
    @overload
    def __call__(self, images: Any) -> Any: ...
    def __call__(self, images: Any) -> Any:
        """Find the text of one image or of several.

        Args:
            images: a path, bytes, a PIL image, an array (height, width[, channels]) in RGB, a tensor
                (channels, height, width), or a list of them; a batch tensor or array counts as a list.

        Returns:
            A :class:`Detection`, or a list of them.

        Raises:
            InputError: what is no image; the message names it.
        """
        if isinstance(images, list | tuple) or (hasattr(images, "ndim") and images.ndim == 4):
            return list(self.stream(images))
        return next(self.stream([images]))

    def stream(
        self,
        images: Iterable[Any],
        *,
        num_workers: int = 2,
        failed: Callable[[Any, InputError], None] | None = None,
    ) -> Iterator[Detection]:
        """Find the text of any number of images, in order, with a bounded part of them in memory.

        Threads read the next images and cut the regions out of the last maps while the network runs; images
        that have one size after resizing share its forward passes.

        Args:
            images: as in a call; may be endless.
            num_workers: threads.
            failed: called with an image that cannot be read and the reason; such images are left out. By
                default the error is raised.
        """
        if num_workers < 1:
            raise ConfigError(f"num_workers is {num_workers!r}, wanted at least 1")
        return self._stream(images, num_workers, failed)

    def _stream(
        self, images: Iterable[Any], workers: int, failed: Callable[[Any, InputError], None] | None
    ) -> Iterator[Detection]:
        source = iter(images)
        size = self.config.batch_size
        with ThreadPoolExecutor(workers) as pool:
            reading = deque(_submit(pool, _read, islice(source, size)))
            finishing: deque[Future[Detection]] = deque()
            while reading:
                following = _submit(pool, _read, islice(source, size))
                loaded = list(_loaded(reading, failed))
                for item, output in zip(loaded, self._maps([item.image for item in loaded]), strict=True):
                    finishing.append(pool.submit(self._finish, item, output))
                reading = deque(following)
                while len(finishing) > (size if reading else 0):
                    yield finishing.popleft().result()

    def maps(self, images: Sequence[Array]) -> list[MapOutput]:
        """Probability maps and scale weights of uint8 RGB images, without post-processing.

        Raises:
            ShapeError: an image that is not uint8 (height, width, 3).
        """
        for at, image in enumerate(images):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
                raise ShapeError(
                    f"images[{at}] is {image.dtype} {image.shape}, wanted uint8 (height, width, 3)"
                )
        return list(self._maps(images))

    def _maps(self, images: Sequence[Array]) -> Iterator[MapOutput]:
        found: list[MapOutput | None] = [None] * len(images)
        ready = [self._resize(image, self.config.scales[0]) for image in images]
        buckets: dict[tuple[int, ...], list[int]] = {}
        for at, (image, _) in enumerate(ready):
            buckets.setdefault(image.shape, []).append(at)
        for members in buckets.values():
            outputs = self._run([ready[at][0] for at in members])
            for at, output in zip(members, outputs, strict=True):
                found[at] = self._crop(output, ready[at][1])
        for image, output in zip(images, cast("list[MapOutput]", found), strict=True):
            yield self._other_scales(image, output)

    def _other_scales(self, image: Array, first: MapOutput) -> MapOutput:
        prob, seconds = first.prob, first.seconds
        for scale in self.config.scales[1:]:
            resized, inside = self._resize(image, scale)
            other = self._crop(self._run([resized])[0], inside)
            seconds += other.seconds
            grown = cv2.resize(other.prob, prob.shape[::-1], interpolation=cv2.INTER_LINEAR)
            prob = np.maximum(prob, np.clip(grown, 0, 1))
        return MapOutput(prob, first.attention, seconds)

    def _resize(self, image: Array, scale: float) -> tuple[Array, tuple[int, int]]:
        """The image at the network's size, and how much of it is image (the rest is padding)."""
        height, width = network_size(image.shape[:2], self.config, scale)
        if self.config.resize == "native" and scale == 1:
            inside = image.shape[:2]
            if inside != (height, width):
                below, right = height - inside[0], width - inside[1]
                image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
            return image, (inside[0], inside[1])
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), (height, width)

    def _crop(self, output: MapOutput, inside: tuple[int, int]) -> MapOutput:
        height, width = inside
        if output.prob.shape == inside:
            return output
        return MapOutput(np.ascontiguousarray(output.prob[:height, :width]), output.attention, output.seconds)

    def _run(self, images: list[Array]) -> list[MapOutput]:
        tile, height, width = self.config.tile, *images[0].shape[:2]
        if tile is None or max(height, width) <= tile:
            return [output for batch in self._batches(images) for output in batch]
        outputs: list[MapOutput] = []
        for image in images:
            start = time.perf_counter()
            prob = tiled_map(image, self._tiles, tile=tile, overlap=self.config.overlap)
            outputs.append(MapOutput(prob, None, time.perf_counter() - start))
        return outputs

    def _tiles(self, tiles: list[Array]) -> Iterator[Array]:
        return (output.prob for batch in self._batches(tiles) for output in batch)

    def _batches(self, images: list[Array]) -> Iterator[list[MapOutput]]:
        return map_batches(self._forward, images, self.config.batch_size)

    @torch.inference_mode()
    def _forward(self, images: list[Array]) -> list[MapOutput]:
        start = time.perf_counter()
        output = self._net(self._normalize(images))
        prob = output.prob[:, 0].float().cpu().numpy()
        weights: Tensor | None = output.attention
        attention = None if weights is None else weights.float().cpu().numpy()
        seconds = (time.perf_counter() - start) / len(images)
        return [
            MapOutput(each, None if attention is None else attention[at], seconds)
            for at, each in enumerate(prob)
        ]

    def _normalize(self, images: list[Array]) -> Tensor:
        batch = torch.from_numpy(images[0][None] if len(images) == 1 else np.stack(images)).to(self.device)
        pixels = batch.permute(0, 3, 1, 2).float()  # stays channels last in memory
        if self.network.color == "bgr":
            pixels = pixels.flip(1)
        return pixels.sub_(self._mean).mul_(self._scale)

    def _finish(self, item: _Loaded, output: MapOutput) -> Detection:
        start = time.perf_counter()
        size = item.image.shape[0], item.image.shape[1]
        found = regions_from_map(output.prob, size, self.config.post, uncertainty=True)
        regions = make_regions(found.outlines, found.scores, found.uncertainty)
        order = reading_order([region.polygon for region in regions], columns=self.config.columns)
        timings = {"read": item.seconds, "network": output.seconds, "post": time.perf_counter() - start}
        return Detection(
            tuple(regions[at] for at in order),
            size,
            item.image,
            item.source,
            self.name,
            {**self.config.to_dict(), "network_size": list(output.prob.shape)},
            timings,
            output.prob if self.config.keep_map else None,
        )


_POST_FIELDS = frozenset(PostConfig.__dataclass_fields__)


class _Loaded(NamedTuple):
    image: Array
    source: str | None
    seconds: float


def _read(source: Any) -> _Loaded:
    start = time.perf_counter()
    image = read_image(source)
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    return _Loaded(image, name, time.perf_counter() - start)


def _submit(
    pool: ThreadPoolExecutor, fn: Callable[[Any], _Loaded], items: Iterable[Any]
) -> list[tuple[Any, Future[_Loaded]]]:
    return [(item, pool.submit(fn, item)) for item in items]


def _loaded(
    reading: deque[tuple[Any, Future[_Loaded]]], failed: Callable[[Any, InputError], None] | None
) -> Iterator[_Loaded]:
    for source, future in reading:
        try:
            yield future.result()
        except InputError as error:
            if failed is None:
                raise
            failed(source, error)


def network_size(size: tuple[int, int], config: DetectConfig, scale: float = 1.0) -> tuple[int, int]:
    """The (height, width), multiples of 32, at which an image goes through the network (section 2.5).

    Example:
        >>> network_size((480, 640), DetectConfig(short_side=736))
        (736, 992)
    """
    height, width = size
    if config.resize == "native":
        factor = 1.0
    elif config.resize == "long":
        factor = config.long_side / max(height, width)
    else:
        side = -(-config.short_side // 32) * 32
        factor = side / (height if config.resize == "height" else min(height, width))
    factor *= scale
    if factor > 1:
        factor = max(min(factor, config.max_side / max(height, width)), 1.0)
    return _up(height * factor), _up(width * factor)


def _up(length: float) -> int:
    return max(int(np.ceil(round(length / 32, 6))), 1) * 32


def make_regions(outlines: Any, scores: Array, uncertainty: Array | None) -> list[Region]:
    """Regions of outlines: quads (regions, 4, 2) or a list of polygons."""
    if not len(outlines):
        return []
    rectangles = np.array([minimum_rectangle(outline) for outline in outlines], np.float32)
    corners = order_corners(rectangle_corners(rectangles))
    across, down = corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0]
    rectangles[:, 2], rectangles[:, 3] = np.hypot(*across.T), np.hypot(*down.T)
    rectangles[:, 4] = np.rad2deg(np.arctan2(across[:, 1], across[:, 0]))
    quads = outlines if isinstance(outlines, np.ndarray) else corners
    doubts = np.zeros(len(scores), np.float32) if uncertainty is None else uncertainty
    return [
        Region(polygon, float(score), quad, cast("Any", tuple(rectangle)), float(doubt))
        for polygon, score, quad, rectangle, doubt in zip(
            outlines, scores, quads, rectangles.tolist(), doubts, strict=True
        )
    ]

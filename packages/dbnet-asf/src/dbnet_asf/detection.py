"""What a detector returns: regions in reading order, and ways to keep, cut out and draw them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from fusion_core.atomic import PathLike, atomic_write
from fusion_core.errors import InputError
from fusion_core.images import save_png
from fusion_core.results import Result, dump_json

from . import draw as drawing
from .geometry import Array, rectify

SCHEMA = "dbnet_asf.detection/1"


@dataclass(frozen=True, slots=True)
class Region(Result):
    """One piece of text.

    Attributes:
        polygon: outline float32 (points, 2) in pixels of the image, clockwise on the screen; the quad itself
            in quad mode.
        score: in [0, 1].
        quad: smallest rotated rectangle, float32 (4, 2): top left, top right, bottom right, bottom left.
        rect: the same as center x, center y, width (of the upper edge), height, angle of the upper edge in
            degrees, > 0 = falling to the right.
        border_uncertainty: mean of P (1 - P) along the outline in the map: 0 = sharp, 0.25 = a guess.
    """

    polygon: Array
    score: float
    quad: Array
    rect: tuple[float, float, float, float, float]
    border_uncertainty: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Axis-aligned bounds: left, top, right, bottom."""
        (left, top), (right, bottom) = self.polygon.min(0), self.polygon.max(0)
        return float(left), float(top), float(right), float(bottom)


@dataclass(frozen=True, slots=True)
class Detection(Result, Sequence[Region]):
    """The regions of one image, in reading order; a sequence of :class:`Region`.

    Attributes:
        regions: the regions.
        size: (height, width) of the image.
        image: uint8 RGB (height, width, 3), for crops and pictures.
        source: the path it was read from, or None.
        model: name of the model.
        settings: everything that made the regions.
        timings: seconds for ``read``, ``network`` and ``post``.
        prob: the probability map float32 (height', width') if it was asked for; it covers the image.
    """

    regions: tuple[Region, ...]
    size: tuple[int, int]
    image: Array
    source: str | None = None
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    timings: dict[str, float] = field(default_factory=dict[str, float])
    prob: Array | None = None

    @overload
    def __getitem__(self, index: int) -> Region: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Region, ...]: ...
    def __getitem__(self, index: int | slice) -> Region | tuple[Region, ...]:
        """A region, or several."""
        return self.regions[index]

    def __len__(self) -> int:
        """How many regions there are."""
        return len(self.regions)

    def __iter__(self) -> Iterator[Region]:
        """The regions."""
        return iter(self.regions)

    @property
    def polygons(self) -> list[Array]:
        """The outlines of all regions."""
        return [region.polygon for region in self.regions]

    @property
    def scores(self) -> Array:
        """The scores of all regions, float32."""
        return np.array([region.score for region in self.regions], np.float32)

    def above(self, score: float) -> Detection:
        """Those regions whose score is at least ``score``."""
        return dataclasses.replace(self, regions=tuple(r for r in self.regions if r.score >= score))

    def to_dict(self) -> dict[str, Any]:
        """JSON form: image, size, model, settings and the regions (without pixels and map)."""
        return {
            "schema": SCHEMA,
            "image": self.source,
            "width": self.size[1],
            "height": self.size[0],
            "model": self.model,
            "settings": self.settings,
            "seconds": {name: round(seconds, 4) for name, seconds in self.timings.items()},
            "regions": [
                {
                    "polygon": np.round(region.polygon, 2).tolist(),
                    "quad": np.round(region.quad, 2).tolist(),
                    "rect": [round(value, 2) for value in region.rect],
                    "score": round(region.score, 4),
                    "border_uncertainty": round(region.border_uncertainty, 4),
                }
                for region in self.regions
            ],
        }

    def to_icdar(self) -> str:
        """The ICDAR submission format: eight whole numbers a line, or 2K of a polygon with K points."""
        rows = [",".join(map(str, np.rint(r.polygon).astype(int).reshape(-1).tolist())) for r in self.regions]
        return "".join(f"{row}\n" for row in rows)

    def save_json(self, path: PathLike) -> None:
        """Write :meth:`to_dict` as JSON, whole or not at all."""
        with atomic_write(path, "w") as file:
            file.write(dump_json(self.to_dict()))

    def save(self, path: PathLike) -> None:
        """Write the result.

        Args:
            path: ``.json``; ``.txt`` (ICDAR); ``.png`` or ``.jpg`` (annotated picture); or a folder, made if
                need be, for NAME.json and NAME.annotated.png.

        Raises:
            InputError: another suffix, or a place that cannot be written.
        """
        target = Path(path)
        if target.suffix == ".json":
            self.save_json(target)
        elif target.suffix == ".txt":
            with atomic_write(target, "w") as file:
                file.write(self.to_icdar())
        elif target.suffix == ".png":
            save_png(target, np.asarray(self.draw()))
        elif target.suffix in (".jpg", ".jpeg"):
            with atomic_write(target) as file:
                self.draw().save(file, format="JPEG", quality=92)
        elif target.suffix == "":
            target.mkdir(parents=True, exist_ok=True)
            name = Path(self.source).stem if self.source else "image"
            self.save_json(target / f"{name}.json")
            self.save(target / f"{name}.annotated.png")
        else:
            raise InputError(f"path is {str(path)!r}, wanted .json, .txt, .png, .jpg or a folder")

    def crops(self, *, height: int | None = None) -> list[Array]:
        """The regions cut out and straightened, in reading order, for a recognizer.

        Args:
            height: of every strip in pixels; by default as large as in the image.

        Returns:
            uint8 RGB (height, width, 3) each; see :func:`dbnet_asf.geometry.rectify`.
        """
        return [rectify(self.image, region.polygon, height=height) for region in self.regions]

    def draw(self, *, scores: bool = False) -> Image.Image:
        """The image with the outlines drawn on it.

        Args:
            scores: write each score beside its region.
        """
        labels = [f"{region.score:.2f}" for region in self.regions] if scores else None
        return Image.fromarray(drawing.outlines(self.image, self.polygons, labels=labels))
